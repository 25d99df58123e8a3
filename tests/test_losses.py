"The losses against slow loops, at large scales, in half precision."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pli.composition import Sum
from pli.core import PliError, unit
from pli.losses import compose_query, contrastive, paper_loss


def features(seed, count=2, batch=5, width=7):
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, generator=chance) for _ in range(count)]


def slow_choice(dots):
    "Cross-entropy of the diagonal, row by row, in double precision."
    total = 0.0
    for i, row in enumerate(dots):
        top = max(row)
        total += top + math.log(sum(math.exp(x - top) for x in row)) - row[i]
    return total / len(dots)


def slow_dots(a, b, scale=1.0):
    return [[scale * sum(x * y for x, y in zip(p, q)) for q in b.double().tolist()] for p in a.double().tolist()]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 14.3, 100.0]), st.integers(1, 8))
def test_contrastive_follows_the_formula(seed, scale, batch):
    query, target = features(seed, batch=batch)
    there = slow_choice(slow_dots(unit(query.double()), unit(target.double()), scale))
    back = slow_choice(slow_dots(unit(target.double()), unit(query.double()), scale))
    assert contrastive(query, target, scale, symmetric=False).item() == pytest.approx(there, rel=1e-4, abs=1e-4)
    assert contrastive(query, target, scale).item() == pytest.approx((there + back) / 2, rel=1e-4, abs=1e-4)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 10.0]))
def test_paper_loss_follows_the_formula(seed, length):
    masked, text, target = (length * x for x in features(seed, 3))
    expected = slow_choice(slow_dots(masked + text, target))
    assert paper_loss(masked, text, target).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)))
def test_the_order_of_the_batch_does_not_matter(seed, order):
    masked, text, target = features(seed, 3)
    assert torch.allclose(contrastive(masked[order], target[order], 9.0), contrastive(masked, target, 9.0), atol=1e-5)
    assert torch.allclose(paper_loss(masked[order], text[order], target[order]), paper_loss(masked, text, target), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_computed_in_single_precision(dtype, autocast):
    masked, text, target = (x.to(dtype) for x in features(0, 3, batch=16))
    single = masked.float(), text.float(), target.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = contrastive(masked, target, 100.0), paper_loss(masked, text, target), contrastive(compose_query(masked, text), target, 100.0)
    expected = contrastive(single[0], single[2], 100.0), paper_loss(*single), contrastive(compose_query(*single[:2]), single[2], 100.0)
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-5)


def test_gradients_reach_every_half_and_the_scale():
    masked, text, target = (x.requires_grad_() for x in features(1, 3))
    scale = torch.tensor(2.0, requires_grad=True)
    contrastive(compose_query(masked, text), target, scale.exp()).backward()
    for x in (masked, text, target, scale): assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for x in (masked, text, target): x.grad = None
    paper_loss(masked, text, target).backward()
    for x in (masked, text, target): assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_following_the_gradient_lowers_the_loss():
    masked, text, target = features(2, 3)
    masked.requires_grad_()
    for loss in (lambda: paper_loss(masked, text, target), lambda: contrastive(compose_query(masked, text), target, 10.0)):
        before = loss()
        gradient, = torch.autograd.grad(before, masked)
        with torch.no_grad(): masked -= 0.01 * gradient
        assert loss() < before


def test_ends():
    same = torch.ones(6, 4)
    assert contrastive(same, same, 50.0).item() == pytest.approx(math.log(6), rel=1e-5)
    assert paper_loss(same, same, same).item() == pytest.approx(math.log(6), rel=1e-5)
    assert contrastive(torch.eye(6), torch.eye(6), 1000.0) == 0
    assert contrastive(same[:1], same[:1], 3.0) == 0                   # nobody to be confused with
    far = 200 * torch.eye(6)
    assert paper_loss(far, far, far.roll(1, 0)).isfinite()              # logits of 80,000, all wrong
    assert contrastive(torch.zeros(3, 4), torch.zeros(3, 4), 5.0).isfinite()


def test_the_training_query_is_the_search_query():
    masked, text = features(3)
    for weight in (0.0, 0.25, 1.0): assert torch.allclose(unit(compose_query(masked, text, weight)), Sum(weight).parts(masked, text)[0].float(), atol=1e-6)


a, b, c = features(4, 3)


@pytest.mark.parametrize("call, message", [
    (lambda: contrastive(a, b[:4], 1.0), "query (5, 7), target (4, 7)"),
    (lambda: contrastive(a, b[:, :6], 1.0), "query (5, 7), target (5, 6)"),
    (lambda: contrastive(a[0], b[0], 1.0), "one shape (batch, width)"),
    (lambda: contrastive(a[:0], b[:0], 1.0), "query (0, 7)"),
    (lambda: paper_loss(a, b[:1], c), "text (1, 7)"),
    (lambda: paper_loss(a, b, c[:4]), "target (4, 7)"),
    (lambda: compose_query(a, b[:4]), "masked (5, 7), text (4, 7)"),
    (lambda: compose_query(a, b, -1.0), "weight must be"),
])
def test_shapes_that_do_not_match_say_so(call, message):
    with pytest.raises(PliError) as caught: call()
    assert message in str(caught.value)


# ---- what the user has already

@pytest.mark.parametrize("per_query", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hard_negatives_as_a_loop(per_query, symmetric):
    chance = torch.Generator().manual_seed(0)
    query, target, hard_negatives = (torch.randn(7, 5, generator=chance, dtype=torch.float64) for _ in range(3))
    ignore = torch.tensor([False, True, False, False, True, False, False])
    cosine = lambda one, other: torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    forward, back = [], []
    for i in range(7):
        rivals = [cosine(query[i], target[j]) for j in range(7)] + [cosine(query[i], hard_negatives[j]) for j in range(7) if not ignore[j] and (j == i or not per_query)]
        forward.append(math.log(sum(math.exp(9 * rival) for rival in rivals)) - 9 * cosine(query[i], target[i]))
        back.append(math.log(sum(math.exp(9 * cosine(query[j], target[i])) for j in range(7))) - 9 * cosine(query[i], target[i]))
    wanted = (sum(forward) + sum(back)) / 14 if symmetric else sum(forward) / 7
    assert contrastive(query, target, 9.0, symmetric, hard_negatives, ignore, per_query).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("per_query", [True, False])
def test_ignored_rows_change_nothing_and_get_no_gradient(per_query):
    chance = torch.Generator().manual_seed(1)
    query, target, hard_negatives = (torch.randn(6, 4, generator=chance).requires_grad_() for _ in range(3))
    plain = contrastive(query, target, 5.0)
    assert torch.equal(contrastive(query, target, 5.0, hard_negatives=hard_negatives, ignore=torch.ones(6, dtype=torch.bool), per_query=per_query), plain)
    ignore = torch.tensor([True, False] * 3)
    loss = contrastive(query, target, 5.0, hard_negatives=hard_negatives, ignore=ignore, per_query=per_query)
    assert loss > plain
    wild = torch.where(ignore[:, None], torch.full_like(hard_negatives, 1e4), hard_negatives)                      # what an ignored row holds has no say
    assert torch.equal(contrastive(query, target, 5.0, hard_negatives=wild, ignore=ignore, per_query=per_query), loss)
    loss.backward()
    assert (hard_negatives.grad[ignore] == 0).all() and (hard_negatives.grad[~ignore] != 0).any() and all(x.grad.isfinite().all() for x in (query, target, hard_negatives))


def test_rows_of_zeros_that_are_barred_have_gradients_that_are_numbers():
    query = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hard_negatives = torch.zeros(3, 4).requires_grad_()
    contrastive(query, torch.eye(3, 4), 100.0, hard_negatives=hard_negatives, ignore=torch.ones(3, dtype=torch.bool), per_query=False).backward()
    assert query.grad.isfinite().all() and (hard_negatives.grad == 0).all()


def test_everybodys_is_harder_than_ones_own():
    chance = torch.Generator().manual_seed(2)
    query, target, hard_negatives = (torch.randn(8, 4, generator=chance) for _ in range(3))
    assert contrastive(query, target, 3.0) < contrastive(query, target, 3.0, hard_negatives=hard_negatives) < contrastive(query, target, 3.0, hard_negatives=hard_negatives, per_query=False)


def test_hard_negatives_in_half_precision():
    query, target, hard_negatives = (torch.randn(6, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    for per_query in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16): half = contrastive(query, target, 100.0, hard_negatives=hard_negatives, per_query=per_query)
        assert half.dtype == torch.float32 and torch.equal(half, contrastive(query.float(), target.float(), 100.0, hard_negatives=hard_negatives.float(), per_query=per_query))


@pytest.mark.parametrize("hard_negatives, ignore, says", [(torch.zeros(5, 4), None, r"hard_negatives \(5, 4\)"), (torch.zeros(6, 3), None, r"hard_negatives \(6, 3\)"), (torch.zeros(6, 4), torch.zeros(6), "ignore must be bool"),
                                                 (torch.zeros(6, 4), torch.zeros(5, dtype=torch.bool), r"ignore must be bool \(6,\)"), (torch.zeros(6, 4), torch.zeros(6, 1, dtype=torch.bool), "ignore must be bool")])
@pytest.mark.parametrize("per_query", [True, False])
def test_hard_negatives_that_do_not_fit(hard_negatives, ignore, says, per_query):
    with pytest.raises(PliError, match=says): contrastive(torch.ones(6, 4), torch.ones(6, 4), 1.0, hard_negatives=hard_negatives, ignore=ignore, per_query=per_query)


# ---- the same picture twice

@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_query", [None, True, False])
def test_the_same_picture_is_no_wrong_answer_as_a_loop(symmetric, per_query):
    query, target, hard_negatives = (part.double() for part in features(3, count=3, batch=7))
    pictures = [0, 1, 0, 2, 3, 1, 0]
    same = torch.tensor([[one == other for other in pictures] for one in pictures])
    cosine = lambda one, other: torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    forward, back = [], []
    for i in range(7):
        others = [j for j in range(7) if j == i or pictures[j] != pictures[i]]
        rivals = [cosine(query[i], target[j]) for j in others] + [cosine(query[i], hard_negatives[j]) for j in range(7) if per_query is False or (per_query and j == i)]   # changed versions stay wrong, of the same picture too
        forward.append(math.log(sum(math.exp(9 * rival) for rival in rivals)) - 9 * cosine(query[i], target[i]))
        back.append(math.log(sum(math.exp(9 * cosine(query[j], target[i])) for j in others)) - 9 * cosine(query[i], target[i]))
    wanted = (sum(forward) + sum(back)) / 14 if symmetric else sum(forward) / 7
    further = {} if per_query is None else {"hard_negatives": hard_negatives, "per_query": per_query}
    assert contrastive(query, target, 9.0, symmetric, same=same, **further).item() == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(contrastive(query, target, 9.0, symmetric, same=same & ~torch.eye(7, dtype=torch.bool), **further), contrastive(query, target, 9.0, symmetric, same=same, **further))


def test_the_same_picture_has_gradients_that_are_numbers_and_pushes_nothing_away():
    query, target = (part.requires_grad_() for part in features(4, batch=4))
    assert contrastive(query, target, 100.0, same=torch.ones(4, 4, dtype=torch.bool)) == 0           # all of them one picture: nothing to tell apart
    same = torch.tensor([0, 1, 0, 2])[:, None] == torch.tensor([0, 1, 0, 2])
    one, = torch.autograd.grad(contrastive(query, target, 5.0, symmetric=False, same=same), query)
    other, = torch.autograd.grad(contrastive(query[[0, 1, 3]], target[[0, 1, 3]], 5.0, symmetric=False), query)
    assert one.isfinite().all() and torch.allclose(one[0] * 4, other[0] * 3, atol=1e-6)              # for row 0 it is as if row 2, its other copy, were not there


@pytest.mark.parametrize("same", [torch.zeros(5, 5), torch.zeros(5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)])
def test_same_of_another_kind_or_shape(same):
    with pytest.raises(PliError, match=r"same must be bool \(5, 5\), got"): contrastive(*features(0), 1.0, same=same)

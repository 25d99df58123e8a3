"The metrics against slow loops that follow the definitions word by word."
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pli import metrics
from pli.core import PliError
from pli.metrics import average_precision_at, bootstrap, paired_bootstrap, paired_ratio, ranks, recall_at, subset_ranks


def worst_order(row, answers, left_out=-1, among=None):
    "Gallery indices, best first; of two equal scores the one that is not an answer comes first."
    pictures = range(len(row)) if among is None else among
    return sorted((j for j in pictures if j != left_out), key=lambda j: (-row[j], j in answers))


def slow_rank(row, answers, left_out=-1, among=None):
    order = [j for j in worst_order(row, answers, left_out, among)]
    return 1 + next(place for place, j in enumerate(order) if j in answers)


def slow_precision(row, answers, k, left_out=-1):
    hits, total = 0, 0.0
    for place, j in enumerate(worst_order(row, answers, left_out)[:k], start=1):
        if j in answers:
            hits += 1
            total += hits / place
    return total / min(k, len(answers))


@st.composite
def searches(draw):
    "A few queries with many equal scores, infinities, several answers and sometimes a left-out picture."
    gallery, queries = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, float("-inf"), float("inf")])
    rows, answers, left_out = [], [], []
    for _ in range(queries):
        rows.append(draw(st.lists(values, min_size=gallery, max_size=gallery)))
        out = draw(st.integers(-1, gallery - 1))
        free = [j for j in range(gallery) if j != out]
        answers.append(tuple(draw(st.lists(st.sampled_from(free), min_size=1, max_size=gallery))))  # doubles allowed
        left_out.append(out)
    return torch.tensor(rows), answers, torch.tensor(left_out)


@settings(deadline=None)
@given(searches())
def test_ranks_follow_the_definition(search):
    scores, answers, left_out = search
    expected = [slow_rank(*each) for each in zip(scores.tolist(), answers, left_out.tolist())]
    found = ranks(scores, answers, left_out)
    assert found.dtype == torch.int64 and found.tolist() == expected


@settings(deadline=None)
@given(searches(), st.integers(1, 12))
def test_average_precision_follows_the_definition(search, k):
    scores, answers, left_out = search
    expected = [slow_precision(row, set(a), k, o) for row, a, o in zip(scores.tolist(), answers, left_out.tolist())]
    assert torch.allclose(average_precision_at(scores, answers, k, left_out), torch.tensor(expected))


@settings(deadline=None)
@given(searches(), st.data())
def test_subset_ranks_follow_the_definition(search, data):
    scores, answers, _ = search
    pictures = st.lists(st.integers(0, scores.shape[1] - 1), max_size=5)
    members = [tuple(set(data.draw(pictures)) | {a[0]}) for a in answers]
    expected = [slow_rank(row, a, among=few) for row, a, few in zip(scores.tolist(), answers, members)]
    assert subset_ranks(scores, answers, members).tolist() == expected


@settings(deadline=None)
@given(searches(), st.permutations(range(9)))
def test_the_order_of_the_gallery_does_not_matter(search, order):
    scores, answers, left_out = search
    order = [j for j in order if j < scores.shape[1]]
    moved = lambda j: order.index(j) if j >= 0 else -1
    again = scores[:, order], [tuple(map(moved, a)) for a in answers], torch.tensor([moved(o) for o in left_out.tolist()])
    assert torch.equal(ranks(*again), ranks(scores, answers, left_out))


def test_pieces_change_nothing(monkeypatch):
    scores = torch.randint(0, 9, (50, 30), generator=torch.Generator().manual_seed(0)).float()
    answers = [tuple(range(q % 29, q % 29 + 1 + q % 2)) for q in range(50)]
    whole = ranks(scores, answers), average_precision_at(scores, answers, 5)
    monkeypatch.setattr(metrics, "PIECE", 64)
    assert torch.equal(ranks(scores, answers), whole[0])
    assert torch.equal(average_precision_at(scores, answers, 5), whole[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_kind_of_number(dtype):
    scores = torch.tensor([[3, 1, 2, 2]]).to(dtype)
    assert ranks(scores, [(2,)]).item() == 3
    assert average_precision_at(scores, [(2, 0)], 3).item() == pytest.approx((1 + 2 / 3) / 2)


def test_double_precision_is_kept():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert ranks(scores, [(1,)]).item() == 1


def test_no_queries_give_no_ranks():
    assert ranks(torch.zeros(0, 5), []).tolist() == []
    assert average_precision_at(torch.zeros(0, 5), [], 3).tolist() == []
    assert subset_ranks(torch.zeros(0, 5), [], []).tolist() == []


scores = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])


@pytest.mark.parametrize("call, message", [
    (lambda: ranks(scores, [(0,), ()]), "query 1 has no right answer"),
    (lambda: ranks(scores, [(0,), (3,)]), "query 1: right answer 3 is outside the gallery of 3"),
    (lambda: ranks(scores, [(-1,), (0,)]), "query 0: right answer -1 is outside"),
    (lambda: ranks(scores, [(0,)]), "2 rows of scores but answers for 1 queries"),
    (lambda: ranks(scores, [(0,), (1,)], torch.tensor([-1, 1])), "query 1: its right answer 1 is also the picture to leave out"),
    (lambda: ranks(scores, [(0,), (1,)], torch.tensor([-1, 3])), "query 1: left-out picture 3 is outside"),
    (lambda: ranks(scores, [(0,), (1,)], torch.tensor([-2, 0])), "query 0: left-out picture -2 is outside"),
    (lambda: ranks(scores, [(0,), (1,)], torch.tensor([0])), "left_out must hold one index a query"),
    (lambda: ranks(scores[0], [(0,)]), "scores must be (queries, gallery)"),
    (lambda: ranks(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), [(0,), (0,)]), "query 1: a score is not a number"),
    (lambda: average_precision_at(torch.tensor([[float("nan"), 1.0]]), [(1,)], 5), "query 0: a score is not a number"),
    (lambda: average_precision_at(scores, [(0,), (1,)], 0), "k >= 1"),
    (lambda: recall_at(torch.tensor([1]), 0), "k >= 1"),
    (lambda: subset_ranks(scores, [(0,), (1,)], [(0, 1), ()]), "query 1 has no member of its subset"),
    (lambda: subset_ranks(scores, [(0,), (1,)], [(0, 1), (0, 2)]), "query 1: none of its right answers"),
    (lambda: bootstrap(torch.zeros(0)), "one value a query"),
    (lambda: bootstrap(torch.tensor([1.0, float("nan")])), "query 1: its value is not a finite number"),
    (lambda: bootstrap(torch.ones(3), level=1.0), "0 < level < 1"),
    (lambda: bootstrap(torch.ones(3), draws=0), "draws >= 1"),
    (lambda: paired_bootstrap(torch.ones(3), torch.ones(4)), "got 3 and 4 values"),
    (lambda: paired_ratio(torch.ones(3), torch.zeros(3)), "mean is 0"),
])
def test_what_cannot_be_measured_says_so(call, message):
    with pytest.raises(PliError) as caught: call()
    assert message in str(caught.value)


def test_the_position_of_a_nan_is_counted_over_pieces(monkeypatch):
    monkeypatch.setattr(metrics, "PIECE", 4)
    broken = torch.zeros(9, 3); broken[7, 1] = float("nan")
    with pytest.raises(PliError, match="query 7"): ranks(broken, [(0,)] * 9)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_an_interval_holds_what_it_should(values, seed):
    values = torch.tensor(values, dtype=torch.float64)
    mean, low, high = bootstrap(values, draws=200, seed=seed)
    assert mean == pytest.approx(values.mean().item())
    assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9
    assert bootstrap(values, draws=200, seed=seed) == (mean, low, high)


def test_a_model_against_itself_differs_by_nothing():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert paired_bootstrap(values, values) == (0, 0, 0)
    assert paired_ratio(values, values) == (1, 1, 1)
    assert paired_ratio(3 * values.double(), values.double()) == pytest.approx((3, 3, 3))


def test_the_interval_covers_as_often_as_it_says():
    "Of 200 samples of 100 coin throws, about 95 % of the intervals hold the true 0.5."
    chance = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        _, low, high = bootstrap((torch.rand(100, generator=chance) < 0.5).float(), draws=300, seed=seed)
        held += low <= 0.5 <= high
    assert 180 <= held <= 199


def test_a_ratio_with_draws_of_nothing_is_open_above():
    a, b = torch.ones(3), torch.tensor([0.0, 0.0, 1.0])
    ratio, low, high = paired_ratio(a, b)
    assert ratio == pytest.approx(3) and low >= 1 and high == float("inf")


def test_a_thousand_draws_over_five_thousand_queries_are_quick():
    values, start = torch.rand(5000), time.perf_counter()
    bootstrap(values)
    assert time.perf_counter() - start < 2

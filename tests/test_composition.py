"Composers and the one path to scores, against slow loops and at their edges."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pli.composition import COMPOSERS, Harris, ImageOnly, Product, Slerp, Sum, TextOnly, mean_feature, min_max_scale, parse_composer, score
from pli.core import PliError

EVERY = [kind(weight) for kind in COMPOSERS.values() for weight in kind.grid]


def features(seed, queries=4, gallery=9, width=6, dtype=torch.float64):
    chance = torch.Generator().manual_seed(seed)
    draw = lambda n: (torch.randn(n, width, generator=chance, dtype=torch.float64) + 0.5).to(dtype)
    return draw(queries), draw(queries), draw(gallery)


def slow_unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def slow_mean(rows):
    rows = [slow_unit(row) for row in rows]
    return [sum(column) / len(rows) for column in zip(*rows)]


def slow_score(composer, reference, text, gallery, left_out):
    "One number at a time, straight from the formulas."
    minus = lambda x, m: slow_unit([a - b for a, b in zip(slow_unit(x), m)])
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    image_mean, text_mean, table = slow_mean(gallery), slow_mean(text), []
    for r, t, out in zip(reference, text, left_out):
        w, row = composer.weight, []
        if composer.name in ("product", "harris"):
            lists = []
            for half in (minus(r, image_mean), minus(t, text_mean)):
                raw = [dot(half, minus(g, image_mean)) for g in gallery]
                kept = [s for j, s in enumerate(raw) if j != out]
                lists.append([(s - min(kept)) / (max(kept) - min(kept)) for s in raw])
            for j, (i, s) in enumerate(zip(*lists)):
                if j == out: row.append(-math.inf); continue
                p = max(i, 0.0) ** w
                row.append(p * s - (0.1 * (p + s) ** 2 if composer.name == "harris" else 0))
        else:
            r, t = slow_unit(r), slow_unit(t)
            angle = math.acos(max(-1, min(1, dot(r, t))))
            query = {"image": lambda: r, "text": lambda: t, "sum": lambda: [b + w * a for a, b in zip(r, t)],
                     "slerp": lambda: [math.sin((1 - w) * angle) * b + math.sin(w * angle) * a for a, b in zip(r, t)]}[composer.name]()
            row = [-math.inf if j == out else dot(slow_unit(query), slow_unit(g)) for j, g in enumerate(gallery)]
        table.append(row)
    return torch.tensor(table, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(EVERY), st.lists(st.integers(-1, 8), min_size=4, max_size=4))
def test_score_follows_the_formulas(seed, composer, left_out):
    reference, text, gallery = features(seed)
    expected = slow_score(composer, reference.tolist(), text.tolist(), gallery.tolist(), left_out)
    found = score(composer, reference, text, gallery, torch.tensor(left_out))
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("composer", EVERY, ids=str)
def test_lengths_and_left_out_pictures_change_nothing(composer):
    reference, text, gallery = features(0, dtype=torch.float32)
    left_out = torch.tensor([0, 3, -1, 8])
    scores = score(composer, reference, text, gallery, left_out)
    assert torch.allclose(score(composer, 7 * reference, 0.1 * text, gallery * 3, left_out), scores, atol=1e-5)
    assert (scores == -math.inf).nonzero().tolist() == [[0, 0], [1, 3], [3, 8]]
    assert not scores.isnan().any()


@pytest.mark.parametrize("composer", EVERY, ids=str)
def test_queries_in_chunks_score_the_same_with_the_mean_handed_over(composer):
    reference, text, gallery = features(1)
    whole = score(composer, reference, text, gallery)
    mean = mean_feature(text)
    parts = [score(composer, reference[q:q + 1], text[q:q + 1], gallery, text_mean=mean) for q in range(4)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-9)


@pytest.mark.parametrize("composer", EVERY, ids=str)
def test_a_gallery_of_one_and_of_equals_gives_finite_scores(composer):
    reference, text, gallery = features(2)
    for pictures in (gallery[:1], gallery[:1].expand(5, -1)):
        assert score(composer, reference, text, pictures, image_mean=mean_feature(gallery)).isfinite().all()
        assert score(composer, reference, text, pictures).isfinite().all()
    assert (score(composer, reference, text, gallery[:1], [0, 0, 0, 0]) == -math.inf).all()


@pytest.mark.parametrize("composer", EVERY, ids=str)
def test_no_queries_give_no_scores(composer):
    reference, text, gallery = features(3)
    assert score(composer, reference[:0], text[:0], gallery).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("composer", [Sum(1), Slerp(0.3), Product(), Harris(0.5)], ids=str)
def test_half_precision_features_are_scored_in_single(composer, dtype):
    reference, text, gallery = features(4, dtype=dtype)
    found = score(composer, reference, text, gallery)
    assert found.dtype == torch.float32
    assert torch.allclose(found, score(composer, reference.float(), text.float(), gallery.float()), atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-9, 1e-7, 1e-5, 1e-3, 0.1]), st.sampled_from([1, -1]), st.floats(0, 1))
def test_slerp_stays_on_the_circle_near_equal_and_opposite(seed, apart, side, weight):
    text, noise, _ = features(seed, dtype=torch.float32)
    text = torch.nn.functional.normalize(text, dim=-1)
    reference = torch.nn.functional.normalize(side * text + apart * noise, dim=-1)
    query, = Slerp(weight).parts(reference, text)
    assert torch.allclose(query.norm(dim=-1), torch.ones(4), atol=1e-5)
    angle = lambda a, b: 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    assert torch.allclose(angle(query, text), weight * angle(reference, text), atol=2e-3)
    if side > 0: assert torch.allclose(angle(query, reference), (1 - weight) * angle(reference, text), atol=2e-3)


def test_slerp_ends_at_its_halves():
    reference, text, _ = features(5)
    assert torch.allclose(Slerp(0).parts(reference, text)[0], TextOnly().parts(reference, text)[0])
    assert torch.allclose(Slerp(1).parts(reference, text)[0], ImageOnly().parts(reference, text)[0])


def test_slerp_and_sum_meet_in_the_middle():
    reference, text, _ = features(6)
    assert torch.allclose(Slerp(0.5).parts(reference, text)[0], Sum(1).parts(reference, text)[0])


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_harris_prefers_balance(a, b):
    "Of two pictures with the same product, the balanced one scores at least as well."
    middle = torch.tensor(math.sqrt(a * b), dtype=torch.float64)
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert Harris().fuse(middle, middle) >= Harris().fuse(a, b) - 1e-12


def test_features_keep_their_gradients_in_parts():
    reference, text, _ = features(7, dtype=torch.float32)
    reference.requires_grad_(), text.requires_grad_()
    for composer in (Sum(1), Slerp(0.4)):
        composer.parts(reference, text)[0][:, 0].sum().backward()
    assert reference.grad.isfinite().all() and text.grad.abs().sum() > 0


def test_the_left_out_picture_has_no_say_in_the_scale():
    row = torch.tensor([[9.0, 2.0, 1.0]])
    assert min_max_scale(row, torch.tensor([0]))[0, 1:].tolist() == [1, 0]
    assert min_max_scale(torch.ones(2, 3), torch.tensor([-1, 2])).eq(0).all()


def test_the_arguments_are_left_as_they_were():
    reference, text, gallery = features(8)
    before = [x.clone() for x in (reference, text, gallery)]
    for composer in EVERY: score(composer, reference, text, gallery, [0, 1, 2, 3])
    assert all(torch.equal(x, y) for x, y in zip(before, (reference, text, gallery)))


@pytest.mark.parametrize("composer", EVERY, ids=str)
def test_names_come_back(composer):
    assert parse_composer(str(composer)) == composer
    assert str(parse_composer(str(composer))) == str(composer)


@settings(deadline=None)
@given(st.floats(0, 1e6))
def test_any_weight_comes_back(weight):
    assert parse_composer(str(Sum(weight))) == Sum(weight)


reference, text, gallery = features(9)


@pytest.mark.parametrize("call, message", [
    (lambda: parse_composer("mean"), "known are image, text, sum, slerp, product, harris"),
    (lambda: parse_composer(""), "unknown composer ''"),
    (lambda: parse_composer("sum:"), "weight must be a number"),
    (lambda: parse_composer("sum:-1"), "sum: weight must be finite and not negative, got -1"),
    (lambda: parse_composer("product:nan"), "product: weight must be finite"),
    (lambda: parse_composer("harris:inf"), "harris: weight must be finite"),
    (lambda: parse_composer("slerp:1.01"), "slerp: weight must be from 0 to 1"),
    (lambda: parse_composer("image:0.5"), "image takes no weight"),
    (lambda: score(Sum(), reference, text[:2], gallery), "reference and text must be (queries, width)"),
    (lambda: score(Sum(), reference, text, gallery[:, :3]), "of the same width"),
    (lambda: score(Sum(), reference[0], text[0], gallery), "(queries, width)"),
    (lambda: score(Sum(), reference, text, gallery[:0]), "the gallery is empty"),
    (lambda: score(Sum(), reference, text, gallery, [0]), "left_out must hold one index a query (4)"),
    (lambda: score(Sum(), reference, text, gallery, [0, 9, 0, 0]), "query 1: left-out picture 9"),
    (lambda: score(Product(), reference[:1], text[:1], gallery), "pass text_mean"),
    (lambda: score(Harris(), reference, text[:1].expand(4, -1), gallery), "pass text_mean"),
    (lambda: mean_feature(gallery[:0]), "is the gallery empty"),
])
def test_what_cannot_be_composed_says_so(call, message):
    with pytest.raises(PliError) as caught: call()
    assert message in str(caught.value)

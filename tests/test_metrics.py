"The metrics against slow loops that follow the definitions word by word."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pli import metrics
from pli.core import PliError
from pli.metrics import ABSENT, average_precision_at, bootstrap, paired_bootstrap, paired_ratio, places, ranks, recall_at, subset_ranks


def worst_order(row, answers, left_out=-1, among=None):
    "Gallery indices, best first; of two equal scores the one that is not an answer comes first."
    pictures = range(len(row)) if among is None else among
    return sorted((j for j in pictures if j != left_out), key=lambda j: (-row[j], j in answers))


def slow_rank(row, answers, left_out=-1, among=None):
    order = [j for j in worst_order(row, answers, left_out, among)]
    return 1 + next(place for place, j in enumerate(order) if j in answers)


def slow_places(row, answers, left_out=-1):
    return [place for place, j in enumerate(worst_order(row, answers, left_out), start=1) if j in answers]


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
@given(searches())
def test_places_follow_the_definition(search):
    scores, answers, left_out = search
    expected = [slow_places(*each) for each in zip(scores.tolist(), answers, left_out.tolist())]
    found, most = places(scores, answers, left_out), max(map(len, expected))
    assert found.dtype == torch.int64 and found.tolist() == [row + [0] * (most - len(row)) for row in expected]
    assert torch.equal(found[:, 0], ranks(scores, answers, left_out))


@settings(deadline=None)
@given(searches(), st.integers(1, 12))
def test_average_precision_follows_the_definition(search, k):
    scores, answers, left_out = search
    expected = [slow_precision(row, set(a), k, o) for row, a, o in zip(scores.tolist(), answers, left_out.tolist())]
    found = average_precision_at(places(scores, answers, left_out), k)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True), st.data(), st.integers(1, 15))
def test_a_list_that_ends_early_scores_what_circos_walk_down_it_scores(listed, data, k):
    "Written from the definition: precision at each rank that holds a right picture; answers outside the list are never found."
    right = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True))
    labels = np.isin(listed, right)
    precisions = np.cumsum(labels) * labels / np.arange(1, len(listed) + 1)
    found = [1 + listed.index(j) for j in listed if j in right]
    row = found + [ABSENT] * (len(right) - len(found))
    assert average_precision_at([row], k).item() == pytest.approx(precisions[:k].sum() / min(len(right), k), abs=1e-12)
    assert average_precision_at([row + [0, 0]], k).item() == average_precision_at([row], k).item()
    assert average_precision_at([row], 2**40).item() == pytest.approx(precisions.sum() / len(right))            # nothing is deep enough to find what is not listed


def test_places_on_many_queries_equal_a_sort():
    "Half precision, so that ties abound; one to thirty answers; every second reference left out; several pieces."
    chance = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 500, generator=chance).half()
    answers = [tuple(torch.randperm(499, generator=chance)[:1 + q % 30].tolist()) for q in range(40)]
    left_out = torch.where(torch.arange(40) % 2 == 0, 499, -1)
    expected = [slow_places(row, set(a), o) for row, a, o in zip(scores.tolist(), answers, left_out.tolist())]
    for piece in (2**22, 3000, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "_PIECE", piece)
            assert places(scores, answers, left_out).tolist() == [row + [0] * (30 - len(row)) for row in expected]


@settings(deadline=None)
@given(searches(), st.data())
def test_subset_ranks_follow_the_definition(search, data):
    scores, answers, _ = search
    pictures = st.lists(st.integers(0, scores.shape[1] - 1), max_size=5)
    members = [tuple(data.draw(pictures)) + (a[0],) for a in answers]                     # doubles allowed, in any number
    expected = [slow_rank(row, a, among=few) for row, a, few in zip(scores.tolist(), answers, map(set, members))]
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
    whole = ranks(scores, answers), places(scores, answers)
    monkeypatch.setattr(metrics, "_PIECE", 64)
    assert torch.equal(ranks(scores, answers), whole[0])
    assert torch.equal(places(scores, answers), whole[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_kind_of_number(dtype):
    scores = torch.tensor([[3, 1, 2, 2]]).to(dtype)
    assert ranks(scores, [(2,)]).item() == 3
    assert places(scores, [(2, 0)]).tolist() == [[1, 3]]
    assert subset_ranks(scores, [(2,)], [(3, 1, 2)]).item() == 2


def test_double_precision_is_kept():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert ranks(scores, [(1,)]).item() == 1


def test_no_queries_give_no_ranks():
    assert ranks(torch.zeros(0, 5), []).tolist() == []
    assert places(torch.zeros(0, 5), []).shape == (0, 1) and average_precision_at(places(torch.zeros(0, 5), []), 3).tolist() == []
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
    (lambda: places(scores, [(0,), ()]), "query 1 has no right answer"),
    (lambda: places(torch.tensor([[float("nan"), 1.0]]), [(1,)]), "query 0: a score is not a number"),
    (lambda: places(scores, [(0,), (1,)], torch.tensor([-1, 1])), "query 1: its right answer 1 is also the picture to leave out"),
    (lambda: average_precision_at([[1]], 0), "k >= 1"),
    (lambda: average_precision_at(torch.tensor([1, 2]), 5), "places must be (queries, most)"),
    (lambda: average_precision_at(torch.zeros(2, 0), 5), "places must be (queries, most)"),
    (lambda: average_precision_at([[1, 2], [0, 0]], 5), "query 1: places must rise"),
    (lambda: average_precision_at([[1, 2], [3, 3]], 5), "query 1: places must rise"),
    (lambda: average_precision_at([[1, 2], [2, 1]], 5), "query 1: places must rise"),
    (lambda: average_precision_at([[1, 0, 2]], 5), "query 0: places must rise"),
    (lambda: average_precision_at([[1, -1]], 5), "query 0: places must rise"),
    (lambda: recall_at(torch.tensor([1]), 0), "k >= 1"),
    (lambda: subset_ranks(scores, [(0,), (1,)], [(0, 1), ()]), "query 1 has no member of its subset"),
    (lambda: subset_ranks(scores, [(0,), (1,)], [(0, 1), (0, 2)]), "query 1: none of its right answers"),
    (lambda: subset_ranks(scores, [(0,), (1,)], [(0, 1)]), "answers for 1 queries"),
    (lambda: subset_ranks(scores, [(0,), (1,)], [(0, 1), (1, 3)]), "query 1: member of its subset 3 is outside"),
    (lambda: subset_ranks(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), [(0,), (0,)], [(0,), (1, 0)]), "query 1: a score is not a number"),
    (lambda: bootstrap(torch.zeros(0)), "one value a query"),
    (lambda: bootstrap(torch.tensor([1.0, float("nan")])), "query 1: its value is not a finite number"),
    (lambda: bootstrap(torch.ones(3), level=1.0), "0 < level < 1"),
    (lambda: bootstrap(torch.ones(3), draws=0), "draws >= 1"),
    (lambda: paired_bootstrap(torch.ones(3), torch.ones(4)), "got 3 and 4 values"),
    (lambda: paired_ratio(torch.ones(3), torch.zeros(3)), "mean is 0"),
    (lambda: paired_ratio(torch.ones(3), torch.zeros(3), strata=[0, 0, 1]), "mean is 0"),
    (lambda: bootstrap(torch.ones(3), strata=[0, 1]), "one whole number a query (3)"),
    (lambda: bootstrap(torch.ones(3), strata=torch.zeros(3, 1, dtype=torch.int64)), "shape (3, 1)"),
    (lambda: bootstrap(torch.ones(3), strata=torch.zeros(3)), "torch.float32"),
    (lambda: bootstrap(torch.ones(2), strata=["dress", "shirt"]), "give names numbers"),
    (lambda: paired_bootstrap(torch.ones(3), torch.ones(3), strata=[0, 1]), "one whole number a query (3)"),
])
def test_what_cannot_be_measured_says_so(call, message):
    with pytest.raises(PliError) as caught: call()
    assert message in str(caught.value)


def test_the_position_of_a_nan_is_counted_over_pieces(monkeypatch):
    monkeypatch.setattr(metrics, "_PIECE", 4)
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


# ---- numbers that stored results stand on

def sample(queries, seed): return torch.randint(0, 1025, (queries,), generator=torch.Generator().manual_seed(seed)) / 1024


def test_intervals_without_strata_never_change():
    "Computed before strata came; sums of these values are exact, so every digit counts."
    a, b = sample(37, 1), sample(37, 2)
    assert bootstrap(a) == (0.4838735219594595, 0.3913112331081081, 0.5822687922297297)
    assert bootstrap(a, draws=50, seed=3, level=0.8) == (0.4838735219594595, 0.4360747466216216, 0.5363439611486487)
    assert paired_bootstrap(a, b, seed=4) == (0.010346283783783784, -0.12455130912162163, 0.15529983108108109)
    assert paired_ratio(a, b, draws=200, seed=5) == (1.0218493952399532, 0.7632815838199686, 1.4474829086389063)
    c, d = (sample(6016, 6) < 0.3).float(), (sample(6016, 7) < 0.25).float()                  # more than one piece
    assert bootstrap(c, seed=1) == (0.30169547872340424, 0.2900598404255319, 0.31316489361702127)
    assert paired_ratio(c, d) == (1.19486504279131, 1.1260815822002472, 1.2613713509843856)


# ---- strata

def test_one_stratum_is_no_strata():
    a, b, one = sample(50, 1), sample(50, 2), torch.full((50,), 7)
    assert bootstrap(a, strata=one) == bootstrap(a)
    assert paired_bootstrap(a, b, strata=one) == paired_bootstrap(a, b)
    assert paired_ratio(a, b, strata=one) == paired_ratio(a, b)


def test_every_draw_stays_within_its_stratum():
    "Strata that are constant inside leave nothing to chance, however different they are, and wherever their queries stand."
    strata = torch.tensor([2, 0, 2, 5, 0, 2])
    a, b = torch.tensor([1.0, 2.0, 1.0, 6.0, 2.0, 1.0]), torch.tensor([0.5, 1.0, 0.5, 1.5, 1.0, 0.5])
    assert bootstrap(a, strata=strata) == (3, 3, 3)
    assert paired_bootstrap(a, b, strata=strata) == (2, 2, 2)
    assert paired_ratio(a, b, strata=strata) == (3, 3, 3)
    low, high = bootstrap(a)[1:]
    assert low < high


def test_the_mean_of_strata_by_a_slow_loop():
    values, strata = sample(60, 3), [i % 7 % 3 for i in range(60)]
    means = [sum(v for v, s in zip(values.tolist(), strata) if s == label) / strata.count(label) for label in range(3)]
    mean, low, high = bootstrap(values, strata=strata)
    assert mean == pytest.approx(sum(means) / 3, abs=1e-12) and low < mean < high
    assert paired_bootstrap(values, values * 0, strata=strata)[0] == mean
    assert paired_ratio(values, values / 2, strata=strata) == pytest.approx((2, 2, 2))


def test_a_stratum_of_one_query_adds_its_value_and_no_spread():
    many = sample(200, 4).double()
    alone = bootstrap(many)
    mean, low, high = bootstrap(torch.cat([many, torch.tensor([0.25])]), strata=[0] * 200 + [1])
    assert mean == pytest.approx((alone[0] + 0.25) / 2) and high - low == pytest.approx((alone[2] - alone[1]) / 2, rel=0.15)


def test_labels_of_strata_are_only_labels():
    values, strata = sample(30, 5), torch.arange(30) % 3
    assert bootstrap(values, strata=strata) == bootstrap(values, strata=strata * 100 - 7) == bootstrap(values, strata=strata.tolist()) == bootstrap(values, strata=strata.to(torch.uint8))


def test_a_stratified_interval_covers_as_often_as_it_says():
    "Three strata of 20, 60 and 120 throws of unequal coins: the mean of the three shares is (0.2 + 0.5 + 0.8) / 3."
    shares, strata = torch.tensor([0.2, 0.5, 0.8]), torch.arange(3).repeat_interleave(torch.tensor([20, 60, 120]))
    chance, held = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        _, low, high = bootstrap((torch.rand(200, generator=chance) < shares[strata]).float(), draws=300, seed=seed, strata=strata)
        held += low <= 0.5 <= high
    assert 178 <= held <= 199


# ---- the size of a benchmark

def test_all_of_cirr_is_ranked_at_once():
    scores = torch.rand(4181, 2297, generator=torch.Generator().manual_seed(0))
    members = [tuple((q + 7 * i) % 2297 for i in range(5)) for q in range(4181)]
    found = subset_ranks(scores, [(row[q % 5],) for q, row in enumerate(members)], members)
    assert sorted(set(found.tolist())) == [1, 2, 3, 4, 5]
    for q in (0, 17, 4180): assert found[q] == slow_rank(scores[q].tolist(), {members[q][q % 5]}, among=members[q])

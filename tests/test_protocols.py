"Every benchmark against a slow evaluator of its own, on made-up and official annotations: ties, perfect and worst rankings, chance."
import itertools
import zlib
from functools import lru_cache, partial
from math import sqrt
from pathlib import Path
from typing import Callable

import layouts
import numpy as np
import pytest
import slow_evaluators as slow
import torch
from slow_evaluators import MEASURES, Query

from pli.benchmarks.circo import with_gallery
from pli.benchmarks.registry import read_benchmark
from pli.benchmarks.shape import Benchmark
from pli.evaluation.ranks import Features, rank_queries, sweep, measure_queries
from pli.evaluation.choosing import grouping_of, grouped_interval
from pli.evaluation.report import report

READ = {"fashioniq": slow.fashioniq, "cirr": slow.cirr, "circo": slow.circo, "genecis": slow.genecis}
# what the protocol's text means, as arguments of the slow reader
CASES = [
    ("fashioniq", "default", {}),
    ("fashioniq", "reference=left-out,joining=and,orders=both", {"reference": "left-out", "joining": "and", "orders": "both"}),
    ("fashioniq", "masked-tuning", {"authors": True}),
    ("fashioniq", "gallery=val,reference=left-out", {"gallery": "val", "reference": "left-out"}),
    ("cirr", "default", {}),
    ("circo", "default", {}),
    ("cirr", "masked-tuning", {"authors": True}),
    ("genecis", "default", {}),
]
MORE_CASES = [
    ("fashioniq", "clip4cir", {}),
    ("fashioniq", "val", {"gallery": "val"}),
    ("fashioniq", "searle", {"joining": "strip", "orders": "averaged"}),
    ("fashioniq", "joining=and,orders=both", {"joining": "and", "orders": "both"}),
    ("fashioniq", "pic2word", {"joining": "reversed"}),
    ("fashioniq", "reference=left-out,joining=and,orders=averaged", {"reference": "left-out", "joining": "and", "orders": "averaged"}),
    ("fashioniq", "gallery=val,orders=both", {"gallery": "val", "orders": "both"}),
    ("cirr", "reference=kept", {"reference": "kept"}),
    ("cirr", "masked-tuning,queries=first-2297", {"authors": True, "most": 2297}),
    ("circo", "reference=left-out", {"reference": "left-out"}),
    ("circo", "masked-tuning", {}),
    ("genecis", "masked-tuning", {}),
]


# ------------------------------------------------------------------ features
class Drawn(dict):
    "Features by name: drawn when first asked for, the same for the same name in any order."
    def __init__(self, draw: Callable[[np.random.Generator], np.ndarray], seed: int = 0):
        self.draw, self.seed = draw, seed

    def random(self, name: str) -> np.random.Generator: return np.random.default_rng([zlib.crc32(name.encode()), self.seed])

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = self.draw(self.random(name))
        return self[name]


def kin(queries: list[Query], pictures: Drawn, alike: Callable) -> None:
    "Let further right answers and the subset resemble the main answer, so that they compete with it."
    for query in queries:
        main = pictures[query.right[0]]
        for name in (*query.right, *query.subset):
            if name not in pictures: pictures[name] = alike(pictures.random(name), main)


def fine(queries: list[Query], width: int = 64) -> tuple[dict, dict]:
    "No two scores alike; the words lie between the main answer and chance, so that it comes anywhere from first to lost."
    pictures = Drawn(lambda random: random.standard_normal(width))
    kin(queries, pictures, lambda random, main: main + random.standard_normal(width))
    words = {}
    for query in queries:
        random, main = pictures.random(f"words of {query.id}"), pictures[query.right[0]]
        words[query.id] = main / np.linalg.norm(main) + random.uniform(0.5, 4) * random.standard_normal(width) / sqrt(width)
    return pictures, words


def coarse(queries: list[Query], width: int = 64) -> tuple[dict, dict]:
    """Signs, where many scores are exactly equal. The words agree with the reference at a quarter of the `width` (a power of 4) places: their sum is 0 elsewhere, its
    length is a power of 2, and every score is a whole number over a power of 2, which no order of summation can round."""
    pictures = Drawn(lambda random: random.choice([-1.0, 1.0], width))
    kin(queries, pictures, lambda random, main: np.where(random.random(width) < 0.25, -main, main))
    words = {}
    for query in queries:
        random, main, reference = pictures.random(f"words of {query.id}"), pictures[query.right[0]], pictures[query.reference]
        alike, other = (random.permutation(np.flatnonzero((main == reference) == wanted)) for wanted in (True, False))
        helpful = min(len(alike), int(random.integers(width // 8, width // 4 + 1)))
        agree = np.concatenate([alike[:helpful], other, alike[helpful:]])[: width // 4]
        words[query.id] = -reference
        words[query.id][agree] *= -1
    return pictures, words


def as_features(benchmark: Benchmark, pictures: dict, words: dict) -> Features:
    "The same features in the benchmark's own numbering, found by the names that the official files use."
    rows = (np.stack([pictures[name] for name in benchmark.pictures]), np.stack([words[name] for name in benchmark.ids]))
    return Features(*(torch.nn.functional.normalize(torch.from_numpy(each), dim=-1) for each in rows))


# ------------------------------------------------------------------ both sides
def searched_in_circo(root: Path, more: int) -> tuple[str, ...]:
    "The pictures that CIRCO's annotations name, and made-up ones."
    named = {str(number) for record in slow.load(root / "annotations" / "val.json") for number in (record["reference_img_id"], record["target_img_id"], *record["gt_img_ids"])}
    return (*sorted(named), *(str(10**7 + 3 * i) for i in range(more)))


def read_both(name: str, root: Path, protocol: str, meaning: dict, more: int = 0) -> tuple[Benchmark, list[Query]]:
    "The benchmark as `pli` reads it, and its queries as the slow reader sees them."
    benchmark = read_benchmark(name, root, "val" if name != "genecis" else None, protocol)
    if name == "circo":
        gallery = searched_in_circo(root, more)
        return with_gallery(benchmark, gallery), list(slow.circo(root, gallery, **meaning))
    if name == "genecis": meaning = meaning | {"tasks": tuple(dict.fromkeys(benchmark.categories))}
    return benchmark, list(READ[name](root, **meaning))


def assert_same(benchmark: Benchmark, queries: list[Query], features: tuple[dict, dict], spec: str = "sum:1", weight: float = 1) -> dict[str, dict[str, float]]:
    "Every query, kind, aspect and the summary, measured both ways; returns what the slow evaluator found."
    measures = MEASURES[benchmark.name]
    assert benchmark.scoring.measures == measures
    assert sorted(benchmark.ids) == sorted(query.id for query in queries) and len(set(benchmark.ids)) == len(benchmark.ids)
    by_id = {query.id: query for query in queries}
    assert list(benchmark.categories) == [by_id[name].kind for name in benchmark.ids]
    found = slow.evaluate(queries, *features, weight, measures)
    ranked, frame = rank_queries(as_features(benchmark, *features), benchmark, spec), grouping_of(benchmark)
    for measure in measures:
        wanted = torch.tensor([found[name][measure] for name in benchmark.ids], dtype=torch.float64)
        got = measure_queries(ranked, measure)
        wrong = ((got - wanted).abs() > 1e-9).nonzero().flatten().tolist()
        assert not wrong, f"{measure}: {len(wrong)} queries differ, first {benchmark.ids[wrong[0]]}: {got[wrong[0]]} instead of {wanted[wrong[0]]}"
        assert abs(grouped_interval(frame, got)[0] - slow.summary(queries, found, measure)) < 1e-9
        for kind, mean in slow.by_kind(queries, found, measure).items():
            assert abs(got[torch.tensor([each == kind for each in benchmark.categories])].mean().item() - mean) < 1e-9
        for aspect, mean in slow.by_aspect(queries, found, measure).items():
            assert abs(got[torch.tensor([aspect in each for each in benchmark.aspects])].mean().item() - mean) < 1e-9
    return found


def tied(queries: list[Query], features: tuple[dict, dict], weight: float = 1) -> float:
    "The share of queries whose main answer has the score of a wrong picture."
    pictures, words = features
    count = 0
    for query in queries:
        vector = slow.one(words[query.id]) + weight * slow.one(pictures[query.reference])
        scores = np.stack([pictures[name] for name in query.gallery]) @ vector
        main, others = scores[query.gallery.index(query.right[0])], [i for i, name in enumerate(query.gallery) if name not in query.right and name != query.left_out]
        count += bool((scores[others] == main).any())
    return count / len(queries)


# ------------------------------------------------------------------ the slow part is right about what can be seen by eye
def test_slow_evaluator_by_eye():
    query = Query("1", "all", "r", ("a", "d"), ("r", "a", "b", "c", "d"), left_out="r", subset=("c", "a", "b"))
    scores = np.array([9.0, 5.0, 5.0, 7.0, 1.0])
    assert slow.ranking(query.gallery, scores, ("a",), "r") == ["c", "b", "a", "d"]     # `b` has the score of `a` and comes before it
    assert slow.ranking(query.gallery, scores, ("b",)) == ["r", "c", "a", "b", "d"]
    assert slow.average_precision(["c", "b", "a", "d"], ("a", "d"), 5) == (1 / 3 + 2 / 4) / 2
    assert slow.average_precision(["c", "b", "a", "d"], ("a", "d"), 3) == (1 / 3) / 2
    assert slow.average_precision(["a", "b", "c", "d"], ("a", "d"), 1) == 1
    found = slow.measured(query, scores, np.array([7.0, 5.0, 5.0]), ("recall@2", "recall@3", "subset recall@2", "subset recall@3", "mAP@5"))
    assert found == {"recall@2": 0, "recall@3": 1, "subset recall@2": 0, "subset recall@3": 1, "mAP@5": (1 / 3 + 2 / 4) / 2}


# ------------------------------------------------------------------ made-up annotations
def made(name: str, folder: Path) -> Path:
    "Annotations with what is rare in the official ones: kinds of different size, a target that is in its own gallery already, and references in galleries."
    make = {"fashioniq": partial(layouts.make_fashioniq, gallery=80), "cirr": layouts.make_cirr, "circo": partial(layouts.make_circo, info=False), "genecis": layouts.make_genecis}
    root = make[name](folder, queries=30, pictures=False)
    if name == "fashioniq":
        layouts.edit(root / "captions" / "cap.dress.val.json", lambda records: records[:11])
        layouts.add_pairs(root)
    if name == "genecis":
        for task in layouts.TASKS[1:]:
            layouts.edit(root / f"{task}.json", lambda records: records[0]["gallery"].insert(2, records[0]["target"]))
            layouts.edit(root / f"{task}.json", lambda records: [record["gallery"].append(record["reference"]) for record in records[::2]] and records)
        layouts.edit(root / "change_object.json", lambda records: records[:11])
    return root


@pytest.mark.parametrize("draw", [fine, coarse, partial(coarse, width=16)], ids=["fine", "coarse", "very coarse"])
@pytest.mark.parametrize("name, protocol, meaning", CASES + MORE_CASES)
def test_made_up_annotations(name, protocol, meaning, draw, tmp_path):
    benchmark, queries = read_both(name, made(name, tmp_path), protocol, meaning, more=40)
    features = draw(queries)
    found = assert_same(benchmark, queries, features)
    assert_same(benchmark, queries, features, "text", 0)
    assert draw is fine or tied(queries, features) > 0.1
    assert len({value for each in found.values() for value in each.values()}) > 1


@pytest.mark.parametrize("name, protocol, meaning", CASES + MORE_CASES)
def test_words_of_every_protocol(name, protocol, meaning, tmp_path):
    benchmark, queries = read_both(name, made(name, tmp_path), protocol, meaning)
    assert dict(zip(benchmark.ids, benchmark.texts)) == {query.id: query.words for query in queries}


SLIPS = {
    "another main answer": lambda query: query._replace(right=((query.subset or query.gallery)[3], *query.right[1:])),
    "another reference": lambda query: query._replace(reference=query.gallery[4]),
    "the reference ranked, or not": lambda query: query._replace(left_out="" if query.left_out else query.reference) if query.reference in query.gallery else query,
    "pictures too few": lambda query: query._replace(gallery=tuple(name for i, name in enumerate(query.gallery) if i % 2 or name in (*query.right, *query.subset))),
    "the reference in the subset": lambda query: query._replace(subset=query.subset and (*query.subset, query.reference)),
    "one right answer only": lambda query: query._replace(right=query.right[:1]),
    "kinds mixed up": lambda query: query._replace(kind="dress" if query.kind == "shirt" else query.kind),
}


@pytest.mark.parametrize("name, protocol, meaning", CASES)
def test_a_slip_would_show(name, protocol, meaning, tmp_path, monkeypatch):
    benchmark, queries = read_both(name, made(name, tmp_path), protocol, meaning, more=40)
    features, shown = coarse(queries, width=16), set()
    for slip, change in SLIPS.items():
        changed = [change(query) for query in queries]
        if changed == queries: continue
        with pytest.raises(AssertionError): assert_same(benchmark, changed, features)
        shown.add(slip)
    assert {"another main answer", "another reference", "pictures too few"} <= shown and len(shown) >= 4
    honest = slow.ranking
    monkeypatch.setattr(slow, "ranking", lambda names, scores, late, *rest: honest(names, scores, tuple(name for name in names if name not in late), *rest))
    with pytest.raises(AssertionError): assert_same(benchmark, queries, features)     # ties in favour of the right answers


# ------------------------------------------------------------------ official annotations
@lru_cache(maxsize=1)
def official(folder: Path, name: str, protocol: str, draw: Callable) -> tuple:
    "One benchmark from its official files with features; kept for the next test."
    benchmark, queries = read_both(name, folder / name, protocol, next(meaning for *which, meaning in CASES if which == [name, protocol]), more=5000)
    return benchmark, queries, draw(queries)


OFFICIAL = [(name, protocol, draw) for name, protocol, _ in CASES for draw in (fine, coarse) if protocol == "default" or draw is coarse]


@pytest.mark.parametrize("name, protocol, draw", OFFICIAL)
def test_official_annotations(name, protocol, draw, shared):
    benchmark, queries, features = official(shared / "annotations", name, protocol, draw)
    found = assert_same(benchmark, queries, features)
    assert draw is fine or tied(queries[::20], features) > 0.3
    for measure in MEASURES[name]: assert 0.02 < slow.summary(queries, found, measure) < 0.98, measure     # neither a floor nor a ceiling: a slip would show
    if draw is coarse and protocol == "default": assert_reported(benchmark, queries, features, found)


def assert_reported(benchmark: Benchmark, queries: list[Query], features: tuple[dict, dict], found: dict[str, dict[str, float]]) -> None:
    "The report's rounded percentages of every kind and aspect, and of all."
    composers = ("image", "text", "sum:1")
    said = report(sweep(as_features(benchmark, *features), benchmark, composers), benchmark, chosen=dict(zip(("image", "text", "sum"), composers)))
    for measure in MEASURES[benchmark.name]:
        wanted = slow.by_kind(queries, found, measure)
        if len(wanted) > 1: wanted["mean"] = slow.summary(queries, found, measure)
        assert set(wanted) == set(said["kinds"])
        for kind, mean in wanted.items(): assert abs(said["kinds"][kind]["composers"]["sum"][measure][0] - 100 * mean) < 0.00501, (measure, kind)
    wanted = slow.by_aspect(queries, found, "mAP@10") if benchmark.name == "circo" else {}
    assert len(wanted) == (9 if benchmark.name == "circo" else 0) and set(wanted) == set(said.get("aspects", ()))
    for aspect, mean in wanted.items(): assert abs(said["aspects"][aspect]["composers"]["sum"]["mAP@10"][0] - 100 * mean) < 0.00501, aspect


@pytest.mark.parametrize("name", ["cirr", "genecis"])
def test_official_annotations_with_few_levels(name, shared):
    benchmark, queries, features = official(shared / "annotations", name, "default", partial(coarse, width=16))
    assert_same(benchmark, queries, features)
    assert tied(queries[::20], features) > 0.5


# ------------------------------------------------------------------ known answers
def aimed(queries: list[Query], sign: int) -> tuple[dict, dict]:
    "Words that are all right answers together, the main one twice; or the opposite of that."
    wide = 1024 if any(len(query.right) > 1 for query in queries) else 64
    pictures = Drawn(lambda random: slow.one(random.standard_normal(wide)))
    return pictures, {query.id: sign * (pictures[query.right[0]] + sum(pictures[name] for name in query.right)) for query in queries}


def worst(query: Query, measure: str) -> float:
    "The least that is possible: nothing, unless so few pictures are ranked that a right one must be among the first."
    name, _, k = measure.rpartition("@")
    if name.startswith("mean("): return (worst(query, "recall@5") + worst(query, "subset recall@1")) / 2
    ranked = [each for each in query.gallery if each != query.left_out]
    if name == "recall": return float(len(ranked) <= int(k))
    if name == "subset recall": return float(len(query.subset) <= int(k))
    last = [each for each in ranked if each not in query.right] + list(query.right)
    return slow.average_precision(last, query.right, int(k))


def check_known(benchmark: Benchmark, queries: list[Query]) -> None:
    "100 for the perfect ranking and the least for the worst one, in every measure of every query."
    for sign, known in ((1, lambda query, measure: 1.0), (-1, worst)):
        ranked = rank_queries(as_features(benchmark, *aimed(queries, sign)), benchmark, "text")
        by_id = {query.id: query for query in queries}
        for measure in MEASURES[benchmark.name]:
            wanted = torch.tensor([known(by_id[name], measure) for name in benchmark.ids], dtype=torch.float64)
            assert torch.equal(measure_queries(ranked, measure), wanted), (measure, sign)


@pytest.mark.parametrize("name, protocol, meaning", CASES + MORE_CASES)
def test_perfect_and_worst_on_made_up_annotations(name, protocol, meaning, tmp_path):
    check_known(*read_both(name, made(name, tmp_path), protocol, meaning, more=40))


@pytest.mark.parametrize("name, protocol, meaning", [case for case in CASES if case[1] in ("default", "gallery=val,reference=left-out")])
def test_perfect_and_worst_on_official_annotations(name, protocol, meaning, shared):
    check_known(*read_both(name, shared / "annotations" / name, protocol, meaning, more=500))


def check_equal_pictures(benchmark: Benchmark, queries: list[Query]) -> None:
    "A backbone that sees every picture alike finds nothing: all scores are equal, whatever the last bit of a matrix product depends on."
    by_id = {query.id: query for query in queries}
    for width in (64, 100, 512):
        picture, random = slow.one(np.random.default_rng(width).standard_normal(width)), np.random.default_rng(1)
        words = slow.one(random.standard_normal((len(benchmark), width)))
        features = Features(*(torch.tensor(each, dtype=torch.float32) for each in (np.tile(picture, (len(benchmark.pictures), 1)), words)))
        for spec, ranked in sweep(features, benchmark, ("image", "text", "sum:0.25", "product:1")).items():
            for measure in MEASURES[benchmark.name]:
                least = torch.tensor([worst(by_id[name], measure) for name in benchmark.ids], dtype=torch.float64)
                assert torch.equal(measure_queries(ranked, measure), least), (width, spec, measure)


@pytest.mark.parametrize("name, protocol, meaning", CASES)
def test_equal_pictures_find_nothing(name, protocol, meaning, tmp_path):
    check_equal_pictures(*read_both(name, made(name, tmp_path), protocol, meaning, more=40))


def test_equal_pictures_find_nothing_in_official_annotations(shared):
    benchmark, queries = read_both("genecis", shared / "annotations" / "genecis", "default", {})
    check_equal_pictures(benchmark.pick(list(range(0, len(benchmark), 10))), queries)


# ------------------------------------------------------------------ chance
def chance_precision(pictures: int, right: int, k: int) -> float:
    "The expected AP@k of a random ranking: a rank holds a right answer with probability right/pictures, and every rank before it then with (right-1)/(pictures-1)."
    return sum(right / pictures * (1 + (rank - 1) * (right - 1) / max(1, pictures - 1)) / rank for rank in range(1, min(k, pictures) + 1)) / min(k, right)


def chance(query: Query, measure: str) -> float:
    "What a random ranking of the query's pictures scores on average."
    name, _, k = measure.rpartition("@")
    if name.startswith("mean("): return (chance(query, "recall@5") + chance(query, "subset recall@1")) / 2
    ranked = len(query.gallery) - (query.left_out in query.gallery)
    if name == "recall": return min(1.0, int(k) / ranked)
    if name == "subset recall": return min(1.0, int(k) / len(query.subset))
    return chance_precision(ranked, len(query.right), int(k))


@pytest.mark.parametrize("pictures, right, k", [(1, 1, 5), (6, 1, 3), (6, 2, 3), (7, 3, 2), (6, 4, 6), (5, 5, 3)])
def test_chance_of_precision_by_counting(pictures, right, k):
    every = [slow.average_precision([("right" if i in where else "wrong") for i in range(pictures)], ("right",) * right, k)
             for where in itertools.combinations(range(pictures), right)]
    assert sum(every) / len(every) == pytest.approx(chance_precision(pictures, right, k))


@pytest.mark.parametrize("name, protocol, meaning, seeds", [(*case, {"fashioniq": 3, "cirr": 5, "circo": 25, "genecis": 2}[case[0]]) for case in CASES if case[1] in ("default", "gallery=val,reference=left-out")])
def test_chance_on_official_annotations(name, protocol, meaning, seeds, shared):
    benchmark, queries = read_both(name, shared / "annotations" / name, protocol, meaning)
    by_id = {query.id: query for query in queries}
    drawn = []
    for seed in range(seeds):
        pictures = Drawn(lambda random: random.standard_normal(32), seed)
        drawn.append(rank_queries(as_features(benchmark, pictures, Drawn(lambda random: random.standard_normal(32), seed + 1000)), benchmark, "text"))
    kinds = {kind: torch.tensor([each == kind for each in benchmark.categories]) for kind in dict.fromkeys(benchmark.categories)}
    for measure in MEASURES[name]:
        wanted = torch.tensor([chance(by_id[each], measure) for each in benchmark.ids], dtype=torch.float64)
        found = torch.stack([measure_queries(one, measure) for one in drawn])
        errors = {}
        for kind, rows in kinds.items():
            errors[kind] = found[:, rows].std().item() / sqrt(found[:, rows].numel())
            off = (found[:, rows].mean() - wanted[rows].mean()).item()
            assert abs(off) < 3.29 * errors[kind], f"{measure}, {kind}: {off:g} off, more than 3.29 standard errors of {errors[kind]:g}"
        off = np.mean([(found[:, rows].mean() - wanted[rows].mean()).item() for rows in kinds.values()])
        assert abs(off) < 3.29 * sqrt(sum(each**2 for each in errors.values())) / len(kinds), measure


# ------------------------------------------------------------------ masked tuning's authors
def test_counts_of_masked_tuning_on_official_annotations(shared):
    folder = shared / "annotations"
    fashioniq = read_benchmark("fashioniq", folder / "fashioniq", protocol="masked-tuning")
    sizes = [len(gallery) for gallery in fashioniq.galleries]
    assert sizes == [2454, 2962, 2808] and [fashioniq.categories.count(kind) for kind in ("dress", "shirt", "toptee")] == [2 * 1869, 2 * 1944, 2 * 1877] and fashioniq.without_reference
    usual = read_benchmark("fashioniq", folder / "fashioniq")
    asked = lambda benchmark, rows: [(benchmark.categories[i], benchmark.pictures[benchmark.references[i]], benchmark.pictures[benchmark.answers[i][0]]) for i in rows]
    whole = iter(asked(usual, range(len(usual))))
    assert all(pair in whole for pair in asked(fashioniq, range(0, len(fashioniq), 2)))              # in the order of the JSON
    plain, spelled = (read_benchmark("cirr", folder / "cirr", protocol=protocol) for protocol in ("default", "masked-tuning"))
    assert sum(one != other for one, other in zip(plain.texts, spelled.texts)) == 2563 and len(plain) == len(spelled) == 4181 and plain.ids == spelled.ids
    first = read_benchmark("cirr", folder / "cirr", protocol="masked-tuning,queries=first-2297")
    assert first.ids == spelled.ids[:2297] and first.texts == spelled.texts[:2297] and len(first.galleries[0]) == 2297
    assert [read_benchmark("circo", folder / "circo", split, "masked-tuning").without_reference for split in ("val", "test")] == [False, True]
    assert [len(usual), len(plain), *(len(read_benchmark("circo", folder / "circo", split)) for split in ("val", "test"))] == [2017 + 2038 + 1961, 4181, 220, 800]
    genecis = read_benchmark("genecis", folder / "genecis", protocol="masked-tuning")
    sizes = [len(genecis.galleries[i]) for i in genecis.gallery_of.tolist()]
    assert sizes.count(14) == 1 and genecis.ids[sizes.index(14)] == "change_object-19" and set(sizes) == {14, 15} and len(genecis) == 3920


def texts_alone(benchmark: Benchmark, width: int = 32) -> dict[str, np.ndarray]:
    "Features of queries that depend on the exact text and on nothing else."
    return {name: np.random.default_rng(zlib.crc32(" ".join(words).encode())).standard_normal(width) for name, words in zip(benchmark.ids, benchmark.texts)}


@pytest.mark.parametrize("name, protocol, meaning", [("fashioniq", "masked-tuning", {"authors": True}), ("cirr", "masked-tuning", {"authors": True}), ("cirr", "masked-tuning,queries=first-2297", {"authors": True, "most": 2297})])
def test_features_from_a_hash_of_the_exact_text(name, protocol, meaning, shared):
    benchmark, queries = read_both(name, shared / "annotations" / name, protocol, meaning)
    pictures, own = Drawn(lambda random: random.standard_normal(32)), {query.id: np.random.default_rng(zlib.crc32(query.words[0].encode())).standard_normal(32) for query in queries}
    assert_same(benchmark, queries, (pictures, own))
    assert all(np.array_equal(own[each], theirs) for each, theirs in texts_alone(benchmark).items())


def raw_features(benchmark: Benchmark, pictures: dict, words: dict, as_they_came: bool) -> Features:
    rows = [torch.from_numpy(np.stack(each)) for each in ([pictures[name] for name in benchmark.pictures], [words[name] for name in benchmark.ids])]
    if as_they_came: return Features(*rows)
    return Features(*(torch.nn.functional.normalize(each, dim=-1) for each in rows), *(each.norm(dim=1) for each in rows))


@pytest.mark.parametrize("as_they_came", [True, False])
def test_genecis_adds_raw_features(shared, as_they_came):
    benchmark, queries = read_both("genecis", shared / "annotations" / "genecis", "masked-tuning", {})
    pictures = Drawn(lambda random: 7 * random.uniform(0.5, 2) * random.standard_normal(32))
    words = {query.id: (9 * pictures[query.right[0]] / 50 + 3 * pictures.random(query.id).standard_normal(32)) * pictures.random(query.id).uniform(0.2, 3) for query in queries}
    found = slow.evaluate(queries, pictures, words, 1, MEASURES["genecis"], raw=True)
    table = sweep(raw_features(benchmark, pictures, words, as_they_came), benchmark, ["raw-sum:1", "sum:1"])
    for measure in MEASURES["genecis"]:
        assert torch.equal(measure_queries(table["raw-sum:1"], measure), torch.tensor([found[name][measure] for name in benchmark.ids], dtype=torch.float64)), measure
    assert not torch.equal(table["raw-sum:1"].rank, table["sum:1"].rank)

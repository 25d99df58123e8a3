"pli.evaluation: ranks against a slow loop, weights that never see what they are reported on, intervals over what belongs together, reports that can be read back."
import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pli import world
from pli.backbones.loading import load_backbone
from pli.benchmarks.shape import Benchmark, Missing, Scoring, own_queries, world_queries
from pli.benchmarks.own import read_queries
from pli.composition import COMPOSERS, mean_feature, parse_composer, score
from pli.core import PliError, rng_for, unit
from pli.data.pairs import Pairs
from pli.data.batches import PairSet, TensorPairs
from pli.data.pictures import PictureError
from pli.evaluation.ranks import Features, QueryRanks, encode, all_composers, as_query_ranks, rank_queries, scores_of, sweep, measure_queries
from pli.evaluation.choosing import Grouping, missing_bounds, choose_composer, choose_families, cross_fitted, grouping_of, fold_of, unimodal_baselines, grouped_interval
from pli.evaluation.writers import format_csv, format_latex, format_markdown, format_markdown_page, format_page, format_text, report_rows, wide_rows, sweep_rows, write_report
from pli.evaluation.compare import compare, comparison
from pli.evaluation.report import decode_ranks, report
from pli.evaluation.validation import pair_validator, plain_recall, query_validator, same_pictures
from pli.evaluation.significance import significant, verdict
from pli.gallery.encode import PictureFiles, encode_pictures, encode_texts
from pli.metrics import bootstrap, recall_at

GALLERY = ["a.png", "b.png", "sub/c.png", "größe 日本.png"]
RECORD = {"reference_img_id": "a.png", "relative_caption": "in red", "target_img_id": "b.png", "gt_img_ids": ["b.png", "sub/c.png"], "kind": "colour"}


def picture(path: Path, colour=(200, 30, 30), kind="PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, kind)
    return path


def write(path: Path, what) -> Path:
    path.write_text(json.dumps(what), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(GALLERY): picture(tmp_path / name, (number, 0, 0))
    write(tmp_path / "gallery.json", GALLERY)
    write(tmp_path / "queries.json", [RECORD])
    return tmp_path


def read(folder: Path, *records) -> Benchmark:
    return read_queries(write(folder / "queries.json", list(records)), folder / "gallery.json")


class Fake:
    "A backbone made of two functions; counts what it is asked."
    device, grid = torch.device("cpu"), (2, 2)

    def __init__(self, image, text=None): self.image, self.text, self.pictures, self.texts = image, text, 0, []

    def pixels(self, picture): return pil_to_tensor(picture)

    def encode_image(self, pixels, hidden=None):
        self.pictures += len(pixels)
        return self.image(pixels)

    def encode_text(self, texts):
        self.texts += texts
        return torch.stack([self.text(text) for text in texts])


def blind(pixels): raise AssertionError("nothing may be encoded")


# --- from files to features

def test_a_reference_outside_the_gallery_is_encoded_and_not_searched(folder):
    picture(folder / "other.png", (9, 0, 0))
    queries = read(folder, RECORD, RECORD | {"reference_img_id": "other.png"}, RECORD | {"reference_img_id": "other.png"})
    assert len(queries.galleries[0]) == 4 and queries.pictures == (*GALLERY, "other.png")
    assert queries.references.tolist() == [0, 4, 4]
    fake = Fake(lambda pixels: torch.nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 12).float(), lambda text: torch.ones(12))
    features = encode(fake, queries)
    assert features.pictures.shape == (5, 12) and fake.texts == ["in red"]   # each once
    table = sweep(features, queries, ["image"])
    assert table["image"].rank.tolist() == [2, 3, 3]                             # ties count against: 2 strangers (of 3 without the reference, 4 with none left out), 2 answers


def test_every_missing_picture_is_counted_before_any_work(folder):
    names = GALLERY + [f"gone {i}.png" for i in range(6)] + ["broken.png"]
    (folder / "broken.png").write_text("no picture")
    write(folder / "gallery.json", names)
    queries = read(folder, RECORD | {"reference_img_id": "x" * 200 + ".png"})
    for call in (lambda: encode(Fake(blind), queries), lambda: query_validator(queries)):
        with pytest.raises(PliError) as caught: call()
        assert f"8 of 12 pictures in {folder} cannot be used: gone 0.png (missing picture)" in str(caught.value) and str(caught.value).endswith(" and 3 more")
    with pytest.raises(PliError, match=r"1 of 1 pictures in .* cannot be used: broken.png \(broken picture\)$"): PictureFiles(["broken.png"], folder, pil_to_tensor)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_cut_off_in_the_middle_is_named(folder, workers):
    noise = torch.randint(0, 256, (64, 64, 3), generator=rng_for(0, "noise")).byte().numpy()
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:4000])
    pictures = PictureFiles(["a.png", "cut.png"], folder, pil_to_tensor)              # its header is whole
    with pytest.raises(PictureError, match="cut.png: broken picture"): encode_pictures(Fake(lambda pixels: pixels.float().mean((2, 3))), pictures, workers=workers)


def test_features_are_unit_single_precision_and_the_same_in_any_batch():
    pixels = torch.randint(0, 256, (7, 3, 4, 4), generator=rng_for(0, "pixels")).byte()
    fake = Fake(lambda pixels: pixels.flatten(1).half(), lambda text: torch.tensor([len(text), 1.0]))
    features = encode_pictures(fake, pixels)
    assert features.dtype == torch.float32 and torch.allclose(features.norm(dim=1), torch.ones(7))
    assert torch.equal(encode_pictures(fake, pixels, batch_size=2), features)
    texts = ["a", "bb", "a", "ccc", "bb"]
    assert torch.equal(encode_texts(fake, texts, batch_size=2), unit(torch.tensor([[1.0, 1], [2, 1], [1, 1], [3, 1], [2, 1]])))
    assert fake.texts == ["a", "bb", "ccc"]                                           # each distinct text once


# --- ranks

def made_up(queries=30, gallery=41, extra=4, width=6, seed=0, kinds=("a", "b")) -> tuple[Features, Benchmark]:
    "Random features, in double precision so that no two ways to multiply disagree; some references are outside the gallery."
    chance = rng_for(seed, "made up")
    references = torch.randint(0, gallery + extra, (queries,), generator=chance)
    answers = []
    for reference in references.tolist():
        drawn = torch.randperm(gallery, generator=chance)[:4].tolist()
        answers.append(tuple(sorted(i for i in drawn if i != reference))[: 1 + len(answers) % 3])
    features = [unit(torch.randn(n, width, generator=chance, dtype=torch.float64)) for n in (gallery + extra, queries)]
    return Features(*features), own_queries(tuple(f"text {i}" for i in range(queries)), references, tuple(answers), tuple(kinds[i % len(kinds)] for i in range(queries)), gallery)


def slow_rank(scores: list[float], answers, left_out: int) -> int:
    "Sort the gallery by hand: best first, of equals the wrong one first."
    order = sorted((i for i in range(len(scores)) if i != left_out), key=lambda i: (-scores[i], i in answers))
    return 1 + next(place for place, i in enumerate(order) if i in answers)


@pytest.mark.parametrize("most", [100_000_000, 1, 3 * 41, 29 * 41 + 7])
def test_sweep_is_a_slow_loop_over_queries(most):
    features, queries = made_up()
    table = sweep(features, queries, most=most)
    assert list(table) == all_composers() and all(len(found) == len(queries) for found in table.values())
    size, mean = len(queries.galleries[0]), mean_feature(features.texts)
    gallery = features.pictures[:size]
    for spec, found in table.items():
        for i in range(len(queries)):
            reference = int(queries.references[i])
            left_out = reference if reference < size else -1
            one = score(parse_composer(spec), features.pictures[reference][None], features.texts[i][None], gallery, torch.tensor([left_out]), text_mean=mean)
            assert found.rank[i] == slow_rank(one[0].tolist(), queries.answers[i], left_out), (spec, i)


def test_every_composer_is_there_with_all_its_weights():
    specs = all_composers()
    assert specs == [str(kind(weight)) for kind in COMPOSERS.values() for weight in kind.grid] and len(specs) == len(set(specs))
    assert [str(parse_composer(spec)) for spec in specs] == specs


def test_one_text_for_all_queries_cannot_be_centred():
    features, queries = made_up(6)
    same = replace(queries, texts=(("in red",),) * 6)
    with pytest.raises(PliError, match="use sum"): sweep(replace(features, texts=features.texts[:1].expand(6, -1)), same, ["product:1"])
    assert len(sweep(features, same, ["sum:1"])["sum:1"]) == 6
    one = queries.pick([3])
    with pytest.raises(PliError, match="use sum"): sweep(Features(features.pictures, features.texts[3:4]), one)


def chance_of(gallery: int, answers: int, k: int) -> float:
    "How likely one of `answers` pictures is among `k` drawn from `gallery`."
    return 1 - math.comb(gallery - answers, k) / math.comb(gallery, k)


@pytest.mark.parametrize("k", [1, 10])
def test_features_that_know_nothing_are_at_chance(k):
    features, queries = made_up(queries=3000, gallery=200, extra=20, width=24)
    size = len(queries.galleries[0])
    expected = torch.tensor([chance_of(size - (reference < size), len(right), k) for reference, right in zip(queries.references.tolist(), queries.answers)])
    deviation = (expected * (1 - expected)).sum().sqrt() / len(queries)
    for spec, found in sweep(features, queries, ["image", "text", "sum:1", "slerp:0.5", "product:1", "harris:1"]).items():
        assert abs(recall_at(found.rank, k).mean() - expected.mean()) < 4 * deviation, spec


SHAPES, INKS = 12, 13


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    "Pictures whose red says the shape and whose green says the ink; a model that reads both, and queries for another ink."
    folder = tmp_path_factory.mktemp("perfect")
    names = [f"{shape}-{ink}.png" for shape in range(SHAPES) for ink in range(INKS)]
    for name in names: picture(folder / name, (*map(int, name[:-4].split("-")), 0))
    write(folder / "gallery.json", names)
    records = [{"reference_img_id": f"{i % SHAPES}-{i % INKS}.png", "relative_caption": f"ink {(i + 1 + i % 7) % INKS}", "kind": "ink",
                "gt_img_ids": [f"{i % SHAPES}-{(i + 1 + i % 7) % INKS}.png"]} for i in range(SHAPES * INKS)]
    hot = torch.nn.functional.one_hot
    image = lambda pixels: torch.cat([hot(pixels[:, 0, 0, 0].long(), SHAPES), hot(pixels[:, 1, 0, 0].long(), INKS)], 1).float()
    text = lambda words: torch.cat([torch.zeros(SHAPES), hot(torch.tensor(int(words.split()[1])), INKS).float()])
    return Fake(image, text), read_queries(write(folder / "queries.json", records), folder / "gallery.json")


def test_a_perfect_model_scores_100(perfect):
    backbone, queries = perfect
    record = report(sweep(encode(backbone, queries), queries), queries)
    assert list(record["kinds"]) == ["ink"] and record["kinds"]["ink"]["queries"] == SHAPES * INKS
    found = record["kinds"]["ink"]["composers"]
    for family in ("sum", "product", "harris", "best"): assert found[family]["recall@1"] == found[family]["recall@10"] == [100, 100, 100], family
    alone = record["kinds"]["ink"]["halves"]
    assert alone == {"image only": 0, "text only": 0, "solved by one half": 0, "composing adds": [100, 100, 100], "measure": "recall@10", "composer": "the best composer"}
    assert query_validator(queries, composer="sum:1", measure="recall@1")(backbone) == 1


# --- choosing without peeking

def ranked(table: dict) -> dict[str, QueryRanks]:
    "A table of outcomes from one of ranks."
    return {spec: as_query_ranks(torch.as_tensor(found)) for spec, found in table.items()}


def told_apart(queries: int = 60, kinds=("a",)) -> tuple[dict, Benchmark, torch.Tensor]:
    "`sum:1` solves exactly the queries of one half, `sum:2` exactly those of the other."
    asked = own_queries(("",) * queries, torch.arange(queries) // 2, ((999,),) * queries, tuple(kinds[i % len(kinds)] for i in range(queries)), 1000)
    first = fold_of(asked)
    good, bad = torch.tensor(1), torch.tensor(500)
    return ranked({"sum:1": torch.where(first, good, bad), "sum:2": torch.where(first, bad, good)}), asked, first


def test_peeking_would_be_visible():
    table, queries, first = told_apart()
    found, specs = cross_fitted(table, queries)
    assert specs == ["sum:2", "sum:1"]                        # what is best on the second half is for the first, and the other way round
    assert (found.rank == 500).all()                            # a choice on the reported queries would give 1 everywhere
    assert choose_composer(table, first) == "sum:1" and choose_composer(table, ~first) == "sum:2"
    record = report(table, queries)
    assert record["kinds"]["a"]["composers"]["sum"]["recall@10"] == record["kinds"]["a"]["composers"]["best"]["recall@10"] == [0, 0, 0]


def test_peeking_through_another_kind_would_be_visible():
    table, queries, first = told_apart(kinds=("a", "b"))
    other = torch.tensor([kind == "b" for kind in queries.categories])
    table = {spec: as_query_ranks(torch.where(other, 1001 - found.rank, found.rank)) for spec, found in table.items()}      # on kind b the other one is right
    found, specs = cross_fitted(table, queries, "a")
    assert specs == ["sum:2", "sum:1"]
    assert (found[~other].rank == 500).all() and (found[other].rank != 1).any()
    assert cross_fitted(table, queries, "b")[1] == ["sum:1", "sum:2"]


ranks_drawn = st.lists(st.integers(1, 60), min_size=40, max_size=40).map(torch.tensor)


@settings(deadline=None, max_examples=60)
@given(st.lists(ranks_drawn, min_size=2, max_size=4), st.lists(ranks_drawn, min_size=4, max_size=4), st.sampled_from([None, "a", "b"]), st.booleans())
def test_a_query_has_no_say_in_what_it_is_reported_with(tables, others, kind, side):
    queries = own_queries(("",) * 40, torch.arange(40) // 2, ((99,),) * 40, ("a", "b") * 20, 100)
    own = fold_of(queries) == side
    table = ranked({f"sum:{i}": found for i, found in enumerate(tables, 1)})
    changed = {spec: as_query_ranks(other).where(own, found) for (spec, found), other in zip(table.items(), others)}
    place = 0 if side else 1
    (before, chosen), (after, again) = cross_fitted(table, queries, kind), cross_fitted(changed, queries, kind)
    assert chosen[place] == again[place]
    assert torch.equal(before[own].rank, table[chosen[place]][own].rank) and torch.equal(after[own].rank, changed[chosen[place]][own].rank)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 99))
def test_references_stay_together(references, seed):
    queries = own_queries(("",) * len(references), torch.tensor(references), ((99,),) * len(references), ("a",) * len(references), 100)
    side = fold_of(queries, seed)
    assert side.dtype == torch.bool and torch.equal(side, fold_of(queries, seed))
    for reference in set(references): assert len(set(side[queries.references == reference].tolist())) == 1


def test_halves_are_halves():
    queries = own_queries(("",) * 4000, torch.arange(4000), ((9,),) * 4000, ("a",) * 4000, 5000)
    assert 0.45 < fold_of(queries).float().mean() < 0.55
    assert 0.4 < (fold_of(queries, 0) == fold_of(queries, 1)).float().mean() < 0.6


def test_too_few_queries_to_choose_on():
    table, queries, first = told_apart(2)                                # both have the same reference
    with pytest.raises(PliError, match="2 queries are too few to choose between 2 composers"): cross_fitted(table, queries)
    with pytest.raises(PliError, match="too few"): report(table, queries)
    alone = {"sum:1": table["sum:1"]}
    assert torch.equal(cross_fitted(alone, queries)[0].rank, table["sum:1"].rank)  # nothing to choose
    assert report(alone, queries)["specs"] == {"sum": ["sum:1"], "best": ["sum:1"]}
    assert report(table, queries, chosen={"sum": "sum:2", "best": "sum:1"})["specs"] == {"sum": ["sum:2"], "best": ["sum:1"]}
    table, queries, first = told_apart()
    rare = replace(queries, categories=("rare", *queries.categories[1:]))
    with pytest.raises(PliError, match="1 queries of kind rare are too few"): cross_fitted(table, rare, "rare")


def test_a_tie_goes_to_the_lower_ranks_and_k_decides():
    table = ranked({"sum:1": [1, 90, 90], "sum:2": [1, 20, 20], "sum:4": [11, 11, 11]})
    assert choose_composer(table) == "sum:2" and choose_composer(table, measure="recall@11") == "sum:4" and choose_composer(table, torch.tensor([False, True, True]), "recall@1") == "sum:4"


def test_choices_made_elsewhere_are_used_as_they_are():
    dev, queries, first = told_apart()
    chosen = choose_families(dev | ranked({"image": torch.full((60,), 700), "product:1": torch.full((60,), 2)}))
    assert chosen == {"sum": chosen["sum"], "image": "image", "product": "product:1", "best": "product:1"}
    test = ranked({"sum:1": torch.full((60,), 3), "sum:2": torch.full((60,), 1), "image": torch.full((60,), 1), "product:1": torch.full((60,), 400)})
    record = report(test, queries, chosen=chosen)
    assert record["specs"] == {"sum": [chosen["sum"]], "image": ["image"], "product": ["product:1"], "best": ["product:1"]}
    assert record["kinds"]["a"]["composers"]["best"]["recall@10"] == [0, 0, 0]


# --- reports

@pytest.fixture(scope="module")
def measured():
    features, queries = made_up(80, 60, kinds=("colour", "shape", "colour", "all"))
    table = sweep(features, queries)
    return table, queries, report(table, queries, "colour")


def test_a_report_survives_json(measured):
    table, queries, record = measured
    again = json.loads(json.dumps(record, allow_nan=False))
    assert again == record and record["chosen on"] == "colour"
    for name in record["specs"]: assert torch.equal(decode_ranks(again, name).rank, cross_fitted({spec: found for spec, found in table.items() if name in (spec.split(":")[0], "best")}, queries, "colour")[0].rank)
    assert compare(again, record) == {"difference": [0, 0, 0], "ratio": [1, 1, 1]}


def test_kinds_and_all_of_them(measured):
    table, queries, record = measured
    assert {kind: section["queries"] for kind, section in record["kinds"].items()} == {"all": 80, "colour": 40, "shape": 20}     # those of no kind are in `all` only
    assert {kind: int(rows.sum()) for kind, rows in grouping_of(queries).sections().items()} == {"all": 80, "colour": 40, "shape": 20}
    for kind, rows in grouping_of(queries).sections().items():
        for name in record["specs"]: assert record["kinds"][kind]["composers"][name]["recall@5"][0] == round(100 * recall_at(decode_ranks(record, name).rank[rows], 5).mean().item(), 2)
    for kinds in ({"colour"}, {"all"}):
        one = replace(queries, categories=tuple(kinds) * 80)
        assert set(report(table, one)["kinds"]) == kinds and report(table, one)["kinds"][min(kinds)]["queries"] == 80


def test_what_each_half_does_alone():
    alone = lambda image, text, composed, measure="recall@10": unimodal_baselines(Grouping(("all",) * len(image)), ranked({"image": image, "text": text}), as_query_ranks(torch.tensor(composed)), measure)
    found = alone([1, 10, 11, 50], [99, 3, 12, 60], [1, 1, 1, 99])
    assert found["image only"] == 50 and found["text only"] == 25 and found["solved by one half"] == 50 and found["composing adds"][0] == 25
    assert alone([1, 10, 11, 50], [99, 3, 12, 60], [99] * 4, "recall@60")["composing adds"][0] == -100
    assert alone([1, 99], [99, 1], [99, 99])["solved by one half"] == 100


def test_a_report_without_the_halves_has_none(measured):
    table, queries, _ = measured
    record = report({"sum:1": table["sum:1"]}, queries)
    assert all(section["halves"] == {} for section in record["kinds"].values()) and "image only" not in format_page(record)


def recorded(*found: int, kinds=("all",), **change) -> dict:
    "A report over made-up ranks."
    asked = own_queries(("",) * len(found), torch.arange(len(found)), ((999,),) * len(found), tuple(kinds[i % len(kinds)] for i in range(len(found))), 1000)
    return report(ranked({"sum:1": found}), replace(asked, **change), chosen={"sum:1": "sum:1"})


def test_comparisons():
    one, other, none = recorded(1, 5, 10, 11), recorded(1, 20, 20, 20), recorded(50, 50, 50, 50)
    assert compare(one, other)["difference"][0] == 50 and compare(one, other)["ratio"][0] == 3
    assert compare(one, other)["ratio"][2] is None                        # some draws hold no query that the other solves
    assert compare(other, one, "recall@1")["difference"] == [0, 0, 0]
    assert compare(one, none)["ratio"] is None and compare(one, none)["difference"][0] == 75
    json.dumps(compare(one, other), allow_nan=False)
    one, other = recorded(1, 5, 1, 1, kinds=("a", "b")), recorded(1, 20, 1, 20, kinds=("a", "b"))
    assert compare(one, other, section="a")["difference"] == [0, 0, 0] and compare(one, other, section="b")["difference"] == [100, 100, 100]
    assert {name: found["recall@10"]["verdict"] for name, found in comparison(one, other).items()}["b"] == "significant"
    with pytest.raises(PliError, match="no queries of kind 'c'; there are all, a, b"): compare(one, other, section="c")


def test_words_follow_from_numbers():
    assert verdict([2, 1, 3]) == verdict([-2, -3, -1], [-1, -3]) == "significant" == verdict([2, 1, 3], [1, 2, 3])
    assert verdict([2, 0, 3]) == verdict([2, -1, 3], [1, 2]) == verdict([2, 1, 3], [2]) == verdict([2, 1, 3], []) == verdict([2, 1, 3], [4, 0]) == "not significant"
    assert all(significant(difference, seeds) is (verdict(difference, seeds) == "significant") for difference in ([2, 1, 3], [2, -1, 3]) for seeds in (None, [1], [1, 1], [1, -1]))


def test_other_queries_are_not_compared():
    one = recorded(1, 2, 3)
    for other in (recorded(1, 2, 3, 4), recorded(1, 2, 3, texts=(("other",),) * 3), recorded(1, 2, 3, answers=((998,),) * 3), recorded(1, 2, 3, protocol={"reference": "kept"}), recorded(1, 2, 3, split="b")):
        with pytest.raises(PliError, match="the reports are not over the same queries"): compare(one, other)


def test_tables_say_what_the_report_says(measured):
    table, queries, record = measured
    heading, rows = report_rows(record, "shape")
    assert heading == ["composer", "weight", "R@1", "R@5", "R@10"] and [row[0] for row in rows] == list(record["specs"]) == [*(name for name, kind in COMPOSERS.items() if kind.grid), "best"]
    for row in rows:
        low = record["kinds"]["shape"]["composers"][row[0]]["recall@5"]
        assert row[3] == f"{low[0]:.1f} [{low[1]:.1f}, {low[2]:.1f}]"
    lines = format_text(heading, rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == len(rows) + 1
    assert format_markdown(heading, rows).splitlines()[1] == "| --- | --: | --: | --: | --: |"
    assert max(map(len, format_page(record).splitlines())) <= 160 and format_page(record).count("in percent with") == 3
    heading, rows = sweep_rows(table, queries)
    assert heading[:5] == ["composer", "all R@1", "all R@10", "colour R@1", "colour R@10"] and [row[0] for row in rows] == list(table)
    assert rows[3][2] == f"{100 * recall_at(table[rows[3][0]].rank, 10).mean():.1f}"


def test_rows_of_queries():
    _, queries = made_up()
    mask = torch.arange(30) % 3 == 0
    for part in (queries.pick(mask), queries.pick(range(0, 30, 3)), queries.pick(torch.arange(0, 30, 3))):
        assert part.texts == queries.texts[::3] and part.ids == queries.ids[::3] and torch.equal(part.references, queries.references[::3]) and part.answers == queries.answers[::3]
        assert part.categories == queries.categories[::3] and torch.equal(part.galleries[0], queries.galleries[0])


# --- what a benchmark adds: several galleries, both orders, subsets, aspects, missing pictures

def one_by_one(seed=0, **change) -> tuple[Features, Benchmark]:
    "Queries of two kinds, each kind with its own gallery of another size."
    chance = rng_for(seed, "galleries")
    galleries = (torch.randperm(50, generator=chance)[:20], torch.randperm(50, generator=chance)[:33])
    searches = torch.arange(40) % 2
    draw = lambda row: int(galleries[searches[row]][torch.randint(len(galleries[searches[row]]), (), generator=chance)])
    references = torch.tensor([draw(row) for row in range(40)])
    answers = []
    for row in range(40):
        found = {draw(row) for _ in range(4)} - {int(references[row])}
        answers.append(tuple(found)[: 1 + row % 3] or (next(int(i) for i in galleries[searches[row]] if i != references[row]),))
    asked = replace(own_queries([f"text {i}" for i in range(40)], references, answers, ["dress", "shirt"] * 20, 50), galleries=galleries, gallery_of=searches, **change)
    return Features(unit(torch.randn(50, 6, generator=chance, dtype=torch.float64)), unit(torch.randn(40, 6, generator=chance, dtype=torch.float64))), asked


@pytest.mark.parametrize("without_reference", [True, False])
@pytest.mark.parametrize("most", [1, 100_000])
def test_every_query_searches_its_own_gallery(without_reference, most):
    features, asked = one_by_one(without_reference=without_reference)
    found = sweep(features, asked, ["sum:1"], most)["sum:1"]
    for row in range(len(asked)):
        gallery, reference = asked.galleries[asked.gallery_of[row]].tolist(), int(asked.references[row])
        query = unit(unit(features.texts[row]) + unit(features.pictures[reference]))
        scores = {i: float(query @ features.pictures[i]) for i in gallery if not (without_reference and i == reference)}
        order = sorted(scores, key=lambda i: (-scores[i], i in asked.answers[row]))
        expected = sorted(1 + order.index(i) for i in asked.answers[row])
        assert [n for n in found.places[row].tolist() if n] == expected and found.rank[row] == expected[0]


def test_some_rows_score_as_they_do_among_all():
    features, asked = one_by_one()
    every = {int(row): scores for _, rows, _, piece in scores_of(features, asked, ["product:1"]) for row, scores in zip(rows, piece)}
    few = {int(row): scores for _, rows, _, piece in scores_of(features, asked, ["product:1"], rows=torch.tensor([3, 8])) for row, scores in zip(rows, piece)}
    assert set(few) == {3, 8} and all(torch.allclose(few[row], every[row]) for row in few)


def test_the_main_answer_alone_where_the_rules_say_so():
    features, asked = one_by_one()
    main = replace(asked, scoring=replace(asked.scoring, main_only=True))
    for row, (any_one, only) in enumerate(zip(rank_queries(features, asked, "sum:1").rank, rank_queries(features, main, "sum:1").rank)):
        assert only >= any_one and (only == any_one or len(asked.answers[row]) > 1)
    assert torch.equal(rank_queries(features, main, "sum:1").places, rank_queries(features, asked, "sum:1").places)


def test_secret_answers_are_not_measured():
    features, asked = one_by_one()
    with pytest.raises(PliError, match="answers are kept by the test server"): sweep(features, replace(asked, name="circo", answers=((),) * 40), ["sum:1"])
    with pytest.raises(PliError, match="40 of the 40 queries name no right answer"): sweep(features, replace(asked, answers=((),) * 40), ["sum:1"])


def test_a_gallery_that_nobody_knows_is_not_searched():
    features, asked = one_by_one()
    with pytest.raises(PliError, match="a number over fewer would be too good. Get the list, or, in Python, give the gallery"): sweep(features, replace(asked, complete=False, source="the list"), ["sum:1"])


def test_a_mean_of_kinds_is_a_mean_of_means():
    rules = Scoring(("recall@1",), "recall@1", "recall@1", mean_of_categories=True)
    asked = replace(own_queries(("",) * 40, torch.arange(40), ((99,),) * 40, ("a",) * 10 + ("b",) * 30, 100), scoring=rules)
    record = report(ranked({"image": [50] * 40, "text": [50] * 40, "sum:1": [1] * 10 + [2] * 30}), asked, chosen={"sum:1": "sum:1"})
    assert list(record["kinds"]) == ["mean", "a", "b"] and record["kinds"]["mean"]["composers"]["sum:1"]["recall@1"] == [50, 50, 50]
    assert record["kinds"]["mean"]["halves"]["composing adds"] == [50, 50, 50]
    assert compare(record, record, "recall@1", "mean")["ratio"] == [1, 1, 1]
    assert float(sweep_rows(ranked({"sum:1": [1] * 10 + [2] * 30}), asked)[1][0][1]) == 50


def test_both_orders_are_drawn_together():
    solved = (torch.rand(300, generator=rng_for(0, "solved")) < 0.4).double()
    once, twice = Grouping(("a",) * 300), Grouping(("a",) * 600, groups=torch.arange(300).repeat(2))
    assert grouped_interval(twice, solved.repeat(2)) == grouped_interval(once, solved) == bootstrap(solved)
    rows = torch.arange(600) % 300 < 100
    assert grouped_interval(twice, solved.repeat(2), rows) == bootstrap(solved[:100])
    uneven = Grouping(("a",) * 4, groups=torch.tensor([7, 7, 7, 9]))
    assert grouped_interval(uneven, torch.tensor([1.0, 1, 1, 0]))[0] == 0.5


def test_subsets_and_aspects_survive_a_report():
    rules = Scoring(("recall@1", "subset recall@1", "mean(recall@1, subset recall@1)", "mAP@5"), "recall@1", "recall@1", aspects_measure="mAP@5")
    asked = replace(own_queries(("",) * 4, torch.arange(4), ((9,),) * 4, ("all",) * 4, 10), scoring=rules, aspects=(("x", "y"), ("x",), (), ("y",)))
    table = {"sum:1": QueryRanks(torch.tensor([1, 2, 3, 1]), torch.tensor([[1, 3], [2, 0], [3, 0], [1, 2]]), torch.tensor([1, 1, 2, 1]))}
    record = json.loads(json.dumps(report(table, asked, chosen={"sum:1": "sum:1"})))
    back = decode_ranks(record, "sum:1")
    assert all(torch.equal(one, other) for one, other in zip(back.parts().values(), table["sum:1"].parts().values()))
    found = record["kinds"]["all"]["composers"]["sum:1"]
    assert found["recall@1"][0] == 50 and found["subset recall@1"][0] == 75 and found["mean(recall@1, subset recall@1)"][0] == 62.5
    assert {name: section["queries"] for name, section in record["aspects"].items()} == {"x": 2, "y": 2}
    assert record["aspects"]["x"]["composers"]["sum:1"]["mAP@5"][0] == round(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 2, 2)
    assert "Rs@1" in format_page(record) and "mean(R@1, Rs@1)" in format_page(record)


@pytest.mark.parametrize("measure", ["recall@", "recall@x", "recall@1.5", "accuracy@1", "mean(recall@1, accuracy@1)", "subset recall@1", ""])
def test_a_measure_that_is_none(measure):
    with pytest.raises(PliError, match="measure|subset"): measure_queries(as_query_ranks(torch.tensor([1, 2])), measure)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 15))
def test_the_whole_split_is_between_the_bounds(seed, lost):
    "Measure everything, lose some pictures, and see whether what was measured before is between the bounds."
    features, asked = one_by_one(seed)
    chance = rng_for(seed, "lost")
    gone = set(torch.randperm(50, generator=chance)[:lost].tolist())
    keep = [row for row in range(40) if not gone & {int(asked.references[row]), *asked.answers[row]}]
    if {asked.categories[row] for row in keep} != {"dress", "shirt"}: return
    left = tuple(torch.tensor([i for i in gallery.tolist() if i not in gone]) for gallery in asked.galleries)
    counts = lambda rows: {kind: sum(asked.categories[row] == kind for row in rows) for kind in ("dress", "shirt")}
    missing = Missing(tuple(map(str, sorted(gone))), counts(set(range(40)) - set(keep)), counts(range(40)), tuple(len(a) - len(b) for a, b in zip(asked.galleries, left)))
    part = replace(asked.pick(keep), galleries=left, missing=missing)
    for mean_of_kinds in (True, False):
        rules = replace(asked.scoring, measures=("recall@1", "recall@5", "mAP@5"), mean_of_categories=mean_of_kinds)
        whole, some = (report(sweep(Features(features.pictures, texts), replace(one, scoring=rules), ["sum:1"]), replace(one, scoring=rules), chosen={"sum:1": "sum:1"})
                       for one, texts in ((asked, features.texts), (part, features.texts[keep])))
        for name, section in whole["kinds"].items():
            for measure, (value, *_) in section["composers"]["sum:1"].items():
                worst, low, high = some["bounds"]["sum:1"][measure][name]
                assert worst - 0.01 <= value <= high + 0.01 and worst <= low <= high, (name, measure)
                if not gone: assert worst == low == high and abs(value - low) < 0.011      # sums in another order, rounded to two digits
        assert not gone or "INCOMPLETE" in format_page(some) and "INCOMPLETE" in format_markdown_page(some) and "INCOMPLETE" in format_latex(some)


def test_names_from_strangers_do_no_harm():
    kinds = ("\x1b[31mred\nnext", "a|b", "=1+1", "50% & more_")
    asked = own_queries(("",) * 8, torch.arange(8), ((99,),) * 8, kinds * 2, 100)
    record = report(ranked({"image": [5] * 8, "text": [6] * 8, "sum:1": [1] * 8}), asked, chosen={"sum:1": "sum:1"}) | {"model": "evil\n\\input{x}", "command": "pli x\ny", "date": "", "machine": {"processor": ""}, "versions": {"torch": "", "open_clip_torch": ""}}
    for text in (format_page(record), format_markdown_page(record), format_latex(record), format_csv(record)): assert "\x1b" not in text and "red\nnext" not in text and "evil\n" not in text
    table = [line for line in format_markdown_page(record).splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert all(line.startswith("%") or not line or "&" in line or line.startswith("\\") for line in format_latex(record).splitlines())
    assert any("'=1+1" in row for row in csv.reader(io.StringIO(format_csv(record)))) and r"50\% \& more\_" in format_latex(record)


def test_aspects_may_be_any_text():
    rules = Scoring(("mAP@5",), "mAP@5", "recall@1", aspects_measure="mAP@5")
    asked = replace(own_queries(("",) * 3, torch.arange(3), ((9,),) * 3, ("all",) * 3, 10), scoring=rules, aspects=(("two words",), ("two words", "x"), ()))
    record = json.loads(json.dumps(report(ranked({"sum:1": [1, 2, 3]}), asked, chosen={"sum:1": "sum:1"})))
    assert set(comparison(record, record)) == {"all", "two words", "x"} and r"\begin{tabular}" in format_latex(record) and format_latex(record).count(r"\begin{tabular}") == 2


def test_a_report_without_subsets_is_compared_by_the_rest():
    rules = Scoring(("recall@1", "subset recall@1"), "recall@1", "recall@1")
    asked = replace(own_queries(("",) * 3, torch.arange(3), ((9,),) * 3, ("all",) * 3, 10), scoring=rules)
    with_subset = {"sum:1": QueryRanks(torch.tensor([1, 2, 3]), torch.tensor([[1], [2], [3]]), torch.tensor([1, 1, 2]))}
    one, other = (report(table, asked, chosen={"sum:1": "sum:1"}) for table in (with_subset, ranked({"sum:1": [1, 2, 3]})))
    assert set(comparison(one, one)["all"]) == {"recall@1", "subset recall@1"} and set(comparison(one, other)["all"]) == set(comparison(other, one)["all"]) == {"recall@1"}


def test_no_limits_are_told_for_late_fusion():
    features, asked = one_by_one()
    left = replace(asked, missing=Missing(("x",), {"dress": 1, "shirt": 0}, {"dress": 21, "shirt": 20}, (1, 0)))
    record = report(sweep(features, left, ["image", "text", "product:1"]), left, chosen={spec: spec for spec in ("image", "text", "product:1")})
    assert set(record["bounds"]) == {"image", "text"} and "No limits can be told for product:1" in format_page(record)


def test_a_part_of_a_benchmark_is_centred_on_what_it_searches():
    features, asked = one_by_one()
    rows = [row for row in range(40) if row % 2]
    whole = Features(features.pictures, features.texts[rows])
    alone = Features(torch.zeros_like(features.pictures).index_copy_(0, asked.galleries[1], features.pictures[asked.galleries[1]]), features.texts[rows])      # as `encode` fills it
    alone.pictures[asked.references[rows]] = features.pictures[asked.references[rows]]
    assert torch.equal(rank_queries(whole, asked.pick(rows), "product:1").rank, rank_queries(alone, asked.pick(rows), "product:1").rank)


def test_weights_are_chosen_by_the_mean_that_is_reported():
    table = ranked({"sum:1": [1] * 10 + [50] * 30, "sum:2": [50] * 10 + [1] * 12 + [50] * 18})
    frame = Grouping(("a",) * 10 + ("b",) * 30, mean_of_kinds=True)
    assert choose_composer(table, None, "recall@1", frame) == "sum:1" and choose_composer(table, None, "recall@1") == "sum:2"


def test_tables_in_other_formats(measured, tmp_path):
    table, queries, record = measured
    record = record | {"command": "pli evaluate", "date": "2026-11-25", "machine": {"processor": "x"}, "versions": {"torch": "2", "open_clip_torch": "3"}, "model": "a_model,b"}
    rows = list(csv.DictReader(io.StringIO(format_csv(record))))
    assert len(rows) == 3 * (len(record["specs"]) * 3 + 4) and {row["model"] for row in rows} == {"a_model,b"} and {row["protocol"] for row in rows} == {"reference=left-out"}
    one = next(row for row in rows if (row["queries of"], row["composer"], row["measure"]) == ("shape", "sum", "recall@5"))
    assert [float(one[name]) for name in ("value", "low", "high")] == record["kinds"]["shape"]["composers"]["sum"]["recall@5"]
    lines = format_latex(record).splitlines()
    body = [line for line in lines if line.endswith(r"\\") and "pm" in line]
    assert len(body) == len(record["specs"]) and {line.count("&") for line in body} == {9}
    assert any("footnotesize" in line and "interval over queries" in line for line in lines), "what the small figures are is not cut off"
    assert "reference=left-out" in format_latex(record) and "reference=left-out" in format_markdown_page(record) and "reference=left-out" in format_page(record)
    halves = record["kinds"]["shape"]["halves"]
    one = next(row for row in rows if (row["queries of"], row["composer"]) == ("shape", "composing adds"))
    assert [float(one[name]) for name in ("value", "low", "high")] == halves["composing adds"] and one["spec"] == "the best composer" and one["measure"] == "recall@10"
    assert halves["image only"] == float(next(row for row in rows if (row["queries of"], row["composer"]) == ("shape", "image only"))["value"])
    for name in ("a.json", "b.CSV", "new/c.md", "d.tex"): write_report(tmp_path / name, record)
    assert json.loads((tmp_path / "a.json").read_text()) == record and (tmp_path / "b.CSV").read_text() == format_csv(record)
    for name in ("e.txt", "f", "new"):
        with pytest.raises(PliError, match=name): write_report(tmp_path / name, record)
    assert len(wide_rows(record)[1]) == 9


# --- a number while tuning

def bright(count: int) -> TensorPairs:
    "Pictures that differ, each with its own caption; every seventh is there three times."
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=rng_for(0, "bright")).byte()
    for i in range(0, count - 7, 7): pixels[i + 3] = pixels[i + 5] = pixels[i]
    return TensorPairs(pixels, [f"picture {i}" for i in range(count)])


def known(row: torch.Tensor) -> torch.Tensor:
    "A feature of its own for every picture, the same from bytes and from floats."
    row = row if row.dtype == torch.uint8 else row.mul(255).round().byte()
    return torch.randn(16, generator=rng_for(row.numpy().tobytes().hex()))


@pytest.mark.parametrize("count", [2, 40, 257, 258])                     # a last part of one picture among them
@pytest.mark.parametrize("hide", ["none", "random:0.75"])
def test_a_model_that_encodes_perfectly_scores_1(count, hide):
    sees_through_masks = Fake(lambda pixels: torch.stack(list(map(known, pixels))), lambda text: torch.zeros(16))
    assert pair_validator(bright(count), hide)(sees_through_masks) == 1
    sees_nothing = Fake(lambda pixels: torch.ones(len(pixels), 16), lambda text: torch.zeros(16))
    assert pair_validator(bright(count), hide)(sees_nothing) == 0                    # equal scores are no success


def test_words_count_where_the_picture_says_nothing():
    data = bright(257)
    perfect = {caption: known(pixels) for _, pixels, caption in data}
    image = lambda pixels: torch.stack(list(map(known, pixels))) if pixels.dtype == torch.uint8 else torch.zeros(len(pixels), 16)
    for hide in ("none", "mix:0.5"): assert pair_validator(data, hide)(Fake(image, perfect.get)) == 1
    assert pair_validator(data, "none", most=10)(Fake(image, lambda text: -perfect[text])) == 0


def test_a_validator_repeats_itself_and_leaves_the_model_alone():
    backbone = load_backbone("pli-tiny-48")
    rows = world.sample(40, rng_for(0, "rows"))
    validate = pair_validator(TensorPairs(world.render(rows, 48), world.caption(rows, world.SPARSE, rng_for(0, "words"))), "recolour+random:0.5")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert validate(backbone) == validate(backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_held_out_pictures_that_break_are_said(tmp_path):
    for name in "abc": picture(tmp_path / f"{name}.png", (ord(name), 0, 0))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])
    pairs, said = Pairs(tuple(str(tmp_path / f"{name}.png") for name in "abc"), ("a", "b", "c"), tmp_path), []
    pair_validator(PairSet(pairs, pil_to_tensor), "none", say=said.append)
    assert len(said) == 2 and said[0].startswith("1 held-out pictures cannot be read") and "b.png" in said[0]
    with pytest.raises(PliError, match="at least two held-out pairs"): pair_validator(PairSet(pairs.take([0, 1]), pil_to_tensor), "none", say=said.append)


def test_small_and_saturated_validations_are_told():
    perfect, blind = Fake(lambda pixels: torch.stack(list(map(known, pixels))), lambda text: torch.zeros(16)), Fake(lambda pixels: torch.ones(len(pixels), 16), lambda text: torch.zeros(16))
    said = []
    small = pair_validator(bright(6), "none", say=said.append)
    assert len(said) == 1 and said[0].startswith("validation on 6 held-out pairs: each is 16.7 points")
    assert small(blind) == 0 and len(said) == 1
    assert small(perfect) == small(perfect) == 1 and len(said) == 2 and said[1].startswith("validation 1.0000: near its ceiling of 1")   # once
    pair_validator(bright(100), "none", say=said.append)
    assert len(said) == 2


def test_same_pictures_are_found():
    pixels = torch.randint(0, 256, (4, 3, 5, 5), generator=rng_for(0, "same")).byte()
    assert same_pictures(pixels[torch.tensor([0, 1, 0, 2, 1, 0])]) == [(0, 2, 5), (1, 4), (0, 2, 5), (3,), (1, 4), (0, 2, 5)]
    assert same_pictures(pixels.transpose(2, 3)) == [(0,), (1,), (2,), (3,)]


def test_drawn_queries_keep_their_shape():
    drawn = world.make_queries(20, 200, rng_for(0, "drawn"))
    queries = world_queries(drawn)
    assert len(queries) == 20 and len(queries.galleries[0]) == 200 and queries.texts == tuple((text,) for text in drawn.texts) and queries.categories == tuple(drawn.kinds)
    assert queries.without_reference and torch.equal(queries.references, torch.as_tensor(drawn.references)) and queries.answers == tuple(map(tuple, drawn.answers))


# --- plain retrieval, before and after

class Looks:
    "Answers with given features: pictures by their first pixel, texts by a table."
    device, grid, size = torch.device("cpu"), (2, 2), (8, 8)
    def __init__(self, words): self.words = words
    def encode_image(self, pixels, hidden=None): return torch.eye(64)[(pixels[:, 0, 0, 0] * (255 if pixels.is_floating_point() else 1)).round().long()]
    def encode_text(self, texts): return torch.stack([self.words(text) for text in texts])


def numbered_pictures(numbers): return torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


def test_plain_recall_of_a_perfect_and_of_a_confused_model():
    data = TensorPairs(numbered_pictures(range(20)), [str(i) for i in range(20)])
    perfect = plain_recall(Looks(lambda text: torch.eye(64)[int(text)]), data)
    assert perfect == {"pairs": 20, **{way: {"recall@1": 100, "recall@5": 100, "recall@10": 100} for way in ("text to picture", "picture to text")}}
    far = plain_recall(Looks(lambda text: sum(torch.eye(64)[(int(text) + i) % 20] * (7 - i) for i in range(7))), data)       # the right one is best, six others follow
    assert far["text to picture"]["recall@1"] == 100
    seventh = plain_recall(Looks(lambda text: sum(torch.eye(64)[(int(text) + i) % 20] * (1 + i) for i in range(7))), data)   # the right one is seventh
    for way in ("text to picture", "picture to text"): assert seventh[way] == {"recall@1": 0, "recall@5": 0, "recall@10": 100}


def test_plain_recall_counts_every_picture_and_caption_once():
    "Two captions of one picture, two pictures of one caption: either is right, and neither stands in its own way."
    data = TensorPairs(numbered_pictures([1, 1, 2, 3, 4]), ["a", "b", "c", "c", "d"])
    table = {"a": 1, "b": 1, "c": 2, "d": 4}
    found = plain_recall(Looks(lambda text: torch.eye(64)[table[text]]), data)
    assert found["pairs"] == 5 and found["text to picture"]["recall@1"] == 100
    assert found["picture to text"]["recall@1"] == 75          # of four pictures only 3 is not known by its caption: all are equal to it, and ties count against
    assert found["picture to text"]["recall@5"] == 100


def test_plain_recall_gives_its_ranks():
    data = TensorPairs(numbered_pictures([1, 1, 2, 3, 4]), ["a", "b", "c", "c", "d"])
    model = Looks(lambda text: torch.eye(64)[{"a": 1, "b": 1, "c": 2, "d": 4}[text]])
    found = plain_recall(model, data, with_ranks=True)
    assert {way: sorted(each.tolist()) for way, each in found.pop("ranks").items()} == {"text to picture": [1, 1, 1, 1], "picture to text": [1, 1, 1, 4]}
    assert found == plain_recall(model, data)


def test_plain_recall_takes_some_and_leaves_broken_ones_out(tmp_path):
    data = TensorPairs(numbered_pictures(range(40)), [str(i) for i in range(40)])
    model = Looks(lambda text: torch.eye(64)[int(text)])
    assert plain_recall(model, data, most=7)["pairs"] == 7
    assert plain_recall(model, data, most=2, seed=1)["pairs"] == 2
    with pytest.raises(PliError, match="at least two"): plain_recall(model, data, most=1)
    class Broken(TensorPairs):
        def __getitem__(self, index): return (index, None, "torn") if index < 5 else super().__getitem__(index)
    said = []
    assert plain_recall(model, Broken(data.pixels, data.captions), say=said.append)["pairs"] == 35 and "5 held-out pictures cannot be read" in said[0]


def test_validation_hides_words_too():
    data = TensorPairs(numbered_pictures(range(30)), [f"red thing {i}" for i in range(30)])
    heard = []
    class Ears(Looks):
        def encode_text(self, texts):
            heard.extend(texts)
            return super().encode_text(texts)
    model = Ears(lambda text: torch.eye(64)[63])
    assert pair_validator(data, "without:colour")(model) == 1 and set(heard) == {f"thing {i}" for i in range(30)}
    heard.clear()
    assert pair_validator(TensorPairs(numbered_pictures([i % 60 for i in range(257)]), [f"red {i}" for i in range(257)]), "without:colour")(model) == 1
    assert sorted(heard) == sorted(str(i) for i in range(257))              # the one left over by itself has company, and is heard once


def test_raw_features_have_lengths_and_a_shelf_of_their_own(tmp_path):
    from layouts import make_genecis
    from pli.benchmarks.registry import read_benchmark
    from pli.gallery.encode import FeatureCache
    genecis = read_benchmark("genecis", make_genecis(tmp_path / "genecis"), protocol="masked-tuning")
    model, cache = load_backbone("pli-tiny-48", seed=3), FeatureCache(tmp_path / "cache")
    plain, raw = encode(model, genecis, cache=cache), encode(model, genecis, cache=cache, lengths=True)
    assert torch.equal(plain.pictures, raw.pictures) and torch.equal(plain.texts, raw.texts) and raw.picture_lengths.std() > 0
    assert sorted(entry.transform for entry in cache.entries()) == ["model", "model, raw"]
    again = encode(model, genecis, cache=cache, lengths=True)
    assert torch.equal(again.picture_lengths, raw.picture_lengths) and torch.equal(encode(model, genecis, cache=cache).pictures, plain.pictures)
    with pytest.raises(PliError, match="encode\\(..., lengths=True\\) keeps the lengths"): rank_queries(plain, genecis, "raw-sum:1")
    spread = Features(plain.pictures, plain.texts, torch.ones(len(plain.pictures)), torch.ones(len(plain.texts)))
    assert torch.equal(rank_queries(spread, genecis, "raw-sum:1").rank, rank_queries(plain, genecis, "sum:1").rank)
    several = replace(genecis, texts=(("one", "two"), *genecis.texts[1:]))
    with pytest.raises(PliError, match="several wordings"): encode(model, several, cache=cache, lengths=True)

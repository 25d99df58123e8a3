"pli.evaluate: files from strangers, ranks against a slow loop, weights that never see what they are reported on, reports that can be read back."
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
from pli.backbones import load_backbone
from pli.composition import COMPOSERS, mean_feature, parse_composer, score
from pli.core import PliError, generator, unit
from pli.data import Pairs, PairSet, PictureError, TensorPairs
from pli.evaluate import (Features, Queries, as_markdown, as_page, as_text, choose, choose_families, compare, cross_chosen, encode, encode_pictures,
                          encode_texts, every_composer, halves, halves_alone, kinds_of, pair_validator, PictureFiles, query_validator, ranks_of,
                          read_gallery, read_queries, report, rows_of, same_pictures, sweep, sweep_rows, world_queries)
from pli.metrics import recall_at

GALLERY = ["a.png", "b.png", "sub/c.png", "größe 日本.png"]
RECORD = {"id": 0, "reference_img_id": "a.png", "relative_caption": "in red", "target_img_id": "b.png", "gt_img_ids": ["b.png", "sub/c.png"], "kind": "colour"}


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


def read(folder: Path, *records) -> Queries:
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


# --- reading: what is well-formed

def test_a_good_file(folder):
    queries = read(folder, RECORD, RECORD | {"reference_img_id": "größe 日本.png", "kind": "size"}, {k: v for k, v in RECORD.items() if k not in ("kind", "gt_img_ids", "id")})
    assert queries.texts == ("in red",) * 3 and queries.references.tolist() == [0, 3, 0] and queries.references.dtype == torch.int64
    assert queries.answers == ((1, 2), (1, 2), (1,)) and queries.kinds == ("colour", "size", "all")
    assert queries.gallery == 4 and queries.pictures == tuple(GALLERY) and queries.root == folder
    assert queries.left_out.tolist() == [0, 3, 0]


def test_a_gallery_of_lines(folder):
    (folder / "gallery.txt").write_bytes("\ufeffa.png\r\n\r\n  b.png \r\ngröße 日本.png\r\n".encode())
    assert read_gallery(folder / "gallery.txt", folder) == ["a.png", "b.png", "größe 日本.png"]
    (folder / "gallery.JSON").write_text('["a.png"]')
    assert read_gallery(folder / "gallery.JSON", folder) == ["a.png"]


def test_ids_that_are_numbers(tmp_path):
    for name in (10, 11, 12): picture(tmp_path / str(name), (name, 0, 0))
    gallery = write(tmp_path / "gallery.json", [10, 11])
    queries = read_queries(write(tmp_path / "queries.json", [{"reference_img_id": 12, "relative_caption": "more", "target_img_id": 11, "gt_img_ids": [11, "10"]}]), gallery)
    assert queries.pictures == ("10", "11", "12") and queries.answers == ((0, 1),)
    assert encode(Fake(lambda pixels: pixels.float().mean((2, 3)), lambda text: torch.ones(3)), queries).pictures.shape == (3, 3)


def test_one_name_a_picture(folder):
    write(folder / "gallery.json", ["./a.png", "sub/../b.png", "sub//c.png"])
    queries = read(folder, RECORD | {"reference_img_id": str(folder / "a.png")})
    assert queries.pictures == ("a.png", "b.png", "sub/c.png") and queries.left_out.tolist() == [0]


def test_a_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for gallery, root in (("gallery.json", None), (f"../{folder.name}/gallery.json", None), ("gallery.json", "."), ("gallery.json", f"../{folder.name}")):
        queries = read_queries("queries.json", gallery, root)
        assert queries.pictures == tuple(GALLERY)
        PictureFiles(queries.pictures, queries.root, pil_to_tensor)


def test_a_root_elsewhere(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    write(lists / "gallery.json", GALLERY)
    assert read_queries(folder / "queries.json", lists / "gallery.json", folder).root == folder
    assert len(PictureFiles(GALLERY, folder, pil_to_tensor)) == 4


def test_links_that_stay(folder):
    (folder / "link.png").symlink_to("a.png")
    write(folder / "gallery.json", GALLERY + ["link.png"])
    assert read(folder, RECORD).gallery == 5


def test_a_reference_outside_the_gallery_is_encoded_and_not_searched(folder):
    picture(folder / "other.png", (9, 0, 0))
    queries = read(folder, RECORD, RECORD | {"reference_img_id": "other.png"}, RECORD | {"reference_img_id": "other.png"})
    assert queries.gallery == 4 and queries.pictures == (*GALLERY, "other.png")
    assert queries.references.tolist() == [0, 4, 4] and queries.left_out.tolist() == [0, -1, -1]
    fake = Fake(lambda pixels: torch.nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 12).float(), lambda text: torch.ones(12))
    features = encode(fake, queries)
    assert fake.pictures == 5 and fake.texts == ["in red"]                  # each once
    table = sweep(features, queries, ["image"])
    assert table["image"].tolist() == [2, 3, 3]                             # ties count against: 2 strangers (of 3 without the reference, 4 with none left out), 2 answers


# --- reading: what is spoiled

@pytest.mark.parametrize("change, says", [
    ({"reference_img_id": ...}, "has no field 'reference_img_id'; it has id, relative_caption"),
    ({"relative_caption": ...}, "has no field 'relative_caption'"),
    ({"gt_img_ids": ..., "target_img_id": ...}, "names no right answer in 'gt_img_ids' or 'target_img_id'"),
    ({"gt_img_ids": []}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": None}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": "b.png"}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": ["b.png", None]}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": ["b.png", 1.5]}, "right answer is not the name of a picture: 1.5"),
    ({"gt_img_ids": [["b.png"]]}, "right answer is not the name of a picture: ['b.png']"),
    ({"gt_img_ids": ["b.png", "z.png"]}, "the right answer 'z.png' is not in"),
    ({"gt_img_ids": ["a.png", "b.png"]}, "the reference 'a.png' is listed as a right answer"),
    ({"gt_img_ids": ["./a.png"]}, "the reference 'a.png' is listed as a right answer"),
    ({"gt_img_ids": ["../b.png"]}, "right answer: ../b.png leads out of the folder"),
    ({"relative_caption": 7}, "field 'relative_caption' is not a text: 7"),
    ({"relative_caption": None}, "field 'relative_caption' is not a text: None"),
    ({"relative_caption": "  "}, "field 'relative_caption' is not a text"),
    ({"relative_caption": ["in red"]}, "field 'relative_caption' is not a text"),
    ({"kind": 3}, "field 'kind' is not a text: 3"),
    ({"kind": None}, "field 'kind' is not a text: None"),
    ({"reference_img_id": None}, "field 'reference_img_id' is not the name of a picture: None"),
    ({"reference_img_id": True}, "field 'reference_img_id' is not the name of a picture: True"),
    ({"reference_img_id": 1.0}, "field 'reference_img_id' is not the name of a picture: 1.0"),
    ({"reference_img_id": {"a": 1}}, "field 'reference_img_id' is not the name of a picture"),
    ({"reference_img_id": ""}, "field 'reference_img_id'"),
    ({"reference_img_id": "."}, "field 'reference_img_id'"),
    ({"reference_img_id": "../secret.png"}, "field 'reference_img_id': ../secret.png leads out of the folder"),
    ({"reference_img_id": "sub/../../secret.png"}, "field 'reference_img_id': sub/../../secret.png leads out"),
    ({"reference_img_id": "/etc/passwd"}, "field 'reference_img_id': /etc/passwd leads out"),
    ({"reference_img_id": "a\0.png"}, "field 'reference_img_id': a name with a zero byte"),
    ({"reference_img_id": "\ud800.png"}, "field 'reference_img_id' is not UTF-8"),
])
def test_a_spoiled_record_is_named(folder, change, says):
    record = {name: value for name, value in (RECORD | change).items() if value is not ...}
    with pytest.raises(PliError) as caught: read(folder, RECORD, record)
    assert str(caught.value).startswith(f"{folder / 'queries.json'}: record 1") and says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [None, 3, "a.png", ["a.png", "in red", "b.png"]])
def test_a_record_that_is_none(folder, record):
    with pytest.raises(PliError, match="queries.json: record 1 is not an object with fields"): read(folder, RECORD, record)


@pytest.mark.parametrize("queries", [[], {}, {"0": RECORD}, None, 5, "queries"])
def test_no_list_of_queries(folder, queries):
    with pytest.raises(PliError, match="queries.json: queries are a list with at least one record"):
        read_queries(write(folder / "queries.json", queries), folder / "gallery.json")


@pytest.mark.parametrize("gallery, says", [
    ([], "a gallery is a list"), ({}, "a gallery is a list"), ({"a.png": 0}, "a gallery is a list"), (None, "a gallery is a list"), ("a.png", "a gallery is a list"),
    (["a.png", "b.png", "a.png"], "entry 2 lists 'a.png' for the second time; the first is entry 0"),
    (["a.png", "./a.png"], "entry 1 lists 'a.png' for the second time"), ([1, "1"], "entry 1 lists '1' for the second time"),
    (["a.png", None], "entry 1 is not the name of a picture: None"), ([False], "entry 0 is not the name"), ([["a.png"]], "entry 0 is not the name"),
    (["a.png", "../b.png"], "entry 1: ../b.png leads out of the folder"), (["/etc/passwd"], "entry 0: /etc/passwd leads out"), (["a.png", ""], "entry 1"),
    (["out.png"], "entry 0: out.png is a link out of the folder"), (["away/b.png"], "entry 0: away/b.png is a link out of the folder"),
])
def test_a_spoiled_gallery(folder, tmp_path_factory, gallery, says):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "out.png").symlink_to(picture(outside / "b.png"))
    (folder / "away").symlink_to(outside)
    write(folder / "gallery.json", gallery)
    with pytest.raises(PliError) as caught: read(folder, RECORD)
    assert str(caught.value).startswith(f"{folder / 'gallery.json'}: {says}")


def test_an_empty_gallery_of_lines(folder):
    (folder / "gallery.txt").write_text("\n\n")
    with pytest.raises(PliError, match="gallery.txt: a gallery is a list"): read_gallery(folder / "gallery.txt", folder)
    (folder / "gallery.txt").write_bytes(b"a.png\n\xff\xfe.png\n")
    with pytest.raises(PliError, match="gallery.txt: entry 1 is not UTF-8"): read_gallery(folder / "gallery.txt", folder)
    with pytest.raises(PliError, match="gone.txt"): read_gallery(folder / "gone.txt", folder)
    with pytest.raises(PliError, match="gone.json: no such file"): read_gallery(folder / "gone.json", folder)
    with pytest.raises(PliError, match="no such file"): read_queries(folder / "gone.json", folder / "gallery.json")


@pytest.mark.parametrize("name", ["queries.json", "gallery.json"])
def test_half_a_download(folder, name):
    whole = (folder / name).read_bytes()
    for end in range(len(whole)):
        (folder / name).write_bytes(whole[:end])
        with pytest.raises(PliError, match=name): read_queries(folder / "queries.json", folder / "gallery.json")


anything = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(GALLERY),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(RECORD)) | st.text(max_size=4), inner, max_size=4), max_leaves=8)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(RECORD)), anything, anything)
def test_any_json_is_read_or_refused_by_name(tmp_path_factory, field, value, other):
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "gallery.json", GALLERY)
    for records in ([RECORD | {field: value}], [other], other):
        try: assert len(read_queries(write(folder / "queries.json", records), folder / "gallery.json")) == 1
        except PliError as error: assert "queries.json" in str(error) and "\n" not in str(error)
    try: read_gallery(write(folder / "gallery.json", other), folder)
    except PliError as error: assert "gallery.json" in str(error) and "\n" not in str(error)


# --- pictures and features

def test_every_missing_picture_is_counted_before_any_work(folder):
    names = GALLERY + [f"gone {i}.png" for i in range(6)] + ["broken.png"]
    (folder / "broken.png").write_text("no picture")
    write(folder / "gallery.json", names)
    queries = read(folder, RECORD | {"reference_img_id": "x" * 300 + ".png"})
    for call in (lambda: encode(Fake(blind), queries), lambda: query_validator(queries)):
        with pytest.raises(PliError) as caught: call()
        assert f"8 of 12 pictures in {folder} cannot be used: gone 0.png (missing picture)" in str(caught.value) and str(caught.value).endswith(" and 3 more")
    with pytest.raises(PliError, match=r"1 of 1 pictures in .* cannot be used: broken.png \(broken picture\)$"): PictureFiles(["broken.png"], folder, pil_to_tensor)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_cut_off_in_the_middle_is_named(folder, workers):
    noise = torch.randint(0, 256, (64, 64, 3), generator=generator(0, "noise")).byte().numpy()
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:4000])
    pictures = PictureFiles(["a.png", "cut.png"], folder, pil_to_tensor)              # its header is whole
    with pytest.raises(PictureError, match="cut.png: broken picture"): encode_pictures(Fake(lambda pixels: pixels.float().mean((2, 3))), pictures, workers=workers)


def test_features_are_unit_single_precision_and_the_same_in_any_batch():
    pixels = torch.randint(0, 256, (7, 3, 4, 4), generator=generator(0, "pixels")).byte()
    fake = Fake(lambda pixels: pixels.flatten(1).half(), lambda text: torch.tensor([len(text), 1.0]))
    features = encode_pictures(fake, pixels)
    assert features.dtype == torch.float32 and torch.allclose(features.norm(dim=1), torch.ones(7))
    assert torch.equal(encode_pictures(fake, pixels, batch_size=2), features)
    texts = ["a", "bb", "a", "ccc", "bb"]
    assert torch.equal(encode_texts(fake, texts, batch_size=2), unit(torch.tensor([[1.0, 1], [2, 1], [1, 1], [3, 1], [2, 1]])))
    assert fake.texts == ["a", "bb", "ccc"]                                           # each distinct text once


# --- ranks

def made_up(queries=30, gallery=41, extra=4, width=6, seed=0, kinds=("a", "b")) -> tuple[Features, Queries]:
    "Random features, in double precision so that no two ways to multiply disagree; some references are outside the gallery."
    chance = generator(seed, "made up")
    references = torch.randint(0, gallery + extra, (queries,), generator=chance)
    answers = []
    for reference in references.tolist():
        drawn = torch.randperm(gallery, generator=chance)[:4].tolist()
        answers.append(tuple(sorted(i for i in drawn if i != reference))[: 1 + len(answers) % 3])
    features = [unit(torch.randn(n, width, generator=chance, dtype=torch.float64)) for n in (gallery + extra, queries)]
    return Features(*features), Queries(tuple(f"text {i}" for i in range(queries)), references, tuple(answers), tuple(kinds[i % len(kinds)] for i in range(queries)), gallery)


def slow_rank(scores: list[float], answers, left_out: int) -> int:
    "Sort the gallery by hand: best first, of equals the wrong one first."
    order = sorted((i for i in range(len(scores)) if i != left_out), key=lambda i: (-scores[i], i in answers))
    return 1 + next(place for place, i in enumerate(order) if i in answers)


@pytest.mark.parametrize("most", [100_000_000, 1, 3 * 41, 29 * 41 + 7])
def test_sweep_is_a_slow_loop_over_queries(most):
    features, queries = made_up()
    table = sweep(features, queries, most=most)
    assert list(table) == every_composer() and all(len(found) == len(queries) for found in table.values())
    gallery, mean = features.pictures[: queries.gallery], mean_feature(features.texts)
    for spec, found in table.items():
        for i in range(len(queries)):
            reference = int(queries.references[i])
            left_out = reference if reference < queries.gallery else -1
            one = score(parse_composer(spec), features.pictures[reference][None], features.texts[i][None], gallery, torch.tensor([left_out]), text_mean=mean)
            assert found[i] == slow_rank(one[0].tolist(), queries.answers[i], left_out), (spec, i)


def test_every_composer_is_there_with_all_its_weights():
    specs = every_composer()
    assert specs == [str(kind(weight)) for kind in COMPOSERS.values() for weight in kind.grid] and len(specs) == len(set(specs))
    assert [str(parse_composer(spec)) for spec in specs] == specs


def test_one_text_for_all_queries_cannot_be_centred():
    features, queries = made_up(6)
    same = replace(queries, texts=("in red",) * 6)
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
    expected = torch.tensor([chance_of(queries.gallery - (out >= 0), len(right), k) for out, right in zip(queries.left_out.tolist(), queries.answers)])
    deviation = (expected * (1 - expected)).sum().sqrt() / len(queries)
    for spec, found in sweep(features, queries, ["image", "text", "sum:1", "slerp:0.5", "product:1", "harris:1"]).items():
        assert abs(recall_at(found, k).mean() - expected.mean()) < 4 * deviation, spec


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
    assert alone == {"image only": 0, "text only": 0, "solved by one half": 0, "composing adds": [100, 100, 100]}
    assert query_validator(queries, composer="sum:1", k=1)(backbone) == 1


# --- choosing without peeking

def told_apart(queries: int = 60, kinds=("a",)) -> tuple[dict, Queries, torch.Tensor]:
    "`sum:1` solves exactly the queries of one half, `sum:2` exactly those of the other."
    asked = Queries(("",) * queries, torch.arange(queries) // 2, ((999,),) * queries, tuple(kinds[i % len(kinds)] for i in range(queries)), 1000)
    first = halves(asked)
    good, bad = torch.tensor(1), torch.tensor(500)
    return {"sum:1": torch.where(first, good, bad), "sum:2": torch.where(first, bad, good)}, asked, first


def test_peeking_would_be_visible():
    table, queries, first = told_apart()
    found, specs = cross_chosen(table, queries)
    assert specs == ["sum:2", "sum:1"]                        # what is best on the second half is for the first, and the other way round
    assert (found == 500).all()                               # a choice on the reported queries would give 1 everywhere
    assert choose(table, first) == "sum:1" and choose(table, ~first) == "sum:2"
    record = report(table, queries)
    assert record["kinds"]["a"]["composers"]["sum"]["recall@10"] == record["kinds"]["a"]["composers"]["best"]["recall@10"] == [0, 0, 0]


def test_peeking_through_another_kind_would_be_visible():
    table, queries, first = told_apart(kinds=("a", "b"))
    other = torch.tensor([kind == "b" for kind in queries.kinds])
    table = {spec: torch.where(other, 1001 - found, found) for spec, found in table.items()}      # on kind b the other one is right
    found, specs = cross_chosen(table, queries, "a")
    assert specs == ["sum:2", "sum:1"]
    assert (found[~other] == 500).all() and (found[other] != 1).any()
    assert cross_chosen(table, queries, "b")[1] == ["sum:1", "sum:2"]


ranks_drawn = st.lists(st.integers(1, 60), min_size=40, max_size=40).map(torch.tensor)


@settings(deadline=None, max_examples=60)
@given(st.lists(ranks_drawn, min_size=2, max_size=4), st.lists(ranks_drawn, min_size=4, max_size=4), st.sampled_from([None, "a", "b"]), st.booleans())
def test_a_query_has_no_say_in_what_it_is_reported_with(tables, others, kind, side):
    queries = Queries(("",) * 40, torch.arange(40) // 2, ((99,),) * 40, ("a", "b") * 20, 100)
    own = halves(queries) == side
    table = {f"sum:{i}": found for i, found in enumerate(tables, 1)}
    changed = {spec: torch.where(own, other, found) for (spec, found), other in zip(table.items(), others)}
    place = 0 if side else 1
    (before, chosen), (after, again) = cross_chosen(table, queries, kind), cross_chosen(changed, queries, kind)
    assert chosen[place] == again[place]
    assert torch.equal(before[own], table[chosen[place]][own]) and torch.equal(after[own], changed[chosen[place]][own])


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 99))
def test_references_stay_together(references, seed):
    queries = Queries(("",) * len(references), torch.tensor(references), ((99,),) * len(references), ("a",) * len(references), 100)
    side = halves(queries, seed)
    assert side.dtype == torch.bool and torch.equal(side, halves(queries, seed))
    for reference in set(references): assert len(set(side[queries.references == reference].tolist())) == 1


def test_halves_are_halves():
    queries = Queries(("",) * 4000, torch.arange(4000), ((9,),) * 4000, ("a",) * 4000, 5000)
    assert 0.45 < halves(queries).float().mean() < 0.55
    assert 0.4 < (halves(queries, 0) == halves(queries, 1)).float().mean() < 0.6


def test_too_few_queries_to_choose_on():
    table, queries, first = told_apart(2)                                # both have the same reference
    with pytest.raises(PliError, match="2 queries are too few to choose between 2 composers"): cross_chosen(table, queries)
    with pytest.raises(PliError, match="too few"): report(table, queries)
    alone = {"sum:1": table["sum:1"]}
    assert torch.equal(cross_chosen(alone, queries)[0], table["sum:1"])  # nothing to choose
    assert report(alone, queries)["specs"] == {"sum": ["sum:1"], "best": ["sum:1"]}
    assert report(table, queries, chosen={"sum": "sum:2", "best": "sum:1"})["specs"] == {"sum": ["sum:2"], "best": ["sum:1"]}
    table, queries, first = told_apart()
    rare = replace(queries, kinds=("rare", *queries.kinds[1:]))
    with pytest.raises(PliError, match="1 queries of kind rare are too few"): cross_chosen(table, rare, "rare")


def test_a_tie_goes_to_the_lower_ranks_and_k_decides():
    table = {"sum:1": torch.tensor([1, 90, 90]), "sum:2": torch.tensor([1, 20, 20]), "sum:4": torch.tensor([11, 11, 11])}
    assert choose(table) == "sum:2" and choose(table, k=11) == "sum:4" and choose(table, torch.tensor([False, True, True]), k=1) == "sum:4"


def test_choices_made_elsewhere_are_used_as_they_are():
    dev, queries, first = told_apart()
    chosen = choose_families(dev | {"image": torch.full((60,), 700), "product:1": torch.full((60,), 2)})
    assert chosen == {"sum": chosen["sum"], "image": "image", "product": "product:1", "best": "product:1"}
    test = {"sum:1": torch.full((60,), 3), "sum:2": torch.full((60,), 1), "image": torch.full((60,), 1), "product:1": torch.full((60,), 400)}
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
    for name in record["specs"]: assert torch.equal(ranks_of(again, name), cross_chosen({spec: found for spec, found in table.items() if name in (spec.split(":")[0], "best")}, queries, "colour")[0])
    assert compare(again, record) == {"difference": [0, 0, 0], "ratio": [1, 1, 1]}


def test_kinds_and_all_of_them(measured):
    table, queries, record = measured
    assert {kind: section["queries"] for kind, section in record["kinds"].items()} == {"all": 80, "colour": 40, "shape": 20}     # those of no kind are in `all` only
    assert {kind: int(rows.sum()) for kind, rows in kinds_of(queries).items()} == {"all": 80, "colour": 40, "shape": 20}
    for kind, rows in kinds_of(queries).items():
        for name in record["specs"]: assert record["kinds"][kind]["composers"][name]["recall@5"][0] == round(100 * recall_at(ranks_of(record, name)[rows], 5).mean().item(), 2)
    for kinds in ({"colour"}, {"all"}):
        one = replace(queries, kinds=tuple(kinds) * 80)
        assert set(report(table, one)["kinds"]) == kinds and report(table, one)["kinds"][min(kinds)]["queries"] == 80


def test_what_each_half_does_alone():
    table = {"image": torch.tensor([1, 10, 11, 50]), "text": torch.tensor([99, 3, 12, 60])}
    found = halves_alone(table, torch.tensor([1, 1, 1, 99]))
    assert found["image only"] == 50 and found["text only"] == 25 and found["solved by one half"] == 50 and found["composing adds"][0] == 25
    assert halves_alone(table, torch.tensor([99, 99, 99, 99]), k=60)["composing adds"][0] == -100
    assert halves_alone({"image": torch.tensor([1, 99]), "text": torch.tensor([99, 1])}, torch.tensor([99, 99]))["solved by one half"] == 100


def test_a_report_without_the_halves_has_none(measured):
    table, queries, _ = measured
    record = report({"sum:1": table["sum:1"]}, queries)
    assert all(section["halves"] == {} for section in record["kinds"].values()) and "image only" not in as_page(record)


def test_comparisons():
    record = lambda *ranks: {"ranks": {"best": " ".join(map(str, ranks))}}
    one, other, none = record(1, 5, 10, 11), record(1, 20, 20, 20), record(50, 50, 50, 50)
    assert compare(one, other)["difference"][0] == 50 and compare(one, other)["ratio"][0] == 3
    assert compare(one, other)["ratio"][2] is None                        # some draws hold no query that the other solves
    assert compare(other, one, k=1)["difference"] == [0, 0, 0]
    assert compare(one, none)["ratio"] is None and compare(one, none)["difference"][0] == 75
    assert compare(one, other, rows=torch.tensor([True, False, False, True]))["difference"] == [0, 0, 0]
    json.dumps(compare(one, other), allow_nan=False)
    with pytest.raises(PliError, match="4 and 3 queries: only reports over the same queries"): compare(one, record(1, 2, 3))


def test_tables_say_what_the_report_says(measured):
    table, queries, record = measured
    heading, rows = rows_of(record, "shape")
    assert heading == ["composer", "weight", "R@1", "R@5", "R@10"] and [row[0] for row in rows] == list(record["specs"]) == [*COMPOSERS, "best"]
    for row in rows:
        low = record["kinds"]["shape"]["composers"][row[0]]["recall@5"]
        assert row[3] == f"{low[0]:.1f} [{low[1]:.1f}, {low[2]:.1f}]"
    lines = as_text(heading, rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == len(rows) + 1
    assert as_markdown(heading, rows).splitlines()[1] == "| --- | --: | --: | --: | --: |"
    assert max(map(len, as_page(record).splitlines())) <= 160 and as_page(record).count("recall in percent") == 3
    heading, rows = sweep_rows(table, queries)
    assert heading[:5] == ["composer", "all R@1", "all R@10", "colour R@1", "colour R@10"] and [row[0] for row in rows] == list(table)
    assert rows[3][2] == f"{100 * recall_at(table[rows[3][0]], 10).mean():.1f}"


def test_rows_of_queries():
    _, queries = made_up()
    mask = torch.arange(30) % 3 == 0
    for part in (queries.pick(mask), queries.pick(range(0, 30, 3)), queries.pick(torch.arange(0, 30, 3))):
        assert part.texts == queries.texts[::3] and torch.equal(part.references, queries.references[::3]) and part.answers == queries.answers[::3]
        assert part.kinds == queries.kinds[::3] and part.gallery == queries.gallery


# --- a number while tuning

def bright(count: int) -> TensorPairs:
    "Pictures that differ, each with its own caption; every seventh is there three times."
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=generator(0, "bright")).byte()
    for i in range(0, count - 7, 7): pixels[i + 3] = pixels[i + 5] = pixels[i]
    return TensorPairs(pixels, [f"picture {i}" for i in range(count)])


def known(row: torch.Tensor) -> torch.Tensor:
    "A feature of its own for every picture, the same from bytes and from floats."
    row = row if row.dtype == torch.uint8 else row.mul(255).round().byte()
    return torch.randn(16, generator=generator(row.numpy().tobytes().hex()))


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
    rows = world.sample(40, generator(0, "rows"))
    validate = pair_validator(TensorPairs(world.render(rows, 48), world.caption(rows, world.SPARSE, generator(0, "words"))), "recolour+random:0.5")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert validate(backbone) == validate(backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_held_out_pictures_that_break_are_said(tmp_path):
    for name in "abc": picture(tmp_path / f"{name}.png", (ord(name), 0, 0))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])
    pairs, said = Pairs(tuple(str(tmp_path / f"{name}.png") for name in "abc"), ("a", "b", "c"), tmp_path), []
    pair_validator(PairSet(pairs, pil_to_tensor), "none", say=said.append)
    assert len(said) == 1 and said[0].startswith("1 held-out pictures cannot be read") and "b.png" in said[0]
    with pytest.raises(PliError, match="at least two held-out pairs"): pair_validator(PairSet(pairs.take([0, 1]), pil_to_tensor), "none", say=said.append)


def test_same_pictures_are_found():
    pixels = torch.randint(0, 256, (4, 3, 5, 5), generator=generator(0, "same")).byte()
    assert same_pictures(pixels[torch.tensor([0, 1, 0, 2, 1, 0])]) == [(0, 2, 5), (1, 4), (0, 2, 5), (3,), (1, 4), (0, 2, 5)]
    assert same_pictures(pixels.transpose(2, 3)) == [(0,), (1,), (2,), (3,)]


def test_drawn_queries_keep_their_shape():
    drawn = world.make_queries(20, 200, generator(0, "drawn"))
    queries = world_queries(drawn)
    assert len(queries) == 20 and queries.gallery == 200 and queries.texts == tuple(drawn.texts) and queries.kinds == tuple(drawn.kinds)
    assert torch.equal(queries.left_out, torch.as_tensor(drawn.references)) and queries.answers == tuple(map(tuple, drawn.answers))

"pli.benchmarks: four layouts and their variants, official counts, spoiled files, protocols, what missing pictures cost, and queries of your own."
import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CATEGORIES, TASKS, add_pairs, edit, make_circo, make_cirr, make_fashioniq, make_genecis, picture, write

from pli import world
from pli.benchmarks.circo import with_gallery
from pli.benchmarks.fashioniq import join_captions
from pli.benchmarks.masked_tuning import read_caption_pairs
from pli.benchmarks.missing import check_benchmark, drop_pictures, trim_benchmark, used_pictures
from pli.benchmarks.own import read_gallery, read_queries
from pli.benchmarks.protocols import Reader, parse_protocol
from pli.benchmarks.registry import BENCHMARKS, protocol_composer, read_benchmark
from pli.benchmarks.shape import Benchmark, Missing, own_queries, protocol_text, world_queries
from pli.core import PliError, rng_for

MAKERS = {"fashioniq": make_fashioniq, "cirr": make_cirr, "circo": make_circo, "genecis": make_genecis}


def says(call) -> str:
    "What a call complains of, on one line."
    with pytest.raises(PliError) as caught: call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sound(benchmark: Benchmark) -> Benchmark:
    "Everything that must hold for every benchmark."
    count, pictures = len(benchmark), len(benchmark.pictures)
    assert count and len(set(benchmark.ids)) == count and len(set(benchmark.pictures)) == pictures
    for field in ("texts", "answers", "categories"): assert len(getattr(benchmark, field)) == count, field
    for field in ("subsets", "aspects"): assert len(getattr(benchmark, field)) in (0, count), field
    for field in ("files", "boxes"): assert len(getattr(benchmark, field)) in (0, pictures), field
    assert benchmark.references.shape == benchmark.gallery_of.shape == (count,) and benchmark.references.dtype == benchmark.gallery_of.dtype == torch.int64
    assert 0 <= benchmark.references.min() and benchmark.references.max() < pictures and benchmark.gallery_of.max() < len(benchmark.galleries)
    galleries = [set(gallery.tolist()) for gallery in benchmark.galleries]
    assert all(gallery.dtype == torch.int64 and len(gallery) == len(known) and known <= set(range(pictures)) for gallery, known in zip(benchmark.galleries, galleries))
    for row in range(count):
        right, subset = benchmark.answers[row], benchmark.subsets[row] if benchmark.subsets else ()
        assert set(right) <= galleries[benchmark.gallery_of[row]] and len(set(right)) == len(right) and set(subset) <= galleries[benchmark.gallery_of[row]]
        assert int(benchmark.references[row]) not in (*right, *subset)
        assert not subset or set(right) <= set(subset)
    assert all(isinstance(words, tuple) and words and all(isinstance(text, str) for text in words) for words in benchmark.texts)
    assert {benchmark.scoring.headline, benchmark.scoring.halves_at} <= set(benchmark.scoring.measures)
    assert all(not os.path.isabs(file) and ".." not in file for file in benchmark.files)
    return benchmark


def by_name(benchmark: Benchmark) -> list[tuple]:
    "Every query in names of pictures."
    name = benchmark.pictures.__getitem__
    return [(asked, words, name(reference), tuple(map(name, right)), [name(i) for i in benchmark.galleries[gallery].tolist()])
            for asked, words, reference, right, gallery in zip(benchmark.ids, benchmark.texts, benchmark.references.tolist(), benchmark.answers, benchmark.gallery_of.tolist())]


# --- layouts and their variants

VARIANTS = [
    ("fashioniq", {}), ("fashioniq", {"home": "fashionIQ_dataset"}), ("fashioniq", {"home": "fashion-iq"}), ("fashioniq", {"home": "FashionIQ"}),
    ("fashioniq", {"suffix": ".png"}), ("fashioniq", {"suffix": ".jpeg"}), ("fashioniq", {"suffix": ".JPG"}),
    ("fashioniq", {"images": "image_data/{category}"}), ("fashioniq", {"images": "resized_images/{category}", "home": "FashionIQ", "suffix": ".png"}),
    ("cirr", {}), ("cirr", {"home": "cirr"}), ("cirr", {"home": "CIRR", "images": "CIRR"}), ("cirr", {"home": "cirr_dataset", "images": "cirr_dataset/img_raw"}), ("cirr", {"images": "img_raw"}),
    ("cirr", {"home": "cirr", "images": "img_raw"}),
    ("circo", {}), ("circo", {"coco": ""}), ("circo", {"home": "CIRCO"}), ("circo", {"home": "circo", "coco": "", "info": False}), ("circo", {"info": False}),
    ("genecis", {}), ("genecis", {"home": "genecis"}), ("genecis", {"home": "GeneCIS", "coco": "coco/val2017", "vg": "vg/VG_100K_2"}), ("genecis", {"vg": "VG_100K_all"}),
    ("genecis", {"home": "genecis", "coco": "genecis/val2017", "vg": "genecis/vg"}),
]


@pytest.mark.parametrize("name, options", VARIANTS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(VARIANTS)])
def test_layouts(tmp_path, name, options):
    root = MAKERS[name](tmp_path / "data", **options)
    plain = MAKERS[name](tmp_path / "plain")
    for split in BENCHMARKS[name].splits:
        benchmark = sound(read_benchmark(name, root, split))
        assert len(benchmark.files) == len(benchmark.pictures) and all((benchmark.root / file).is_file() for file in benchmark.files)
        assert check_benchmark(benchmark).files == benchmark.files                                       # all there: nothing changes
        assert by_name(benchmark) == by_name(read_benchmark(name, plain, split))                         # where things lie changes nothing
        assert benchmark.split == split and benchmark.name == name and benchmark.missing is None
        assert benchmark.answered == (split not in ("test", "test1"))
    home = root / options.get("home", "")
    assert by_name(read_benchmark(name, home)) == by_name(read_benchmark(name, str(root)))               # the folder itself, or the one that holds it


@pytest.mark.parametrize("name", MAKERS)
def test_annotations_are_read_without_pictures(tmp_path, name):
    bare, full = MAKERS[name](tmp_path / "bare", pictures=False), MAKERS[name](tmp_path / "full")
    one, other = sound(read_benchmark(name, bare)), read_benchmark(name, full)
    assert one.files == other.files and by_name(one) == by_name(other) and one.digest() == other.digest() and one.root == bare


def test_cirr_pictures_beside_the_folder_that_was_given(tmp_path):
    make_cirr(tmp_path, home="cirr")
    assert read_benchmark("cirr", tmp_path / "cirr").root == tmp_path == read_benchmark("cirr", tmp_path).root
    assert read_benchmark("cirr", tmp_path, "train").files[0] == "train/0/train-0-0-img0.png"


def test_a_linked_folder_of_pictures_is_followed(tmp_path):
    make_fashioniq(tmp_path / "disk")
    make_fashioniq(tmp_path / "data", pictures=False)
    (tmp_path / "data/images").symlink_to(tmp_path / "disk/images")
    check_benchmark(read_benchmark("fashioniq", tmp_path / "data"))


def test_mixed_endings_and_folders(tmp_path):
    make_fashioniq(tmp_path, images="image_data/{category}")
    (tmp_path / "image_data/dress/Dva003.jpg").rename(tmp_path / "image_data/dress/Dva003.png")
    (tmp_path / "resized_images/shirt").mkdir(parents=True)
    (tmp_path / "image_data/shirt/Sva001.jpg").rename(tmp_path / "resized_images/shirt/Sva001.jpeg")
    (tmp_path / "image_data/toptee/sharedval.jpg").unlink()                                              # the dresses' folder has it too
    benchmark = check_benchmark(read_benchmark("fashioniq", tmp_path))
    file = dict(zip(benchmark.pictures, benchmark.files))
    assert file["Dva003"] == "image_data/dress/Dva003.png" and file["Sva001"] == "resized_images/shirt/Sva001.jpeg" and file["Dva000"] == "image_data/dress/Dva000.jpg"
    (tmp_path / "image_data/dress/Dva000.jpg").unlink()
    assert dict(zip(benchmark.pictures, read_benchmark("fashioniq", tmp_path).files))["Dva000"] == "image_data/dress/Dva000.jpg"


def test_unicode_names(tmp_path):
    rename = lambda text: text.replace("Dva001", "größe 日本 🎽")
    make_fashioniq(tmp_path)
    for path in ("captions/cap.dress.val.json", "image_splits/split.dress.val.json"): (tmp_path / path).write_text(rename((tmp_path / path).read_text("utf-8")), "utf-8")
    (tmp_path / "images/Dva001.jpg").rename(tmp_path / "images/größe 日本 🎽.jpg")
    benchmark = check_benchmark(sound(read_benchmark("fashioniq", tmp_path)))
    assert "images/größe 日本 🎽.jpg" in benchmark.files and benchmark.digest() == read_benchmark("fashioniq", tmp_path).digest()


# --- what is read

def test_fashioniq(tmp_path):
    benchmark = read_benchmark("fashioniq", make_fashioniq(tmp_path))
    assert Counter(benchmark.categories) == dict.fromkeys(CATEGORIES, 6) and [len(gallery) for gallery in benchmark.galleries] == [15] * 3
    assert len(benchmark.pictures) == 3 * 14 + 1 and benchmark.gallery_of.tolist() == [0] * 6 + [1] * 6 + [2] * 6                 # one picture is in every category
    assert not benchmark.without_reference and benchmark.groups is None and not benchmark.development and benchmark.scoring.mean_of_categories
    for asked, words, reference, right, gallery in by_name(benchmark):
        category, row = asked.rsplit("-", 1)
        record = json.loads((tmp_path / f"captions/cap.{category}.val.json").read_text())[int(row)]
        assert (reference, right) == (record["candidate"], (record["target"],)) and gallery == json.loads((tmp_path / f"image_splits/split.{category}.val.json").read_text())
        assert words == join_captions(record["captions"], "clip4cir", "one")[0]
    assert [read_benchmark("fashioniq", tmp_path, split).development for split in ("train", "val", "test")] == [True, False, False]


def test_cirr(tmp_path):
    benchmark = read_benchmark("cirr", make_cirr(tmp_path))
    records = json.loads((tmp_path / "captions/cap.rc2.val.json").read_text())
    assert benchmark.ids == tuple(str(record["pairid"]) for record in records) and benchmark.texts == tuple((record["caption"],) for record in records)
    for record, (_, _, reference, right, gallery), subset in zip(records, by_name(benchmark), benchmark.subsets):
        assert (reference, right) == (record["reference"], (record["target_hard"],)) and len(gallery) == 60
        assert [benchmark.pictures[i] for i in subset] == [name for name in record["img_set"]["members"] if name != reference] and len(subset) == 5
    assert benchmark.without_reference and set(benchmark.categories) == {"all"} and benchmark.scoring.measures[-1] == "mean(recall@5, subset recall@1)"
    secret = read_benchmark("cirr", tmp_path, "test1")
    assert secret.answers == ((),) * 8 and all(len(subset) == 5 for subset in secret.subsets) and not secret.answered
    assert [read_benchmark("cirr", tmp_path, split).development for split in ("train", "val", "test1")] == [True, True, False]


def test_circo(tmp_path):
    benchmark = read_benchmark("circo", make_circo(tmp_path))
    records = json.loads((tmp_path / "annotations/val.json").read_text())
    for record, (asked, words, reference, right, gallery), aspects in zip(records, by_name(benchmark), benchmark.aspects):
        assert asked == str(record["id"]) and words == (record["relative_caption"],) and reference == str(record["reference_img_id"]) and len(gallery) == 60
        assert right == tuple(map(str, record["gt_img_ids"])) and right[0] == str(record["target_img_id"]) and aspects == tuple(record["semantic_aspects"])
    assert max(map(len, benchmark.answers)) > 2 and not benchmark.without_reference and benchmark.complete and benchmark.development and benchmark.scoring.main_only
    secret = read_benchmark("circo", tmp_path, "test")
    assert secret.aspects == () and secret.answers == ((),) * 8 and not secret.development


def test_circo_puts_the_main_answer_first(tmp_path):
    make_circo(tmp_path)
    edit(tmp_path / "annotations/val.json", lambda records: [record | {"gt_img_ids": record["gt_img_ids"][::-1]} for record in records])
    benchmark = read_benchmark("circo", tmp_path)
    assert [benchmark.pictures[right[0]] for right in benchmark.answers] == [str(record["target_img_id"]) for record in json.loads((tmp_path / "annotations/val.json").read_text())]


def test_circo_without_its_list(tmp_path):
    listed, folder, bare = (make_circo(tmp_path / name, **options) for name, options in (("a", {}), ("b", {"info": False}), ("c", {"info": False, "pictures": False})))
    (folder / "COCO2017_unlabeled/unlabeled2017/readme.txt").write_text("no picture")
    full, found, named = (read_benchmark("circo", root) for root in (listed, folder, bare))
    assert by_name(found) == by_name(full) and not found.complete           # not the official 123,403
    assert protocol_text(full) == "reference=kept, gallery=60 pictures instead of 123403" and protocol_text(found) == "reference=kept, the list of the gallery is not there"
    assert not sound(named).complete and protocol_text(named) == "reference=kept, the list of the gallery is not there"
    assert set(named.pictures) == {name for _, _, reference, right, _ in by_name(full) for name in (reference, *right)}
    lost = folder / "COCO2017_unlabeled/unlabeled2017" / f"{int(full.pictures[full.answers[0][0]]):012d}.jpg"
    lost.unlink()                                                           # named by annotations: searched, and told to be missing
    again = read_benchmark("circo", folder)
    assert set(again.pictures) == set(full.pictures) and "1 of 60 pictures cannot be used" in says(lambda: check_benchmark(again))
    for path in (folder / "COCO2017_unlabeled/unlabeled2017").iterdir(): path.unlink()
    assert not read_benchmark("circo", folder).complete                     # an empty folder lists nothing


def test_ids_as_texts(tmp_path):
    plain = by_name(read_benchmark("circo", make_circo(tmp_path)))
    text = lambda record: {name: [str(one) for one in value] if name == "gt_img_ids" else f"00{value}" if name.endswith("id") else value for name, value in record.items()}
    edit(tmp_path / "annotations/val.json", lambda records: [text(record) for record in records])
    assert by_name(read_benchmark("circo", tmp_path)) == plain
    make_cirr(tmp_path / "cirr")
    plain = by_name(read_benchmark("cirr", tmp_path))
    edit(tmp_path / "cirr/captions/cap.rc2.val.json", lambda records: [record | {"pairid": str(record["pairid"])} for record in records])
    assert by_name(read_benchmark("cirr", tmp_path)) == plain


def test_genecis(tmp_path):
    benchmark = read_benchmark("genecis", make_genecis(tmp_path))
    assert Counter(benchmark.categories) == dict.fromkeys(TASKS, 5) and len(benchmark.galleries) == 20 and benchmark.protocol == {"crops": "dilated", "tasks": ", ".join(TASKS)}
    assert {len(gallery) for gallery in benchmark.galleries} == {8} and all(gallery[-1] == right[0] for gallery, right in zip(benchmark.galleries, benchmark.answers))
    for name, box, file in zip(benchmark.pictures, benchmark.boxes, benchmark.files):
        if "@" not in name: assert box is None and file == f"val2017/{int(name):012d}.jpg"
        else:
            image, sides = name.split("@")
            assert list(map(float, sides.split(","))) == list(box) and file == f"VG_100K/{image}.jpg"
    assert "2000@3,1,5,4.5" in benchmark.pictures and len(set(benchmark.files)) < len(benchmark.files)      # two boxes in one picture
    whole = read_benchmark("genecis", tmp_path, protocol="crops=whole")
    assert whole.boxes == () and whole.pictures == benchmark.pictures and whole.digest() != benchmark.digest()


@pytest.mark.parametrize("tasks", [("change_object",), ("focus_attribute", "focus_object")])
def test_genecis_reads_the_tasks_that_are_there(tmp_path, tasks):
    benchmark = sound(read_benchmark("genecis", make_genecis(tmp_path, tasks=tasks)))
    assert benchmark.protocol["tasks"] == ", ".join(tasks) and set(benchmark.categories) == set(tasks) and bool(benchmark.boxes) == ("focus_attribute" in tasks)
    assert read_benchmark("genecis", make_genecis(tmp_path / "all")).pick([0]).digest() != benchmark.pick([0]).digest()


def test_genecis_across_the_two_folders_of_visual_genome(tmp_path):
    make_genecis(tmp_path)
    (tmp_path / "VG_100K_2").mkdir()
    for number, path in enumerate(sorted((tmp_path / "VG_100K").iterdir())):
        if number % 2: path.rename(tmp_path / "VG_100K_2" / path.name)
    benchmark = check_benchmark(read_benchmark("genecis", tmp_path))
    assert Counter(file.split("/")[0] for file in benchmark.files).keys() == {"VG_100K", "VG_100K_2", "val2017"}


def test_a_target_that_its_gallery_lists_is_there_once_and_last(tmp_path):
    make_genecis(tmp_path, tasks=("change_object",))
    def double(records): records[0]["gallery"][2] = records[0]["target"]; records[1]["gallery"][3] = records[1]["gallery"][0]
    edit(tmp_path / "change_object.json", double)
    benchmark = sound(read_benchmark("genecis", tmp_path))
    assert [len(gallery) for gallery in benchmark.galleries] == [7, 7, 8, 8, 8] and benchmark.galleries[0][-1] == benchmark.answers[0][0]


# --- the official files

def test_official_fashioniq(shared):
    root = shared / "annotations" / "fashioniq"
    for split, queries, galleries in (("val", (2017, 2038, 1961), [3817, 6346, 5373]), ("train", (5985, 5988, 6027), [11452, 19036, 16121]), ("test", (2024, 2038, 2056), [3818, 6346, 5374])):
        benchmark = sound(read_benchmark("fashioniq", root, split))
        assert Counter(benchmark.categories) == dict(zip(CATEGORIES, queries)) and [len(gallery) for gallery in benchmark.galleries] == galleries
        assert benchmark.answered == (split != "test")
    few = sound(read_benchmark("fashioniq", root, protocol="val"))
    assert [len(gallery) for gallery in few.galleries] == [2628, 3089, 2902] and len(few) == 6016
    both = sound(read_benchmark("fashioniq", root, protocol="reference=left-out,joining=and,orders=both"))
    assert len(both) == 2 * 6016 and torch.equal(both.groups, torch.arange(6016).repeat_interleave(2)) and both.ids[-1] == "toptee-1960/b"
    assert sum(text.startswith(" and ") or text.endswith(" and ") for (text,) in read_benchmark("fashioniq", root).texts) == 3     # empty once stripped
    for (asked, words, reference, right, gallery), record in zip(by_name(few), (r for c in CATEGORIES for r in json.loads((root / f"captions/cap.{c}.val.json").read_text()))):
        assert (reference, right) == (record["candidate"], (record["target"],)) and {reference, *right} <= set(gallery)


def test_official_cirr(shared):
    root = shared / "annotations" / "cirr"
    for split, queries, pictures in (("val", 4181, 2297), ("test1", 4148, 2315)):
        benchmark = sound(read_benchmark("cirr", root, split))
        assert len(benchmark) == queries and len(benchmark.pictures) == len(benchmark.galleries[0]) == pictures and {len(subset) for subset in benchmark.subsets} == {5}
        records = json.loads((root / f"captions/cap.rc2.{split}.json").read_text())
        assert benchmark.ids == tuple(str(record["pairid"]) for record in records) and benchmark.files[0] == f"{'dev' if split == 'val' else split}/{benchmark.pictures[0]}.png"
        assert all([benchmark.pictures[i] for i in subset] == [name for name in record["img_set"]["members"] if name != record["reference"]]
                   for subset, record in zip(benchmark.subsets, records))
    assert ("",) in {tuple(text.strip() for text in words) for words in benchmark.texts}                   # one official caption is empty
    assert "cap.rc2.test1.json" in says(lambda: read_benchmark("cirr", root, "train"))


def test_official_circo(shared):
    root = shared / "annotations" / "circo"
    val, test = sound(read_benchmark("circo", root)), sound(read_benchmark("circo", root, "test"))
    assert len(val) == 220 and len(test) == 800 and val.answered and not test.answered and not val.complete
    assert round(sum(map(len, val.answers)) / 220, 2) == 4.16 and max(map(len, val.answers)) == 14
    assert Counter(aspect for aspects in val.aspects for aspect in aspects)["statement_with_conjunction"] == 164 and len({a for aspects in val.aspects for a in aspects}) == 9
    names = [*range(10**6, 10**6 + 123_403 - len(val.pictures)), *val.pictures]
    start = time.perf_counter()
    whole = sound(with_gallery(val, names))
    assert whole.complete and len(whole.galleries[0]) == 123_403 and whole.digest() == with_gallery(val, reversed(names)).digest()
    assert [row[:4] for row in by_name(whole.pick(range(5)))] == [row[:4] for row in by_name(val.pick(range(5)))]
    assert time.perf_counter() - start < 10


def test_official_genecis(shared):
    for root in (shared / "annotations" / "genecis", shared / "annotations"):
        benchmark = sound(read_benchmark("genecis", root))
        assert Counter(benchmark.categories) == {"focus_object": 1960, "change_object": 1960} and benchmark.protocol["tasks"] == "focus_object, change_object"
        assert Counter(map(len, benchmark.galleries)) == {15: 3919, 14: 1}                                 # one lists its target in its gallery
        assert all(gallery[-1] == right[0] for gallery, right in zip(benchmark.galleries, benchmark.answers)) and benchmark.boxes == ()
    start = time.perf_counter()
    benchmark.digest()
    assert time.perf_counter() - start < 2


# --- spoiled files

CIRR, DRESS, SPLIT, VAL, INFO = ("captions/cap.rc2.val.json", "captions/cap.dress.val.json", "image_splits/split.dress.val.json", "annotations/val.json",
                                 "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json")


def field(row: int, name: str, value):
    "A change of one field of one record; `...` takes it away."
    def change(records):
        if value is ...: del records[row][name]
        else: records[row][name] = value(records[row][name]) if callable(value) else value
    return change


SPOILED = [
    ("fashioniq", DRESS, field(2, "candidate", ...), "record 2 has no field 'candidate'; it has target, captions"),
    ("fashioniq", DRESS, field(2, "target", ...), "record 2 has no field 'target'"),
    ("fashioniq", DRESS, field(2, "captions", ...), "record 2 has no field 'captions'"),
    ("fashioniq", DRESS, field(2, "captions", "is red"), "record 2, field 'captions' is not a list: 'is red'"),
    ("fashioniq", DRESS, field(2, "captions", ["is red"]), "record 2, field 'captions' holds 1 texts, expected 2"),
    ("fashioniq", DRESS, field(2, "captions", ["is red", "a", "b"]), "record 2, field 'captions' holds 3 texts"),
    ("fashioniq", DRESS, field(2, "captions", ["is red", None]), "record 2, field 'captions', entry 1 is not a text: None"),
    ("fashioniq", DRESS, field(2, "captions", ["\ud800", "a"]), "record 2, field 'captions', entry 0 is not UTF-8"),
    ("fashioniq", DRESS, field(2, "target", "B00"), "record 2, field 'target': 'B00' is not among the 15 pictures of "),
    ("fashioniq", DRESS, field(2, "candidate", "B00\n"), r"record 2, field 'candidate': 'B00\n' is not among the 15 pictures of "),
    ("fashioniq", DRESS, field(2, "target", 7), "record 2, field 'target' is not a text: 7"),
    ("fashioniq", DRESS, field(2, "target", True), "record 2, field 'target' is not a text: True"),
    ("fashioniq", DRESS, field(2, "target", None), "record 2, field 'target' is not a text: None"),
    ("fashioniq", DRESS, field(2, "target", " "), "record 2, field 'target' is empty"),
    ("fashioniq", DRESS, field(2, "target", "Dva002"), "record 2: the reference 'Dva002' is listed as the target"),
    ("fashioniq", DRESS, lambda records: [*records[:2], "Dva001"], "record 2 is not an object with fields: 'Dva001'"),
    ("fashioniq", DRESS, lambda records: [], "expected a list of records with at least one in it, found []"),
    ("fashioniq", DRESS, lambda records: {"records": records}, "expected a list of records"),
    ("fashioniq", SPLIT, lambda names: [*names, names[3]], "entry 15: picture 'Dva003' is there for the second time; the first is "),
    ("fashioniq", SPLIT, lambda names: [], "the gallery is empty"),
    ("fashioniq", SPLIT, lambda names: dict.fromkeys(names), " is not a list"),
    ("fashioniq", SPLIT, lambda names: [*names, 7], "entry 15 is not a text: 7"),
    ("fashioniq", SPLIT, lambda names: [*names, ""], "entry 15 is empty"),
    ("fashioniq", SPLIT, lambda names: [*names, "../secret"], "entry 15: ../secret leads out of the folder"),
    ("fashioniq", SPLIT, lambda names: [*names, ".."], "entry 15: .. leads out of the folder"),
    ("fashioniq", SPLIT, lambda names: [*names, "/etc/passwd"], "entry 15: /etc/passwd leads out of the folder"),
    ("fashioniq", SPLIT, lambda names: [*names, "a\0b"], "leads out of the folder"),
    ("fashioniq", SPLIT, lambda names: [*names, "dress/B00"], "entry 15: dress/B00 is a path where a name is expected"),
    ("cirr", CIRR, field(1, "pairid", ...), "record 1 has no field 'pairid'"),
    ("cirr", CIRR, field(1, "pairid", 100), "record 1: pairid '100' is there for the second time; the first is "),
    ("cirr", CIRR, field(1, "pairid", True), "record 1, field 'pairid' is not a number of up to 12 digits: True"),
    ("cirr", CIRR, field(1, "pairid", 1.5), "record 1, field 'pairid' is not a number of up to 12 digits: 1.5"),
    ("cirr", CIRR, field(1, "pairid", 2**80), "record 1, field 'pairid' is not a number of up to 12 digits"),
    ("cirr", CIRR, field(1, "pairid", -3), "record 1, field 'pairid' is not a number"),
    ("cirr", CIRR, field(1, "reference", "dev-77"), "record 1, field 'reference': 'dev-77' is not among the 60 pictures of "),
    ("cirr", CIRR, field(1, "target_hard", "dev-77"), "record 1, field 'target_hard': 'dev-77' is not among"),
    ("cirr", CIRR, field(1, "target_hard", ["dev-1-0-img1"]), "record 1, field 'target_hard' is not a text"),
    ("cirr", CIRR, field(1, "target_hard", "dev-1-0-img1"), "record 1: the reference is listed as 'target_hard'"),
    ("cirr", CIRR, field(1, "target_hard", "dev-58-0-img0"), "record 1: 'target_hard' is not among the members of 'img_set'"),
    ("cirr", CIRR, field(1, "caption", ...), "record 1 has no field 'caption'"),
    ("cirr", CIRR, field(1, "caption", 5), "record 1, field 'caption' is not a text: 5"),
    ("cirr", CIRR, field(1, "img_set", ...), "record 1 has no field 'img_set'"),
    ("cirr", CIRR, field(1, "img_set", []), "record 1, field 'img_set' is not an object with fields: []"),
    ("cirr", CIRR, field(1, "img_set", {"id": 1}), "record 1, field 'img_set' has no field 'members'; it has id"),
    ("cirr", CIRR, field(1, "img_set", lambda own: own | {"members": own["members"][:5] + ["dev-77"]}), "record 1, field 'img_set', member 5: 'dev-77' is not among"),
    ("cirr", CIRR, field(1, "img_set", lambda own: own | {"members": own["members"][:1] + own["members"]}), "record 1, field 'img_set': a member is listed twice"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: paths | {"dev-3-0-img1": "../x.png"}, "picture 'dev-3-0-img1': ../x.png leads out of the folder"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: paths | {"dev-3-0-img1": "./dev/../../x.png"}, "picture 'dev-3-0-img1': ./dev/../../x.png leads out of the folder"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: paths | {"dev-3-0-img1": "/etc/passwd"}, "picture 'dev-3-0-img1': /etc/passwd leads out of the folder"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: paths | {"dev-3-0-img1": 4}, "picture 'dev-3-0-img1' is not a text: 4"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: paths | {"new": "dev/dev-3-0-img1.png"}, "picture 'new': path 'dev/dev-3-0-img1.png' is there for the second time"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: {}, "the gallery is empty"),
    ("cirr", "image_splits/split.rc2.val.json", lambda paths: list(paths), " is not an object with fields"),
    ("circo", VAL, field(3, "id", 0), "record 3: id '0' is there for the second time; the first is "),
    ("circo", VAL, field(3, "id", None), "record 3, field 'id' is not a number"),
    ("circo", VAL, field(3, "reference_img_id", ...), "record 3 has no field 'reference_img_id'"),
    ("circo", VAL, field(3, "reference_img_id", 5), "record 3, field 'reference_img_id': '5' is not among the 60 pictures of "),
    ("circo", VAL, field(3, "reference_img_id", "a.jpg"), "record 3, field 'reference_img_id' is not a number of up to 12 digits: 'a.jpg'"),
    ("circo", VAL, field(3, "reference_img_id", True), "record 3, field 'reference_img_id' is not a number of up to 12 digits: True"),
    ("circo", VAL, field(3, "target_img_id", ...), "record 3 has no field 'target_img_id'"),
    ("circo", VAL, field(3, "target_img_id", 7), "record 3: 'target_img_id' 7 is not in 'gt_img_ids'"),
    ("circo", VAL, field(3, "gt_img_ids", ...), "record 3 has no field 'gt_img_ids'"),
    ("circo", VAL, field(3, "gt_img_ids", []), "is not in 'gt_img_ids'"),
    ("circo", VAL, field(3, "gt_img_ids", lambda own: [*own, own[0]]), "record 3, field 'gt_img_ids' lists a picture twice"),
    ("circo", VAL, field(3, "gt_img_ids", lambda own: [*own, 5]), "record 3, field 'gt_img_ids': '5' is not among the 60 pictures of "),
    ("circo", VAL, field(3, "gt_img_ids", lambda own: [*own, False]), "record 3, field 'gt_img_ids', entry 4 is not a number of up to 12 digits: False"),
    ("circo", VAL, field(3, "gt_img_ids", lambda own: [*own, 46]), "record 3: the reference 46 is listed as a right answer"),
    ("circo", VAL, field(3, "relative_caption", None), "record 3, field 'relative_caption' is not a text: None"),
    ("circo", VAL, field(3, "semantic_aspects", "addition"), "record 3, field 'semantic_aspects' is not a list: 'addition'"),
    ("circo", VAL, field(3, "semantic_aspects", [1]), "record 3, field 'semantic_aspects' is not a text: 1"),
    ("circo", INFO, lambda said: said["images"], " is not an object with fields"),
    ("circo", INFO, lambda said: {"info": {}}, "has no field 'images'; it has info"),
    ("circo", INFO, lambda said: {"images": []}, "the gallery is empty"),
    ("circo", INFO, lambda said: {"images": [*said["images"], said["images"][2]]}, "image 60: picture '33' is there for the second time; the first is "),
    ("circo", INFO, lambda said: {"images": [*said["images"], {"file_name": "x.jpg"}]}, "image 60 has no field 'id'; it has file_name"),
    ("circo", INFO, lambda said: {"images": [*said["images"], 9]}, "image 60 is not an object with fields: 9"),
    ("genecis", "focus_object.json", field(4, "reference", ...), "record 4 has no field 'reference'"),
    ("genecis", "focus_object.json", field(4, "reference", 1000), "record 4, field 'reference' is not an object with fields: 1000"),
    ("genecis", "focus_object.json", field(4, "target", {"image_id": 3}), "record 4, field 'target' has no field 'val_image_id'; it has image_id"),
    ("genecis", "focus_object.json", field(4, "target", {"val_image_id": True}), "record 4, field 'target', field 'val_image_id' is not a number"),
    ("genecis", "focus_object.json", field(4, "target", {"val_image_id": "../1"}), "record 4, field 'target', field 'val_image_id' is not a number of up to 12 digits: '../1'"),
    ("genecis", "focus_object.json", field(4, "gallery", []), "record 4: the gallery is empty"),
    ("genecis", "focus_object.json", field(4, "gallery", {}), "record 4, field 'gallery' is not a list"),
    ("genecis", "focus_object.json", field(4, "gallery", [{"val_image_id": 1}, {}]), "record 4, field 'gallery', entry 1 has no field 'val_image_id'; it has none"),
    ("genecis", "focus_object.json", field(4, "condition", ["wall"]), "record 4, field 'condition' is not a text: ['wall']"),
    ("genecis", "change_attribute.json", field(4, "target", {"image_id": 3}), "record 4, field 'target' has no field 'instance_bbox'"),
    *(("genecis", "change_attribute.json", field(4, "target", {"image_id": 3, "instance_bbox": box}), "record 4, field 'target', field 'instance_bbox' is not a box")
      for box in ([1, 2, 3], [1, 2, 3, "4"], [1, 2, 0, 4], [1, 2, 3, -4], [1, 2, 3, True], [1, 2, 3, 1e300])),
    ("genecis", "change_attribute.json", field(4, "target", {"image_id": 3, "instance_bbox": "1 2 3 4"}), "record 4, field 'target', field 'instance_bbox' is not a list"),
    ("genecis", "change_attribute.json", lambda records: [], "expected a list of records with at least one in it"),
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name), pictures=False) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name, path, change, said", SPOILED, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(SPOILED)])
def test_a_spoiled_file_is_told_by_file_record_and_field(bare, name, path, change, said):
    path = bare[name] / path
    whole = path.read_bytes()
    try:
        told = json.loads(whole)
        changed = change(told)
        path.write_text(json.dumps(told if changed is None else changed))              # escaped: half a character can be written
        found = says(lambda: read_benchmark(name, bare[name]))
        assert found.startswith(str(path)) and said in found
    finally: path.write_bytes(whole)
    sound(read_benchmark(name, bare[name]))


@pytest.mark.parametrize("name", MAKERS)
def test_a_half_downloaded_file_is_named(bare, name):
    split = BENCHMARKS[name].split
    paths = [path for path in bare[name].rglob("*.json") if name in ("circo", "genecis") or f".{split}." in path.name]
    paths = [path for path in paths if path.name != "test.json"]
    assert len(paths) >= 2
    for path in paths:
        whole = path.read_bytes()
        try:
            for share in (0, 0.1, 0.5, 0.99):
                path.write_bytes(whole[:int(share * len(whole))])
                assert f"{path}: not valid JSON" in says(lambda: read_benchmark(name, bare[name]))
        finally: path.write_bytes(whole)


anything = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(MAKERS)), st.integers(0, 3), st.integers(0, 9), anything, st.booleans())
def test_any_json_is_read_or_refused_by_name(bare, name, row, number, value, whole_record):
    path = bare[name] / {"fashioniq": DRESS, "cirr": CIRR, "circo": VAL, "genecis": "focus_attribute.json"}[name]
    before = path.read_bytes()
    try:
        records = json.loads(before)
        names = list(records[row])
        if whole_record: records[row] = value
        else: records[row][names[number % len(names)]] = value
        path.write_text(json.dumps(records))
        try: sound(read_benchmark(name, bare[name])).digest()
        except PliError as error: assert str(error).startswith(f"{path}: record {row}") and "\n" not in str(error)
    finally: path.write_bytes(before)


def test_a_wrong_folder_says_what_was_expected_and_found(tmp_path):
    make_cirr(tmp_path / "data", pictures=False)
    assert says(lambda: read_benchmark("circo", tmp_path / "data")) == (f"{tmp_path / 'data'}: expected annotations/val.json in it, or in a folder CIRCO, circo of it; "
                                                                       f"found in {tmp_path / 'data'}: captions/, image_splits/")
    (tmp_path / "data/captions/cap.rc2.val.json").unlink()
    assert f"found in {tmp_path / 'data/captions'}: cap.rc2.test1.json, cap.rc2.train.json" in says(lambda: read_benchmark("cirr", tmp_path / "data"))
    assert "no such folder" in says(lambda: read_benchmark("cirr", tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "expected focus_attribute.json or change_attribute.json or focus_object.json or change_object.json in it" in says(lambda: read_benchmark("genecis", tmp_path / "empty"))
    assert says(lambda: read_benchmark("genecis", tmp_path / "empty")).endswith(f"found in {tmp_path / 'empty'}: nothing")
    assert says(lambda: read_benchmark("fashioniq", tmp_path / "data/captions/cap.rc2.train.json")).endswith("a file, not a folder")
    make_fashioniq(tmp_path, pictures=False)
    (tmp_path / "image_splits/split.shirt.val.json").unlink()
    assert says(lambda: read_benchmark("fashioniq", tmp_path)) == f"{tmp_path / 'image_splits/split.shirt.val.json'}: no such file"


def test_unknown_names(tmp_path):
    assert says(lambda: read_benchmark("shoes", tmp_path)) == "benchmark 'shoes' is unknown; choose from fashioniq, cirr, circo, genecis"
    assert says(lambda: read_benchmark("cirr", tmp_path, "test")) == "cirr has no split 'test'; choose from train, val, test1"
    assert says(lambda: read_benchmark("genecis", tmp_path, "val")) == "genecis has no split 'val'; it has only one: leave the split out"


# --- protocols

def test_protocols_by_name_and_choice():
    reader = BENCHMARKS["fashioniq"]
    usual = {"gallery": "split", "reference": "kept", "joining": "clip4cir", "orders": "one"}
    assert parse_protocol(reader, "default") == parse_protocol(reader, "usual") == parse_protocol(reader, "clip4cir") == parse_protocol(reader, "") == usual
    assert parse_protocol(reader, "searle") == usual | {"joining": "strip", "orders": "averaged"}
    assert parse_protocol(reader, "masked-tuning") == usual | {"gallery": "val", "reference": "left-out", "joining": "marks", "orders": "both", "pairs": "text"}
    assert parse_protocol(reader, "pic2word") == usual | {"joining": "reversed"}
    assert parse_protocol(reader, "val") == parse_protocol(reader, "gallery=val") == usual | {"gallery": "val"}
    mine = " masked-tuning , reference = kept,gallery=split", "reference=kept,gallery=split,masked-tuning"
    assert parse_protocol(reader, mine[0]) == parse_protocol(reader, mine[1]) == usual | {"joining": "marks", "orders": "both", "pairs": "text"}
    assert list(parse_protocol(reader, "orders=both,gallery=val")) == list(usual)
    for name, reader in BENCHMARKS.items():
        assert parse_protocol(reader, "default") == {option: values[0] for option, values in reader.choices.items() if option not in reader.added} and "masked-tuning" in reader.protocols
        assert set(reader.added) <= set(reader.choices)
        for chosen in reader.protocols.values(): assert all(value in reader.choices[option] for option, value in chosen.items())
    assert parse_protocol(BENCHMARKS["cirr"], "masked-tuning", "val") == {"reference": "left-out", "captions": "marks"} and parse_protocol(BENCHMARKS["cirr"], "captions=as-written,queries=all") == {"reference": "left-out"}
    assert [parse_protocol(BENCHMARKS["circo"], "masked-tuning", split) for split in ("val", "test")] == [{"reference": "kept"}, {"reference": "left-out"}]
    assert parse_protocol(BENCHMARKS["circo"], "masked-tuning,reference=kept", "test") == {"reference": "kept"}
    assert protocol_composer("genecis", "crops=whole, masked-tuning") == "raw-sum:1" and protocol_composer("genecis", "default") is protocol_composer("cirr", "masked-tuning") is None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_name_that_earlier_releases_had(name):
    told = says(lambda: parse_protocol(BENCHMARKS[name], "pli,reference=kept"))
    assert told.startswith("protocol 'pli' is called masked-tuning now") and "\n" not in told


DIGESTS = {("fashioniq", "val", "default"): "d9968b54f772804c",
           ("fashioniq", "val", "searle"): "b65bf1d0315b4daa",
           ("fashioniq", "val", "val"): "6fe8328ae71efeec",
           ("fashioniq", "val", "reference=left-out,joining=and,orders=both"): "9620804578f4665a",
           ("fashioniq", "train", "default"): "c93db81a4ba3f64b",
           ("fashioniq", "test", "default"): "9e0fc110cf7bf776",
           ("cirr", "val", "default"): "49deea2b85d49649",
           ("cirr", "val", "reference=kept"): "9cd9cc83ce979423",
           ("cirr", "test1", "default"): "7edec338aa4641a8",
           ("circo", "val", "default"): "b9be442aa52a82ca",
           ("circo", "val", "reference=left-out"): "24286468b812ec3a",
           ("circo", "test", "default"): "aab8c81ce495e2d2",
           ("genecis", "", "default"): "af32b5f3dda95e29",
           ("genecis", "", "crops=whole"): "ea18f41a8cb89260"}


@pytest.mark.parametrize("name, split, protocol", DIGESTS)
def test_what_was_asked_by_earlier_protocols_is_asked_still(name, split, protocol, shared):
    assert read_benchmark(name, shared / "annotations" / name, split, protocol).digest() == DIGESTS[name, split, protocol]


def test_the_authors_of_masked_tuning_on_a_small_folder(tmp_path):
    root = make_fashioniq(tmp_path / "fashioniq", pictures=False, images="image_data/{category}")
    assert "expected captions_pairs/fashion_iq-val-cap-dress.txt" in says(lambda: read_benchmark("fashioniq", root, protocol="masked-tuning"))
    add_pairs(root)
    found = sound(read_benchmark("fashioniq", root, protocol="masked-tuning"))
    records = json.loads((root / DRESS).read_text())
    assert found.categories.count("dress") == 2 * 5 and found.groups.tolist()[:4] == [0, 0, 1, 1] and found.without_reference
    assert found.texts[:2] == (("is red  and dress number 0",), ("dress number 0  and is red",))
    assert found.texts[2] == ("has longer sleevesdotmark  and dress number 1",)                        # what stands before a caption's semicolon is lost
    named = {records[row][end] for row in (0, 1, 3, 4, 5) for end in ("candidate", "target")}
    assert {found.pictures[i] for i in found.galleries[0].tolist()} == named
    whole = sound(read_benchmark("fashioniq", root, protocol="pairs=text"))
    assert len(whole) == len(found) // 2 and [len(gallery) for gallery in whole.galleries] == [15] * 3 and whole.digest() != read_benchmark("fashioniq", root).digest()
    with (root / "captions_pairs" / "fashion_iq-val-cap-dress.txt").open("a") as file: file.write("dress/strange.jpg;dress/Dva001.jpg;is blue \n" * 2)
    assert "pair 5: 'strange' is not among the 15 pictures of" in says(lambda: read_benchmark("fashioniq", root, protocol="pairs=text"))
    cirr = make_cirr(tmp_path / "cirr", pictures=False)
    assert "queries=first-2297 is a score of the val split, not of train" in says(lambda: read_benchmark("cirr", cirr, "train", "queries=first-2297"))
    assert sound(read_benchmark("cirr", cirr, "val", "masked-tuning")).texts[1] == ("has longer sleevesdotmark",)


@pytest.mark.parametrize("lines, said", [
    ("a/b.jpg;a/c.jpg;x \n", "line 1: a pair is two lines"), ("", "there are no pairs in it"), ("a/b.jpg;a/c.jpg\n" * 2, "line 1 is not 'category/REFERENCE.jpg;"),
    ("a/b.jpg;a/c.jpg;x \n\na/b.jpg;a/d.jpg;y \n", "line 3: names other pictures"), ("a/b.jpg;a/b.jpg;x \n" * 2, "line 2: the reference 'b' is the target too"),
    ("a/;a/c.jpg;x \n" * 2, "line 1: a picture has no name there"), ("a/..;a/c.jpg;x \n" * 2, "line 1: a picture has no name there"),
])
def test_pairs_that_are_none(tmp_path, lines, said):
    (tmp_path / "pairs.txt").write_text(lines)
    told = says(lambda: read_caption_pairs(tmp_path / "pairs.txt"))
    assert said in told and "pairs.txt" in told and "\n" not in told


@pytest.mark.parametrize("name, layout", [
    ("fashioniq", {"images": "image_data/{category}", "home": "fashionIQ"}), ("cirr", {"home": "cirr_dataset/cirr", "images": "cirr_dataset"}), ("circo", {"home": "CIRCO"}),
    ("genecis", {"coco": "COCO/val2017", "vg": "VisualGenome1.2/VG_100K_all", "home": "genecis"}),
])
def test_folders_as_masked_tunings_authors_have_them(tmp_path, name, layout):
    assert not check_benchmark(read_benchmark(name, {"fashioniq": make_fashioniq, "cirr": make_cirr, "circo": make_circo, "genecis": make_genecis}[name](tmp_path, **layout))).missing


@pytest.mark.parametrize("text, said", [
    ("fast", "protocol 'fast' is unknown; choose from default, clip4cir, searle, pic2word, masked-tuning, val, or set gallery, reference, joining, orders, pairs with ="),
    ("gallery=all", "protocol 'gallery=all': gallery is one of split, val"), ("orders=", "orders is one of one, averaged, both"),
    ("ratio=2", "protocol 'ratio=2': there is no choice 'ratio'; choose from gallery, reference, joining, orders, pairs"),
    ("masked-tuning,searle", "names two sets of choices"), ("gallery=val,gallery=split", "sets gallery twice"),
])
def test_protocols_that_are_none(text, said):
    assert said in says(lambda: parse_protocol(BENCHMARKS["fashioniq"], text))


def test_what_the_choices_of_fashioniq_do(tmp_path):
    root = make_fashioniq(tmp_path, pictures=False)
    read = lambda protocol: sound(read_benchmark("fashioniq", root, protocol=protocol))
    usual, few, out, averaged, both = map(read, ("default", "val", "reference=left-out", "searle", "reference=left-out,joining=and,orders=both"))
    assert protocol_text(usual) == "gallery=split, reference=kept, joining=clip4cir, orders=one"
    named = [{name for asked, _, reference, right, _ in by_name(usual) if asked.startswith(category) for name in (reference, *right)} for category in CATEGORIES]
    assert [{few.pictures[i] for i in gallery.tolist()} for gallery in few.galleries] == named and {len(gallery) for gallery in few.galleries} != {15}
    assert set(few.pictures) == set.union(*named)                                                  # nothing else is encoded
    assert by_name(out) == by_name(usual) and out.without_reference and out.digest() != usual.digest()
    for text, (one, other) in zip(usual.texts, averaged.texts):
        assert text[0].lower() == one.lower() and one != other and sorted(one.split(" and ")) == sorted(other.split(" and "))
    assert len(both) == 2 * len(usual) and both.without_reference and both.groups.tolist() == [i // 2 for i in range(36)]
    records = json.loads((root / DRESS).read_text())
    assert both.texts[0] == (" and ".join(records[0]["captions"]),) and both.texts[1] == (" and ".join(records[0]["captions"][::-1]),)
    assert both.ids[:3] == ("dress-0/a", "dress-0/b", "dress-1/a") and torch.equal(both.references[::2], usual.references) and both.answers[1::2] == usual.answers
    assert len({read(protocol).digest() for protocol in ("default", "val", "reference=left-out", "searle", "pic2word", "reference=left-out,joining=and,orders=both", "joining=and", "joining=marks", "joining=strip", "orders=both")}) == 10
    assert "gallery=val needs the targets" in says(lambda: read_benchmark("fashioniq", root, "test", "val"))


@pytest.mark.parametrize("captions, joining, one, other", [
    (["is Red.", " has no Sleeves? "], "clip4cir", "Is red and has no Sleeves", "Has no sleeves and is Red"),
    (["is Red.", " has no Sleeves? "], "strip", "is Red and has no Sleeves", "has no Sleeves and is Red"),
    (["is Red.", " has no Sleeves? "], "and", "is Red. and  has no Sleeves? ", " has no Sleeves?  and is Red."),
    (["", ". "], "clip4cir", " and ", " and "), (["", "blue"], "clip4cir", " and blue", "Blue and "),
])
def test_joinings_letter_by_letter(captions, joining, one, other):
    assert join_captions(captions, joining, "one") == ((one,),) and join_captions(captions, joining, "averaged") == ((one, other),) and join_captions(captions, joining, "both") == ((one,), (other,))


@pytest.mark.parametrize("name, usually", [("cirr", True), ("circo", False)])
def test_the_reference_is_kept_or_left_out(bare, name, usually):
    usual = read_benchmark(name, bare[name])
    other = sound(read_benchmark(name, bare[name], protocol="reference=" + ("kept" if usually else "left-out")))
    assert usual.without_reference == usually and other.without_reference != usually and by_name(usual) == by_name(other) and usual.digest() != other.digest()


def test_a_fifth_benchmark_is_one_object(tmp_path):
    def read(root, split, protocol):
        return replace(read_queries(root / "queries.json", root / "gallery.json"), name="drawn", split=split, protocol=protocol, without_reference=protocol["reference"] == "left-out")

    folder = world.save_world(tmp_path / "world", pairs=2, queries=10, gallery_size=40, size=12)
    BENCHMARKS["drawn"] = Reader(("dev", "held out"), "dev", {"reference": ("left-out", "kept")}, {"default": {}, "with it": {"reference": "kept"}}, read)
    try:
        benchmark = sound(read_benchmark("drawn", folder, protocol="with it"))
        assert benchmark.split == "dev" and protocol_text(benchmark) == "reference=kept" and check_benchmark(benchmark).digest() == benchmark.digest()
        (folder / benchmark.files[3]).unlink()
        assert len(check_benchmark(benchmark, allow_missing=True).galleries[0]) == 39
    finally: del BENCHMARKS["drawn"]


# --- some of the queries; what was asked, in short

@pytest.mark.parametrize("name", MAKERS)
def test_pick(bare, name):
    benchmark = read_benchmark(name, bare[name])
    rows = torch.arange(len(benchmark)) % 3 == 1
    for part in (benchmark.pick(rows), benchmark.pick(rows.tolist()), benchmark.pick(range(1, len(benchmark), 3)), benchmark.pick(torch.arange(1, len(benchmark), 3))):
        assert by_name(sound(part)) == by_name(benchmark)[1::3] and part.categories == benchmark.categories[1::3] and part.pictures == benchmark.pictures and part.files == benchmark.files
        assert part.subsets == benchmark.subsets[1::3] and part.aspects == benchmark.aspects[1::3] and part.scoring == benchmark.scoring
    assert by_name(benchmark.pick([3, 0])) == [by_name(benchmark)[3], by_name(benchmark)[0]]
    assert len(benchmark.pick([])) == 0 and len(benchmark.pick(torch.zeros(len(benchmark), dtype=torch.bool))) == 0
    assert benchmark.pick(range(len(benchmark))).digest() == benchmark.digest() != benchmark.pick(range(1, len(benchmark))).digest()


def test_pick_keeps_queries_of_one_record_together(bare):
    part = read_benchmark("fashioniq", bare["fashioniq"], protocol="orders=both").pick([0, 1, 34, 35])
    assert part.groups.tolist() == [0, 0, 17, 17]


def test_digest_is_the_same_wherever_and_whenever(bare):
    fixed = own_queries(["in red", "größer"], [0, 4], [[1, 2], [3]], ["colour", "size"], 4, ids=["7", "8"])
    assert fixed.digest() == "c85337bc1f91d896"                               # results are compared by it: it must not change
    for name, root in bare.items():
        benchmark = read_benchmark(name, root)
        count = len(benchmark.pictures)
        order = torch.randperm(count, generator=rng_for(0, "order"))
        new = order.argsort().tolist()
        rows = lambda items: tuple(tuple(new[i] for i in row) for row in items)
        shuffled = replace(benchmark, pictures=tuple(benchmark.pictures[i] for i in order.tolist()), references=torch.tensor(new)[benchmark.references], answers=rows(benchmark.answers),
                           subsets=rows(benchmark.subsets), galleries=tuple(torch.tensor(new)[gallery].flip(0) for gallery in benchmark.galleries), files=(), boxes=(), root=Path("elsewhere"))
        assert sound(shuffled).digest() == benchmark.digest()


def test_digest_sees_every_change(bare):
    whole = read_benchmark("cirr", bare["cirr"])
    first = lambda items, value: (value, *items[1:])
    changes = {"name": "circo", "split": "train", "protocol": {"reference": "kept"}, "ids": first(whole.ids, "1"), "texts": first(whole.texts, ("other",)),
               "references": whole.references.roll(1), "answers": first(whole.answers, (whole.answers[0][0] + 1,)), "subsets": first(whole.subsets, whole.subsets[0][:4]),
               "galleries": (torch.arange(59),), "pictures": first(whole.pictures, "renamed"), "categories": first(whole.categories, "other"), "without_reference": False,
               "scoring": replace(whole.scoring, main_only=True), "groups": torch.zeros(len(whole), dtype=torch.int64).index_fill(0, torch.tensor([0]), 1)}
    found = [replace(whole, **{name: value}).digest() for name, value in changes.items()]
    assert len({whole.digest(), *found}) == len(changes) + 1
    few = read_benchmark("genecis", bare["genecis"])
    assert replace(few, gallery_of=few.gallery_of.roll(1)).digest() != few.digest()
    assert replace(few, texts=(("a", "b"), *few.texts[1:])).digest() != replace(few, texts=(("a b",), *few.texts[1:])).digest()


# --- a gallery from elsewhere

def test_with_gallery(tmp_path):
    full, named = read_benchmark("circo", make_circo(tmp_path / "a", pictures=False)), read_benchmark("circo", make_circo(tmp_path / "b", info=False, pictures=False))
    filled = sound(with_gallery(named, map(int, reversed(full.pictures))))
    assert filled.complete and filled.digest() == full.digest() and filled.pictures == full.pictures[::-1] and filled.files == () and filled.aspects == full.aspects
    assert [row[:4] for row in by_name(filled)] == [row[:4] for row in by_name(full)]
    assert with_gallery(full, full.pictures[::-1]) is full                                       # what is known already may be said again
    assert "circo knows what it searches" in says(lambda: with_gallery(full, full.pictures[:-1]))
    assert "entry 60 of the gallery: picture '7' is there for the second time" in says(lambda: with_gallery(named, [*full.pictures, "7"]))
    assert f"lacks 1 that circo names as reference or right answer, such as '{named.pictures[0]}'" in says(lambda: with_gallery(named, [name for name in full.pictures if name != named.pictures[0]]))
    assert "lacks" in says(lambda: with_gallery(named, []))
    many = read_benchmark("genecis", make_genecis(tmp_path / "c", pictures=False))
    assert "genecis knows what it searches" in says(lambda: with_gallery(many, many.pictures))


# --- missing pictures

def lose(benchmark: Benchmark, *names: str) -> None:
    for name in names: (benchmark.root / benchmark.files[benchmark.pictures.index(name)]).unlink()


def left_by_hand(benchmark: Benchmark, gone: set[str]) -> list[tuple]:
    "The rule again, in names and with plain loops."
    rows = []
    for (asked, words, reference, right, gallery), subset in zip(by_name(benchmark), benchmark.subsets or ((),) * len(benchmark)):
        if gone & {reference, *right, *(benchmark.pictures[i] for i in subset)} or not set(gallery) - gone: continue
        rows.append((asked, words, reference, right, [name for name in gallery if name not in gone]))
    return rows


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left(bare, name, seed):
    for split in BENCHMARKS[name].splits:
        benchmark = read_benchmark(name, bare[name], split)
        gone = torch.rand(len(benchmark.pictures), generator=rng_for(seed, "gone")) < (0.05, 0.1, 0.3)[seed]
        names = {benchmark.pictures[i] for i in gone.nonzero().flatten().tolist()}
        left, expected = drop_pictures(benchmark, gone), left_by_hand(benchmark, names)
        assert by_name(left) == expected
        if not expected: continue
        sound(left)
        assert set(left.missing.pictures) == names and set(left.pictures) & names == set() and used_pictures(left).all()
        assert left.missing.total == Counter(benchmark.categories) and sum(left.missing.total.values()) - sum(left.missing.queries.values()) == len(left)
        assert {kind: left.missing.total[kind] - lost for kind, lost in left.missing.queries.items() if left.missing.total[kind] != lost} == Counter(left.categories)
        whole = dict(zip(benchmark.ids, (len(row[4]) for row in by_name(benchmark))))
        assert len(left.missing.absent) == len(left.galleries)
        for asked, gallery in zip(left.ids, left.gallery_of.tolist()): assert len(left.galleries[gallery]) + left.missing.absent[gallery] == whole[asked]
        assert dict(zip(left.pictures, left.files)) == {picture: file for picture, file in zip(benchmark.pictures, benchmark.files) if picture in set(left.pictures)}
        if left.boxes: assert dict(zip(left.pictures, left.boxes)).items() <= dict(zip(benchmark.pictures, benchmark.boxes)).items()


def test_what_each_kind_of_loss_costs(tmp_path):
    benchmark = read_benchmark("circo", make_circo(tmp_path))
    queries = by_name(benchmark)
    named = {name for query in queries for name in (query[2], *query[3])}
    spare = next(name for name in benchmark.pictures if name not in named)
    lose(benchmark, spare)                                                                   # a picture that is only searched: no query leaves
    left = check_benchmark(benchmark, allow_missing=True)
    assert len(left) == len(benchmark) and left.answers != () and left.missing == Missing((spare,), {"all": 0}, {"all": 8}, (1,))
    row = next(i for i, query in enumerate(queries) if len(query[3]) > 1)
    lose(benchmark, queries[row][3][1])                                                      # a right answer, not the main one: the query leaves
    left = check_benchmark(benchmark, allow_missing=True)
    assert queries[row][0] not in left.ids and len(left.galleries[0]) == 58 and left.missing.absent == (2,) and left.digest() != benchmark.digest()
    assert protocol_text(left).startswith("reference=kept, gallery=60 pictures instead of 123403, 2 pictures missing, ") and f"{8 - len(left)} of 8 queries left out" in protocol_text(left)


def test_a_member_of_a_subset_takes_its_query_along(tmp_path):
    benchmark = read_benchmark("cirr", make_cirr(tmp_path))
    member = next(i for i in benchmark.subsets[0] if i not in benchmark.answers[0])
    lose(benchmark, benchmark.pictures[member])
    left = check_benchmark(benchmark, allow_missing=True)
    assert benchmark.ids[0] not in left.ids and set(benchmark.ids) - set(left.ids) == {asked for asked, subset, reference in zip(benchmark.ids, benchmark.subsets, benchmark.references.tolist())
                                                                                       if member in (*subset, reference)}
    assert {len(subset) for subset in left.subsets} == {5} and len(left.galleries[0]) == 59


def test_both_orders_of_a_record_leave_together(tmp_path):
    benchmark = read_benchmark("fashioniq", make_fashioniq(tmp_path), protocol="reference=left-out,joining=and,orders=both")
    lose(benchmark, benchmark.pictures[benchmark.answers[4][0]])
    left = check_benchmark(benchmark, allow_missing=True)
    assert set(Counter(left.groups.tolist()).values()) == {2} and {"dress-2/a", "dress-2/b"} <= set(benchmark.ids) - set(left.ids) and len(left.groups) == len(left)


def test_one_error_tells_all(tmp_path):
    benchmark = read_benchmark("fashioniq", make_fashioniq(tmp_path, images="image_data/{category}"))
    names = [*benchmark.pictures[2:14], "Sva005"]
    lose(benchmark, *names)
    (tmp_path / "image_data/toptee/Tva000.jpg").write_bytes(b"")
    (tmp_path / "image_data/toptee/Tva001.jpg").write_text("<html>404</html>")
    found = says(lambda: check_benchmark(read_benchmark("fashioniq", tmp_path)))
    gone = torch.tensor([name in {*names, "Tva000", "Tva001"} for name in benchmark.pictures])
    costs = drop_pictures(benchmark, gone).missing.queries
    assert found.startswith(f"{tmp_path}: 15 of 43 pictures cannot be used (13 missing pictures, 2 broken pictures; 12 in image_data/dress, 2 in image_data/toptee, 1 in image_data/shirt): ")
    assert f"image_data/dress/{names[0]}.jpg (missing picture)" in found and names[9] in found and names[10] not in found and " and 5 more" in found
    assert f"dress {costs['dress']} of 6, shirt {costs['shirt']} of 6, toptee {costs['toptee']} of 6" in found and costs["dress"] >= 5
    assert "images/NAME.jpg" in found and "--allow-missing scores what is there" in found
    left = sound(check_benchmark(read_benchmark("fashioniq", tmp_path), allow_missing=True))
    assert check_benchmark(left).digest() == left.digest() and all((tmp_path / file).stat().st_size > 20 for file in left.files)      # all that is left can be used


def test_nothing_left(tmp_path):
    benchmark = read_benchmark("genecis", make_genecis(tmp_path, pictures=False))
    assert f"{len(set(benchmark.files))} of {len(set(benchmark.files))} pictures cannot be used" in says(lambda: check_benchmark(benchmark))
    found = says(lambda: check_benchmark(benchmark, allow_missing=True))
    assert "no query is left" in found and "VG_100K" in found


def test_only_what_takes_part_is_looked_at(tmp_path):
    benchmark = read_benchmark("fashioniq", make_fashioniq(tmp_path))
    few = read_benchmark("fashioniq", tmp_path, protocol="val")
    unnamed = next(name for name in benchmark.pictures if name not in few.pictures)
    lose(benchmark, unnamed)
    assert unnamed[0] == "D" and unnamed in says(lambda: check_benchmark(benchmark)) and check_benchmark(few).digest() == few.digest()
    shirts = benchmark.pick([kind == "shirt" for kind in benchmark.categories])
    lose(benchmark, "Dva000", "Dva001")
    checked = check_benchmark(shirts)
    assert by_name(sound(checked)) == by_name(shirts) and len(checked.pictures) == 15 and len(checked.galleries) == 1 and checked.missing is None
    similar = read_benchmark("genecis", make_genecis(tmp_path / "g"))
    one = check_benchmark(similar.pick([7]))
    assert len(one.galleries) == 1 and len(one.pictures) == 9 and by_name(one) == by_name(similar.pick([7])) and one.digest() == similar.pick([7]).digest()


def test_trimmed_changes_nothing_that_is_asked(bare):
    for name, root in bare.items():
        for rows in ([0], [1, 4], [4]):
            part = read_benchmark(name, root).pick(rows)
            small = sound(trim_benchmark(part))
            assert by_name(small) == by_name(part) and small.digest() == part.digest() and used_pictures(small).all() and trim_benchmark(small) is small


def test_drawn_pictures_have_no_files_to_miss():
    drawn = world_queries(world.make_queries(20, 200, rng_for(0, "drawn")))
    assert check_benchmark(drawn) is drawn


def test_a_picture_that_two_boxes_share_is_missing_for_both(tmp_path):
    benchmark = read_benchmark("genecis", make_genecis(tmp_path, tasks=("focus_attribute",)))
    file = benchmark.files[0]
    (tmp_path / file).unlink()
    assert f"1 of {len(set(benchmark.files))} pictures cannot be used" in says(lambda: check_benchmark(benchmark))
    assert check_benchmark(benchmark, allow_missing=True).missing.pictures == tuple(name for name, own in zip(benchmark.pictures, benchmark.files) if own == file)


# --- queries of your own: what is well-formed

GALLERY = ["a.png", "b.png", "sub/c.png", "größe 日本.png"]
RECORD = {"id": 0, "reference_img_id": "a.png", "relative_caption": "in red", "target_img_id": "b.png", "gt_img_ids": ["b.png", "sub/c.png"], "kind": "colour"}
NAMELESS = {name: value for name, value in RECORD.items() if name != "id"}


@pytest.fixture
def folder(tmp_path):
    for name in GALLERY: picture(tmp_path / name)
    write(tmp_path / "gallery.json", GALLERY)
    write(tmp_path / "queries.json", [RECORD])
    return tmp_path


def dump(path: Path, what) -> Path:
    path.write_text(json.dumps(what))
    return path


def read(folder: Path, *records) -> Benchmark:
    return read_queries(dump(folder / "queries.json", list(records)), folder / "gallery.json")


def test_a_good_file(folder):
    queries = sound(read(folder, NAMELESS, RECORD | {"id": "größe 7", "reference_img_id": "größe 日本.png", "kind": "size"},
                         {name: value for name, value in RECORD.items() if name not in ("kind", "gt_img_ids", "id")}))
    assert queries.texts == (("in red",),) * 3 and queries.references.tolist() == [0, 3, 0] and queries.ids == ("0", "größe 7", "2")
    assert queries.answers == ((1, 2), (1, 2), (1,)) and queries.categories == ("colour", "size", "all") and queries.name == "queries" and queries.development
    assert queries.galleries[0].tolist() == [0, 1, 2, 3] and queries.pictures == queries.files == tuple(GALLERY) and queries.root == folder and queries.without_reference
    assert check_benchmark(queries) is queries and protocol_text(queries) == "reference=left-out"
    (folder / "b.png").unlink()
    assert "1 of 4 pictures cannot be used" in says(lambda: check_benchmark(queries))


def test_a_gallery_of_lines(folder):
    (folder / "gallery.txt").write_bytes("\ufeffa.png\r\n\r\n  b.png \r\ngröße 日本.png\r\n".encode())
    assert read_gallery(folder / "gallery.txt", folder) == ["a.png", "b.png", "größe 日本.png"]
    (folder / "gallery.JSON").write_text('["a.png"]')
    assert read_gallery(folder / "gallery.JSON", folder) == ["a.png"]


def test_names_that_are_numbers(tmp_path):
    gallery = write(tmp_path / "gallery.json", [10, 11])
    queries = read_queries(write(tmp_path / "queries.json", [{"reference_img_id": 12, "relative_caption": "more", "target_img_id": 11, "gt_img_ids": [11, "10"]}]), gallery)
    assert queries.pictures == ("10", "11", "12") and queries.answers == ((0, 1),)


def test_one_name_a_picture(folder):
    write(folder / "gallery.json", ["./a.png", "sub/../b.png", "sub//c.png"])
    queries = read(folder, RECORD | {"reference_img_id": str(folder / "a.png")})
    assert queries.pictures == ("a.png", "b.png", "sub/c.png") and queries.references.tolist() == [0]


def test_a_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for gallery, root in (("gallery.json", None), (f"../{folder.name}/gallery.json", None), ("gallery.json", "."), ("gallery.json", f"../{folder.name}")):
        queries = read_queries("queries.json", gallery, root)
        assert queries.pictures == tuple(GALLERY) and check_benchmark(queries) is queries


def test_a_root_elsewhere(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    write(lists / "gallery.json", GALLERY)
    queries = read_queries(folder / "queries.json", lists / "gallery.json", folder)
    assert queries.root == folder and queries.digest() == read(folder, RECORD).digest() and check_benchmark(queries) is queries


def test_a_file_from_an_editor_that_marks_its_encoding(folder):
    (folder / "queries.json").write_bytes(b"\xef\xbb\xbf" + (folder / "queries.json").read_bytes())
    assert len(read_queries(folder / "queries.json", folder / "gallery.json")) == 1


def test_links_that_stay(folder):
    (folder / "link.png").symlink_to("a.png")
    write(folder / "gallery.json", GALLERY + ["link.png"])
    assert len(read(folder, RECORD).galleries[0]) == 5


def test_a_reference_outside_the_gallery(folder):
    queries = sound(read(folder, NAMELESS, NAMELESS | {"reference_img_id": "other.png"}, NAMELESS | {"reference_img_id": "other.png"}))
    assert queries.pictures == (*GALLERY, "other.png") and queries.references.tolist() == [0, 4, 4] and len(queries.galleries[0]) == 4
    assert "other.png" in says(lambda: check_benchmark(queries))


def test_the_emoji_queries_have_the_same_shape(shared):
    emoji = shared / "data" / "emoji"
    benchmark = sound(read_queries(emoji / "queries.dev.json", emoji / "gallery.json"))
    assert len(benchmark) == 800 and len(benchmark.galleries[0]) == 1630 and set(benchmark.categories) == {"tone", "gender", "role"} and benchmark.development
    assert len(check_benchmark(benchmark)) == 800


def test_drawn_queries_keep_their_shape():
    drawn = world.make_queries(20, 200, rng_for(0, "drawn"))
    queries = sound(world_queries(drawn))
    assert len(queries) == 20 and len(queries.galleries[0]) == 200 and queries.texts == tuple((text,) for text in drawn.texts) and queries.categories == tuple(drawn.kinds)
    assert torch.equal(queries.references, torch.as_tensor(drawn.references)) and queries.answers == tuple(map(tuple, drawn.answers)) and queries.name == "world"


# --- queries of your own: what is spoiled

@pytest.mark.parametrize("change, said", [
    ({"reference_img_id": ...}, "has no field 'reference_img_id'; it has id, relative_caption"),
    ({"relative_caption": ...}, "has no field 'relative_caption'"),
    ({"gt_img_ids": ..., "target_img_id": ...}, "names no right answer in 'gt_img_ids' or 'target_img_id'"),
    ({"gt_img_ids": []}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": None}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": "b.png"}, ", field 'gt_img_ids' is 'b.png' where a list is wanted"),
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
    ({"id": 0}, "field 'id': '0' is the id of record 0 too"),
    ({"id": "0"}, "field 'id': '0' is the id of record 0 too"),
    ({"id": None}, "field 'id' is not an id: None"),
    ({"id": True}, "field 'id' is not an id: True"),
    ({"id": [1]}, "field 'id' is not an id: [1]"),
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
def test_a_spoiled_record_is_named(folder, change, said):
    record = {name: value for name, value in (RECORD | {"id": 1} | change).items() if value is not ...}
    found = says(lambda: read(folder, RECORD, record))
    assert found.startswith(f"{folder / 'queries.json'}: record 1") and said in found


@pytest.mark.parametrize("record", [None, 3, "a.png", ["a.png", "in red", "b.png"]])
def test_a_record_that_is_none(folder, record):
    assert "queries.json: record 1 is not an object with fields" in says(lambda: read(folder, RECORD, record))


@pytest.mark.parametrize("queries", [[], {}, {"0": RECORD}, None, 5, "queries"])
def test_no_list_of_queries(folder, queries):
    assert "queries.json: queries are a list with at least one record" in says(lambda: read_queries(write(folder / "queries.json", queries), folder / "gallery.json"))


@pytest.mark.parametrize("gallery, said", [
    ([], "a gallery is a list"), ({}, "a gallery is a list"), ({"a.png": 0}, "a gallery is a list"), (None, "a gallery is a list"), ("a.png", "a gallery is a list"),
    (["a.png", "b.png", "a.png"], "entry 2 lists 'a.png' for the second time; the first is entry 0"),
    (["a.png", "./a.png"], "entry 1 lists 'a.png' for the second time"), ([1, "1"], "entry 1 lists '1' for the second time"),
    (["a.png", None], "entry 1 is not the name of a picture: None"), ([False], "entry 0 is not the name"), ([["a.png"]], "entry 0 is not the name"),
    (["a.png", "../b.png"], "entry 1: ../b.png leads out of the folder"), (["/etc/passwd"], "entry 0: /etc/passwd leads out"), (["a.png", ""], "entry 1"),
    (["out.png"], "entry 0: out.png is a link out of the folder"), (["away/b.png"], "entry 0: away/b.png is a link out of the folder"),
])
def test_a_spoiled_gallery(folder, tmp_path_factory, gallery, said):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "out.png").symlink_to(picture(outside / "b.png"))
    (folder / "away").symlink_to(outside)
    write(folder / "gallery.json", gallery)
    assert says(lambda: read(folder, RECORD)).startswith(f"{folder / 'gallery.json'}: {said}")


def test_an_empty_gallery_of_lines(folder):
    (folder / "gallery.txt").write_text("\n\n")
    assert "gallery.txt: a gallery is a list" in says(lambda: read_gallery(folder / "gallery.txt", folder))
    (folder / "gallery.txt").write_bytes(b"a.png\n\xff\xfe.png\n")
    assert "gallery.txt: entry 1 is not UTF-8" in says(lambda: read_gallery(folder / "gallery.txt", folder))
    assert "gone.txt" in says(lambda: read_gallery(folder / "gone.txt", folder))
    assert "gone.json: no such file" in says(lambda: read_gallery(folder / "gone.json", folder))
    assert "no such file" in says(lambda: read_queries(folder / "gone.json", folder / "gallery.json"))


@pytest.mark.parametrize("name", ["queries.json", "gallery.json"])
def test_half_of_your_own_file(folder, name):
    whole = (folder / name).read_bytes()
    for end in range(len(whole)):
        (folder / name).write_bytes(whole[:end])
        assert name in says(lambda: read_queries(folder / "queries.json", folder / "gallery.json"))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(RECORD)), anything | st.sampled_from(GALLERY), anything)
def test_any_json_of_your_own_is_read_or_refused_by_name(tmp_path_factory, name, value, other):
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "gallery.json", GALLERY)
    for records in ([RECORD | {name: value}], [other], other):
        try: assert len(read_queries(dump(folder / "queries.json", records), folder / "gallery.json")) == 1
        except PliError as error: assert "queries.json" in str(error) and "\n" not in str(error)
    try: read_gallery(dump(folder / "gallery.json", other), folder)
    except PliError as error: assert "gallery.json" in str(error) and "\n" not in str(error)


def test_a_name_longer_than_a_file_can_have_is_told_with_its_entry(tmp_path):
    long, deep = "x" * 300, "/".join(["y" * 200] * 25)
    make_cirr(tmp_path / "cirr", pictures=False), make_fashioniq(tmp_path / "fiq", pictures=False)
    split = tmp_path / "cirr" / "image_splits" / "split.rc2.val.json"
    whole = json.loads(split.read_text())
    name = next(iter(whole))
    for path in (f"./{long}/a.png", f"./dev/{long}.png", f"./{deep}.png", f"./dev/{'ü' * 150}.png"):
        write(split, whole | {name: path})
        with pytest.raises(PliError, match=r"split\.rc2\.val\.json: picture 'dev-0.*bytes, and no file has more than") as told: read_benchmark("cirr", tmp_path / "cirr", "val")
        assert len(str(told.value).partition("split.rc2")[2]) < 250
    split = tmp_path / "fiq" / "image_splits" / "split.dress.val.json"
    write(split, [long, *json.loads(split.read_text())])
    with pytest.raises(PliError, match=r"split\.dress\.val\.json: entry 0: a name of 300 bytes") as told: read_benchmark("fashioniq", tmp_path / "fiq", "val")
    for wrong in (f"{long}.png", f"{long}/a.png", f"{deep}.png"):
        write(tmp_path / "gallery.json", ["a.png", wrong])
        with pytest.raises(PliError, match=r"gallery\.json: entry 1: a (name|path) of .* bytes") as told: read_gallery(tmp_path / "gallery.json", tmp_path)
        assert len(str(told.value).partition("gallery.json")[2]) < 300
    for name in ("cirr", "circo", "fashioniq", "genecis"):
        with pytest.raises(PliError, match="expected "): read_benchmark(name, tmp_path / long)

"Properties of the drawn world: determinism, exact answers, near misses, files a stranger can read."
import csv
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from pli.core import PliError, read_json, rng_for
from pli.world import ATTRIBUTES, BACKGROUNDS, COLOURS, COLUMN, COMPLETE, PHRASES, QUERY_KINDS
from pli.world import SPARSE, UNSAID, caption, cover, make_queries, render, sample, save_world

SIZES = torch.tensor([len(values) for values in ATTRIBUTES.values()])
CHANGES = {"colour": [{"colour"}], "shape": [{"shape"}], "both": [{"colour", "shape"}], "keep": [{"colour"}, {"shape"}]}


def every(*names):
    "All combinations of these attributes, the others 0."
    grid = torch.cartesian_prod(*(torch.arange(len(ATTRIBUTES[name])) for name in names)).reshape(-1, len(names))
    rows = torch.zeros(len(grid), len(ATTRIBUTES), dtype=torch.int64)
    rows[:, [COLUMN[name] for name in names]] = grid
    return rows


def value(row, name): return ATTRIBUTES[name][int(row[COLUMN[name]])]


def changed(a, b): return {name for name in ATTRIBUTES if a[COLUMN[name]] != b[COLUMN[name]]}


# sampling

@given(count=st.integers(0, 50), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_sample_is_inside_the_world_and_repeats(count, seed):
    rows = sample(count, rng_for(seed))
    assert rows.shape == (count, len(ATTRIBUTES)) and rows.dtype == torch.int64
    assert (rows >= 0).all() and (rows < SIZES).all()
    assert torch.equal(rows, sample(count, rng_for(seed)))


def test_sample_is_uniform():
    rows = sample(20_000, rng_for(0))
    for column, size in enumerate(SIZES.tolist()):
        share = rows[:, column].bincount(minlength=size) / len(rows)
        assert (share - 1 / size).abs().max() < 0.02


def test_sample_holds_out():
    held = every("shape", "colour", "background", "size", "place", "pattern")
    assert len(held) == SIZES.prod()
    left = held[::1000]
    kept_out = held[torch.arange(len(held)) % 1000 != 0]
    drawn = sample(50, rng_for(0), without=kept_out)
    assert len(drawn) == 50 and {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in left.tolist()}
    with pytest.raises(PliError, match="held out"): sample(1, rng_for(0), without=held)


# pictures

@pytest.mark.parametrize("size", [1, 7, 32, 48, 65])
def test_picture_depends_on_its_row_only(size):
    rows = sample(33, rng_for(size))
    together = render(rows, size)
    assert together.shape == (33, 3, size, size) and together.dtype == torch.uint8
    assert torch.equal(together, torch.cat([render(row[None], size) for row in rows]))
    assert torch.equal(together.flip(0), render(rows.flip(0), size))


def test_chunks_do_not_show():
    rows = sample(600, rng_for(3))  # more than one chunk at 48 pixels
    assert torch.equal(render(rows), torch.cat([render(part) for part in rows.split(100)]))


def test_no_pictures_is_fine():
    assert render(sample(0, rng_for(0))).shape == (0, 3, 48, 48) and caption(sample(0, rng_for(0)), SPARSE, rng_for(0)) == []


def test_a_known_picture_never_changes():
    rows = every("shape", "pattern")
    rows[:, COLUMN["size"]] = torch.arange(len(rows)) % 3
    digest = hashlib.sha256(render(rows, 32).numpy().tobytes()).hexdigest()
    assert digest == "35c29a7c54b1629367cf278bff8fefd76dbf2ea4923dd3bc037d0bcdf4da4d78", "drawing changed: every stored number made with the old pictures is void"


def test_every_look_is_its_own_and_the_border_takes_no_more_than_the_end_of_a_tip():
    rows = every("shape", "size", "place", "pattern")
    ink = cover(rows, 48)
    assert len(ink.reshape(len(ink), -1).unique(dim=0)) == len(rows)
    assert (ink.amax((1, 2)) > 0.7).all() and (ink.mean((1, 2)) > 0.015).all()
    plain = every("shape", "size", "place")
    central = plain.clone()
    central[:, COLUMN["place"]] = ATTRIBUTES["place"].index("centre")
    kept = cover(plain, 96).sum((1, 2)) / cover(central, 96).sum((1, 2))
    assert kept.min() > 0.995
    assert cover(central, 96)[:, [0, -1]].max() == 0 and cover(central, 96)[:, :, [0, -1]].max() == 0


@pytest.mark.parametrize("pattern", ATTRIBUTES["pattern"])
def test_a_pattern_is_a_tint_within_a_full_rim(pattern):
    rows = every("shape")
    rows[:, COLUMN["pattern"]] = ATTRIBUTES["pattern"].index(pattern)
    rows[:, COLUMN["size"]] = 2
    plain = cover(torch.cat([rows[:, :-1], torch.zeros_like(rows[:, -1:])], 1), 96)
    share = cover(rows, 96)[plain == 1]
    assert share.min() == (1 if pattern == "plain" else 0.5) and share.max() == 1
    ring = (plain == 1) & (torch.nn.functional.max_pool2d((plain < 1).float()[:, None], 7, 1, 3)[:, 0] > 0)  # three pixels: half the rim
    assert (cover(rows, 96)[ring] == 1).all()


def test_all_colours_and_grounds_are_seen():
    rows = every("colour", "background")
    pictures = render(rows)
    for row, picture in zip(rows, pictures):
        assert tuple(picture[:, 0, 0].tolist()) == BACKGROUNDS[value(row, "background")]
        assert (picture == torch.tensor(COLOURS[value(row, "colour")], dtype=torch.uint8)[:, None, None]).all(0).any()


@pytest.mark.parametrize("rows, message", [
    (torch.zeros(2, 5, dtype=torch.int64), r"expected \(count, 6\)"),
    (torch.tensor([[0] * 6, [0, 8, 0, 0, 0, 0]]), "row 1: colour is 8"),
    (torch.tensor([[0, 0, 0, 0, -1, 0]]), "row 0: place is -1"),
])
def test_rows_from_another_world_are_refused(rows, message):
    with pytest.raises(PliError, match=message): render(rows)
    with pytest.raises(PliError, match=message): caption(rows, SPARSE, rng_for(0))


def test_no_pixels_is_refused():
    with pytest.raises(PliError, match="size is 0"): render(sample(1, rng_for(0)), 0)


# captions

@given(said=st.dictionaries(st.sampled_from(list(ATTRIBUTES)), st.sampled_from([0.0, 0.5, 1.0])), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_captions_say_what_they_may_and_must(said, seed):
    rows = sample(5, rng_for(seed))
    for row, text in zip(rows, caption(rows, said, rng_for(seed))):
        assert "  " not in text and text == text.strip()
        rest = f" {text} "
        if value(row, "place") in rest and said.get("place", 0) == 0: pytest.fail(text)
        for name in ATTRIBUTES:
            there = f" {value(row, name)} " in rest
            if said.get(name, 0) == 0: assert not there
            if said.get(name, 0) == 1: assert there
        if not any(said.values()): assert text == "a picture"


def test_complete_captions_tell_all_pictures_apart():
    rows = sample(3000, rng_for(0)).unique(dim=0)
    assert len(set(caption(rows, COMPLETE, rng_for(0)))) == len(rows)
    assert len(set(caption(rows, SPARSE, rng_for(0)))) == 192   # 64 things to say, each in three ways


def test_every_way_of_saying_it_is_as_likely():
    texts = caption(sample(3000, rng_for(0)), SPARSE, rng_for(1))
    drawn, after = sum(text.startswith("drawn as ") for text in texts), sum(" in " in text for text in texts)
    assert all(abs(count / 3000 - 1 / 3) < 0.03 for count in (drawn, after))


def test_captions_and_edits_fit_a_context_of_sixteen():
    tokenizer = pytest.importorskip("open_clip").SimpleTokenizer()
    rows = sample(4000, rng_for(0))
    for row, text in zip(rows, caption(rows, COMPLETE, rng_for(0))):
        most = 16 if value(row, "colour") == "cyan" and text.startswith("drawn as ") else 15   # "cyan" is two tokens, all other words are one
        assert len(tokenizer.encode(text)) + 2 <= most, text
    assert all(len(tokenizer.encode(text)) < 14 for text in make_queries(200, 1000, rng_for(0)).texts)


def test_edits_use_only_words_of_captions():
    known = {word for text in caption(sample(2000, rng_for(0)), SPARSE, rng_for(0)) for word in text.split()}
    assert {word for text in make_queries(400, 2000, rng_for(1)).texts for word in text.split()} <= known


def test_how_often_something_is_said():
    texts = caption(sample(4000, rng_for(0)), {"background": 0.3}, rng_for(1))
    assert abs(sum(text != "a picture" for text in texts) / 4000 - 0.3) < 0.03


def test_articles():
    rows = every("shape", "colour")
    for text in caption(rows, {"shape": 1.0}, rng_for(0)) + caption(rows, SPARSE, rng_for(0)):
        first, second = text.removeprefix("drawn as ").split()[:2]
        assert first == ("an" if second[0] in "aeiou" else "a")


@pytest.mark.parametrize("said", [{"weather": 1.0}, {"shape": 1.5}, {"shape": -0.1}, {"shape": float("nan")}])
def test_captions_refuse_nonsense(said):
    with pytest.raises(PliError, match="said"): caption(sample(1, rng_for(0)), said, rng_for(0))


# queries

@given(count=st.integers(1, 60), seed=st.integers(0, 1000), kinds=st.lists(st.sampled_from(list(QUERY_KINDS)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_every_query_has_all_its_answers_and_only_those(count, seed, kinds):
    queries = make_queries(count, 400, rng_for(seed), tuple(kinds))
    gallery = queries.attributes
    assert len(queries) == len(queries.texts) == len(queries.references) == len(queries.answers) == len(queries.kinds) == count
    assert gallery.shape == (400, len(ATTRIBUTES)) and queries.references.dtype == torch.int64
    for query in range(count):
        kind, reference = queries.kinds[query], int(queries.references[query])
        assert kind == kinds[query % len(kinds)]
        answers = queries.answers[query]
        target = gallery[answers[0]]
        assert answers == tuple((gallery == target).all(1).nonzero()[:, 0].tolist()) and reference not in answers
        assert (gallery == gallery[reference]).all(1).sum() == 1
        what = changed(gallery[reference], target)
        assert what in CHANGES[kind]
        for name in what: assert value(target, name) in queries.texts[query].split()
        if kind == "keep":
            found = {frozenset(changed(row, target)) for row in gallery}
            assert all(frozenset([name]) in found for name in UNSAID)


def test_queries_repeat_with_the_seed():
    one, two, other = (make_queries(40, 200, rng_for(seed)) for seed in (1, 1, 2))
    assert one.texts == two.texts and one.answers == two.answers and torch.equal(one.attributes, two.attributes)
    assert torch.equal(one.references, two.references) and not torch.equal(one.attributes, other.attributes)


def test_some_queries_have_several_answers():
    queries = make_queries(300, 20_000, rng_for(0))
    assert max(map(len, queries.answers)) > 1


def test_place_in_the_gallery_tells_nothing():
    queries = make_queries(400, 4000, rng_for(0))
    places = torch.tensor([answers[0] for answers in queries.answers]).float() / 4000
    assert abs(places.mean() - 0.5) < 0.06 and places.min() < 0.05 and places.max() > 0.95


def test_gallery_size_limits():
    with pytest.raises(PliError, match=r"gallery_size is 11, but these queries need \d+ pictures") as caught: make_queries(4, 11, rng_for(0))
    needed = int(str(caught.value).split("need ")[1].split()[0])
    assert len(make_queries(4, needed, rng_for(0)).attributes) == needed == 12
    with pytest.raises(PliError): make_queries(4, needed - 1, rng_for(0))


@pytest.mark.parametrize("arguments, message", [((0, 10), "count is 0"), ((4, 50, ("taste",)), "taste"), ((4, 50, ()), "choose from")])
def test_queries_refuse_nonsense(arguments, message):
    count, size, *kinds = arguments
    with pytest.raises(PliError, match=message): make_queries(count, size, rng_for(0), *kinds)


def test_phrases_can_be_replaced():
    plain = {("colour",): ("{new}",), ("shape",): ("{new}",), ("colour", "shape"): ("{new}",)}
    queries = make_queries(40, 200, rng_for(0), phrases=plain)
    assert queries.texts[0] in ATTRIBUTES["colour"] and set(PHRASES) == set(plain)


# files

WORLD = dict(pairs=30, queries=12, gallery_size=60, said={"shape": 1.0, "place": 0.5}, size=16, seed=4)


def contents(folder): return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saved_world_is_complete(tmp_path):
    folder = save_world(tmp_path / "deep" / "world", **WORLD)
    gallery, queries = read_json(folder / "gallery.json"), read_json(folder / "queries.json")
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as file: pairs = list(csv.DictReader(file))
    assert len(gallery) == len(set(gallery)) == 60 and len(pairs) == 30 and len(queries) == 12
    assert set(pairs[0]) == {"filepath", "title"} and all(pair["title"] for pair in pairs)
    paths = gallery + [pair["filepath"] for pair in pairs]
    assert {path.name for path in (folder / "images").iterdir()} == {path.split("/")[1] for path in paths}
    for path in paths:
        with Image.open(folder / path) as picture: assert picture.size == (16, 16) and picture.mode == "RGB" and picture.format == "PNG"
    for number, query in enumerate(queries):
        assert set(query) == {"id", "reference_img_id", "relative_caption", "target_img_id", "gt_img_ids", "kind"} and query["id"] == number
        assert query["target_img_id"] == query["gt_img_ids"][0] and query["reference_img_id"] not in query["gt_img_ids"]
        assert {query["reference_img_id"], *query["gt_img_ids"]} <= set(gallery)


def test_saved_pictures_are_the_queries(tmp_path):
    save_world(tmp_path, **WORLD)
    drawn = make_queries(12, 60, rng_for(4, "world", "queries"))
    expected = render(drawn.attributes, 16)
    for path, picture in zip(read_json(tmp_path / "gallery.json"), expected):
        assert np.array_equal(np.asarray(Image.open(tmp_path / path)), picture.permute(1, 2, 0).numpy())
    assert [query["relative_caption"] for query in read_json(tmp_path / "queries.json")] == drawn.texts


def test_pairs_are_never_in_the_gallery(tmp_path):
    save_world(tmp_path, pairs=600, queries=50, gallery_size=1000)
    pairs, gallery = ({path.read_bytes() for path in (tmp_path / "images").glob(f"{name}_*.png")} for name in ("pair", "gallery"))
    assert pairs and gallery and not pairs & gallery
    held = {tuple(row) for row in make_queries(50, 1000, rng_for(0, "world", "queries")).attributes.tolist()}
    assert any(tuple(row) in held for row in sample(600, rng_for(0, "world", "pairs")).tolist())  # unless held out, some would be


def test_the_same_settings_give_the_same_files(tmp_path):
    one, two = save_world(tmp_path / "one", **WORLD), save_world(tmp_path / "two", **WORLD)
    assert contents(one) == contents(two)
    assert contents(save_world(one, **WORLD)) == contents(two)       # again into the same folder
    assert contents(save_world(tmp_path / "three", **{**WORLD, "seed": 5})) != contents(two)


def test_other_things_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PliError, match="holds something else"): save_world(tmp_path, **WORLD)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(PliError, match="is a file"): save_world(tmp_path / "thesis.txt", **WORLD)


def test_an_interrupted_world_is_finished_by_a_second_call(tmp_path, monkeypatch):
    import pli.world
    real = pli.world.save_pictures
    def cut(folder, names, attributes, size):
        real(folder, names[:10], attributes[:10], size)
        raise KeyboardInterrupt
    monkeypatch.setattr(pli.world, "save_pictures", cut)
    with pytest.raises(KeyboardInterrupt): save_world(tmp_path / "cut", **WORLD)
    assert not (tmp_path / "cut" / "queries.json").exists()
    monkeypatch.setattr(pli.world, "save_pictures", real)
    assert contents(save_world(tmp_path / "cut", **WORLD)) == contents(save_world(tmp_path / "whole", **WORLD))


def test_bad_settings_leave_no_folder(tmp_path):
    for bad in ({"gallery_size": 3}, {"said": {"weather": 1.0}}, {"kinds": ("taste",)}, {"size": 0}, {"pairs": 0}):
        with pytest.raises(PliError): save_world(tmp_path / "bad", **{**WORLD, **bad})
        assert not (tmp_path / "bad").exists()

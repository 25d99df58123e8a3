"`pli gallery` and `pli model` as a person types them."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pli.cli.main import main
from pli.core import PliError
from pli.gallery.manage import facts, forget, galleries_of, known_galleries
from pli.gallery.search import Gallery
from pli.gallery.places import cached_home, notes_folder
from pli.gallery.store import PictureTable


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("PLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture()
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4): Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def index(folder: Path, place: Path | None = None) -> int:
    with Gallery.open(folder, "pli-tiny-48", gallery=place) as gallery: return gallery.update().encoded


def pli(capfd, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capfd.readouterr()


def test_galleries_are_listed_and_shown(photos, tmp_path, capfd):
    assert pli(capfd, "gallery", "list")[1] == "no gallery is known; pli index FOLDER makes one\n"
    index(photos)
    record, = json.loads(pli(capfd, "gallery", "list", "--json")[1])
    assert (record["folder"], record["pictures"], record["broken"], record["duplicates"], record["model"]) == (str(photos), 5, 1, 1, "pli-tiny-48")
    assert record["bytes"] == sum(path.stat().st_size for path in (photos / ".pli").rglob("*") if path.is_file()) and record["updated"][:10] == record["made"]
    assert str(photos) in pli(capfd, "gallery", "list")[1]
    status, out, _ = pli(capfd, "gallery", "show", photos)
    assert status == 0 and "5 pictures, 1 that cannot be read, 1 exact duplicate\n" in out and "pli-tiny-48" in out
    status, _, err = pli(capfd, "gallery", "show", tmp_path)
    assert status == 1 and "no gallery is known there" in err and err.count("\n") == 1


def test_a_damaged_gallery_does_not_hide_the_others(photos, tmp_path, capfd):
    index(photos)
    shutil.copytree(photos, tmp_path / "other")
    index(tmp_path / "other")
    next((photos / ".pli").glob("*/gallery.sqlite")).write_bytes(b"nonsense" * 1000)
    records = json.loads(pli(capfd, "gallery", "list", "--json")[1])
    assert ["error" in record for record in records] == [False, True] and "cannot be read" in pli(capfd, "gallery", "list")[1]
    assert pli(capfd, "gallery", "forget", photos, "--yes")[0] == 0 and not (photos / ".pli").exists()


def test_the_notes_heal(photos, tmp_path):
    index(photos)
    (notes_folder() / "0123456789abcdef.json").write_text("{")
    (notes_folder() / "0123456789abcdee.json").write_text('{"folder": 5}')
    assert len(known_galleries()) == 1 and len(list(notes_folder().iterdir())) == 1
    moved = photos.rename(tmp_path / "moved")
    assert [known.there for known in known_galleries()] == [False]              # a drive may be away
    index(moved)
    assert [(known.folder, known.there) for known in known_galleries()] == [(str(moved), True)]
    shutil.rmtree(moved / ".pli")
    assert known_galleries() == []                                              # the folder is there, the gallery is not
    shutil.rmtree(notes_folder())
    index(moved)
    assert len(known_galleries()) == 1


def test_a_copied_folder_is_a_gallery_of_its_own(photos, tmp_path):
    index(photos)
    shutil.copytree(photos, tmp_path / "twin")
    assert index(tmp_path / "twin") == 0
    assert [known.folder for known in known_galleries()] == [str(photos), str(tmp_path / "twin")]


def test_a_cache_that_cannot_be_written_to_costs_the_list_only(photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLI_CACHE", str(tmp_path / "file" / "cache"))
    assert index(photos) == 5 and known_galleries() == []


def test_a_gallery_moves_whole_and_back(photos, tmp_path, capfd):
    index(photos)
    with PictureTable(galleries_of(photos)[0]) as table: before = list(table.connection.execute("SELECT * FROM picture"))
    status, out, _ = pli(capfd, "gallery", "move", photos, tmp_path / "place")
    assert status == 0 and f"--gallery {tmp_path / 'place'}" in out and not (photos / ".pli").exists()
    assert index(photos, tmp_path / "place") == 0
    assert pli(capfd, "gallery", "move", photos, photos / ".pli", "--gallery", tmp_path / "place")[0] == 0
    assert index(photos) == 0 and not (tmp_path / "place").exists() and [known.home for known in known_galleries()] == [photos / ".pli"]
    with PictureTable(galleries_of(photos)[0]) as table: assert list(table.connection.execute("SELECT * FROM picture")) == before


def test_a_move_that_cannot_be_leaves_everything(photos, tmp_path, capfd):
    index(photos)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for new, words in ((tmp_path / "full", "is there already"), (tmp_path / "file", "is there already"), (tmp_path / "file" / "below", "cannot be moved there")):
        status, _, err = pli(capfd, "gallery", "move", photos, new)
        assert status == 1 and words in err and err.count("\n") == 1
        assert index(photos) == 0 and not list(tmp_path.glob(".*.part"))


def test_a_gallery_in_the_cache_follows_its_pictures(photos, tmp_path, capfd):
    index(photos, cached_home(photos))                                          # as where the folder cannot be written to
    moved = photos.rename(tmp_path / "moved")
    status, out, _ = pli(capfd, "gallery", "move", photos, moved)
    assert status == 0 and "follows its pictures" in out
    assert index(moved) == 0 and not cached_home(photos).exists()
    status, _, err = pli(capfd, "gallery", "move", photos, tmp_path / "nowhere")
    assert status == 1 and "no gallery is known there" in err


def test_two_folders_cannot_share_a_gallery(photos, tmp_path):
    index(photos, tmp_path / "place")
    other = shutil.copytree(photos, tmp_path / "other")
    with pytest.raises(PliError, match="is the gallery of .*photos; name another --gallery"): index(other, tmp_path / "place")
    assert facts(galleries_of(photos, tmp_path / "place")[0], photos)["pictures"] == 5


def test_forgetting_deletes_what_pli_made_and_nothing_else(photos, capfd):
    index(photos)
    key = galleries_of(photos)[0].parent
    (key / "mine.txt").write_text("keep"), (photos / ".pli" / "also mine.txt").write_text("keep")
    os.symlink(photos / "0.png", key / "features-99.npy")
    status, out, err = pli(capfd, "gallery", "forget", photos)
    assert status == 1 and "--yes" in err and (key / "gallery.sqlite").exists()
    status, out, _ = pli(capfd, "gallery", "forget", photos, "--yes")
    assert status == 0 and "1 file that pli has not made was left" in out
    assert sorted(path.name for path in (photos / ".pli").rglob("*")) == sorted(["also mine.txt", "mine.txt", key.name]) and len(list(photos.iterdir())) == 7
    assert known_galleries() == []


def test_a_gallery_that_is_a_link_is_not_followed(photos, tmp_path):
    index(photos)
    key = galleries_of(photos)[0].parent
    outside = shutil.move(key, tmp_path / "outside")
    key.symlink_to(outside)
    with pytest.raises(PliError, match="nothing is deleted"): forget(key / "gallery.sqlite")
    assert (tmp_path / "outside" / "gallery.sqlite").exists()


def test_exact_duplicates(photos, capfd):
    shutil.copy(photos / "1.png", photos / "\x1b[31m.png"), shutil.copy(photos / "1.png", photos / "a.png")
    shutil.copy(photos / "broken.jpg", photos / "broken too.jpg")
    index(photos)
    status, out, err = pli(capfd, "gallery", "duplicates", photos)
    assert status == 0 and out == "\\x1b[31m.png\n1.png\na.png\n\n0.png\ncopy.png\n" and "2 pictures are there more than once, 3 files too many" in err
    assert [[one["path"] for one in group] for group in json.loads(pli(capfd, "gallery", "duplicates", photos, "--json")[1])] == [["\x1b[31m.png", "1.png", "a.png"], ["0.png", "copy.png"]]


def test_a_model_is_fetched_into_a_folder(tmp_path, photos, capfd):
    status, out, _ = pli(capfd, "model", "fetch", "pli-tiny-48", tmp_path / "model")
    assert status == 0 and "--model" in out
    index(photos)
    with Gallery.open(photos, tmp_path / "model") as gallery: assert gallery.update().encoded == 0      # the same features
    status, _, err = pli(capfd, "model", "fetch", "pli-tiny-48", tmp_path / "model")
    assert status == 1 and "is there already" in err
    status, _, err = pli(capfd, "model", "fetch", "ViT-L-14", tmp_path / "other")
    assert status == 1 and "--pretrained" in err and "laion2b_s32b_b82k" in err and not (tmp_path / "other").exists()


def test_the_default_model_is_named_with_size_and_licence(capfd):
    lines = pli(capfd, "model", "list", "vit-b-32 laion2b")[1].splitlines()
    assert lines[0] == "default: ViT-B-32 laion2b_s34b_b79k (605 MB, MIT licence)" and "ViT-B-32 laion2b_s34b_b79k" in lines[1:]


def test_a_named_model_without_weights_is_refused(photos, capfd):
    status, _, err = pli(capfd, "search", photos, "a cat", "--model", "ViT-L-14")
    assert status == 1 and "say which weights" in err and err.count("\n") == 1 and not (photos / ".pli").exists()


def test_without_a_network_the_error_says_what_to_download(photos, capfd, monkeypatch, tmp_path):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    status, _, err = pli(capfd, "search", photos, "a cat")
    assert status == 1 and "laion/CLIP-ViT-B-32-laion2B-s34B-b79K" in err and "pli model fetch" in err and err.count("\n") == 1


def test_a_gallery_that_was_moved_away_is_found(photos, tmp_path, capfd, monkeypatch):
    index(photos)
    place = tmp_path / "place" / ".pli"                                         # a name like that of one beside its pictures
    assert pli(capfd, "gallery", "move", photos, place)[0] == 0
    for words in (("search", photos, "a star"), ("index", photos), ("search", photos, "a star", "--model", "pli-tiny-48")):
        status, out, err = pli(capfd, *words)
        assert status == 0 and f"{photos}: its gallery is at {place}\n" in err and err.count(str(place)) == 1 and not (photos / ".pli").exists(), err
    with Gallery.open(photos) as gallery: assert gallery.update().encoded == 0 and gallery.table.path.is_relative_to(place)
    with Gallery.open(photos, "pli-tiny-64") as gallery: assert gallery.table.path.is_relative_to(place) and gallery.table.about()["root"] == str(photos)
    assert f"its gallery is at {place}" not in pli(capfd, "index", photos, "--model", "pli-tiny-48", "--gallery", place)[2]
    with monkeypatch.context() as other:                                        # another user has not moved it
        other.setenv("PLI_CACHE", str(tmp_path / "other cache"))
        with Gallery.open(photos, "pli-tiny-48") as gallery: assert gallery.table.path.is_relative_to(photos)
        assert pli(capfd, "gallery", "forget", photos, "--yes")[0] == 0
    with Gallery.open(photos, "pli-tiny-48") as gallery: assert gallery.table.path.is_relative_to(place)


def test_a_named_model_is_found_where_its_gallery_was_moved(photos, tmp_path, capfd):
    index(photos)
    pli(capfd, "gallery", "move", photos, tmp_path / "place")
    with Gallery.open(photos, "pli-tiny-64", gallery=photos / ".pli") as gallery: gallery.update()      # another model's, beside the pictures
    with Gallery.open(photos) as gallery: assert gallery.table.about()["model"] == "pli-tiny-64"
    with Gallery.open(photos, "pli-tiny-48") as gallery: assert gallery.table.path.is_relative_to(tmp_path / "place") and gallery.update().encoded == 0


def test_several_places_and_galleries_of_other_folders(photos, tmp_path, capfd):
    for place in ("one", "two"): index(photos, tmp_path / place)
    for words in ((), ("--model", "pli-tiny-48"), ("--model", "pli-tiny-64")):
        status, _, err = pli(capfd, "search", photos, "a star", *words)
        assert status == 1 and str(tmp_path / "one") in err and str(tmp_path / "two") in err and "--gallery" in err and err.count("\n") == 1
    with PictureTable(next((tmp_path / "one").glob("*/gallery.sqlite"))) as table: table.say(root=str(tmp_path / "elsewhere"))
    with Gallery.open(photos) as gallery: assert gallery.table.path.is_relative_to(tmp_path / "two")    # the other says that it is not this folder's
    with PictureTable(next((tmp_path / "two").glob("*/gallery.sqlite"))) as table: table.say(id="another")
    with Gallery.open(photos, "pli-tiny-48") as gallery: assert gallery.table.path.is_relative_to(photos)


def marks_at(home: Path, words: str = "in red") -> None:
    "What the page saves."
    (home / "queries.json").write_text(json.dumps([{"reference_img_id": "0.png", "relative_caption": words, "gt_img_ids": ["1.png"], "wrong_img_ids": []}]))
    (home / "queries.gallery.json").write_text('["0.png", "1.png"]')


def test_a_gallery_moves_back_beside_saved_marks_and_other_models(photos, tmp_path, capfd):
    index(photos)
    place, beside = tmp_path / "place", photos / ".pli"
    assert pli(capfd, "gallery", "move", photos, place)[0] == 0
    with Gallery.open(photos, "pli-tiny-64", gallery=beside) as gallery: gallery.update()
    marks_at(beside)
    before = {path: path.read_bytes() for path in beside.rglob("*.json")}
    assert pli(capfd, "gallery", "move", photos, beside, "--gallery", place)[0] == 0
    assert index(photos) == 0 and not place.exists() and len(galleries_of(photos)) == 2 and before == {path: path.read_bytes() for path in beside.rglob("*.json")}
    assert pli(capfd, "gallery", "move", photos, place)[0] == 0                  # the marks go along, and home again
    assert not beside.exists() and sorted(path.name for path in place.glob("*.json")) == ["queries.gallery.json", "queries.json"]
    assert pli(capfd, "gallery", "move", photos, beside)[0] == 0 and not place.exists() and before == {path: path.read_bytes() for path in beside.rglob("*.json")}


def test_a_move_overwrites_nothing(photos, tmp_path, capfd):
    index(photos, place := tmp_path / "place")
    marks_at(place, "in red")
    (beside := photos / ".pli").mkdir()
    (beside / "mine.txt").touch()
    status, _, err = pli(capfd, "gallery", "move", photos, beside, "--gallery", place)
    assert status == 1 and "is there already" in err
    (beside / "mine.txt").unlink()
    index(photos, beside)
    status, _, err = pli(capfd, "gallery", "move", photos, beside, "--gallery", place)
    assert status == 1 and "of the same model already" in err and err.count("\n") == 1
    assert pli(capfd, "gallery", "forget", photos, "--yes", "--gallery", beside)[0] == 0
    beside.mkdir(exist_ok=True)
    marks_at(beside, "in blue")
    status, _, err = pli(capfd, "gallery", "move", photos, beside, "--gallery", place)
    assert status == 0 and f"--marks {place / 'queries.json'}" in err and "in red" in (place / "queries.json").read_text() and "in blue" in (beside / "queries.json").read_text()
    other = shutil.copytree(photos, tmp_path / "other", ignore=shutil.ignore_patterns(".pli"))
    with Gallery.open(other, "pli-tiny-64", gallery=tmp_path / "others") as gallery: gallery.update()
    status, _, err = pli(capfd, "gallery", "move", photos, tmp_path / "others", "--gallery", beside)
    assert status == 1 and "is the gallery of" in err and index(photos) == 0   # two folders cannot share a place


@pytest.mark.parametrize("marked", [False, True])
def test_a_move_that_fails_or_is_killed_half_way_keeps_the_old_gallery(photos, tmp_path, monkeypatch, marked):
    import pli.gallery.manage as manage
    index(photos)
    with Gallery.open(photos, "pli-tiny-64") as gallery: gallery.update()
    if marked: marks_at(photos / ".pli")
    (place := tmp_path / "place").mkdir()
    if not marked: marks_at(place)
    else:
        with Gallery.open(photos, "pli-tiny-48", preprocess="target-pad", gallery=place) as gallery: gallery.update()
    tree = lambda: {path: path.is_dir() or path.read_bytes() for folder in (photos, place) for path in folder.rglob("*")}
    before, rename = tree(), os.rename

    def fails(old, new):
        if Path(new).parent == place and len(list(place.iterdir())) == len([path for path in before if path.parent == place]) + 1: raise OSError(28, "No space left on device")
        rename(old, new)
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", fails)
        with pytest.raises(PliError, match="it is where it was"): manage.move(photos, place, photos / ".pli")
    assert tree() == before and not list(tmp_path.glob(".*.part"))
    if pid := os.fork(): assert os.waitpid(pid, 0)[1] != 0
    else:
        manage.forget = lambda path: os._exit(9)
        manage.move(photos, place, photos / ".pli")
        os._exit(0)
    assert {path for path in before if path.suffix != ".json"} <= set(tree()) and index(photos, photos / ".pli") == 0 and index(photos, place) == 0
    assert {home for home in manage.known_galleries()} and manage.galleries_of(photos, place)
    (half := tmp_path / f".{place.name}.{2**22 + 1}.part").mkdir()                  # what a kill in the middle of copying leaves
    assert manage.move(photos, place) == place and not half.exists()               # the same words again finish it
    assert not list((photos / ".pli").glob("*/gallery.sqlite")) and index(photos) == 0


def test_a_gallery_elsewhere_stays_there_when_its_pictures_are_moved(photos, tmp_path, capfd):
    index(photos)
    pli(capfd, "gallery", "move", photos, place := tmp_path / "place")
    moved = photos.rename(tmp_path / "moved")
    status, out, _ = pli(capfd, "gallery", "move", photos, moved)
    assert status == 0 and "follows its pictures" in out and not (moved / ".pli").exists()
    with Gallery.open(moved) as gallery: assert gallery.update().encoded == 0 and gallery.table.path.is_relative_to(place)

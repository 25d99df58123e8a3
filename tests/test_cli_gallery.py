"`pli index` and `pli search` as a person types them: what is printed where, what is refused before any work, and a gallery that outlives tuning."
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pli.cli.main import main
from pli.gallery.search import Gallery
from pli.gallery.ranking import Where
from pli.world import save_world


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    save_world(folder, pairs=40, queries=6, gallery_size=30)
    return folder


@pytest.fixture()
def pictures(drawn, tmp_path) -> Path:
    shutil.copytree(drawn / "images", tmp_path / "pictures")
    return tmp_path / "pictures"


def pli(capfd, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capfd.readouterr()


def test_one_command_indexes_and_searches(pictures, capfd, tmp_path):
    status, out, err = pli(capfd, "search", pictures, "--image", pictures / "pair_000001.png", "in", "red", "--model", "pli-tiny-48", "--k", 5, "--figure", tmp_path / "hits.png")
    assert status == 0 and len(out.splitlines()) == 5 and "70 pictures: 70 added" in err and Image.open(tmp_path / "hits.png").width > 300
    status, again, err = pli(capfd, "search", pictures, "in red", "--image", pictures / "pair_000001.png", "--k", 5)      # the model is remembered
    assert (status, again) == (0, out) and "nothing new" in err


def test_what_programs_read(pictures, capfd):
    base = ("search", pictures, "a red star", "--model", "pli-tiny-48", "--k", 3)
    records = json.loads(pli(capfd, *base, "--json")[1])
    assert [record["rank"] for record in records] == [1, 2, 3] and all(Path(record["file"]).is_file() for record in records)
    lines = pli(capfd, *base, "--csv", "--no-index")[1].splitlines()
    assert lines[0].startswith("rank,score,path") and [line.split(",")[2] for line in lines[1:]] == [record["path"] for record in records]


def test_names_are_made_safe_on_a_terminal(pictures, capfd):
    (pictures / "pair_000000.png").rename(pictures / "\x1b[31mred\x1b[0m\n.png")
    for way in ((), ("--json",)):
        out, err = pli(capfd, "search", pictures, "a star", "--model", "pli-tiny-48", "--k", 99, *way)[1:]
        assert "\x1b" not in out + err and "red" in out


def test_many_searches_from_a_file(pictures, capfd, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"id": 7, "image": "pictures/pair_000001.png", "text": "in red", "k": 2}\n\n{"text": "a blue star", "without": ["dots"]}\n')
    status, out, _ = pli(capfd, "search", pictures, "--queries", tmp_path / "asked.jsonl", "--model", "pli-tiny-48", "--k", 4)
    first, second = map(json.loads, out.splitlines())
    assert status == 0 and first["id"] == 7 and len(first["hits"]) == 2 and len(second["hits"]) == 4 and second["query"]["without"] == ["dots"]


@pytest.mark.parametrize("line, words", [("[]", "an object"), ("{", "JSON object"), ('{"words": "x", "text": "y"}', "unknown field"), ('{"text": 5}', "text is not"), ('{"image": "no.png"}', "no such file"),
                                         ('{"text": "x", "k": 0}', "k must be"), ('{"text": "x", "weight": 1}', "need a picture and words")])
def test_a_wrong_line_is_named_before_any_work(pictures, capfd, tmp_path, line, words):
    (tmp_path / "asked.jsonl").write_text('{"text": "a star"}\n' + line + "\n")
    status, out, err = pli(capfd, "search", pictures, "--queries", tmp_path / "asked.jsonl", "--model", "pli-tiny-48")
    assert (status, out) == (1, "") and "line 2" in err and words in err and err.count("\n") == 1 and not (pictures / ".pli").exists()


@pytest.mark.parametrize("options, words", [([], "needs words"), (["--without", "red"], "alone finds nothing"), (["a", "--k", "0"], "--k"), (["a", "--json", "--csv"], "exclude"), (["--image", "no.png"], "no such file"),
                                            (["a", "--figure", "x.gif"], ".png"), (["a", "--since", "soon"], "no date"), (["a", "--weight", "2"], "need a picture and words"), (["a", "--explain", "30"], "--explain 30"), (["a", "--explain", "1", "--copy-to", "x"], "leave out"),
                                            (["--queries", "x.jsonl", "--weight", "2"], "in each line"), (["--queries", "x.jsonl", "--by-date"], "in each line")])
def test_options_that_cannot_be_are_told_before_any_work(pictures, capfd, options, words):
    status, out, err = pli(capfd, "search", pictures, *options, "--model", "pli-tiny-48")
    assert (status, out) == (1, "") and words in err and err.count("\n") == 1 and not (pictures / ".pli").exists()


def test_why_a_hit_is_a_hit(pictures, capfd, tmp_path):
    base = ("search", pictures, "the same in red", "--image", pictures / "pair_000001.png", "--model", "pli-tiny-48")
    status, out, _ = pli(capfd, *base, "--explain", 3, "--figure", tmp_path / "why.png")
    assert status == 0 and out.startswith("3. ") and "picture" in out and "where the word is left out" in out and "trust" in out and Image.open(tmp_path / "why.png").width > 500
    record = json.loads(pli(capfd, *base, "--explain", 3, "--json")[1])
    assert record["rank"] == 3 and abs(sum(record["summands"].values()) - record["score"]) < 1e-4 and [word for word, _ in record["words"]] == ["the", "same", "in", "red"]
    status, out, _ = pli(capfd, *base, "--without", "a star", "--explain", 1)
    assert status == 0 and "left by what was to be avoided" in out


def test_hits_are_copied_and_nothing_is_overwritten(pictures, capfd, tmp_path):
    base = ("search", pictures, "a star", "--model", "pli-tiny-48", "--k", 12, "--copy-to", tmp_path / "found")
    assert pli(capfd, *base)[0] == 0 and len(list((tmp_path / "found").iterdir())) == 12
    status, _, err = pli(capfd, *base)
    assert status == 1 and "is not empty" in err


def test_hits_are_linked(pictures, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ("search", "pictures", "a star", "--model", "pli-tiny-48", "--k", 3, "--link-to", "found")
    assert "3 pictures linked in found" in pli(capfd, *base)[2]
    links = sorted((tmp_path / "found").iterdir())
    assert len(links) == 3 and all(link.is_symlink() and link.resolve().parent == pictures and Image.open(link).size for link in links)
    status, _, err = pli(capfd, *base)
    assert status == 1 and "is not empty" in err


@pytest.mark.skipif(sys.platform != "linux", reason="the viewer is started by xdg-open on Linux")
def test_hits_are_opened_in_the_systems_viewer(pictures, capfd, tmp_path, monkeypatch):
    (pictures / "pair_000000.png").rename(pictures / "--help; touch x; $(touch y).png")
    base = ("search", pictures, "a star", "--model", "pli-tiny-48", "--k", 70, "--open")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    status, _, err = pli(capfd, *base)
    assert status == 1 and "no xdg-open" in err and not (pictures / ".pli").exists()         # before any work
    viewer = tmp_path / "bin" / "xdg-open"
    viewer.parent.mkdir()
    viewer.write_text(f'#!/bin/sh\necho "$# $1" > {tmp_path}/opened.tmp\n/bin/mv {tmp_path}/opened.tmp {tmp_path}/opened\n')
    viewer.chmod(0o755)
    monkeypatch.setenv("PATH", str(viewer.parent))
    assert pli(capfd, *base)[0] == 0
    deadline = time.monotonic() + 30
    while not (tmp_path / "opened").exists() and time.monotonic() < deadline: time.sleep(0.1)
    count, _, sheet = (tmp_path / "opened").read_text().strip().partition(" ")
    assert count == "1" and Path(sheet).name == "last-hits.png" and Image.open(sheet).width > 300


def test_problems_are_listed(pictures, capfd, tmp_path):
    (pictures / "bad.jpg").write_bytes(b"no picture")
    status, out, err = pli(capfd, "index", pictures, "--model", "pli-tiny-48", "--problems", tmp_path / "problems.txt")
    assert (status, out) == (0, "") and "1 picture cannot be read and is left out" in err and (tmp_path / "problems.txt").read_text().startswith("bad.jpg\t")


def test_tuning_the_words_indexes_nothing_again(drawn, pictures, capfd, tmp_path):
    "A real `pli tune --tune text`: its gallery is the start's; tuning both towers makes one of its own, and as a reader it is refused."
    assert pli(capfd, "index", pictures, "--model", "pli-tiny-48")[0] == 0
    tune = ("tune", drawn / "pairs.csv", "--model", "pli-tiny-48", "--steps", 2, "--batch-size", 8, "--warmup", 0, "--learning-rate", 1e-2, "--device", "cpu")
    for towers in ("text", "both"): assert pli(capfd, *tune, "--tune", towers, "--out", tmp_path / towers)[0] == 0
    status, _, err = pli(capfd, "search", pictures, "a star", "--model", tmp_path / "text" / "last")
    assert status == 0 and "nothing new" in err
    assert len(json.loads((tmp_path / "text" / "last" / "features.json").read_text())["reads"]) == 16
    with Gallery.open(pictures, "pli-tiny-48") as before, Gallery.open(pictures, "pli-tiny-48", query_model=tmp_path / "text" / "last") as after:
        assert [hit.score for hit in before.search(text="a star")] != [hit.score for hit in after.search(text="a star")]
    status, _, err = pli(capfd, "search", pictures, "a star", "--model", "pli-tiny-48", "--query-model", tmp_path / "both" / "last")
    assert status == 1 and "only a model that was tuned with this picture tower left as it was fits" in err
    status, _, err = pli(capfd, "search", pictures, "a star", "--model", tmp_path / "both" / "last")
    assert status == 0 and "70 added" in err


def test_stdout_holds_hits_only_and_a_closed_pipe_is_no_error(pictures):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", "import sys; from pli.cli.main import main; sys.exit(main())"]
    done = subprocess.run([*command, "search", str(pictures), "a star", "--model", "pli-tiny-48", "--k", "4"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4 and "70 added" in done.stderr


def test_a_cut_off_leaves_hits_out_and_says_so(pictures, capfd, tmp_path):
    search = ["search", pictures, "a", "red", "star", "--model", "pli-tiny-48"]
    status, out, err = pli(capfd, *search, "--at-least", -99, "--json", "--k", 4)
    fits = [hit["fit"] for hit in json.loads(out)]
    assert status == 0 and len(fits) == 4
    status, out, err = pli(capfd, *search, "--at-least", max(fits) + 1, "--k", 4)
    assert (status, out) == (0, "") and "no picture fits the words by at least" in err
    status, out, err = pli(capfd, "search", pictures, "--image", pictures / "pair_000001.png", "--at-least", 1)
    assert status == 1 and "this query has no words" in err
    (tmp_path / "asked.jsonl").write_text('{"text": "a star", "at_least": -99, "k": 2}\n{"image": "pictures/pair_000001.png", "at_least": 1}\n')
    status, out, err = pli(capfd, "search", pictures, "--queries", tmp_path / "asked.jsonl")
    assert status == 1 and "line 2" in err and "this query has no words" in err
    (tmp_path / "asked.jsonl").write_text('{"text": "a star", "at_least": -99, "k": 2}\n')
    status, out, err = pli(capfd, "search", pictures, "--queries", tmp_path / "asked.jsonl")
    assert status == 0 and len(json.loads(out)["hits"]) == 2


def test_by_date_the_numbers_are_those_of_the_list(pictures, capfd, tmp_path):
    for number, picture in enumerate(sorted(pictures.iterdir())): os.utime(picture, (1.6e9 + 86400 * (number * 37 % 70),) * 2)
    base = ("search", pictures, "a red star", "--model", "pli-tiny-48", "--k", 6, "--by-date", "--copy-to")
    lines = pli(capfd, *base, tmp_path / "found")[1].splitlines()
    names, dates = [line.split()[-1] for line in lines], [line.split()[2] for line in lines]
    assert dates == sorted(dates, reverse=True) and len(set(dates)) == 6 and [line.split()[0] for line in lines] == list("123456")
    scores = [float(line.split()[1]) for line in lines]
    assert scores != sorted(scores, reverse=True)
    assert sorted(copied.name for copied in (tmp_path / "found").iterdir()) == [f"{number}-{name}" for number, name in enumerate(names, 1)]
    for number in (1, 4): assert json.loads(pli(capfd, *base[:-1], "--explain", number, "--json")[1])["path"] == names[number - 1]


def test_a_long_path_is_never_cut(pictures, capfd):
    deep = pictures.joinpath(*[f"{letter} " * 60 for letter in "abcd"]) / "star.png"
    deep.parent.mkdir(parents=True)
    shutil.copy(pictures / "pair_000000.png", deep)
    out = pli(capfd, "search", pictures, "a star", "--model", "pli-tiny-48", "--name", "star.png")[1]
    assert out.endswith(f"  {deep.relative_to(pictures)}\n") and len(out) > 480
    assert str(deep.relative_to(pictures)) in pli(capfd, "gallery", "duplicates", pictures)[1].splitlines()


@pytest.mark.parametrize("words", [("index", ""), ("search", "", "a star"), ("studio", ""), ("gallery", "show", "")])
def test_an_empty_folder_name_is_not_the_current_folder(pictures, capfd, monkeypatch, words):
    monkeypatch.chdir(pictures)
    with pytest.raises(SystemExit) as end: main([*words])
    assert end.value.code == 2 and "FOLDER is empty; name the folder" in capfd.readouterr().err and not (pictures / ".pli").exists()


@pytest.mark.parametrize("option", ["--gallery", "--publish", "--problems", "--figure", "--copy-to", "--link-to", "--composer", "--without", "--image", "--in", "--name", "--since", "--queries"])
def test_an_option_without_a_value_is_refused_before_any_work(pictures, capfd, monkeypatch, option):
    monkeypatch.chdir(pictures)
    with pytest.raises(SystemExit) as end: main([*(["index", "."] if option in ("--publish", "--problems") else ["search", ".", "a star"]), "--model", "pli-tiny-48", option, ""])
    assert end.value.code == 2 and f"argument {option[2:]}: is empty" in capfd.readouterr().err and not (pictures / ".pli").exists()


def test_options_of_words_may_be_left_out(capfd):
    assert pli(capfd, "model", "list")[1].count("\n") > 100 and pli(capfd, "model", "list", "SigLIP")[1].count("\n") < 60


@pytest.fixture()
def odd(tmp_path) -> Path:
    "Places that nothing can be written to, and pictures that are none."
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, /dev/zero")
@pytest.mark.parametrize("command, option, place", [(command, option, place) for command, options in (("search", ("--figure", "--copy-to", "--link-to")), ("index", ("--problems", "--publish")))
                         for option in options for place in ("/proc/new.png", "broken.png/below/x.png", "pipe.png", "x" * 300 + ".png")])
def test_a_place_that_cannot_be_written_is_said_before_any_work(pictures, odd, capfd, monkeypatch, command, option, place):
    if option == "--publish": pytest.importorskip("lancedb", reason='needs the extra: pip install "pli[lance]"')
    monkeypatch.chdir(odd)
    status, out, err = pli(capfd, command, pictures, *["a star"] * (command == "search"), "--model", "pli-tiny-48", option, place)
    assert (status, out) == (1, "") and place[:30] in err and err.count("\n") == 1 and not (pictures / ".pli").exists()
    assert {path.name for path in odd.iterdir()} == {"pictures", "pipe.png", "broken.png", "folder.png"}


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/zero")
@pytest.mark.parametrize("image", ["pipe.png", "broken.png", "folder.png", "/dev/zero", "none.png"])
def test_a_reference_that_cannot_be_read_is_said_before_any_work(pictures, odd, capfd, monkeypatch, image):
    monkeypatch.chdir(odd)
    status, out, err = pli(capfd, "search", pictures, "--image", image, "--model", "pli-tiny-48")
    assert (status, out) == (1, "") and f"--image {image}: " in err and err.count("\n") == 1 and not (pictures / ".pli").exists()
    (odd / "asked.jsonl").write_text('{"image": "pictures/pair_000001.png"}\n' + json.dumps({"text": "a star", "image": ["pictures/pair_000001.png", image]}) + "\n")
    status, out, err = pli(capfd, "search", pictures, "--queries", "asked.jsonl", "--model", "pli-tiny-48")
    assert (status, out) == (1, "") and "asked.jsonl, line 2: " in err and image in err and err.count("\n") == 1 and not (pictures / ".pli").exists()


@pytest.mark.parametrize("option", ["--copy-to", "--link-to"])
def test_hits_are_not_put_where_they_would_be_found_again(pictures, capfd, option, tmp_path):
    (tmp_path / "aside").symlink_to(pictures)
    for place in (pictures, pictures / "found", tmp_path / "aside" / "found"):
        status, out, err = pli(capfd, "search", pictures, "a star", "--model", "pli-tiny-48", option, place)
        assert (status, out) == (1, "") and "lies in the searched folder" in err and not (pictures / ".pli").exists() and not (pictures / "found").exists()


@pytest.mark.parametrize("date", ["99999999999999999999", "1_0", "2024-05-01-02", "２０２４", "24", "2024-13", "0000", "2024-"])
def test_what_is_no_date_is_told(pictures, capfd, date):
    for option in ("--since", "--until"):
        status, _, err = pli(capfd, "search", pictures, "a star", option, date, "--model", "pli-tiny-48")
        assert status == 1 and "is no date" in err and err.count("\n") == 1 and not (pictures / ".pli").exists()


def test_days_at_the_ends_of_the_calendar_and_the_folder_itself(pictures, capfd):
    (pictures / "below").mkdir()
    (pictures / "pair_000000.png").rename(pictures / "below" / "a.png")
    base = ("search", pictures, "a star", "--model", "pli-tiny-48", "--k", 99)
    everything = pli(capfd, *base)[1]
    assert everything.count("\n") == 70
    for options in (("--until", "9999"), ("--until", "9999-12"), ("--since", "0001"), ("--in", "."), ("--in", "./"), ("--in", "/"), ("--in", "below/..")): assert pli(capfd, *base, *options)[1] == everything
    for said in ("below", "./below/", "below/.", ".//below"): assert pli(capfd, *base, "--in", said)[1].splitlines()[0].endswith("below/a.png")


def test_a_name_that_is_no_text_is_written_as_json_can(pictures, capfd, tmp_path):
    os.rename(pictures / "pair_000000.png", os.fsencode(pictures) + b"/bad\xff.png")
    status, out, _ = pli(capfd, "search", pictures, "a star", "--model", "pli-tiny-48", "--name", "bad*", "--figure", tmp_path / "hits.json", "--json")
    written = (tmp_path / "hits.json").read_bytes()
    assert status == 0 and b"bad\\udcff.png" in written and [hit["path"] for hit in json.loads(written)["hits"]] == [hit["path"] for hit in json.loads(out)] == ["bad\udcff.png"]


@pytest.mark.parametrize("asked, words", [({"at_least": 10**400}, "at_least must be a number"), ({"weight": 10**400, "image": "pictures/pair_000001.png"}, "weight must be a number from 0 to 1,000,000"),
                                          ({"composer": f"sum:{10**400}", "image": "pictures/pair_000001.png"}, "weight must be"), ({"weight": 1e308, "image": "pictures/pair_000001.png"}, "weight must be a number from 0")])
def test_numbers_without_end_are_told_with_their_line(pictures, capfd, tmp_path, asked, words):
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked | {"text": "a star"}))
    status, out, err = pli(capfd, "search", pictures, "--queries", tmp_path / "asked.jsonl", "--model", "pli-tiny-48")
    assert (status, out) == (1, "") and "line 1: " in err and words in err and err.count("\n") == 1 and not (pictures / ".pli").exists()


def test_a_weight_beyond_a_million_is_told(pictures, capfd):
    for options in (("--weight", "1e308"), ("--weight", "nan"), ("--composer", "product:1e38"), ("--weight=-1",)):
        status, _, err = pli(capfd, "search", pictures, "a star", "--image", pictures / "pair_000001.png", *options, "--model", "pli-tiny-48")
        assert status == 1 and "must be a number from 0 to 1,000,000" in err and not (pictures / ".pli").exists()
    assert pli(capfd, "search", pictures, "a star", "--image", pictures / "pair_000001.png", "--weight", "1e6", "--model", "pli-tiny-48")[0] == 0


def test_every_run_tells_what_cannot_be_read(pictures, capfd):
    for name in ("no.png", "none.png"): (pictures / name).write_bytes(b"no picture")
    first, second = (pli(capfd, "index", pictures, "--model", "pli-tiny-48")[2] for _ in range(2))
    assert "2 pictures cannot be read and are left out: no.png (" in first
    assert "2 pictures cannot be read and are left out, as before: no.png, none.png\n" in second and "nothing new" in second
    (pictures / "another.png").write_bytes(b"neither")
    status, out, err = pli(capfd, "search", pictures, "a star", "--k", 2)
    assert "3 pictures cannot be read and are left out, 1 of them new: another.png (" in err and len(out.splitlines()) == 2
    status, out, err = pli(capfd, "search", pictures, "a star", "--k", 2, "--no-index")
    assert err == "3 pictures cannot be read and are left out, as before: another.png, no.png, none.png\n"


def test_a_single_thing_is_not_called_several(drawn, tmp_path, capfd):
    (tmp_path / "one").mkdir()
    shutil.copy(drawn / "images" / "pair_000001.png", tmp_path / "one" / "a.png")
    (tmp_path / "one" / ".hidden").touch()
    (tmp_path / "one" / "no.png").write_bytes(b"no picture")
    err = pli(capfd, "index", tmp_path / "one", "--model", "pli-tiny-48", "--problems", tmp_path / "list.txt")[2]
    assert "1 picture cannot be read and is left out: " in err and "1 hidden file or folder was left out\n" in err and "\n1 problem: " in err
    err = pli(capfd, "search", tmp_path / "one", "a", "--copy-to", tmp_path / "hits")[2]
    assert "1 picture copied to" in err
    status, out, err = pli(capfd, "gallery", "show", tmp_path / "one")
    assert ": 1 picture, 1 that cannot be read, 0 exact duplicates" in out and "0.0 MB" not in out and " kB\n" in out
    assert "1 gallery would be deleted" in pli(capfd, "gallery", "forget", tmp_path / "one")[2]
    shutil.copy(tmp_path / "one" / "a.png", tmp_path / "one" / "b.png")
    pli(capfd, "index", tmp_path / "one")
    assert "1 picture is there more than once, 1 file too many, " in pli(capfd, "gallery", "duplicates", tmp_path / "one")[2]
    (tmp_path / "one" / "a.png").unlink()
    (tmp_path / "one" / "b.png").unlink()
    (tmp_path / "one" / "no.png").unlink()
    shutil.copy(drawn / "images" / "pair_000001.png", tmp_path / "one" / "c.png")
    assert "\n1 picture: 1 moved, 2 removed" in "\n" + pli(capfd, "index", tmp_path / "one", "--forget-missing")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="pipes, sockets")
@pytest.mark.parametrize("place, told", [("file", "is a file, not a folder"), ("pipe", "is a pipe, not a folder"), ("socket", "is a socket, not a folder"), ("loop", "is a link that leads back to itself"),
                                         ("dangling", "is a link to nothing"), ("file/below", "lies below a file"), ("x" * 300, "cannot be reached (File name too long)")])
def test_a_place_for_the_gallery_that_is_no_folder_is_said_first(pictures, tmp_path, capfd, monkeypatch, place, told):
    monkeypatch.chdir(tmp_path)
    Path("file").touch(), os.mkfifo("pipe"), os.symlink("loop", "loop"), os.symlink("nothing", "dangling")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("socket")
        for command in (["index"], ["search"], ["gallery", "show"], ["gallery", "forget"], ["gallery", "duplicates"]):
            words = ["a star"] * (command == ["search"]) + ["--model", "no model at all"] * (len(command) == 1)
            status, out, err = pli(capfd, *command, pictures, *words, "--gallery", place)
            assert (status, out, err.count("\n")) == (1, "", 1) and f"--gallery {place[:100]}" in err and told in err and "name a folder" in err
    if "/" in place or len(place) > 255: return
    if place == "socket": shutil.copy("file", pictures / ".pli")
    else: os.rename(place, pictures / ".pli")
    status, out, err = pli(capfd, "index", pictures, "--model", "no model at all")
    assert (status, out) == (1, "") and "pictures/.pli: is a" in err and "remove it" in err


def test_no_hit_is_an_answer_and_what_is_not_written_is_said(pictures, capfd, tmp_path):
    search = ["search", pictures, "a star", "--model", "pli-tiny-48", "--at-least", 99]
    status, out, err = pli(capfd, *search, "--figure", tmp_path / "new" / "hits.png", "--copy-to", tmp_path / "copies")
    best = max(hit["fit"] for hit in json.loads(pli(capfd, *search[:-1], -99, "--k", 70, "--json")[1]))
    assert (status, out) == (0, "") and f"0 hits are left: no picture fits the words by at least 99; the best fit is {best:.2f}. How high" in err
    assert "--figure, --copy-to: nothing is written" in err and not (tmp_path / "new").exists() and not (tmp_path / "copies").exists()
    for way, out in (([], ""), (["--json"], "null\n")):
        assert pli(capfd, *search, "--explain", 1, *way)[:2] == (0, out)
    assert pli(capfd, *search, "--json")[:2] == (0, "[]\n")
    assert pli(capfd, *search, "--csv")[:2] == (0, "rank,score,path,date,width,height,file,fit\n")


def test_the_fit_is_shown_wherever_it_was_asked(pictures, capfd, tmp_path):
    search = ["search", pictures, "a star", "--model", "pli-tiny-48", "--k", 5]
    fits = [hit["fit"] for hit in json.loads(pli(capfd, *search, "--at-least", -99, "--json")[1])]
    lines = pli(capfd, *search, "--at-least", -99)[1].splitlines()
    assert [float(line.split()[2]) for line in lines] == [pytest.approx(fit, abs=0.0051) for fit in fits]
    printed = pli(capfd, *search, "--at-least", -99, "--csv", "--figure", tmp_path / "hits.csv")[1]
    assert (tmp_path / "hits.csv").read_text() == printed and [float(row["fit"]) for row in csv.DictReader(printed.splitlines())] == fits
    assert "fit" not in pli(capfd, *search, "--csv")[1].splitlines()[0] and len(pli(capfd, *search)[1].splitlines()[0].split()) == 4


def test_a_first_day_after_the_last_is_told(pictures, capfd):
    for since, until in (("2024-05-02", "2024-05-01"), ("2025", "2024"), ("2024-06", "2024-05")):
        status, out, err = pli(capfd, "search", pictures, "a star", "--since", since, "--until", until)
        assert (status, out) == (1, "") and f"--since {since} is later than --until {until}" in err and not (pictures / ".pli").exists()
    for since, until in (("2024", "2024"), ("2024-05", "2024"), ("2024", "2024-01-01")): Where(since=since, until=until)


def test_several_references_have_no_map_and_that_is_said(pictures, capfd):
    search = ["search", pictures, "in red", "--model", "pli-tiny-48", "--explain", 1, "--image", pictures / "pair_000001.png"]
    assert "no map over" not in pli(capfd, *search)[1]
    told = pli(capfd, *search, "--image", pictures / "pair_000002.png")[1].splitlines()
    assert any(line.startswith("the query is the mean of 2 pictures, so there is no map over any of them") for line in told) and sum("trust in the map over the hit" in line for line in told) == 1 and "over the reference" not in str(told)


def test_an_explanation_says_what_its_numbers_are(pictures, capfd):
    search = ["search", pictures, "--model", "pli-tiny-48", "--explain", 1, "--image", pictures / "pair_000001.png"]
    assert re.search(r"score (-?[\d.]+), which is -?[\d.]+ from the picture [-+] [\d.]+ from the words \(composer sum:1\)\n", pli(capfd, *search, "in red")[1])
    assert ", all of it from the picture (composer image)\n" in pli(capfd, *search)[1]
    told = pli(capfd, *search, "in red", "--composer", "product")[1]
    assert re.search(r"made of [\d.]+ for the picture and [\d.]+ for the words", told) and "from 0, the worst of the searched pictures, to 1" in told


def test_the_folder_of_a_written_file_is_made_and_the_help_says_so(pictures, capfd, tmp_path):
    assert pli(capfd, "search", pictures, "a star", "--model", "pli-tiny-48", "--figure", tmp_path / "new" / "hits.png")[0] == 0 and (tmp_path / "new" / "hits.png").is_file()
    assert pli(capfd, "index", pictures, "--problems", tmp_path / "newer" / "list.txt")[0] == 0 and (tmp_path / "newer" / "list.txt").is_file()
    for command in ("search", "index", "evaluate", "compare", "score", "submit", "mask"):
        with pytest.raises(SystemExit): main([command, "--help"])
        assert "its folder is made where there is none" in " ".join(capfd.readouterr().out.split()), command

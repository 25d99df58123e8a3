"What the page decides, without a page: the command gives the same hits, marks can be measured, uploads find themselves, errors are sentences."
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from pli.backbones.loading import load_backbone
from pli.benchmarks.own import read_queries
from pli.cli.main import main
from pli.core import PliError
from pli.studio.session import HIDING, PAUSE, Query, cells_of, change_query, gallery_cells, gallery_of, hidden_picture, large, open_session, read_marks
from pli.world import save_world


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    save_world(folder, pairs=30, queries=6, gallery_size=20)
    (folder / "images" / "below").mkdir()
    for number in range(6): (folder / "images" / f"pair_{number:06d}.png").rename(folder / "images" / "below" / f"it's {number}.png")
    open_session(folder / "images", model="pli-tiny-48", device="cpu").close()
    return folder


@pytest.fixture()
def pictures(drawn, tmp_path) -> Path:
    shutil.copytree(drawn / "images", tmp_path / "my pictures")
    return tmp_path / "my pictures"


@pytest.fixture()
def session(pictures):
    opened = open_session(pictures, model="pli-tiny-48", device="cpu")
    yield opened
    opened.close()


def tuned(folder: Path, towers: str) -> Path:
    "The tiny model with other weights in its text tower, or in both."
    model = load_backbone("pli-tiny-48")
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if towers == "both" or not name.startswith("visual.") and name != "logit_scale": weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save(folder)
    return folder


def paths(session, side: int = 0, count: int = 7) -> list[str]: return [hit.path for hit in session.ranking(side, count).hits[:count]]


CHANGES = [{"words": "a red star"}, {"words": "-rf 'quoted' $HOME `x` \"y\""}, {"words": "in blue", "picture": True, "weight": 0.35}, {"picture": True}, {"words": "a star", "without": "dots, red stripes"},
           {"words": "in red", "picture": True, "folder": "below"}, {"words": "in red", "name": "pair_*1*.png", "since": "2020", "until": "2100-01"}]


@pytest.mark.parametrize("changes", CHANGES, ids=range(len(CHANGES)))
def test_command_and_python_give_the_same_hits(session, capsys, changes):
    if changes.get("picture"): session.choose(next(cell["id"] for cell in gallery_cells(session, "it's 3")[0]))
    session.change(**{name: value for name, value in changes.items() if name != "picture"})
    shown = paths(session)
    words = shlex.split(session.command(k=7))
    assert words[:2] == ["pli", "search"] and main([words[1], "--json", *words[2:]]) == 0
    records = json.loads(capsys.readouterr()[0])
    assert [record["path"] for record in records] == shown and len(shown) >= 3
    names = {}
    exec(session.python(k=7), names)
    assert [hit.path for hit in names["hits"]] == shown
    names["gallery"].close()


@pytest.mark.parametrize("towers", ["text", "both"])
def test_a_second_model_beside_the_first(pictures, tmp_path, capsys, towers):
    session = open_session(pictures, tuned(tmp_path / "tuned", towers), model="pli-tiny-48", device="cpu")
    session.choose(gallery_cells(session, "it's 2")[0][0]["id"])
    session.change(words="in red")
    assert (session.galleries[1].backbone is session.galleries[1].reader) == (towers == "both")    # its own features only where it needs them
    assert session.names == ["pli-tiny-48", "tuned"] and paths(session, 0, 30) != paths(session, 1, 30)
    for side in (0, 1):
        assert main([*shlex.split(session.command(side, 7))[1:], "--json", "--no-index"]) == 0
        assert [record["path"] for record in json.loads(capsys.readouterr()[0])] == paths(session, side)
    session.close()
    with pytest.raises(PliError, match="no such folder"): open_session(pictures, tmp_path / "nowhere", model="pli-tiny-48", device="cpu")


def test_moves_are_counted_from_before_a_drag(session):
    session.choose(gallery_cells(session, "it's 1")[0][0]["id"])
    session.change(words="a red star")
    start = {cell["id"]: cell["rank"] for cell in cells_of(session, count=60)[0]}
    for step in range(10):
        change_query(session, {"weight": 1 - 0.09 * step}, now=100 + 0.1 * step)
        cells, total = cells_of(session, count=60)
    assert total == len(start) == len(session.gallery) - 1
    moved = {cell["id"]: start[cell["id"]] - cell["rank"] for cell in cells}
    assert any(moved.values())
    for cell in cells: assert cell["moved"] == ("" if not moved[cell["id"]] else f"up {moved[cell['id']]}" if moved[cell["id"]] > 0 else f"down {-moved[cell['id']]}")
    change_query(session, {"weight": 0.15}, now=100 + PAUSE + 5)                  # another drag begins from what is on the screen
    rest = {cell["id"]: cell["rank"] for cell in cells}
    assert all(cell["moved"] in ("", f"up {rest[cell['id']] - cell['rank']}", f"down {cell['rank'] - rest[cell['id']]}") for cell in cells_of(session, count=60)[0])
    session.choose(cells[0]["id"])
    assert not any(cell["moved"] for cell in cells_of(session, count=60)[0])       # another question, nothing to compare


def test_pages_have_no_cap_and_nothing_twice(session):
    session.change(words="a star")
    seen, first = [], 0
    while True:
        cells, total = cells_of(session, first=first, count=7)
        seen += [cell["id"] for cell in cells]
        first += 7
        if first >= total: break
    assert len(seen) == len(set(seen)) == total == len(session.gallery)


def test_marks_become_queries_that_evaluate_reads(session, pictures, tmp_path, capsys):
    with pytest.raises(PliError, match="nothing to save"): session.save_marks()
    session.change(words="a star")
    session.mark(cells_of(session)[0][0]["id"], True)                              # words alone: cannot be measured
    session.choose(gallery_cells(session, "it's 4")[0][0]["id"])
    cells, _ = cells_of(session)
    session.mark(cells[0]["id"], True)
    session.mark(cells[1]["id"], False)
    session.mark(cells[2]["id"], True)
    session.mark(cells[2]["id"], None)
    assert [cell["mark"] for cell in cells_of(session)[0][:4]] == ["right", "wrong", "", ""]
    said = session.save_marks()
    assert "because they cannot be measured: 1 marked search without a picture." in said
    benchmark = read_queries(session.marks_file, gallery_of(session.marks_file), pictures)
    assert len(benchmark) == 1 and benchmark.texts[0][0] == "a star" and benchmark.pictures[benchmark.references[0]] == "below/it's 4.png"
    words = shlex.split(said.partition("To measure on them: ")[2])
    assert main([*words[1:], "--composer", "sum:1", "--no-cache"]) == 0
    again = read_marks(session.marks_file)
    assert again.of(session.query) == session.marks.of(session.query)
    (tmp_path / "other.json").write_text('[{"reference_img_id": "a", "relative_caption": "b", "gt_img_ids": ["c"]}]')
    with pytest.raises(PliError, match="holds something else than marks"): open_session(pictures, marks=tmp_path / "other.json", model="pli-tiny-48", device="cpu")
    assert "wrong_img_ids" not in (tmp_path / "other.json").read_text()


def test_two_pages_keep_each_others_marks(pictures, tmp_path):
    "Each saves what it was told; what one has taken back does not come again from the file."
    file = tmp_path / "marks.json"
    pages = [open_session(pictures, marks=file, model="pli-tiny-48", device="cpu") for _ in range(2)]
    questions = ("in red", "in blue")
    for page, words in zip(pages, questions):
        page.choose(gallery_cells(page, "it's 4")[0][0]["id"])
        page.change(words=words)
        for cell in cells_of(page)[0][:2]: page.mark(cell["id"], True)
        page.save_marks()
    assert [sorted(record["relative_caption"] for record in json.loads(file.read_text()))] == [sorted(questions)]
    assert [len(page.marks) for page in pages] == [2, 4]
    pages[0].mark(cells_of(pages[0])[0][1]["id"], None)
    pages[0].save_marks()
    assert {record["relative_caption"]: len(record["gt_img_ids"]) for record in json.loads(file.read_text())} == {"in red": 1, "in blue": 2}
    pages[1].save_marks()                                                          # it has seen both of "in red", and has touched neither
    gallery_of(file).write_text('"mine"')
    with pytest.raises(PliError, match="holds something else than names"): pages[0].save_marks()
    assert gallery_of(file).read_text() == '"mine"'
    for page in pages: page.close()


def test_an_upload_finds_itself_in_the_gallery(session, pictures, tmp_path):
    session.upload("C:\\fakepath\\x.png", (pictures / "below" / "it's 5.png").read_bytes())
    assert session.query.picture.path == "below/it's 5.png" and session.uploads == 1
    Image.new("RGB", (50, 40), "red").save(tmp_path / "new.png")
    session.upload("../../evil\x1b[2J<b>.png", (tmp_path / "new.png").read_bytes())
    assert session.query.picture.path == "" and session.query.picture.name == "evil\\x1b[2J<b>.png" and len(paths(session)) == 7
    assert Path(session.folder.name) in session.query.picture.file.parents
    for data in (b"", b"no picture", (tmp_path / "new.png").read_bytes()[:60]):
        with pytest.raises(PliError, match="x.png"): session.upload("x.png", data)
    place = Path(session.folder.name)
    session.close()
    assert not place.exists()


def test_a_picture_that_vanished_is_a_sentence(session, pictures):
    id = gallery_cells(session, "it's 0")[0][0]["id"]
    (pictures / "below" / "it's 0.png").unlink()
    for call in (session.choose, lambda id: large(session, id)):
        with pytest.raises(PliError, match="is no longer there"): call(id)
    assert session.query == Query()


def test_every_way_of_hiding_can_be_seen(session):
    with pytest.raises(PliError, match="choose a picture"): hidden_picture(session, "no colours")
    session.choose(gallery_cells(session, "it's 0")[0][0]["id"])
    whole = hidden_picture(session, "nothing is hidden")[0]
    for way in HIDING:
        picture, teaches = hidden_picture(session, way, 0.6, 3)
        assert picture.size == whole.size and teaches and (picture.tobytes() != whole.tobytes()) == (way != "nothing is hidden")
    with pytest.raises(PliError, match="no way of hiding"): hidden_picture(session, "random:0.5")


def test_wrong_fields_change_nothing(session):
    session.change(words="a star")
    with pytest.raises(PliError, match="is no date"): session.change(since="soon", words="other")
    assert session.query == Query(words="a star")
    session.change(folder="nowhere")
    with pytest.raises(PliError, match="no picture is left"): session.ranking()


def test_names_of_every_kind_are_shown_safely(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["new\nline.png", "<script>.png", "ü.png", "x" * 251 + ".png", "\x1b[31m.png"]
    for number, name in enumerate(names): Image.new("RGB", (40, 40), (40 * number, 0, 99)).save(folder / name)
    shutil.copy(folder / names[0], os.fsencode(folder) + b"/\xff\xfe.png")
    session = open_session(folder, model="pli-tiny-48", device="cpu")
    cells, total = gallery_cells(session)
    assert total == 6 and all(text.isprintable() for cell in cells for text in (cell["name"], cell["path"], cell["alt"]))
    json.dumps(cells).encode()
    session.change(words="a star")
    for cell in cells_of(session)[0]: session.choose(cell["id"])
    session.change(words="a circle")
    for cell in cells_of(session)[0]: session.mark(cell["id"], True)
    assert session.command() and session.python()
    session.close()


def test_marks_follow_pictures_that_were_moved_inside_the_folder(pictures, capsys):
    def opened(): return open_session(pictures, model="pli-tiny-48", device="cpu")
    session = opened()
    session.choose(gallery_cells(session, "it's 4")[0][0]["id"])
    session.change(words="a star")
    hits = paths(session, count=4)
    ids = [cell["id"] for cell in cells_of(session)[0]]
    session.mark(ids[0], True), session.mark(ids[1], False), session.mark(ids[2], True)
    session.save_marks()
    asked = session.query
    (pictures / "later").mkdir()
    for path in (hits[0], hits[1], "below/it's 4.png"): (pictures / path).rename(pictures / "later" / f"moved {Path(path).name}")
    other = opened()                                                               # the first page stays open meanwhile
    now = [f"later/moved {Path(path).name}" for path in (hits[0], hits[1])] + [hits[2]]
    other.choose(gallery_cells(other, "it's 4")[0][0]["id"])
    other.change(words="a star")
    assert other.marks.of(other.query) == dict(zip(now, (True, False, True))) and [cell["mark"] for cell in cells_of(other)[0][:3]] == ["right", "wrong", "right"]
    session.mark(ids[3], True)                                                     # under the old name of the reference
    assert session.query == asked
    for page in (session, other): said = page.save_marks()
    record, = json.loads(other.marks_file.read_text())
    assert (record["reference_img_id"], record["gt_img_ids"], record["wrong_img_ids"]) == ("later/moved it's 4.png", sorted([now[0], now[2], hits[3]]), [now[1]])
    assert main([*shlex.split(said.partition("To measure on them: ")[2])[1:], "--composer", "sum:1", "--no-cache"]) == 0
    (pictures / now[0]).unlink()
    again = opened()
    assert f"No longer in the gallery, so that pli evaluate may stop there: 1 marked, {now[0]} first." in again.save_marks()
    assert now[0] in json.loads(again.marks_file.read_text())[0]["gt_img_ids"]
    for page in (session, other, again): page.close()


def test_marks_of_before_digests_were_kept_are_read(pictures):
    old = [{"reference_img_id": "below/it's 4.png", "relative_caption": "in red", "gt_img_ids": ["below/it's 1.png"], "wrong_img_ids": []}]
    (pictures / ".pli" / "queries.json").write_text(json.dumps(old))
    session = open_session(pictures, model="pli-tiny-48", device="cpu")
    session.save_marks()
    record, = json.loads(session.marks_file.read_text())
    assert set(record.pop("contents")) == {"below/it's 4.png", "below/it's 1.png"} and [record] == old
    session.close()
    for wrong in ([], {"a": 5}, "x"):
        (pictures / ".pli" / "queries.json").write_text(json.dumps([old[0] | {"contents": wrong}]))
        with pytest.raises(PliError, match="something else than marks"): read_marks(pictures / ".pli" / "queries.json")


def test_errors_speak_of_the_fields_of_the_page(session):
    from pli.studio.session import LABELS
    session.change(words="a star", folder="nowhere", name="x*", since="2020", until="2100")
    with pytest.raises(PliError) as said: session.ranking()
    assert all(f"“{label}”" in str(said.value) for label in LABELS.values()) and "--" not in str(said.value)
    for name in ("since", "until"):
        with pytest.raises(PliError, match=f"^“{LABELS[name]}”: 'soon' is no date"): session.change(**{name: "soon"})


@pytest.mark.parametrize("towers", ["text", "both"])
def test_two_models_in_folders_of_one_name_have_names_of_their_own(pictures, tmp_path, towers):
    first, second = (tuned(tmp_path / name / "runs" / "last", towers) for name in ("shirts", "coats"))
    session = open_session(pictures, second, model=str(first), device="cpu")
    assert session.names == ["shirts/runs/last", "coats/runs/last"]
    session.close()
    session = open_session(pictures, first, model=str(first), device="cpu")
    assert len(set(session.names)) == 2 and all("shirts/runs/last" in name for name in session.names)
    session.close()


def test_halves_of_characters_do_not_reach_the_command(tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/it's \xff\\"))
    folder.mkdir()
    for number in range(3): Image.new("RGB", (40, 40), (40 * number, 0, 99)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", os.fsencode(folder) + b"/\xfe it's.png")
    session = open_session(folder, model="pli-tiny-48", device="cpu")
    session.change(words="a star \ud800", name="*\udc80*")
    assert (session.query.words, session.query.name) == ("a star ?", "*?*")
    session.change(name="")
    session.choose(next(cell["id"] for cell in gallery_cells(session)[0] if "it" in cell["name"]))
    hits = paths(session)
    command, code = session.command(k=7), session.python(k=7)
    (command + code).encode()                                                      # as the page gets them
    import subprocess
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}).stdout.split(b"\0")
    assert main([os.fsdecode(word) for word in words[1:-1]] + ["--json"]) == 0
    assert [record["path"] for record in json.loads(capsys.readouterr()[0])] == hits
    assert gallery_cells(session, "\ud800")[1] == 0
    session.close()

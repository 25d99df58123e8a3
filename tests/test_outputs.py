"Stored outputs: what is kept of a cell, what is refused, what a chapter's outputs came from, and what a killed run leaves."
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "outputs.py"


@pytest.fixture(scope="module")
def tool():
    "The tool as a module."
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import outputs
        yield outputs
    finally: sys.path.remove(str(ROOT / "tools"))


def notebook(*sources: str) -> dict:
    "A bare notebook of code cells; the first source becomes cell 00000000."
    cells = [
        {"cell_type": "code", "id": f"{place:08x}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
        for place, source in enumerate(sources)
    ]
    return {
        "cells": cells,
        "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def repository(folder: Path, **chapters: dict) -> Path:
    "A small repository with these notebooks, one module and one result."
    files = {
        "settings.ini": "[DEFAULT]\nlib_name = pli\ntst_flags = slow gpu\n",
        "pli/__init__.py": "",
        "pli/words.py": "def word(): return 'red'  # said\n",
        "results/a.json": "[1]",
    }
    files |= {f"nbs/{name}.ipynb": json.dumps(nb, sort_keys=True, indent=1) + "\n" for name, nb in chapters.items()}
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


def run(root: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), "--root", str(root), *args], capture_output=True, text=True, cwd=root)


def read(root: Path, name: str) -> dict:
    return json.loads((root / "nbs" / f"{name}.ipynb").read_text())


def png(width: int, height: int, noise: bool) -> bytes:
    "A picture of noise, which nothing makes small, or a ramp, with a note in it as matplotlib leaves one."
    import numpy as np
    from PIL import Image, PngImagePlugin
    pixels = (
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        if noise
        else np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype("uint8")
    )
    notes, data = PngImagePlugin.PngInfo(), io.BytesIO()
    notes.add_text("Software", "somebody's")
    Image.fromarray(pixels).save(data, "PNG", pnginfo=notes)
    return data.getvalue()


GOOD = notebook(
    "#| default_exp good",
    "from pli.words import word\nprint('\\n'.join(f'{word()} {i}' for i in range(30)))",
    "import sys\nprint('careful', file=sys.stderr)\nobject()",
    "import matplotlib.pyplot as plt\nfigure, axis = plt.subplots(figsize=(2, 1))\nfigure",
    "#| slow\nraise SystemError('left out')",
    "#| eval: false\nraise SystemError('left out')",
    "from pathlib import Path\nPath('../results/a.json').read_text()",
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    "A repository after one run: a good chapter, and one for each way to be refused."
    good = json.loads(json.dumps(GOOD))
    good["cells"][4]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["an hour's work\n"]}]
    noise = (
        "from IPython.display import Image, display\nimport numpy as np, io\nfrom PIL import Image as Picture\ndata = io.BytesIO()\n"
        "pixels = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)\n"
        "Picture.fromarray(pixels).save(data, 'PNG')\nImage(data.getvalue())"
    )
    root = repository(
        tmp_path_factory.mktemp("repository"),
        **{
            "01_good": good,
            "02_raises": notebook("1", "1 / 0"),
            "03_path": notebook("import tempfile\nprint(tempfile.mkdtemp())"),
            "04_noise": notebook(noise),
            "05_moment": notebook("import datetime\nprint(datetime.datetime.now().isoformat())"),
        },
    )
    return root, run(root)


def test_a_chapter_is_stored_as_it_may_be(stored):
    root, done = stored
    cells = [cell["outputs"] for cell in read(root, "01_good")["cells"]]
    assert len(cells[1][0]["text"]) == 21 and cells[1][0]["text"][-1] == "... 10 more lines are left out"
    assert [out["data"] for out in cells[2]] == [{"text/plain": ["<object>"]}] and "1 warnings not stored, 2 cells left out" in done.stdout
    assert [list(out["data"]) for out in cells[3]] == [["image/png"]], "the figure once, and no text in place of it"
    assert cells[4][0]["text"] == ["an hour's work"] and cells[5] == [], "a cell that is left out keeps what it showed"
    assert "execution_count" not in cells[3] and all(out.get("execution_count") is None for outputs in cells for out in outputs)
    assert read(root, "01_good")["metadata"]["pli"]["outputs"]["reads"] == ["results/a.json"]


def test_refused_chapters_stay_as_they_were_and_the_cell_is_named(stored):
    root, done = stored
    assert done.returncode == 1 and "4 of 5 chapters could not be stored" in done.stderr
    for name, why in {
        "02_raises": "cell 00000001 raised ZeroDivisionError",
        "05_moment": "cell 00000000: its text shows when it was run",
        "03_path": "cell 00000000: its text names a folder",
        "04_noise": "cell 00000000: its figure of 600 x 600",
    }.items():
        line = next(line for line in done.stdout.splitlines() if name in line)
        assert f"NOT STORED: {why}" in line
        assert "pli" not in read(root, name)["metadata"] and not any(cell["outputs"] for cell in read(root, name)["cells"])
    assert not list(root.rglob("*.part"))


def test_a_stored_chapter_passes_the_check_and_clean_keeps_it(stored, tmp_path, tool):
    root, _ = stored
    name, nb = "nbs/01_good.ipynb", read(root, "01_good")
    from check_notebooks import as_json, fix, notebook_faults
    assert list(notebook_faults(name, nb)) == []
    before = as_json(nb)
    assert before == (root / name).read_text()
    fix(name, nb)
    assert as_json(nb) == before
    from nbdev.clean import clean_nb
    clean_nb(nb, allowed_metadata_keys=["pli"])
    assert as_json(nb) == before
    assert "allowed_metadata_keys = pli" in (ROOT / "settings.ini").read_text()


def test_a_second_run_gives_the_same_bytes(stored, tmp_path):
    root = shutil.copytree(stored[0], tmp_path / "copy")
    before = (root / "nbs/01_good.ipynb").read_bytes()
    done = run(root, "nbs/01_good.ipynb")
    assert "as before" in done.stdout and (root / "nbs/01_good.ipynb").read_bytes() == before, done.stdout
    assert run(root, "--verify", "--exact", "nbs/01_good.ipynb").returncode == 0


@pytest.mark.parametrize("change, state", [
    (None, "fresh"), ("comment", "fresh"), ("module", "suspect"), ("cell", "moved on"), ("result", "moved on"), ("prose", "fresh")])
def test_what_a_change_makes_of_a_chapter(stored, tmp_path, tool, change, state):
    root = shutil.copytree(stored[0], tmp_path / "copy")
    path = root / "nbs/01_good.ipynb"
    nb = json.loads(path.read_text())
    if change == "comment": (root / "pli/words.py").write_text("# a word\n\ndef word(): return 'red'  # said\n")
    if change == "module": (root / "pli/words.py").write_text("def word(): return 'blue'\n")
    if change == "result": (root / "results/a.json").write_text("[2]")
    if change == "cell": nb["cells"][1]["source"] += "\n1"
    if change == "prose": nb["cells"].append({"cell_type": "markdown", "id": "abcdef00", "metadata": {}, "source": "words"})
    path.write_text(json.dumps(nb))
    assert tool.states(tool.tracked(root), root)["nbs/01_good.ipynb"] == state


def test_check_names_what_has_moved_on_and_what_was_never_stored(stored, tmp_path):
    root = shutil.copytree(stored[0], tmp_path / "copy")
    for name in ("02_raises", "03_path", "04_noise", "05_moment"): (root / f"nbs/{name}.ipynb").unlink()
    assert run(root, "--check").returncode == 0
    nb = read(root, "01_good")
    nb["cells"][2]["source"] = "2"
    (root / "nbs/01_good.ipynb").write_text(json.dumps(nb))
    (root / "nbs/05_new.ipynb").write_text(json.dumps(notebook("1")))
    done = run(root, "--check")
    assert (
        done.returncode == 1
        and "nbs/01_good.ipynb: its sources have moved on" in done.stdout
        and "nbs/05_new.ipynb: its outputs have never been stored" in done.stdout
    )
    (root / "nbs/01_good.ipynb").unlink()
    assert run(root, "--check").returncode == 0, "as long as nothing is stored, nothing is asked for"


def test_verify_runs_suspects_and_names_the_cell_that_differs(stored, tmp_path):
    root = shutil.copytree(stored[0], tmp_path / "copy")
    (root / "pli/words.py").write_text("def word(): return 'blue'\n")
    before = (root / "nbs/01_good.ipynb").read_bytes()
    done = run(root, "--verify")
    assert done.returncode == 1 and "a fresh run shows something else in cell 00000001" in done.stdout
    assert (root / "nbs/01_good.ipynb").read_bytes() == before
    assert "left for another time" in run(root, "--verify", "--seconds", "-1").stdout


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_the_old_file(tmp_path, how):
    root = repository(
        tmp_path / "repository", **{"01_long": notebook(f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport time\ntime.sleep(20)")}
    )
    before = (root / "nbs/01_long.ipynb").read_bytes()
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--root", str(root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    end = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and time.monotonic() < end: time.sleep(0.1)
    process.send_signal(how)
    process.wait(30)
    assert (root / "nbs/01_long.ipynb").read_bytes() == before and [path.name for path in (root / "nbs").iterdir()] == ["01_long.ipynb"]
    if how == signal.SIGTERM: assert not list(tmp_path.glob("pli-outputs-*")), "the scratch copy is cleared away"


def test_a_file_that_cannot_be_put_in_place_is_left_as_it_was(tmp_path, tool, monkeypatch):
    path = tmp_path / "a.ipynb"
    old = json.dumps(notebook("1"))
    path.write_text(old)
    with pytest.raises(tool.Refused, match="changed while it ran"): tool.write(path, json.dumps(notebook("2")))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError): tool.write(path, old + "\n")
    assert path.read_text() == old and [each.name for each in tmp_path.iterdir()] == ["a.ipynb"]


# the rules

def test_large_figures_are_made_to_fit(tool):
    from PIL import Image
    small = tool.fit_png(png(1600, 900, noise=False))
    assert len(small) <= tool.LARGEST_FIGURE and b"Software" not in small
    assert Image.open(io.BytesIO(tool.fit_png(png(60, 40, noise=True)))).size == (60, 40)
    with pytest.raises(tool.Refused, match="600 x 600 pixels does not fit"): tool.fit_png(png(600, 600, noise=True))


@pytest.mark.parametrize(
    "shown, why",
    [
        ("/tmp/x", "folder"),
        ("see /home/me/pictures", "folder"),
        ("tmpab12cd_9/a.jpg", "temporary"),
        ("at 0x7f12ab34cd56", "address"),
        ("C:\\Users\\me", "folder"),
    ],
)
def test_text_that_no_other_run_repeats_is_refused(tool, shown, why):
    with pytest.raises(tool.Refused, match=why): tool.fit_output({"output_type": "stream", "name": "stdout", "text": shown})


@pytest.mark.parametrize(
    "shown", ["https://example.org/home/me", "a/tmp/b", "pictures/01.jpg", "tmp", "temperature", "tmpfiles", "0x1f600", "1 / 2"]
)
def test_ordinary_text_is_not(tool, shown):
    assert tool.fit_output({"output_type": "stream", "name": "stdout", "text": shown})["text"] == [shown]


def test_one_form_of_an_object_is_stored(tool):
    shown = lambda **data: tool.fit_output(
        {"output_type": "display_data", "metadata": {"a": 1}, "data": {kind.replace("_", "/"): value for kind, value in data.items()}}
    )
    picture = base64.b64encode(png(9, 9, noise=False)).decode()
    assert list(shown(text_html="<b>", image_png=picture, text_plain="x")["data"]) == ["image/png"]
    assert shown(text_html="<b>", text_plain="x") == {"output_type": "display_data", "metadata": {}, "data": {"text/plain": ["x"]}}
    assert "widget" in shown(**{"application_vnd.jupyter.widget-view+json": {}, "text_plain": "Box()"})["data"]["text/plain"][0]
    rows = shown(text_markdown="| a |\n" * 30)["data"]["text/markdown"]
    assert len(rows) == 22 and rows[-2:] == ["\n", "... 10 more lines are left out"]
    with pytest.raises(tool.Refused, match="text/html"): shown(text_html="<b>", text_plain="<IPython.core.display.HTML object>")
    with pytest.raises(tool.Refused, match="raised ValueError: no"):
        tool.fit_output({"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []})


def test_the_check_refuses_what_the_tool_would_not_store(tool):
    from check_notebooks import stored_faults
    shown = lambda kind, value: "; ".join(stored_faults({"output_type": "display_data", "metadata": {}, "data": {kind: value}}))
    encoded = lambda data: base64.b64encode(data).decode()
    assert "more than 40,000" in shown("image/png", encoded(png(300, 300, noise=True)))
    assert "notes in it (tEXt)" in shown("image/png", encoded(png(9, 9, noise=False)))
    assert "no PNG" in shown("image/png", encoded(b"GIF")) and "not base64" in shown("image/png", "%")
    assert "text of 21 lines" in shown("text/plain", "x\n" * 21) and shown("text/plain", "x\n" * 20) == ""
    assert "only PNG figures and text" in shown("text/html", "<b>")
    assert "an error" in "; ".join(stored_faults({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}))
    assert "execution count" in "; ".join(
        stored_faults({"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": "1"}})
    )


def test_numbers_may_differ_a_little_words_may_not(tool):
    assert (
        tool.same_text("loss 1.000 after 1,500", "loss  1.01 after 1500")
        and not tool.same_text("loss 1.0", "loss 1.1")
        and not tool.same_text("red 1", "blue 1")
    )


def test_modules_are_followed_through_imports(tmp_path, tool):
    from check_notebooks import imported, module_files
    root = repository(tmp_path)
    for name, body in {
        "room/__init__": "",
        "room/a": "from ..words import word",
        "room/b": "from . import a",
        "alone": "import os",
    }.items():
        (root / f"pli/{name}.py").parent.mkdir(exist_ok=True)
        (root / f"pli/{name}.py").write_text(body)
    reached = module_files(notebook("from pli.room import b"), tool.tracked(root), root)
    assert reached == ["pli/__init__.py", "pli/room/__init__.py", "pli/room/a.py", "pli/room/b.py", "pli/words.py"]
    assert imported("from pli.viz import (\n  a,  # first\n  b)\nimport pli.core as c, os", "pli") == {
        "pli.viz",
        "pli.viz.a",
        "pli.viz.b",
        "pli.core",
    }


# ways to fool the check

SHOWS = notebook("1", "print('two')", "#| eval: false\nprint(3)")


@pytest.fixture(scope="module")
def shows(tmp_path_factory) -> Path:
    "Two stored chapters; the first reads results in every way that goes past `open`."
    reads = notebook(
        "import os, subprocess, sys\nfrom pathlib import Path",
        "len(os.read(os.open(Path('../results/a.json'), os.O_RDONLY), 9))",
        "subprocess.run([sys.executable, '-c', 'open(\"../results/b.json\").read()'], check=True).returncode",
        "pid = os.fork()\nif not pid:\n    open('../results/c.json').read(); os._exit(0)\nos.waitpid(pid, 0)[1]",
        "open('../results/d.json', 'a').close()",
    )
    root = repository(tmp_path_factory.mktemp("shows"), **{"01_reads": reads, "02_shows": SHOWS})
    for name in ("b", "c", "d"): (root / f"results/{name}.json").write_text("[1]")
    done = run(root)
    assert done.returncode == 0, done.stdout
    return root


@pytest.mark.parametrize("name", "abc")
def test_a_result_read_past_open_or_by_a_child_is_read_all_the_same(shows, tmp_path, tool, name):
    root = shutil.copytree(shows, tmp_path / "copy")
    (root / f"results/{name}.json").write_text("[2]")
    assert tool.states(tool.tracked(root), root) == {"nbs/01_reads.ipynb": "moved on", "nbs/02_shows.ipynb": "fresh"}


def change_text(cells): cells[1]["outputs"][0]["text"] = ["three\n"]


def move_outputs(cells): cells[0]["outputs"], cells[1]["outputs"] = cells[1]["outputs"], cells[0]["outputs"]


def delete_outputs(cells): cells[1]["outputs"] = []


def add_outputs(cells): cells[2]["outputs"] = cells[1]["outputs"]


def as_one_text(cells): cells[1]["outputs"][0]["text"] = "".join(cells[1]["outputs"][0]["text"])


@pytest.mark.parametrize("how, state", [(change_text, "edited"), (move_outputs, "edited"), (delete_outputs, "edited"), (add_outputs, "edited"), (as_one_text, "fresh")])
def test_outputs_that_somebody_edited_are_refused(shows, tmp_path, tool, how, state):
    from check_notebooks import record_faults
    root = shutil.copytree(shows, tmp_path / "copy")
    nb = read(root, "02_shows")
    how(nb["cells"])
    (root / "nbs/02_shows.ipynb").write_text(json.dumps(nb))
    names = tool.tracked(root)
    assert tool.states(names, root)["nbs/02_shows.ipynb"] == state
    assert bool(list(record_faults({"nbs/02_shows.ipynb": nb}, names, root))) == (state == "edited")
    done = run(root, "--check")
    assert done.returncode == (state == "edited") and ("02_shows.ipynb: its outputs are not those that were stored" in done.stdout) == (state == "edited")
    del nb["metadata"]["pli"]["outputs"]["shown"]                         # as records were before there was such a digest
    (root / "nbs/02_shows.ipynb").write_text(json.dumps(nb))
    assert tool.states(names, root)["nbs/02_shows.ipynb"] == "fresh"


def test_a_record_of_another_notebook_is_refused(shows, tmp_path, tool):
    root = shutil.copytree(shows, tmp_path / "copy")
    nb, other = read(root, "02_shows"), read(root, "01_reads")
    nb["metadata"] = other["metadata"]
    (root / "nbs/02_shows.ipynb").write_text(json.dumps(nb))
    assert tool.states(tool.tracked(root), root)["nbs/02_shows.ipynb"] == "moved on"


@pytest.mark.parametrize("odd, state", [(3, "bare"), ({"outputs": "x"}, "bare"), ({"outputs": {"sources": 3, "reads": 4, "shown": None}}, "moved on"), ({"outputs": []}, "bare")])
def test_an_odd_record_is_a_fault_and_no_traceback(shows, tmp_path, tool, odd, state):
    from check_notebooks import notebook_faults
    root = shutil.copytree(shows, tmp_path / "copy")
    nb = read(root, "02_shows")
    nb["metadata"]["pli"] = odd
    (root / "nbs/02_shows.ipynb").write_text(json.dumps(nb))
    assert tool.states(tool.tracked(root), root)["nbs/02_shows.ipynb"] == state
    assert state == "moved on" or any("metadata hold more" in fault for fault in notebook_faults("nbs/02_shows.ipynb", nb))


def test_a_conflict_and_a_link_are_named(shows, tmp_path):
    root = shutil.copytree(shows, tmp_path / "copy")
    outside = tmp_path / "outside.ipynb"
    outside.write_text(json.dumps(notebook("1")))
    (root / "nbs/03_link.ipynb").symlink_to(outside)
    done = run(root, "nbs/03_link.ipynb")
    assert done.returncode == 1 and "NOT STORED: it is a link" in done.stdout
    assert (root / "nbs/03_link.ipynb").is_symlink() and outside.read_text() == json.dumps(notebook("1"))
    (root / "nbs/03_link.ipynb").unlink()
    (root / "nbs/03_torn.ipynb").write_text("<<<<<<< HEAD\n{}\n")
    done = run(root, "--check")
    assert done.returncode == 1 and done.stderr.strip() == "nbs/03_torn.ipynb: is no notebook; if a merge left conflicts in it, run: nbdev_fix nbs/03_torn.ipynb"

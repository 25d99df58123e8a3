"The frame: settings, build script, exported modules, notebooks and README agree with each other."
import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not re.search(r"/[_.]", path.relative_to(ROOT).as_posix()))
ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = ini["DEFAULT"]


def names(key: str) -> set[str]:
    "The bare package names of a requirements line in settings.ini."
    return {re.match(r"[\w.-]+", word)[0].lower().replace("_", "-") for word in shlex.split(SETTINGS[key])}


@pytest.fixture(scope="module")
def readme_tool() -> dict:
    return runpy.run_path(str(ROOT / "tools" / "readme.py"))


@pytest.fixture(scope="module")
def check_tool() -> dict:
    return runpy.run_path(str(ROOT / "tools" / "check_notebooks.py"))


def run(*args, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)


# requirements and build script

def test_a_plain_install_brings_no_notebook_tooling():
    tooling = {"nbdev", "execnb", "fastcore", "jupyterlab", "jupytext", "nbconvert", "ipykernel", "ipywidgets", "ipython", "notebook", "pytest", "hypothesis", "build"}
    assert not names("requirements") & (tooling | names("dev_requirements"))
    assert {"nbdev", "jupyterlab", "ipywidgets", "jupytext", "nbconvert", "ipykernel", "pytest"} <= names("dev_requirements")


def test_every_promised_package_is_required_somewhere():
    promised = {"torch", "open-clip-torch", "nbdev", "jupyterlab", "matplotlib", "ipywidgets", "fastprogress"}
    assert promised <= names("requirements") | names("dev_requirements")


def test_build_script_says_what_settings_say(monkeypatch):
    said = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **facts: said.update(facts))
    runpy.run_path(str(ROOT / "setup.py"))
    assert (said["name"], said["version"], said["license"]) == (SETTINGS["lib_name"], SETTINGS["version"], "Apache-2.0")
    assert said["python_requires"] == ">=" + SETTINGS["min_python"]
    assert said["install_requires"] == shlex.split(SETTINGS["requirements"])
    assert said["extras_require"] == {name: shlex.split(SETTINGS[f"{name}_requirements"]) for name in ("docs", "dev", "parquet", "studio", "heic", "raw", "lance", "hf", "tensorboard")}
    assert said["entry_points"]["console_scripts"] == ["pli=pli.cli.main:main"]
    assert said["entry_points"]["nbdev"] == ["pli=pli._modidx:d"]
    shipped = {path for pattern in said["package_data"]["pli"] for path in (ROOT / "pli").glob(pattern) if path.is_file()}
    there = {path for path in (ROOT / "pli").rglob("*") if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts}
    assert there == shipped


def test_one_version_and_the_whole_licence():
    assert (ROOT / "pli" / "__init__.py").read_text().strip() == f'__version__ = "{SETTINGS["version"]}"'
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_importing_the_package_is_light():
    done = run("-c", "import sys, pli; print(*sorted({'torch', 'open_clip', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# notebooks and modules

def default_exp(check_tool: dict, path: Path) -> str | None:
    "The module a notebook exports to."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [check_tool["text"](cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = [match[1] for source in sources if (match := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M))]
    return found[0] if found else None


def modules() -> list[str]:
    "All modules below `pli`, such as `core` and `gallery.store`."
    found = (path.relative_to(ROOT / "pli").with_suffix("").as_posix().replace("/", ".") for path in (ROOT / "pli").rglob("*.py"))
    return sorted(name for name in found if not name.endswith(("__init__", "_modidx")))


def test_every_chapter_has_its_module_and_every_module_its_chapter(check_tool):
    wanted = [name for path in NOTEBOOKS if (name := default_exp(check_tool, path))]
    assert len(wanted) == len(set(wanted)), "two chapters export to one module"
    assert set(wanted) == set(modules())


def test_modules_are_what_the_notebooks_export(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for package in (ROOT / "pli").rglob("__init__.py"):
        (tmp_path / package.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(package, tmp_path / package.relative_to(ROOT))
    done = run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    texts = lambda root: {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in (root / "pli").rglob("*.py")}
    fresh, committed = texts(tmp_path), texts(ROOT)
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"{stale} differ from the notebooks: edit the notebooks, then nbdev_export"


def test_exported_code_imports_by_name():
    for path in (ROOT / "pli").rglob("*.py"):
        stars = [node.module for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        assert not stars, f"{path.name} imports everything from {stars}"


# README

def test_readme_has_exactly_two_commands_of_one_line(readme_tool):
    found = readme_tool["commands"]((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(found) == ["demo", "test"]
    assert found["demo"].endswith("pli demo") and found["test"].endswith("pytest -q -n 2") and "nbdev_test" in found["test"]


def test_readme_is_what_the_index_says():
    done = run("tools/readme.py", "--check")
    assert done.returncode == 0, done.stderr


def test_readme_tool_shows_code_outputs_and_pictures_and_moves_links(readme_tool):
    code = lambda source, *outputs: {"cell_type": "code", "source": source, "outputs": list(outputs)}
    words = {"output_type": "execute_result", "data": {"text/plain": ["0.5"]}}
    picture = {"output_type": "display_data", "data": {"image/png": "aGVsbG8=\n", "text/plain": "<Figure size 100x100>"}}
    nb = {"cells": [
        {"cell_type": "markdown", "source": ["# Title\n", "[chapter](03_masking.ipynb#what) ![](../results/a.png) [out](https://example.org/x) [here](#title)\n", "```md\n[as](it.is)\n```"]},
        {"cell_type": "raw", "source": "---\nhidden: true\n---"},
        code("#| hide\nimport secret"),
        code("1 / 2", words),
        code("#| echo: false\n#| fig-alt: 'Two curves'\ndraw()", picture, {"output_type": "stream", "name": "stderr", "text": "warning"}),
    ]}
    readme, pictures = readme_tool["render"](nb)
    assert "[chapter](nbs/03_masking.ipynb#what) ![](results/a.png) [out](https://example.org/x) [here](#title)" in readme
    assert "[as](it.is)" in readme and "hidden" not in readme and "secret" not in readme and "warning" not in readme and "draw()" not in readme
    assert "```python\n1 / 2\n```\n\n```text\n0.5\n```" in readme
    assert "![Two curves](README_files/figure-1.png)" in readme and pictures == {"README_files/figure-1.png": b"hello"}


@pytest.mark.parametrize("body", ["one\ntwo\n", ""])
def test_a_marked_command_is_one_line(readme_tool, body):
    with pytest.raises(SystemExit, match="one line"):
        readme_tool["commands"](f"<!-- command: demo -->\n```sh\n{body}```\n")


@pytest.mark.parametrize("text", ["<!-- command: demo -->\nwords\n```sh\none\n```\n", "<!-- command: demo -->\n```sh\none\n```\n" * 2])
def test_a_marker_without_its_block_or_twice_is_refused(readme_tool, text):
    with pytest.raises(SystemExit, match="README.md"):
        readme_tool["commands"](text)


# the notebooks' own check

def notebook(*cells, **metadata) -> dict:
    return {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def cell(source: str, id: str, count=None, *outputs) -> dict:
    return {"cell_type": "code", "source": source, "id": id, "execution_count": count, "outputs": list(outputs), "metadata": {}}


def test_dirty_chapters_are_found_and_mended(check_tool):
    shown = {"output_type": "execute_result", "data": {"text/plain": "1"}}
    nb = notebook(cell("#| default_exp core", "0123abcd"), cell("1", "0123abcd", 3, shown), cell("2", "c0ffee00-long-id"), widgets={})
    found = "\n".join(check_tool["notebook_faults"]("nbs/gallery/09_encode.ipynb", nb))
    for fault in ("metadata", "same id", "execution count", "outputs", "8 hex digits"): assert fault in found
    check_tool["fix"]("nbs/gallery/09_encode.ipynb", nb)
    assert list(check_tool["notebook_faults"]("nbs/gallery/09_encode.ipynb", nb)) == []
    assert nb["cells"][0]["id"] == "0123abcd"


def test_an_open_conflict_is_found(check_tool):
    marker = {"cell_type": "markdown", "source": ["`<<<<<<< HEAD`"], "id": "0123abcd", "metadata": {}}
    assert "conflict" in "\n".join(check_tool["notebook_faults"]("nbs/03_masking.ipynb", notebook(marker, **check_tool["METADATA"])))


def test_shown_notebooks_keep_outputs_that_others_can_repeat(check_tool):
    good = {"output_type": "execute_result", "data": {"text/plain": "1"}}
    bad = {"output_type": "stream", "name": "stdout", "text": ["/home/", "me/pictures\n"]}
    nb = notebook(cell("1", "0123abcd", None, good), cell("2", "0123abce", None, bad))
    check_tool["fix"]("nbs/tutorials/shop.ipynb", nb)
    assert nb["cells"][0]["outputs"] == [good]
    assert len(list(check_tool["notebook_faults"]("nbs/tutorials/shop.ipynb", nb))) == 1


def test_the_notebooks_here_are_fit_for_git():
    done = run("tools/check_notebooks.py")
    assert done.returncode == 0, done.stderr

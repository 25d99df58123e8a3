"What a visitor sees first: a short README whose commands are read by the program, documents that say what the package says, no placeholder."
import importlib
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
from PIL import Image

from pli.cli.main import make_parser
from pli.cli.tune import tune_settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACEHOLDER = re.compile(r"example\.github\.io|github\.com/example|pli[@]example")
ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
FENCE = re.compile(r"^(`{3,})(.*?)\n(.*?)^\1", re.M | re.S)


def markdown_of(name: str) -> str:
    "A document, or a notebook's markdown cells."
    text = (ROOT / name).read_text(encoding="utf-8")
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown") if name.endswith(".ipynb") else text


def typed(name: str) -> list[str]:
    "The `pli` commands in the blocks of a document."
    return [line for _, language, block in FENCE.findall(markdown_of(name)) if language == "sh" for line in block.splitlines() if line.startswith("pli ")]


def test_readme_is_short_and_shows_what_comes_back():
    assert len(README.splitlines()) <= 100
    rows = [block.splitlines()[2:] for block in README.split("\n\n") if block.startswith("| ")]
    assert len(rows) == 2 and len(rows[0]) <= 5                                  # the results, then the map of chapters
    assert "no published number has been reproduced" in README.split("\n\n| ")[0].splitlines()[-1]   # directly above them
    strip = ROOT / "results" / "strip.png"
    assert "(results/strip.png)" in README and strip.stat().st_size <= 100_000 and Image.open(strip).width >= 700


def test_places_in_the_strip_are_what_is_stored():
    strip = json.loads((ROOT / "results" / "strip.json").read_text(encoding="utf-8"))
    for model, place in strip["place"].items():
        shown = [number for number, name in enumerate(strip["found"][model], 1) if name in strip["right"]]
        assert shown[:1] == [place] if shown else place > len(strip["found"][model])


@pytest.mark.parametrize("name", ["README.md", "nbs/tutorials/command_line.ipynb"])
def test_commands_are_read_by_the_program(name):
    assert len(typed(name)) >= 3
    for line in typed(name):
        args = make_parser().parse_args(shlex.split(line)[1:])
        if shlex.split(line)[1] == "tune": tune_settings(args)


def test_verdicts_use_two_words():
    known = r"significant|not significant"
    bullets = [line for line in README.splitlines() if line.startswith("- `")]
    assert bullets and all(re.fullmatch(rf"- `[^`]+`: (\w+ [-+.\d]+ \[[-+.\d]+, [-+.\d]+\], ({known})(; |\.))+", line) for line in bullets)
    for name in ("README.md", "results/study/lines.md"): assert not re.search(r"luck|to be told|is right\b|is wrong\b", markdown_of(name))


def test_the_map_of_chapters_has_each_once_in_reading_order(tmp_path):
    tool = runpy.run_path(str(ROOT / "tools" / "readme.py"))
    headings = {"00_core": "Core: words", "hiding/03_views": "Views", "hiding/03a_patches": "Patches | squares", "04_composition": "Composition", "99_new": "New",
                "tutorials/first": "First", "tutorials/results": "Results", "other/98_odd": "Odd", "_draft": "Draft", "index": "pli"}
    for name, heading in headings.items():
        path = tmp_path / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [f"# {heading}\n", "> more"]}]}))
    assert tool["chapter_map"](tmp_path).splitlines()[2:] == [
        "| what came out | [Results](nbs/tutorials/results.ipynb) · [First](nbs/tutorials/first.ipynb) |", "| ground | [00 Core](nbs/00_core.ipynb) |",
        r"| what is hidden | [03 Views](nbs/hiding/03_views.ipynb) · [03a Patches \| squares](nbs/hiding/03a_patches.ipynb) |",
        "| queries and losses | [04 Composition](nbs/04_composition.ipynb) |", "| `99_new` | [99 New](nbs/99_new.ipynb) |", "| `other` | [98 Odd](nbs/other/98_odd.ipynb) |"]
    everything = [path for path in (ROOT / "nbs").rglob("*.ipynb") if path.name != "index.ipynb" and not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)]
    links = re.findall(r"\]\((nbs/[^)]+)\)", tool["chapter_map"]())
    assert sorted(links) == sorted(path.relative_to(ROOT).as_posix() for path in everything)


# placeholders

def test_placeholders_stand_where_nbdev_demands_them_and_nowhere_else():
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    named = {name for name in names if PLACEHOLDER.search((ROOT / name).read_text(encoding="utf-8", errors="ignore"))}
    assert named <= {"settings.ini", "pli/_modidx.py"}
    assert not named or "WHOEVER PUBLISHES" in (ROOT / "settings.ini").read_text(encoding="utf-8")


def test_metadata_of_the_wheel_show_no_placeholder(tmp_path):
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pli").mkdir()
    shutil.copy(ROOT / "pli" / "__init__.py", tmp_path / "pli")
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as make; print(make('out'))"
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metadata = next((tmp_path / "out").rglob("METADATA")).read_text(encoding="utf-8")
    assert "Name: pli" in metadata and not PLACEHOLDER.search(metadata) and not re.search(r"^(Home-page|Author-email|Project-URL):", metadata, re.M)


# documents

def test_documents_are_in_the_source_archive_and_their_links_lead_somewhere():
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    for name in ("CONTRIBUTING.md", "HOUSE_STYLE.md", "CHANGELOG.md", "CITATION.cff", "results/strip.png"): assert name in manifest
    for name in ("CONTRIBUTING.md", "HOUSE_STYLE.md", "CHANGELOG.md", "nbs/glossary.md", "nbs/tutorials/results.ipynb", "nbs/tutorials/command_line.ipynb"):
        for link in re.findall(r"\]\(([^)#\s]+)", markdown_of(name)):
            assert re.match("https?:", link) or (ROOT / name).parent.joinpath(link).exists(), (name, link)


def test_the_citation_says_what_the_settings_say():
    said = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    settings = ini["DEFAULT"]
    assert (said["cff-version"], said["type"], said["version"], said["license"]) == ("1.2.0", "software", settings["version"], "Apache-2.0")
    assert said["message"] and said["title"] and said["authors"] == [{"name": "The pli authors"}] and settings["author"] == "The pli authors"
    assert all(each["type"] in ("article", "software") and each["title"] and each["authors"] for each in said["references"])
    assert "https://arxiv.org/abs/2311.07622" in [each.get("url") for each in said["references"]]
    assert settings["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_contributing_has_a_recipe_for_each():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in ("loss", "method", "backbone", "pair source", "figure", "option", "benchmark"): assert re.search(rf"^### An? {name}$", text, re.M), name
    tests = (ROOT / "tests" / "test_contributing.py").read_text(encoding="utf-8")
    for name in ("loss", "backbone", "pair_source", "figure", "option", "benchmark"): assert re.search(rf"def test_an?_{name}\(", tests), name


def test_python_in_prose_names_what_is_there():
    "Every import from this package in a fenced example, wherever it is printed, can be typed."
    texts = {path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("nbs/*.md"), *ROOT.glob("docs/*.md")]}
    for path in ROOT.glob("nbs/**/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = [(path, *line) for path, text in texts.items() for line in re.findall(r"^from (pli[\w.]*) import ([\w, ]+)", text, re.M)]
    assert found
    for path, module, names in found:
        there = importlib.import_module(module)
        for name in names.split(","): assert hasattr(there, name.strip()), (path.name, module, name)

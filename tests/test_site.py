"The documentation site: order of pages, links, what is hidden, the reference; a small site is built where Sphinx is there."
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site():
    "The tool as a module."
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import build_site
        yield build_site
    finally: sys.path.remove(str(ROOT / "tools"))


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "id": "0123abcd", "metadata": {}, "execution_count": None, "source": source, "outputs": list(outputs)}


def prose(source: str) -> dict:
    return {"cell_type": "markdown", "id": "0123abce", "metadata": {}, "source": source}


def notebook(*cells: dict) -> dict:
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def repository(folder: Path, front: str = "# pli\n\n[first](chapter:03)\n", **more: str) -> Path:
    "A small repository: two chapters, one of them in a room, an index, a tutorial, a module."
    chapter = notebook(
        prose("# Masks\n> What is hidden.\n\n$\\log n$ of `hide`, see [the loss](methods/05_loss.ipynb#why) and `x[0](y)`."),
        code("#| default_exp masking"),
        code("#| hide\nsecret"),
        code("#| export\nvisible = 1"),
    )
    files = {
        "settings.ini": "[DEFAULT]\ntitle = pli\nlib_path = pli\nauthor = us\ncopyright = us\nversion = 1\n",
        "docs/index.md": front,
        "docs/site.css": "",
        "nbs/index.ipynb": json.dumps(notebook(prose("# pli\n\n[masks](03_masking.ipynb) ![](../results/a.png)"))),
        "nbs/03_masking.ipynb": json.dumps(chapter),
        "nbs/methods/05_loss.ipynb": json.dumps(notebook(prose("# Loss\n\n## Why\n[back](../03_masking.ipynb)"))),
        "nbs/tutorials/study.ipynb": json.dumps(notebook(prose("# Study"))),
        "pli/masking.py": "__all__ = ['hide']\n\ndef hide(\n    view: int,  # what is seen\n    share: float = 0.5,\n"
        "    # first line,\n    # second line\n    last=None,\n) -> int:  # what is left\n    \"Hide it.\"\n",
        "results/a.png": "",
    } | more
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
    return folder


# order

def test_numbers_give_the_order_and_rooms_stand_where_their_first_chapter_stands(site):
    names = [
        "nbs/methods/05b_inversion.ipynb",
        "nbs/10_late.ipynb",
        "nbs/05_losses.ipynb",
        "nbs/methods/05a_masked.ipynb",
        "nbs/06_data.ipynb",
        "nbs/methods/07_more.ipynb",
        "nbs/index.ipynb",
        "nbs/glossary.md",
        "nbs/tutorials/study.ipynb",
    ]
    assert site.contents(names) == [
        ("", ["nbs/05_losses.ipynb"]),
        ("methods", ["nbs/methods/05a_masked.ipynb", "nbs/methods/05b_inversion.ipynb", "nbs/methods/07_more.ipynb"]),
        ("", ["nbs/06_data.ipynb"]),
        ("", ["nbs/10_late.ipynb"]),
    ]


def test_drafts_are_no_pages(site, tmp_path):
    for name in ("01_a.ipynb", "_02_draft.ipynb", ".ipynb_checkpoints/01_a.ipynb", "room/03_b.ipynb", "glossary.md"):
        (tmp_path / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nbs" / name).touch()
    assert site.pages(tmp_path) == ["nbs/01_a.ipynb", "nbs/glossary.md", "nbs/room/03_b.ipynb"]


def test_every_page_here_has_its_place(site):
    names = site.pages(ROOT)
    filed = [name for _, inside in site.contents(names) for name in inside]
    numbered = [name for name in names if site.number(name)[0] < 10_000]
    assert sorted(filed) == sorted(numbered) and len(filed) == len(set(filed)) > 20


# links

def links_of(site, root: Path):
    return site.Links(root, site.pages(root))


@pytest.mark.parametrize(
    "page, target, wanted",
    [
        ("nbs/03_masking.ipynb", "methods/05_loss.ipynb#why", "methods/05_loss.ipynb#why"),
        ("nbs/03_masking.ipynb", "chapter:05", "methods/05_loss.ipynb"), ("nbs/03_masking.ipynb", "chapter:07", "07a_first.ipynb"),
        ("nbs/methods/05_loss.ipynb", "tutorial:study#a", "../tutorials/study.ipynb#a"),
        ("nbs/03_masking.ipynb", "../README.md#a", "index.ipynb#a"),
        ("nbs/03_masking.ipynb", "https://example.org/a.ipynb", "https://example.org/a.ipynb"),
        ("nbs/03_masking.ipynb", "#here", "#here"),
    ],
)
def test_links_hold_in_the_site(site, tmp_path, page, target, wanted):
    links = site.Links(tmp_path, [*site.pages(repository(tmp_path)), "nbs/07b_second.ipynb", "nbs/07a_first.ipynb"])
    assert links.rewrite(page, f"see [this]({target}).") == f"see [this]({wanted})." and links.broken == []


@pytest.mark.parametrize(
    "target, why",
    [
        ("04_gone.ipynb", "not there"),
        ("../../outside.md", "not there"),
        ("methods", "a folder"),
        ("chapter:77", "no page is"),
        ("tutorial:none", "no page is"),
    ],
)
def test_a_broken_link_is_found(site, tmp_path, target, why):
    links = links_of(site, repository(tmp_path))
    links.rewrite("nbs/03_masking.ipynb", f"[this]({target})")
    assert len(links.broken) == 1 and why in links.broken[0] and "nbs/03_masking.ipynb" in links.broken[0]


def test_code_is_no_link_and_files_are_brought_along(site, tmp_path):
    links = links_of(site, repository(tmp_path))
    said = "`[a](gone.md)` ``b ` [c](gone.md)``\n```md\n[d](gone.md)\n```\n![](../results/a.png) <img src=\"../results/a.png\">"
    assert links.rewrite("nbs/03_masking.ipynb", said) == said
    assert links.broken == [] and links.files == {"results/a.png"}


def test_no_page_here_has_a_broken_link(site, tmp_path):
    site.lay_out(ROOT, tmp_path / "source")


def test_a_broken_link_ends_the_build_before_sphinx_begins(site, tmp_path):
    root = repository(tmp_path / "repository", front="# pli\n[a](nbs/gone.ipynb)\n")
    with pytest.raises(SystemExit, match="index.md links to nbs/gone.ipynb"): site.lay_out(root, tmp_path / "source")


# cells

def test_hidden_cells_and_directives_are_not_shown(site):
    for hidden in ("#| hide\n1", "#| default_exp a", "#|hide\n1", "#| include: false\n1", "#| export\n"):
        assert site.shown_cell(code(hidden)) is None
    assert site.shown_cell(code("#| export\n#| slow\n\na = 1  #| no directive"))["source"] == "a = 1  #| no directive"
    shown = site.shown_cell(code("#| hide_input\n#| fig-alt: 'Two curves'\ndraw()"))
    assert shown["metadata"] == {"tags": ["remove-input"], "mystnb": {"image": {"alt": "Two curves"}}}


def test_one_form_of_an_output_is_shown_and_warnings_are_not(site):
    outputs = [
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<b>", "text/plain": "b", "image/png": "aaaa"}},
        {"output_type": "stream", "name": "stderr", "text": "careful"},
    ]
    assert [out["data"] for out in site.shown_cell(code("1", *outputs))["outputs"]] == [{"image/png": "aaaa"}]


def test_facts_stand_under_the_title(site, tmp_path):
    nb = notebook(prose("# Title\n> One sentence,\n> in two lines.\n\nMore."), prose("# Another"))
    shown = [cell["source"] for cell in site.shown_notebook(nb, "nbs/01_a.ipynb", links_of(site, tmp_path), "FACTS")["cells"]]
    assert shown == ["# Title\n> One sentence,\n> in two lines.\n\nFACTS\n\nMore.", "# Another"]


# reference

def test_the_reference_reads_comments_behind_and_above_parameters(site, tmp_path):
    page, known = site.reference(
        "pli.masking", (repository(tmp_path) / "pli/masking.py").read_text(), "nbs/03_masking.ipynb", "03 · Masks"
    )
    assert "hide(view, share=0.5, last=None)" in page and "Hide it." in page and "[03 · Masks](../nbs/03_masking.ipynb)" in page
    for row in (
        "| `view` | `int` | what is seen |",
        "| `share` | `float` |  |",
        "| `last` |  | first line, second line |",
        "| *returns* | `int` | what is left |",
    ):
        assert row in page
    assert known["hide"] == "pli.masking.hide"


def test_words_in_angle_brackets_are_no_tags(site):
    source = '__all__ = ["f"]\ndef f(x: int,   # a <script>alert(1)</script>\n) -> int:   # `a<b`\n    "Move <OLD> to `<NEW>`, see <https://a.example>."\n'
    page, _ = site.reference("pli.a", source, None, "")
    assert "<script" not in page and "&lt;script>" in page and "Move &lt;OLD> to `<NEW>`, see <https://a.example>." in page and "`a<b`" in page


def test_classes_show_fields_and_public_methods(site):
    source = (
        '__all__ = ["A", "B", "N"]\nN: dict[str, int] = {}  # by name\n@dataclass(frozen=True)\nclass A:\n    "A record."\n'
        '    x: int | None = None  # one\n    _y: int = 0\n'
        '    def go(self, far: "A") -> None: "Go."\n    def _no(self): pass\n    @property\n    def wide(self) -> int: "How wide."\n'
        'class B(A):\n    def __init__(self, z: int): pass\n'
    )
    page, known = site.reference("pli.a", source, None, "")
    assert "{py:class} A(x=None)" in page and "| `x` | `int \\| None` | one |" in page and "_y" not in page and "_no" not in page
    assert "{py:method} go(far)" in page and "| `far` | `A` |" in page and "{py:property} wide" in page and "gives `int`" in page
    assert (
        "{py:class} B(z)" in page
        and "A kind of `A`." in page
        and "{py:data} N" in page
        and "by name" in page
        and known["A.go"] == "pli.a.A.go"
    )


def test_every_public_name_here_is_in_the_reference(site):
    for module, source in site.modules(ROOT, "pli").items():
        page, known = site.reference(module, source, None, "")
        assert [name for name in site.public(__import__("ast").parse(source)) if name not in known] == [], module


# the whole, where Sphinx is there

@pytest.fixture
def sphinx():
    "Skips where the packages of the site are not installed: CI builds the whole site in an environment of its own."
    for name in ("sphinx", "myst_nb", "pydata_sphinx_theme", "ziamath"): pytest.importorskip(name)


def test_formulas_become_mathml(site):
    pytest.importorskip("docutils.utils.math.latex2mathml")
    drawn = site.mathml(r"\log n + \exp(x) \dots", False)
    assert drawn.startswith("<math") and ">log</mo>" in drawn and "…" in drawn


def test_a_small_site_is_built(site, sphinx, tmp_path):
    told = site.build(repository(tmp_path / "repository"), tmp_path / "site")
    page = (tmp_path / "site/nbs/03_masking.html").read_text()
    assert (
        "secret" not in page
        and "visible" in page
        and "<math" in page
        and "api/pli.masking.html#pli.masking.hide" in page
        and "pages" in told
    )
    assert "what is seen" in (tmp_path / "site/api/pli.masking.html").read_text() and (tmp_path / "site/external-links.txt").is_file()


def test_a_link_to_a_heading_that_is_not_there_fails(site, sphinx, tmp_path):
    root = repository(tmp_path / "repository", front="# pli\n\n[a](nbs/03_masking.ipynb#gone)\n")
    with pytest.raises(SystemExit, match="gone"): site.build(root, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_another_folder_is_not_overwritten(site, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="holds something else"): site.build(ROOT, tmp_path)
    assert (tmp_path / "mine.txt").exists()

"The house: arrows between modules point down only, chapters can be read in one sitting, and a public name means one thing."
import ast
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

import pli

PACKAGE = Path(pli.__file__).parent
BOOKS = Path(__file__).parents[1] / "nbs"
LAYERS = (
    {"core", "settings"},
    {"world", "composition", "losses", "metrics", "drawing", "hiding", "backbones", "data"},
    {"methods", "gallery"},
    {"training", "benchmarks"},
    {"evaluation", "viz"},
    {"studies", "demo", "studio"},
    {"cli"},
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in ("_modidx.py", "__init__.py")]
CHAPTERS = [path for path in sorted(BOOKS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts and path.parent.name != "tutorials" and path.stem != "index"]
MOST_WORDS, MOST_EXPORTED = 6500, 35


def imports(path: Path) -> set[str]:
    "Modules of this package that one imports, wherever in its text, as `room.module`."
    found, parts = set(), path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): found |= {alias.name.removeprefix("pli.") for alias in node.names if alias.name.startswith("pli.")}
        if not isinstance(node, ast.ImportFrom): continue
        above = ["pli", *parts][: -node.level] if node.level else []
        words = [*above, *filter(None, (node.module or "").split("."))]
        if words[:1] != ["pli"]: continue
        for alias in node.names:
            longer = [*words[1:], alias.name]
            if PACKAGE.joinpath(*longer).with_suffix(".py").is_file(): found.add(".".join(longer))
            elif PACKAGE.joinpath(*words[1:]).with_suffix(".py").is_file(): found.add(".".join(words[1:]))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_arrows_point_down(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert room in LAYER_OF, f"{room}: a new room needs a layer"
    up = [name for name in imports(path) if LAYER_OF[name.split(".")[0]] > LAYER_OF[room]]
    assert not up, f"{path.name} is in layer {LAYER_OF[room] + 1} and imports {', '.join(sorted(up))} from above"


def test_modules_do_not_import_each_other_in_circles():
    graph = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports_at_once(path) for path in MODULES}
    while graph:
        ends = [name for name, others in graph.items() if not others & graph.keys()]
        assert ends, f"a circle among {', '.join(sorted(graph))}"
        for name in ends: del graph[name]


def imports_at_once(path: Path) -> set[str]:
    "What a module imports as it is imported itself, not in the body of a function."
    tree = ast.parse(path.read_text())
    late = {name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for name in ast.walk(node) if isinstance(name, (ast.Import, ast.ImportFrom))}
    found, parts = set(), path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in late: continue
        words = [*(["pli", *parts][: -node.level] if node.level else []), *filter(None, (node.module or "").split("."))]
        if words[:1] != ["pli"]: continue
        for alias in node.names:
            for longer in ([*words[1:], alias.name], words[1:]):
                if longer and PACKAGE.joinpath(*longer).with_suffix(".py").is_file(): found.add(".".join(longer)); break
    return found - {".".join(parts)}


def public(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__": return ast.literal_eval(node.value)
    return []


def test_a_public_name_means_one_thing():
    where = defaultdict(list)
    for path in MODULES:
        for name in public(path): where[name].append(path.relative_to(PACKAGE).as_posix())
    assert not {name: paths for name, paths in where.items() if len(paths) > 1}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_can_be_read_in_one_sitting(path):
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    words, exported = sum(len(source.split()) for source in sources), sum(bool(re.search(r"^#\|\s*export", source, re.M)) for source in sources)
    assert words <= MOST_WORDS, f"{path.stem} has {words} words: what is more than {MOST_WORDS} is a chapter of its own"
    assert exported <= MOST_EXPORTED, f"{path.stem} exports {exported} cells: what is more than {MOST_EXPORTED} is a chapter of its own"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_says_its_module_and_its_topic(path):
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    said = re.search(r"^#\|\s*default_exp (\S+)", "\n".join(sources), re.M)
    assert said and PACKAGE.joinpath(*said[1].split(".")).with_suffix(".py").is_file()
    assert path.relative_to(BOOKS).parts[:-1] == tuple(said[1].split(".")[:-1])             # its folder is its module's
    first = next(source for source, cell in zip(sources, cells) if cell["cell_type"] == "markdown")
    assert re.match(r"# .+\n+> .+", first)                                                  # a title, and one sentence below
    assert re.match(r"\d\d[a-z]?_", path.stem)

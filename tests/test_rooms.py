"The house: arrows between modules point down only, chapters can be read in one sitting, and a public name means one thing."
import ast
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import pli
from pli.studies.data import imported_modules

PACKAGE = Path(pli.__file__).parent
BOOKS = Path(__file__).parents[1] / "nbs"
LAYERS = (
    {"core", "settings"},
    {"world", "composition", "losses", "metrics", "drawing", "distributed", "hiding", "backbones", "data"},
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


def named(words: list[str]) -> str | None:
    "What `pli.room.module.name` imports: the module, or a room or package as it is said; None for what is not of this package."
    if words[:1] != ["pli"] or len(words) < 2: return None
    for end in range(len(words), 1, -1):
        here = PACKAGE.joinpath(*words[1:end])
        if here.with_suffix(".py").is_file() or here.is_dir(): return ".".join(words[1:end])
    return None


def imported_by(nodes, path: Path) -> set[str]:
    """Modules of this package that statements and calls import, as `room.module`, or `room` for all of it: by `import`, `from`, a star, a
    relative name, `import_module` and `__import__` with a text, and as an attribute of `pli`.
    """
    found, own = [], ["pli", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in nodes:
        if isinstance(node, ast.Import): found += [alias.name.split(".") for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            words = [*(own[: -node.level] if node.level else []), *filter(None, (node.module or "").split("."))]
            found += [[*words, *([] if alias.name == "*" else [alias.name])] for alias in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            said = next((arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)), None)
            assert said, f"{path.name}, line {node.lineno}: imports what only a run tells; name the module"
            level = len(said) - len(said.lstrip("."))
            found.append([*(own[:-level] if level else []), *filter(None, said.split("."))])
        if isinstance(node, ast.Attribute): found.append(ast.unparse(node).split("."))
    return {name for name in map(named, found) if name}


def imports(path: Path) -> set[str]:
    "Modules of this package that one imports, wherever in its text, as `room.module`."
    return imported_by(ast.walk(ast.parse(path.read_text())), path)


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
    late = {name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for name in ast.walk(node)}
    found = imported_by((node for node in ast.walk(tree) if node not in late), path)
    return found - {".".join(path.relative_to(PACKAGE).with_suffix("").parts)}


UP = (
    "from ..cli.main import main", "from pli.cli import main", "import pli.cli.main as other", "from pli import cli", "from .. import cli", "from ..cli import *",
    "def f():\n    from ..cli.main import main", "if TYPE_CHECKING:\n    from ..cli.main import main", "import importlib\nimportlib.import_module('pli.cli.main')",
    "from importlib import import_module\nimport_module('..cli.main', __package__)", "__import__('pli.cli.main')", "import pli\npli.cli.main.main()",
)


@pytest.mark.parametrize("text", UP)
def test_no_way_to_import_goes_unseen(text, tmp_path, monkeypatch):
    module = tmp_path / "data" / "other.py"
    for place in (module, tmp_path / "cli" / "main.py"): place.parent.mkdir(); place.write_text("")
    module.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert {name.split(".")[0] for name in imports(module)} == {"cli"}
    assert bool(imports_at_once(module)) == (not text.startswith("def"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_digest_of_a_study_sees_the_same_imports(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    seen = {each for each in imports(path) if PACKAGE.joinpath(*each.split(".")).with_suffix(".py").is_file()}
    assert seen == imported_modules(name)


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

#!/usr/bin/env python3
"""Build the documentation site from the chapters as they are stored: nothing is executed, nothing is fetched, and a broken link fails.

python tools/build_site.py              into `_site/`: open `_site/index.html`, from a folder or from any server
python tools/build_site.py --out DIR    into another folder, which must be empty or an earlier site

Needs the packages of `docs_requirements` in settings.ini (`pip install -e ".[docs]"`), and neither torch nor `pli`: in an environment of
its own, `python tools/build_site.py --requirements | pip install -r /dev/stdin` is enough. Pages are found, not listed: every notebook
and Markdown file below `nbs/` that is no draft. Numbers give the reading order; a folder is a room, and stands where the smallest number
in it stands, with its chapters inside in their own order, so that the contents stay short enough to be read. `docs/index.md` is the first
page; there `chapter:03` stands for the page whose file begins with that number (or with 03a, if none does), wherever it lies, and
`tutorial:study` for that tutorial.

Left out of a page, as in the chapters themselves: cells with `#| hide` or `#| default_exp`, the input of `#| hide_input`, and lines of
directives. Every public name (`__all__`) has an entry in the reference, with its signature, its docstring and a table of its parameters,
which is read from the comments behind them; a name in backquotes anywhere leads there. Formulas become MathML, which browsers draw
themselves. External links are not tried; `external-links.txt` in the site lists them with the pages that hold them.
"""
import argparse
import ast
import importlib.util
import io
import json
import posixpath
import re
import shlex
import shutil
import sys
import tempfile
import tokenize
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = ".made-by-build-site"
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[^\n]*\n.*?^[ \t]*\2[ \t]*$", re.M | re.S)
CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\s*\n).)*?(?<!`)\1(?!`)", re.S)
LINK = re.compile(r"(?P<before>\]\(\s*<?|\b(?:src|href)=\")(?P<target>[^)\s\">]+)")
DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)")
NUMBERED = re.compile(r"(\d+)([a-z]*)[_-]")
APART = ("tutorials",)


# pages and their order

def pages(root: Path) -> list[str]:
    "Notebooks and Markdown files below `nbs` that are no drafts, as paths from the root."
    found = (path.relative_to(root).as_posix() for ending in ("ipynb", "md") for path in (root / "nbs").rglob(f"*.{ending}"))
    return sorted(name for name in found if not any(part.startswith(("_", ".")) for part in name.split("/")))


def number(name: str) -> tuple:
    "The place of a page in reading order: its number, then its letter; pages without one come last, by name."
    match = NUMBERED.match(posixpath.basename(name))
    return (int(match[1]), match[2], name) if match else (10_000, "", name)


def room(name: str) -> str:
    "The folder of a page as seen from `nbs`; empty for a page that lies in none."
    return posixpath.dirname(name).removeprefix("nbs").lstrip("/")


def contents(names: list[str]) -> list[tuple[str, list[str]]]:
    "Chapters in reading order as (room, its pages): a room stands where its smallest number stands, a page without a room by itself."
    chapters = [name for name in names if number(name)[0] < 10_000 and room(name).split("/")[0] not in APART]
    rooms: dict[str, list[str]] = {}
    for name in sorted(chapters, key=number): rooms.setdefault(room(name) or name, []).append(name)
    return [(room(inside[0]), inside) for inside in rooms.values()]


def text(value) -> str:
    "Notebooks store text as one string or as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def opening(source: str) -> tuple[str, str]:
    "Title and one-sentence summary of a page: its first heading, and the quote under it."
    title = re.search(r"^#\s+(.+?)\s*$", source, re.M)
    summary = re.search(r"^#\s+.+\n+((?:>.*\n?)+)", source, re.M)
    return title[1] if title else "", " ".join(re.sub(r"^>\s?", "", line) for line in summary[1].strip().split("\n")) if summary else ""


def markdown_of(root: Path, name: str) -> str:
    "All Markdown of a page."
    source = (root / name).read_text(encoding="utf-8")
    if name.endswith(".md"): return source
    return "\n\n".join(text(cell["source"]) for cell in json.loads(source)["cells"] if cell["cell_type"] == "markdown")


# links

def outside_code(markdown: str, change) -> str:
    "Markdown with `change` made to all that is no code."
    kept = []
    hide = lambda match: kept.append(match[0]) or f"\0{len(kept) - 1}\0"
    changed = change(CODE.sub(hide, FENCE.sub(hide, markdown)))
    while "\0" in changed: changed = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], changed)
    return changed


def local(target: str) -> bool:
    "Does a link lead to a file of this repository?"
    return not re.match(r"[a-z][a-z+.-]*:|[#/]", target, re.I)


class Links:
    "Rewrites links of pages so that they hold in the site, and collects the files they need, and those that lead nowhere."

    def __init__(self, root: Path, names: list[str], start: str = "nbs/index.ipynb"):
        self.root, self.names, self.start = root, names, start
        self.files: set[str] = set()
        self.broken: list[str] = []

    def named(self, page: str, target: str) -> str | None:
        "The page that `chapter:03` or `tutorial:study` stands for."
        kind, _, key = target.partition(":")
        key, _, anchor = key.partition("#")
        stem = lambda name: posixpath.splitext(posixpath.basename(name))[0]
        fits = {
            "chapter": lambda name: number(name)[0] < 10_000 and "{:02}{}".format(*number(name)) == key,
            "tutorial": lambda name: room(name) in APART and stem(name) == key,
            "page": lambda name: stem(name) == key and number(name)[0] == 10_000,
        }[kind]
        found = [name for name in self.names if fits(name)]
        if kind == "chapter" and not found and key.isdigit():  # cut into 03a, 03b and so on: the first of them
            found = sorted((name for name in self.names if number(name)[0] == int(key)), key=number)[:1]
        if len(found) != 1:
            return self.broken.append(f"{page} names {target}, which {'no page is' if not found else 'are: ' + ', '.join(found)}")
        return posixpath.relpath(found[0], posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")

    def moved(self, page: str, target: str) -> str:
        "The target as it is in the site."
        if re.match(r"(chapter|tutorial|page):", target): return self.named(page, target) or target
        if not local(target): return target
        path, _, anchor = target.partition("#")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if name == "README.md" and self.start in self.names:
            return posixpath.relpath(self.start, posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")
        if name in self.names: return target
        if name.startswith("..") or not (self.root / name).exists():
            self.broken.append(f"{page} links to {target}, which is not there")
        elif (self.root / name).is_dir():
            self.broken.append(f"{page} links to {target}, a folder, which a site cannot show: link to a file in it")
        else: self.files.add(name)
        return target

    def rewrite(self, page: str, markdown: str) -> str:
        "The page's Markdown with all its links moved."
        return outside_code(markdown, lambda plain: LINK.sub(lambda match: match["before"] + self.moved(page, match["target"]), plain))


# notebooks

def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#| name: value` lines that open a cell, and the code below them."
    lines, found = source.split("\n"), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        found[match[1]] = match[2].strip().strip("\"'")
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def shown_cell(cell: dict) -> dict | None:
    "A code cell as the site shows it, or None for one that is hidden."
    flags, code = directives(text(cell["source"]))
    if {"hide", "default_exp"} & flags.keys() or flags.get("include") == "false": return None
    tags = ["remove-input"] * ("hide_input" in flags or flags.get("echo") == "false") + ["remove-output"] * (
        "hide_output" in flags or flags.get("output") == "false"
    )
    outputs = [readable(out) for out in cell.get("outputs", []) if out.get("name") != "stderr"]
    if not code and not outputs: return None
    alt = flags.get("fig-alt") or flags.get("fig-cap")
    metadata = ({"tags": tags} if tags else {}) | ({"mystnb": {"image": {"alt": alt}}} if alt else {})
    return {
        "cell_type": "code",
        "id": cell.get("id", ""),
        "source": code,
        "metadata": metadata,
        "execution_count": None,
        "outputs": outputs,
    }


def readable(out: dict) -> dict:
    "An output in the one form that every reader can see: picture, Markdown or text."
    if "data" not in out: return out
    kinds = [kind for kind in ("image/png", "image/jpeg", "image/svg+xml", "text/markdown", "text/plain") if kind in out["data"]]
    return out | {"data": {kind: out["data"][kind] for kind in kinds[:1]}}


def shown_notebook(nb: dict, page: str, links: Links, facts: str = "") -> dict:
    "A notebook for the site: what is hidden is gone, links hold, and a line of facts stands under the title."
    cells = []
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            source = links.rewrite(page, text(cell["source"]))
            if facts and re.search(r"^#\s", source, re.M):
                source, facts = (
                    re.sub(
                        r"(^#\s.*\n(?:\s*>.*\n?)*|^#\s.*$)\n*",
                        lambda match: f"{match[0].rstrip()}\n\n{facts}\n\n",
                        source,
                        count=1,
                        flags=re.M,
                    ),
                    "",
                )
            cells.append({"cell_type": "markdown", "id": cell.get("id", ""), "metadata": {}, "source": source})
        elif cell["cell_type"] == "code" and (shown := shown_cell(cell)):
            for out in shown["outputs"]:
                if "text/markdown" in out.get("data", {}):
                    out["data"] = {"text/markdown": links.rewrite(page, text(out["data"]["text/markdown"]))}
            cells.append(shown)
    metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


# the reference

class Source:
    "A module's text with the comments in it, for reading what is said behind a parameter."

    def __init__(self, source: str):
        self.tree, self.behind, self.alone = ast.parse(source), {}, {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT: continue
            (self.alone if not token.line[: token.start[1]].strip() else self.behind)[token.start[0]] = token.string.lstrip("# ").strip()

    def said(self, node: ast.AST, last: int | None = None) -> str:
        "The comment behind the line where a node ends, else the lines of comment right above it."
        if found := self.behind.get(last or node.end_lineno): return found
        above, line = [], node.lineno - 1
        while line in self.alone:
            above.insert(0, self.alone[line])
            line -= 1
        return " ".join(above)


def cell_text(value: str) -> str:
    "Fit for one cell of a Markdown table."
    return " ".join(value.split()).replace("|", "\\|")


def without_tags(markdown: str) -> str:
    "Markdown in which `<OLD>` is these words and no tag, which would vanish or, as a script, run; addresses in such brackets stay links."
    return outside_code(markdown, lambda plain: re.sub(r"<(?=[A-Za-z/!?])(?!https?:)", "&lt;", plain))


def code_text(value: str) -> str:
    "Inline code, also if it holds backquotes."
    return f"`` {value} ``" if "`" in value else f"`{value}`"


def table(rows: list[tuple[str, str, str]], heading: str) -> list[str]:
    "Rows of name, type and meaning as a Markdown table; a column that is empty throughout is left out."
    if not any(kind or said for _, kind, said in rows): return []
    columns = [place for place in range(3) if any(row[place] for row in rows)]
    heads = (heading, "type", "meaning")
    line = lambda cells: "| " + " | ".join(cells) + " |"
    shown = [(code_text(name) if name != "returns" else "*returns*", code_text(kind) if kind else "", said) for name, kind, said in rows]
    return [
        "",
        line([heads[place] for place in columns]),
        line(["---"] * len(columns)),
        *(line([cell_text(row[place]) for place in columns]) for row in shown),
        "",
    ]


def kind_of(annotation: ast.AST | None) -> str:
    "A type as code, also one that is written as text."
    if annotation is None: return ""
    return annotation.value if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str) else ast.unparse(annotation)


def parameters(source: Source, node: ast.FunctionDef) -> list[tuple[str, str, str]]:
    "Name, type and comment of every parameter and of what comes back."
    args = node.args
    plain = [
        *args.posonlyargs,
        *args.args,
        *([args.vararg] if args.vararg else []),
        *args.kwonlyargs,
        *([args.kwarg] if args.kwarg else []),
    ]
    ends = {
        default: arg
        for arg, default in [
            *zip(reversed([*args.posonlyargs, *args.args]), reversed(args.defaults)),
            *zip(args.kwonlyargs, args.kw_defaults),
        ]
        if default
    }
    last = {arg: default.end_lineno for default, arg in ends.items()}
    stars = {id(args.vararg): "*", id(args.kwarg): "**"}
    lines = [last.get(arg, arg.end_lineno) for arg in plain]
    rows = []
    for arg, line in zip(plain, lines):
        if arg.arg in ("self", "cls"): continue
        alone = lines.count(line) == 1 and not (node.returns and node.returns.end_lineno == line)
        kind, said = kind_of(arg.annotation), source.said(arg, line) if alone else ""
        said = without_tags(said)
        if kind or said: rows.append((stars.get(id(arg), "") + arg.arg, kind, said))
    if node.returns:
        kind = kind_of(node.returns)
        said = (
            source.said(node.returns)
            if node.returns.end_lineno not in lines or not plain
            else source.behind.get(node.returns.end_lineno, "")
        )
        if kind != "None" or said: rows.append(("returns", kind, without_tags(said)))
    return rows


def signature(node: ast.FunctionDef, method: bool = False) -> str:
    "The parameters with their defaults; their types stand in the table."
    bare = ast.parse(ast.unparse(node)).body[0]
    for arg in ast.walk(bare.args):
        if isinstance(arg, ast.arg): arg.annotation = None
    first = [*bare.args.posonlyargs, *bare.args.args][:1]
    static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
    if method and first and not static: (bare.args.posonlyargs or bare.args.args).pop(0)
    return f"({ast.unparse(bare.args)})"


def entry(directive: str, name: str, body: list[str], depth: int) -> list[str]:
    "One entry of the reference as a MyST directive."
    fence = ":" * (8 - depth)
    return [f"{fence}{{py:{directive}}} {name}", *body, fence, ""]


def described(node) -> list[str]:
    "The docstring, as paragraphs of Markdown."
    said = ast.get_docstring(node) or ""
    return ["", without_tags(said), ""] if said else [""]


def function_entry(source: Source, node: ast.FunctionDef, depth: int = 0) -> list[str]:
    "A function or method: signature, docstring, parameters."
    marks = {ast.unparse(mark).split("(")[0].split(".")[-1] for mark in node.decorator_list}
    if {"property", "cached_property"} & marks:
        gives = [
            f"gives {code_text(kind)}" + (f": {said}" if said else "")
            for name, kind, said in parameters(source, node)
            if name == "returns"
        ]
        return entry("property", node.name, [*described(node), *gives, ""], depth)
    kind = "function" if not depth else "classmethod" if "classmethod" in marks else "staticmethod" if "staticmethod" in marks else "method"
    return entry(kind, node.name + signature(node, bool(depth)), [*described(node), *table(parameters(source, node), "parameter")], depth)


def class_entry(source: Source, node: ast.ClassDef) -> list[str]:
    "A class: how it is made, its fields, its public methods."
    methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    made = next((each for each in methods if each.name == "__init__"), None)
    fields = [
        each
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and not each.target.id.startswith("_")
    ]
    record = any("dataclass" in ast.unparse(mark) for mark in node.decorator_list) or any(
        ast.unparse(base) == "NamedTuple" for base in node.bases
    )
    bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) not in ("object", "Protocol", "NamedTuple")]
    given = (
        signature(made, True)
        if made
        else "(" + ", ".join(each.target.id + (f"={short(each.value)}" if each.value else "") for each in fields) + ")"
        if record
        else ""
    )
    body = described(node) + ([f"A kind of {', '.join(code_text(base) for base in bases)}.", ""] if bases else [])
    if made: body += table(parameters(source, made), "parameter")
    body += table([(each.target.id, kind_of(each.annotation), source.said(each)) for each in fields], "field")
    for each in methods:
        if not each.name.startswith("_") or each.name == "__call__": body += function_entry(source, each, 1)
    return entry("class", node.name + given, body, 0)


def short(value: ast.AST) -> str:
    "A default as code, if it is short."
    shown = ast.unparse(value)
    if match := re.fullmatch(r"field\(.*?default(?:_factory)?=(.+?)(?:,.*)?\)", shown): shown = match[1]
    return shown if len(shown) <= 40 else "..."


def public(tree: ast.Module) -> list[str]:
    "The names in a module's `__all__`, in their order."
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def reference(module: str, text_of: str, chapter: str | None, title: str) -> tuple[str, dict[str, str]]:
    "A module's page of the reference, and the full names by the names that may stand in prose."
    source = Source(text_of)
    defined = {}
    for node in source.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for each in ast.walk(target):
                    if isinstance(each, ast.Name): defined.setdefault(each.id, node)
    lines, known = [f"# {code_text(module)}", ""], {module: f"module-{module}"}
    if chapter: lines += [f"How it works, step by step: [{title}](../{chapter}).", ""]
    lines += [f":::{{py:module}} {module}", ":::", ""]
    if said := ast.get_docstring(source.tree): lines += [said, ""]
    for name in public(source.tree):
        node = defined.get(name)
        if node is None: continue
        known |= {name: f"{module}.{name}", f"{module}.{name}": f"{module}.{name}"}
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
                    known[f"{name}.{each.name}"] = f"{module}.{name}.{each.name}"
            lines += class_entry(source, node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): lines += function_entry(source, node)
        else:
            kind = ["", f"of type {code_text(ast.unparse(node.annotation))}", ""] if isinstance(node, ast.AnnAssign) else []
            value = (
                ["", f"is {code_text(ast.unparse(node.value))}", ""]
                if node.value is not None and len(ast.unparse(node.value)) <= 80
                else []
            )
            lines += entry("data", name, ["", source.said(node), *kind, *value], 0)
    return "\n".join(lines) + "\n", known


def modules(root: Path, package: str) -> dict[str, str]:
    "Text of all modules that have public names, by dotted name."
    found = {
        path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in (root / package).rglob("*.py")
        if path.stem != "_modidx"
    }
    texts = {name: path.read_text(encoding="utf-8") for name, path in sorted(found.items())}
    return {name: source for name, source in texts.items() if public(ast.parse(source))}


def module_of(root: Path, name: str, package: str) -> str | None:
    "The module that a chapter makes."
    if not name.endswith(".ipynb"): return None
    for cell in json.loads((root / name).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and (match := re.search(r"^#\|\s*default_exp\s+(\S+)", text(cell["source"]), re.M)):
            return f"{package}.{match[1]}"
    return None


# the tree that Sphinx reads

def toctree(entries: list[str], depth: int = 1, hidden: bool = False, caption: str = "") -> str:
    "A table of contents as MyST; entries are paths without endings, or `label <path>`."
    options = [f":maxdepth: {depth}", *([":hidden:"] if hidden else []), *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


def stem(name: str) -> str:
    "A page as a table of contents names it."
    return "/" + re.sub(r"\.(ipynb|md)$", "", name)


def label(root: Path, name: str) -> str:
    "A chapter's line in the contents: its number and title."
    found, title = NUMBERED.match(posixpath.basename(name)), opening(markdown_of(root, name))[0]
    plain = re.sub(r"[`*<>]", "", title) or posixpath.basename(name)
    return f"{found[1]}{found[2]} · {plain}" if found else plain


def listed(root: Path, names: list[str], folder: str, links: Links) -> str:
    "Pages as a list with a sentence about each."
    lines = []
    for name in names:
        summary = links.rewrite(name, opening(markdown_of(root, name))[1])
        summary = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", summary)
        lines.append(f"- [{label(root, name)}]({posixpath.relpath(name, folder or '.')})" + (f": {summary}" if summary else ""))
    return "\n".join(lines) + "\n"


def ini_of(root: Path) -> dict[str, str]:
    "The facts in settings.ini."
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def lay_out(root: Path, into: Path) -> tuple[dict[str, str], dict[str, str], dict]:
    """Write all that Sphinx reads; ends with a message if a link is broken.

    Gives the places of the names that prose may use, the modules that pages make, and the facts of settings.ini."""
    facts = ini_of(root)
    package = facts["lib_path"]
    names = pages(root)
    extra = [name for name in ("CONTRIBUTING.md", "HOUSE_STYLE.md", "CHANGELOG.md") if (root / name).is_file()]
    links = Links(root, names + extra)
    texts, made = modules(root, package), {name: module_of(root, name, package) for name in names}
    chapter_of = {module: name for name, module in made.items() if module}

    def put(name: str, body: str) -> None:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(body, encoding="utf-8")

    for name in names + extra:
        if name.endswith(".md"): put(name, links.rewrite(name, (root / name).read_text(encoding="utf-8"))); continue
        module = made[name]
        up = posixpath.relpath("api", posixpath.dirname(name))
        line = f"*Notebook {code_text(name)}" + (
            f", makes the module* [{code_text(module)}]({up}/{module}.md)*.*" if module in texts else "*"
        )
        nb = json.loads((root / name).read_text(encoding="utf-8"))
        if name == links.start and nb["cells"]:
            nb["cells"][0]["source"] = re.sub(r"^# .*", "# Overview", text(nb["cells"][0]["source"]), count=1)
        put(name, json.dumps(shown_notebook(nb, name, links, line if number(name)[0] < 10_000 else "")))

    known, twice = {}, set()
    for module, source in texts.items():
        chapter = chapter_of.get(module)
        page, found = reference(module, source, chapter, label(root, chapter) if chapter else "")
        put(f"api/{module}.md", page)
        twice |= known.keys() & found.keys()
        known |= {name: f"api/{module}#{anchor}" for name, anchor in found.items()}
    known = {name: place for name, place in known.items() if name not in twice}
    put(
        "api/index.md",
        "# Reference\n\nEvery public name, by module. Modules are listed in the order of the chapters that make them.\n\n"
        + toctree([f"{module} </api/{module}>" for module in sorted(texts, key=lambda module: number(chapter_of.get(module, "~")))]),
    )

    order = contents(names)
    entries, listing = [], []
    for place, inside in order:
        if not place or len(inside) == 1 and not place:
            entries += [f"{label(root, name)} <{stem(name)}>" for name in inside]
            listing.append(listed(root, inside, "", links))
            continue
        page = f"rooms/{place}"
        title = place.split("/")[-1].replace("_", " ").capitalize()
        put(
            f"{page}.md",
            f"# {title}\n\n{listed(root, inside, posixpath.dirname(page), links)}\n"
            + toctree([f"{label(root, name)} <{stem(name)}>" for name in inside], hidden=True),
        )
        entries.append(f"{title} </{page}>")
        nested = "".join(f"  {line}\n" for line in listed(root, inside, "", links).splitlines())
        listing.append(f"- [{title}]({page}.md)\n{nested}")
    put(
        "chapters.md",
        "# Chapters\n\nIn reading order. Each answers one question, in about a quarter of an hour, and makes one module.\n\n"
        + "".join(listing)
        + "\n"
        + toctree(entries, 2, hidden=True),
    )
    tutorials = sorted((name for name in names if room(name).split("/")[0] in APART), key=number)
    put(
        "tutorials.md",
        "# Tutorials\n\nFrom beginning to end, with pictures.\n\n"
        + listed(root, tutorials, "", links)
        + "\n"
        + toctree([f"{label(root, name)} <{stem(name)}>" for name in tutorials], hidden=True),
    )

    filed = {name for _, inside in order for name in inside} | set(tutorials)
    others = [name for name in names if name not in filed and name != "nbs/index.ipynb"]
    first = ["Overview </nbs/index>"] if "nbs/index.ipynb" in names else []
    top = [*first, "Tutorials </tutorials>", "Chapters </chapters>", "Reference </api/index>", *(stem(name) for name in others + extra)]
    put("index.md", links.rewrite("index.md", (root / "docs" / "index.md").read_text(encoding="utf-8")) + "\n" + toctree(top, hidden=True))
    for name in sorted(links.files):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, into / name)
    put("_static/site.css", (root / "docs" / "site.css").read_text(encoding="utf-8"))
    if links.broken:
        raise SystemExit(
            "\n".join(
                [*sorted(set(links.broken)), f"{len(set(links.broken))} broken links: mend them in the notebooks or in docs/index.md"]
            )
        )
    return known, {stem(name)[1:]: module for name, module in made.items() if module}, facts


# Sphinx

def settings(known: dict[str, str], made_by: dict[str, str], facts: dict) -> dict:
    "What a conf.py would say."
    return {
        "project": facts["title"],
        "author": facts["author"],
        "copyright": facts["copyright"],
        "release": facts["version"],
        "version": facts["version"],
        "extensions": ["myst_nb", "build_site"],
        "language": "en",
        "pli_names": known,
        "pli_made_by": made_by,
        "nb_execution_mode": "off",
        "nb_render_markdown_format": "gfm",
        "nb_merge_streams": True,
        "suppress_warnings": ["mystnb.unknown_mime_type"],
        "myst_enable_extensions": ["dollarmath", "amsmath", "colon_fence"],
        "myst_heading_anchors": 4,
        "myst_dmath_double_inline": True,
        "html_theme": "pydata_sphinx_theme",
        "html_context": {"default_mode": "auto"},
        "html_title": facts["title"],
        "html_static_path": ["_static"],
        "html_css_files": ["site.css"],
        "html_show_sourcelink": False,
        "html_copy_source": False,
        "html_show_search_summary": False,
        "html_math_renderer": "mathml",
        "html_show_sphinx": False,
        "html_sidebars": {page: [] for page in ("index", "nbs/index", "CONTRIBUTING", "HOUSE_STYLE", "CHANGELOG", "nbs/glossary", "genindex", "search")},
        "html_theme_options.show_prev_next": True,
        "html_theme_options.navigation_with_keys": False,
        "html_theme_options.show_toc_level": 2,
        "html_theme_options.navbar_end": ["theme-switcher"],
        "html_theme_options.header_links_before_dropdown": 6,
        "html_theme_options.footer_start": ["copyright"],
        "html_theme_options.footer_end": [],
        "html_theme_options.secondary_sidebar_items": ["page-toc"],
        "python_maximum_signature_line_length": 90,
        "add_module_names": False,
        "toc_object_entries_show_parents": "hide",
        "exclude_patterns": ["_static"],
        "html_last_updated_fmt": None,
        "html_domain_indices": False,
        "html_use_index": True,
    }


def mathml(tex: str, block: bool) -> str:
    "A formula as MathML."
    from docutils.utils.math import latex2mathml
    drawn = latex2mathml.tex2mathml(re.sub(r"\\dots(?![a-z])", r"\\ldots", tex.strip()), as_block=block)
    word = r"<mi[^>]*>([a-z]{2,6})</mi>(\s*<mo>&ApplyFunction;</mo>)?(\s*<mo[^>]*>\()?"
    return re.sub(
        word,
        lambda match: (
            f'<mo form="prefix" lspace="0.17em" rspace="{"0" if match[3] else "0.17em"}" movablelimits="true">'
            f'{match[1]}</mo>{match[3] or ""}'
        ),
        drawn,
    )


def math_font() -> Path:
    "A font that has formulas, since not every system has one: the package ziamath carries it. `SystemExit` names what to install."
    spec = importlib.util.find_spec("ziamath")
    found = sorted(Path(spec.origin).parent.glob("fonts/STIXTwoMath*.ttf")) if spec and spec.origin else []
    if not found: raise SystemExit('the site needs the packages of `docs_requirements` (ziamath with its font): pip install -e ".[docs]"')
    return found[0]


def draw_math(translator, node) -> None:
    "Write a formula into the page; one that cannot be read is a warning, and so fails the build."
    from docutils import nodes
    from docutils.utils.math import MathError
    from sphinx.util import logging
    block = isinstance(node, nodes.math_block)
    try: drawn = mathml(node.astext(), block)
    except MathError as why:
        logging.getLogger("build_site").warning("a formula cannot be drawn (%s): %s", why, node.astext(), location=node)
        drawn = translator.encode(node.astext())
    translator.body.append(f'<div class="formula">{drawn}</div>\n' if block else drawn)
    raise nodes.SkipNode


def link_names(app, doctree, docname: str) -> None:
    "Names in backquotes lead to their entry in the reference; external links are written down."
    from docutils import nodes
    for literal in list(doctree.findall(nodes.literal)):
        said = literal.astext()
        place = app.config.pli_names.get(said.removesuffix("()"))
        own = place and place.startswith(f"api/{app.config.pli_made_by.get(docname)}#")
        if not own and re.fullmatch(r"[a-z]+", said): continue  # a plain word may be a command, an option or another module's parameter
        apart = literal.parent
        while place and apart is not None and not isinstance(apart, (nodes.reference, nodes.title)): apart = apart.parent
        if not place or apart is not None: continue
        target, _, anchor = place.partition("#")
        if target == docname: continue
        link = nodes.reference(
            "", "", internal=True, refuri=f"{app.builder.get_relative_uri(docname, target)}#{anchor}", classes=["api-name"]
        )
        literal.replace_self(link)
        link += literal
    for link in doctree.findall(nodes.reference):
        if re.match(r"https?:", uri := link.get("refuri", "")): app.env.pli_external.setdefault(uri, set()).add(docname)


def setup(app) -> dict:
    "Sphinx calls this: it makes the module one of Sphinx's extensions."
    app.add_config_value("pli_names", {}, "env")
    app.add_config_value("pli_made_by", {}, "env")
    app.add_html_math_renderer("mathml", inline_renderers=(draw_math, None), block_renderers=(draw_math, None))
    app.connect("builder-inited", lambda app: setattr(app.env, "pli_external", {}))
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": False}


def fetched(site: Path) -> list[str]:
    "What pages would fetch from elsewhere: scripts, styles, pictures and fonts with an address."
    found = []
    for page in sorted(site.rglob("*.html")):
        body = page.read_text(encoding="utf-8")
        found += [
            f"{page.relative_to(site)}: {match[1]}"
            for match in re.finditer(r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=\"((?:https?:)?//[^\"]+)", body)
        ]
        found += [
            f"{page.relative_to(site)}: {match[1]}"
            for match in re.finditer(r"<link\b(?![^>]*rel=\"(?:canonical|license)\")[^>]*\bhref=\"((?:https?:)?//[^\"]+)", body)
        ]
    for sheet in sorted(site.rglob("*.css")):
        found += [
            f"{sheet.relative_to(site)}: {match[1]}"
            for match in re.finditer(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", sheet.read_text(encoding="utf-8"))
        ]
    return found


def build(root: Path, out: Path) -> str:
    "Build the site into `out`; ends with a message if anything was warned about. Gives a sentence about what was made."
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SystemExit(f"{out} holds something else: name an empty folder with --out")
    with tempfile.TemporaryDirectory(prefix="pli-site-") as made:
        source, fresh = Path(made) / "source", Path(made) / "site"
        known, made_by, facts = lay_out(root, source)
        shutil.copyfile(math_font(), source / "_static" / "formulas.ttf")
        try: from sphinx.application import Sphinx
        except ImportError: raise SystemExit('the site needs the packages of `docs_requirements`: pip install -e ".[docs]"') from None
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        log = io.StringIO()
        app = Sphinx(
            str(source),
            None,
            str(fresh),
            str(Path(made) / "doctrees"),
            "html",
            confoverrides=settings(known, made_by, facts),
            status=None,
            warning=log,
            freshenv=True,
        )
        app.build(force_all=True)
        warnings = [re.sub(r"\x1b\[[\d;]*m", "", line).replace(f"{source}/", "") for line in log.getvalue().splitlines() if line.strip()]
        warnings += [f"{place} would be fetched from elsewhere" for place in fetched(fresh)]
        external = sorted(app.env.pli_external.items())
        (fresh / "external-links.txt").write_text(
            "".join(f"{uri}\t{', '.join(sorted(where))}\n" for uri, where in external), encoding="utf-8"
        )
        (fresh / MARK).touch()
        if warnings: raise SystemExit("\n".join([*warnings, f"the site was not built: {len(warnings)} lines of warnings"]))
        if out.exists(): shutil.rmtree(out)
        shutil.copytree(fresh, out, ignore=shutil.ignore_patterns(".buildinfo*", "objects.inv"))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    return (
        f"{len(list(out.rglob('*.html')))} pages, {len(known)} names, {len(external)} external links, {size:.1f} MB: {out / 'index.html'}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_site", help="folder of the site (default: _site)")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: the one that holds this tool)")
    parser.add_argument("--requirements", action="store_true", help="print the packages that the site needs, for pip, and stop")
    args = parser.parse_args()
    if args.requirements: return print("\n".join(shlex.split(ini_of(args.root)["docs_requirements"])))
    print(build(args.root.resolve(), args.out.resolve()))


if __name__ == "__main__": main()

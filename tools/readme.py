#!/usr/bin/env python3
"""Make README.md from the outputs stored in nbs/index.ipynb. Nothing is executed, and Python alone is enough.

python tools/readme.py                 write README.md and the pictures in README_files/
python tools/readme.py --check         write nothing; fail when they differ or link to a file that is not there
python tools/readme.py --command demo  print the one command that stands under `<!-- command: demo -->` in README.md

The marker `<!-- chapters -->` becomes the map of chapters: a line for each part of `PARTS`, from the notebooks' titles, in reading order.
"""
import argparse
import base64
import json
import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "nbs/index.ipynb"
PICTURES = "README_files"
NOTE = f"<!-- Made by tools/readme.py from {SOURCE}: edit that notebook, not this file. -->"
KINDS = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
FENCE = re.compile(r"^(```.*?^```[^\S\n]*$)", re.M | re.S)
LINK = re.compile(r"""(\]\(|\b(?:src|href)=")([^)\s"]+)""")
COMMAND = re.compile(r"^<!-- command: (\w+) -->\n+```sh\n(.*?)^```$", re.M | re.S)
CHAPTERS = "<!-- chapters -->"
NUMBER = re.compile(r"(\d+)([a-z]?)_")
PARTS = (  # the map of chapters: what a row is about, and the folders and chapters of nbs/ that it holds, in reading order
    ("first use", ("tutorials/search_your_pictures", "tutorials/command_line", "tutorials/evaluate_benchmark", "tutorials/coco_to_circo", "16_demo")),
    ("what came out", ("tutorials/results", "tutorials/study", "tutorials/gallery_neighbours", "tutorials/gallery_masks", "tutorials")),
    ("ground", ("00_core", "00a_distributed", "01_world")),
    ("models", ("backbones",)),
    ("what is hidden", ("hiding",)),
    ("queries and losses", ("04_composition", "05_losses", "methods")),
    ("pairs to learn from", ("data",)),
    ("tuning", ("07f_settings", "training")),
    ("measuring", ("08_metrics", "benchmarks", "evaluation")),
    ("searching", ("gallery", "08a_drawing", "studio")),
    ("figures", ("viz",)),
    ("the command line", ("cli",)),
    ("studies", ("studies",)),
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def text(value) -> str:
    "Notebooks store text as one string or as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def directives(source: str) -> tuple[dict, str]:
    "The `#| name: value` lines that open a cell, and the code below them."
    lines, found = source.splitlines(), {}
    while lines and (match := re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        found[match[1]] = match[2].strip().strip("\"'")
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def local(target: str) -> bool:
    "Does a link point into this repository?"
    return not re.match(r"[a-z][a-z+.-]*:|[#/]", target, re.I)


def rebase(markdown: str) -> str:
    "Links are written as seen from the notebook's folder; README.md stands one folder up."
    folder = posixpath.dirname(SOURCE)
    move = lambda m: m[1] + (posixpath.normpath(posixpath.join(folder, m[2])) if local(m[2]) else m[2])
    parts = FENCE.split(markdown)  # every second part is a fenced block: left as it is
    return "".join(part if i % 2 else LINK.sub(move, part) for i, part in enumerate(parts))


def fenced(body: str, language: str) -> str:
    "A fence longer than any fence inside."
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`{3,}", body)), 3)
    return f"{ticks}{language}\n{body.rstrip()}\n{ticks}"


def output(out: dict, alt: str, pictures: dict) -> str:
    "One output of a cell as markdown; its picture, if it is one, goes into `pictures`."
    if out["output_type"] == "error": raise SystemExit(f"{SOURCE} holds an error: {out['ename']}: {out['evalue']}")
    if out["output_type"] == "stream": return fenced(COLOUR.sub("", text(out["text"])), "text") if out["name"] == "stdout" else ""
    data = out["data"]
    for kind, ending in KINDS.items():
        if kind in data:
            body = text(data[kind])
            name = f"{PICTURES}/figure-{len(pictures) + 1}.{ending}"
            pictures[name] = body.encode() if ending == "svg" else base64.b64decode(body)
            return f"![{alt}]({name})"
    if "text/markdown" in data: return rebase(text(data["text/markdown"])).strip()
    if "text/html" in data: return text(data["text/html"]).strip()
    return fenced(text(data.get("text/plain", "")), "text")


def code_cell(cell: dict, pictures: dict) -> list[str]:
    "A code cell and its outputs, as its directives want them shown."
    flags, code = directives(text(cell["source"]))
    if "hide" in flags or "default_exp" in flags or flags.get("include") == "false": return []
    shown = []
    if code and "hide_input" not in flags and flags.get("echo") != "false": shown.append(fenced(code, "python"))
    if "hide_output" in flags or flags.get("output") == "false": return shown
    alt = flags.get("fig-alt") or flags.get("fig-cap") or "Figure"
    return shown + [output(out, alt, pictures) for out in cell["outputs"]]


def title(path: Path) -> str:
    "The heading of a notebook, its topic alone: `Contrastive losses: find your own whole` is `Contrastive losses`."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = (line for cell in cells if cell["cell_type"] == "markdown" for line in text(cell["source"]).splitlines())
    heading = next((line[2:] for line in lines if line.startswith("# ")), path.stem)
    return re.sub(r"([|\[\]])", r"\\\1", heading.partition(": ")[0].strip())


def chapter_map(root: Path = ROOT) -> str:
    "A table of all notebooks in reading order: a row for each part of `PARTS`; folders and chapters that no part names come last."
    named = {place for _, places in PARTS for place in places}
    found: dict[str, list] = {}  # folder, or chapter by itself -> order and link of each
    for path in (root / "nbs").rglob("*.ipynb"):
        name = path.relative_to(root)
        if name.as_posix() == SOURCE or any(part.startswith(("_", ".")) for part in name.parts): continue
        number = NUMBER.match(path.name)
        order = (int(number[1]), number[2], path.name) if number else (10**6, "", path.name)
        link = f"[{f'{number[1]}{number[2]} ' if number else ''}{title(path)}]({name.as_posix()})"
        folder = "/".join(name.parts[1:-1])
        place = next((each for each in (f"{folder}/{path.stem}", folder) if folder and each in named), folder or path.stem)
        found.setdefault(place, []).append((order, link))
    parts = [*PARTS, *((f"`{place}`", (place,)) for place in sorted(found.keys() - named))]
    rows = [(part, [link for place in places for _, link in sorted(found.get(place, []))]) for part, places in parts]
    lines = [f"| {part} | {' · '.join(links)} |" for part, links in rows if links]
    return "\n".join(["| to read about | chapters, in reading order |", "|---|---|", *lines])


def render(nb: dict) -> tuple[str, dict[str, bytes]]:
    "README.md as text, and the pictures it shows by name."
    blocks, pictures = [NOTE], {}
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown": blocks.append(rebase(text(cell["source"])).strip())
        if cell["cell_type"] == "code": blocks += code_cell(cell, pictures)
    readme = "\n\n".join(block for block in blocks if block) + "\n"
    return readme.replace(CHAPTERS, chapter_map()) if CHAPTERS in readme else readme, pictures


def commands(readme: str) -> dict[str, str]:
    "The marked commands by name, each one line."
    found = {}
    for name, body in COMMAND.findall(readme):
        lines = body.strip().splitlines()
        if len(lines) != 1: raise SystemExit(f"README.md: the command '{name}' must be one line, but there are {len(lines)}")
        if name in found: raise SystemExit(f"README.md: the command '{name}' stands there twice")
        found[name] = lines[0]
    if readme.count("<!-- command:") != len(found): raise SystemExit("README.md: a command marker has no ```sh block right under it")
    return found


def faults(readme: str, pictures: dict[str, bytes]) -> list[str]:
    "What differs from the files that are there, and links that lead nowhere."
    there = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in ROOT.glob(f"{PICTURES}/*")}
    if (ROOT / "README.md").is_file(): there["README.md"] = (ROOT / "README.md").read_bytes()
    wanted = pictures | {"README.md": readme.encode()}
    bad = [f"{name} is not what {SOURCE} says" for name in sorted(there | wanted) if there.get(name) != wanted.get(name)]
    links = {m[2].split("#")[0] for part in FENCE.split(readme)[::2] for m in LINK.finditer(part) if local(m[2])}
    return bad + [f"{SOURCE} links to {link}, which is not there" for link in sorted(links) if not (ROOT / link).exists() and link not in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when README.md differs")
    parser.add_argument("--command", metavar="NAME", help="print a marked command of README.md")
    args = parser.parse_args()
    if args.command:
        found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
        if args.command not in found: sys.exit(f"README.md: no command is marked <!-- command: {args.command} -->")
        return print(found[args.command])
    readme, pictures = render(json.loads((ROOT / SOURCE).read_text(encoding="utf-8")))
    if args.check:
        bad = faults(readme, pictures)
        if bad: sys.exit("\n".join([*bad, "Run: python tools/readme.py"]))
        return print("README.md is what the index notebook says")
    shutil.rmtree(ROOT / PICTURES, ignore_errors=True)
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(readme, encoding="utf-8")
    print(f"README.md and {len(pictures)} pictures written")


if __name__ == "__main__": main()

#!/usr/bin/env python3
"""Are the notebooks fit for git? Python and git alone are enough.

Notebooks are read where they lie, so they keep their outputs: PNG figures of at most 40 kB, text of at most 20 lines (and a line that
says how many more there were), and nothing else. `tools/outputs.py` makes them and writes down, in the notebook's metadata, what they
came from; outputs that no longer belong to the cells and files they came from are refused. None carries execution counts, widget state,
an editor's notes, or text that another run would not repeat. Cell ids are 8 hex digits, because the exported modules carry them. No file
in git is larger than a megabyte.

As long as not one notebook has been stored by `tools/outputs.py`, chapters (notebooks with a `default_exp`) are bare, and those that
people look at on the repository's page (the index, the gallery, the tutorials) keep what they have. From the first stored one on, every
notebook is.

python tools/check_notebooks.py        name every fault, and fail if there is one
python tools/check_notebooks.py --fix  mend what can be mended: clear chapters never stored, counts and metadata, shorten ids
"""
import argparse
import base64
import binascii
import hashlib
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAY_SHOW = ("nbs/index.ipynb", "nbs/tutorials/*.ipynb", "nbs/*gallery*.ipynb")
LARGEST = 1_000_000
LARGEST_FIGURE = 40_000
MOST_LINES = 20
LONGEST_LINE = 1_000
STORED_KINDS = {"image/png", "text/plain", "text/markdown"}
METADATA = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
ID = re.compile(r"[0-9a-f]{8}")
CONFLICT = re.compile(r"`?(<{7}|={7}|>{7})")
SOMEBODYS_FOLDER = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|private|opt|var|work)/\w|[A-Z]:\\\\?Users")
TEMPORARY_NAME = re.compile(r"(?<![\w-])tmp(?=[a-z_]*\d)[a-z0-9_]{8}(?!\w)|(?<!\w)pytest-\d+")
ADDRESS = re.compile(r"0x[0-9a-fA-F]{7,}")
LEFT_OUT = re.compile(r"\.\.\. [\d,]+ more lines? (?:is|are) left out")
MODULE_WORDS = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))", re.M)


def tracked(root: Path = ROOT) -> list[str]:
    "Every file that is in git, or will be."
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, check=True, capture_output=True, text=True
    )
    return sorted(name for name in set(done.stdout.split("\0")) if name and (root / name).is_file())


def text(value) -> str:
    "Notebooks store text as one string or as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def as_json(nb: dict) -> str:
    "A notebook as nbdev writes it, so that cleaning leaves it as it is."
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def chapters(names: list[str]) -> list[str]:
    "The notebooks that nbdev knows: below `nbs`, and no draft."
    return [
        name
        for name in names
        if name.startswith("nbs/") and name.endswith(".ipynb") and not any(part.startswith(("_", ".")) for part in name.split("/"))
    ]


def code_cells(nb: dict) -> list[dict]:
    return [cell for cell in nb["cells"] if cell["cell_type"] == "code"]


def may_show(name: str, nb: dict) -> bool:
    "May this notebook keep outputs that no tool has stored? A chapter never does, whatever its name."
    chapter = any(re.search(r"^#\|\s*default_exp\b", text(cell["source"]), re.M) for cell in code_cells(nb))
    return not chapter and any(fnmatch(name, pattern) for pattern in MAY_SHOW)


# what stored outputs came from

def digest(*parts: str | bytes) -> str:
    "16 hex digits of all parts, each with its length, so that no two lists of parts share one."
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(b"%d:" % len(data) + data)
    return total.hexdigest()[:16]


def file_parts(reads: list[str], names: list[str], root: Path, shipped: bool, package: str = "pli"):
    "Names and bytes of the files read, those that the package ships or the others; a name ending in `/` is every file in that folder."
    for name in names:
        read = name in reads or f"{name.rpartition('/')[0]}/" in reads
        if read and name.startswith(f"{package}/") == shipped: yield from (name, (root / name).read_bytes())


def source_digest(nb: dict, reads: list[str], names: list[str], root: Path = ROOT) -> str:
    "Digest of a notebook's code cells, and of the files that it reads and the package does not ship."
    return digest(*(text(cell["source"]).strip() for cell in code_cells(nb)), *file_parts(reads, names, root, shipped=False))


def imported(source: str, package: str, own: str = "") -> set[str]:
    "Dotted names below `package` that python source may import; `from pli import viz` may mean `pli.viz`."
    found = set()
    for origin, names, plain in MODULE_WORDS.findall(source):
        if origin.startswith("."):
            base = own.split(".")[: len(own.split(".")) - (len(origin) - len(origin.lstrip(".")))]
            origin = ".".join([*base, *filter(None, [origin.lstrip(".")])])
        words = [word.split()[0] for word in re.sub(r"[()\\]|#[^\n]*", " ", names or plain).split(",") if word.split()]
        found |= {origin, *(f"{origin}.{word}" for word in words)} if origin else set(words)
    return {name for name in found if name == package or name.startswith(f"{package}.")}


def module_files(nb: dict, names: list[str], root: Path = ROOT, package: str = "pli") -> list[str]:
    "Files of all modules of the package that a notebook's cells reach, directly or through other modules."
    where = {
        name[:-3].removesuffix("/__init__").replace("/", "."): name
        for name in names
        if name.startswith(f"{package}/") and name.endswith(".py")
    }
    todo, reached = list(imported("\n".join(text(cell["source"]) for cell in code_cells(nb)), package)), set()
    while todo:
        name = todo.pop()
        if name not in where or name in reached: continue
        reached.add(name)
        own = f"{name}.__init__" if where[name].endswith("/__init__.py") else name
        todo += imported((root / where[name]).read_text(encoding="utf-8"), package, own)
        todo += [name.rpartition(".")[0]]  # importing a module runs the package around it first
    return sorted(where[name] for name in reached)


def module_digest(nb: dict, reads: list[str], names: list[str], root: Path = ROOT) -> str:
    "Digest of what the reached modules do (their code without comments and blank lines), and of the package's files that were read."
    lines = lambda name: [
        line for line in (root / name).read_text(encoding="utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    code = ("\n".join([name, *lines(name)]) for name in module_files(nb, names, root))
    return digest(*code, *file_parts(reads, names, root, shipped=True))


def read_notebook(root: Path, name: str) -> dict:
    "A notebook of the repository; ends with a message for a file that is none, as after a merge with conflicts."
    try:
        nb = json.loads((root / name).read_text(encoding="utf-8"))
        if isinstance(nb["metadata"], dict) and isinstance(nb["cells"], list): return nb
    except (ValueError, KeyError, TypeError): pass
    raise SystemExit(f"{name}: is no notebook; if a merge left conflicts in it, run: nbdev_fix {name}")


def record(nb: dict) -> dict | None:
    "What `tools/outputs.py` wrote down about the outputs of a notebook, or None if it has not stored them."
    kept = nb["metadata"].get("pli")
    made = kept.get("outputs") if isinstance(kept, dict) else None
    return made if isinstance(made, dict) else None


def reads_of(stored: dict) -> list[str]:
    "The files that a record says were read."
    reads = stored.get("reads", [])
    return [name for name in reads if isinstance(name, str)] if isinstance(reads, list) else []


def shown_digest(nb: dict) -> str:
    "Digest of what all code cells show, one after the other."
    plain = lambda value: text(value) if isinstance(value, (str, list)) else value
    parts = lambda out: {name: plain(value) for name, value in (out | out.get("data", {})).items() if name not in ("data", "metadata")}
    return digest(*(json.dumps([parts(out) for out in cell["outputs"]], sort_keys=True) for cell in code_cells(nb)))


def edited(nb: dict) -> bool:
    "Are the outputs others than those that were stored? Records from before November 2026 cannot tell."
    stored = record(nb)
    return stored is not None and stored.get("shown", shown_digest(nb)) != shown_digest(nb)


def moved_on(nb: dict, names: list[str], root: Path = ROOT) -> bool:
    "Do the stored outputs no longer belong to the notebook's code cells and the files that it reads?"
    stored = record(nb)
    return stored is not None and stored.get("sources") != source_digest(nb, reads_of(stored), names, root)


# what may be stored

def unrepeatable(shown: str):
    "What in a text another machine or another run would say otherwise."
    if found := SOMEBODYS_FOLDER.search(shown): yield f"names a folder of the machine it ran on: {around(shown, found)}"
    if found := TEMPORARY_NAME.search(shown): yield f"names a temporary file: {around(shown, found)}"
    if found := ADDRESS.search(shown): yield f"shows a memory address: {around(shown, found)}"


def around(shown: str, found: re.Match) -> str:
    "The place of a match, short enough for a message."
    return repr(shown[max(0, found.start() - 20): found.end() + 30])


def png_faults(data: bytes):
    "A figure is a PNG of at most `LARGEST_FIGURE` bytes that holds a picture and no notes about date or software."
    if len(data) > LARGEST_FIGURE: yield f"a figure of {len(data):,} bytes, more than {LARGEST_FIGURE:,}"
    if data[:8] != b"\x89PNG\r\n\x1a\n": return (yield "a figure that is no PNG")
    place, notes = 8, set()
    while place + 8 <= len(data):
        kind = data[place + 4: place + 8].decode("latin-1")
        if kind not in ("IHDR", "PLTE", "tRNS", "IDAT", "IEND"): notes.add(kind)
        place += 12 + int.from_bytes(data[place: place + 4], "big")
    if notes: yield f"a figure with notes in it ({', '.join(sorted(notes))})"


def stored_faults(out: dict):
    "What breaks the rules in an output that `tools/outputs.py` should have stored."
    if out["output_type"] == "error": return (yield f"holds an error: {out['ename']}")
    if out["output_type"] == "stream":
        if out["name"] != "stdout": return (yield "holds warnings or progress (stderr)")
        data = {"text/plain": out["text"]}
    else: data = out["data"]
    if out.get("execution_count") is not None: yield "an output carries an execution count"
    if wrong := sorted(set(data) - STORED_KINDS): yield f"holds {', '.join(wrong)}: only PNG figures and text are stored"
    for kind, value in data.items():
        if kind == "image/png":
            try: yield from png_faults(base64.b64decode(text(value), validate=True))
            except binascii.Error: yield "a figure that is not base64 on one line"
        elif kind in STORED_KINDS:
            lines = text(value).splitlines()
            said = 0 if not lines or not LEFT_OUT.fullmatch(lines[-1]) else 2 if kind == "text/markdown" else 1
            if len(lines) > MOST_LINES + said:
                yield f"text of {len(lines)} lines, more than {MOST_LINES}"
            if kind == "text/plain" and any(len(line) > LONGEST_LINE for line in lines):
                yield f"a line of more than {LONGEST_LINE:,} characters"
            yield from unrepeatable(text(value))


def output_faults(out: dict):
    "What an output that no tool has stored must not hold."
    if out["output_type"] == "error": yield f"holds an error: {out['ename']}"
    if out.get("name") == "stderr": yield "holds warnings or progress (stderr)"
    shown = [text(out["text"])] if "text" in out else [text(v) for k, v in out.get("data", {}).items() if k.startswith("text/")]
    if any(SOMEBODYS_FOLDER.search(part) for part in shown): yield "names a folder of the machine it ran on"
    if any("widget" in kind for kind in out.get("data", {})): yield "holds a widget, which needs a running kernel"


def metadata_for(nb: dict) -> dict:
    "The metadata that a notebook may have: the kernel's name, and what its outputs came from."
    return METADATA | ({"pli": {"outputs": record(nb)}} if record(nb) is not None else {})


def notebook_faults(name: str, nb: dict):
    "Everything in one notebook that does not belong into git."
    if nb["metadata"] != metadata_for(nb):
        yield f"its metadata hold more than the kernel's name and the record of its outputs: {', '.join(nb['metadata'])}"
    ids, show, stored = [cell.get("id", "") for cell in nb["cells"]], may_show(name, nb), record(nb) is not None
    for place, cell in enumerate(nb["cells"]):
        where = f"cell {place} ({ids[place]})"
        if not ID.fullmatch(ids[place]): yield f"{where}: its id is not 8 hex digits"
        if ids.index(ids[place]) < place: yield f"{where}: an earlier cell has the same id"
        if CONFLICT.match(text(cell["source"])): yield f"{where}: a conflict is not resolved"
        if cell["cell_type"] != "code": continue
        if cell["execution_count"] is not None: yield f"{where}: carries an execution count"
        if stored: yield from (f"{where}: {fault}" for out in cell["outputs"] for fault in stored_faults(out))
        elif cell["outputs"] and not show: yield f"{where}: carries outputs that tools/outputs.py has not stored"
        elif show: yield from (f"{where}: {fault}" for out in cell["outputs"] for fault in output_faults(out))


def record_faults(notebooks: dict[str, dict], names: list[str], root: Path = ROOT):
    "Notebooks whose outputs do not belong to their sources; once one notebook is stored, also those that never were."
    any_stored = any(record(nb) is not None for nb in notebooks.values())
    for name in chapters(list(notebooks)):
        nb = notebooks[name]
        if record(nb) is None and any_stored:
            yield f"{name}: its outputs have never been stored: run python tools/outputs.py {name}"
        elif moved_on(nb, names, root):
            yield f"{name}: its cells, or files it reads, have moved on since its outputs were stored: run python tools/outputs.py {name}"
        elif edited(nb): yield f"{name}: its outputs are not those that were stored: run python tools/outputs.py {name}"


def new_id(cell: dict, taken: set[str]) -> str:
    "The id itself where it is good, else 8 hex digits made from it."
    found = cell.get("id", "")
    while not ID.fullmatch(found) or found in taken:
        found = hashlib.sha256(f"{found}{text(cell['source'])}{len(taken)}".encode()).hexdigest()[:8]
    return found


def fix(name: str, nb: dict) -> None:
    "Mend in place what a machine can mend."
    nb["metadata"] = metadata_for(nb)
    nb["nbformat_minor"] = max(5, nb["nbformat_minor"])
    taken, keep = set(), may_show(name, nb) or record(nb) is not None
    for cell in nb["cells"]:
        cell["id"] = new_id(cell, taken)
        taken.add(cell["id"])
        if cell["cell_type"] != "code": continue
        cell["execution_count"] = None
        for out in cell["outputs"]:
            if "execution_count" in out: out["execution_count"] = None
        if not keep: cell["outputs"] = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="mend what can be mended, then check")
    args = parser.parse_args()
    names, faults, notebooks = tracked(), [], {}
    for name in (name for name in names if name.endswith(".ipynb")):
        notebooks[name] = nb = read_notebook(ROOT, name)
        before = (ROOT / name).read_text(encoding="utf-8")
        if args.fix:
            fix(name, nb)
            if (after := as_json(nb)) != before: (ROOT / name).write_text(after, encoding="utf-8")
        faults += [f"{name}: {fault}" for fault in notebook_faults(name, nb)]
    faults += record_faults(notebooks, names)
    faults += [f"{name}: larger than {LARGEST:,} bytes" for name in names if (ROOT / name).stat().st_size > LARGEST]
    if faults: sys.exit("\n".join([*faults, f"{len(faults)} faults; most are mended by: python tools/check_notebooks.py --fix"]))
    print(f"{len(notebooks)} notebooks and {len(names)} files are fit for git")


if __name__ == "__main__": main()

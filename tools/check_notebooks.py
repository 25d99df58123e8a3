#!/usr/bin/env python3
"""Are the notebooks fit for git? Python and git alone are enough.

A chapter (a notebook with a `default_exp`) carries no outputs. Notebooks that people look at on the repository's page (the index, the
gallery, the tutorials) may keep small, repeatable ones. None carries execution counts, widget state or an editor's notes. Cell ids are 8 hex
digits, because the exported modules carry them. No file in git is larger than a megabyte.

python tools/check_notebooks.py        name every fault, and fail if there is one
python tools/check_notebooks.py --fix  mend what can be mended: clear chapters, counts and metadata, shorten ids
"""
import argparse
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
METADATA = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
ID = re.compile(r"[0-9a-f]{8}")
CONFLICT = re.compile(r"`?(<{7}|={7}|>{7})")
SOMEBODYS_FOLDER = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|private)/\w|[A-Z]:\\\\Users")


def tracked() -> list[str]:
    "Every file that is in git, or will be."
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    return sorted(name for name in set(done.stdout.split("\0")) if name and (ROOT / name).is_file())


def text(value) -> str:
    "Notebooks store text as one string or as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def may_show(name: str, nb: dict) -> bool:
    "May this notebook keep outputs? A chapter never does, whatever its name."
    chapter = any(re.search(r"^#\|\s*default_exp\b", text(cell["source"]), re.M) for cell in nb["cells"] if cell["cell_type"] == "code")
    return not chapter and any(fnmatch(name, pattern) for pattern in MAY_SHOW)


def output_faults(out: dict):
    "What an output that people look at must not hold."
    if out["output_type"] == "error": yield f"holds an error: {out['ename']}"
    if out.get("name") == "stderr": yield "holds warnings or progress (stderr)"
    shown = [text(out["text"])] if "text" in out else [text(v) for k, v in out.get("data", {}).items() if k.startswith("text/")]
    if any(SOMEBODYS_FOLDER.search(part) for part in shown): yield "names a folder of the machine it ran on"
    if any("widget" in kind for kind in out.get("data", {})): yield "holds a widget, which needs a running kernel"


def notebook_faults(name: str, nb: dict):
    "Everything in one notebook that does not belong into git."
    if nb["metadata"] != METADATA: yield f"its metadata hold more than the kernel's name: {', '.join(nb['metadata'])}"
    ids, show = [cell.get("id", "") for cell in nb["cells"]], may_show(name, nb)
    for place, cell in enumerate(nb["cells"]):
        where = f"cell {place} ({ids[place]})"
        if not ID.fullmatch(ids[place]): yield f"{where}: its id is not 8 hex digits"
        if ids.index(ids[place]) < place: yield f"{where}: an earlier cell has the same id"
        if CONFLICT.match(text(cell["source"])): yield f"{where}: a conflict is not resolved"
        if cell["cell_type"] != "code": continue
        if cell["execution_count"] is not None: yield f"{where}: carries an execution count"
        if cell["outputs"] and not show: yield f"{where}: carries outputs"
        elif show: yield from (f"{where}: {fault}" for out in cell["outputs"] for fault in output_faults(out))


def new_id(cell: dict, taken: set[str]) -> str:
    "The id itself where it is good, else 8 hex digits made from it."
    found = cell.get("id", "")
    while not ID.fullmatch(found) or found in taken: found = hashlib.sha256(f"{found}{text(cell['source'])}{len(taken)}".encode()).hexdigest()[:8]
    return found


def fix(name: str, nb: dict) -> None:
    "Mend in place what a machine can mend."
    nb["metadata"] = METADATA
    nb["nbformat_minor"] = max(5, nb["nbformat_minor"])
    taken, show = set(), may_show(name, nb)
    for cell in nb["cells"]:
        cell["id"] = new_id(cell, taken)
        taken.add(cell["id"])
        if cell["cell_type"] != "code": continue
        cell["execution_count"] = None
        if not show: cell["outputs"] = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="mend what can be mended, then check")
    args = parser.parse_args()
    names, faults = tracked(), []
    notebooks = [name for name in names if name.endswith(".ipynb")]
    for name in notebooks:
        before = (ROOT / name).read_text(encoding="utf-8")
        nb = json.loads(before)
        if args.fix:
            fix(name, nb)
            after = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
            if after != before: (ROOT / name).write_text(after, encoding="utf-8")
        faults += [f"{name}: {fault}" for fault in notebook_faults(name, nb)]
    faults += [f"{name}: larger than {LARGEST:,} bytes" for name in names if (ROOT / name).stat().st_size > LARGEST]
    if faults: sys.exit("\n".join([*faults, f"{len(faults)} faults; most are mended by: python tools/check_notebooks.py --fix"]))
    print(f"{len(notebooks)} notebooks and {len(names)} files are fit for git")


if __name__ == "__main__": main()

#!/usr/bin/env python3
"""Execute chapters and store their outputs, so that they can be looked at where they lie.

python tools/outputs.py                       run and store every chapter whose sources have moved on
python tools/outputs.py nbs/05_losses.ipynb   these chapters, moved on or not
python tools/outputs.py --all                 every chapter
python tools/outputs.py --suspects            also those whose own sources stand still, while modules that they import have changed
python tools/outputs.py --check               execute nothing; fail, and name each chapter whose outputs do not belong to its sources
python tools/outputs.py --verify              store nothing; run suspects (with --all or paths: those) and fail where outputs differ

Each chapter runs in a process of its own, from its own folder in a scratch copy of the repository, as nbdev_test runs it: the same shell,
the same cells left out (`eval: false`, and the `tst_flags` of settings.ini), one thread, a fixed hash seed. A chapter is written when it
is done and whole: a run that is killed, or a chapter that raises, leaves the file that was there. `python tools/check_notebooks.py` knows
the rules of what may be stored; this tool makes figures fit by fewer colours, then fewer pixels, and cuts long text. A cell that was left
out keeps what it showed as long as its source is the same (`--flags slow` runs such cells too).

When have the sources moved on? The record in a notebook's metadata, `pli.outputs`, tells three things apart:

* `sources` is a digest of the notebook's own code cells and of the files in git that it, or a Python process that it started, read while it
  ran (`reads`: results, plans). When
  they differ the outputs are not those of this notebook, and the check refuses it. Whoever edits a chapter executes it.
* `shown` is a digest of the outputs themselves: one that somebody edited, deleted or moved is refused too.
* `modules` is a digest of the code of all modules that it imports, directly or through others, and of the package's own files that it
  read. When they differ the outputs may still be right, and nearly always are. Were that a fault, a change of `core` would make every
  chapter stale, every branch would rewrite forty files, and no two branches could be merged. So such a chapter is a suspect and no fault:
  the check counts them, and `--verify`, for which the continuous integration has some minutes, executes suspects until its `--seconds` are
  over, and begins at another one each day. It refuses one only where the outputs really differ (numbers may by 2 %, figures by a little,
  as other machines round otherwise).
"""
import argparse
import base64
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_notebooks import (
    LARGEST,
    LARGEST_FIGURE,
    LONGEST_LINE,
    METADATA,
    MOST_LINES,
    ROOT,
    as_json,
    chapters,
    code_cells,
    digest,
    edited,
    module_digest,
    moved_on,
    read_notebook,
    reads_of,
    record,
    shown_digest,
    source_digest,
    stored_faults,
    text,
    tracked,
)

COLOURS = (64, 128, 256)  # as many as fit
SCALES = (1.0, 0.85, 0.7, 0.55)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
MOMENT = re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\b")
AT_ADDRESS = re.compile(r"(<[^>\n]*?) at 0x[0-9a-fA-F]+(>)")
WIDGET = "(a widget: it needs a running kernel)"


class Refused(Exception):
    "A chapter that cannot be stored; the message names the cell and the remedy."


# what comes out of a cell, and what of it is stored

def fit_png(data: bytes) -> bytes:
    "The picture as a PNG of few colours without notes, in as many pixels as fit into `LARGEST_FIGURE` bytes."
    from PIL import Image
    with Image.open(io.BytesIO(data)) as opened: picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    for scale in SCALES:
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        smaller = picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
        best = b""
        for colours in COLOURS:
            stored = io.BytesIO()
            smaller.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
            if stored.tell() > LARGEST_FIGURE: break
            best = stored.getvalue()
        if best: return best
    raise Refused(
        f"its figure of {picture.width} x {picture.height} pixels does not fit into {LARGEST_FIGURE:,} bytes: "
        "draw fewer pictures, or a smaller figure"
    )


def fit_text(shown: str, gap: tuple[str, ...] = ()) -> list[str]:
    "Text as lines, without colours and addresses; lines past `MOST_LINES` are counted, not stored, and said to be after a `gap`."
    shown = AT_ADDRESS.sub(r"\1\2", ESCAPES.sub("", shown))
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in shown.replace("\r\n", "\n").rstrip("\n").split("\n")]
    lines = [line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 40]} ... ({len(line):,} characters)" for line in lines]
    if (more := len(lines) - MOST_LINES) > 0:
        lines = [*lines[:MOST_LINES], *gap, f"... {more:,} more line{'s are' if more > 1 else ' is'} left out"]
    return [f"{line}\n" for line in lines[:-1]] + lines[-1:]


def fit_output(out: dict, private: tuple[str, ...] = (), began: str = "9") -> dict | None:
    "One output as it is stored, or None for what is not (warnings); no text may name a `private` folder, or a moment since the run `began`."
    if out["output_type"] == "error": raise Refused(f"it raised {out['ename']}: {out['evalue']}")
    if out["output_type"] == "stream":
        if out["name"] != "stdout" or not text(out["text"]).strip(): return None
        stored = {"output_type": "stream", "name": "stdout", "text": fit_text(text(out["text"]))}
        shown = stored["text"]
    else:
        stored = {"output_type": out["output_type"], "metadata": {}, "data": fit_data(out["data"])}
        if out["output_type"] == "execute_result": stored["execution_count"] = None
        shown = next(iter(stored["data"].values()))
    if named := next((folder for folder in private if folder in text(shown)), None):
        raise Refused(
            f"its text names a folder of this machine ({named}): show the path from a folder that the reader knows, or only its name"
        )
    if moment := next((found for found in MOMENT.findall(text(shown)) if found.replace(" ", "T") >= began), None):
        raise Refused(f"its text shows when it was run ({moment}): another run shows another moment; show something else in its place")
    if faults := list(stored_faults(stored)): raise Refused(f"it {'; '.join(faults)}: show what another run would show again")
    return stored


def fit_data(data: dict) -> dict:
    "The one form of a displayed object that is stored: its picture, else its markdown, else its text."
    if any("widget" in kind for kind in data): return {"text/plain": [WIDGET]}
    picture = next((data[kind] for kind in ("image/png", "image/jpeg") if kind in data), None)
    if picture is not None: return {"image/png": base64.b64encode(fit_png(base64.b64decode(text(picture)))).decode()}
    kind = next((kind for kind in ("text/markdown", "text/plain") if kind in data), None)
    if kind is None or kind == "text/plain" and re.match(r"<IPython\.core\.display\.\w+ object>", text(data[kind])):
        raise Refused(f"it shows {', '.join(sorted(data))} only: show a figure, Markdown or text")
    return {kind: fit_text(text(data[kind]), gap=("",) if kind == "text/markdown" else ())}  # a table ends at an empty line


def fit_outputs(outputs: list[dict], private: tuple[str, ...] = (), began: str = "9") -> list[dict]:
    "What is stored of all outputs of a cell; the same figure shown twice in a row (by pyplot and as the last value) is stored once."
    stored = [fitted for out in outputs if (fitted := fit_output(out, private, began))]
    return [
        out
        for place, out in enumerate(stored)
        if not (place and out.get("data", 0) == stored[place - 1].get("data", 1) and "image/png" in out["data"])
    ]


# running one chapter

WATCH = '''"Write down, a line each, the files below a folder that this process opens for reading; in a child, this is its sitecustomize."
import os, sys

def begin(root, log):
    seen = set()
    def watch(event, args):
        if event != "open" or not isinstance(args[2], int) or args[2] & (os.O_WRONLY | os.O_RDWR): return
        try: name = os.path.abspath(os.fsdecode(args[0]))
        except (TypeError, ValueError, OSError): return     # an open file's number
        if not name.startswith(root + "/") or name in seen: return
        seen.add(name)
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, os.fsencode(name[len(root) + 1:]) + b"\\n")
        os.close(file)
    sys.addaudithook(watch)

if "OUTPUTS_READS" in os.environ: begin(os.environ["OUTPUTS_ROOT"], os.environ["OUTPUTS_READS"])
'''


def run_here(path: Path, report: Path, skip_flags: list[str], root: Path) -> None:
    "Execute the notebook as nbdev_test does, and write what came out of every cell: this is the chapter's own process."
    from execnb.shell import CaptureShell
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, nb_lang
    sys.path.insert(0, str(root))
    os.environ["IN_TEST"] = "1"
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    told = {"outputs": {}, "left_out": [], "failed": None, "reads": []}

    def left_out(cell) -> bool:
        if cell.cell_type != "code": return True
        directives = getattr(cell, "directives_", {}) or {}
        skipped = (
            "nbdev_export(" in cell.source
            or directives.get("eval:", [""])[0].lower() == "false"
            or bool(set(skip_flags) & directives.keys())
        )
        if skipped: told["left_out"].append(cell.id)
        return skipped

    whole = str(getattr(nb, "frontmatter_", {}).get("skip_exec", "")).lower() in ("1", "true", "yes") or nb_lang(nb) != "python"
    if whole: told["left_out"] = [cell.id for cell in nb.cells if cell.cell_type == "code"]
    else:
        shell = CaptureShell(path, mpl_format="png")
        os.chdir(path.parent)
        log = report.with_suffix(".reads")
        os.environ |= {"OUTPUTS_ROOT": str(root), "OUTPUTS_READS": str(log)}   # what the chapter starts writes down what it reads, too
        exec(WATCH, {})
        for cell in nb.cells:
            if left_out(cell): continue
            told["outputs"][cell.id] = shell.run(cell.source)
            if shell.exc:
                last = (str(shell.exc).strip().splitlines() or [""])[0]
                told["failed"] = {"cell": cell.id, "why": f"{type(shell.exc).__name__}: {last}"}
                break
    if not whole and log.is_file(): told["reads"] = sorted(set(os.fsdecode(log.read_bytes()).splitlines()))
    report.write_text(json.dumps(told, default=str), encoding="utf-8")


def environment(scratch: Path) -> dict:
    "The same for every run: one thread and hash seed, no colours, nobody's cache or settings, temporary files in the scratch folder."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLI_", "PYTEST_", "MPL", "PYTHON", "COV_"))}
    folders = {name: str(scratch / name.lower()) for name in ("TMPDIR", "PLI_CACHE", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "IPYTHONDIR")}
    for folder in folders.values(): Path(folder).mkdir(exist_ok=True)
    fixed = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TZ": "UTC",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }
    return kept | folders | fixed | {"PYTHONPATH": f"{scratch / 'copy'}{os.pathsep}{scratch / 'watch'}"}  # what a chapter starts imports the copy too


def execute(name: str, names: list[str], root: Path, flags: list[str], limit: float) -> dict:
    "What `run_here` told about a chapter, run in a process of its own on a fresh copy of git's files, which is gone afterwards."
    with tempfile.TemporaryDirectory(prefix="pli-outputs-") as made:
        scratch = Path(made).resolve()
        copy = scratch / "copy"
        for each in names:
            (copy / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / each, copy / each)
        (scratch / "watch").mkdir()
        (scratch / "watch" / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
        skip = [flag for flag in test_flags(root) if flag not in flags]
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--run-here",
            str(copy / name),
            str(scratch / "report.json"),
            str(copy),
            *skip,
        ]
        with subprocess.Popen(
            command,
            cwd=copy,
            env=environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child:
            try:
                _, noise = child.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise Refused(f"it was not done after {limit:.0f} s: make it shorter, or allow more with --limit") from None
            finally:
                try: os.killpg(child.pid, signal.SIGKILL)  # whatever it started ends with it
                except ProcessLookupError: pass
        report = scratch / "report.json"
        if not report.is_file():
            raise Refused("its process ended early: " + (noise.strip().splitlines() or [f"exit status {child.returncode}"])[-1])
        return json.loads(report.read_text(encoding="utf-8")) | {"private": [str(scratch), str(root), sys.prefix, str(Path.home())]}


def test_flags(root: Path) -> list[str]:
    "The flags of cells that nbdev_test leaves out."
    found = re.search(r"^tst_flags\s*=\s*(.*)$", (root / "settings.ini").read_text(encoding="utf-8"), re.M)
    return found[1].split() if found else []


def folded(reads: list[str], names: list[str]) -> list[str]:
    "Files of git that a chapter read, apart from notebooks, modules and settings; several in one folder stand as that folder."
    known, apart = set(names), ("settings.ini", "pyproject.toml")
    data = [name for name in reads if name in known and not name.endswith((".py", ".ipynb")) and name not in apart]
    folders = [name.rpartition("/")[0] for name in data]
    return sorted({f"{folder}/" if folder and folders.count(folder) > 1 else name for name, folder in zip(data, folders)})


# one chapter from beginning to end

def renew(name: str, names: list[str], root: Path, flags: list[str] = (), limit: float = 600) -> tuple[str, dict]:
    "The text of the notebook with fresh outputs, and some counts for the progress line; `Refused` if it cannot be stored."
    if (root / name).is_symlink(): raise Refused("it is a link: store the notebook that it leads to")
    nb = read_notebook(root, name)
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 1))
    told = execute(name, names, root, list(flags), limit)
    private, before = tuple(folder for folder in told["private"] if len(folder) > 1), record(nb) or {}
    if told["failed"]: raise Refused(f"cell {told['failed']['cell']} raised {told['failed']['why']}")
    kept, counts, refused = {}, {"figures": 0, "texts": 0, "warnings": 0, "left out": len(told["left_out"])}, []
    for cell in code_cells(nb):
        cell["execution_count"] = None
        if cell["id"] in told["left_out"]:
            known, now = before.get("left_out", {}).get(cell["id"]), digest(text(cell["source"]).strip())
            fresh = cell["outputs"] if cell["outputs"] and known in (None, now) else []
            if fresh: kept[cell["id"]] = now
        else: fresh = told["outputs"].get(cell["id"], [])
        counts["warnings"] += sum(out.get("name") == "stderr" for out in fresh)
        try: cell["outputs"] = fit_outputs(fresh, private, began)
        except Refused as why: refused.append(f"cell {cell['id']}: {why}")
        for out in cell["outputs"]: counts["figures" if "image/png" in out.get("data", ()) else "texts"] += 1
    if refused: raise Refused("\n    ".join(refused))
    reads = folded(told["reads"], names)
    made = {"sources": source_digest(nb, reads, names, root), "modules": module_digest(nb, reads, names, root)}
    made |= {"shown": shown_digest(nb)}
    made |= ({"reads": reads} if reads else {}) | ({"left_out": kept} if kept else {})
    nb["metadata"] = METADATA | {"pli": {"outputs": made}}
    nb["nbformat_minor"] = max(5, nb["nbformat_minor"])
    stored = as_json(nb)
    if len(stored.encode()) > LARGEST:
        raise Refused(
            f"with its outputs it has {len(stored.encode()):,} bytes, more than {LARGEST:,}: show fewer figures, or make two chapters"
        )
    return stored, counts


def cell_texts(notebook: str) -> list[str]:
    "What people write in a notebook: the sources of all its cells."
    return [text(cell["source"]) for cell in json.loads(notebook)["cells"]]


def write(path: Path, stored: str) -> bool:
    "Put the text in the file's place in one step; False if that is what is there. `Refused` if somebody changed the cells while they ran."
    now = path.read_text(encoding="utf-8")
    if now == stored: return False
    if cell_texts(now) != cell_texts(stored): raise Refused("its cells were changed while it ran: run it again")
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(stored)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, part)
        os.replace(part, path)
    finally: part.unlink(missing_ok=True)
    return True


# comparing

def alike(before: dict, after: dict) -> bool:
    "Do two stored outputs show the same? Numbers may differ by 2 %, figures by a little of their ink."
    if before.get("output_type") != after.get("output_type"): return False
    if "text" in before: return same_text(text(before["text"]), text(after["text"]))
    if set(before["data"]) != set(after["data"]): return False
    return all(
        same_picture(value, after["data"][kind]) if kind == "image/png" else same_text(text(value), text(after["data"][kind]))
        for kind, value in before["data"].items()
    )


def same_text(before: str, after: str) -> bool:
    "The same words around numbers that are close."
    plain = lambda shown: " ".join(NUMBER.sub("#", shown).split())
    numbers = lambda shown: [float(found.replace(",", "")) for found in NUMBER.findall(shown)]
    return plain(before) == plain(after) and all(
        math.isclose(a, b, rel_tol=0.02, abs_tol=1e-6) for a, b in zip(numbers(before), numbers(after))
    )


def same_picture(before: str, after: str) -> bool:
    "About the same size, and on average the same grey where the two lie on each other."
    from PIL import Image, ImageChops, ImageStat
    old, new = (Image.open(io.BytesIO(base64.b64decode(data))).convert("L") for data in (before, after))
    if any(abs(a - b) > 0.03 * max(a, b) + 2 for a, b in zip(old.size, new.size)): return False
    return ImageStat.Stat(ImageChops.difference(old, new.resize(old.size))).mean[0] < 6


def differences(before: dict, after: dict) -> list[str]:
    "Cells whose stored outputs and fresh ones do not show the same."
    was = {cell["id"]: cell["outputs"] for cell in code_cells(before)}
    pairs = [(cell["id"], was.get(cell["id"], []), cell["outputs"]) for cell in code_cells(after)]
    return [f"cell {key}" for key, old, new in pairs if len(old) != len(new) or not all(map(alike, old, new))]


def exact_differences(before: dict, after: dict) -> list[str]:
    "Cells whose outputs are not the same to the byte."
    was = {cell["id"]: cell["outputs"] for cell in code_cells(before)}
    return [f"cell {cell['id']}" for cell in code_cells(after) if was.get(cell["id"]) != cell["outputs"]]


# the command

def states(names: list[str], root: Path) -> dict[str, str]:
    "Of every chapter: `bare` (never stored), `moved on`, `edited` (its outputs), `suspect` (its modules have moved on) or `fresh`."
    found = {}
    for name in chapters(names):
        nb = read_notebook(root, name)
        stored = record(nb)
        if stored is None: found[name] = "bare"
        elif moved_on(nb, names, root): found[name] = "moved on"
        elif edited(nb): found[name] = "edited"
        else: found[name] = "fresh" if stored.get("modules") == module_digest(nb, reads_of(stored), names, root) else "suspect"
    return found


def check(found: dict[str, str]) -> int:
    "Name what does not belong together; as long as nothing has been stored, nothing is asked for."
    reasons = {"moved on": "its sources have moved on since its outputs were stored", "edited": "its outputs are not those that were stored"}
    if set(found.values()) != {"bare"}: reasons["bare"] = "its outputs have never been stored"
    faults = [name for name, state in found.items() if state in reasons]
    for name in faults: print(f"{name}: {reasons[found[name]]}")
    counted = ", ".join(f"{sum(state == each for state in found.values())} {each}" for each in ("fresh", "suspect", "edited", "moved on", "bare") if each != "edited" or "edited" in found.values())
    print(f"{len(found)} chapters: {counted}")
    if faults: print("Run: python tools/outputs.py")
    return bool(faults)


def chosen(found: dict[str, str], args, root: Path) -> list[str]:
    "The chapters that a command is about."
    if args.paths:
        wanted = [os.path.relpath(os.path.abspath(path), root).replace(os.sep, "/") for path in args.paths]
        if unknown := [name for name in wanted if name not in found]:
            sys.exit(f"{', '.join(unknown)}: no chapter below nbs/ that git knows")
        return wanted
    if args.all: return list(found)
    if args.verify: return [name for name, state in found.items() if state == "suspect"]
    return [name for name, state in found.items() if state in ("bare", "moved on", "edited") or args.suspects and state == "suspect"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="NOTEBOOK", help="chapters to run, moved on or not")
    parser.add_argument("--all", action="store_true", help="every chapter")
    parser.add_argument("--suspects", action="store_true", help="also chapters whose modules have changed")
    parser.add_argument("--check", action="store_true", help="execute nothing, fail when outputs do not belong to their sources")
    parser.add_argument("--verify", action="store_true", help="store nothing, fail when a fresh run shows something else")
    parser.add_argument("--exact", action="store_true", help="with --verify: to the byte")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further chapter after so many seconds")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one chapter may take (default 600)")
    parser.add_argument("--flags", nargs="+", default=[], help="flags of cells to run that nbdev_test leaves out")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: the one that holds this tool)")
    args = parser.parse_args()
    root = args.root.resolve()
    names = tracked(root)
    found = states(names, root)
    if args.check: sys.exit(check(found))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child and the scratch copy are cleared away
    todo, failed, begun = chosen(found, args, root), 0, time.monotonic()
    if args.verify and todo and args.seconds < math.inf:  # another part of them each day
        turn = int(time.time() // 86_400) % len(todo)
        todo = todo[turn:] + todo[:turn]
    for place, name in enumerate(todo, 1):
        if time.monotonic() - begun > args.seconds:
            print(f"{len(todo) - place + 1} chapters are left for another time: {args.seconds:.0f} s are over")
            break
        start = time.monotonic()
        try:
            stored, counts = renew(name, names, root, args.flags, args.limit)
            told = f"{counts['figures']} figures, {counts['texts']} texts"
            if counts["warnings"]: told += f", {counts['warnings']} warnings not stored"
            if counts["left out"]: told += f", {counts['left out']} cells left out as by nbdev_test"
            if args.verify:
                compare = exact_differences if args.exact else differences
                if found[name] == "bare": raise Refused("its outputs have never been stored: run python tools/outputs.py")
                if wrong := compare(json.loads((root / name).read_text(encoding="utf-8")), json.loads(stored)):
                    raise Refused(f"a fresh run shows something else in {', '.join(wrong)}: run python tools/outputs.py {name}")
                told += ", as stored"
            else: told += ", written" if write(root / name, stored) else ", as before"
        except Refused as why:
            failed += 1
            told = f"NOT {'AS STORED' if args.verify else 'STORED'}: {why}"
        print(f"[{place}/{len(todo)}] {name}: {told} ({time.monotonic() - start:.1f} s)", flush=True)
    if failed: sys.exit(f"{failed} of {len(todo)} chapters could not be {'verified' if args.verify else 'stored'}")
    if not todo:
        print(
            "nothing to run: "
            + ("no chapter's modules have moved on" if args.verify else "every chapter's outputs belong to its sources")
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-here"]: run_here(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[5:], Path(sys.argv[4]))
    else: main()

"""Which database should hold a gallery: SQLite, as `pli.gallery.store` uses it, or LanceDB? The same rows and the same questions to both.

    python tools/gallery_table.py [--rows 20000] [--kills 5] [--out results/gallery-table.json]

A row is a picture: path, size, time, digest, date, a 192-pixel JPEG thumbnail and 512 float32. Asked are: rows a second in small and large batches; two
writers at once, on different pictures and on the same ones; kill -9 in the middle, several times; one thumbnail by number; a filter by folder and date;
one picture that moves; all features as one array; the time to open; the bytes on disk; and what is waited for on disk (fsync), which decides what a power cut
leaves. LanceDB is asked as it comes and once more after `optimize`, with a scalar index on the number, because that is how it would be kept.

Times are only worth something on a quiet machine; the load before and after the run is part of the record.
"""
import argparse
import contextlib
import datetime
import hashlib
import io
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pli.core import provenance, unit, write_json
from pli.gallery.store import PictureTable, Row

WIDTH, DRAWINGS, FOLDERS, QUESTIONS = 512, 256, 40, 50


def thumbnails() -> list[bytes]:
    "Some JPEGs of 192 pixels, soft noise, a few kB each."
    rng, made = np.random.default_rng(0), []
    for _ in range(DRAWINGS):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (14, 19, 3), dtype=np.uint8)).resize((192, 144), Image.Resampling.BICUBIC).save(data, "JPEG", quality=82)
        made.append(data.getvalue())
    return made


def made_rows(first: int, last: int) -> Iterator[Row]:
    "Rows of these numbers, the same in every process; each thumbnail ends in its own number, so that no two are equal."
    small = thumbnails()
    for start in range(first, last, 1024):
        numbers = range(start, min(start + 1024, last))
        features = unit(torch.from_numpy(np.random.default_rng(start).standard_normal((len(numbers), WIDTH), dtype=np.float32)))
        for number, feature in zip(numbers, features):
            taken = (datetime.datetime(2010, 1, 1) + datetime.timedelta(hours=number)).isoformat()
            yield Row(f"folder-{number % FOLDERS:02}/IMG_{number:07}.jpg".encode(), 100_000 + number, number, hashlib.sha256(str(number).encode()).digest(), 500, 375, taken,
                      thumbnail=small[number % DRAWINGS] + number.to_bytes(8, "big"), feature=feature)


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    held = []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield held
            held = []
    if held: yield held


class Sqlite:
    "The gallery's own table."
    name = "SQLite"

    def __init__(self, folder: Path): self.path = folder / "gallery.sqlite"

    def open(self) -> None: self.table = PictureTable(self.path, create=True)

    def close(self) -> None: self.table.close()

    def put(self, rows: list[Row]) -> None: self.table.put(rows)

    def tidy(self) -> None: pass

    def count(self) -> int: return len(self.table)

    def paths(self) -> list[str]: return [picture.path for picture in self.table.select()]

    def whole(self) -> bool:
        "Whether the file is sound and every row complete."
        sound = self.table.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return sound and self.table.connection.execute("SELECT count(*) FROM picture WHERE length(feature) != ? OR thumbnail IS NULL", (4 * WIDTH,)).fetchone()[0] == 0

    def thumbnail(self, number: int) -> bytes: return self.table.thumbnail(number + 1)

    def filter(self) -> int:
        return self.table.connection.execute("SELECT count(*) FROM (SELECT id, path FROM picture WHERE path >= ? AND path < ? AND taken >= ? AND taken < ?)",
                                             (b"folder-07/", b"folder-070", "2010-02", "2011-02")).fetchone()[0]

    def move(self, number: int) -> None:
        with self.table.writing() as connection: connection.execute("UPDATE picture SET path = ? WHERE id = ?", (f"moved/{number}.jpg".encode(), number + 1))

    def features(self) -> np.ndarray:
        parts = [feature for feature, in self.table.connection.execute("SELECT feature FROM picture ORDER BY id")]
        return np.frombuffer(b"".join(parts), "<f4").reshape(-1, WIDTH)


class Lance:
    "The same rows as a LanceDB table; `path` decides which row is replaced, as in the gallery's own."
    name = "LanceDB"

    def __init__(self, folder: Path): self.path = folder / "lance"

    def open(self) -> None:
        import lancedb
        self.table = lancedb.connect(self.path).create_table("pictures", schema=self.schema(), exist_ok=True)

    def close(self) -> None: del self.table

    @staticmethod
    def schema():
        import pyarrow as pa
        return pa.schema([("id", pa.int64()), ("path", pa.string()), ("size", pa.int64()), ("changed", pa.int64()), ("content", pa.binary()), ("width", pa.int32()), ("height", pa.int32()),
                          ("taken", pa.string()), ("thumbnail", pa.large_binary()), ("feature", pa.list_(pa.float32(), WIDTH))])

    def put(self, rows: list[Row]) -> None:
        import pyarrow as pa
        numbers = [row.changed for row in rows]
        features = pa.FixedSizeListArray.from_arrays(pa.array(torch.stack([row.feature for row in rows]).numpy().reshape(-1)), WIDTH)
        columns = [numbers, [row.path.decode() for row in rows], [row.size for row in rows], numbers, [row.content for row in rows], [row.width for row in rows], [row.height for row in rows],
                   [row.taken for row in rows], [row.thumbnail for row in rows], features]
        data = pa.table(columns, schema=self.schema())
        self.table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(data)

    def tidy(self) -> None:
        from lancedb.index import BTree
        self.table.create_index("id", config=BTree())
        self.table.optimize(cleanup_older_than=datetime.timedelta(milliseconds=1))

    def count(self) -> int: return self.table.count_rows()

    def paths(self) -> list[str]: return self.table.search().select(["path"]).limit(None).to_arrow()["path"].to_pylist()

    def whole(self) -> bool:
        found = self.table.search().limit(None).to_arrow()
        return all(column.null_count == 0 for column in found.columns)

    def thumbnail(self, number: int) -> bytes: return self.table.search().where(f"id = {number}").select(["thumbnail"]).to_arrow()["thumbnail"][0].as_py()

    def filter(self) -> int:
        found = self.table.search().where("path >= 'folder-07/' AND path < 'folder-070' AND taken >= '2010-02' AND taken < '2011-02'").select(["id", "path"]).limit(None).to_arrow()
        return len(found)

    def move(self, number: int) -> None: self.table.update(f"id = {number}", {"path": f"moved/{number}.jpg"})

    def features(self) -> np.ndarray:
        found = self.table.search().select(["id", "feature"]).limit(None).to_arrow().combine_chunks()
        order = np.argsort(found["id"].to_numpy())
        return found["feature"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)[order]


STORES = {kind.name: kind for kind in (Sqlite, Lance)}


@contextlib.contextmanager
def opened(kind: str, folder: Path):
    store = STORES[kind](folder)
    store.open()
    try: yield store
    finally: store.close()


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_ms(call, numbers) -> float: return round(1000 * statistics.median(timed(lambda: call(number)) for number in numbers), 3)


def size_of(path: Path) -> int: return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def write(kind: str, folder: Path, first: int, last: int, size: int) -> None:
    "In a process of its own: write rows and print every batch that the store has promised to keep."
    with opened(kind, folder) as store:
        held = list(batches(made_rows(first, last), size)) if last - first < 10_000 else batches(made_rows(first, last), size)
        print("ready", flush=True)
        sys.stdin.readline()
        for batch in held:
            store.put(batch)
            print(batch[-1].changed + 1, flush=True)


def writer(kind: str, folder: Path, first: int, last: int, size: int, before=()) -> subprocess.Popen:
    words = [*before, sys.executable, __file__, "--write", kind, str(folder), str(first), str(last), str(size)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ingest(kind: str, folder: Path, rows: list[Row], size: int) -> float:
    "Rows a second."
    with opened(kind, folder) as store: return len(rows) / timed(lambda: [store.put(batch) for batch in batches(iter(rows), size)])


def ask(kind: str, folder: Path, rows: list[Row]) -> dict:
    "What a gallery asks of a table that is full."
    numbers = random.Random(0).sample(range(len(rows)), QUESTIONS)
    spent = []
    for _ in range(10):
        store = STORES[kind](folder)
        spent.append(timed(lambda: (store.open(), store.count())))
        store.close()
    with opened(kind, folder) as store:
        if store.thumbnail(numbers[0]) != rows[numbers[0]].thumbnail: raise SystemExit(f"gallery_table: {kind} gave another thumbnail")
        held = store.features()
        if not np.array_equal(held, torch.stack([row.feature for row in rows]).numpy()): raise SystemExit(f"gallery_table: {kind} gave other features")
        expected = sum(row.path.startswith(b"folder-07/") and "2010-02" <= row.taken < "2011-02" for row in rows)
        if store.filter() != expected: raise SystemExit(f"gallery_table: {kind} gave {store.filter()} rows for a filter, {expected} are right")
        return {"open and count, ms": round(1000 * statistics.median(spent), 2), "one thumbnail by number, ms": median_ms(store.thumbnail, numbers),
                "filter by folder and date, ms": median_ms(lambda _: store.filter(), range(10)), "all features as one array, s": round(statistics.median(timed(store.features) for _ in range(3)), 3),
                "bytes a row on disk": round(size_of(store.path) / len(rows))}


def two_writers(kind: str, place: Path, same: bool, count: int, size: int, turns: int = 3) -> dict:
    "Two processes begin to write at the same moment: each its own rows, or both the same ones; several times, each time into an empty store."
    spans = [(0, count), (0, count)] if same else [(0, count), (count, 2 * count)]
    rows, doubled, errors = [], [], []
    for turn in range(turns):
        folder = place / str(turn)
        folder.mkdir()
        with opened(kind, folder): pass
        processes = [writer(kind, folder, *span, size) for span in spans]
        for process in processes: process.stdout.readline()
        for process in processes: print("go", file=process.stdin, flush=True)
        ends = [process.communicate(timeout=600) for process in processes]
        errors += [error.strip().splitlines()[-1][:160] for process, (_, error) in zip(processes, ends) if process.returncode]
        with opened(kind, folder) as store: paths = store.paths()
        rows, doubled = [*rows, len(paths)], [*doubled, len(paths) - len(set(paths))]
    return {"expected rows": spans[-1][1], "rows": rows, "doubled": doubled, "writers that failed": len(errors), "errors": errors}


def killed(kind: str, folder: Path, times: int, count: int, size: int) -> dict:
    "Kill a writer at random moments, again and again on the same store; what it had promised must be there, whole."
    dice, lost, torn, unreadable, promised, there = random.Random(0), 0, 0, 0, 0, 0
    for _ in range(times):
        process = writer(kind, folder, promised, promised + count, size)
        process.stdout.readline()
        print("go", file=process.stdin, flush=True)
        first = process.stdout.readline()
        time.sleep(dice.uniform(0, 1.5))
        process.kill()
        said = [int(line) for line in (first + process.communicate()[0]).split()]
        promised = max([promised, *said])
        try:
            with opened(kind, folder) as store:
                paths = set(store.paths())
                lost += sum(row.path.decode() not in paths for row in made_rows(0, promised))
                torn += not store.whole() or len(paths) % size != 0
                there = len(paths)
        except Exception: unreadable += 1
    return {"times": times, "unreadable afterwards": unreadable, "torn batches or rows": torn, "promised rows that are lost": lost, "rows at the end": there}


def waits(kind: str, folder: Path, count: int, size: int) -> float | None:
    "Calls of fsync and its like a batch, as strace counts them; None where there is no strace."
    if not shutil.which("strace"): return None
    with tempfile.NamedTemporaryFile() as log:
        process = writer(kind, folder, 0, count, size, ("strace", "-f", "-q", "-e", "trace=fsync,fdatasync,sync_file_range,msync", "-o", log.name))
        process.communicate("go\n")
        lines = [line for line in Path(log.name).read_text().splitlines() if "sync(" in line or "sync_file_range(" in line]
    return round(len(lines) / (count / size), 2)


def measure(kind: str, place: Path, rows: list[Row], kills: int) -> dict:
    "Everything of one store."
    folder = lambda name: (place / f"{kind}-{name}").mkdir() or place / f"{kind}-{name}"
    small, large = folder("small"), folder("large")
    record = {"ingest in batches of 64, rows a second": round(ingest(kind, small, rows, 64)), "ingest in batches of 4096, rows a second": round(ingest(kind, large, rows, 4096)),
              "full, written in batches of 64": ask(kind, small, rows)}
    with opened(kind, small) as store: record["tidy, s"] = round(timed(store.tidy), 3)
    record["full, tidied"] = ask(kind, small, rows)
    with opened(kind, small) as store: record["one picture moves, ms"] = median_ms(store.move, range(100, 110))
    record |= {"two writers, different pictures": two_writers(kind, folder("two"), False, 2560, 64), "two writers, the same pictures": two_writers(kind, folder("same"), True, 2560, 64),
               "kill -9": killed(kind, folder("killed"), kills, 64_000, 64), "waits for the disk, calls a batch": waits(kind, folder("waits"), 640, 64)}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, metavar="N", help="pictures (default: 20000)")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="how often a writer is killed (default: 5)")
    parser.add_argument("--note", help="a remark for the record, such as what else the machine did")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--write", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write: return write(args.write[0], Path(args.write[1]), *map(int, args.write[2:]))
    if args.rows < 1000 or args.kills < 1: parser.error("--rows must be at least 1000 and --kills at least 1")
    began = time.perf_counter()
    import lancedb                                    # before any time is taken
    brings = round(time.perf_counter() - began, 2)
    record, load = provenance(f"python tools/gallery_table.py --rows {args.rows} --kills {args.kills}", 0), [os.getloadavg()[0]]
    record["versions"] |= {"sqlite": sqlite3.sqlite_version, "lancedb": lancedb.__version__, "pyarrow": metadata.version("pyarrow")}
    rows = list(made_rows(0, args.rows))
    with tempfile.TemporaryDirectory() as place: parts = {kind: measure(kind, Path(place), rows, args.kills) for kind in STORES}
    parts["LanceDB"]["import, s"] = brings
    record |= {"load of the machine before and after": [round(found, 2) for found in [*load, os.getloadavg()[0]]], "note": args.note or "", "what": f"{args.rows:,} rows: path, size, time, digest, date, thumbnail of "
               f"{round(statistics.mean(len(row.thumbnail) for row in rows)):,} bytes on average, {WIDTH} float32", "stores": parts}
    print(json.dumps(record["stores"], indent=1, ensure_ascii=False))
    if args.out: write_json(args.out, record)


if __name__ == "__main__": main()

"""Two places keep features: the cache of the benchmarks (shards of safetensors) and a gallery (a table of SQLite, and a matrix). Measure both on the same job.

    python tools/feature_stores.py --out results/feature-stores.json

As many features as CIRCO has pictures, made up, are written as each of the two does while it encodes, read back whole, read again, added to; then a process that writes is
killed with -9 a few times, and two processes write the same features at once.
"""
import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pli.core import rng_for, provenance, unit, write_json
from pli.gallery.encode import BATCH_MULTIPLE, SHARD, SHARDS, FeatureStore
from pli.gallery.store import PictureTable, Row, read_vectors

PICTURES, WIDTH, KILLS = 123_403, 512, 5
STORES = ("cache", "gallery")


def features(start: int, count: int) -> torch.Tensor: return unit(torch.randn(count, WIDTH, generator=rng_for(start, "features")))


def key(number: int) -> bytes: return hashlib.sha256(str(number).encode()).digest()


def write(store: str, folder: Path, count: int, start: int = 0) -> None:
    "Write features in the portions in which each of the two is written while pictures are encoded."
    portion = SHARD if store == "cache" else BATCH_MULTIPLE
    made = [(at, features(at, min(SHARD, start + count - at))) for at in range(start, start + count, SHARD)] if count <= 10 * SHARD else ((at, features(at, min(SHARD, start + count - at))) for at in range(start, start + count, SHARD))
    table = PictureTable(folder / "gallery.sqlite", create=True) if store == "gallery" else None
    for at, rows in made:
        for first in range(0, len(rows), portion):
            some = rows[first : first + portion]
            if store == "cache": FeatureStore(folder, {"what": "measured"}).add([key(at + first + i) for i in range(len(some))], some)
            else: table.put([Row(b"images/%012d.jpg" % (at + first + i), 100_000, 1, key(at + first + i), 640, 480, feature=each) for i, each in enumerate(some)])
    if table: table.close()


def read(store: str, folder: Path) -> int:
    "Read every feature; how many there are."
    if store == "cache": return len(FeatureStore(folder, {}).read())
    with PictureTable(folder / "gallery.sqlite") as table:
        found = read_vectors(table, WIDTH)
        found.features.sum()                                    # touch every page
        return len(found)


def size(folder: Path) -> int: return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 2)


def child(store: str, folder: Path, count: int) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, __file__, "--write", store, str(folder), str(count)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def killed(store: str, folder: Path) -> dict:
    "Kill a writer at random moments: what is left can be read, and nothing of it is wrong."
    dice, left = random.Random(0), []
    for number in range(KILLS):
        place = folder / str(number)
        place.mkdir(parents=True)
        process = child(store, place, 4 * SHARD)
        time.sleep(dice.uniform(0.2, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if store == "cache": found = {name: value for name, value in FeatureStore(place, {}).read().items()}
        else:
            with PictureTable(place / "gallery.sqlite", create=True) as table: found = {content: torch.frombuffer(bytearray(data), dtype=torch.float32) for content, data in table.connection.execute("SELECT content, feature FROM picture")}
        whole = {key(at + i): row for at in range(0, 4 * SHARD, SHARD) for i, row in enumerate(features(at, SHARD))} if found else {}
        if any(not torch.equal(whole[name], value) for name, value in found.items()): raise SystemExit(f"feature_stores: {store}: a feature is not what was written")
        left.append(len(found))
    return {"kills": KILLS, "features left, all right": left, "lost at most": SHARD if store == "cache" else BATCH_MULTIPLE}


def two(store: str, folder: Path) -> dict:
    "Two processes write the same features at once."
    folder.mkdir(parents=True)
    both = [child(store, folder, 2 * SHARD) for _ in range(2)]
    ends = [process.wait() for process in both]
    return {"ends": ends, "features": read(store, folder), "bytes for each": round(size(folder) / (2 * SHARD))}


def measured(store: str, folder: Path) -> dict:
    "The whole job for one of the two."
    place = folder / "all"
    place.mkdir(parents=True)
    writing = seconds(lambda: write(store, place, PICTURES))
    reading, again = seconds(lambda: read(store, place)), seconds(lambda: read(store, place))
    if read(store, place) != PICTURES: raise SystemExit(f"feature_stores: {store}: features are missing")
    adding = seconds(lambda: write(store, place, BATCH_MULTIPLE, PICTURES))
    then = seconds(lambda: read(store, place))
    return {"seconds": {"write all": writing, "read all": reading, "read again": again, f"add {BATCH_MULTIPLE}": adding, "then read all": then}, "bytes a picture": round(size(place) / PICTURES)} | {"killed": killed(store, folder / "killed"), "two writers": two(store, folder / "two")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        print("ready", flush=True)
        return write(args.write[0], Path(args.write[1]), int(args.write[2]))
    record, load = provenance("python tools/feature_stores.py", 0), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder: record |= {"pictures": PICTURES, "width": WIDTH} | {store: measured(store, Path(folder) / store) for store in STORES}
    record["load of the machine before and after"] = [round(found, 2) for found in [*load, os.getloadavg()[0]]]
    print(json.dumps(record, indent=1))
    if args.out: write_json(args.out, record)


if __name__ == "__main__": main()

"""Two ways to open any member of tar shards: pli's index of byte offsets, and webdataset's own random access, wids. Measured on the same shards.

    python tools/shard_speed.py [--shards 12] [--samples 1000] [--reads 1000] [--turns 5] [--quick] [--out results/shard-speed.json]

webdataset is no dependency of pli, and its version 1.0.2 comes without wids. Get an earlier one, best into an environment of its own that sees pli's packages:

    pip install --no-deps "webdataset<1" braceexpand pyyaml

pli             an index beside each archive: walked once, read afterwards; each read opens the archive and takes a range of its bytes
wids            `wids.ShardListDataset` of a list of shards with their numbers of samples, in JSON: archives are counted once for the list, walked
                again by each process that opens them, and kept mapped into memory; once with its default of 10 open shards, once with all open

first           seconds to make what is kept on the disk, of all shards
again           seconds until one sample of every shard was read, from what is kept; nothing is in memory yet
reads           samples a second in one random order, the same for all: both members of each sample, as they lie there
on the disk     bytes beside the archives: indexes, or the list

Only raw bytes are compared, and are checked to be the same: nothing is decoded. pli decodes a picture where it is used; wids decodes a whole sample
by its suffixes unless told otherwise (`transformations=[]`, as here), and its default opens .pkl with pickle, which runs what it finds. The members
are small JPEGs from a seed with a text each. The files were just written, so they come from memory and not from a disk. All ways are measured in
turns within one run; times are worth something on a quiet machine only, and the load is part of the record.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from pli.core import provenance, rng_for, write_json
from pli.data.shards import _index_of, open_member, shard_index

try: from wids.wids import IndexedTarSamples, ShardListDataset
except ModuleNotFoundError: ShardListDataset = None

SIDE, MEMBERS = 64, (".jpg", ".txt")
WAYS = ("pli", "wids, 10 shards open", "wids, all shards open")


def write_shards(folder: Path, shards: int, samples: int) -> list[str]:
    "Archives of small JPEGs, each with a text."
    paths = []
    for shard in range(shards):
        paths.append(str(folder / f"pairs-{shard:03}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(shard * samples, (shard + 1) * samples):
                noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=rng_for(0, "picture", number)).numpy()
                file = io.BytesIO()
                Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                for suffix, data in zip(MEMBERS, (file.getvalue(), f"picture number {number}".encode())):
                    entry = tarfile.TarInfo(f"{number:06}{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return paths


class Offsets:
    "pli's way."
    def __init__(self, paths: list[str], samples: int, folder: Path): self.paths, self.samples = paths, samples

    def first(self) -> None:
        _index_of.cache_clear()
        for path in self.paths: shard_index(path)

    def again(self) -> None: _index_of.cache_clear()

    def read(self, number: int) -> list[bytes]:
        found = []
        for suffix in MEMBERS:
            with open_member(f"{self.paths[number // self.samples]}/{number:06}{suffix}") as file: found.append(file.read())
        return found

    def kept(self) -> list[Path]: return [Path(f"{path}.index") for path in self.paths]

    def close(self) -> None: _index_of.cache_clear()


class Wids:
    "webdataset's way."
    def __init__(self, paths: list[str], samples: int, folder: Path, open_shards: int):
        self.paths, self.folder, self.open_shards, self.dataset = paths, folder, open_shards, None
        self.list = folder / f"shards-{open_shards}.json"

    def first(self) -> None:
        shards = []
        for path in self.paths:
            archive = IndexedTarSamples(path=path)
            shards.append({"url": path, "nsamples": len(archive), "filesize": os.path.getsize(path)})
            archive.close()
        self.list.write_text(json.dumps({"wids_version": 1, "shardlist": shards}))

    def again(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()), open(self.list) as file:       # it tells what it opens, in every process
            # local shards are read where they lie: its default would copy each into its cache
            self.dataset = ShardListDataset(file, transformations=[], lru_size=self.open_shards, localname=str)

    def read(self, number: int) -> list[bytes]:
        sample = self.dataset[number]
        return [sample[suffix].read() for suffix in MEMBERS]

    def kept(self) -> list[Path]: return [self.list]

    def close(self) -> None: self.dataset.close()


def spread(values: list[float], digits: int) -> dict:
    "Median, lowest and highest."
    return {"median": round(statistics.median(values), digits), "lowest": round(min(values), digits), "highest": round(max(values), digits)}


def measure(args, folder: Path) -> tuple[dict, bool]:
    "All ways in turns, and whether they have read the same bytes."
    paths = write_shards(folder, args.shards, args.samples)
    makers = dict(zip(WAYS, (Offsets, functools.partial(Wids, open_shards=10), functools.partial(Wids, open_shards=args.shards))))
    times, kept = {way: {"first": [], "again": [], "reads": []} for way in WAYS}, {}
    same = True
    for turn in range(args.turns):
        order = torch.randint(args.shards * args.samples, (args.reads,), generator=rng_for(turn, "order")).tolist()
        turn_digests = set()
        for way in WAYS[:: 1 if turn % 2 else -1]:
            reader, digest = makers[way](paths, args.samples, folder), hashlib.sha256()
            for file in reader.kept(): file.unlink(missing_ok=True)
            marks = [time.perf_counter()]
            reader.first()
            marks.append(time.perf_counter())
            reader.again()
            for shard in range(args.shards): reader.read(shard * args.samples)
            marks.append(time.perf_counter())
            for number in order:
                for data in reader.read(number): digest.update(data)
            marks.append(time.perf_counter())
            for name, began, ended in zip(times[way], marks, marks[1:]): times[way][name].append(ended - began)
            kept[way] = sum(file.stat().st_size for file in reader.kept())
            turn_digests.add(digest.hexdigest())
            reader.close()
        same = same and len(turn_digests) == 1
    return {
        way: {
            "first, seconds": spread(of["first"], 4), "again, seconds": spread(of["again"], 4),
            "reads, samples a second": spread([args.reads / seconds for seconds in of["reads"]], 1), "on the disk, bytes": kept[way],
        }
        for way, of in times.items()
    }, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=12, help="archives (default: 12)")
    parser.add_argument("--samples", type=int, default=1000, help="samples of each, a JPEG and a text (default: 1000)")
    parser.add_argument("--reads", type=int, default=1000, help="samples that are read in random order, in each turn (default: 1000)")
    parser.add_argument("--turns", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a trial of the script: few samples, numbers that mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    args = parser.parse_args()
    if ShardListDataset is None: sys.exit('shard_speed: needs wids, which is part of webdataset before version 1: pip install --no-deps "webdataset<1" braceexpand pyyaml')
    if args.quick: args.shards, args.samples, args.reads, args.turns = 12, 5, 60, 1
    began, load = time.perf_counter(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder: ways, same = measure(args, Path(folder))
    if not same: sys.exit("shard_speed: the ways have read different bytes, so nothing can be compared")
    words = "--quick" if args.quick else f"--shards {args.shards} --samples {args.samples} --reads {args.reads} --turns {args.turns}"
    record = {
        "what": f"{args.shards} tar shards of {args.samples} samples, a JPEG of {SIDE} x {SIDE} and a text each; raw bytes, nothing decoded",
        **provenance(f"python tools/shard_speed.py {words}", 0),
        "webdataset": importlib.metadata.version("webdataset"),
        "load of the machine before and after": [round(each, 2) for each in (load, os.getloadavg()[0])] if load is not None else None,
        "seconds in all": round(time.perf_counter() - began, 1), "bytes were the same": same, "ways": ways,
    }
    if args.out: write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__": main()

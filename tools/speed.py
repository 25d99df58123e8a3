"""How fast, and in how much memory: search, scoring and bootstrap, each several times, in turns with what it is compared with.

    python tools/speed.py [--only search|score|bootstrap] [--annotations DIR] [--repeat 5] [--out results/speed.json]

search     exact top 50 of 800 queries over 123,403 pictures of 768 numbers, against the bare `queries @ gallery.T` and `torch.topk`: the ratio of the times
           within each turn, and the memory that each needs beyond its features (peak of a process of its own)
score      CIRR val from features: places of all answers, every measure, every interval. DIR is the folder with cirr/; without it, made-up
           annotations of the same size in the official layout
bootstrap  1,000 draws over 6,016 queries, plain and paired

Times are only worth something on a quiet machine; the load before and after the run is part of the record.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pli.benchmarks.registry import read_benchmark
from pli.core import PliError, rng_for, provenance, write_json
from pli.evaluation.ranks import Features, rank_queries, measure_queries
from pli.gallery.encode import search
from pli.metrics import bootstrap, paired_bootstrap

QUERIES, PICTURES, WIDTH, BEST = 800, 123_403, 768, 50


def features(count: int, width: int, name: str) -> torch.Tensor:
    "Unit vectors in random directions, made in place so that the peak of memory is what they are."
    made = torch.randn(count, width, generator=rng_for(0, name))
    return made.div_(made.norm(dim=1, keepdim=True))


def seconds(call) -> float:
    "How long a call takes."
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(found: list[float]) -> dict:
    "Median and spread."
    return {"median": round(statistics.median(found), 4), "lowest": round(min(found), 4), "highest": round(max(found), 4)}


def bare(queries: torch.Tensor, gallery: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "The shortest way, which holds every score."
    return torch.topk(queries @ gallery.T, BEST)


WAYS = {"bare": bare, "search": lambda queries, gallery: search(queries, gallery, BEST)}


def memory_of(way: str) -> None:
    "In a process of its own: print how far the peak of memory rises, in bytes, when the work is done once."
    queries, gallery = features(QUERIES, WIDTH, "queries"), features(PICTURES, WIDTH, "gallery")
    WAYS[way](queries[:64], gallery[:64])                                          # what the libraries need for themselves
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](queries, gallery)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit))


def measure_search(args) -> dict:
    "The search against the bare product and top-k."
    # first of all: on Linux a process begins with the peak of the one that started it
    peaks = {way: json.loads(subprocess.run([sys.executable, __file__, "--memory-of", way], check=True, capture_output=True, text=True).stdout) for way in WAYS}
    queries, gallery = features(QUERIES, WIDTH, "queries"), features(PICTURES, WIDTH, "gallery")
    (plain, numbers), (scores, found) = WAYS["bare"](queries, gallery), WAYS["search"](queries, gallery)      # a first turn that does not count
    if not torch.allclose(plain, scores, atol=1e-5): raise SystemExit("speed: the search found other scores than the bare product")
    same, times = (numbers == found).float().mean().item(), {way: [] for way in WAYS}
    for turn in range(args.repeat):
        for way in list(WAYS)[:: 1 if turn % 2 else -1]: times[way].append(seconds(lambda: WAYS[way](queries, gallery)))
    del plain, scores, numbers, found
    return {"what": f"top {BEST} of {QUERIES} queries over {PICTURES:,} x {WIDTH} float32", "seconds": {way: summary(found) for way, found in times.items()},
            "ratio": summary([a / b for a, b in zip(times["search"], times["bare"])]), "wanted": "at most 1.3", "same numbers": round(same, 6),
            "all scores, MB": round(QUERIES * PICTURES * 4 / 1e6), "peak beyond features, MB": {way: round(peak / 1e6) for way, peak in peaks.items()}}


def made_up_cirr(folder: Path, queries: int = 4181, pictures: int = 2297) -> Path:
    "CIRR val in the official layout and at its size, with made-up names, words and answers."
    chance, names = rng_for(0, "cirr"), [f"dev-{i}-0-img0" for i in range(pictures)]
    records = []
    for row in range(queries):
        members = torch.randperm(pictures, generator=chance)[:6].tolist()
        records.append({"pairid": row, "reference": names[members[0]], "target_hard": names[members[1]], "target_soft": {names[members[1]]: 1.0}, "caption": f"caption {row}",
                        "img_set": {"id": row, "members": [names[i] for i in sorted(members)], "reference_rank": 0, "target_rank": 1}})
    write_json(folder / "cirr" / "captions" / "cap.rc2.val.json", records)
    write_json(folder / "cirr" / "image_splits" / "split.rc2.val.json", {name: f"./dev/{name}.png" for name in names})
    return folder


def score(held: Features, benchmark) -> dict:
    "Everything a table says of one composer."
    found = rank_queries(held, benchmark, "sum:0.25")
    return {measure: bootstrap(measure_queries(found, measure)) for measure in benchmark.scoring.measures}


def measure_score(args) -> dict:
    "CIRR val from features."
    with tempfile.TemporaryDirectory() as made:
        root, times = args.annotations or made_up_cirr(Path(made)), {"reading": [], "scoring": []}
        for _ in range(args.repeat + 1):
            times["reading"].append(seconds(lambda: read_benchmark("cirr", root, "val")))
            benchmark = read_benchmark("cirr", root, "val")
            held = Features(features(len(benchmark.pictures), WIDTH, "pictures"), features(len(benchmark), WIDTH, "texts"))
            times["scoring"].append(seconds(lambda: score(held, benchmark)))
    return {"what": f"{len(benchmark):,} queries over {len(benchmark.galleries[0]):,} pictures, {len(benchmark.scoring.measures)} measures with intervals", "wanted": "scoring under 5 s",
            "annotations": "official" if args.annotations else "made up, of the same size", "seconds": {part: summary(found[1:]) for part, found in times.items()}}


def measure_bootstrap(args) -> dict:
    "1,000 draws over as many queries as FashionIQ val has."
    one, other = ((torch.rand(6016, generator=rng_for(0, name)) < 0.4).double() for name in ("one", "other"))
    kinds = {"plain": lambda: bootstrap(one, draws=1000), "paired": lambda: paired_bootstrap(one, other, draws=1000)}
    for call in kinds.values(): call()
    return {"what": "1,000 draws over 6,016 queries", "wanted": "under 2 s", "seconds": {kind: summary([seconds(call) for _ in range(args.repeat)]) for kind, call in kinds.items()}}


PARTS = {"search": measure_search, "score": measure_score, "bootstrap": measure_bootstrap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="measure this part alone")
    parser.add_argument("--annotations", type=Path, metavar="DIR", help="folder that holds cirr/ with the official annotations")
    parser.add_argument("--repeat", type=int, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of: return memory_of(args.memory_of)
    if args.repeat < 1: parser.error("--repeat must be at least 1")
    words = ["python tools/speed.py"] + [f"--only {args.only}"] * bool(args.only) + ["--annotations DIR"] * bool(args.annotations) + [f"--repeat {args.repeat}"]
    record, load = provenance(" ".join(words), 0), [os.getloadavg()[0]]
    try: parts = {name: part(args) for name, part in PARTS.items() if args.only in (None, name)}
    except PliError as error: sys.exit(f"speed: {error}")
    record |= {"load of the machine before and after": [round(found, 2) for found in [*load, os.getloadavg()[0]]]} | parts
    for name, part in parts.items(): print(name, json.dumps(part, indent=1, ensure_ascii=False))
    if args.out: write_json(args.out, record)


if __name__ == "__main__": main()

"""How fast is a gallery? Indexing beside the bare model, a search beside the bare product and faiss, an approximate search beside the exact one, opening, memory.

    python tools/gallery_speed.py [--only index|search] [--sizes 10000 100000 1000000] [--pictures 256] [--repeat 5] [--out results/gallery-speed.json]

index    drawn JPEGs of about 500 pixels, ViT-B-32 with random weights: `update` into an empty gallery against the same model on the same pictures, already decoded, in turns; and the share
         that reading takes for pictures of 12 megapixels
search   galleries of made-up features, 512 wide, written straight into the table: opening in a new process, one query vector with its 50 best, exact (`Ranker.rank`) in turns with the bare product
         `torch.mv` and `topk`, and with faiss's flat index (40 queries in a row of each, because threads of one library go on spinning and slow the next); late fusion; approximate through LanceDB, with its recall@10; memory of a process that searches once. Needs faiss-cpu and pli[lance];
         a million pictures need 12 GB of disk in the folder for temporary files

Times are only worth something on a quiet machine; the load before and after the run is part of the record. What is compared is measured in turns.
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
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pli.backbones.loading import load_backbone
from pli.composition import parse_composer
from pli.core import rng_for, provenance, unit, write_json
from pli.gallery.approximate import GalleryCopy, candidates
from pli.gallery.encode import BATCH_MULTIPLE, encode_pixels
from pli.gallery.index import NewPictures, list_pictures, update
from pli.gallery.search import Gallery
from pli.gallery.ranking import Ranker
from pli.gallery.store import PictureTable, Row, read_vectors

WIDTH, BEST, QUERIES, WARM = 512, 50, 40, 5


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def summary(found: list[float], digits: int = 4) -> dict:
    "Median and spread."
    return {"median": round(statistics.median(found), digits), "lowest": round(min(found), digits), "highest": round(max(found), digits)}


def latency(found: list[float]) -> dict:
    "In milliseconds."
    return {"median, ms": round(1000 * statistics.median(found), 2), "99th percentile, ms": round(1000 * float(np.percentile(found, 99)), 2)}


# indexing

def draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    "JPEGs with as much detail as photographs have: soft noise and a little hard noise."
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        soft = Image.fromarray(rng.integers(0, 256, (size[1] // 25, size[0] // 25, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        hard = rng.integers(-12, 13, (size[1], size[0], 1), dtype=np.int16)
        Image.fromarray((np.asarray(soft, np.int16) + hard).clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=88)


def index_once(folder: Path, place: Path, backbone, workers: int) -> float:
    "Seconds for a first index."
    with PictureTable(place / f"{time.time_ns()}.sqlite", create=True) as table:
        spent = timed(lambda: update(table, folder, backbone, workers))
        if len(table) != len(list(folder.iterdir())): raise SystemExit("gallery_speed: not every picture was indexed")
    return spent


def measure_index(args, place: Path) -> dict:
    backbone, small, large = load_backbone("ViT-B-32"), place / "small", place / "large"
    draw(small, args.pictures, (500, 375))
    draw(large, 16, (4000, 3000))
    reader = lambda folder: NewPictures(folder, list(list_pictures(folder)), backbone.pixels, place / "none.sqlite")
    PictureTable(place / "none.sqlite", create=True).close()
    pixels = torch.stack([reader(small)[number].pixels for number in range(args.pictures)])
    encode_pixels(backbone, pixels[:BATCH_MULTIPLE])
    spent: dict[str, list[float]] = {"bare": []} | {f"update, {workers} workers": [] for workers in args.workers}
    for _ in range(args.repeat):
        spent["bare"].append(timed(lambda: encode_pixels(backbone, pixels)))
        for workers in args.workers: spent[f"update, {workers} workers"].append(index_once(small, place, backbone, workers))
    read = {name: statistics.median(timed(lambda: reader(folder)[number]) for number in range(16)) for name, folder in (("500 x 375", small), ("4000 x 3000", large))}
    alone = statistics.median(spent["bare"]) / args.pictures
    return {"what": f"{args.pictures} JPEGs of 500 x 375, {round(sum(file.stat().st_size for file in small.iterdir()) / args.pictures):,} bytes each; ViT-B-32 with random weights",
            "pictures a second": {way: round(args.pictures / statistics.median(found), 1) for way, found in spent.items()},
            "share of the bare model's throughput": {way: summary([a / b for a, b in zip(spent["bare"], found)]) for way, found in spent.items() if way != "bare"}, "wanted": "at least 0.85",
            "one picture, ms": {"model": round(1000 * alone, 1)} | {f"read {name}": round(1000 * seconds, 1) for name, seconds in read.items()},
            "share of reading in one process": {name: round(seconds / (seconds + alone), 3) for name, seconds in read.items()}}


# searching

def made_features(count: int) -> Iterator[torch.Tensor]:
    "Unit vectors with the spectrum, the common direction and the clumps that features of pictures have, some thousand at a time."
    dice = rng_for(0, "gallery")
    scales = torch.arange(1, WIDTH + 1) ** -0.6
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=dice)).Q * scales[:, None]
    common = torch.randn(WIDTH, generator=dice)
    common = 1.2 * common / common.norm() * scales.norm()
    centres = torch.randn(max(1, count // 50), WIDTH, generator=dice) @ turn
    for start in range(0, count, 8192):
        size = min(8192, count - start)
        yield unit(common + 0.7 * centres[torch.randint(len(centres), (size,), generator=dice)] + 0.7 * torch.randn(size, WIDTH, generator=dice) @ turn)


def made_gallery(folder: Path, count: int) -> Path:
    "A table full of rows; each has a thumbnail of some hundred bytes."
    import io
    data, number = io.BytesIO(), 0
    Image.new("RGB", (24, 24), "red").save(data, "JPEG")
    with PictureTable(folder / "gallery.sqlite", create=True) as table:
        table.say(key="0" * 16, model="none", pretrained=None, preprocess="model", width=WIDTH)
        for features in made_features(count):
            table.put(Row(f"{(number + i) % 100:02}/{number + i}.jpg".encode(), 1, number + i, (number + i).to_bytes(32, "big"), 24, 24, thumbnail=data.getvalue(), feature=feature) for i, feature in enumerate(features))
            number += len(features)
    return folder / "gallery.sqlite"


def queries_of(ranker: Ranker) -> list[tuple[torch.Tensor, torch.Tensor]]:
    "Pictures of the gallery, and directions that stand for words: as far from all pictures as words are."
    dice, count = rng_for(0, "queries"), len(ranker.vectors)
    rows = torch.randint(count, (QUERIES, 2), generator=dice)
    away = unit(torch.randn(WIDTH, generator=dice))
    return [(ranker.vectors.features[a], unit(ranker.vectors.features[b] - ranker.image_mean + 0.8 * away)) for a, b in rows.tolist()]


def open_once(path: Path) -> None:
    "In a process of its own: print how long opening takes, and how far the peak of memory rises with the first search."
    torch.mv(torch.ones(8, 8), torch.ones(8))
    said = lambda name: next((int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)), 0) if sys.platform == "linux" else 0
    peak = lambda: said("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)   # Linux's ru_maxrss begins with the parent's
    anonymous = lambda: said("RssAnon")
    began, before, owned = time.perf_counter(), peak(), anonymous()
    with PictureTable(path, writable=False) as table:
        gallery = Gallery(path.parent, table, None, None)
        ranker, opened = gallery.ranker, time.perf_counter()
        query = ranker.vectors.features[0]
        ranker.rank(parse_composer("sum:1"), query, query, None, None, BEST)
    print(json.dumps({"opening, s": opened - began, "first search, s": time.perf_counter() - opened, "peak, MB": (peak() - before) / 1e6, "of its own, MB": (anonymous() - owned) / 1e6}))


def fresh(path: Path) -> dict: return json.loads(subprocess.run([sys.executable, __file__, "--open-once", str(path)], check=True, capture_output=True, text=True).stdout)


def measure_exact(ranker: Ranker, queries, repeat: int) -> dict:
    "One query at a time: the bare product, faiss, the gallery's ranker, late fusion."
    import faiss
    sums, alone, product, mean = parse_composer("sum:1"), parse_composer("image"), parse_composer("product:1"), ranker.image_mean
    features = ranker.vectors.features
    packed = features.numpy() if features.is_contiguous() else np.ascontiguousarray(features.numpy())     # as those who have nothing but the features would hold them
    flat, bare = faiss.IndexFlatIP(WIDTH), torch.from_numpy(packed)
    flat.add(packed)
    faiss.omp_set_num_threads(torch.get_num_threads())
    ways = {"bare product": lambda query, _: torch.mv(bare, query).topk(BEST), "faiss flat": lambda query, _: flat.search(query[None].numpy(), BEST),
            "exact": lambda query, _: ranker.rank(alone, query, query, None, None, BEST), "exact, late fusion": lambda _, pair: ranker.rank(product, *pair, mean, None, BEST)}
    spent: dict[str, list[list[float]]] = {way: [] for way in ways}
    asked = [(sums.parts(pair[0][None], pair[1][None])[0][0], pair) for pair in queries]
    for turn in range(repeat):
        for way in list(ways)[turn % 4 :] + list(ways)[: turn % 4]:
            for query, pair in asked[:WARM]: ways[way](query, pair)      # threads that the way before has used go on spinning for a while
            spent[way].append([timed(lambda: ways[way](query, pair)) for query, pair in asked])
    found = {number for number in flat.search(sums.parts(queries[0][0][None], queries[0][1][None])[0].numpy(), 10)[1][0].tolist()}
    if len(found & set(ranker.rank(sums, *queries[0], None, None, 10)[1].tolist())) < 10: raise SystemExit("gallery_speed: faiss found other pictures")
    turns = {way: [statistics.median(turn) for turn in times] for way, times in spent.items()}
    better = [min(pair) for pair in zip(turns["bare product"], turns["faiss flat"])]
    return {"latency": {way: latency(sum(times, [])) for way, times in spent.items()},
            "ratio to the better of the two": {way: summary([a / b for a, b in zip(turns[way], better)], 3) for way in ("exact", "exact, late fusion")}, "wanted": "at most 1.3; late fusion at most 2.6"}


def measure_approximate(gallery: Gallery, folder: Path, queries) -> dict:
    "Recall and latency of the copy with an index."
    began = time.perf_counter()
    gallery.publish(folder / "copy")
    made, copy, mean, record = time.perf_counter() - began, GalleryCopy(folder / "copy"), gallery.ranker.image_mean, {}
    for spec in ("sum:1", "product:1"):
        composer, shares, spent = parse_composer(spec), [], []
        for pair in queries:
            exact = set(gallery.ranker.vectors.ids[gallery.ranker.rank(composer, *pair, mean, None, 10)[1].numpy()].tolist())
            began = time.perf_counter()
            ranker = candidates(copy, composer, *pair, mean, None, 10)
            rows = ranker.rank(composer, *pair, mean, None, 10)[1]
            spent.append(time.perf_counter() - began)
            shares.append(len(exact & set(ranker.vectors.ids[rows.numpy()].tolist())) / 10)
        record[spec] = {"recall@10": round(statistics.mean(shares), 4)} | latency(spent)
    size = sum(file.stat().st_size for file in (folder / "copy").rglob("*") if file.is_file())
    return {"publishing, s": round(made, 1), "on disk, MB": round(size / 1e6), "cells": copy.facts["partitions"], "one query, 10 best": record}


def measure_search(args, place: Path) -> dict:
    "Everything at every size."
    found = {"what": f"features {WIDTH} wide, made up with the spectrum and the clumps of real ones; {QUERIES} queries of a picture and words, {args.repeat} turns, the {BEST} best"}
    for size in args.sizes:
        folder = place / str(size)
        folder.mkdir()
        path = made_gallery(folder, size)
        with PictureTable(path) as table:
            filling = timed(lambda: read_vectors(table, WIDTH))
            gallery = Gallery(folder, table, None, None)
            opens = [fresh(path) for _ in range(3)]
            found[f"{size:,}"] = record = {"making the matrix, s": round(filling, 2), "on disk, MB": {"table": round(path.stat().st_size / 1e6), "matrix": round(sum(file.stat().st_size for file in folder.glob("features-*")) / 1e6)},
                                           "a new process": {name: round(statistics.median(one[name] for one in opens), 3) for name in opens[0]}, "opening wanted": "under 1 s"}
            queries = queries_of(gallery.ranker)
            record |= measure_exact(gallery.ranker, queries, args.repeat)
            if not args.exact: record["approximate"] = measure_approximate(gallery, folder, queries)
        print(json.dumps({f"{size:,}": record}, indent=1, ensure_ascii=False), flush=True)
    return found


PARTS = {"index": measure_index, "search": measure_search}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="measure this part alone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="N", help="pictures in the galleries that are searched (default: 10000 100000 1000000)")
    parser.add_argument("--pictures", type=int, default=256, metavar="N", help="pictures that are indexed (default: 256)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], metavar="N", help="processes that read pictures, each measured (default: 0 1)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="how often everything is measured (default: 5)")
    parser.add_argument("--exact", action="store_true", help="leave the approximate search out")
    parser.add_argument("--note", help="a remark for the record, such as what else the machine did")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--open-once", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open_once: return open_once(args.open_once)
    if args.repeat < 1 or args.pictures < 32 or min(args.sizes) < 1000: parser.error("--repeat must be at least 1, --pictures at least 32, sizes at least 1000")
    words = ["python tools/gallery_speed.py"] + [f"--only {args.only}"] * bool(args.only) + [f"--sizes {' '.join(map(str, args.sizes))}", f"--pictures {args.pictures}", f"--repeat {args.repeat}"] + ["--exact"] * args.exact
    record, load = provenance(" ".join(words), 0), [os.getloadavg()[0]]
    record["versions"] |= {name: metadata.version(name) for name in ("lancedb", "faiss-cpu")}
    with tempfile.TemporaryDirectory() as place: parts = {name: part(args, Path(place)) for name, part in PARTS.items() if args.only in (None, name)}
    record |= {"load of the machine before and after": [round(found, 2) for found in [*load, os.getloadavg()[0]]]} | ({"note": args.note} if args.note else {}) | parts
    for name, part in parts.items(): print(name, json.dumps(part, indent=1, ensure_ascii=False))
    if args.out: write_json(args.out, record)


if __name__ == "__main__": main()

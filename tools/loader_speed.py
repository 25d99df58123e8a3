"""How many pictures a second the loader of `pli tune` gives, alone and beside a model that trains; and what decoding smaller would save.

    python tools/loader_speed.py [--count 256] [--turns 3] [--model] [--pictures DIR] [--quick] [--out results/loader-speed.json]

files, shards   the same JPEGs as files of a table, and in tar shards; read by pli's pair sets, prepared by the model's own transform, put into
                batches by a `DataLoader` in the order of a run, with 0 and 2 reading processes
alone           pictures a second, start of the reading processes and first batch left out
--model         the same beside a model with random weights that takes a training step with each batch: how long a step waits for its batch
draft           JPEG decoded at a half or a quarter of its size (`Image.draft`) where what is left is at least as large as the model wants:
                times as fast as whole, and how far the prepared pixels are from those of whole decoding. The package does not do it

The pictures are made from a seed, smoothed noise under shapes, 500 x 375 at quality 90, or enlarged from photographs (--pictures). All ways are
measured in turns within one run. Times are worth something on a quiet machine only; the load is part of the record. The files were just
written, so they come from memory and not from a disk: what is measured is decoding and preparing.
"""
import argparse
import csv
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
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from pli.backbones.loading import load_backbone
from pli.core import PliError, pick_device, provenance, rng_for, write_json
from pli.data.batches import PairSet, ResumableBatchSampler, collate
from pli.data.pairs import read_pairs
from pli.data.pictures import open_picture
from pli.settings import TuneSettings
from pli.training.step import make_optimiser, train_step
from pli.training.stopping import leave_signals_alone

LONG, QUALITY, PER_SHARD = 500, 90, 64
DRAFTS = (500, 640, 1024)                   # long sides in pixels: decoding smaller needs a picture that is at least twice what the model wants
WORKERS = (0, 2)
SIDES = ("files", "shards")


def drawn(number: int, long: int) -> Image.Image:
    "A picture with edges and soft gradients, as photographs have them: three sizes of smoothed noise, and shapes on it."
    random, size = rng_for(0, "picture", number), (long, long * 3 // 4)
    picture = Image.new("RGB", size)
    for cells, weight in ((3, 1.0), (12, 0.4), (96, 0.15)):
        noise = torch.randint(0, 256, (cells, cells, 3), dtype=torch.uint8, generator=random).numpy()
        picture = Image.blend(picture, Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), weight)
    draw, pick = ImageDraw.Draw(picture), lambda most: int(torch.randint(max(1, most), (1,), generator=random))
    for _ in range(6):
        x, y, side = pick(size[0]), pick(size[1]), long // 10 + pick(long // 4)
        shape = draw.ellipse if pick(2) else draw.rectangle
        shape((x, y, x + side, y + side), fill=(pick(256), pick(256), pick(256)))
    return picture


def as_jpeg(number: int, long: int, photographs: list[Path]) -> bytes:
    "One picture as the bytes of a JPEG: drawn, or a photograph enlarged."
    if photographs: picture = open_picture(photographs[number % len(photographs)]).resize((long, long * 3 // 4), Image.Resampling.LANCZOS)
    else: picture = drawn(number, long)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_pairs(folder: Path, pictures: list[bytes]) -> dict[str, str]:
    "The same pairs as a table of files and as tar shards: what to give to `read_pairs`."
    captions = [f"picture number {number} of the loader's own" for number in range(len(pictures))]
    (folder / "images").mkdir()
    for number, data in enumerate(pictures): (folder / "images" / f"{number:06}.jpg").write_bytes(data)
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *((f"images/{number:06}.jpg", caption) for number, caption in enumerate(captions))])
    last = -1
    for first in range(0, len(pictures), PER_SHARD):
        last += 1
        with tarfile.open(folder / f"pairs-{last:03}.tar", "w") as tar:
            for number in range(first, min(first + PER_SHARD, len(pictures))):
                for name, data in ((f"{number:06}.jpg", pictures[number]), (f"{number:06}.txt", captions[number].encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return {"files": str(folder / "pairs.csv"), "shards": str(folder / f"pairs-{{000..{last:03}}}.tar")}


def loader_for(pairs, backbone, workers: int, batch: int, batches: int, turn: int) -> DataLoader:
    "The loader of a run, as `tune` builds it."
    order = ResumableBatchSampler(len(pairs), batch, turn, 0, batches)
    return DataLoader(PairSet(pairs, backbone.pixels), batch_sampler=order, collate_fn=collate, num_workers=workers, generator=rng_for(turn, "workers"), worker_init_fn=leave_signals_alone)


def alone(pairs, backbone, workers: int, args, turn: int) -> float:
    "Pictures a second, from the end of the first batch to the end of the last."
    came = []
    for batch in loader_for(pairs, backbone, workers, args.batch, args.batches + 1 + workers * 2, turn):
        if batch.failed: raise PliError(f"a picture of the measurement cannot be read: {batch.failed[0]}")
        came.append(time.perf_counter())
    came = came[workers * 2:]                                        # reading processes had these ready before anybody asked
    return args.batch * (len(came) - 1) / (came[-1] - came[0])


def beside(pairs, backbone, workers: int, args, turn: int) -> list[tuple[float, float]]:
    "Of every step: seconds of waiting for the batch after it, and of the whole; the wait for the first batch of all is left out."
    settings = TuneSettings(batch_size=args.batch, warmup=0, precision="fp32")
    optimiser, spans = make_optimiser(backbone, settings), []
    given = iter(loader_for(pairs, backbone, workers, args.batch, args.steps + 1, turn))
    batch = next(given)
    for step in range(args.steps):
        began = time.perf_counter()
        train_step(backbone, optimiser, batch.pixels, batch.captions, step, settings, batch.pictures)
        done = time.perf_counter()
        batch = next(given)
        spans.append((time.perf_counter() - done, time.perf_counter() - began))
    return spans


def prepared(data: bytes, backbone, draft: bool) -> tuple[torch.Tensor, float, float]:
    "Pixels for the model, seconds, and by how much the decoder made the picture smaller."
    began = time.perf_counter()
    with Image.open(io.BytesIO(data)) as picture:
        long, wanted = picture.size[0], max(backbone.size)
        if draft:
            share = wanted / min(picture.size)                       # the shorter side is what the transform resizes by
            picture.draft("RGB", (round(picture.size[0] * share), round(picture.size[1] * share)))
        smaller = long / picture.size[0]
        pixels = backbone.pixels(picture.convert("RGB"))
    return pixels, time.perf_counter() - began, smaller


def measure_draft(backbone, photographs: list[Path], args) -> dict:
    "Whole decoding against decoding smaller, for some sizes of pictures."
    found = {}
    for long in DRAFTS:
        pictures = [as_jpeg(number, long, photographs) for number in range(args.drafts)]
        ratios, most, means, smaller = [], 0, [], 1.0
        for number, data in enumerate(pictures):
            ways = {}
            for draft in (False, True)[:: 1 if number % 2 else -1]: ways[draft] = prepared(data, backbone, draft)
            apart = (ways[True][0].int() - ways[False][0].int()).abs()
            ratios.append(ways[False][1] / ways[True][1])
            most, smaller = max(most, int(apart.max())), ways[True][2]
            means.append(apart.float().mean().item())
        found[f"{long} x {long * 3 // 4}"] = {
            "decoded smaller by": round(smaller, 2), "times as fast": spread(ratios[len(ratios) // 8:]),
            "prepared pixels apart, of 255": {"most": most, "mean": round(statistics.mean(means), 3)}, "equal": most == 0,
        }
    return found


def spread(values: list[float]) -> dict:
    "Median, lowest and highest."
    return {"median": round(statistics.median(values), 4), "lowest": round(min(values), 4), "highest": round(max(values), 4)}


def measure(args, backbone, folder: Path, photographs: list[Path]) -> dict:
    "All ways in turns."
    sources = write_pairs(folder, [as_jpeg(number, LONG, photographs) for number in range(args.count)])
    pairs = {side: read_pairs(source) for side, source in sources.items()}
    ways = [(side, workers) for side in SIDES for workers in WORKERS]
    name = lambda side, workers: f"{side}, {workers} reading processes"
    speeds, waits = {name(*way): [] for way in ways}, {name(*way): [] for way in ways}
    for turn in range(args.turns):
        for way in ways[:: 1 if turn % 2 else -1]: speeds[name(*way)].append(alone(pairs[way[0]], backbone, way[1], args, turn))
    record = {"pictures a second, alone": {way: spread(values) for way, values in speeds.items()}}
    base = statistics.median(speeds[name("files", 0)])
    record["pictures a second of one core"] = round(base, 1)
    record["times as fast as files in one process"] = {way: round(statistics.median(values) / base, 2) for way, values in speeds.items()}
    if args.model:
        beside(pairs["files"], backbone, 0, argparse.Namespace(batch=args.batch, steps=1), 0)        # a first step that does not count
        for turn in range(args.model_turns):
            began = time.perf_counter()
            for way in ways[:: 1 if turn % 2 else -1]: waits[name(*way)] += beside(pairs[way[0]], backbone, way[1], args, turn)
            if 2 * time.perf_counter() - began - args.began > args.seconds: break         # another turn would take too long
        record["turns beside the model"] = turn + 1
        record["beside the model"] = {
            way: {"seconds a step": spread([step for _, step in spans]), "seconds of waiting": spread([wait for wait, _ in spans]),
                  "share of waiting": spread([wait / step for wait, step in spans])}
            for way, spans in waits.items()
        }
    return record | {"draft": measure_draft(backbone, photographs, args)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256, help="pictures (default: 256)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a batch (default: 64)")
    parser.add_argument("--batches", type=int, default=8, help="batches that count, of each way in each turn (default: 8)")
    parser.add_argument("--turns", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--model", action="store_true", help="also beside a model that trains")
    parser.add_argument("--name", default="ViT-B-32", help="the model, whose transform prepares the pictures too (default: ViT-B-32)")
    parser.add_argument("--model-turns", type=int, default=2, help="turns beside the model (default: 2)")
    parser.add_argument("--steps", type=int, default=2, help="steps that count in each of them (default: 2)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no further turn beside the model that would end later (default: 300)")
    parser.add_argument("--drafts", type=int, default=48, help="pictures of each size for draft (default: 48)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="photographs to enlarge (default: drawn ones)")
    parser.add_argument("--device", default="auto", help="where the model is (default: the best that is there)")
    parser.add_argument("--quick", action="store_true", help="a trial of the script: a tiny model, few pictures, numbers that mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    args = parser.parse_args()
    if args.quick: args.name, args.count, args.batch, args.batches, args.turns, args.model_turns, args.steps, args.drafts = "pli-tiny-64", 48, 8, 2, 1, 1, 1, 8
    photographs = sorted(file for file in args.pictures.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))[: args.count] if args.pictures else []
    if args.pictures and not photographs: sys.exit(f"loader_speed: {args.pictures}: holds no .jpg, .jpeg or .png")
    device = pick_device(args.device)
    args.began, load = time.perf_counter(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    backbone = load_backbone(args.name, device=device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")   # should an index of shards be kept there
        try: parts = measure(args, backbone, Path(folder), photographs)
        except PliError as error: sys.exit(f"loader_speed: {error}")
    content = "photographs, enlarged" if photographs else "drawn from a seed"
    words = ["python tools/loader_speed.py"] + ["--model"] * args.model + ["--pictures DIR"] * bool(photographs) + ["--quick"] * args.quick
    if not args.quick: words.append(f"--name {args.name} --count {args.count} --batch {args.batch} --turns {args.turns}")
    record = {
        "what": f"{args.count} JPEGs of {LONG} x {LONG * 3 // 4}, quality {QUALITY}, {content}; prepared for {args.name} ({max(backbone.size)} px), batch {args.batch}",
        **provenance(" ".join(words), 0, device),
        "load of the machine before and after": [round(each, 2) for each in (load, os.getloadavg()[0])] if load is not None else None,
        "seconds in all": round(time.perf_counter() - args.began, 1), **parts,
    }
    if args.out: write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__": main()

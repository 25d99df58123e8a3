"""How fast a training step is, against a plain implementation of the same step, in turns within one run.

    python tools/step_speed.py [--model ViT-B-32] [--batch 64] [--turns 5] [--device cpu] [--precision fp32] [--compile] [--skip-memory] [--out results/step-speed.json]

plain   open_clip's own `encode_image` and `encode_text`: all 77 tokens, the whole picture and the masked one embedded apart, the kept tokens
        of the masked one through the blocks, the loss, the way back, AdamW
pli     the same step by `train_step`
frozen  the same with `target = frozen`, the whole pictures' features known
compiled, and frozen, compiled  those two with `pli tune --compile`, where `--compile` is given; the steps in which kernels are made do not
        count, and what they take is told beside (the second way finds kernels that the first one has made)

Weights are random and the pictures are noise, which decides no time; captions have the lengths of COCO's: 8 to 16 words, 10.5 in the mean.
The losses of the first two must be equal. Times are worth something on a quiet machine only; the load is part of the record. Memory is the
peak of a process of its own.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
from torch import nn

from pli.backbones.loading import load_backbone
from pli.core import PliError, pick_device, provenance, rng_for, write_json
from pli.hiding.language import parse_hide
from pli.hiding.views import View
from pli.losses import compose_query, contrastive
from pli.settings import TuneSettings
from pli.training.step import learning_rate, make_optimiser, train_step, uses_bf16

HIDE, WORDS = "random:0.75", "a the two man woman dog street red with on of and riding large standing next to table field train".split()
WAYS, COMPILED = ("plain", "pli", "frozen"), ("compiled", "frozen, compiled")
LENGTHS = (8, 9, 9, 10, 10, 10, 11, 11, 12, 12, 13, 16)   # words, as in COCO's captions: mean 10.5 or so


def captions(count: int) -> list[str]:
    "Captions of COCO's lengths."
    random = rng_for(0, "captions")
    draw = lambda most: int(torch.randint(most, (1,), generator=random))
    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(LENGTHS[draw(len(LENGTHS))])) for _ in range(count)]


def plain_features(model: nn.Module, inputs: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    "Features of masked pictures, by the parts of open_clip's own vision transformer, as its `forward` joins them."
    visual = model.visual
    x = visual._embeds(inputs)
    kept = (~hidden).nonzero()[:, 1].reshape(len(hidden), -1) + 1
    kept = torch.cat([kept.new_zeros(len(kept), 1), kept], 1)
    x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    pooled, _ = visual._pool(visual.transformer(x))
    return pooled @ visual.proj


def plain_step(backbone, optimiser, pixels, texts, step, settings) -> float:
    "One step as one would write it down."
    model, device = backbone.model, backbone.device
    for group in optimiser.param_groups: group["lr"] = learning_rate(step, settings)
    floats = pixels.to(device).float().div(255)
    view = parse_hide(settings.hide)(View(floats, backbone.grid, captions=tuple(texts)), rng_for(settings.seed, "hide", step))
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(settings.precision, device)):
        inputs = (floats - backbone.mean) / backbone.std
        text = model.encode_text(open_clip.get_tokenizer(backbone.name)(list(texts)).to(device))
        whole, masked = model.encode_image(inputs), plain_features(model, inputs, view.hidden.to(device))
        loss = contrastive(compose_query(masked, text), whole, backbone.scale)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([weight for weight in backbone.parameters() if weight.grad is not None], settings.clip_gradient)
    optimiser.step()
    backbone.clamp_scale()
    return loss.item()


class Way:
    "One way to make a step, with a model and an optimiser of its own."
    def __init__(self, name: str, args, device: torch.device):
        self.name, self.backbone = name, load_backbone(args.model, device=device)
        self.settings = TuneSettings(hide=HIDE, precision=args.precision, batch_size=args.batch, ignore_same_picture=False, warmup=0, target="frozen" if "frozen" in name else "tuned")
        if "compiled" in name: self.backbone.compile_blocks(True)
        self.optimiser = make_optimiser(self.backbone, self.settings)
        self.pixels = torch.randint(0, 256, (args.batch, 3, *self.backbone.size), dtype=torch.uint8, generator=rng_for(0, "pixels"))
        self.texts, self.whole, self.step = captions(args.batch), None, 0
        if "frozen" in name:
            with torch.no_grad(): self.whole = self.backbone.encode_image(self.pixels).float()

    def __call__(self) -> float:
        "Make a step; its loss."
        given = (self.backbone, self.optimiser, self.pixels, self.texts, self.step, self.settings)
        self.step += 1
        if self.name == "plain": return plain_step(*given)
        return train_step(*given, gallery=self.backbone if "frozen" in self.name else None, whole=self.whole)["loss"]


def seconds(way: Way) -> float:
    "How long a step takes."
    if way.backbone.device.type == "cuda": torch.cuda.synchronize()
    began = time.perf_counter()
    way()
    if way.backbone.device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(args, name: str) -> int:
    "Peak of memory of two steps beyond what the model takes, in MB: of the GPU, or of a process of its own."
    command = [sys.executable, __file__, "--memory-of", name, "--model", args.model, "--batch", str(args.batch), "--device", args.device, "--precision", args.precision]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def tell_peak(args, device: torch.device) -> None:
    "In a process of its own: print the peak of memory in MB."
    way = Way(args.memory_of, args, device)
    way(), way()
    kilobytes = torch.cuda.max_memory_allocated() // 1024 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    print(kilobytes // 1024)


def embedding_seconds(way: Way) -> float:
    "How long a patch embedding takes, forward and back: what a step saves, whose masked and whole pictures share it."
    backbone = way.backbone
    inputs = (way.pixels.to(backbone.device).float().div(255) - backbone.mean) / backbone.std
    if backbone.device.type == "cuda": torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.autocast(backbone.device.type, torch.bfloat16, enabled=uses_bf16(way.settings.precision, backbone.device)): made = backbone.model.visual.conv1(inputs)
    made.float().sum().backward()
    if backbone.device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(values: list[float]) -> dict:
    "Median, lowest and highest."
    return {"median": round(statistics.median(values), 3), "lowest": round(min(values), 3), "highest": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", metavar="NAME", help="a vision transformer that open_clip knows (default: ViT-B-32)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step (default: 64)")
    parser.add_argument("--turns", type=int, default=5, help="steps of each way, in turns, after one that does not count (default: 5)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the best that is there)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="as in pli tune (default: fp32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside it, which needs a compiler of C++ on a CPU and makes kernels for a minute or two")
    parser.add_argument("--skip-memory", action="store_true", help="leave out the peaks of memory, which take a process each")
    parser.add_argument("--memory-of", choices=WAYS + COMPILED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.memory_of: return tell_peak(args, device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    names = WAYS + COMPILED if args.compile else WAYS
    memory = None if args.skip_memory else {name: peak(args, name) for name in names}
    ways, first, making = [Way(name, args, device) for name in names], {}, {}
    for way in ways:                                                                              # a first turn that does not count
        began = time.perf_counter()
        first[way.name] = way()
        if way.name in COMPILED: making[way.name] = round(time.perf_counter() - began, 1)
    for name in names:
        if abs(first["plain"] - first[name]) > (1e-4 if args.precision == "fp32" else 2e-2) * first["plain"]:
            raise PliError(f"two steps have different losses, plain {first['plain']} and {name} {first[name]}: nothing is compared")
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    embedding: list[float] = []
    for turn in range(args.turns):
        for way in ways[:: 1 if turn % 2 else -1]: times[way.name].append(seconds(way))
        embedding.append(embedding_seconds(ways[1]))
    ratios = {name: spread([plain / own for plain, own in zip(times["plain"], times[name])]) for name in names[1:]}
    record = {
        "what": f"one step of {args.model}, batch {args.batch}, {HIDE}, {args.precision} on {device.type}", **provenance(" ".join(["python", *sys.argv]), 0, device),
        "load of the machine before and after": [round(each, 2) for each in (load, os.getloadavg()[0])] if load is not None else None,
        "loss of the first step": {name: round(loss, 6) for name, loss in first.items()}, "seconds a step": {name: spread(values) for name, values in times.items()},
        "pictures a second": {name: round(args.batch / statistics.median(values), 1) for name, values in times.items()},
        "times as fast as plain": ratios, "wanted": {"pli": "at least 1.3", "frozen": "at least 2.5"}, "peak of memory, MB": memory,
        "one patch embedding, share of a step of pli": spread([part / step for part, step in zip(embedding, times["pli"])]),
        **({"first step, in which kernels are made, seconds": making} if making else {}),
    }
    if args.out: write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__": main()

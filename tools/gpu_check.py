"""What only a GPU can show, in one record: tests, precision, speed, torch.compile, and where a step's time goes. See tools/gpu_check.sh.

    tools/gpu_check.sh [--device cuda] [--quick] [--without PART ...] [--seconds 480] [--out results/gpu-check.json]

tests       `pytest -m gpu`: tuning, resuming, bf16, gradient caching and encoding on the device against the processor
precision   the same 30 steps in fp32 and in bf16: both curves of the loss, and the speed
share       seconds of a step outside forward and backward: loading, copying, hiding, tokens, clipping, optimiser, log; every span between two
            synchronisations, so the sum is a little more than a step without them. Wanted: less than 5 %
step        tools/step_speed.py for ViT-B-32 and ViT-L-14 in bf16
compile     every block but the last of both towers by torch.compile, against eager: seconds of the first step and of later ones, and the losses

The record is written after each part, so a run that is ended keeps what it has. A part that cannot be begun in time, or fails, is named in
it, and the exit status is 1. Weights are random and pictures drawn, which decides no time; losses fall on them all the same.
"""
import argparse
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader

import pli.backbones.openclip
from pli import world
from pli.backbones.loading import load_backbone
from pli.core import PliError, pick_device, provenance, rng_for, write_json
from pli.data.batches import PairSet, ResumableBatchSampler, collate
from pli.data.pairs import read_pairs
from pli.methods.method import TrainingBatch
from pli.settings import TuneSettings
from pli.training.checkpoints import save_checkpoint
from pli.training.step import make_optimiser, train_step
from pli.training.stopping import leave_signals_alone

ROOT = Path(__file__).resolve().parents[1]
FULL = {"model": "ViT-B-32", "batch": 64, "steps": 30, "pictures": 256, "timed": 20, "turns": 10, "models": {"ViT-B-32": 256, "ViT-L-14": 64}, "backend": "inductor"}
QUICK = {"model": "pli-tiny-64", "batch": 16, "steps": 4, "pictures": 32, "timed": 3, "turns": 1, "models": {"pli-tiny-64": 8}, "backend": "aot_eager"}


def loader_tool():
    "tools/loader_speed.py, which draws the pictures."
    spec = importlib.util.spec_from_file_location("loader_speed", ROOT / "tools" / "loader_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait(device: torch.device) -> None:
    "Until the device has done what it was given."
    if device.type == "cuda": torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict:
    "Median, lowest and highest."
    return {"median": round(statistics.median(values), 5), "lowest": round(min(values), 5), "highest": round(max(values), 5)}


def drawn_batches(backbone, size: dict, steps: int) -> list[tuple[torch.Tensor, list[str]]]:
    "Batches of the drawn world, the same ones every time."
    attributes = world.sample(size["pictures"], rng_for(0, "pictures"))
    pixels, captions = world.render(attributes, size=max(backbone.size)), world.caption(attributes, world.SPARSE, rng_for(0, "captions"))
    order = ResumableBatchSampler(size["pictures"], size["batch"], 0, 0, steps)
    return [(pixels[batch], [captions[row] for row in batch]) for batch in order]


def trained(device, size: dict, precision: str, prepare=lambda backbone: None, steps: int | None = None) -> tuple[list[float], list[float]]:
    "Losses and seconds of some steps from the same start."
    backbone = load_backbone(size["model"], device=device)
    settings = TuneSettings(steps=steps or size["steps"], batch_size=size["batch"], learning_rate=1e-4, warmup=min(5, size["steps"] // 2), precision=precision)
    batches, optimiser, losses, times = drawn_batches(backbone, size, settings.steps), make_optimiser(backbone, settings), [], []
    prepare(backbone)
    for step, (pixels, captions) in enumerate(batches):
        wait(device)
        began = time.perf_counter()
        losses.append(train_step(backbone, optimiser, pixels, captions, step, settings)["loss"])
        wait(device)
        times.append(time.perf_counter() - began)
    return losses, times


def apart(losses: list[float], others: list[float]) -> float:
    "The greatest difference of two curves, as a share of the first."
    return round(max(abs(one - other) / abs(one) for one, other in zip(losses, others)), 6)


def check_tests(device, size, args) -> dict:
    "The tests that need a GPU."
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    try: done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=args.left(), env=os.environ | {"PLI_GPU_TESTS": str(device)})
    except subprocess.TimeoutExpired: return {"failed": "not done in time"}
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])}
    fault = {"failed": f"pytest ended with {done.returncode}", "said": done.stdout[-3000:]} if done.returncode or not counts.get("passed") else {}
    return {"counts": counts, **fault}


def check_precision(device, size, args) -> dict:
    "Loss and speed in fp32 and bf16."
    found = {}
    for precision in ("fp32", "bf16"):
        losses, times = trained(device, size, precision)
        found[precision] = {"losses": [round(loss, 5) for loss in losses], "seconds a step": spread(times[1:]), "first step, seconds": round(times[0], 3)}
    both = {name: found[name]["losses"] for name in found}
    found["apart at most, share"], found["wanted"] = apart(both["fp32"], both["bf16"]), "at most 0.05"
    found["bf16 times as fast"] = round(found["fp32"]["seconds a step"]["median"] / found["bf16"]["seconds a step"]["median"], 2)
    falls = all(losses[-1] < losses[0] for losses in both.values()) or size is QUICK
    return found | ({} if found["apart at most, share"] <= 0.05 and falls else {"failed": "bf16 is too far from fp32, or a loss does not fall"})


def check_step(device, size, args) -> dict:
    "tools/step_speed.py for each model."
    found = {}
    for model, batch in size["models"].items():
        precision = "bf16" if device.type == "cuda" else "fp32"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "step.json"
            command = [sys.executable, str(ROOT / "tools" / "step_speed.py"), "--model", model, "--batch", str(batch), "--turns", str(size["turns"]), "--device", str(device), "--precision", precision]
            try: done = subprocess.run([*command, "--out", str(out), *["--skip-memory"] * (size is QUICK)], capture_output=True, text=True, timeout=args.left())
            except subprocess.TimeoutExpired: return found | {"failed": f"{model}: not done in time"}
            if done.returncode: return found | {"failed": f"{model}: {done.stderr[-1000:]}"}
            record = json.loads(out.read_text())
        found[model] = {"batch": batch, "precision": precision} | {key: record[key] for key in ("seconds a step", "pictures a second", "times as fast as plain", "peak of memory, MB")}
    return found


def compile_blocks(backbone, backend: str) -> None:
    "As `pli tune --compile` does."
    pli.backbones.openclip.COMPILER = backend
    backbone.compile_blocks(True)


def check_compile(device, size, args) -> dict:
    "Blocks by torch.compile against eager."
    precision = "bf16" if device.type == "cuda" else "fp32"
    losses, times = trained(device, size, precision)
    torch._dynamo.reset()
    try: compiled, faster = trained(device, size, precision, lambda backbone: compile_blocks(backbone, size["backend"]))
    except Exception as error: return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    finally: torch._dynamo.reset()
    later = max(1, size["steps"] // 2)                                 # captions of other lengths compile once more
    found = {
        "what": f"{size['model']}, batch {size['batch']}, {precision}, backend {size['backend']}", "apart at most, share": apart(losses, compiled),
        "wanted": "at most 0.02", "seconds a step": {"eager": spread(times[later:]), "compiled": spread(faster[later:])},
        "first step, seconds": {"eager": round(times[0], 3), "compiled": round(faster[0], 3)}, "first half of the steps, seconds": {"eager": round(sum(times[:later]), 3), "compiled": round(sum(faster[:later]), 3)},
        "times as fast": round(statistics.median(times[later:]) / statistics.median(faster[later:]), 3),
    }
    return found | ({} if found["apart at most, share"] <= 0.02 else {"failed": "compiled blocks give other losses"})


class Spans:
    "Seconds by name, each between two synchronisations; a span inside another is taken off it."
    def __init__(self, device: torch.device): self.device, self.seconds, self.inside = device, {}, []

    @contextmanager
    def span(self, name: str):
        wait(self.device)
        began = time.perf_counter()
        self.inside.append(0.0)
        try: yield
        finally:
            wait(self.device)
            took, inner = time.perf_counter() - began, self.inside.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + took - inner
            if self.inside: self.inside[-1] += took

    def around(self, name: str, call):
        "The call, measured."
        def measured(*arguments, **named):
            with self.span(name): return call(*arguments, **named)
        return measured


class TimedTokenizer:
    "A tokenizer, measured; what else it has, it has still."
    def __init__(self, tokenizer, spans: Spans): self.tokenizer_, self.call = tokenizer, spans.around("tokens", tokenizer)

    def __call__(self, *arguments, **named): return self.call(*arguments, **named)

    def __getattr__(self, name): return getattr(self.tokenizer_, name)


def check_share(device, size, args) -> dict:
    "Where the time of a step goes, with pictures from files and the loader of a run."
    workers = min(8, max(0, (os.cpu_count() or 1) - 1)) if size is FULL else 0
    spans, backbone, tool = Spans(device), load_backbone(size["model"], device=device), loader_tool()
    settings = TuneSettings(steps=size["timed"] + 3, batch_size=size["batch"], warmup=1, precision="bf16" if device.type == "cuda" else "fp32")
    optimiser = make_optimiser(backbone, settings)
    with tempfile.TemporaryDirectory() as folder:
        sources = tool.write_pairs(Path(folder), [tool.as_jpeg(number, tool.LONG, []) for number in range(size["pictures"])])
        pairs = PairSet(read_pairs(sources["files"]), backbone.pixels)
        order = ResumableBatchSampler(len(pairs), size["batch"], 0, 0, settings.steps)
        given = iter(DataLoader(pairs, batch_sampler=order, collate_fn=collate, num_workers=workers, worker_init_fn=leave_signals_alone))
        log = open(Path(folder) / "log.jsonl", "w")
        patches = [
            patch.object(TrainingBatch, "hidden", spans.around("hiding", TrainingBatch.hidden)),
            patch("torch.nn.utils.clip_grad_norm_", spans.around("clipping", torch.nn.utils.clip_grad_norm_)),
            patch.object(optimiser, "step", spans.around("optimiser", optimiser.step)),
        ]
        for each in patches: each.start()
        try:
            for step in range(settings.steps):
                if step == 3:
                    backbone.tokenizer = TimedTokenizer(backbone.tokenizer, spans)
                    spans.seconds.clear()                              # the first steps warm up
                with spans.span("loading"): batch = next(given)
                with spans.span("copying"): pixels = batch.pixels.to(device)
                with spans.span("forward and backward"): record = train_step(backbone, optimiser, pixels, batch.captions, step, settings, batch.pictures)
                with spans.span("log"):
                    log.write(json.dumps(record) + "\n")
                    log.flush()
        finally:
            for each in patches: each.stop()
            log.close()
        began = time.perf_counter()
        save_checkpoint(Path(folder) / "checkpoint.safetensors", backbone, optimiser, {"step": settings.steps})
        saving, saved = time.perf_counter() - began, (Path(folder) / "checkpoint.safetensors").stat().st_size
    whole = sum(spans.seconds.values())
    outside = {name: seconds for name, seconds in spans.seconds.items() if name != "forward and backward"}
    return {
        "what": f"{size['model']}, batch {size['batch']}, {settings.precision}, {tool.LONG} px JPEGs from files, {workers} reading processes", "steps": size["timed"],
        "seconds a step": {name: round(seconds / size["timed"], 6) for name, seconds in spans.seconds.items()},
        "share outside forward and backward": round(sum(outside.values()) / whole, 4), "without loading": round(sum(seconds for name, seconds in outside.items() if name != "loading") / whole, 4), "wanted": "less than 0.05",
        "a checkpoint": {"seconds": round(saving, 2), "bytes": saved, "share of a step, one every 100": round(saving / 100 / (whole / size["timed"]), 4)},
    }


PARTS = {"tests": check_tests, "precision": check_precision, "share": check_share, "step": check_step, "compile": check_compile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to rehearse (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: a tiny model, few steps, numbers that mean nothing")
    parser.add_argument("--without", nargs="+", default=[], choices=list(PARTS), metavar="PART", help=f"parts to leave out: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=480, help="begin no part after so long, and end those that are processes (default: 480)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu-check.json", metavar="FILE", help="JSON file for the record (default: results/gpu-check.json)")
    args = parser.parse_args()
    try: began, device, size = time.perf_counter(), pick_device(args.device), QUICK if args.quick else FULL
    except PliError as error: sys.exit(f"gpu_check: {error}")
    args.left = lambda: max(1.0, args.seconds - (time.perf_counter() - began))
    words = ["tools/gpu_check.sh", f"--device {device.type}"] + ["--quick"] * args.quick + [f"--without {' '.join(args.without)}"] * bool(args.without)
    record = {"what": "a rehearsal, whose numbers mean nothing" if args.quick else "checks and speeds on one device", **provenance(" ".join(words), 0, device), "seconds": {}, "parts": {}}
    for name, part in PARTS.items():
        if name in args.without: continue
        if time.perf_counter() - began > args.seconds: record["parts"][name] = {"failed": "no time was left"}
        else:
            start = time.perf_counter()
            with torch.random.fork_rng(devices=[]): record["parts"][name] = part(device, size, args)
            record["seconds"][name] = round(time.perf_counter() - start, 1)
            gc.collect()
            if device.type == "cuda": torch.cuda.empty_cache()
        failed = record["parts"][name].get("failed")
        print(f"{name}: {'FAILED, ' + str(failed) if failed else 'done'} ({record['seconds'].get(name, 0)} s)", flush=True)
        record["failed"] = [each for each, found in record["parts"].items() if "failed" in found]
        write_json(args.out, record)
    print(json.dumps({key: record[key] for key in ("parts", "seconds", "failed") if key in record}, indent=1))
    sys.exit(bool(record.get("failed")))


if __name__ == "__main__": main()

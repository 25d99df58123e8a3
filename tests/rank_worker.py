"One process of a run that several share: `torchrun rank_worker.py OUT CASES [FORGET]`; the first one writes what came of every case."
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

import pli.distributed
import pli.training.rows
import pli.training.step
from pli import world
from pli.backbones.loading import load_backbone
from pli.backbones.protocol import weights_of
from pli.core import rng_for, save_tensors
from pli.data.batches import PairSet, TensorPairs
from pli.data.mixtures import join_pairs
from pli.data.pairs import read_pairs
from pli.distributed import gather_json, process_group, rank
from pli.settings import TuneSettings
from pli.training.loop import tune
from pli.training.stopping import RunStopped

PICTURES = 96


def drawn_pairs() -> TensorPairs:
    "A small world, with one picture that is there twice."
    attributes = world.sample(PICTURES, rng_for(0, "pictures"))
    pixels, captions = world.render(attributes, size=48), world.caption(attributes, world.SPARSE, rng_for(0, "captions"))
    pixels[1] = pixels[0]
    return TensorPairs(pixels, captions)


def filed_pairs(backbone, tables: list[str], weights: list[float] = (), captions: str = "each") -> PairSet:
    "Pairs whose pictures lie in files, of one source or of several."
    return PairSet(join_pairs([read_pairs(table) for table in tables], weights), backbone.pixels, captions)


def run_case(settings: dict, folder: Path | None = None, stop_after: int = 0, signal_after: int = 0, pairs: dict | None = None) -> tuple[dict, dict]:
    "Weights after a run, and its log; of one that a signal has ended, what it says."
    backbone = load_backbone("pli-tiny-48")
    data = filed_pairs(backbone, **pairs) if pairs else drawn_pairs()
    if signal_after: data.__class__ = type("Told", (TensorPairs,), {"left": signal_after, "__getitem__": told})
    if stop_after: data.__class__ = type("Fuse", (TensorPairs,), {"left": stop_after, "__getitem__": fused})
    lines = []
    try: result = tune(backbone, data, TuneSettings(**settings), folder, say=lines.append)
    except RunStopped as error: return {}, {"stopped": str(error), "said": lines}
    weights = {name: value.float() for name, value in weights_of(backbone).items() if value.is_floating_point()}
    return weights, {"history": result.history, "scores": result.scores, "problems": result.problems, "said": lines}


def stopped_run(backbone, settings: TuneSettings, folder: Path, after: int) -> None:
    "A run in one process that an interrupt ends after so many pictures were read, those that are encoded before the first step aside."
    data = drawn_pairs()
    left = after + PICTURES * (settings.target == "frozen")

    class Stopped(TensorPairs):
        def __getitem__(self, index):
            nonlocal left
            left -= 1
            if left < 0: raise KeyboardInterrupt
            return super().__getitem__(index)
    tune(backbone, Stopped(data.pixels, data.captions), settings, folder, say=lambda line: None)


def fused(self, index):
    "Pairs of which one breaks the process that reads it, as a lost machine would."
    type(self).left -= 1
    if type(self).left < 0 and rank(): raise KeyboardInterrupt
    return TensorPairs.__getitem__(self, index)


def told(self, index):
    "Pairs of which one sends SIGTERM to the process that reads it, the second one of a run."
    type(self).left -= 1
    if type(self).left == 0 and rank() == 1: os.kill(os.getpid(), signal.SIGTERM)
    return TensorPairs.__getitem__(self, index)


def forget(what: str) -> None:
    "Leave out what makes several processes compute one gradient, so that a test can see that it would notice."
    if what == "gather": pli.training.rows.gather_rows = lambda own, total: torch.cat([own] * pli.distributed.rank_count())[:total]
    if what == "average": pli.training.step.data_parallel, pli.training.step.mean_over_ranks = (lambda *arguments: None), (lambda weights: None)
    if what == "average": sys.modules["pli.training.loop"].data_parallel = lambda *arguments: None
    if what == "scale": pli.distributed._GatherRows.backward = staticmethod(lambda context, gradient: gradient[rank() * context.rows:][: context.rows])


def main() -> None:
    torch.set_num_threads(1)
    out, cases, *rest = sys.argv[1:]
    with process_group(torch.device("cpu")):
        if rest: forget(rest[0])
        for name, case in json.loads(cases).items():
            weights, log = run_case(**{key: Path(value) if key == "folder" else value for key, value in case.items()})
            ended = gather_json(log.get("stopped"))
            if rank(): continue
            Path(out).mkdir(parents=True, exist_ok=True)
            save_tensors(Path(out) / f"{name}.safetensors", weights)
            (Path(out) / f"{name}.json").write_text(json.dumps(log | {"stopped in each": ended}))


if __name__ == "__main__": main()

"The tuning loop: killed for real and continued to the bit, frozen towers, losses that explode, folders, settings."
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import open_clip
import pytest
import rank_worker
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pli
from pli import core
from pli.training import loop as tuning
from pli.training import step
from pli.backbones.loading import load_backbone
from pli.core import PliError, rng_for, unit
from pli.data.pairs import Pairs
from pli.data.batches import PairSet, TensorPairs, collate
from pli.hiding.views import View
from pli.hiding.language import parse_hide
from pli.backbones.shortcuts import class_token_alone, words_alone
from pli.methods.method import Method, TrainingBatch, same_picture
from pli.methods.registry import METHODS
from pli.training.loop import check_settings, tune
from pli.training.step import SCHEDULES, learning_rate, make_optimiser, train_step
from pli.settings import TuneSettings
from pli.training.average import MovingAverage, average
from pli.training.checkpoints import StepLog, check_room, file_sizes, load_checkpoint, read_log
from pli.training.identity import claim_folder, files_digest, state_digest, holds_pictures_twice
from pli.training.batches import partners_for
from pli.training.stopping import RunStopped

TEXT = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def model_config(**vision):
    return {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8, **vision}, "text_cfg": TEXT}


CONFIGS = {
    "plain": model_config(), "dropout": model_config(patch_dropout=0.5), "sincos": model_config(pos_embed_type="sin_cos_2d"),
    "siglike": {**model_config(), "custom_text": True, "init_logit_bias": -10},
    "resnet": {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT},
}
SHORT = TuneSettings(steps=8, batch_size=8, learning_rate=1e-3, warmup=2, checkpoint_every=3, hide="random:0.5")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items(): (folder / f"tunetest-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture
def fresh(configs):
    return lambda name="plain", seed=0: load_backbone(f"tunetest-{name}", seed=seed)


def chance_pairs(count=40, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return TensorPairs(torch.randint(0, 256, (count, 3, 32, 32), generator=chance, dtype=torch.uint8), [f"thing number {i}" for i in range(count)])


PAIRS = chance_pairs()


def quiet(line): pass


def run(backbone, folder=None, data=PAIRS, settings=SHORT, **changes):
    extra = {key: changes.pop(key) for key in ("validate", "workers", "say", "prolong", "keep_every", "tensorboard") if key in changes}
    return tune(backbone, data, dataclasses.replace(settings, **changes), folder, **{"say": quiet, **extra})


def same(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Fuse(TensorPairs):
    "Pairs that blow up after a number of pictures were read."
    def __init__(self, left, pairs=PAIRS): super().__init__(pairs.pixels, pairs.captions); self.left = left
    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0: raise KeyboardInterrupt
        return super().__getitem__(index)


# ---- killed for real

SCRIPT = '''
import os, signal, sys, time
import open_clip, torch
from pli import core
from pli.training import loop as tuning
from pli.settings import TuneSettings
from pli.training.average import average
from pli.backbones.loading import load_backbone
from pli.data.batches import TensorPairs

configs, folder, mode = sys.argv[1:]
open_clip.add_model_config(configs)

class Slow(TensorPairs):
    def __getitem__(self, index):
        if mode == "slow": time.sleep(0.01)
        return super().__getitem__(index)

wait, written = core.to_disk, []
def torn(path):
    "The second checkpoint gets half of its bytes before the lights go out."
    if "checkpoint" in path.name: written.append(path)
    if mode == "torn" and len(written) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    wait(path)
core.to_disk = torn

if __name__ == "__main__":
    chance = torch.Generator().manual_seed(0)
    pairs = Slow(torch.randint(0, 256, (40, 3, 32, 32), generator=chance, dtype=torch.uint8), [f"thing number {i}" for i in range(40)])
    settings = TuneSettings(steps=40, batch_size=8, learning_rate=1e-3, warmup=2, checkpoint_every=4, hide="mix:0.5+random:0.5", validate_every=7)
    result = tuning.tune(load_backbone("tunetest-plain"), pairs, settings, folder, validate=lambda backbone: -backbone.scale.item())
    print(result.continued_from)
'''


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_twice_and_continued_in_new_processes(fresh, configs, tmp_path):
    "Once from outside in the middle of a step, once while a checkpoint is being written: the same weights, to the bit."
    (tmp_path / "killme.py").write_text(SCRIPT)
    folder = tmp_path / "run"
    path = os.pathsep.join([str(Path(pli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONUNBUFFERED": "1"}
    start = lambda mode: subprocess.Popen([sys.executable, "-m", "killme", str(configs), str(folder), mode], cwd=tmp_path, env=environment,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = folder / "checkpoint.safetensors"

    first, patience = start("slow"), time.monotonic() + 180
    while not checkpoint.exists() and first.poll() is None and time.monotonic() < patience: time.sleep(0.01)
    time.sleep(0.15)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and checkpoint.exists() and not (folder / "last").exists()
    reached = len((folder / "log.jsonl").read_text().splitlines())
    assert 4 <= reached < 32

    second = start("torn")
    output, trouble = second.communicate(timeout=180)
    assert second.returncode == -signal.SIGKILL, trouble
    assert "continuing at step" in output and not (folder / "last").exists()
    assert len(list(folder.glob(".checkpoint*"))) == 1                            # the torn one lies there under its temporary name
    load_file(checkpoint)                                                         # and the one before it is whole

    third = start("plain")
    output, trouble = third.communicate(timeout=180)
    assert third.returncode == 0, trouble
    continued_from = int(output.splitlines()[-1])
    assert continued_from % 4 == 0 and continued_from >= max(8, reached)
    assert not list(folder.glob(".*"))                                            # nothing torn is left

    whole = fresh()
    settings = TuneSettings(steps=40, batch_size=8, learning_rate=1e-3, warmup=2, checkpoint_every=4, hide="mix:0.5+random:0.5", validate_every=7)
    result = tune(whole, PAIRS, settings, tmp_path / "whole", validate=lambda backbone: -backbone.scale.item(), say=quiet)
    assert same(load_backbone(str(folder / "last")), whole)
    for name in ("log.jsonl", "run.json", "checkpoint.safetensors", "last/open_clip_model.safetensors", "best/open_clip_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == result.history


@pytest.mark.parametrize("left", range(0, 64, 7))
def test_stopped_anywhere_and_continued(fresh, tmp_path, left):
    whole, first, second = fresh(), fresh(), fresh()
    scores = lambda backbone: backbone.scale.item()
    wanted = run(whole, tmp_path / "whole", validate=scores, validate_every=2)
    with pytest.raises(KeyboardInterrupt): run(first, tmp_path / "run", Fuse(left), validate=scores, validate_every=2)
    result = run(second, tmp_path / "run", validate=scores, validate_every=2)
    done = left // 8 // 3 * 3
    assert result.continued_from == (done or None)
    assert same(whole, second) and result.history == wanted.history and result.scores == wanted.scores and result.best == wanted.best
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == (tmp_path / "whole" / "checkpoint.safetensors").read_bytes()


def test_continued_by_the_same_object_too(fresh, tmp_path):
    "A notebook interrupts and runs the cell again; the weights have moved on, and the run says so instead of mixing."
    backbone = fresh()
    with pytest.raises(KeyboardInterrupt): run(backbone, tmp_path / "run", Fuse(50))
    with pytest.raises(PliError, match="holds another run .start was"): run(backbone, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(fresh, tmp_path, monkeypatch):
    wait, calls = core.to_disk, []
    def full(path):
        if "checkpoint" in path.name: calls.append(path)
        if "checkpoint" in path.name and len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        wait(path)
    monkeypatch.setattr(core, "to_disk", full)
    with pytest.raises(OSError): run(fresh(), tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))
    again = fresh()
    assert run(again, tmp_path / "run").continued_from == 3
    whole = fresh()
    run(whole)
    assert same(again, whole)


def test_killed_between_log_and_checkpoint(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40))
    with open(tmp_path / "run" / "log.jsonl", "a") as file: file.write('{"step": 3, "loss": 0}\n{"step": 4, "lo')
    result = run(fresh(), tmp_path / "run")
    assert [record["step"] for record in result.history] == list(range(8)) and result.history == run(fresh()).history


def test_a_finished_run_does_nothing_again(fresh, tmp_path):
    first = fresh()
    result = run(first, tmp_path / "run", validate=lambda backbone: 0.25)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").glob("*.*")}
    second = fresh()
    again = run(second, tmp_path / "run", Fuse(0), validate=lambda backbone: pytest.fail("validated again"))
    assert again.history == result.history and again.scores == result.scores and again.best == 0.25 and again.continued_from == 8
    assert same(first, second) and before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").glob("*.*")}


def test_killed_just_before_the_last_model_was_written(fresh, tmp_path, monkeypatch):
    run(fresh(), tmp_path / "run")
    for file in (tmp_path / "run" / "last").iterdir(): file.unlink()
    (tmp_path / "run" / "last").rmdir()
    second = fresh()
    run(second, tmp_path / "run")
    assert same(load_backbone(str(tmp_path / "run" / "last")), second)


@pytest.mark.parametrize("every", [1, 3, 8, 100])
def test_the_log_has_one_line_a_step(fresh, tmp_path, every):
    result = run(fresh(), tmp_path, checkpoint_every=every)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["step"] for line in lines] == list(range(8))
    assert all(set(line) == {"step", "loss", "learning_rate", "scale", "gradient_norm"} for line in lines)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.safetensors", "last", "log.jsonl", "run.json"]


def test_without_a_folder_nothing_is_written(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(fresh(), validate=lambda backbone: 1.0)
    assert not list(tmp_path.iterdir())


# ---- what decides the numbers

def test_the_seed_decides(fresh):
    one, two, other = fresh(), fresh(), fresh()
    torch.manual_seed(1); first = run(one)
    torch.manual_seed(2); second = run(two)
    third = run(other, seed=1)
    assert same(one, two) and first.history == second.history and not same(one, other) and third.history != first.history


def test_workers_change_nothing(fresh):
    one, two = fresh(), fresh()
    assert run(one).history == run(two, workers=2).history and same(one, two)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_random_numbers_go_on(fresh, workers):
    backbone = fresh()
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), [numpy.asarray(part).tolist() for part in numpy.random.get_state()])
    before = states()
    run(backbone, hide="recolour+random:0.5", workers=workers)
    assert states() == before


def test_a_model_with_patch_dropout_is_deterministic_and_drops_nothing(fresh):
    one, two, plain = fresh("dropout"), fresh("dropout"), fresh("plain")
    one.train()
    first = run(one)
    torch.rand(3)
    assert first.history == run(two).history and same(one, two)
    assert run(plain).history == first.history and same(plain, one)               # the towers stay in evaluation mode


def test_afterwards_nothing_asks_for_gradients(fresh):
    for accident in (False, True):
        backbone = fresh()
        if accident:
            with pytest.raises(KeyboardInterrupt): run(backbone, data=Fuse(20))
        else: run(backbone)
        assert not any(weight.requires_grad for weight in backbone.parameters()) and not any(module.training for module in backbone.modules())
        assert not backbone.encode_text(["a"]).requires_grad


# ---- which weights learn

def moved(before, backbone):
    return {name for name, weight in backbone.model.named_parameters() if not torch.equal(before[name], weight)}


def weights(backbone): return {name: weight.detach().clone() for name, weight in backbone.model.named_parameters()}


def in_use(name): return "token_embedding" not in name


@pytest.mark.parametrize("name", ["plain", "siglike", "resnet", "sincos"])
@pytest.mark.parametrize("which", ["both", "image", "text"])
def test_the_other_tower_is_frozen(fresh, name, which):
    backbone = fresh(name)
    before, buffers = weights(backbone), {key: value.clone() for key, value in backbone.model.named_buffers()}
    run(backbone, tune=which, weight_decay=0.1, steps=3, warmup=0, batch_size=16)
    fixed = {"visual.positional_embedding"} if name == "sincos" else set()
    picture, words = {key for key in before if key.startswith("visual.")} - fixed, {key for key in before if not key.startswith("visual.") and key != "logit_scale"}
    learned = moved(before, backbone)
    assert "logit_scale" in learned
    if which == "image": assert not learned & words
    if which == "text": assert not learned & (picture | fixed)
    if which != "text": assert len(learned & picture) >= 0.9 * len(picture) and not learned & fixed
    if which != "image": assert {key for key in words if "bias" not in key} <= learned
    assert all(torch.equal(value, buffers[key]) for key, value in backbone.model.named_buffers())      # no moving statistics


@pytest.mark.parametrize("name", ["plain", "sincos"])
def test_a_second_run_learns_what_the_first_did(fresh, name):
    "Frozen or fixed in one run is not frozen in the next."
    backbone, copied = fresh(name), fresh(name)
    for which in ("image", "text"): run(backbone, tune=which, steps=1)
    run(copied, steps=1)
    for tower in (backbone, copy.deepcopy(copied)):
        before = weights(tower)
        run(tower, steps=2, warmup=0)
        learned = moved(before, tower)
        assert "positional_embedding" in learned and ("visual.positional_embedding" in learned) == (name == "plain")


def test_a_run_in_two_pieces_of_memory_equals_a_reload(fresh, tmp_path):
    "Tuned twice in one process, or saved, loaded and tuned: the same."
    one = fresh()
    run(one, steps=2)
    one.save(tmp_path)
    two = load_backbone(str(tmp_path))
    assert run(one, seed=1).history == run(two, seed=1).history and same(one, two)


@pytest.mark.parametrize("name", ["plain", "siglike", "resnet", "sincos"])
def test_weight_decay_groups(fresh, name):
    backbone = fresh(name)
    decayed, spared = make_optimiser(backbone, dataclasses.replace(SHORT, weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and spared["weight_decay"] == 0.0
    names = {id(weight): key for key, weight in backbone.model.named_parameters()}
    first, second = [[names[id(weight)] for weight in group["params"]] for group in (decayed, spared)]
    dims = dict(backbone.model.named_parameters())
    assert all(dims[key].ndim > 1 for key in first) and all(dims[key].ndim < 2 for key in second)
    assert "logit_scale" in second and ("logit_bias" in second) == (name == "siglike") and not [key for key in first if key.endswith("bias")]
    assert sorted(first + second) == sorted(key for key in dims if (name, key) != ("sincos", "visual.positional_embedding"))


@pytest.mark.parametrize("name, most", [("plain", 100.0), ("siglike", math.inf)])
def test_a_bound_of_the_scale_is_clips_only(fresh, name, most):
    "SigLIP's models were trained with a scale of 117 or so and a bias; the contrastive loss does not see the bias, which stays."
    backbone = fresh(name)
    with torch.no_grad(): backbone.model.logit_scale.fill_(math.log(117.3))
    run(backbone, steps=2, warmup=0, learning_rate=1e-4)
    assert (backbone.scale.item() > 110) == (most > 100) and backbone.scale.item() <= most + 1e-4
    if name == "siglike": assert backbone.model.logit_bias.item() == -10


def test_decay_alone_shrinks_matrices_and_nothing_else(fresh, monkeypatch):
    monkeypatch.setitem(METHODS, "nothing", FromFunction("nothing", lambda backbone, *_, **__: 0.0 * sum(weight.sum() for weight in backbone.model.parameters())))
    backbone = fresh()
    before = weights(backbone)
    run(backbone, objective="nothing", steps=1, warmup=0, learning_rate=0.5, weight_decay=0.2)
    for name, weight in backbone.model.named_parameters():
        assert torch.allclose(weight, before[name] * (0.9 if weight.ndim > 1 else 1.0), atol=1e-6), name


# ---- schedules

@examples(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300), st.integers(0, 320), st.floats(1e-8, 1.0))
def test_schedules_warm_up_then_never_rise(name, steps, warmup, peak):
    line = TuneSettings(steps=steps, warmup=warmup, schedule=name, learning_rate=peak)
    rates = [learning_rate(step, line) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates[: warmup + 1]) and all(0 <= rate <= peak for rate in rates)
    warm, rest = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in zip(warm, warm[1:])) and all(a >= b for a, b in zip(rest, rest[1:]))
    if rest: assert rest[0] == pytest.approx(peak)


def test_schedules_by_number():
    line = TuneSettings(steps=110, warmup=10, learning_rate=1.1)
    rates = {name: [learning_rate(step, dataclasses.replace(line, schedule=name)) for step in (0, 9, 10, 60, 109)] for name in SCHEDULES}
    assert rates["constant"] == pytest.approx([0.1, 1.0, 1.1, 1.1, 1.1])
    assert rates["cosine"] == pytest.approx([0.1, 1.0, 1.1, 0.55, 1.1 * 0.5 * (1 + math.cos(math.pi * 0.99))])
    assert rates["step"] == pytest.approx([0.1, 1.0, 1.1, 0.11, 0.011])
    assert len({learning_rate(step, dataclasses.replace(line, schedule="step")) for step in range(10, 110)}) == 3


def test_the_optimiser_follows_the_schedule(fresh):
    result = run(fresh(), schedule="step")
    assert [record["learning_rate"] for record in result.history] == [learning_rate(step, dataclasses.replace(SHORT, schedule="step")) for step in range(8)]


# ---- methods

def loss_of(name, backbone, pixels, captions, settings, random, progress=1.0, same=None):
    "The loss of a method that is known by name."
    return METHODS[name].loss(backbone, TrainingBatch(pixels, captions, random, progress, same), settings)


class FromFunction(Method):
    "A method whose loss is a function."
    def __init__(self, name, function): self.name, self.function = name, function

    def loss(self, backbone, batch, settings, gallery=None):
        return self.function(backbone, batch.pixels, batch.captions, settings, batch.random, batch.progress, batch.same)


def choose(dots):
    "Cross-entropy of the diagonal, row by row."
    return sum(max(row) + math.log(sum(math.exp(x - max(row)) for x in row)) - row[i] for i, row in enumerate(dots)) / len(dots)


def features(backbone, settings, batch=6):
    pixels, captions = PAIRS.pixels[:batch].float() / 255, PAIRS.captions[:batch]
    view = parse_hide(settings.hide)(View(pixels, backbone.grid), rng_for(settings.seed, "hide", 4))
    with torch.no_grad(): parts = backbone.encode_image(view.pixels, view.hidden), backbone.encode_text(captions), backbone.encode_image(pixels)
    return pixels, captions, [part.double() for part in parts]


@pytest.mark.parametrize("hide", ["random:0.5", "mix:0.5", "recolour:1+grid:0.5"])
def test_paper_objective_is_its_formula(fresh, hide):
    "(masked + text) . target, lengths kept, temperature one, query to target."
    backbone, settings = fresh(), dataclasses.replace(SHORT, hide=hide, weight=7.0)
    pixels, captions, (masked, text, whole) = features(backbone, settings)
    got = loss_of("paper", backbone, pixels, captions, settings, rng_for(settings.seed, "hide", 4)).item()
    assert got == pytest.approx(choose(((masked + text) @ whole.T).tolist()), rel=1e-4)
    assert loss_of("paper", backbone, pixels, captions, dataclasses.replace(settings, symmetric=False), rng_for(settings.seed, "hide", 4)).item() == got


def released_step(weights, heads, pixels, text, noise, ratio):
    """One step of the released code of masked tuning, from the facts about it and from nothing of this package: patches and their positions, uniform noise sorted, the first `int(L * (1 - ratio))` kept, the class token with its own position
    in front, a norm, the transformer (QuickGELU), a norm on the class token, the projection; unnormalised sum, temperature 1, query to target."""
    w = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    norm = lambda x, name: torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def tower(pixels, keep):
        x = torch.nn.functional.conv2d(pixels, w["conv1.weight"], stride=w["conv1.weight"].shape[-1]).flatten(2).transpose(1, 2)
        x = x + w["positional_embedding"][1:]
        if keep is not None: x = torch.gather(x, 1, keep[:, :, None].repeat(1, 1, x.shape[2]))
        x = torch.cat([(w["class_embedding"] + w["positional_embedding"][0]).expand(len(x), 1, -1), x], 1)
        x = norm(x, "ln_pre")
        for layer in range(sum(name.endswith("ln_1.weight") for name in w)):
            at = f"transformer.resblocks.{layer}."
            q, k, v = (norm(x, at + "ln_1") @ w[at + "attn.in_proj_weight"].T + w[at + "attn.in_proj_bias"]).chunk(3, 2)
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
            seen = ((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + seen @ w[at + "attn.out_proj.weight"].T + w[at + "attn.out_proj.bias"]
            inner = norm(x, at + "ln_2") @ w[at + "mlp.c_fc.weight"].T + w[at + "mlp.c_fc.bias"]
            x = x + (inner * torch.sigmoid(1.702 * inner)) @ w[at + "mlp.c_proj.weight"].T + w[at + "mlp.c_proj.bias"]
        return norm(x[:, 0], "ln_post") @ w["proj"]

    keep = torch.argsort(noise, dim=1)[:, :int(noise.shape[1] * (1 - ratio))]
    masked, whole = tower(pixels, keep), tower(pixels, None)
    return keep, masked, torch.nn.functional.cross_entropy((masked + text) @ whole.T, torch.arange(len(pixels)))


@pytest.mark.parametrize("side", [7, 8, 14, 16])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_the_papers_loss_is_the_released_step(tmp_path, side, ratio):
    "Mask, features, loss and gradients at 49, 64, 196 and 256 patches."
    (tmp_path / "tunetest-quick.json").write_text(json.dumps({**model_config(image_size=4 * side, patch_size=4, width=32, layers=2), "quick_gelu": True}))
    open_clip.add_model_config(tmp_path)
    backbone = load_backbone("tunetest-quick", seed=1)
    backbone.model.eval()
    assert type(backbone.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU" and backbone.patches == side * side
    pixels, captions = torch.rand(6, 3, 4 * side, 4 * side, generator=rng_for(side)), [f"a thing of kind {i}" for i in range(6)]
    settings = dataclasses.replace(SHORT, objective="paper", hide=f"random:{ratio}")
    view = parse_hide(settings.hide)(View(pixels, backbone.grid), rng_for(3))
    loss = loss_of("paper", backbone, pixels, captions, settings, rng_for(3))
    loss.backward()
    weights = {name: value.detach().clone().requires_grad_() for name, value in backbone.model.state_dict().items()}
    mean, std = (torch.tensor(backbone.config["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
    text = backbone.encode_text(captions)
    keep, masked, wanted = released_step(weights, 4, (pixels - mean) / std, text.detach(), torch.rand(6, side * side, generator=rng_for(3)), ratio)
    assert torch.equal(~view.hidden, torch.zeros_like(view.hidden).scatter(1, keep, True))          # the same patches, row by row
    torch.testing.assert_close(backbone.encode_image(view.pixels, view.hidden), masked, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    wanted.backward()
    for name, value in backbone.model.named_parameters():
        if name.startswith("visual."): torch.testing.assert_close(value.grad, weights[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight, clip_weight, symmetric", [(1.0, 0.0, True), (0.25, 0.0, False), (2.0, 0.5, True), (0.0, 1.0, False)])
def test_masked_objective_is_its_formula(fresh, weight, clip_weight, symmetric):
    backbone = fresh()
    settings = dataclasses.replace(SHORT, weight=weight, clip_weight=clip_weight, symmetric=symmetric)
    pixels, captions, (masked, text, whole) = features(backbone, settings)
    dots = backbone.scale.item() * (unit(unit(text) + weight * unit(masked)) @ unit(whole).T)
    plain = backbone.scale.item() * (unit(whole) @ unit(text).T)
    wanted = (choose(dots.tolist()) + choose(dots.T.tolist())) / 2 if symmetric else choose(dots.tolist())
    wanted += clip_weight * (choose(plain.tolist()) + choose(plain.T.tolist())) / 2
    assert loss_of("masked", backbone, pixels, captions, settings, rng_for(settings.seed, "hide", 4)).item() == pytest.approx(wanted, rel=1e-4)


def test_clip_objective_is_its_formula_and_hides_nothing(fresh):
    backbone, settings = fresh(), dataclasses.replace(SHORT, objective="clip")
    pixels, captions, (_, text, whole) = features(backbone, settings)
    dots = backbone.scale.item() * (unit(whole) @ unit(text).T)
    wanted = (choose(dots.tolist()) + choose(dots.T.tolist())) / 2
    for hide in ("random:0.5", "mix:0.5"):
        assert loss_of("clip", backbone, pixels, captions, dataclasses.replace(settings, hide=hide), rng_for(0)).item() == pytest.approx(wanted, rel=1e-4)


def gradients(backbone, alone, hidden):
    pixels = torch.rand(5, 3, *backbone.size, generator=rng_for(1))
    backbone.eval().requires_grad_(True).zero_grad(set_to_none=True)
    with class_token_alone(backbone.model) if alone else contextlib.nullcontext():
        found = backbone.encode_image(pixels, hidden)
        (found * torch.randn(found.shape, generator=rng_for(2))).sum().backward()
    return found.detach(), {name: weight.grad for name, weight in backbone.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("change", [{}, {"layers": 3, "width": 32}, {"ls_init_value": 0.1}, {"pos_embed_type": "sin_cos_2d"}, {"no_ln_pre": True}, {"final_ln_after_pool": True}, {"patch_dropout": 0.5}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_class_token_alone_gives_the_same_features_and_gradients(tmp_path, change, masked):
    (tmp_path / "tunetest-alone.json").write_text(json.dumps(model_config(**change)))
    open_clip.add_model_config(tmp_path)
    backbone = load_backbone("tunetest-alone", seed=2)
    block = backbone.model.visual.transformer.resblocks[-1]
    widths = []
    block.mlp.register_forward_hook(lambda module, given, made: widths.append(given[0].shape[1]))
    hidden = (torch.arange(16) % 4 > 0).expand(5, -1) if masked else None
    (plain, wanted), (alone, found) = gradients(backbone, False, hidden), gradients(backbone, True, hidden)
    assert widths == [5 if masked else 17, 1] and "forward" not in vars(block)            # it did work on one token, and is as it was
    torch.testing.assert_close(alone, plain, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name in wanted: torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}, None])
def test_other_towers_are_left_as_they_are(tmp_path, change):
    (tmp_path / "tunetest-other.json").write_text(json.dumps(CONFIGS["resnet"] if change is None else model_config(**change)))
    open_clip.add_model_config(tmp_path)
    backbone = load_backbone("tunetest-other", seed=2)
    pixels = torch.rand(3, 3, 32, 32, generator=rng_for(1))
    with torch.no_grad():
        plain = backbone.encode_image(pixels)
        with class_token_alone(backbone.model): assert torch.equal(backbone.encode_image(pixels), plain)


@pytest.mark.parametrize("change", [{}, {"layers": 3}, {"ls_init_value": 0.1}, {"proj_type": "none", "width": 16}, {"no_causal_mask": True}])
@pytest.mark.parametrize("texts", [["a red heart", "a", ""], ["a red heart"] * 3, ["one two three four five six seven eight nine ten eleven twelve"] * 2, ["short", "long " * 30]])
def test_words_alone_give_the_same_features_and_gradients(tmp_path, change, texts):
    (tmp_path / "tunetest-words.json").write_text(json.dumps(model_config() | {"text_cfg": {**TEXT, "heads": 2, **change}}))
    open_clip.add_model_config(tmp_path)
    backbone = load_backbone("tunetest-words", seed=2)
    widths = []
    backbone.model.transformer.resblocks[-1].mlp.register_forward_hook(lambda module, given, made: widths.append(given[0].shape[1]))

    def both(alone):
        backbone.eval().requires_grad_(True).zero_grad(set_to_none=True)
        with words_alone(backbone.model) if alone else contextlib.nullcontext():
            found = backbone.encode_text(texts)
            (found * torch.randn(found.shape, generator=rng_for(2))).sum().backward()
        return found.detach(), {name: weight.grad for name, weight in backbone.model.named_parameters() if weight.grad is not None}
    (plain, wanted), (alone, found) = both(False), both(True)
    assert widths == [10, 10 if "no_causal_mask" in change else 1] and "encode_text" not in vars(backbone.model)      # where words see what follows, nothing is left out
    torch.testing.assert_close(alone, plain, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name in wanted: torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_that_fails_leaves_the_tower_whole(fresh):
    backbone = fresh()
    with pytest.raises(PliError, match="the loss is"): run(backbone, steps=6, learning_rate=1e30, clip_gradient=0.0, warmup=0)
    assert not any({"forward", "encode_text"} & vars(module).keys() for module in backbone.modules())


@pytest.mark.parametrize("objective", list(METHODS))
def test_every_objective_learns(fresh, objective):
    hide = "none" if objective == "clip" else SHORT.hide
    history = run(fresh(), objective=objective, hide=hide, steps=40, data=chance_pairs(16), batch_size=16).history
    assert sum(record["loss"] for record in history[-5:]) < 0.9 * sum(record["loss"] for record in history[:5])


@pytest.mark.parametrize("start, bound", [(math.log(100) + 1, 100.0), (-1.0, 1.0)])
def test_the_scale_stays_between_1_and_100(fresh, start, bound):
    backbone = fresh()
    with torch.no_grad(): backbone.model.logit_scale.fill_(start)
    history = run(backbone, steps=3).history
    assert history[0]["scale"] == pytest.approx(bound, rel=1e-5) and 1 <= backbone.scale.item() <= 100.001
    assert all(1 <= record["scale"] <= 100.001 for record in history)


def test_gradients_are_clipped_and_their_norm_is_told(fresh):
    lengths = {}
    for limit in (0.0, 0.01, 1e6):
        backbone, settings = fresh(), dataclasses.replace(SHORT, clip_gradient=limit)
        backbone.requires_grad_(True)
        record = train_step(backbone, make_optimiser(backbone, settings), PAIRS.pixels[:8], PAIRS.captions[:8], 0, settings)
        after = math.sqrt(sum(weight.grad.square().sum().item() for weight in backbone.model.parameters() if weight.grad is not None))
        lengths[limit] = record["gradient_norm"], after
    assert lengths[0.0][0] == lengths[0.01][0] == lengths[1e6][0] > 0.01
    assert lengths[0.01][1] == pytest.approx(0.01, rel=1e-3) and lengths[0.0][1] == pytest.approx(lengths[0.0][0], rel=1e-3) == lengths[1e6][1]


# ---- losses that explode

def sick_after(good, steps, how):
    count = iter(range(10**6))
    def objective(backbone, pixels, captions, settings, random, progress, same):
        loss = loss_of("masked", backbone, pixels, captions, settings, random, progress, same)
        return loss if next(count) + good < steps else how(loss)
    return objective


@pytest.mark.parametrize("how", [lambda loss: loss * math.nan, lambda loss: loss * math.inf, lambda loss: (loss - loss.detach()).abs().sqrt() + loss.detach()])
def test_a_loss_that_explodes_stops_the_run_at_its_step(fresh, tmp_path, monkeypatch, how):
    "Not a number, endless, and a finite loss whose gradient is not: the last checkpoint stays good, and the run can go on."
    monkeypatch.setitem(METHODS, "sick", FromFunction("sick", sick_after(0, 5, how)))
    backbone = fresh()
    with pytest.raises(PliError, match="step 5: the loss is .* learning rate"): run(backbone, tmp_path / "run", objective="sick", schedule="constant")
    healthy = fresh()
    monkeypatch.setitem(METHODS, "sick", FromFunction("sick", sick_after(0, 10**6, how)))
    run(healthy, objective="sick", schedule="constant", steps=5)
    assert same(backbone, healthy)                                                # step five took nothing with it
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "checkpoint.safetensors").values())
    again, whole = fresh(), fresh()
    assert run(again, tmp_path / "run", objective="sick", schedule="constant").continued_from == 3
    run(whole, objective="sick", schedule="constant")
    assert same(again, whole)


def test_a_broken_weight_is_found_at_step_0(fresh, tmp_path):
    backbone = fresh()
    with torch.no_grad(): backbone.model.visual.proj[0, 0] = math.nan
    with pytest.raises(PliError, match="step 0: the loss is nan"): run(backbone, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "last").exists()


# ---- folders

@pytest.mark.parametrize("changes, words", [({"seed": 1}, "seed was 0, now 1"), ({"hide": "block:0.5"}, "hide was 'random:0.5', now 'block:0.5'"), ({"steps": 9, "warmup": 1}, "steps was 8, now 9; warmup was 2, now 1"),
                                            ({"learning_rate": 2e-3}, "learning_rate was 0.001, now 0.002")])
def test_a_folder_belongs_to_one_run(fresh, tmp_path, changes, words):
    run(fresh(), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.*")}
    with pytest.raises(PliError, match=f"holds another run .{words}") as caught: run(fresh(), tmp_path, **changes)
    assert str(tmp_path) in str(caught.value) and before == {file: file.read_bytes() for file in tmp_path.glob("*.*")}


def test_a_run_goes_on_with_checkpoints_at_other_steps(fresh, tmp_path):
    "How often a run is saved changes no number: the weights are those of a run that was not stopped."
    whole, halves = fresh(), fresh()
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "halves", Fuse(50))
    run(halves, tmp_path / "halves", checkpoint_every=1)
    assert same(whole, halves)


def test_more_steps_of_a_run_that_is_done_are_asked_for_in_another_way(fresh, tmp_path):
    run(fresh(), tmp_path)
    with pytest.raises(PliError, match="steps was 8, now 9.*to go on after its end, --prolong"): run(fresh(), tmp_path, steps=9)
    with pytest.raises(PliError) as caught: run(fresh(), tmp_path, seed=1)
    assert "--prolong" not in str(caught.value)


def test_a_frozen_gallery_is_told_nothing_of_prolonging(fresh, tmp_path, monkeypatch):
    "By its setting, or by the nature of its method: prolonging it would be refused."
    method = METHODS["masked"]
    monkeypatch.setitem(METHODS, "still", type("Still", (type(method),), {"name": "still", "frozen_gallery": True})())
    for name, more in {"setting": {"target": "frozen"}, "method": {"objective": "still"}}.items():
        run(fresh(), tmp_path / name, **more)
        with pytest.raises(PliError, match="steps was 8, now 9") as caught: run(fresh(), tmp_path / name, steps=9, **more)
        assert "--prolong" not in str(caught.value), name


def test_a_run_that_is_done_is_not_warned(fresh, tmp_path):
    said = []
    for _ in range(2): run(fresh(), tmp_path, warmup=20, say=said.append)
    assert sum("warm-up" in line for line in said) == 1 and "continuing at step 8 of 8" in said[-1]


def test_other_weights_or_pairs_are_another_run(fresh, tmp_path):
    run(fresh(), tmp_path)
    with pytest.raises(PliError, match="start was"): run(fresh(seed=1), tmp_path)
    with pytest.raises(PliError, match="pairs was 40, now 30"): run(fresh(), tmp_path, chance_pairs(30))


def test_folders_that_are_none(fresh, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(PliError, match="not empty and holds no run"): run(fresh(), tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(PliError, match="thesis.txt.*not a folder"): run(fresh(), tmp_path / "full" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    run(fresh(), str(tmp_path / "empty"))
    run(fresh(), tmp_path / "new" / "and" / "deep")
    assert (tmp_path / "new" / "and" / "deep" / "last" / "open_clip_model.safetensors").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '"run"', "3", '{"settings": 5}', "{}"])
def test_a_broken_record_of_the_run(fresh, tmp_path, text):
    run(fresh(), tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(PliError) as caught: run(fresh(), tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other model", "no record", "record"])
def test_a_damaged_checkpoint_is_named(fresh, tmp_path, damage):
    run(fresh(), tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    if damage == "truncated": file.write_bytes(whole[: len(whole) // 2])
    if damage == "empty": file.write_bytes(b"")
    if damage == "text": file.write_text("weights" * 100)
    if damage == "other model": save_file({key: value for key, value in tensors.items() if "proj" not in key}, file, {"record": '{"step": 8}'})
    if damage == "no record": save_file(tensors, file)
    if damage == "record": save_file(tensors, file, {"record": "{"})
    with pytest.raises(PliError, match="checkpoint.safetensors: this checkpoint cannot be continued .*remove the folder"): run(fresh(), tmp_path)


@pytest.mark.parametrize("damage", ["gone", "short", "torn"])
def test_a_damaged_log_is_named(fresh, tmp_path, damage):
    run(fresh(), tmp_path)
    file = tmp_path / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.unlink()
    if damage == "short": file.write_text("".join(lines[:5]))
    if damage == "torn": file.write_text("".join(lines[:7]) + '{"step"\n')
    with pytest.raises(PliError, match="log.jsonl"): run(fresh(), tmp_path)


def test_claim_folder_by_hand(tmp_path):
    record = {"settings": {"steps": 3}, "start": "abc", "pairs": 5}
    assert claim_folder(tmp_path / "run", record) is False and claim_folder(tmp_path / "run", record) is False
    (tmp_path / "run" / "checkpoint.safetensors").write_text("")
    assert claim_folder(tmp_path / "run", record) is True
    with pytest.raises(PliError, match="pairs was 5, now None"): claim_folder(tmp_path / "run", {"settings": {"steps": 3}, "start": "abc"})


def test_fingerprints(fresh):
    one, two = fresh(), fresh()
    assert state_digest(one) == state_digest(two) != state_digest(fresh(seed=1))
    with torch.no_grad(): two.model.logit_scale += 1e-6
    assert state_digest(one) != state_digest(two)
    assert state_digest(fresh("resnet")) == state_digest(fresh("resnet"))           # whole-number buffers too


# ---- settings

GOOD = {field.name: field.default for field in dataclasses.fields(TuneSettings)}
BAD = {
    "hide": ["random:2", "", "grey+nothing", None, 0.5], "objective": ["magic", "", None, ["masked"]], "symmetric": ["yes", None, 1], "weight": [-1.0, math.nan, math.inf, "1", None, True],
    "clip_weight": [-0.1, math.nan, "0"], "avoid": ["both", "", None, True], "ignore_same_picture": [1, None, "no"], "tune": ["all", None, True], "steps": [0, -1, 1.5, "10", None, True], "batch_size": [1, 0, 2.5, "8", None], "batches": ["hard", "", "kin", "kin:smell", "near:3", "random:1", None], "learning_rate": [-1e-9, math.nan, math.inf, "1e-4", None],
    "weight_decay": [-0.1, math.nan, math.inf, None], "warmup": [-1, 0.5, None], "schedule": ["linear", None, {}], "clip_gradient": [-1.0, math.nan, math.inf, None],
    "precision": ["fp16", None, 16], "checkpoint_every": [0, -5, 1.5, None], "validate_every": [-1, 0.5, None], "seed": [0.5, None, "0", True],
    "options": [None, 3, "layers=3", "layers"], "target": ["", "other", None, True], "piece": [-1, 0.5, None, True], "gradient_checkpointing": [1, None, "yes"], "compile": [1, None, "yes"],
    "epochs": [-1, 0.5, None, True], "warmup_epochs": [-1, 0.5, None], "decay_epochs": [-2, 1.5, None], "validate_epochs": [-1, 3, None, 0.5], "beta2": [-0.1, 1.0, math.nan, "0.9", None],
    "epsilon": [-1e-9, math.nan, math.inf, None], "ema": [-0.1, 1.0, 2, math.nan, "0.9", None, True], "decay_all": [1, None, "yes"], "preprocess": ["", "square", None, True],
}


def test_every_setting_has_bad_values_below(): assert BAD.keys() == GOOD.keys()


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_settings_that_make_no_sense_are_named(fresh, tmp_path, name, value):
    settings = dataclasses.replace(TuneSettings(), **{name: value})
    with pytest.raises(PliError, match=rf"\b{name}\b|--hide|random: ratio"): check_settings(settings)
    with pytest.raises(PliError): tune(None, PAIRS, settings, tmp_path / "run")   # before anything is touched
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"steps": 1}, {"batch_size": 2}, {"warmup": 0}, {"warmup": 9999}, {"learning_rate": 0}, {"learning_rate": 1}, {"weight": 0}, {"clip_gradient": 0},
                                     {"seed": -3}, {"seed": 2**80}, {"hide": "none"}, {"precision": "bf16"}, {"symmetric": False}])
def test_settings_at_their_ends_are_good(changes): check_settings(dataclasses.replace(TuneSettings(), **changes))


@pytest.mark.parametrize("more", [{"gradient_checkpointing": True}, {"piece": 4, "target": "frozen"}], ids=str)
def test_compiled_blocks_train_the_same_model(tmp_path, monkeypatch, more):
    "With the kernels of torch itself, whose making takes a moment; afterwards the model is as it was, and so are the names of its weights."
    monkeypatch.setattr("pli.backbones.openclip.COMPILER", "aot_eager")
    plain, compiled, data, asked = load_backbone("pli-tiny-48"), load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), []
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: (asked.append(block), compiler(block, **options)))
    wanted, result = run(plain, data=data, **more), run(compiled, tmp_path, data, compile=True, **more)
    assert len(asked) >= 2
    assert [record["loss"] for record in result.history] == pytest.approx([record["loss"] for record in wanted.history], rel=1e-4)
    assert not any(block._compiled_call_impl for block in compiled.modules()) and compiled.state_dict().keys() == plain.state_dict().keys()
    assert load_backbone(tmp_path / "last").fingerprint() == compiled.fingerprint()


def test_a_compiler_that_cannot_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("pli.backbones.openclip.COMPILER", "no such compiler")
    backbone = load_backbone("pli-tiny-48")
    with pytest.raises(PliError, match="compile must be left out: torch.compile ends with InvalidBackend"):
        run(backbone, tmp_path, rank_worker.drawn_pairs(), compile=True)
    assert not any(block._compiled_call_impl for block in backbone.modules())


def test_a_model_without_blocks_of_open_clips_is_not_compiled(fresh):
    with pytest.raises(PliError, match="compile must be left out"): run(fresh("resnet"), compile=True)


def test_settings_at_their_ends_run(fresh, tmp_path):
    result = run(fresh(), tmp_path, steps=1, batch_size=2, warmup=5, checkpoint_every=1, validate_every=1, hide="none", seed=-3, validate=lambda backbone: 1)
    assert len(result.history) == 1 and result.scores == [{"step": 0, "score": 1.0}, {"step": 1, "score": 1.0}]
    still = fresh()
    run(still, learning_rate=0, steps=2, weight_decay=0.5)
    assert same(still, fresh())


def test_too_few_pairs(fresh):
    with pytest.raises(PliError, match="40 pairs do not fill one batch of 41"): run(fresh(), batch_size=41)


# ---- validation

def test_validation_keeps_the_best(fresh, tmp_path):
    scores, seen = iter([0.2, 0.1, 0.4, 0.3, 0.4]), []
    def validate(backbone):
        seen.append((torch.is_grad_enabled(), weights(backbone)))
        return next(scores)
    result = run(fresh(), tmp_path, validate=validate, validate_every=2)
    assert result.start == 0.2 and result.scores == [{"step": 0, "score": 0.2}, {"step": 2, "score": 0.1}, {"step": 4, "score": 0.4}, {"step": 6, "score": 0.3}, {"step": 8, "score": 0.4}] and result.best == 0.4
    assert not any(grad for grad, _ in seen)
    best, last = load_backbone(str(tmp_path / "best")), load_backbone(str(tmp_path / "last"))
    assert all(torch.equal(weight, seen[4][1][name]) for name, weight in best.model.named_parameters())       # of two equals the later
    assert all(torch.equal(weight, seen[4][1][name]) for name, weight in last.model.named_parameters())


@pytest.mark.parametrize("scores, wanted", [([0.5, 0.4, 0.3], "start has 0.5000, the best step after it 0.4000 (step 4); best/ holds the start itself"), ([0.5, 0.4, 0.5], "0.5000 (step 8); best/ holds step 8, which is as good"),
                                            ([0.5, 0.6, 0.5], None), ([math.nan, 0.1, 0.1], None), ([0.5, math.nan, math.nan], None)])
def test_where_nothing_beats_the_start_it_is_said(fresh, tmp_path, scores, wanted):
    lines, numbers = [], iter(scores)
    result = run(fresh(), tmp_path, validate=lambda backbone: next(numbers), validate_every=4, say=lines.append)
    told = [line for line in lines if "did not help" in line]
    assert (len(told) == 1 and wanted in told[0] and "\n" not in told[0]) if wanted else not told
    start = state_digest(fresh())
    assert (state_digest(load_backbone(str(tmp_path / "best"))) == start) == (scores[0] > max(scores[1:], key=lambda score: -1 if math.isnan(score) else score) or math.isnan(scores[1]))
    assert run(fresh(), tmp_path, say=lines.append, validate_every=4).best == result.best      # a finished run says nothing again
    assert [line for line in lines if "did not help" in line] == told


def test_a_run_without_a_score_of_the_start_goes_on(fresh, tmp_path):
    "As older versions left it."
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path, Fuse(40), validate=lambda backbone: 0.5, validate_every=2)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with safe_open(checkpoint, "pt") as file: tensors, record = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["record"])
    record["scores"] = [score for score in record["scores"] if score["step"]]
    del record["sha256"]
    save_file(tensors, checkpoint, {"record": json.dumps(record)})
    result = run(fresh(), tmp_path, validate=lambda backbone: 0.25, validate_every=2)
    assert result.start is None and [score["step"] for score in result.scores] == [2, 4, 6, 8] and result.best == 0.5


def test_a_validation_may_give_no_score_and_leave_the_start_alone(fresh, tmp_path):
    class Watcher:
        at_start, calls = False, 0
        def __call__(self, backbone): self.calls += 1
    watcher = Watcher()
    result = run(fresh(), tmp_path, validate=watcher, validate_every=2)
    assert watcher.calls == 4 and result.scores == [] and result.best is None and not (tmp_path / "best").exists()


@pytest.mark.parametrize("every, steps", [(0, [0, 8]), (3, [0, 3, 6, 8]), (4, [0, 4, 8]), (100, [0, 8])])
def test_when_it_validates(fresh, every, steps):
    assert [record["step"] for record in run(fresh(), validate_every=every, validate=lambda backbone: 0).scores] == steps
    assert run(fresh(), validate_every=every).scores == []


def test_validation_changes_nothing(fresh):
    one, two = fresh(), fresh()
    def noisy(backbone):
        torch.rand(5)
        return backbone.encode_image(PAIRS.pixels[:4]).sum()
    assert run(one).history == run(two, validate=noisy, validate_every=1).history and same(one, two)


def test_a_score_that_is_no_number_is_never_the_best(fresh, tmp_path):
    scores = iter([math.nan, 0.2, math.nan, 0.1, math.nan])
    result = run(fresh(), tmp_path, validate=lambda backbone: next(scores), validate_every=2)
    assert result.best == 0.2 and (tmp_path / "best").exists()
    assert run(fresh(), tmp_path, validate=None, validate_every=2).best == 0.2


# ---- pictures that break in the middle

def picture_pairs(folder, broken, count=16):
    folder.mkdir()
    for i in range(count):
        if i in broken: (folder / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
        else: Image.new("RGB", (40, 40), (i * 15, 100, 255 - i * 15)).save(folder / f"{i}.png")
    return Pairs(tuple(str(folder / f"{i}.png") for i in range(count)), tuple(f"colour {i}" for i in range(count)), folder)


def test_broken_pictures_are_counted_and_left_out(fresh, tmp_path):
    backbone = fresh()
    data = PairSet(picture_pairs(tmp_path / "pictures", {3, 7}), backbone.pixels)
    result = run(backbone, tmp_path / "run", data, steps=4, batch_size=8)          # two epochs
    assert sorted(path for path, _ in result.problems) == sorted(2 * [str(tmp_path / "pictures" / f"{i}.png") for i in (3, 7)])
    assert all(isinstance(reason, str) and reason for _, reason in result.problems) and len(result.history) == 4
    again = run(fresh(), tmp_path / "run", data, steps=4, batch_size=8)
    assert again.problems == result.problems


def test_problems_survive_a_stop(fresh, tmp_path):
    backbone, wanted = fresh(), None
    pairs = picture_pairs(tmp_path / "pictures", {3, 7})
    wanted = run(fresh(), None, PairSet(pairs, backbone.pixels)).problems
    class Stop(PairSet):
        def __getitem__(self, index):
            if getattr(self, "left", 40) < 1: raise KeyboardInterrupt
            self.left = getattr(self, "left", 40) - 1
            return super().__getitem__(index)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Stop(pairs, backbone.pixels))
    result = run(fresh(), tmp_path / "run", PairSet(pairs, backbone.pixels))
    assert result.continued_from == 3 and result.problems == wanted and len(wanted) == 8


def test_a_batch_with_too_few_pictures_stops_with_a_reason(fresh, tmp_path):
    backbone = fresh()
    data = PairSet(picture_pairs(tmp_path / "pictures", set(range(15))), backbone.pixels)
    with pytest.raises(PliError, match=r"step 0: fewer than two pictures.*pictures.*\.png"): run(backbone, None, data, batch_size=8)


def test_pairs_of_another_size_are_named(fresh):
    data = TensorPairs(torch.zeros(16, 3, 48, 48, dtype=torch.uint8), ["a"] * 16)
    with pytest.raises(PliError, match="32, 32.*48, 48"): run(fresh(), data=data)


# ---- precision, other models, what is said

@pytest.mark.parametrize("objective, hide", [("clip", "none"), *((name, hide) for name in METHODS if name != "clip" for hide in ("random:0.5", "crop+blur", "mix:0.5+recolour"))])
def test_bf16_runs_on_the_processor(fresh, objective, hide):
    single, half = fresh(), fresh()
    one, two = (run(backbone, objective=objective, precision=precision, hide=hide, steps=3) for backbone, precision in ((single, "fp32"), (half, "bf16")))
    for a, b in zip(one.history, two.history): assert math.isfinite(b["loss"]) and b["loss"] == pytest.approx(a["loss"], rel=0.1)
    assert all(weight.dtype == torch.float32 for weight in half.model.parameters()) and not same(single, half)


def test_the_clip_loss_refuses_to_hide(fresh):
    "It would hide nothing, and a control would not be what its name says."
    with pytest.raises(PliError, match="hide must be none, got 'none.drop:0.5': the objective clip hides nothing, flip is"): run(fresh(), objective="clip", hide="none+drop:0.5")
    assert check_settings(TuneSettings(objective="clip")).name == "clip" and check_settings(TuneSettings(objective="flip", hide="drop:0.5")).name == "flip"


class Asking(TensorPairs):
    "Pairs with which comes the wish to end."
    def __init__(self): super().__init__(PAIRS.pixels, PAIRS.captions)
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_the_start_is_measured_once_however_often_a_run_is_stopped_before_its_first_step(fresh, tmp_path):
    asked = []
    def ask(backbone): asked.append(os.kill(os.getpid(), signal.SIGTERM)); return 0.5
    with pytest.raises(RunStopped, match="step 0 of 8 is saved"): run(fresh(), tmp_path / "run", validate=ask, validate_every=2)
    with pytest.raises(RunStopped, match="step 0 of 8 is saved"): run(fresh(), tmp_path / "run", Asking(), validate=ask, validate_every=2)
    result = run(fresh(), tmp_path / "run", validate=lambda backbone: 0.5, validate_every=2)
    assert len(asked) == 1 and [record["step"] for record in result.scores] == [0, 2, 4, 6, 8]


def test_a_checkpoint_that_cannot_be_read_is_not_called_broken(fresh, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(50))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PliError, match="cannot be read; make it readable, and the same command goes on"): load_checkpoint(tmp_path / "run" / "checkpoint.safetensors", fresh(), None)


def test_auto_is_fp32_on_the_processor(fresh):
    one, two = fresh(), fresh()
    assert run(one, precision="auto").history == run(two, precision="fp32").history and same(one, two)


@pytest.mark.parametrize("name", ["siglike", "resnet", "sincos"])
def test_other_models_continue_to_the_bit(fresh, tmp_path, name):
    whole, halves = fresh(name), fresh(name)
    run(whole, batch_size=16)
    with pytest.raises(KeyboardInterrupt): run(fresh(name), tmp_path / "run", Fuse(80), batch_size=16)
    assert run(halves, tmp_path / "run", batch_size=16).continued_from == 3 and same(whole, halves)


@pytest.mark.parametrize("which", ["image", "text"])
def test_a_frozen_tower_continues_too(fresh, tmp_path, which):
    whole, halves = fresh(), fresh()
    run(whole, tune=which)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40), tune=which)
    assert run(halves, tmp_path / "run", tune=which).continued_from == 3 and same(whole, halves)


def test_what_is_said(fresh, tmp_path):
    lines = []
    run(fresh(), tmp_path, say=lines.append, validate=lambda backbone: 0.5)
    assert len(lines) == 10 and lines[0] == "step 0: validation 0.5000" and lines[8].startswith("step 8/8: loss ") and lines[8].endswith("validation 0.5000") and "did not help" in lines[9]
    assert not any("validation" in line for line in lines[1:8])                    # none was made there
    run(fresh(), tmp_path, say=lines.append)
    assert lines[10:] == ["continuing at step 8 of 8"]


def test_a_warm_up_that_outlasts_the_run_is_told(fresh):
    lines = []
    run(fresh(), steps=4, warmup=9, learning_rate=1e-3, say=lines.append)
    assert lines[0] == "the warm-up of 9 steps is as long as the run or longer: of the learning rate 0.001 it reaches 0.0004; choose a shorter warm-up"
    run(fresh(), steps=4, warmup=3, say=lines.append)
    assert sum("warm-up" in line for line in lines) == 1


def test_the_record_beside_the_weights_is_complete(fresh, tmp_path):
    run(fresh(), tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert TuneSettings(**record["settings"]) == SHORT and record["pairs"] == 40 and record["start"] == state_digest(fresh())
    assert same(load_backbone(str(tmp_path / "last")), load_backbone(str(tmp_path / "last"), seed=5))


def test_a_changed_caption_is_another_run(fresh, tmp_path):
    run(fresh(), tmp_path)
    captions = [*PAIRS.captions[:-1], PAIRS.captions[-1] + "!"]
    with pytest.raises(PliError, match="pairs digest was"): run(fresh(), tmp_path, TensorPairs(PAIRS.pixels, captions))
    darker = TensorPairs(PAIRS.pixels // 2, PAIRS.captions)
    with pytest.raises(PliError, match="pairs digest was"): run(fresh(), tmp_path, darker)


def test_pixels_travel_to_worker_processes_without_the_model(fresh):
    import pickle
    assert len(pickle.dumps(fresh().pixels)) < 10_000


# ---- what the user has already, and the controls

def features_of(backbone, view): return backbone.encode_image(view.pixels, view.hidden), backbone.encode_text(view.captions)


def seen(backbone, hide, rows=8, seed=5):
    "Pixels, words and view of a batch, as an objective sees them."
    pixels, captions = PAIRS.pixels[:rows].float() / 255, PAIRS.captions[:rows]
    return pixels, captions, parse_hide(hide)(View(pixels, backbone.grid, captions=tuple(captions)), rng_for(seed))


@pytest.mark.parametrize("which", ["own", "all"])
@pytest.mark.parametrize("hide", ["recolour:0.5+random:0.5", "mix:0.5", "random:0.5", "recolour:1"])
def test_the_corrupted_picture_is_a_wrong_answer(fresh, which, hide):
    backbone = fresh()
    pixels, captions, view = seen(backbone, hide)
    settings = dataclasses.replace(SHORT, hide=hide, avoid=which)
    got = loss_of("masked", backbone, pixels, captions, settings, rng_for(5))
    query = unit(unit(backbone.encode_text(captions)) + unit(backbone.encode_image(view.pixels, view.hidden)))
    whole, bare = unit(backbone.encode_image(pixels)), unit(backbone.encode_image(view.pixels))
    rows, changed = backbone.scale * query @ whole.T, [not torch.equal(one, other) for one, other in zip(view.pixels, pixels)]
    further = backbone.scale * query @ bare.T
    wrong = torch.tensor([[changed[j] and (which == "all" or i == j) for j in range(8)] for i in range(8)])
    forward = torch.cat([rows, further.masked_fill(~wrong, -math.inf)], 1).logsumexp(1) - rows.diag()
    back = rows.T.logsumexp(1) - rows.diag()
    assert got.item() == pytest.approx(((forward + back) / 2).mean().item(), rel=1e-4)
    plain = loss_of("masked", backbone, pixels, captions, dataclasses.replace(settings, avoid="none"), rng_for(5))
    assert (got > plain) if any(changed) else torch.equal(got, plain)
    if hide.startswith("recolour:0.5"): assert 0 < sum(changed) < 8


@pytest.mark.parametrize("hide", ["recolour+random:0.5", "drop:0.5", "random:0.5"])
def test_the_controls_are_their_formulas(fresh, hide):
    backbone = fresh()
    pixels, captions, view = seen(backbone, hide)
    masked, words = (unit(x) for x in features_of(backbone, view))
    for name, target in (("flip", words), ("picture", unit(backbone.encode_image(pixels)))):
        logits = backbone.scale * masked @ target.T
        wanted = (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diag()).mean() / 2
        got = loss_of(name, backbone, pixels, captions, dataclasses.replace(SHORT, hide=hide, objective=name), rng_for(5))
        assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("objective", ["masked", "paper", "flip"])
def test_words_that_are_hidden_are_not_heard(fresh, objective):
    backbone = fresh()
    pixels, captions = PAIRS.pixels[:6].float() / 255, [f"a red thing number {i}" for i in range(6)]
    ask = lambda hide, captions: loss_of(objective, backbone, pixels, captions, dataclasses.replace(SHORT, hide=hide, objective=objective), rng_for(0))
    thin = ask("without:colour", captions)
    assert torch.equal(thin, ask("none", [caption.replace("red ", "") for caption in captions])) and not torch.equal(thin, ask("none", captions))


def test_the_added_clip_loss_hears_the_words_of_the_query(fresh):
    backbone = fresh()
    pixels, captions = PAIRS.pixels[:6].float() / 255, [f"a red thing number {i}" for i in range(6)]
    ask = lambda weight: loss_of("masked", backbone, pixels, captions, dataclasses.replace(SHORT, hide="without:colour", clip_weight=weight), rng_for(0))
    clip = loss_of("clip", backbone, pixels, [caption.replace("red ", "") for caption in captions], SHORT, rng_for(0))
    assert (ask(0.5) - ask(0.0)).item() == pytest.approx(clip.item() / 2, rel=1e-3)


@pytest.mark.parametrize("objective", ["paper", "clip", "flip", "picture"])
def test_only_masked_has_its_settings(objective):
    for changes in ({"weight": 0.5}, {"clip_weight": 0.5}, {"avoid": "own"}):
        with pytest.raises(PliError, match=f"belong to the objective masked, not to {objective}"): check_settings(dataclasses.replace(SHORT, objective=objective, **changes))


def test_pictures_alone_cannot_teach_the_words():
    with pytest.raises(PliError, match="picture uses no words"): check_settings(dataclasses.replace(SHORT, objective="picture", tune="text"))


def test_without_words_the_words_stay(fresh):
    backbone = fresh()
    before = weights(backbone)
    run(backbone, objective="picture", weight_decay=0.0)
    assert moved(before, backbone) and not {name for name in moved(before, backbone) if not name.startswith("visual.") and name != "logit_scale"}


def test_objectives_know_how_far_the_run_is(fresh, monkeypatch):
    far = []
    def objective(backbone, pixels, captions, settings, random, progress, same):
        far.append(progress)
        return loss_of("masked", backbone, pixels, captions, settings, random, progress, same)
    monkeypatch.setitem(METHODS, "watched", FromFunction("watched", objective))
    run(fresh(), objective="watched")
    assert far == [step / 7 for step in range(8)]   # the last step is the end


def test_a_schedule_of_hiding_begins_with_its_first_way_and_ends_with_its_last(fresh):
    backbone = fresh()
    pixels, captions = PAIRS.pixels[:8].float() / 255, PAIRS.captions[:8]
    ask = lambda hide, progress: loss_of("picture", backbone, pixels, captions, dataclasses.replace(SHORT, hide=hide), rng_for(0), progress).item()
    assert ask("none>grey", 0.0) == pytest.approx(ask("none", 0.0), rel=1e-5) and ask("none>grey", 1.0) == pytest.approx(ask("grey", 0.0), rel=1e-5)
    assert ask("none", 0.0) != pytest.approx(ask("grey", 0.0), rel=1e-4)


@pytest.mark.parametrize("changes", [{"avoid": "own"}, {"avoid": "all", "objective": "masked"}, {"objective": "flip"}, {"objective": "picture"}, {"hide": "drop:0.5>recolour|mix:0.5"},
                                     {"batches": "near"}, {"batches": "kin:colour"}], ids=str)
def test_every_new_setting_continues_to_the_bit(fresh, tmp_path, changes):
    pairs = TensorPairs(PAIRS.pixels, [f"a {('red', 'blue', 'green')[i % 3]} thing {i // 6}" for i in range(40)])
    whole, again = fresh(), fresh()
    settings = {"hide": "recolour+random:0.5", **changes}
    wanted = run(whole, data=pairs, **settings)
    reads = 40 if changes.get("batches") == "near" else 0                        # the table of neighbours reads everything once
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(reads + 40, pairs), **settings)
    result = run(again, tmp_path / "run", pairs, **settings)
    assert result.continued_from == 3 and result.history == wanted.history and same(whole, again)


def test_a_run_from_before_a_setting_existed_goes_on(fresh, tmp_path):
    whole, again = fresh(), fresh()
    wanted = run(whole)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path, Fuse(40))
    record = json.loads((tmp_path / "run.json").read_text())
    for name in ("avoid", "batches", "ignore_same_picture"): record["settings"].pop(name)
    del record["sha256"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(PliError, match="avoid was 'none', now 'own'"): run(fresh(), tmp_path, avoid="own")
    assert run(again, tmp_path).history == wanted.history and same(whole, again)


# ---- attention on the processor

@pytest.mark.parametrize("precision, wanted", [("bf16", True), ("fp32", False), ("auto", False)])
def test_fused_attention_is_left_out_only_in_bf16(fresh, monkeypatch, precision, wanted):
    fused = []
    def objective(*arguments, **more):
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        return loss_of("masked", *arguments, **more)
    monkeypatch.setitem(METHODS, "watched", FromFunction("watched", objective))
    before = torch.backends.cuda.flash_sdp_enabled()
    run(fresh(), objective="watched", precision=precision, steps=2)
    assert fused == [before and not wanted] * 2 and torch.backends.cuda.flash_sdp_enabled() == before


# ---- who stands in a batch

def test_near_is_what_looks_alike(fresh):
    backbone, pixels = fresh(), PAIRS.pixels.clone()
    pixels[7] = pixels[3]                                                          # one picture, two captions
    company = partners_for("near", backbone, TensorPairs(pixels, PAIRS.captions), say=quiet)
    assert company.pictures[7] == company.pictures[3] and len(set(company.pictures)) == 39
    with torch.no_grad(): features = unit(backbone.encode_image(pixels))
    alike = features @ features.T
    for pair in (0, 3, 20):
        others = [other for other in range(40) if company.pictures[other] != company.pictures[pair]]
        pictures = {company.pictures[other] for other in company.partners[pair]}
        assert len(pictures) == 16
        worst = min(alike[pair, other].item() for other in company.partners[pair])
        assert all(alike[pair, other] <= worst + 1e-5 for other in others if company.pictures[other] not in pictures)
    assert company.partners[7] == company.partners[3] and {3, 7} <= set(company.partners[0]) or not {3, 7} & set(company.partners[0])


def test_near_with_pictures_that_cannot_be_read(fresh, tmp_path):
    backbone = fresh()
    data = PairSet(picture_pairs(tmp_path / "pictures", {3, 7}), backbone.pixels)
    company = partners_for("near", backbone, data, say=quiet)
    assert company.partners[3] == company.partners[7] == () and not any({3, 7} & set(others) for others in company.partners)
    assert len(run(backbone, None, data, steps=2, batch_size=6, batches="near").history) == 2
    same_company = partners_for("near", fresh(), data, workers=2, say=quiet)
    assert same_company == company


def test_kin_say_the_same_but_for_the_colour():
    captions = ["a red Shirt", "a blue shirt.", "A RED shirt", "a shirt", "a red, blue shirt", "a shirt in red", "no colour at all", "green", "red"]
    company = partners_for("kin:colour", None, TensorPairs(PAIRS.pixels[:9], captions), say=quiet)
    assert [set(others) for others in company.partners] == [{1, 4}, {0, 2, 4}, {1, 4}, set(), {0, 1, 2}, set(), set(), {8}, {7}]


def test_batches_without_a_single_partner(fresh):
    with pytest.raises(PliError, match="'kin:colour': no pair has a partner"): partners_for("kin:colour", None, PAIRS, say=quiet)
    with pytest.raises(PliError, match="'near': no pair has a partner"): partners_for("near", fresh(), TensorPairs(PAIRS.pixels[:1].expand(5, -1, -1, -1), list("abcde")), say=quiet)
    with pytest.raises(PliError, match="know their captions and pictures"): partners_for("near", fresh(), torch.utils.data.Subset(PAIRS, [0, 1]), say=quiet)
    assert partners_for("random", None, None) is None


def test_a_finished_run_looks_for_no_company(fresh, tmp_path):
    run(fresh(), tmp_path, batches="near")
    assert run(fresh(), tmp_path, Fuse(0), batches="near").continued_from == 8


def test_company_leaves_the_callers_random_numbers_alone(fresh):
    before = torch.get_rng_state()
    run(fresh(), batches="near", steps=2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- averages

def test_average_is_the_weighted_mean_and_new(fresh):
    one, two, three = fresh(), fresh(seed=1), fresh(seed=2)
    before = [state_digest(backbone) for backbone in (one, two, three)]
    mean = average([one, two, three], [0.5, 0.25, 0.25])
    for a, b, c, got in zip(*(backbone.parameters() for backbone in (one, two, three, mean))): assert torch.allclose(0.5 * a + 0.25 * b + 0.25 * c, got, atol=1e-6)
    assert [state_digest(backbone) for backbone in (one, two, three)] == before and not any(weight.requires_grad for weight in mean.parameters())
    with torch.no_grad(): mean.model.visual.proj.zero_()
    assert state_digest(one) == before[0]
    assert same(average([one, two], [1, 0]), one) and same(average([one, two], [0, 1]), two) and same(average([one, one, one]), one)
    assert same(average([one, two]), average([two, one]))


def test_average_after_a_run_and_from_a_folder(fresh, tmp_path):
    start, tuned = fresh(), fresh()
    run(tuned, tmp_path)
    half = average([start, load_backbone(str(tmp_path / "last"))], [0.5, 0.5])
    assert same(half, average([start, tuned])) and not same(half, start) and not same(half, tuned)
    half.save(tmp_path / "half")
    assert same(load_backbone(str(tmp_path / "half")), half)


def test_average_of_a_network_with_counters(fresh):
    one, two = fresh("resnet"), fresh("resnet", seed=1)
    mean = average([one, two])
    assert mean.model.visual.bn1.num_batches_tracked.dtype == torch.int64 and mean.encode_image(PAIRS.pixels[:2]).isfinite().all()


@pytest.mark.parametrize("shares, says", [([0.5], "one share a model: got 2 models and 1 shares"), ([0.5, 0.6], "sum to 1, got 0.5, 0.6"), ([math.nan, 1.0], "sum to 1, got nan"), ([math.inf, -math.inf], "sum to 1"), ([], "got 2 models and 0")])
def test_shares_that_are_none(fresh, shares, says):
    with pytest.raises(PliError, match=says): average([fresh(), fresh()], shares)


def test_models_that_have_no_average(fresh):
    with pytest.raises(PliError, match="at least one"): average([])
    with pytest.raises(PliError, match="one shape"): average([fresh(), fresh("resnet")])
    with pytest.raises(PliError, match="configurations .* differ"): average([fresh(), fresh("dropout")])


# ---- the same picture twice

TWICE = TensorPairs(PAIRS.pixels[[0, 1, 2, 3, 0, 1, 4, 5]], PAIRS.captions[:8])   # two pictures with two captions


def test_a_batch_says_which_pictures_are_the_same(tmp_path):
    "By the pixels that the model sees: another name, a link, another caption and another file format change nothing."
    picture = Image.fromarray(PAIRS.pixels[0].permute(1, 2, 0).numpy())
    for name in ("a.png", "b.bmp"): picture.save(tmp_path / name)
    Image.fromarray(PAIRS.pixels[1].permute(1, 2, 0).numpy()).save(tmp_path / "c.png")
    (tmp_path / "d.png").symlink_to(tmp_path / "a.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.bmp", "c.png", "d.png", "a.png")]
    pairs = PairSet(Pairs(tuple(paths), tuple("abcde"), tmp_path), lambda picture: torch.from_numpy(numpy.array(picture)).permute(2, 0, 1))
    batch = collate([pairs[i] for i in range(5)])
    assert same_picture(batch.pictures).tolist() == [[i == j or 2 not in (i, j) for j in range(5)] for i in range(5)] and batch.pictures.dtype == torch.int64
    assert torch.equal(batch.pictures[:3:2], collate([PAIRS[0], PAIRS[1]]).pictures)                 # pixels in memory have the same numbers
    assert same_picture(collate([PAIRS[i] for i in range(40)]).pictures) is None
    assert holds_pictures_twice(pairs) and holds_pictures_twice(TWICE) and not holds_pictures_twice(PAIRS)


def loss_of_twice(backbone, **changes):
    settings = dataclasses.replace(SHORT, **changes)
    return train_step(backbone, make_optimiser(backbone, settings), TWICE.pixels, TWICE.captions, 0, settings, collate([TWICE[i] for i in range(8)]).pictures)["loss"]


@pytest.mark.parametrize("objective, hide, clip_weight", [("masked", "random:0.5", 0.0), ("masked", "random:0.5", 0.5), ("clip", "none", 0.0), ("flip", "random:0.5", 0.0), ("picture", "random:0.5", 0.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_picture_is_no_wrong_answer_in_any_objective(fresh, objective, hide, clip_weight, symmetric):
    backbone, settings = fresh(), dataclasses.replace(SHORT, objective=objective, hide=hide)
    with torch.no_grad():
        view = TrainingBatch(TWICE.pixels.float() / 255, TWICE.captions, rng_for(0, "hide", 0), 0.0).hidden(backbone, settings.hide)
        masked, text, whole = backbone.encode_image(view.pixels, view.hidden).double(), backbone.encode_text(TWICE.captions).double(), backbone.encode_image(TWICE.pixels).double()
    query, target = {"masked": (unit(text) + unit(masked), whole), "clip": (whole, text), "flip": (masked, text), "picture": (masked, whole)}[objective]
    def loss(query, target, symmetric):
        dots = (backbone.scale.item() * unit(query) @ unit(target).T)
        for i, j in ((0, 4), (1, 5)): dots[i, j] = dots[j, i] = -1e9
        return (choose(dots.tolist()) + choose(dots.T.tolist())) / 2 if symmetric else choose(dots.tolist())
    wanted = loss(query, target, symmetric) + clip_weight * loss(whole, text, True)
    ask = lambda **more: loss_of_twice(fresh(), objective=objective, hide=hide, clip_weight=clip_weight, symmetric=symmetric, **more)
    assert ask() == pytest.approx(wanted, rel=1e-4)
    assert ask(ignore_same_picture=False) > ask() + 1e-3


@pytest.mark.parametrize("avoid", ["own", "all"])
def test_avoided_pictures_stay_wrong_beside_the_same_picture(fresh, avoid):
    plain, further = (loss_of_twice(fresh(), hide="recolour", avoid=name) for name in ("none", avoid))
    assert further > plain and loss_of_twice(fresh(), hide="recolour", avoid=avoid, ignore_same_picture=False) > further


def test_the_papers_loss_counts_the_same_picture_as_released(fresh):
    assert loss_of_twice(fresh(), objective="paper") == loss_of_twice(fresh(), objective="paper", ignore_same_picture=False)


def test_without_a_picture_twice_it_changes_nothing(fresh):
    one, other = fresh(), fresh()
    assert run(one).history == run(other, ignore_same_picture=False).history and same(one, other)


def run_of_old(fresh, folder, pairs):
    "A run that was stopped before the setting existed."
    with pytest.raises(KeyboardInterrupt): run(fresh(), folder, Fuse(40, pairs), ignore_same_picture=False)
    record = json.loads((folder / "run.json").read_text())
    del record["settings"]["ignore_same_picture"], record["sha256"]
    (folder / "run.json").write_text(json.dumps(record))


def test_an_older_run_goes_on_where_no_picture_is_there_twice(fresh, tmp_path):
    pairs = TensorPairs(PAIRS.pixels[[*range(39), 0]], PAIRS.captions)
    run_of_old(fresh, tmp_path / "no", PAIRS)
    run_of_old(fresh, tmp_path / "yes", pairs)
    assert run(fresh(), tmp_path / "no").continued_from == 3
    with pytest.raises(PliError, match="ignore_same_picture was False, now True"): run(fresh(), tmp_path / "yes", pairs)
    assert run(fresh(), tmp_path / "yes", pairs, ignore_same_picture=False).continued_from == 3
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "paper", Fuse(40, pairs), objective="paper", ignore_same_picture=False)
    assert run(fresh(), tmp_path / "paper", pairs, objective="paper").continued_from == 3      # it counts them either way


# ---- bf16 on a processor

@pytest.mark.parametrize("text, wanted", [("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True), ("flags : fpu avx512f amx_bf16 amx_tile\n", True), ("Features\t: fp asimd bf16 sve\n", True),
                                          ("flags : fpu avx2 avx512f avx512bw\n", False), ("Features : fp asimd\n", False), ("processor : 0\n", None), (None, None)])
def test_bf16_in_hardware_is_read_from_the_processors_flags(tmp_path, text, wanted):
    if text is not None: (tmp_path / "cpuinfo").write_text(text)
    assert step.bf16_in_hardware(tmp_path / "cpuinfo") is wanted


def test_bf16_without_hardware_says_what_it_costs(fresh, monkeypatch):
    for known, precision, count in ((False, "bf16", 1), (True, "bf16", 0), (None, "bf16", 0), (False, "auto", 0), (False, "fp32", 0)):
        lines = []
        monkeypatch.setattr(step, "bf16_in_hardware", lambda: known)
        run(fresh(), steps=1, precision=precision, say=lines.append)
        assert len([line for line in lines if "computed in software" in line and "leave precision out" in line and "\n" not in line]) == count


# ---- disks that are full, bits that flip

FULL_SCRIPT = '''
import resource, signal, sys
import open_clip, torch
from pathlib import Path
from pli import core
from pli.training import loop as tuning
from pli.settings import TuneSettings
from pli.training.average import average
from pli.backbones.loading import load_backbone
from pli.core import PliError
from pli.data.batches import TensorPairs

configs, folder, fill, what = sys.argv[1:]
open_clip.add_model_config(configs)
chance = torch.Generator().manual_seed(0)
pairs = TensorPairs(torch.randint(0, 256, (40, 3, 32, 32), generator=chance, dtype=torch.uint8), [f"thing number {i}" for i in range(40)])
settings = TuneSettings(steps=8, batch_size=8, learning_rate=1e-3, warmup=2, checkpoint_every=3, hide="random:0.5")

class Fills(TensorPairs):
    "After the first checkpoint nothing more fits."
    reads = 0
    def __getitem__(self, index):
        Fills.reads += 1
        if Fills.reads == 33:
            if fill == "limit":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            else:
                with open(fill, "wb", buffering=0) as file:
                    try:
                        while True: file.write(bytes(4096))
                    except OSError: pass
        return super().__getitem__(index)

try:
    if what == "tune": tuning.tune(load_backbone("tunetest-plain"), Fills(pairs.pixels, pairs.captions), settings, folder)
    else:
        models = [load_backbone("tunetest-plain"), load_backbone("tunetest-plain", seed=1)]
        for i in range(33): Fills(pairs.pixels, pairs.captions)[0]
        average(models).save(folder)
except PliError as error: print("PliError:", error)
'''


@pytest.mark.parametrize("how", ["mount", "limit"])
@pytest.mark.parametrize("what", ["tune", "average"])
def test_a_full_disk_is_one_line_and_loses_nothing(fresh, configs, tmp_path, how, what):
    "A real small file system where one can be mounted; else, and besides, the system's limit on the size of a file."
    if how == "limit" and not hasattr(signal, "SIGXFSZ"): pytest.skip("this system has no limit on the size of a file")
    (tmp_path / "full.py").write_text(FULL_SCRIPT)
    (tmp_path / "small").mkdir()
    folder, room = (tmp_path / "small" / "run", tmp_path / "kept") if how == "mount" else (tmp_path / "run", tmp_path / "run")
    words = [sys.executable, "-m", "full", str(configs), str(folder), str(tmp_path / "small" / "filler") if how == "mount" else "limit", what]
    if how == "mount":
        size = "32m"
        mount = f"mount -t tmpfs -o size={size} tmpfs '{tmp_path}/small'"
        if not hasattr(os, "geteuid") or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode: pytest.skip("no file system can be mounted here")
        words = ["unshare", "-rm", "sh", "-c", mount + ' && "$@"; status=$?; ' + f"cp -r '{folder}' '{room}'; exit $status", "sh", *words]
    path = os.pathsep.join([str(Path(pli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("PliError")]
    name = "log.jsonl|checkpoint.safetensors" if what == "tune" else "open_clip_model.safetensors"
    assert len(told) == 1 and numpy.all([word in told[0] for word in ("cannot be written", "the disk is full" if how == "mount" else "files may not be so large", "are free there", "make room")]), done.stdout
    assert any(part in told[0] for part in name.split("|"))
    if what == "average":
        assert not room.exists() or not list(room.iterdir())
        return
    assert "it needs" in told[0] and not list(room.glob(".*.part"))
    again, whole = fresh(), fresh()
    assert run(again, room).continued_from == 3                                        # the checkpoint before it is whole
    run(whole)
    assert same(again, whole)


def test_one_bit_in_a_checkpoint_is_noticed(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40))
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    good = checkpoint.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for place in (start, start + 7, (start + len(good)) // 2, len(good) - 1):
        for bit in (0, 6):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            checkpoint.write_bytes(bad)
            backbone = fresh()
            with pytest.raises(PliError, match="checkpoint.safetensors: this checkpoint cannot be continued .its contents are not what was written") as caught: run(backbone, tmp_path / "run")
            assert "\n" not in str(caught.value) and same(backbone, fresh())               # nothing of it was put in place
    checkpoint.write_bytes(good.replace(b'\\"step\\": 3', b'\\"step\\": 2'))             # the record is covered too
    with pytest.raises(PliError, match="not what was written"): run(fresh(), tmp_path / "run")
    checkpoint.write_bytes(good)
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_text()
    log.write_text(lines.replace('"loss": 2', '"loss": 3', 1))
    assert log.read_text() != lines
    with pytest.raises(PliError, match="log.jsonl: is not what was written"): run(fresh(), tmp_path / "run")
    log.write_text(lines)
    assert run(fresh(), tmp_path / "run").continued_from == 3


def test_an_older_checkpoint_without_a_digest_goes_on_and_says_so(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path, Fuse(40))
    checkpoint, lines = tmp_path / "checkpoint.safetensors", []
    with safe_open(checkpoint, "pt") as file: tensors, record = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["record"])
    del record["log"], record["sha256"]
    save_file(tensors, checkpoint, {"record": json.dumps(record)})
    again, whole = fresh(), fresh()
    assert run(again, tmp_path, say=lines.append).continued_from == 3 and run(whole) and same(again, whole)
    assert len([line for line in lines if "without a digest" in line]) == 1


# ---- two at once, and a folder that goes away

def test_two_runs_in_one_folder(fresh, tmp_path):
    "The second is refused while the first is at work, leaves its files alone, and says which process that is."
    refused = []
    class Busy(TensorPairs):
        def __getitem__(self, index):
            if not refused:
                (tmp_path / ".checkpoint.safetensors.1.part").write_text("half of the first one's checkpoint")
                with pytest.raises(PliError, match=rf"process {os.getpid()} is at work there") as caught: run(fresh(), tmp_path)
                refused.append((tmp_path / ".checkpoint.safetensors.1.part").exists())
            return super().__getitem__(index)
    one, whole = fresh(), fresh()
    run(one, tmp_path, Busy(PAIRS.pixels, PAIRS.captions))
    run(whole)
    assert refused == [True] and same(one, whole) and not (tmp_path / ".lock").exists()


def test_killed_while_the_first_record_was_written(fresh, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.4711.part").write_text('{"settings": {"hi')
    (tmp_path / "run" / ".lock").write_text("4711")
    assert run(fresh(), tmp_path / "run").continued_from is None
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["checkpoint.safetensors", "last", "log.jsonl", "run.json"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_ends_the_run(fresh, tmp_path, replaced):
    import shutil
    class Sweeper(Fuse):
        def __getitem__(self, index):
            self.left -= 1
            if self.left == 0:
                shutil.rmtree(tmp_path / "run")
                if replaced:                                                             # by another process, with the same command
                    (tmp_path / "run").mkdir()
                    (tmp_path / "run" / "run.json").write_text("{}")
                    (tmp_path / "run" / ".lock").write_text("1")
            return TensorPairs.__getitem__(self, index)
    with pytest.raises(PliError, match="run: the folder of this run was removed or replaced while it ran"): run(fresh(), tmp_path / "run", Sweeper(30))
    assert (sorted(file.name for file in (tmp_path / "run").iterdir()) == [".lock", "run.json"]) if replaced else not (tmp_path / "run" / "log.jsonl").exists()


# ---- what may not change between two parts of a run

def test_other_pictures_under_the_same_names_are_another_run(fresh, tmp_path):
    pairs = picture_pairs(tmp_path / "pictures", broken=())
    data = PairSet(pairs, fresh().pixels)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", FuseFiles(pairs, fresh().pixels, 40))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["picture files"]) == 16
    good = {path: Path(path).read_bytes() for path in pairs.paths}
    for path in pairs.paths[:3]: Path(path).write_bytes(good[path] + b"\0")               # other sizes
    with pytest.raises(PliError, match="run: the picture files are not those that the run began with"): run(fresh(), tmp_path / "run", data)
    for path in pairs.paths: Path(path).write_bytes(good[path][:-1] + bytes([good[path][-1] ^ 1]))   # the same sizes, other contents
    with pytest.raises(PliError, match="the picture files are not those"): run(fresh(), tmp_path / "run", data)
    for path in pairs.paths: Path(path).write_bytes(good[path])
    assert run(fresh(), tmp_path / "run", data).continued_from == 3
    assert files_digest(PAIRS) is None
    for name in ("picture files", "threads", "sha256"): record.pop(name)                            # a run of an older version
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert run(fresh(), tmp_path / "run", data).continued_from == 8


class FuseFiles(PairSet):
    def __init__(self, pairs, pixels, left): super().__init__(pairs, pixels); self.left = left
    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0: raise KeyboardInterrupt
        return super().__getitem__(index)


def test_another_number_of_threads_is_told(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path, Fuse(40))
    lines, before = [], torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try: assert run(fresh(), tmp_path, say=lines.append).continued_from == 3
    finally: torch.set_num_threads(before)
    assert [line for line in lines if "threads" in line] == [f"{tmp_path}: the run began with {before} threads, this process has {before + 1}: its numbers will not repeat to the bit"]


# ---- a process that reads pictures dies

class Deadly(TensorPairs):
    "In one of the processes that read, the twentieth picture is the last."
    reads = 0
    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            Deadly.reads += 1
            if Deadly.reads == 20: os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("batches", ["random", "near"])
def test_a_reading_process_that_dies_is_one_line(fresh, tmp_path, batches):
    pairs = Deadly(PAIRS.pixels, PAIRS.captions)
    with pytest.raises(PliError, match="a process that reads pictures died .*use fewer workers, or 0") as caught: run(fresh(), tmp_path, pairs, workers=1, steps=40, checkpoint_every=1, batches=batches)
    assert "\n" not in str(caught.value)
    if batches == "near": return
    done = run(fresh(), tmp_path, steps=40, checkpoint_every=1)                            # without it, from where it was
    whole = run(fresh(), steps=40)
    assert done.history == whole.history


def test_an_error_inside_a_reading_process_keeps_its_words(fresh, tmp_path):
    class Odd(TensorPairs):
        def __getitem__(self, index): return index, torch.zeros(3, 8 + index % 2, 8, dtype=torch.uint8), "odd"
    for workers in (0, 1):
        with pytest.raises(PliError, match=r"^pictures of different sizes in one batch, .*must bring them to one size$"): run(fresh(), None, Odd(PAIRS.pixels, PAIRS.captions), workers=workers)


# ---- a finished run goes on as another

def test_a_finished_run_is_prolonged_from_weights_and_moments(fresh, tmp_path):
    "With a constant rate and no warm-up, two runs of four steps are one of eight: weights, moments, order, masks."
    flat = {"schedule": "constant", "warmup": 0}
    one, whole = fresh(), fresh()
    run(one, tmp_path / "one", steps=4, **flat)
    wanted = run(whole, steps=8, **flat)
    two = load_backbone(str(tmp_path / "one" / "last"))
    result = run(two, tmp_path / "two", steps=4, prolong=tmp_path / "one", **flat)
    assert same(two, whole) and [record["loss"] for record in result.history] == [record["loss"] for record in wanted.history[4:]]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["steps before"] == 4
    stranger = fresh(seed=5)
    run(stranger, tmp_path / "three", steps=2, prolong=tmp_path / "two", learning_rate=1e-4)      # whatever the model held, it begins with the run's
    assert json.loads((tmp_path / "three" / "run.json").read_text())["steps before"] == 8


def test_a_prolonged_run_is_killed_and_continued(fresh, tmp_path):
    run(fresh(), tmp_path / "one")
    more = {"prolong": tmp_path / "one", "learning_rate": 1e-4, "validate": lambda backbone: backbone.scale.item(), "validate_every": 2}
    whole, again = fresh(), fresh()
    wanted = run(whole, tmp_path / "whole", **more)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "two", Fuse(40), **more)
    result = run(again, tmp_path / "two", **more)
    assert result.continued_from == 3 and same(whole, again) and result.history == wanted.history and result.scores == wanted.scores
    with pytest.raises(PliError, match="steps before was 8, now None|start was"): run(fresh(), tmp_path / "two", learning_rate=1e-4, validate_every=2)


def test_what_cannot_be_prolonged(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "half", Fuse(40))
    run(fresh(), tmp_path / "done")
    for folder, out, says in ((tmp_path / "half", "out", "half: this run is at step 3 of 8; finish it first"), (tmp_path / "none", "out", "none: holds no run with a checkpoint"),
                              (tmp_path / "done", "done", "done: a run is prolonged as another run; choose another folder")):
        with pytest.raises(PliError, match=says): run(fresh(), tmp_path / out, prolong=folder)
    lines = []
    run(fresh(), tmp_path / "out", chance_pairs(30), prolong=tmp_path / "done", say=lines.append)
    assert len([line for line in lines if "learned from other pairs than these" in line]) == 1


def test_more_reading_processes_than_the_machine_can_bear(fresh):
    with pytest.raises(PliError, match="^workers must be 0 to .* got 100000$"): tune(fresh(), PAIRS, SHORT, workers=100_000)


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "checkpoint.safetensors"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_a_run_is_not_waited_for(fresh, tmp_path, name):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path, Fuse(40))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(PliError, match=f"{name}: .*a pipe"): run(fresh(), tmp_path)


def test_a_record_of_a_run_that_changed_is_told(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path, Fuse(40))
    good = (tmp_path / "run.json").read_text()
    for bad in (good.replace('"pairs": 40', '"pairs": 41'), good[:-9], ""):
        (tmp_path / "run.json").write_text(bad)
        with pytest.raises(PliError, match="run.json: .*choose another folder, or remove this one to start again$"): run(fresh(), tmp_path)
    (tmp_path / "run.json").write_text(good)
    assert run(fresh(), tmp_path).continued_from == 3


def test_a_run_whose_checkpoint_is_gone_says_that_it_begins_again(fresh, tmp_path):
    run(fresh(), tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    told = []
    claim_folder(tmp_path / "run", core.read_sealed(tmp_path / "run" / "run.json", ""), PAIRS, told.append)
    assert len(told) == 1 and "its checkpoint is gone; it begins again at step 0" in told[0]


def test_a_log_nested_without_end_is_told(tmp_path):
    (tmp_path / "log.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(PliError, match="does not hold the 1 steps"): read_log(tmp_path / "log.jsonl", 1)


@pytest.mark.parametrize("name", ["steps", "batch_size", "warmup", "checkpoint_every", "validate_every"])
def test_counts_beyond_all_measure_are_told(name):
    with pytest.raises(PliError, match=f"{name} must be at most 1,000,000,000,000"): check_settings(TuneSettings(**{name: 10**20}))


# ---- a log that is appended

def test_every_line_is_written_once_and_at_once(fresh, tmp_path):
    "The file only grows, and a line is there before the next batch is read."
    log, sizes = tmp_path / "run" / "log.jsonl", []
    class Watching(TensorPairs):
        def __getitem__(self, index):
            sizes.append((log.stat().st_ino, log.read_bytes().count(b"\n"), log.stat().st_size))
            return super().__getitem__(index)
    run(fresh(), tmp_path / "run", Watching(PAIRS.pixels, PAIRS.captions))
    assert len({inode for inode, _, _ in sizes}) == 1 and sizes == sorted(sizes)
    assert [lines for _, lines, _ in sizes[::8]] == list(range(8))


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b'{"step": 3, "loss": 1.5}\n', b'{"step": 3, "loss": 1.5}\n\x00\x00\x00', b"\n\n", b"x" * 100_000])
def test_what_stands_behind_the_checkpoint_is_cut(fresh, tmp_path, tail):
    whole = run(fresh(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(30))
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes() + tail)
    assert run(fresh(), tmp_path / "run").history == whole.history
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_a_new_log(fresh, tmp_path):
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(20))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2 and not (tmp_path / "run" / "checkpoint.safetensors").exists()
    result = run(fresh(), tmp_path / "run")
    assert result.continued_from is None and [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == result.history


@pytest.mark.parametrize("harm", ["edited", "gone", "replaced"])
def test_a_log_that_somebody_touches_while_the_run_goes_on_is_made_whole(fresh, tmp_path, harm):
    log = tmp_path / "run" / "log.jsonl"
    class Touching(Fuse):
        def __getitem__(self, index):
            if self.left == 30:
                text = log.read_text()
                log.unlink()
                if harm == "replaced": log.write_text(text)
                if harm == "edited": log.write_text("a note of mine\n" + text)
            return super().__getitem__(index)
    result = run(fresh(), tmp_path / "run", Touching(1000))
    assert [json.loads(line) for line in log.read_text().splitlines()] == result.history and len(result.history) == 8
    assert run(fresh(), tmp_path / "run").history == result.history


def test_a_run_that_an_older_version_wrote_goes_on(fresh, tmp_path):
    "Its log was written whole at each checkpoint, so it is never longer; it has no moving average, and no setting for one."
    whole = run(fresh(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40))
    log, note = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "run.json"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    record = json.loads(note.read_text())
    del record["settings"]["ema"], record["sha256"]
    note.write_text(json.dumps(record))
    with pytest.raises(PliError, match="ema was 0.0, now 0.5"): run(fresh(), tmp_path / "run", ema=0.5)
    assert run(fresh(), tmp_path / "run").history == whole.history


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_line_that_has_no_room_is_told(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    log.add({"step": 0})
    before = log.digest.hexdigest()
    log.file.close()
    log.file = open("/dev/full", "wb", buffering=0)
    with pytest.raises(core.DiskFull, match="log.jsonl: cannot be written, the disk is full: it needs .* are free there.* make room"): log.add({"step": 1})
    assert log.digest.hexdigest() == before and read_log(tmp_path / "log.jsonl", 1, before) == [{"step": 0}]


# ---- a moving average

def learned_of(backbone): return {name: weight.detach().clone() for name, weight in backbone.named_parameters()}


def test_a_moving_average_is_its_formula_and_changes_no_step(fresh, tmp_path):
    plain, averaged, seen = fresh(), fresh(), []
    wanted = run(plain, tmp_path / "plain", validate=lambda backbone: 0.5, validate_every=1)
    validate = lambda backbone: seen.append(learned_of(backbone)) or len(seen)
    result = run(averaged, tmp_path / "run", validate=validate, validate_every=1, ema=0.75, keep_every=1)
    assert result.history == wanted.history and same(plain, averaged) and same(load_backbone(str(tmp_path / "run" / "last")), plain)
    mean = learned_of(fresh())
    for step in range(9):
        if step:
            now = learned_of(load_backbone(str(tmp_path / "run" / f"step-{step:06}")))
            mean = {name: 0.75 * mean[name] + 0.25 * now[name] for name in mean}
        for name in mean: torch.testing.assert_close(seen[step][name], mean[name], rtol=1e-5, atol=1e-7)
    for name in ("average", "best"):
        kept = learned_of(load_backbone(str(tmp_path / "run" / name)))
        assert all(torch.equal(kept[name], seen[8][name]) for name in kept)
    for name in ("log.jsonl", "last/open_clip_model.safetensors"): assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not (tmp_path / "plain" / "average").exists()


@pytest.mark.parametrize("changes", [{}, {"tune": "text"}, {"target": "frozen"}, {"piece": 3}, {"gradient_checkpointing": True}], ids=str)
def test_a_moving_average_goes_on_to_the_bit(fresh, tmp_path, changes):
    settings = {"ema": 0.9, "validate": lambda backbone: backbone.scale.item(), "validate_every": 2, **changes}
    whole, again = fresh(), fresh()
    wanted = run(whole, tmp_path / "whole", **settings)
    reads = 40 if changes.get("target") else 0
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(reads + 40), **settings)
    result = run(again, tmp_path / "run", **settings)
    assert result.continued_from == 3 and result.history == wanted.history and result.scores == wanted.scores and same(whole, again)
    for name in ("checkpoint.safetensors", "average/open_clip_model.safetensors", "best/open_clip_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    before = (tmp_path / "run" / "average" / "open_clip_model.safetensors").read_bytes()
    run(fresh(), tmp_path / "run", **settings)                                     # a run that is done
    assert (tmp_path / "run" / "average" / "open_clip_model.safetensors").read_bytes() == before


def test_a_frozen_tower_is_its_own_average(fresh, tmp_path):
    run(fresh(), tmp_path / "run", tune="text", ema=0.5)
    start, mean = fresh(), load_backbone(str(tmp_path / "run" / "average"))
    assert mean.fingerprint("image") == start.fingerprint("image") and not same(mean, start)
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", "pt") as file: assert not any(name.startswith("average.visual") for name in file.keys())


def test_a_prolonged_run_goes_on_with_the_average_of_the_one_before(fresh, tmp_path):
    flat = {"schedule": "constant", "warmup": 0, "steps": 4}
    run(fresh(), tmp_path / "one", ema=0.9, **flat)
    run(fresh(), tmp_path / "two", ema=0.9, prolong=tmp_path / "one", **flat)
    run(fresh(), tmp_path / "whole", ema=0.9, **flat | {"steps": 8})
    model = lambda run: load_backbone(str(tmp_path / run / "average"))
    assert same(model("two"), model("whole"))
    run(fresh(), tmp_path / "plain", **flat)
    begun = fresh()
    run(begun, tmp_path / "from plain", ema=0.5, prolong=tmp_path / "plain", learning_rate=0, **flat)      # begins with the weights that it begins with
    assert same(model("from plain"), begun) and not same(begun, fresh())


def test_weights_are_the_models_own_again_after_a_validation_that_fails(fresh):
    backbone = fresh().requires_grad_(True)
    moving, before = MovingAverage(backbone, 0.5), weights(backbone)
    with torch.no_grad(): backbone.model.logit_scale.add_(1)
    moving.update()
    with pytest.raises(ZeroDivisionError):
        with moving.in_place():
            assert backbone.model.logit_scale.item() == pytest.approx(before["logit_scale"].item() + 0.5)
            1 / 0
    assert backbone.model.logit_scale.item() == pytest.approx(before["logit_scale"].item() + 1)


# ---- models that are kept on the way

def test_kept_models_are_those_of_their_steps_and_change_nothing(fresh, tmp_path):
    plain, kept = fresh(), fresh()
    wanted = run(plain, tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40), keep_every=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-000002", "step-000004"]
    assert run(kept, tmp_path / "run", keep_every=4).history == wanted.history           # another number is the same run
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-000002", "step-000004", "step-000008"]
    assert same(kept, plain) and same(load_backbone(str(tmp_path / "run" / "step-000008")), plain)
    for name in ("log.jsonl", "checkpoint.safetensors", "run.json", "last/open_clip_model.safetensors", "last/features.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    halves = fresh()
    run(halves, tmp_path / "halves", steps=4, schedule="constant")
    whole = fresh()
    run(whole, tmp_path / "flat", schedule="constant", keep_every=4)
    assert same(load_backbone(str(tmp_path / "flat" / "step-000004")), halves)


def test_a_kept_model_that_a_killed_run_had_not_finished_is_made_again(fresh, tmp_path, monkeypatch):
    wait = core.to_disk
    def dies(path):
        if path.parent.name == "step-000003" and path.name.endswith(".part"): raise KeyboardInterrupt
        wait(path)
    monkeypatch.setattr(core, "to_disk", dies)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", keep_every=3)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()                    # a model stands there before the checkpoint of its step
    run(fresh(), tmp_path / "run", keep_every=3)
    run(fresh(), tmp_path / "whole", keep_every=3)
    for name in ("step-000003", "step-000006"): assert same(*(load_backbone(str(tmp_path / run / name)) for run in ("run", "whole")))


@pytest.mark.parametrize("changes, says", [({"keep_every": -1}, "keep_every must be"), ({"keep_every": 1.5}, "keep_every must be"), ({"keep_every": True}, "keep_every must be")])
def test_what_cannot_be_kept(fresh, tmp_path, changes, says):
    with pytest.raises(PliError, match=says): run(fresh(), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_without_a_folder_nothing_can_be_kept(fresh):
    with pytest.raises(PliError, match="keep_every writes into the folder of a run"): run(fresh(), keep_every=2)
    lines = []
    run(fresh(), ema=0.5, say=lines.append)
    assert [line for line in lines if "without a folder the average is" in line]


# ---- what can be known before

def test_the_files_of_a_run_become_as_large_as_was_said(fresh, tmp_path):
    settings = {"ema": 0.5, "keep_every": 3, "validate": lambda backbone: 1.0}
    said = file_sizes(fresh(), dataclasses.replace(SHORT, ema=0.5), True, 3)
    run(fresh(), tmp_path, **settings)
    size = lambda *parts: sum(path.stat().st_size for part in parts for path in tmp_path.glob(part) if path.is_file())
    assert size("checkpoint.safetensors") == pytest.approx(said["the checkpoint"], rel=0.02)
    for name in ("last", "best", "average"): assert size(f"{name}/*") == pytest.approx(said[f"{name}/"], rel=0.02)
    assert size("step-*/*") == pytest.approx(said["2 models kept on the way"], rel=0.02)
    frozen = file_sizes(fresh(), dataclasses.replace(SHORT, tune="text"))
    assert frozen["the checkpoint"] < said["the checkpoint"] * 0.9 and "average/" not in frozen and "best/" not in frozen
    run(fresh(), tmp_path / "text", tune="text")
    assert (tmp_path / "text" / "checkpoint.safetensors").stat().st_size == pytest.approx(frozen["the checkpoint"], rel=0.02)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(fresh, tmp_path, monkeypatch):
    usage = type("Usage", (), {"total": 10**9, "free": 2 * 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(PliError, match=r"run: the run cannot be written there to its end: its files need [\d.]+ MB .*the checkpoint .*last/ .*3 models kept.* and 2.0 MB are free. Make room.*fewer models") as caught:
        run(fresh(), tmp_path / "run", keep_every=2, steps=6)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    usage.free = 10**9
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40))
    usage.free = 0
    with pytest.raises(PliError, match="0 bytes are free, beside the .* that the run has there"): run(fresh(), tmp_path / "run")
    usage.free = 10**9
    run(fresh(), tmp_path / "run")
    usage.free = 0
    run(fresh(), tmp_path / "run")                                                       # it is done, and needs no more


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_that_takes_no_files_is_told_before_a_picture_is_read(fresh):
    with pytest.raises(PliError, match="/proc/run: cannot be written .*; name another place"): run(fresh(), "/proc/run", Fuse(0))
    with pytest.raises(PliError, match="cannot be written"): check_room(Path("/proc/self/run"), {})


# ---- curves

def test_without_tensorboard_it_is_told_before_anything_is_done(fresh, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)                    # as where it is not installed
    with pytest.raises(PliError, match=r"pip install 'pli\[tensorboard\]'"): run(fresh(), tmp_path / "run", Fuse(0), tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_every_step_is_once_in_tensorboard(fresh, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    def curves(folder, name):
        return [(event.step, event.value) for event in events.EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)]
    extra = {"tensorboard": True, "validate": lambda backbone: backbone.scale.item(), "validate_every": 3}
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(20), **extra)      # before the first checkpoint
    time.sleep(1.1)
    with pytest.raises(KeyboardInterrupt): run(fresh(), tmp_path / "run", Fuse(40), **extra)      # two steps past it
    time.sleep(1.1)
    result = run(fresh(), tmp_path / "run", **extra)
    losses = lambda result: [(record["step"] + 1, pytest.approx(record["loss"])) for record in result.history]
    scores = lambda result: [(record["step"], pytest.approx(record["score"])) for record in result.scores]
    assert curves(tmp_path / "run", "loss") == losses(result) and curves(tmp_path / "run", "validation") == scores(result)
    plain = run(fresh(), tmp_path / "plain", **extra | {"tensorboard": False})
    assert plain.history == result.history and not (tmp_path / "plain" / "tensorboard").exists()
    run(fresh(), tmp_path / "plain", **extra)                                                     # asked for when all is done
    assert curves(tmp_path / "plain", "loss") == losses(plain)
    before = sorted((tmp_path / "plain" / "tensorboard").iterdir())
    run(fresh(), tmp_path / "plain", **extra)
    assert sorted((tmp_path / "plain" / "tensorboard").iterdir()) == before


WAYS_OF_HIDING = ("none", "random:0.75", "block:0.5", "object:0.5", "ground:0.5", "grid:0.5", "mix:0.5", "recolour+random:0.5", "grey+crop:0.4+drop:0.5", "blur:0.2+random:0.5",
                  "recolour+random:0.5+only:colour+ask|crop:0.4|random:0.75+drop:0.5", "swap:0.3+random:0.5", "band>random:0.5")


@pytest.mark.parametrize("objective, hide", [*(("masked", hide) for hide in WAYS_OF_HIDING), ("paper", "random:0.75"), ("clip", "none"), ("flip", "random:0.5"), ("picture", "random:0.5")])
def test_a_loss_waits_for_no_gpu(objective, hide, monkeypatch):
    "On a device whose numbers nobody can look at: a look at them would raise an error here, and on a GPU would wait for all that it still has to do."
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: contextlib.nullcontext())      # knows no such device
    backbone = load_backbone("pli-tiny-48").to("meta")
    settings = TuneSettings(objective=objective, hide=hide)
    pixels, same = torch.empty(6, 3, 48, 48, device="meta"), same_picture(torch.tensor([0, 0, 1, 2, 3, 4]))
    batch = TrainingBatch(pixels, ["a red star", "a small red star on blue", "a", "one big ring", "two green rings", "a box"], rng_for(0, "hide"), 0.5, same)
    for shortcuts in (contextlib.nullcontext(), backbone.shortcuts()):
        with shortcuts: METHODS[objective].loss(backbone, batch, settings).backward()
    with pytest.raises(RuntimeError, match="meta"): int(pixels.sum())                            # so a look does raise

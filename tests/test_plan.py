"The plan of a run: `pli tune ... --dry-run` says what the run then does, and leaves nothing behind."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch
from safetensors.torch import load_file

from pli.backbones.loading import load_backbone
from pli.cli.main import main
from pli.core import PliError, folder_lock
from pli.settings import TuneSettings
from pli.training.loop import tune
from pli.training.plan import Timing, make_plan, plan_lines, tensors_file_bytes
from pli.world import save_world

quiet = lambda line: None
SHORT = TuneSettings(steps=7, batch_size=16, learning_rate=1e-3, warmup=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, pairs=90, queries=12, gallery_size=60)
    with open(folder / "pairs.csv", "a") as file: file.write("images/gone.png,a red heart\n")
    return folder


def pli(capfd, *words, status=0) -> str:
    assert main([str(word) for word in words]) == status
    said = capfd.readouterr()
    return said.out if status == 0 else said.err


def listing(folder: Path) -> dict:
    "All that lies in a folder, with what tells whether it was touched."
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def sizes(folder: Path) -> dict[str, int]:
    "Bytes by the names that a plan has for them."
    found = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return found | {f"{path.name}/": sum(file.stat().st_size for file in path.iterdir()) for path in folder.iterdir() if path.is_dir()}


def check_files(plan, folder: Path) -> None:
    "Every file of a plan has the size that was said, the log within the length of its numbers, and nothing large was left unsaid."
    lie = sizes(folder)
    if kept := [name for name in lie if name.startswith("step-")]: lie[f"step-.../ ({len(kept)})"] = sum(lie.pop(name) for name in kept)
    for file in plan.files: assert lie[file.name] == pytest.approx(file.size, rel=0.1 if file.name == "log.jsonl" else 0.02), file.name
    assert sum(lie.values()) == pytest.approx(sum(file.size for file in plan.files), rel=0.02)


@pytest.mark.parametrize("more", [{}, {"target": "frozen"}, {"epochs": 2, "validate_epochs": 1}, {"tune": "text", "target": "frozen"}, {"piece": 5}, {"objective": "picture"}, {"gradient_checkpointing": True}, {"ema": 0.5}], ids=str)
def test_a_run_does_what_its_plan_says(more, tmp_path):
    settings, data, scored = TuneSettings(**{**vars(SHORT), **more}), rank_worker.drawn_pairs(), []
    keep_every = 2 if settings.ema else 0
    validate = lambda backbone: scored.append(1) or 0.5
    backbone = load_backbone("pli-tiny-48")
    start = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = listing(tmp_path)
    plan = make_plan(backbone, data, settings, tmp_path / "run", validate, say=quiet, keep_every=keep_every)
    assert listing(tmp_path) == before and len(scored) == 1
    assert all(torch.equal(value, start[name]) for name, value in backbone.state_dict().items()) and all(weight.requires_grad for weight in backbone.parameters())
    scored.clear()
    result = tune(backbone, data, settings, tmp_path / "run", validate, say=quiet, keep_every=keep_every)
    assert (plan.steps, plan.settings.steps, len(plan.scored), plan.pairs) == (len(result.history), len(result.history), len(scored), len(data))
    assert [record["step"] for record in result.scores] == list(plan.scored) and plan.score == result.start
    assert plan.pictures == len(data) - 1                                        # one is there twice
    check_files(plan, tmp_path / "run")
    moved = sum(value.numel() for name, value in backbone.named_parameters() if not torch.equal(value, start[name]))
    learns = sum(count for count, _ in plan.learning.values())
    assert moved <= learns and (plan.learning["image"][0] == 0) == (settings.tune == "text")
    assert plan.memory["moments"] == 2 * plan.memory["gradients"] == 8 * learns and ("the frozen copy" in plan.memory) == (settings.target == "frozen")
    assert plan.memory.get("the moving average", 0) == 4 * learns * bool(settings.ema) and ("average/" in {file.name for file in plan.files}) == bool(settings.ema)
    if more: return
    again = load_backbone("pli-tiny-48")
    tune(again, data, settings, say=quiet)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in backbone.state_dict().items())      # as without a plan before it


def test_less_is_kept_with_recomputed_activations_and_in_pieces():
    kept = {}
    for name, more in {"plain": {}, "pieces": {"piece": 4}, "recomputed": {"gradient_checkpointing": True}}.items():
        kept[name] = make_plan(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), TuneSettings(**{**vars(SHORT), **more}), say=quiet).memory["activations"]
    assert kept["pieces"] < 0.6 * kept["plain"] and kept["recomputed"] < 0.6 * kept["plain"]


def test_more_pictures_at_a_time_need_more_memory():
    kept = [make_plan(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), TuneSettings(**{**vars(SHORT), "batch_size": size}), say=quiet).memory["activations"] for size in (12, 24, 48)]
    assert kept[1] - kept[0] == pytest.approx((kept[2] - kept[1]) / 2, rel=0.15)


def test_a_run_that_would_go_on_is_told_with_its_step(tmp_path):
    data, folder = rank_worker.drawn_pairs(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt): rank_worker.stopped_run(load_backbone("pli-tiny-48"), SHORT, folder, after=5 * 16)
    before = listing(folder)
    plan = make_plan(load_backbone("pli-tiny-48"), data, SHORT, folder, say=quiet)
    assert (plan.first, plan.steps, plan.found) == (3, 4, "a run at step 3 of 7: 4 steps would follow") and listing(folder) == before
    assert plan.needed < sum(file.size + file.twice for file in plan.files)      # its checkpoint lies there already
    tune(load_backbone("pli-tiny-48"), data, SHORT, folder, say=quiet)
    done = make_plan(load_backbone("pli-tiny-48"), data, SHORT, folder, say=quiet)
    assert done.steps == 0 and done.found.endswith("it is done") and "no step is left" in str(done) and done.seconds == 0
    with pytest.raises(PliError) as told: tune(load_backbone("pli-tiny-48"), data, TuneSettings(**{**vars(SHORT), "seed": 5}), folder, say=quiet)
    with pytest.raises(PliError) as planned: make_plan(load_backbone("pli-tiny-48"), data, TuneSettings(**{**vars(SHORT), "seed": 5}), folder, say=quiet)
    assert str(told.value) == str(planned.value)


def test_a_prolonged_run_is_planned(tmp_path):
    data = rank_worker.drawn_pairs()
    tune(load_backbone("pli-tiny-48"), data, SHORT, tmp_path / "one", say=quiet)
    plan = make_plan(load_backbone(tmp_path / "one" / "last"), data, SHORT, tmp_path / "two", say=quiet, prolong=tmp_path / "one")
    result = tune(load_backbone(tmp_path / "one" / "last"), data, SHORT, tmp_path / "two", say=quiet, prolong=tmp_path / "one")
    assert plan.steps == len(result.history) == 7
    check_files(plan, tmp_path / "two")


@pytest.mark.parametrize("harm", ["a file", "somebody's", "locked", "broken record", "broken checkpoint"])
def test_a_folder_that_cannot_be_used_is_told_as_the_run_tells_it(harm, tmp_path):
    data, folder = rank_worker.drawn_pairs(), tmp_path / "run"
    if harm == "a file": folder.write_text("")
    if harm == "somebody's":
        folder.mkdir()
        (folder / "letter.txt").write_text("dear")
    if harm == "locked": folder.mkdir()
    if harm.startswith("broken"):
        tune(load_backbone("pli-tiny-48"), data, TuneSettings(**{**vars(SHORT), "steps": 2}), folder, say=quiet)
        name = "run.json" if harm == "broken record" else "checkpoint.safetensors"
        contents = bytearray((folder / name).read_bytes())
        contents[-40] ^= 4
        (folder / name).write_bytes(contents)
    settings, told = TuneSettings(**{**vars(SHORT), "steps": 2}), []
    def both():
        before = listing(tmp_path)
        for call in (make_plan, tune):
            with pytest.raises(PliError) as error: call(load_backbone("pli-tiny-48"), data, settings, folder, say=quiet)
            told.append(str(error.value))
            if call is make_plan: assert listing(tmp_path) == before
    if harm == "locked":
        with folder_lock(folder): both()
    else: both()
    assert told[0] == told[1]


@pytest.mark.parametrize("more, words", [
    (dict(workers=999), "workers must be"), (dict(most_bad=2), "most_bad must be from 0 to 1"),
    (dict(settings=TuneSettings(target="frozen", batch_size=4), prolong="x"), "target frozen reads its gallery"),
    (dict(settings=TuneSettings(batch_size=400)), "do not fill one batch of 400"), (dict(settings=TuneSettings(batch_size=16, batches="kin:wearer")), "no pair has a partner"),
    (dict(prolong="nowhere"), "holds no run"),
])
def test_what_does_not_go_together_is_told_as_the_run_tells_it(more, words):
    told = []
    for call in (make_plan, tune):
        with pytest.raises(PliError, match=words) as error: call(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), **({"settings": SHORT} | more), say=quiet)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_the_objective_says_whether_anything_is_hidden():
    hidden = lambda **more: make_plan(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), TuneSettings(**{**vars(SHORT), "steps": 2, **more}), say=quiet).hidden
    assert "27 of 36 patches" in hidden()
    assert hidden(objective="clip") == "nothing: the objective clip hides no part of a pair"
    assert re.search(r"pixels of \d+ of 16 pictures .* words of \d+ of 16 captions", hidden(hide="recolour+drop:0.5"))


def test_times_are_added_up():
    plan = make_plan(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), TuneSettings(**{**vars(SHORT), "target": "frozen", "validate_every": 2}), None, lambda backbone: 0.25, say=quiet)
    assert len(plan.step.times) == 3 and plan.scored == (0, 2, 4, 6, 7)
    assert plan.seconds == pytest.approx(7 * (plan.step.median + plan.loading.median) + 5 * plan.validating + sum(plan.before.values())) and len(plan.before) == 1
    assert str(Timing((0.5, 0.25, 1.0))) == "0.5 s (0.25 to 1 of 3)" and str(Timing((2.0,))) == "2 s (once)"
    assert not plan.files and plan.room is None and "files:" not in str(plan)


def test_reading_processes_give_the_same_plan():
    plans = [make_plan(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), SHORT, workers=workers, say=quiet) for workers in (0, 2)]
    assert plans[0].hidden == plans[1].hidden and plans[0].memory == plans[1].memory
    assert plans[1].step_seconds == max(plans[1].step.median, plans[1].loading.median / 2)


def test_the_size_of_a_file_of_tensors_is_known_before(tmp_path):
    from safetensors.torch import save_file
    tensors = {f"weight.{i}": torch.zeros(i, 3) for i in range(1, 40)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == pytest.approx(tensors_file_bytes(tensors), abs=64)


# the command line

@pytest.fixture
def asked(world, tmp_path):
    return ("tune", world / "pairs.csv", "--model", "pli-tiny-48", "--held-out", "0.2", "--out", tmp_path / "run", "--device", "cpu", "--batch-size", 16, "--warmup", 1)


@pytest.mark.parametrize("more", [("--steps", 5), ("--epochs", 2, "--validate-epochs", 1, "--target", "frozen")], ids=["steps", "epochs"])
def test_the_command_says_what_the_run_then_does(asked, more, world, tmp_path, capfd):
    before, pairs_before = listing(tmp_path), listing(world)
    said = pli(capfd, *asked, *more, "--dry-run")
    assert listing(tmp_path) == before and listing(world) == pairs_before and "nothing was written" in said
    assert "left out: missing picture: 1" in said or "left out: " in said and "left out: none" not in said
    pli(capfd, *asked, *more)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert f"steps: {len(log)} (" in said and f"pairs: {made['pairs']['learned from']} of" in said and f"{made['pairs']['held out']} held out" in said
    assert f"; {len(made['scores'])} times (before the first step" in said and f"this model has {made['scores'][0]['score']:.4f}" in said
    again = pli(capfd, *asked, *more, "--dry-run")
    assert f"a run at step {len(log)} of {len(log)}: it is done" in again


def test_the_weights_of_a_run_are_those_of_a_run_without_a_plan(asked, tmp_path, capfd):
    pli(capfd, *asked, "--steps", 4, "--dry-run")
    pli(capfd, *asked, "--steps", 4)
    other = [tmp_path / "other" if word == tmp_path / "run" else word for word in asked]
    pli(capfd, *other, "--steps", 4)
    one, two = (load_file(tmp_path / name / "last" / "open_clip_model.safetensors") for name in ("run", "other"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_recipe_is_planned(asked, tmp_path, capfd):
    (tmp_path / "small.toml").write_text('title = "Small"\nsource = "a test"\nmodel = "pli-tiny-48"\n[settings]\nepochs = 3\nvalidate_epochs = 1\nschedule = "epochs"\nwarmup_epochs = 2\nbatch_size = 8\n')
    words = [word for word in asked if word not in ("--model", "pli-tiny-48", "--batch-size", 16, "--warmup", 1)]
    said = pli(capfd, *words, "--recipe", tmp_path / "small.toml", "--dry-run")
    assert "recipe small: Small" in said and "(3 epochs)" in said and "batch: 8 pairs" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [("--hide", "wrong"), ("--batch-size", 1), ("--steps", 0), ("--warmup-epochs", 3), ("--held-out", 7), ("--batch-size", 4000), ("--most-bad", 3), ("--queries", "x.json"), ("--prolong", "nowhere")], ids=str)
def test_a_mistake_is_told_as_the_run_tells_it(asked, wrong, capfd):
    words = [word for word in asked if not (wrong[0] == "--prolong" and word in ("--model", "pli-tiny-48"))]
    assert pli(capfd, *words, *wrong, "--dry-run", status=1) == pli(capfd, *words, *wrong, status=1)


def test_processes_of_a_run_plan_it_together(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29641", "-m", "pli.cli.main", "tune", str(world / "pairs.csv"), "--model", "pli-tiny-48",
               "--out", str(tmp_path / "run"), "--steps", "5", "--batch-size", "9", "--device", "cpu", "--held-out", "0.2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan of the run") == 1 and "batch: 9 pairs, 5 for each of 2 processes" in done.stdout and not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told(tmp_path):
    import dataclasses
    plan = make_plan(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), SHORT, tmp_path / "run", say=quiet)
    assert "NOT ENOUGH" not in str(plan)
    assert any("NOT ENOUGH" in line for line in plan_lines(dataclasses.replace(plan, room=plan.needed - 1)))

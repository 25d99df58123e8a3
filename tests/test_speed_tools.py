"The tools that measure speed run, and say what they must: a short trial of each, whose numbers mean nothing."
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_tool(*words, status=0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    return done


def test_the_loader_is_measured_from_files_and_shards(tmp_path):
    said = run_tool("tools/loader_speed.py", "--quick", "--model", "--device", "cpu", "--out", tmp_path / "speed.json")
    record = json.loads((tmp_path / "speed.json").read_text())
    assert json.loads(said.stdout) == record and record["versions"]["torch"] and record["command"].endswith("--quick")
    ways = {f"{side}, {workers} reading processes" for side in ("files", "shards") for workers in (0, 2)}
    assert set(record["pictures a second, alone"]) == set(record["beside the model"]) == ways
    for spans in record["beside the model"].values(): assert 0 <= spans["share of waiting"]["median"] < 1
    assert set(record["draft"]) == {"500 x 375", "640 x 480", "1024 x 768"}
    for found in record["draft"].values(): assert found["equal"] == (found["prepared pixels apart, of 255"]["most"] == 0)


def test_photographs_of_ones_own_are_enlarged(tmp_path, shared):
    folder = shared / "data" / "shop" / "images"
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(folder.iterdir())[:4]: (few / file.name).write_bytes(file.read_bytes())
    record = json.loads(run_tool("tools/loader_speed.py", "--quick", "--pictures", few).stdout)
    assert "photographs, enlarged" in record["what"] and "beside the model" not in record
    (tmp_path / "none").mkdir()
    assert "holds no .jpg" in run_tool("tools/loader_speed.py", "--quick", "--pictures", tmp_path / "none", status=1).stderr


def test_the_check_of_a_gpu_can_be_rehearsed(tmp_path):
    "tests/test_gpu.py, which it runs too, is run by itself."
    done = subprocess.run(["bash", "tools/gpu_check.sh", "--device", "cpu", "--quick", "--without", "tests", "--out", str(tmp_path / "check.json")], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["failed"] == [] and set(record["parts"]) == {"precision", "share", "step", "compile"} and "rehearsal" in record["what"]
    parts = record["parts"]
    assert parts["compile"]["apart at most, share"] < 1e-4 and parts["compile"]["first step, seconds"]["compiled"] > 0
    spans = parts["share"]["seconds a step"]
    assert set(spans) == {"loading", "copying", "hiding", "tokens", "clipping", "optimiser", "forward and backward", "log"}
    assert parts["share"]["share outside forward and backward"] == pytest.approx(1 - spans["forward and backward"] / sum(spans.values()), abs=1e-3)


def test_a_check_that_has_no_time_says_so_and_fails(tmp_path):
    done = run_tool("tools/gpu_check.py", "--device", "cpu", "--quick", "--seconds", "0", "--out", tmp_path / "check.json", status=1)
    assert "gpu_check: device 'nowhere' cannot be used here" in run_tool("tools/gpu_check.py", "--device", "nowhere", "--out", tmp_path / "none.json", status=1).stderr
    assert not (tmp_path / "none.json").exists()
    assert json.loads((tmp_path / "check.json").read_text())["failed"] == ["tests", "precision", "share", "step", "compile"] and "no time was left" in done.stdout


def test_shards_are_measured_only_beside_the_library_that_is_named():
    without = "import runpy, sys; sys.modules['wids'] = None; sys.argv = ['shard_speed', '--quick']; runpy.run_path('tools/shard_speed.py', run_name='__main__')"
    assert 'shard_speed: needs wids, which is part of webdataset before version 1: pip install --no-deps "webdataset<1"' in run_tool("-c", without, status=1).stderr


@pytest.mark.skipif(importlib.util.find_spec("wids") is None, reason='needs "webdataset<1"')
def test_shards_are_measured_beside_the_librarys_own_reader(tmp_path):
    said = run_tool("tools/shard_speed.py", "--quick", "--out", tmp_path / "speed.json")
    record = json.loads((tmp_path / "speed.json").read_text())
    assert json.loads(said.stdout) == record and record["bytes were the same"] and record["webdataset"]
    assert set(record["ways"]) == {"pli", "wids, 10 shards open", "wids, all shards open"}
    for way in record["ways"].values(): assert min(way["first, seconds"]["median"], way["again, seconds"]["median"], way["reads, samples a second"]["lowest"], way["on the disk, bytes"]) > 0


@pytest.mark.slow
def test_a_compiled_step_is_timed_beside_the_others(tmp_path):
    record = json.loads(run_tool("tools/step_speed.py", "--model", "pli-tiny-48", "--batch", "8", "--turns", "1", "--device", "cpu", "--compile", "--skip-memory").stdout)
    assert set(record["seconds a step"]) == {"plain", "pli", "frozen", "compiled", "frozen, compiled"} and record["first step, in which kernels are made, seconds"]["compiled"] > 0
    assert 0 < record["one patch embedding, share of a step of pli"]["median"] < 1


# what tuning would cost

def cost_tool() -> dict: return runpy.run_path(str(ROOT / "tools" / "training_cost.py"))


def stored_cost() -> dict: return json.loads((ROOT / "results" / "training-cost.json").read_text())


def equal(one, other) -> None:
    "The same records, numbers within 1 %."
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one: equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for each, its in zip(one, other): equal(each, its)
    elif isinstance(one, float): assert one == pytest.approx(other, rel=0.01)
    else: assert one == other


@pytest.mark.parametrize("model", ["ViT-B-32", pytest.param("ViT-L-14", marks=pytest.mark.slow)])
def test_the_stored_operations_are_those_that_are_counted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, stored = cost_tool()["count"](model), stored_cost()["counts"][model]
    assert (found["weights"], found["width"]) == (stored["weights"], stored["width"])
    key = "operations of a sample, by tokens"
    assert found[key].keys() == stored[key].keys()
    for tokens in found[key]: assert found[key][tokens] == pytest.approx(stored[key][tokens], rel=0.001), "python tools/training_cost.py --recount"


def test_the_stored_costs_follow_from_the_counts_and_from_what_is_stored_beside_them():
    tool, stored = cost_tool(), stored_cost()
    steps, steps_from = tool["measured_steps"](ROOT / "results" / "gpu-check.json")
    core, core_from = tool["measured_loader"](ROOT / "results" / "loader-speed.json")
    assert (stored["measured"]["step times"], stored["measured"]["loader"]) == (steps_from, core_from), "python tools/training_cost.py renews it"
    estimate = tool["rounded"](tool["estimate"](stored["counts"], steps, core))
    equal(json.loads(json.dumps(estimate)), {key: stored[key] for key in estimate})
    equal(json.loads(json.dumps(tool["ASSUMED"])), stored["assumed"])
    equal(tool["RUNS"], stored["runs"])
    assert stored["runs"]["CC3M, 10 epochs"]["pairs"] == 3_318_333 and "CC3M, 10 epochs" in {row["run"] for row in stored["hours"]}


def test_counted_operations_are_those_of_the_formula():
    "A ViT-B/32 by hand: 12 blocks of 24 width^2 operations a token and 4 tokens^2 width of attention, the patches, the projection."
    width, tokens = 768, 50
    blocks = 12 * (24 * width**2 * tokens + 4 * tokens**2 * width)
    by_hand = blocks + 2 * 49 * (3 * 32 * 32) * width + 2 * width * 512
    assert stored_cost()["counts"]["ViT-B-32"]["operations of a sample, by tokens"]["19"]["a whole picture, forward"] == pytest.approx(by_hand, rel=0.01)


def test_measured_steps_take_the_place_of_assumed_shares(tmp_path):
    tool, counts = cost_tool(), stored_cost()["counts"]
    spans = lambda pli, frozen: {"batch": 100, "seconds a step": {"pli": {"median": pli}, "frozen": {"median": frozen}}}
    record = {"machine": {"device": "cuda", "gpu": "Some GPU"}, "date": "2026-01-01", "parts": {"step": {"ViT-B-32": spans(2.0, 1.0)}}}
    (tmp_path / "check.json").write_text(json.dumps(record))
    steps, told = tool["measured_steps"](tmp_path / "check.json")
    assert steps == {"ViT-B-32": {"masked 0.75": 0.02, "masked 0.75, frozen target": 0.01}} and told["gpu"] == "Some GPU"
    rows = {(row["model"], row["way"], row["run"]): row for row in tool["hours"](counts, steps, 1e9)}
    assert rows["ViT-B-32", "masked 0.75", "COCO, 10 epochs"]["GPU-hours"] == pytest.approx({"measured": 5_917_530 * 0.02 / 3600})
    slow = next(row for row in tool["hours"](counts, steps, 1.0) if (row["model"], row["way"], row["run"]) == ("ViT-B-32", "masked 0.75", "COCO, 10 epochs"))
    assert slow["hours with loading, at best"]["8"] == pytest.approx(5_917_530 / 16 / 8 / 3600)                 # 16 cores that read one picture a second each
    scaled, known = "scaled from a measured step", counts["ViT-B-32"]["operations of a sample, by tokens"]
    assert set(rows["ViT-B-32", "CLIP loss, nothing hidden", "COCO, 10 epochs"]["GPU-hours"]) == {scaled}
    longer = known["77"]["masked 0.75"] / known["19"]["masked 0.75"]
    assert longer > 1.2 and rows["ViT-B-32", "masked 0.75", "CC3M, 10 epochs"]["GPU-hours"] == pytest.approx({scaled: 33_183_330 * 0.02 * longer / 3600})
    # a frozen target reads every picture once more, and the loader has to bring it that often
    frozen = next(row for row in tool["hours"](counts, steps, 1.0) if (row["model"], row["way"], row["run"]) == ("ViT-B-32", "masked 0.75, frozen target", "LAION-400M, 1 epoch"))
    assert frozen["hours with loading, at best"]["64"] == pytest.approx(2 * 400e6 / 16 / 64 / 3600)
    assert set(rows["ViT-L-14", "masked 0.75", "COCO, 10 epochs"]["GPU-hours"]) == {"at 25% of the peak", "at 40% of the peak"}
    (tmp_path / "check.json").write_text(json.dumps(record | {"machine": {"device": "cpu"}}))
    assert tool["measured_steps"](tmp_path / "check.json") == ({}, None) == tool["measured_steps"](tmp_path / "none.json")
    (tmp_path / "loader.json").write_text(json.dumps({"command": "python tools/loader_speed.py --quick", "pictures a second of one core": 7}))
    assert tool["measured_loader"](tmp_path / "loader.json")[0] == tool["ASSUMED"]["pictures a second of one core"]["value"]

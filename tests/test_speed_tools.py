"The tools that measure speed run, and say what they must: a short trial of each, whose numbers mean nothing."
import json
import os
import subprocess
import sys
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
    assert json.loads((tmp_path / "check.json").read_text())["failed"] == ["tests", "precision", "share", "step", "compile"] and "no time was left" in done.stdout

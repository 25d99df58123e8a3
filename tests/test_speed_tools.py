"The tools that measure speed run, and say what they must: a short trial of each, whose numbers mean nothing."
import json
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

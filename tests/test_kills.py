"A run that is killed twenty times in a row, at moments that nobody chose, ends with the bits of one that nothing happened to."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pli

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="forks and signals")
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_twenty_times_and_equal_to_the_bit(ranks, tmp_path):
    "With two processes, joined by gloo, sometimes one of them is killed and sometimes both. `PLI_KILL_SEED` draws other moments."
    path = os.pathsep.join([str(Path(pli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(HERE / "kill_worker.py"), str(tmp_path), os.environ.get("PLI_KILL_SEED", "0"), "20", str(ranks)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["other bits"] == [] and found["files"] > 20
    assert found["before the first step"] + found["between steps"] == 20 and found["kills"] >= 20 and found["continued"] >= 10
    assert ranks == 1 or found["one of several"] and found["all"]

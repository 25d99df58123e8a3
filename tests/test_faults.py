"Real faults for real commands, for a bounded time; `python tools/faults.py` goes on for as long as you like and stores what it found."
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")
def test_nothing_is_lost_and_nothing_passes_in_silence():
    "`PLI_FAULT_SECONDS` and `PLI_FAULT_SEED` say how long and what; the seed is printed, and a fault names its round."
    path = os.pathsep.join([str(Path(pli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(ROOT / "tools" / "faults.py"), "--seconds", os.environ.get("PLI_FAULT_SECONDS", "240"), "--seed", os.environ.get("PLI_FAULT_SEED", "0")]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr

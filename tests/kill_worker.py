"""A run that is killed over and over: `kill_worker.py FOLDER SEED KILLS RANKS`. Everything is imported once; every process of a run is a
fork of this one that gives the real command in a real folder, and dies of a real SIGKILL. Prints what was done, as JSON.
"""
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}      # a sum repeats to the bit with one number of threads only

import open_clip  # noqa: E402, F401   what a command imports late, so that its forks begin at once
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import torch.distributed  # noqa: E402, F401

import pli.backbones.loading, pli.benchmarks.own, pli.cli.main, pli.data.mixtures, pli.evaluation.validation, pli.training.loop, pli.training.recipes, pli.training.watching  # noqa: E402, E401, F401
from pli.world import save_world  # noqa: E402

torch.set_num_threads(1)
STEPS = 80
MODEL = {"embed_dim": 16, "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},     # small, so that its checkpoints are
         "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
TUNE = (f"tune ../data/pairs.csv --model ../data/model --out run --device cpu --held-out 0.2 --steps {STEPS} --batch-size 8 --warmup 2 --learning-rate 1e-3 "
        "--checkpoint-every 3 --validate-every 20 --keep-every 25 --ema 0.9")
MOST = 120         # seconds that anything may take
GRACE = 20         # seconds in which a process notices that another one has gone; torchrun ends it sooner


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def begin(place: Path, ranks: int) -> list[int]:
    "The processes of one start, in their order."
    place.mkdir(parents=True, exist_ok=True)
    return [fork(place, rank, ranks, port) for port in [free_port()] for rank in range(ranks)]


def fork(place: Path, rank: int, ranks: int, port: int) -> int:
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        log = os.open(place / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        os.chdir(place)
        if ranks > 1: os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["pli", *TUNE.split()]
        code = pli.cli.main.main(TUNE.split())
    except SystemExit as stop: code = stop.code if isinstance(stop.code, int) else 1
    finally: os._exit(code or 0)


def ended(pids: list[int], seconds: float) -> dict[int, int]:
    "The exit statuses of those that end within some seconds, below 0 for a signal."
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - codes.keys():
            if (found := os.waitpid(pid, os.WNOHANG))[0]: codes[pid] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    return codes


def lines_of(log: Path) -> int:
    try: return log.read_bytes().count(b"\n")
    except FileNotFoundError: return 0


def until(log: Path, more: int, pids: list[int]) -> None:
    "Wait for so many new lines; a run that goes on cuts some off first."
    least, end = lines_of(log), time.monotonic() + MOST
    while (now := lines_of(log)) < least + more:
        least = min(least, now)
        if time.monotonic() > end: raise SystemExit(f"no new line in {MOST} s: {said(log.parents[1])}")
        time.sleep(0.002)


def said(place: Path) -> str: return "\n".join(file.read_text()[-2000:] for file in sorted(place.glob("said-*")))


def files(run: Path) -> dict[str, bytes]:
    "What a run leaves; its provenance holds a date."
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != "provenance.json"}


def main() -> None:
    folder, seed, kills, ranks = Path(sys.argv[1]), *map(int, sys.argv[2:])
    rng, counts, where, began = random.Random(seed), Counter(), [], time.monotonic()
    save_world(folder / "data", pairs=60, queries=8, gallery_size=24, size=48, seed=1)
    (folder / "killme.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "killme.json")
    pli.backbones.loading.load_backbone("killme").save(folder / "data" / "model")
    pids, start = begin(folder / "whole", ranks), time.monotonic()
    until(folder / "whole/run/log.jsonl", 1, pids)
    until_steps = time.monotonic() - start                                        # how long a start takes before its first step
    if any(ended(pids, MOST).values()): raise SystemExit(f"fails without a kill: {said(folder / 'whole')}")
    place = folder / "killed"
    log = place / "run" / "log.jsonl"
    for number in range(kills):
        pids = begin(place, ranks)
        if early := rng.random() < 0.3: time.sleep(rng.random() * until_steps)
        else: until(log, rng.randint(1, 5), pids), time.sleep(0.03 * rng.random())
        victims = pids if rng.random() < 0.5 else [rng.choice(pids)]
        for pid in victims: os.kill(pid, signal.SIGKILL)
        codes = ended(pids, GRACE)
        for pid in set(pids) - codes.keys():                                      # as torchrun does with those that are left
            os.kill(pid, signal.SIGKILL)
            counts["left waiting"] += 1
        codes |= ended(sorted(set(pids) - codes.keys()), MOST)
        if any(codes[pid] != -signal.SIGKILL for pid in victims): raise SystemExit(f"kill {number} came too late, {codes}: {said(place)}")
        if any(codes[pid] == 0 for pid in pids): raise SystemExit(f"kill {number}: a process ended with 0, though another was killed")
        counts["kills"] += len(victims)
        counts["before the first step" if early else "between steps"] += 1
        counts["one of several" if len(victims) < ranks else "all"] += 1
        where.append(lines_of(log))
    counts["continued"] = sum(file.read_text().count("continuing at step") for file in place.glob("said-0"))
    if any((codes := ended(begin(place, ranks), MOST)).values()) or len(codes) < ranks: raise SystemExit(f"does not end well: {said(place)}")
    wanted, have = files(folder / "whole/run"), files(place / "run")
    odd = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    print(json.dumps(counts | {"lines at the kills": where, "files": len(wanted), "other bits": odd, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__": main()

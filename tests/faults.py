"""Real faults for real commands: processes die at random moments and inside writes, disks fill up, two work at once, bits flip.

Every round draws a command and a fault from a seed of its own, does it, gives the same command again, and looks: it ends with the same bits
as a run that nothing happened to, or fails with one line that names the file and a way on, and that way leads there. `tools/faults.py` runs it.
"""
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"       # ranks and losses repeat to the bit with one number of threads only
os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip  # noqa: E402, F401   read once: children are forks of this process, and start at once
import torch  # noqa: E402

import pli.cli.main, pli.demo, pli.evaluation.compare, pli.evaluation.validation, pli.evaluation.writers, pli.studies.page, pli.studies.predictions, pli.studies.run, pli.viz.gains, pli.viz.masks, pli.viz.rankings  # noqa: E402, E401, F401
from pli.world import save_world  # noqa: E402

torch.set_num_threads(1)
MOST = 180                                 # seconds that a command may take; the longest takes about a fifth of that
VOLATILE = {"date", "seconds", "continued", "seconds a step", "seconds to measure", "sha256"}   # what may differ between two runs; a digest covers the others
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
REMEDY = re.compile(r"\b(remove|choose|bring|make room|wait|again|name|give|use)\b")

PLAN = """
title = "faults"
start = {model = "pli-tiny-48", steps = 4, batch_size = 16, learning_rate = 1e-3, checkpoint_every = 2}
pairs = {world = {shape = 1, colour = 1}, count = 60, queries = 60, gallery = 200}
held_out = 10
control = "plain"
seeds = [0]
composers = ["sum:0.5"]
[settings]
steps = 4
batch_size = 16
warmup = 1
checkpoint_every = 2
[arms.plain]
objective = "clip"
hide = "none"
[arms.masked]
at = [2]
[arms.both]
average = ["plain", "masked"]
"""


@dataclass(frozen=True)
class Task:
    "Commands that are given one after the other in one folder; what they leave is compared."
    name: str
    commands: tuple[str, ...]
    share: float = 1.0                     # how often it is drawn
    alone: bool = True                     # whether a second process is refused


OURS = "--queries ../../data/queries.json --gallery ../../data/gallery.json --device cpu"
TUNE = ("tune ../../data/pairs.csv --model pli-tiny-48 --out run --device cpu --held-out 0.2 --steps 8 --batch-size 16 --warmup 2 "
        "--learning-rate 1e-3 --checkpoint-every 2 --validate-every 4")
TASKS = (
    Task("tune", (TUNE, f"evaluate {OURS} --model run/best --no-cache --composer sum:0.5 --out best.json"), 3),
    Task("tune with workers", (TUNE + " --workers 1",), 0.5),
    Task("tune with an average", (TUNE + " --ema 0.75 --keep-every 3", f"evaluate {OURS} --model run/average --no-cache --composer sum:0.5 --out average.json"), 1),
    Task("study", ("study ../../data/plan.toml --runs runs --out results --device cpu", "study ../../data/plan.toml --out results --report"), 3, False),
    Task("demo", ("demo --quick --out demo --device cpu",), 0.3),
    Task("evaluate", (f"evaluate {OURS} --model ../../data/model --cache cache --composer sum --out report.json --rankings ranked.json",), 2, False),
    Task("evaluate with workers", (f"evaluate {OURS} --model ../../data/model --cache cache --composer sum --workers 2 --out report.json",), 0.5, False),
    Task("average", ("average ../../data/model ../../data/other --out mean", f"evaluate {OURS} --model mean --no-cache --composer sum:0.5 --out report.json"), 1, False),
)


# -- processes --------------------------------------------------------------------------------------------------------

class Child:
    "A `pli` command in a process group of its own."
    def __init__(self, line: str, folder: Path, log: Path, bytes_: int = 0, dies: bool = True, at_write: int = 0, count: bool = False, fresh: bool = False):
        for place in (folder, log.parent): place.mkdir(parents=True, exist_ok=True)
        self.line, self.log, self.code, self.began = line, log, None, time.monotonic()
        words = line.split()
        if fresh:                          # a Python of its own, as a user's shell starts it
            start = [sys.executable, "-c", "import sys; from pli.cli.main import main; sys.exit(main())", *words]
            with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
                self.pid = subprocess.Popen(start, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True).pid
            return
        self.pid = os.fork()
        if self.pid: return
        code = 1
        try:
            os.setsid()
            for number, name in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")): os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY, 0o644), number)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
            sys.argv = ["pli", *words]
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if bytes_:                     # the write that would pass this size is cut there: the process dies in it, or is told that there is no room
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
            if at_write or count: watch_writes(at_write, f"{log}.count" if count else None)
            code = pli.cli.main.main(words)
        except SystemExit as stop: code = stop.code if isinstance(stop.code, int) else 1
        except BaseException: traceback.print_exc()
        finally:
            try: sys.stdout.flush(); sys.stderr.flush()
            except Exception: pass
            os._exit(code or 0)

    def wait(self, seconds: float = MOST) -> int | None:
        "The exit status, below 0 for a signal; None if it goes on for longer."
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end: return None
            else: time.sleep(0.003)
        return self.code

    def kill(self, group: bool = False) -> None:
        if self.code is not None: return
        os.killpg(self.pid, signal.SIGKILL) if group else os.kill(self.pid, signal.SIGKILL)

    def children(self) -> list[int]:
        try: return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError: return []

    @property
    def said(self) -> str: return Path(f"{self.log}.err").read_text(errors="replace")


def watch_writes(at: int, count: str | None) -> None:
    "Count whatever changes files, as Python itself reports it before it happens; die at number `at`."
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR) or str(args[0]).startswith(("/dev", "/proc")): return
        elif event not in WRITES: return
        seen += 1
        if seen == at: os.kill(os.getpid(), signal.SIGKILL)
        if count:
            file = os.open(count, os.O_RDONLY | os.O_CREAT)
            os.close(file)
            os.utime(count, (seen, seen))
    sys.addaudithook(hook)


# -- what is left ------------------------------------------------------------------------------------------------------

def plain(record):
    if isinstance(record, dict): return {key: plain(value) for key, value in record.items() if key not in VOLATILE}
    return [plain(value) for value in record] if isinstance(record, list) else record


def bits(path: Path) -> str:
    "What must be the same of a file."
    content = path.read_bytes()
    if path.suffix == ".json":
        try: content = json.dumps(plain(json.loads(content))).encode()
        except ValueError: pass
    if path.name == "report.html": content = re.sub(rb"\d+ s( since it was continued)?, seed", b"SECONDS, seed", content)
    return hashlib.sha256(content).hexdigest()[:16]


def left(folder: Path) -> dict[str, str]:
    "All files with their bits; the shards of a cache are called by the time, and are checked by what is read from them."
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {str(path.relative_to(folder)): bits(path) for path in files if path.relative_to(folder).parts[0] != "cache"}


def litter(folder: Path) -> list[str]:
    "What no finished command may leave."
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".part") or re.match(r"\.tmp\w{6}$", path.name) or path.name.endswith(".lock"))


class Fault(Exception):
    "What must not happen."


@dataclass
class Reference:
    "A run that nothing happened to."
    files: dict[str, str]
    seconds: float
    writes: int
    sizes: list[int]
    folder: Path


# -- the harness -------------------------------------------------------------------------------------------------------

@dataclass
class Harness:
    base: Path
    seed: int
    say: callable = print
    counts: Counter = field(default_factory=Counter)
    faults: list = field(default_factory=list)
    references: dict[str, Reference] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self):
        data = self.base / "data"
        save_world(data, pairs=60, queries=24, gallery_size=120, size=48, seed=1)
        (data / "plan.toml").write_text(PLAN)
        for name, seed in (("model", 3), ("other", 4)): pli.backbones.loading.load_backbone("pli-tiny-48", seed=seed).save(data / name)

    def chain(self, task: Task, folder: Path, **how) -> Child:
        "Give the commands of a task until one fails."
        for number, line in enumerate(task.commands):
            child = Child(line, folder, self.base / "logs" / f"{self.number}-{time.monotonic_ns()}", **how)
            if child.wait() is None:
                child.kill(group=True)
                child.wait()
                raise Fault(f"pli {line}: does not end")
            if child.code: return child
        return child

    def reference(self, task: Task) -> Reference:
        if task.name not in self.references:
            (self.base / "logs").mkdir(exist_ok=True)
            folder, seconds = self.base / "rounds" / task.name.replace(" ", "-"), []
            for name, fresh in (("", False), ("-again", task.name != "demo")):                      # a fork does what a Python of its own does
                child, began = self.chain(task, Path(f"{folder}{name}"), **({"fresh": True} if fresh else {"count": True})), time.monotonic()
                if child.code: raise SystemExit(f"{task.name}: fails without a fault: {child.said}")
                seconds.append(began - child.began)
            counted = [int(path.stat().st_mtime) for path in (self.base / "logs").glob(f"{self.number}-*.count")]
            for path in (self.base / "logs").glob("*.count"): path.unlink()
            files, again = left(folder), left(Path(f"{folder}-again"))
            odd = sorted(name for name in files.keys() | again.keys() if files.get(name) != again.get(name))
            if odd or litter(folder): raise SystemExit(f"{task.name}: two runs differ without a fault: {odd} {litter(folder)}")
            shutil.rmtree(f"{folder}-again")
            sizes = sorted(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            self.references[task.name] = Reference(files, seconds[0], max(counted), sizes, folder)
        return self.references[task.name]

    def ends_well(self, task: Task, folder: Path, child: Child) -> None:
        "Raise a `Fault` unless a command that ended with 0 left what an undisturbed run leaves."
        want, have = self.reference(task).files, left(folder)
        if torn := litter(folder): raise Fault(f"left behind: {', '.join(torn)}")
        odd = [f"{name} ({'missing' if name not in have else 'not expected' if name not in want else 'other bits'})" for name in sorted(want.keys() | have.keys()) if want.get(name) != have.get(name)]
        if odd: raise Fault(f"ended with 0 and other results: {', '.join(odd[:6])}; it said: {child.said.strip()[-600:]}")

    def told(self, child: Child, names: list[str], folder: Path | None = None) -> str:
        "The one line of a command that failed; a `Fault` if it is anything else."
        lines = [line for line in child.said.splitlines() if line.strip()]
        if "Traceback" in child.said: raise Fault(f"traceback: {lines[-1]} (pli {child.line})")
        if child.code < 0: raise Fault(f"died of signal {-child.code} (pli {child.line})")
        mine = [line for line in lines if re.match(r"pli \w+: ", line)]
        if not mine or lines[-1] != mine[-1] or len(lines) > 3: raise Fault(f"not one line: {lines}")
        if not any(name in mine[-1] for name in names): raise Fault(f"names neither of {names}: {mine[-1]}")
        if not REMEDY.search(mine[-1]): raise Fault(f"says no way on: {mine[-1]}")
        if folder and (torn := litter(folder)): raise Fault(f"left behind: {', '.join(torn)}; it said: {mine[-1]}")
        return mine[-1]

    # the faults ------------------------------------------------------------------------------------------------------

    def kills(self, rng: random.Random, task: Task, folder: Path) -> None:
        "Die one to three times, then go on."
        ref, died = self.reference(task), 0
        for _ in range(rng.choice((1, 1, 2, 3))):
            way, line = rng.choice(("moment", "write", "byte", "byte", "group", "fresh")), task.commands[0]
            log = self.base / "logs" / f"{self.number}-{time.monotonic_ns()}"
            if way == "write": child = Child(line, folder, log, at_write=rng.randint(1, ref.writes))
            elif way == "byte": child = Child(line, folder, log, bytes_=max(1, rng.randrange(rng.choice(ref.sizes) + 1)))
            else:
                child = Child(line, folder, log, fresh=way == "fresh")
                if child.wait(rng.random() * ref.seconds + (4 * rng.random() if way == "fresh" else 0)) is None: child.kill(way == "group")
            if child.wait() is None: raise Fault(f"pli {line}: does not end")
            died += child.code < 0
            self.counts[f"kills, {way}"] += child.code < 0
            if child.code > 0: self.told(child, [""])
        last = self.chain(task, folder)
        if last.code: raise Fault(f"killed {died} times, then: {last.said.strip()[-600:]}")
        self.ends_well(task, folder, last)
        self.counts["kills"] += died
        self.counts["kills, continued"] += died

    def workers(self, rng: random.Random, task: Task, folder: Path) -> None:
        "A process that reads pictures dies."
        child, hit = Child(task.commands[0], folder, self.base / "logs" / f"{self.number}-w"), False
        end, after = time.monotonic() + MOST, rng.random()
        while child.wait(0.01) is None and time.monotonic() < end:
            if not hit and (found := child.children()):
                child.wait(after)
                found = child.children() or found
                try: os.kill(rng.choice(found), signal.SIGKILL); hit = True
                except ProcessLookupError: pass
        if child.code is None: raise Fault("a worker died, and the command does not end")
        if child.code: self.told(child, ["a process that reads pictures died"], folder)
        self.counts["workers killed"] += hit
        last = self.chain(task, folder)
        if last.code: raise Fault(f"a worker died, then: {last.said.strip()[-600:]}")
        self.ends_well(task, folder, last)

    def both(self, rng: random.Random, task: Task, folder: Path) -> None:
        "Two at once, and perhaps one of them dies."
        ref, line = self.reference(task), task.commands[0]
        pair = [Child(line, folder, self.base / "logs" / f"{self.number}-{time.monotonic_ns()}")]
        pair[0].wait(rng.choice((0, 0, rng.random() * ref.seconds)))
        pair.append(Child(line, folder, self.base / "logs" / f"{self.number}-{time.monotonic_ns()}"))
        victim = rng.choice((None, None, *pair))
        if victim is not None and victim.wait(rng.random() * ref.seconds) is None:
            victim.kill()
            victim.wait()
            self.counts["two at once, one killed"] += 1
        for child in pair:
            if child.wait() is None:
                for each in pair: each.kill(group=True)
                raise Fault("two at once, and they do not end")
        for child in pair:
            if child.code > 0:
                if not task.alone: raise Fault(f"two at once: {child.said.strip()[-600:]}")
                self.told(child, ["is at work there"])
        if victim is None and all(child.code for child in pair): raise Fault(f"two at once, and neither is done: {[child.said for child in pair]}")
        last = self.chain(task, folder)
        if last.code: raise Fault(f"two at once, then: {last.said.strip()[-600:]}")
        self.ends_well(task, folder, last)
        self.counts["two at once"] += 1

    def full(self, rng: random.Random, task: Task, folder: Path) -> None:
        "No room: a small file system of its own where this process may make one, else a greatest size of files."
        ref = self.reference(task)
        small = os.geteuid() == 0 and rng.random() < 0.7 and mount(folder, max(4096, int(rng.random() * sum(ref.sizes))))
        try:
            how = {} if small else {"bytes_": max(1, rng.randrange(rng.choice(ref.sizes) + 1)), "dies": False}
            child = self.chain(task, folder, **how)
            if child.code:
                self.told(child, ["cannot be written", "No space left"], folder)
                self.counts["full disks"] += 1
                self.counts["full disks, a real one"] += bool(small)
            if small: subprocess.run(["mount", "-o", "remount,size=512m", str(folder)], check=True)
            last = self.chain(task, folder)
            if last.code: raise Fault(f"there is room again, then: {last.said.strip()[-600:]}")
            self.ends_well(task, folder, last)
            self.counts["full disks, continued"] += bool(child.code)
        finally:
            if small: subprocess.run(["umount", "-l", str(folder)], check=True)

    def flips(self, rng: random.Random, task: Task, folder: Path) -> None:
        "One bit of one file, or its end, or all of it; of a run that is done, or was killed on the way."
        ref = self.reference(task)
        shutil.copytree(ref.folder, folder)
        if task.name != "evaluate" and rng.random() < 0.6:
            shutil.rmtree(folder)
            child = Child(task.commands[0], folder, self.base / "logs" / f"{self.number}-k")
            if child.wait((0.2 + 0.8 * rng.random()) * ref.seconds) is None:
                child.kill()
                child.wait()
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if not files: return
        kinds = {}
        for path in files: kinds.setdefault(re.sub(r"[-\d]\S*(?=\.)", "", f"{path.parent.name}/{path.name}"), []).append(path)
        kind = rng.choice(sorted(kinds))
        path, before = (chosen := rng.choice(kinds[kind])), chosen.read_bytes()
        if not before: return
        way = rng.choice(("bit", "bit", "bit", "cut", "empty"))
        place = rng.randrange(len(before)) if rng.random() < 0.5 else rng.randrange(min(2000, len(before)))     # headers of safetensors are short
        after = bytearray(before)
        if way == "bit": after[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(after) if way == "bit" else before[:place] if way == "cut" else b"")
        name = str(path.relative_to(folder))
        self.counts["flipped, cut or emptied"] += 1
        self.counts[f"damaged, {kind}"] += 1
        child = self.chain(task, folder)
        if not child.code:
            damaged = bytes(after) if way == "bit" else before[:place] if way == "cut" else b""
            unread = path.exists() and path.read_bytes() == damaged and bits(path) != self.reference(task).files.get(name)
            try:
                if unread: self.reader(path, folder)
                if unread: path.write_bytes(ref.folder.joinpath(name).read_bytes())
                self.ends_well(task, folder, child)
            except Fault as fault: raise Fault(f"{way} of {name} at {place} of {len(before)}: {fault}") from None
            self.counts["damaged, not read by the command" if unread else "damaged, made whole or harmless"] += 1
            return
        try:
            line = self.told(child, [path.name, *(str(parent.relative_to(folder)) for parent in path.parents if folder in parent.parents)], folder)
            self.counts["damaged, told"] += 1
            self.counts[f"told, {kind}"] += 1
            if re.search("bring|copy or download", line.lower()): path.write_bytes(before)                             # the way on that the line names
            elif "folder" in line: shutil.rmtree(next(parent for parent in path.parents if str(parent.relative_to(folder)) in line))
            else: path.unlink()
            last = self.chain(task, folder)
            if last.code: raise Fault(f"after {line!r} was obeyed: {last.said.strip()[-600:]}")
            self.ends_well(task, folder, last)
        except Fault as fault: raise Fault(f"{way} of {name} at {place} of {len(before)}: {fault}") from None

    def reader(self, path: Path, folder: Path) -> None:
        "A file that the command had no reason to read, as it was done before: whoever does read it must notice."
        if path.name not in ("open_clip_model.safetensors", "open_clip_config.json"): return
        child = Child(f"evaluate {OURS} --model {path.parent.relative_to(folder)} --no-cache --composer sum:0.5", folder, self.base / "logs" / f"{self.number}-r")
        if child.wait() is None: raise Fault("its reader does not end")
        if not child.code: raise Fault(f"is read in silence: {child.said}")
        self.told(child, [path.name])

    def round(self, number: int) -> None:
        "One command, one fault."
        rng, self.number = random.Random(f"{self.seed} {number}"), number
        task = rng.choices(TASKS, [task.share for task in TASKS])[0]
        ways = {"kills": 3, "both": 1, "full": 1, "flips": 0 if "workers" in task.name else 4, "workers": 4 if "workers" in task.name else 0}
        way = rng.choices([*ways], [*ways.values()])[0]
        folder = self.base / "rounds" / str(number)
        self.counts["rounds"] += 1
        self.counts[f"rounds, {task.name}"] += 1
        try:
            for _ in range(4 if way == "flips" else 1):
                shutil.rmtree(folder, ignore_errors=True)
                getattr(self, way)(rng, task, folder)
        except Fault as fault:
            self.faults.append({"round": number, "task": task.name, "fault": way, "what": str(fault).replace(str(self.base) + "/", "")})
            self.say(f"FAULT in round {number} ({task.name}, {way}): {self.faults[-1]['what']}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for log in (self.base / "logs").glob(f"{number}-*"): log.unlink()

    def summary(self) -> str:
        c = self.counts
        return (f"{c['rounds']} rounds; kills: {c['kills']}, continued {c['kills, continued']}; workers killed: {c['workers killed']}; two at once: {c['two at once']}; "
                f"full disks: {c['full disks']}, continued {c['full disks, continued']}; flipped, cut or emptied files: {c['flipped, cut or emptied']}, "
                f"told {c['damaged, told']}, made whole or harmless {c['damaged, made whole or harmless']}, not read by a command that was done {c['damaged, not read by the command']}; faults: {len(self.faults)}")


def mount(folder: Path, size: int) -> bool:
    "A file system of so many bytes, where that is allowed."
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True).returncode == 0


def run(seconds: float, seed: int, rounds: list[int] = (), say=print) -> Harness:
    "Rounds until the time is over, or those that are named."
    began = time.monotonic()
    memory = Path("/dev/shm")                  # a process that is killed loses nothing there that it would keep on a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() and shutil.disk_usage(memory).free > 2**31 else None) as base:
        harness, number = Harness(Path(base), seed, say), 0
        while rounds or time.monotonic() - began < seconds:
            harness.round(rounds[number] if rounds else number)
            number += 1
            if rounds and number == len(rounds): break
        return harness

"Several processes share a run: real ones, joined by gloo, against one process."
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_worker
import torch
from galleries import picture
from safetensors.torch import load_file

import pli.distributed
import pli.training.step
from pli.backbones.loading import load_backbone
from pli.backbones.protocol import weights_of
from pli.cli.main import main
from pli.core import rng_for
from pli.distributed import own_rows
from pli.settings import TuneSettings
from pli.training.rows import part_of
from pli.training.step import make_optimiser, train_step
from pli.training.targets import BEGUN, MATRIX
from pli.world import save_world

HERE = Path(__file__).parent
USUAL = {"steps": 20, "batch_size": 12, "learning_rate": 1e-3, "warmup": 2, "precision": "fp32", "checkpoint_every": 5}
CASES = {
    "masked": {"hide": "random:0.75", "clip_weight": 0.5},
    "borrowing": {"hide": "mix:0.5|swap:0.3+random:0.5", "avoid": "all"},
    "near": {"batches": "near", "hide": "random:0.5"},
    "kin": {"batches": "kin:colour", "hide": "recolour+random:0.5", "objective": "paper", "learning_rate": 1e-4},
    "text alone": {"tune": "text", "objective": "masked", "hide": "drop:0.5"},
    "pieces": {"hide": "mix:0.5", "piece": 4},
    "recomputed": {"hide": "random:0.75", "gradient_checkpointing": True},
    "frozen": {"target": "frozen", "hide": "random:0.5"},
}
FILED = {"drawn": {"hide": "random:0.5"}, "uneven": {"hide": "mix:0.5", "batch_size": 10}}   # their pairs lie in files
AS_SETTINGS = {name: {"settings": USUAL | case} for name, case in CASES.items()}


def shared_run(count: int, out: Path, cases: dict, forget: str = "", check: bool = True) -> subprocess.CompletedProcess:
    "Run cases in several real processes."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(HERE / "rank_worker.py"), str(out), json.dumps(cases)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([*command, *filter(None, [forget])], env=environment, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def far_off(one: dict, other: dict) -> float:
    "How far two runs ended from each other, as a share of how far the first one went, less what rounding is allowed."
    start = {name: value.float() for name, value in weights_of(load_backbone("pli-tiny-48")).items()}
    moved = sum(((one[name] - start[name]) ** 2).sum() for name in one).sqrt()
    apart = sum(((one[name] - other[name]) ** 2).sum() for name in one).sqrt()
    assert moved > 0.1, "the run did not go anywhere"
    return float((apart - 1e-5).clamp_min(0) / moved)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    "All cases; those of pairs in files too: two sources with weights, one of a picture's captions a visit, and pictures that cannot be decoded."
    folder = write_pairs(tmp_path_factory.mktemp("filed") / "pictures").parent
    for name, numbers in {"one": range(2, 40), "two": range(40, 96)}.items():
        rows = [f"{number}.png,{words} {number}\n" for number in numbers for words in ("picture", "another caption of", "number")]
        (folder / f"{name}.csv").write_text("filepath,title\n" + "".join(rows))
    for number in range(4): (folder / f"broken{number}.png").write_bytes((folder / f"{number}.png").read_bytes()[:60])   # cut off
    (folder / "broken.csv").write_text("\n".join([*(folder / "pairs.csv").read_text().splitlines()[:41], *(f"broken{number}.png,broken" for number in range(4))]))
    pairs = {"drawn": {"tables": [str(folder / "one.csv"), str(folder / "two.csv")], "weights": [1, 2], "captions": "one"},
             "uneven": {"tables": [str(folder / "broken.csv")]}}
    return AS_SETTINGS | {name: {"settings": USUAL | case, "pairs": pairs[name]} for name, case in FILED.items()}


@pytest.fixture(scope="module")
def alone(cases):
    "What one process makes of every case, once somebody asks for it."
    class Alone(dict):
        def __missing__(self, name): return self.setdefault(name, rank_worker.run_case(**cases[name]))
    return Alone()


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_end_with_the_weights_of_one(count, cases, alone, tmp_path):
    if count == 4: cases = {name: cases[name] for name in ("borrowing", "near", "kin", "pieces", "uneven")}   # 10 rows for 4, too
    shared_run(count, tmp_path, cases)
    for name in cases:
        weights, log = alone[name]
        losses = [record["loss"] for record in log["history"]]
        assert sum(losses[-5:]) < sum(losses[:5]), f"{name}: the loss does not fall, so the case says nothing"
        shared = json.loads((tmp_path / f"{name}.json").read_text())
        assert sorted(shared["problems"]) == sorted(log["problems"]) and bool(log["problems"]) == (name == "uneven"), name
        others = shared["history"]
        # AdamW does not care how long a gradient is, so the weights alone would not show a factor
        for key in ("loss", "gradient_norm"):
            assert [record[key] for record in others] == pytest.approx([record[key] for record in log["history"]], rel=0.02), (name, key)
        assert far_off(weights, load_file(tmp_path / f"{name}.safetensors")) < 0.01, name


@pytest.mark.parametrize("forgotten", ["gather", "average", "scale"])
def test_what_makes_one_gradient_of_many_is_needed(forgotten, alone, tmp_path):
    cases = {"masked": AS_SETTINGS["masked"]}
    shared_run(2, tmp_path, cases, forgotten)                   # ends as if nothing were wrong
    weights, log = alone["masked"]
    others = json.loads((tmp_path / "masked.json").read_text())["history"]
    norms = [one["gradient_norm"] / other["gradient_norm"] for one, other in zip(others, log["history"])]
    assert far_off(weights, load_file(tmp_path / "masked.safetensors")) > 0.02 or max(map(abs, (norm - 1 for norm in norms))) > 0.1


def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    case = {"settings": USUAL | CASES["borrowing"], "folder": str(tmp_path / "run")}
    done = shared_run(2, tmp_path, {"first": case | {"stop_after": 9 * 6}}, check=False)
    assert done.returncode != 0
    assert "another process of this run has ended" in done.stderr and "is saved in" in done.stderr
    weights, log = rank_worker.run_case(case["settings"], tmp_path / "run")
    assert len(log["history"]) == 20
    assert far_off(alone["borrowing"][0], weights) < 0.01


@pytest.fixture(scope="module")
def two_go_on(tmp_path_factory):
    "Two processes go on with a run that one process began, and begin one in which the second process is told to end: one launch."
    out, begun = tmp_path_factory.mktemp("two"), USUAL | CASES["borrowing"]
    with pytest.raises(KeyboardInterrupt): rank_worker.stopped_run(load_backbone("pli-tiny-48"), TuneSettings(**begun), out / "begun", after=9 * 12)
    shared_run(2, out, {
        "onward": {"settings": begun, "folder": str(out / "begun")},
        "told": {"settings": USUAL | CASES["masked"], "folder": str(out / "ended"), "signal_after": 8 * 6 + 3},   # while it reads its half of step 8
    })
    return out


def test_a_run_that_one_process_began_goes_on_with_two(alone, two_go_on):
    log = json.loads((two_go_on / "onward.json").read_text())
    assert "continuing at step 5 of 20" in log["said"] and [record["step"] for record in log["history"]] == list(range(20))
    assert far_off(alone["borrowing"][0], load_file(two_go_on / "onward.safetensors")) < 0.01


def test_a_signal_to_one_process_ends_the_same_step_in_all(alone, two_go_on):
    "Then one process goes on to the end that nothing happened to."
    folder = two_go_on / "ended"
    first, second = json.loads((two_go_on / "told.json").read_text())["stopped in each"]
    assert first == f"SIGTERM was received: step 8 of 20 is saved in {folder}, and the same command goes on from there"
    assert second.startswith("SIGTERM was received: ended at step 8 of 20")     # the first process alone has a folder
    weights, log = rank_worker.run_case(USUAL | CASES["masked"], folder)
    assert "continuing at step 8 of 20" in log["said"] and [record["step"] for record in log["history"]] == list(range(20))
    assert far_off(alone["masked"][0], weights) < 0.01


def test_the_moving_average_of_several_processes_is_that_of_one(tmp_path):
    "Stopped on two processes and gone on with on two, against one process that nothing happened to."
    case = {"settings": USUAL | CASES["masked"] | {"ema": 0.9}, "folder": str(tmp_path / "run")}
    done = shared_run(2, tmp_path, {"first": case | {"stop_after": 9 * 6}}, check=False)
    assert done.returncode != 0 and "is saved in" in done.stderr
    shared_run(2, tmp_path, {"second": case})
    raw, _ = rank_worker.run_case(case["settings"], tmp_path / "alone")
    mean, other = (load_file(tmp_path / run / "average" / "open_clip_model.safetensors") for run in ("alone", "run"))
    learned = [name for name in raw if mean[name].is_floating_point()]
    assert far_off({name: mean[name] for name in learned}, other) < 0.01
    assert far_off({name: mean[name] for name in learned}, raw) > 0.03, "the average is the end, so the case says nothing"


def test_rows_of_a_batch():
    for total in (1, 2, 5, 8):
        for count in (1, 2, 3, 4):
            rows = torch.cat([own_rows(total, number, count) for number in range(count)])
            assert rows[:total].tolist() == list(range(total)) and len({len(own_rows(total, number, count)) for number in range(count)}) == 1
            assert sum((part_of(list(range(total)), number, count) for number in range(count)), []) == list(range(total))


def test_batches_are_dealt_once_each_in_as_many_rounds_for_all(monkeypatch):
    for total in (0, 1, 4, 7, 8):
        for count in (1, 2, 3, 4):
            monkeypatch.setattr(pli.distributed, "rank_count", lambda: count)
            hands = []
            for number in range(count):
                monkeypatch.setattr(pli.distributed, "rank", lambda: number)
                own, rounds = pli.distributed.dealt(range(total))
                assert rounds - 1 <= len(own) <= rounds and rounds == -(-total // count)
                hands.append(own)
            assert sorted(sum(hands, [])) == list(range(total))
            assert [hand[turn] for turn in range(rounds) for hand in hands if turn < len(hand)] == list(range(total))      # in their order, round by round


def test_pieces_and_recomputing_give_the_plain_gradient():
    for name in ("pieces", "recomputed"):
        settings = USUAL | CASES[name] | {"steps": 6}
        weights, log = rank_worker.run_case(settings | {"piece": 0, "gradient_checkpointing": False})
        other_weights, other_log = rank_worker.run_case(settings)
        assert far_off(weights, other_weights) < 0.01, name
        norms, other_norms = ([record["gradient_norm"] for record in each["history"]] for each in (log, other_log))
        assert other_norms == pytest.approx(norms, rel=1e-4), name               # AdamW does not see a factor


ONCE, TWICE = 1, 2
EMBEDDINGS = [("random:0.5", {}, ONCE), ("none", {}, ONCE), ("mix:0.5", {}, TWICE), ("random:0.5", {"objective": "clip"}, ONCE), ("random:0.5", {"objective": "paper"}, ONCE),
              ("random:0.5", {"avoid": "all"}, ONCE), ("random:0.5", {"gradient_checkpointing": True}, ONCE), ("random:0.5", {"piece": 4}, 3 * TWICE * 2)]


@pytest.mark.parametrize("hide, more, times", EMBEDDINGS)
@pytest.mark.parametrize("split", [False, True])
def test_how_often_a_step_embeds_patches(split, hide, more, times, monkeypatch):
    "With gradient caching each of three pieces is embedded for itself, whole and masked, without a graph and with one."
    if split:                                               # the way of rows that are shared, with one process
        monkeypatch.setattr(pli.training.step, "rank_count", lambda: 2)
        monkeypatch.setattr(pli.training.step, "mean_over_ranks", lambda weights: None)
    backbone, made = load_backbone("pli-tiny-48"), []
    module = backbone.model.visual.conv1
    once = module._conv_forward
    module._conv_forward = lambda *given: made.append(1) or once(*given)
    pixels = torch.randint(0, 256, (12, 3, 48, 48), dtype=torch.uint8, generator=rng_for(0, "pixels"))
    settings = TuneSettings(hide=hide, precision="fp32", **more)
    if settings.gradient_checkpointing: backbone.recompute_activations(True)
    train_step(backbone, make_optimiser(backbone, settings), pixels, ["a", "b", "c"] * 4, 0, settings)
    assert len(made) == times


PEAK = """
import re, sys, torch
from pli.backbones.loading import load_backbone
from pli.core import rng_for
from pli.settings import TuneSettings
from pli.training.step import make_optimiser, train_step
batch, piece = map(int, sys.argv[1:])
torch.set_num_threads(1)
settings = TuneSettings(piece=piece, hide="random:0.5")
backbone = load_backbone("pli-tiny-64")
optimiser, pixels = make_optimiser(backbone, settings), torch.randint(0, 255, (batch, 3, *backbone.size), dtype=torch.uint8)
train_step(backbone, optimiser, pixels[:16], ["a"] * 16, 0, settings)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])   # of this program alone; getrusage begins with the parent's
before = peak()
train_step(backbone, optimiser, pixels, ["a word"] * batch, 1, settings)
print(peak() - before)
"""


def peak_of(batch: int, piece: int) -> int:
    "How far the peak of memory of a fresh process rises in a step, in kB on Linux."
    return int(subprocess.run([sys.executable, "-c", PEAK, str(batch), str(piece)], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of a peak differs")
def test_memory_hardly_grows_with_the_batch_when_features_are_cached():
    "What a picture more costs is itself, as numbers; what the model makes of it is there for a piece at a time."
    few, many, plain = peak_of(64, 16), peak_of(192, 16), peak_of(192, 0)
    picture = 3 * 64 * 64 * 4 / 1000                  # kB
    assert many - few < 128 * 3 * picture, (few, many)
    assert plain - few > 128 * 30 * picture, (few, plain)


def write_pairs(folder: Path) -> Path:
    "Pictures in files, and a table of them."
    from PIL import Image
    folder.mkdir()
    data = rank_worker.drawn_pairs()
    lines = ["filepath,title"]
    for number, (pixels, caption) in enumerate(zip(data.pixels, data.captions)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        lines.append(f'{number}.png,"{caption}"')
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def tune_command(pairs: Path, out: Path, steps: int = 80) -> list[str]:
    return [sys.executable, "-m", "pli.cli.main", "tune", str(pairs), "--model", "pli-tiny-48", "--out", str(out), "--steps", str(steps), "--batch-size", "16",
            "--learning-rate", "1e-3", "--checkpoint-every", "1000", "--device", "cpu"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_with_a_checkpoint_and_a_status_of_its_own(name, tmp_path):
    command = tune_command(write_pairs(tmp_path / "pairs"), tmp_path / "run", steps=100_000) + ["--workers", "1"]     # never done by itself
    begin = lambda: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = begin()
    while not (tmp_path / "run" / "best").exists(): assert process.poll() is None; time.sleep(0.1)      # the start is measured
    time.sleep(1)
    os.killpg(process.pid, getattr(signal, name))      # as a cluster does: to the processes that read pictures too
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"{name} was received" in err and "the same command goes on" in err
    assert not (tmp_path / "run" / "last").exists()
    steps = len((tmp_path / "run" / "log.jsonl").read_text().splitlines())
    process = begin()
    told = next(line for line in process.stdout if "continuing" in line)
    os.killpg(process.pid, getattr(signal, name))
    assert process.communicate(timeout=120) and process.returncode == 75 and f"continuing at step {steps} of 100000" in told


def test_a_signal_to_one_process_ends_the_encoding_in_all(tmp_path):
    "Then it goes on where it was, with another number of processes too, to the features that one process makes."
    settings = USUAL | {"target": "frozen", "steps": 6}
    case = lambda name, **more: {name: {"settings": settings, "folder": str(tmp_path / "run"), **more}}
    done = shared_run(2, tmp_path, case("told", signal_after=5))
    assert "Traceback" not in done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert "SIGTERM was received while whole pictures were encoded: 95 of 95 are kept in" in told["stopped"]
    assert (tmp_path / "run" / BEGUN).exists() and not (tmp_path / "run" / MATRIX).exists()
    _, log = rank_worker.run_case(settings, tmp_path / "run")
    assert "encoding 95 whole pictures once, with the model as it was, going on from 95" in log["said"]
    rank_worker.run_case(settings, tmp_path / "alone")
    assert (tmp_path / "alone" / MATRIX).read_bytes() == (tmp_path / "run" / MATRIX).read_bytes()


def shared_by_two(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pli.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1"))


def test_two_processes_measure_what_one_measures(tmp_path):
    "Each encodes a share; the numbers are the same to the last digit, printed and written once, and only the first process reports a mistake."
    world = save_world(tmp_path / "world", pairs=8, queries=12, gallery_size=150)
    asked = ("evaluate", "--model", "pli-tiny-48", "--queries", world / "queries.json", "--gallery", world / "gallery.json", "--device", "cpu")
    done = shared_by_two(*asked, "--cache", tmp_path / "two", "--out", tmp_path / "two.json")
    assert done.returncode == 0 and done.stdout.count("12 queries, gallery of 150") == 1, done.stderr
    shards = list((tmp_path / "two").glob("*/*.safetensors"))
    assert len(shards) == 2, "a share of each process"
    assert main([*map(str, asked), "--no-cache", "--out", str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["kinds"] == two["kinds"] and one["weights"] == two["weights"]
    done = shared_by_two(*asked, "--no-cache")
    assert done.returncode and done.stderr.count("pli evaluate: --no-cache: several processes hand their features") == 1

def test_two_processes_index_what_one_indexes(tmp_path):
    "The same rows, broken pictures and copies too; a second time there is nothing to do, and a mistake is told once."
    for name in ("one", "two"):
        for number in range(100): picture(tmp_path / name / f"{number:03}.png", number)
        (tmp_path / name / "007.png").write_bytes(b"<html>")
        (tmp_path / name / "040b.png").write_bytes((tmp_path / name / "040.png").read_bytes())
    done = shared_by_two("index", tmp_path / "two", "--model", "pli-tiny-48", "--device", "cpu", "--workers", "1")
    assert done.returncode == 0 and done.stderr.count("101 pictures: ") == 1 and done.stderr.count("007.png") == 1, done.stderr
    assert main(["index", str(tmp_path / "one"), "--model", "pli-tiny-48", "--device", "cpu"]) == 0

    def rows(name):
        path, = (tmp_path / name / ".pli").glob("*/gallery.sqlite")
        with sqlite3.connect(path) as table:
            return table.execute("SELECT path, content, width, height, broken IS NULL, thumbnail, feature FROM picture ORDER BY path").fetchall()
    one, two = rows("one"), rows("two")
    assert len(one) == 101 and sum(row[-1] is not None for row in one) == 100
    assert one == two
    done = shared_by_two("index", tmp_path / "two", "--device", "cpu")
    assert done.returncode == 0 and "nothing new" in done.stderr, done.stderr
    done = shared_by_two("index", tmp_path / "nowhere", "--model", "pli-tiny-48", "--device", "cpu")
    assert done.returncode and done.stderr.count("nowhere: no such folder") == 1, done.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_what_several_processes_would_do_as_many_times_is_refused_once(number, tmp_path, monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": str(number)}.items(): monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit): main(["search", str(tmp_path), "a star"])
    assert capsys.readouterr().err.count("torchrun has started 2 processes, and only tune, evaluate, submit, index share their work") == 1 - number


def test_torchrun_prints_and_writes_once(tmp_path):
    command = tune_command(write_pairs(tmp_path / "pairs"), tmp_path / "run", steps=6)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *command[2:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tuned model:") == 1 and done.stdout.count("step 6/6") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert again.returncode == 0, again.stderr

"Studies: plans that are checked whole, runs that survive being killed, results that are never mixed up, reports from files alone."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from pli.benchmarks.shape import own_queries
from pli.cli.main import main, make_parser
from pli.cli.tune import tune_settings
from pli.core import PliError
from pli.evaluation.ranks import Features, all_composers, as_query_ranks, sweep
from pli.evaluation.choosing import cross_fitted, fold_of
from pli.backbones.loading import load_backbone
from pli.studies.findings import baselines_of, cross_fitted_ranks, compared_with, difference, how_it_learned, recall_of, read_results, solved_share
from pli.studies.page import command_for_arm, draw_figure, hours_of, provenance_lines, write_study
from pli.evaluation.significance import significant
from pli.studies.tables import recall_table, plain_difference, plain_table, precision_line, arms_table
from pli.metrics import paired_bootstrap, recall_at
from pli.studies.plan import STUDY_COMPOSERS, Arm, read_plan, slug
from pli.studies.run import Clock, jobs_of, listed, run
from pli.studies.results import Job, Place, Stops, check_same, model_of, precisions, read_result
from pli.studies.data import code_digest, fewer, first_ranks, load_study_data, packed, pairs_aside, unpacked
from pli.core import claim_lock, is_locked, lock_holder, sealed, write_json
from pli.settings import TuneSettings
from pli.training.average import average
from pli.world import save_world

ROOT = Path(__file__).parent.parent

TINY = """
title = "Tiny"
start = "pli-tiny-48"
control = "control"
seeds = [0, 1]
held_out = 20
composers = ["sum:1", "sum:2", "product:1"]
[pairs]
world = {shape = 1, colour = 1}
count = 120
queries = 60
gallery = 250
[settings]
steps = 4
batch_size = 16
learning_rate = 1e-3
warmup = 1
checkpoint_every = 1
[arms.control]
objective = "clip"
hide = "none"
[arms."mix it"]
hide = "mix:0.5"
at = [2]
[arms.half]
average = ["start", "mix it"]
"""
THREADS = 1   # ranks repeat to the bit with one number of threads: here and in the processes that tests start
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
COMMAND = [sys.executable, "-c", "from pli.cli.main import main; import sys; sys.exit(main())", "study"]
NAMES = {"queries.json", "start.json"} | {f"{name}-{seed}.json" for name in ("control", "mix-it", "mix-it-at-2", "half") for seed in (0, 1)}


def written(folder: Path, text: str = TINY, name: str = "plan.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def place(folder: Path) -> Place:
    return Place(folder, folder / "runs", folder / "out")


def words(plan: Path, folder: Path, *more: str) -> list[str]:
    return [str(plan), "--runs", str(folder / "runs"), "--out", str(folder / "out"), "--device", "cpu", *more]


def quiet(line: str) -> None: pass


def stored(out: Path) -> dict:
    return {path.name: json.loads(path.read_text()) for path in out.glob("*.json") if path.name not in ("queries.json", "report.json")}


@pytest.fixture(scope="module", autouse=True)
def as_many_threads_as_the_other_processes():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "A tiny study from beginning to end: its folder."
    folder = tmp_path_factory.mktemp("study")
    assert run(read_plan(written(folder)), place(folder), say=quiet) == (9, 9)
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    "The same, to be spoilt: results and plan, no runs."
    shutil.copytree(whole / "out", tmp_path / "out")
    written(tmp_path)
    return tmp_path


# Ranks as text

@given(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=50))
@settings(deadline=None, max_examples=50)
def test_ranks_come_back(numbers):
    assert unpacked(packed(torch.tensor(numbers)), len(numbers)).tolist() == numbers


def test_ranks_are_small():
    some = torch.randint(1, 5_500, (2_550,), generator=torch.Generator().manual_seed(0))
    assert len(packed(some)) * len(STUDY_COMPOSERS) < 100_000 and len(STUDY_COMPOSERS) <= 14


@pytest.mark.parametrize("spoil, says", [
    (lambda text: text[:-8], "cut off"), (lambda text: text + "!", "cannot be read"), (lambda text: packed(torch.tensor([1, 2])), "not 3 numbers"),
    (lambda text: packed(torch.tensor([1, 0, 2])), "query 1 has rank 0"), (lambda text: 7, "cannot be read"), (lambda text: packed(torch.ones(1_000_000, dtype=torch.int64)), "not 3 numbers")])
def test_broken_ranks_are_refused(spoil, says):
    with pytest.raises(PliError, match=says): unpacked(spoil(packed(torch.tensor([1, 2, 3]))), 3)


# Plans

def test_a_plan_says_what_it_means(tmp_path):
    plan = read_plan(written(tmp_path))
    assert plan.names() == ["start", "control", "mix it", "mix it @ 2", "half"] and plan.composers == ("image", "text", "sum:1", "sum:2", "product:1")
    assert plan.arms["mix it"].settings == TuneSettings(hide="mix:0.5", steps=4, batch_size=16, learning_rate=1e-3, warmup=1, checkpoint_every=1)
    assert plan.arms["half"].shares == (0.5, 0.5)
    assert read_plan(written(tmp_path, re.sub(r"composers.*\n", "", TINY))).composers == STUDY_COMPOSERS


@pytest.mark.parametrize("old, new, says", [
    ('title = "Tiny"', "", "title is missing"),
    ('title = "Tiny"', "title = 7", "title must be a text, got 7"),
    ('title = "Tiny"', 'title = "Tiny"\ncolour = 1', "unknown key 'colour'; known are title"),
    ('title = "Tiny"', "title = ", "not valid TOML"),
    ("seeds = [0, 1]", "seeds = []", "seeds must be a list of whole numbers"),
    ("seeds = [0, 1]", "seeds = [0, 0]", "seeds names something twice"),
    ("seeds = [0, 1]", "seeds = [true]", "seeds must be a list of whole numbers"),
    ("seeds = [0, 1]", "seeds = [-1]", "at least 0"),
    ('control = "control"', 'control = "kontrol"', "control is 'kontrol', which is no arm"),
    ("held_out = 20", "held_out = 1", "held_out must be at least 2"),
    ("held_out = 20", "held_out = 20\nmost_pairs = -1", "most_pairs must be at least 0, got -1"),
    ('"sum:1", ', '"sum:x", ', "composers: sum: weight must be a number, got 'x'"),
    ("shape = 1,", "shap = 1,", "unknown key 'shap'"),
    ("shape = 1,", "shape = 2,", "from 0 to 1, got 2"),
    ("count = 120", "count = 1", "count must be at least 4"),
    ("count = 120", "count = 1_000_000_000", "count is 1,000,000,000; a drawn world is kept in memory, so at most 500,000"),
    ("gallery = 250", "gallery = 10_000_000_000_000", "gallery is 10,000,000,000,000; a drawn world"),
    ("steps = 4", "steps = 1_000_000_000_000", "steps is 1,000,000,000,000; at most 10,000,000"),
    ("seeds = [0, 1]", f"seeds = {list(range(101))}", "seeds has 101 items; a plan has at most 100"),
    ("warmup = 1", "warmup = 1\nseed = 3", "seed is not for a table of settings"),
    ("warmup = 1", "warmup = 1.5", "warmup must be a whole number, got 1.5"),
    ("warmup = 1", "warm_up = 1", "unknown key 'warm_up'"),
    ("warmup = 1", "warmup = 1\nvalidate_every = 1", "at = "),
    ("learning_rate = 1e-3", "learning_rate = nan", "learning_rate must be a number of at least 0"),
    ('hide = "mix:0.5"', 'hide = "mixed"', "arm 'mix it': .*mixed"),
    ('hide = "mix:0.5"', 'hide = "mix:0.5"\nhid = 1', "unknown key 'hid'"),
    ('hide = "mix:0.5"', 'hide = "mix:0.5"\nmost_pairs = -2', "most_pairs must be at least 0, got -2"),
    ("at = [2]", "at = [4]", "at must name steps between 1 and 3"),
    ("at = [2]", "at = 2", "at must be a list"),
    ('["start", "mix it"]', '["start", "mixit"]', "'mixit', which is no arm that is trained"),
    ('["start", "mix it"]', '["start", "half"]', "'half', which is no arm that is trained"),
    ('["start", "mix it"]', '["mix it"]', "average must be a list"),
    ('["start", "mix it"]', '["start", "mix it"]\nshares = [0.5, 0.6]', "sum to 1"),
    ('["start", "mix it"]', '["start", "mix it"]\nshares = [inf, -inf]', "sum to 1"),
    ('["start", "mix it"]', '["start", "mix it"]\nsteps = 3', "unknown key 'steps'"),
    ("[arms.half]", "[arms.start]", "would be called start"),
    ("[arms.half]", "[arms.queries]", "would be called queries"),
    ('["start", "mix it"]', '["start", "mix it"]\ncontrol = "half"', "control is 'half', which is no other arm"),
    ('["start", "mix it"]', '["start", "mix it"]\ncontrol = "nobody"', "control is 'nobody', which is no other arm"),
    ('["start", "mix it"]', '["start", "mix it"]\nover_seeds = 1', "over_seeds must be true or false"),
    ('[arms.half]', '[arms."mix it 0"]\naverage = ["mix it"]\nover_seeds = true\n[arms.half]', "would be called mix-it-0, as those of 'mix it'"),
    ("[arms.half]", '[arms."Mix  it!"]', "would be called mix-it"),
    ("[arms.half]", '[arms."../x @ 2"]', "a name has letters or digits"),
    ('start = "pli-tiny-48"', 'start = {model = "pli-tiny-48", batch_size = 3}', "unknown key 'batch_size'"),
    ('start = "pli-tiny-48"', "start = {steps = 3}", "model is missing"),
    ('start = "pli-tiny-48"', 'start = {model = "pli-tiny-48", steps = 3, seed = 1}', "seed is not for a table of settings; the seeds stand at the top"),
    ('start = "pli-tiny-48"', 'start = {model = "pli-tiny-48", steps = 0}', r"\[start\]: steps must be at least 1"),
    ('start = "pli-tiny-48"', 'start = "pli-tiny-48"\nqueries = "q.json"', "a drawn world has its own queries"),
])
def test_a_plan_with_a_mistake_is_refused_before_anything_runs(tmp_path, old, new, says):
    assert old in TINY
    with pytest.raises(PliError, match=says) as error: read_plan(written(tmp_path, TINY.replace(old, new, 1)))
    assert "plan.toml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("figure, says", [
    ('kind = "pie"', "kind must be one of heatmap, lines, bars, got 'pie'"), ('kind = "bars"\narms = ["nobody"]', "'nobody' is no arm"), ('kind = "lines"\narms = ["control"]\nx = [1, 2]', "1 arms for 2 numbers of x"),
    ('kind = "bars"\nagainst = "nobody"', "'nobody' is no arm"), ('kind = "bars"\nmeasure = "mAP@5"', "measure must be recall@K"), ('kind = "lines"\narms = ["control", "half"]\nx = [2, 1]', "numbers that rise"),
    ('kind = "lines"\narms = ["half"]\nx = [0]\nlogx = true', "above 0"), ('kind = "bars"\nseries = {a = ["half"]}', "series is for lines"), ('kind = "bars"\nshow = "all"', "show must be gain or recall"),
    ('kind = "lines"\nseries = {a = ["half"]}\nx = [1]\nkinds = ["colour", "shape"]', "series are for one kind of query, got colour, shape"),
    ('kind = "bars"\nkinds = [1]', "kinds must be a list of texts"), ('colour = 1\nkind = "bars"', "unknown key 'colour'"), ('kind = "lines"\narms = ["half"]\nx = [1]\nagainst = ["half", "control"]', "against must be a text")])
def test_a_figure_that_cannot_be_drawn_is_refused(tmp_path, figure, says):
    with pytest.raises(PliError, match=f"figure 1: .*{says}"): read_plan(written(tmp_path, f"{TINY}\n[[figures]]\n{figure}\n"))


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(PliError, match="no such file"): read_plan(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PliError, match="not valid TOML"): read_plan(tmp_path / "bytes.toml")
    with pytest.raises(PliError, match="a folder, not a file"): read_plan(tmp_path)


FILES = TINY.replace('start = "pli-tiny-48"', 'start = "pli-tiny-48"\npairs = "world/pairs.csv"\nqueries = "world/queries.json"\ngallery = "world/gallery.json"').replace(
    "[pairs]\nworld = {shape = 1, colour = 1}\ncount = 120\nqueries = 60\ngallery = 250\n", "")


@pytest.mark.parametrize("old, new", [("world/pairs.csv", "../pairs.csv"), ("world/queries.json", "/etc/passwd"), ("world/gallery.json", "world/../../gallery.json"),
                                      ('"pli-tiny-48"', '"../model"'), ('"pli-tiny-48"', '"/etc"'), ('"pli-tiny-48"', '"local-dir:/etc"')])
def test_a_plan_cannot_lead_out_of_its_folder(tmp_path, old, new):
    plan = read_plan(written(tmp_path / "data", FILES.replace(old, new, 1)))
    with pytest.raises(PliError, match="leads out of the folder|is neither a folder below"): load_study_data(plan, tmp_path / "data", torch.device("cpu"), quiet)


def test_files_are_read_and_held_out_by_picture(tmp_path):
    save_world(tmp_path / "world", pairs=120, queries=20, gallery_size=100)
    material = load_study_data(read_plan(written(tmp_path, FILES)), tmp_path, torch.device("cpu"), quiet)
    names = lambda part: {material.names[row] for row in part}
    assert len(material.held_out) >= 20 and names(material.held_out).isdisjoint(names(material.learn)) and len(material.learn) + len(material.held_out) == 120
    part = material.pairs(30)
    assert len(part) == 30 and set(part.rows) < set(material.pairs().rows) and part.digest() != material.pairs().digest()
    assert torch.equal(part[3][1], material.data[part.rows[3]][1]) and part[3][0] == 3 and part[3][2] == part.captions[3]
    assert torch.equal(part[3][1], part[3][1]) and part.rows[3] in material.kept
    missing = FILES.replace("world/pairs.csv", "world/none.csv")
    with pytest.raises(PliError, match="none.csv"): load_study_data(read_plan(written(tmp_path, missing)), tmp_path, torch.device("cpu"), quiet)
    large = FILES.replace("batch_size = 16", "batch_size = 101")
    with pytest.raises(PliError, match="arm 'control': 100 pairs do not fill one batch of 101"): load_study_data(read_plan(written(tmp_path, large)), tmp_path, torch.device("cpu"), quiet)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 40))
@settings(deadline=None)
def test_pairs_are_split_by_picture(numbers, count):
    names = [f"{number}.jpg" for number in numbers]
    learn, held = pairs_aside(names, count)
    assert sorted(learn + held) == list(range(len(names))) and {names[i] for i in learn}.isdisjoint({names[i] for i in held}) and len(held) >= min(count, len(names))


def test_a_smaller_share_of_pairs_lies_within_a_larger():
    rows = list(range(0, 1000, 3))
    small, large = fewer(rows, 50), fewer(rows, 200)
    assert set(small) < set(large) < set(rows) and len(small) == 50 and small == sorted(small) and fewer(rows, 10_000) == rows == fewer(rows, 0)
    assert max(small) > 500                                # not the first of the table


# Ranks are those of the evaluation

def test_first_ranks_are_those_of_a_sweep():
    random = torch.Generator().manual_seed(0)
    features = Features(torch.nn.functional.normalize(torch.randn(40, 8, generator=random), dim=1), torch.nn.functional.normalize(torch.randn(25, 8, generator=random), dim=1))
    references = torch.randint(0, 40, (25,), generator=random)
    answers = [tuple(i for i in ((r + 1) % 30, (r + 7) % 30) if i != r) for r in references.tolist()]
    benchmark = own_queries([f"words {i}" for i in range(25)], references, answers, ["a"] * 25, 30)
    found, full = first_ranks(features, benchmark, all_composers()), sweep(features, benchmark)
    assert found.keys() == full.keys() and all(torch.equal(found[spec], full[spec].rank) for spec in full)


# Running

def test_a_study_leaves_small_results_and_the_last_models(whole):
    assert {path.name for path in (whole / "out").iterdir()} == NAMES and all(path.stat().st_size < 20_000 for path in (whole / "out").iterdir())
    assert {path.name for path in (whole / "runs").iterdir()} == {"control-0", "control-1", "mix-it-0", "mix-it-1"}
    assert {path.name for path in (whole / "runs" / "mix-it-0").iterdir()} == {"last", "log.jsonl", "done.json", "run.json"}
    record = stored(whole / "out")["mix-it-at-2-1.json"]
    assert record["arm"] == "mix it @ 2" and record["at"] == 2 and record["seed"] == 1 and record["settings"]["hide"] == "mix:0.5" and record["machine"]["threads"] and record["versions"]["torch"]
    assert set(record["ranks"]) == {"image", "text", "sum:1", "sum:2", "product:1"} and record["plain recall"]["pairs"] == 20 and record["last loss"] > 0
    every = stored(whole / "out")
    assert len({json.dumps(every[name]["ranks"]) for name in every}) == 9     # no two models are the same
    assert len({every[name]["fingerprint"] for name in every}) == 1           # all began with the same


def test_nothing_is_done_twice(whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "out").iterdir()}
    said = []
    assert run(read_plan(whole / "plan.toml"), place(whole), say=said.append) == (9, 9)
    assert said == ["9 of 9 results are there"] and before == {path: path.stat().st_mtime_ns for path in (whole / "out").iterdir()}
    assert all(line.startswith("there") for line in listed(read_plan(whole / "plan.toml"), place(whole)))


def test_measuring_on_the_way_changes_nothing_that_follows(whole, tmp_path):
    plan = read_plan(written(tmp_path, TINY.replace("at = [2]\n", "").replace("seeds = [0, 1]", "seeds = [0]")))
    run(plan, place(tmp_path), only=["mix it"], say=quiet)
    assert stored(tmp_path / "out")["mix-it-0.json"]["ranks"] == stored(whole / "out")["mix-it-0.json"]["ranks"]


def test_only_some_arms_and_what_they_are_made_of():
    arms = {"a": Arm("a"), "b": Arm("b"), "c": Arm("c", average=("start", "b"), shares=(0.5, 0.5))}
    plan = replace(read_plan_of(TINY), arms=arms)
    assert [job.folder for job in jobs_of(plan, ["c"], [1])] == ["start", "b-1", "c-1"]
    assert [job.folder for job in jobs_of(plan, ["a"])] == ["a-0", "a-1"]
    assert [job.title for job in jobs_of(plan)][:4] == ["start", "a, seed 0", "b, seed 0", "c, seed 0"]
    with pytest.raises(PliError, match="--only d: the plan has no such arm"): jobs_of(plan, ["d"])
    with pytest.raises(PliError, match="--seeds 7: the plan has the seeds 0, 1"): jobs_of(plan, [], [7])


def read_plan_of(text: str):
    import tempfile
    with tempfile.TemporaryDirectory() as folder: return read_plan(written(Path(folder), text))


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="this system has no such signals")
def test_told_to_end_it_ends_and_begins_no_other_arm(tmp_path):
    "A cluster's wish is no failure of the arm: status 75, a checkpoint, and the arms behind it are left for the same command."
    plan = written(tmp_path, TINY.replace("steps = 4\n", "steps = 100000\n").replace("checkpoint_every = 1\n", "checkpoint_every = 100000\n"))
    began = subprocess.Popen([*COMMAND, *words(plan, tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (tmp_path / "runs" / "control-0" / "run.json").exists(): assert began.poll() is None; time.sleep(0.1)
    time.sleep(1)
    began.terminate()
    _, told = began.communicate(timeout=120)
    assert began.returncode == 75 and "SIGTERM was received" in told and "failed" not in told, told
    assert (tmp_path / "runs" / "control-0" / "checkpoint.safetensors").exists() and not (tmp_path / "runs" / "mix-it-0").exists()


def test_a_wish_that_comes_with_the_last_step_ends_the_study_before_the_next_arm(tmp_path):
    "The run is done and ends as it would; the study has heard it too."
    code = ("import os, signal, sys\nfrom pli.cli.main import main\nimport pli.training.loop as loop\nstep = loop.train_step\n"
            "def last(backbone, optimiser, pixels, captions, number, *rest):\n    done = step(backbone, optimiser, pixels, captions, number, *rest)\n"
            "    if number == 3: os.kill(os.getpid(), signal.SIGTERM)\n    return done\nloop.train_step = last\nsys.exit(main())")
    plan = written(tmp_path, TINY)
    done = subprocess.run([sys.executable, "-c", code, "study", *words(plan, tmp_path)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 75 and "SIGTERM was received: 2 of 7 runs are measured; the same command goes on" in done.stderr, done.stderr
    assert (tmp_path / "out" / "control-0.json").exists() and not (tmp_path / "out" / "mix-it-0.json").exists()


def test_killed_in_the_middle_and_continued_gives_the_same_ranks(whole, tmp_path):
    plan = written(tmp_path, TINY)
    began = subprocess.Popen([*COMMAND, *words(plan, tmp_path)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in began.stdout:
        if "mix it, seed 0: step 3/4" in line: break     # past the step that is measured on the way, before the end
    os.kill(began.pid, signal.SIGKILL)
    began.wait()
    assert not (tmp_path / "out" / "mix-it-0.json").exists()
    if not (tmp_path / "runs" / "mix-it-0.result.lock").exists(): pytest.fail("the lock of a killed process should still lie there")
    done = subprocess.run([*COMMAND, *words(plan, tmp_path)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "mix it, seed 0: continuing at step" in done.stdout and "9 of 9 results are there" in done.stdout
    assert "left" in done.stdout
    mine, theirs = stored(tmp_path / "out"), stored(whole / "out")
    assert mine.keys() == theirs.keys()
    for name in mine: assert mine[name]["ranks"] == theirs[name]["ranks"] and mine[name]["plain recall"] == theirs[name]["plain recall"], name
    assert not list((tmp_path / "runs").glob("*.lock")) and not list(tmp_path.rglob("*.part"))


def test_two_processes_share_the_work(whole, tmp_path):
    text = TINY.replace('start = "pli-tiny-48"', 'start = {model = "pli-tiny-48", steps = 2, batch_size = 16, warmup = 0}')
    plan = written(tmp_path, text)
    both = [subprocess.Popen([*COMMAND, *words(plan, tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0] and [error for _, error in said] == ["", ""]
    names = NAMES - {"start.json"} | {"start-0.json", "start-1.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    made = [re.findall(r"measured(?: at step \d+)?: (\S+)", text) for text, _ in said]
    assert sorted(made[0] + made[1]) == sorted(names - {"queries.json"})           # each result once
    assert any("10 of 10 results are there" in text for text, _ in said) and not list((tmp_path / "runs").glob("*.lock"))
    every = stored(tmp_path / "out")
    assert {(record["fingerprint"], record["seed"]) for record in every.values()} == {(every[f"start-{seed}.json"]["fingerprint"], seed) for seed in (0, 1)}     # a start for each seed
    assert every["start-0.json"]["fingerprint"] != every["start-1.json"]["fingerprint"]
    study = read_results(tmp_path / "out")
    assert study.seeds("start") == [0, 1] and not study.missing and study.common == frozenset() and difference(study, "start")["by seed"].keys() == {0, 1}
    write_study(tmp_path / "out", read_plan(plan))
    assert "A seed changes the start, batches and masks;" in (tmp_path / "out" / "report.md").read_text()
    changed(tmp_path / "out" / "half-1.json", fingerprint=every["start-0.json"]["fingerprint"])
    with pytest.raises(PliError, match="mix-it-1.json: was made with another fingerprint|half-1.json: was made with another fingerprint"): read_results(tmp_path / "out")


def test_a_lock_ends_with_its_process(tmp_path):
    lock = tmp_path / "arm.lock"
    code = f"import sys, time; sys.path.insert(0, '.'); from pathlib import Path; from pli.core import claim_lock\nwith claim_lock(Path({str(lock)!r})) as ours: print(ours, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert other.stdout.readline() == "True\n" and lock_holder(lock) == f"process {other.pid}"
    with claim_lock(lock) as ours: assert not ours
    assert is_locked(lock)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert lock.exists() and not is_locked(lock)            # left behind, nobody holds it
    with claim_lock(lock) as ours: assert ours and lock_holder(lock) == f"process {os.getpid()}"
    assert not lock.exists() and lock_holder(lock) == "another process"


def test_without_posix_locks_one_process_works(tmp_path, monkeypatch):
    import pli.core
    monkeypatch.setattr(pli.core, "fcntl", None)
    lock = tmp_path / "arm.lock"
    with claim_lock(lock) as ours:
        assert ours and is_locked(lock)
        with pytest.raises(PliError, match="need a POSIX system"), claim_lock(lock): pass
    assert not lock.exists() and not is_locked(lock)


def test_all_that_is_held_out_is_measured(tmp_path):
    plan = read_plan(written(tmp_path, TINY.replace("held_out = 20", "held_out = 1100").replace("count = 120", "count = 1300")))
    material = load_study_data(plan, tmp_path, torch.device("cpu"), quiet)
    assert len(material.held_out) >= 1100 and material.most == 1100 and load_study_data(read_plan(written(tmp_path)), tmp_path, torch.device("cpu"), quiet).most == 1000


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    text = TINY.replace("seeds = [0, 1]", "seeds = [0]").replace('[arms."mix it"]', '[arms.wild]\nhide = "none"\nlearning_rate = 1e30\nclip_gradient = 0.0\n[arms."mix it"]')
    with pytest.raises(PliError, match=r"1 of 5 runs failed: wild, seed 0: step \d+: the loss is nan"): run(read_plan(written(tmp_path, text)), place(tmp_path), say=quiet)
    assert {"control-0.json", "mix-it-0.json", "half-0.json"} <= {path.name for path in (tmp_path / "out").iterdir()} and not (tmp_path / "out" / "wild-0.json").exists()


def test_time_left_is_told_from_what_was_measured():
    clock = Clock()
    jobs = [Job(Arm("a", TuneSettings(steps=100)), seed) for seed in (1, 2)]
    assert clock.left(jobs) == "" and clock.left([], ("a", 50, 2.0)) == "; about 2 min left"
    clock.saw({"arm": "a @ 3", "seconds a step": 0.5, "seconds to measure": 10})
    assert clock.left(jobs) == "; about 2 min left" and clock.left(jobs, hands=2) == "; about 60 s left"        # each is measured once
    assert clock.left(jobs[:1]) == "; about 60 s left" and clock.left(jobs[:1], ("a", 30, 0.5)) == "; about 85 s left"
    assert clock.left([Job(Arm("other", TuneSettings(steps=36_000)))]) == "; about 5.0 h left"
    assert clock.left([Job(Arm("mean", average=("start", "a"), shares=(0.5, 0.5)))], ("a", 20, 1.0)) == "; about 30 s left"


# Results that do not belong

@pytest.mark.parametrize("old, new, says", [
    ("steps = 4", "steps = 5", r"control-0.json: was made with steps 4, the plan says 5; remove the file to make it again"),
    ('hide = "mix:0.5"', 'hide = "mix:0.4"', r"mix-it-0.json: was made with hide mix:0.5, the plan says mix:0.4"),
    ("shape = 1,", "shape = 0.5,", r"was made with pairs of the plan .* the plan says .*0.5"),
    ('"sum:1", ', "", "composers"),
    ("held_out = 20", "held_out = 30", "held out 20, the plan says 30"),
    ('start = "pli-tiny-48"', 'start = {model = "pli-tiny-48", seed = 1}', "was made with start pli-tiny-48, the plan says"),
    ('"mix it"]\n', '"mix it"]\nshares = [0.4, 0.6]\n', r"half-0.json: was made with shares \[0.5, 0.5\], the plan says \[0.4, 0.6\]"),
    ("held_out = 20", "held_out = 20\nmost_pairs = 50", "most pairs 0, the plan says 50|pairs digest"),
])
def test_results_of_another_plan_are_neither_used_nor_overwritten(copied, old, new, says):
    assert old in TINY
    plan = read_plan(written(copied, TINY.replace(old, new, 1) if "mix it" not in old else new.join(TINY.rsplit(old, 1))))
    before = stored(copied / "out")
    with pytest.raises(PliError, match=says): run(plan, place(copied), say=quiet)
    with pytest.raises(PliError, match=says): write_study(copied / "out", plan)
    assert stored(copied / "out") == before and not (copied / "runs").exists()


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps({key: value for key, value in (json.loads(path.read_text()) | values | {"sha256": None}).items() if value is not None}))


def spoilt_and_read(path: Path, spoil) -> None:
    "A result that carries its digest, changed in any way."
    text = path.read_text()
    try:
        path.write_text(spoil(text))
        read_result(path)
    finally: path.write_text(text)


def changed_by(path: Path, spoil) -> None:
    "The same change in a result of an older version, without a digest."
    changed(path)
    path.write_text(spoil(path.read_text()))


def test_an_average_is_out_of_date_when_a_model_in_it_is(copied):
    for seed in (0, 1): (copied / "out" / f"mix-it-{seed}.json").unlink()
    for seed in (0, 1): (copied / "out" / f"mix-it-at-2-{seed}.json").unlink()
    plan = read_plan(written(copied, TINY.replace('hide = "mix:0.5"', 'hide = "mix:0.4"')))
    with pytest.raises(PliError, match="half-0.json: was made with hide of mix it mix:0.5, the plan says mix:0.4"): run(plan, place(copied), say=quiet)
    with pytest.raises(PliError, match="half-0.json: was made with hide of mix it"): write_study(copied / "out", plan)
    changed(copied / "out" / "half-0.json", members=None)
    with pytest.raises(PliError, match="half-0.json: was made with .* of mix it None"): run(read_plan(written(copied)), place(copied), say=quiet)


def test_checkpoints_may_be_written_as_often_as_you_like(copied):
    assert run(read_plan(written(copied, TINY.replace("checkpoint_every = 1", "checkpoint_every = 2"))), place(copied), say=quiet) == (9, 9)


def test_settings_that_older_results_do_not_know_have_their_usual_value(copied):
    path = copied / "out" / "control-0.json"
    record = json.loads(path.read_text())
    del record["settings"]["avoid"], record["settings"]["batches"], record["sha256"]
    path.write_text(json.dumps(record))
    assert run(read_plan(copied / "plan.toml"), place(copied), say=quiet) == (9, 9)


def asked(record: dict, precision: str) -> dict: return record["settings"] | {"precision": precision}


def test_a_result_is_compared_by_the_precision_that_it_was_computed_in(copied):
    "A plan that once asked for bf16 and no longer does keeps its rows; one that asks for another does not."
    plan, out = read_plan(copied / "plan.toml"), copied / "out"
    assert {record.get("precision") for name, record in stored(out).items() if not name.startswith(("start", "half"))} == {"fp32"} and stored(out)["half-0.json"]["members"]["mix it"]["precision"] == "fp32"
    for name, record in stored(out).items():                                       # as they were stored when the plan asked for it
        if name.startswith("half"): changed(out / name, members={"mix it": {key: value for key, value in record["members"]["mix it"].items() if key != "precision"} | {"settings": asked(record["members"]["mix it"], "bf16")}})
        elif not name.startswith("start"): changed(out / name, precision=None, settings=asked(record, "bf16"))
    assert run(plan, place(copied), say=quiet) == (9, 9)
    assert precision_line(read_results(out, plan)) == "Computed in bf16, with 1 thread"
    wants = read_plan(written(copied, TINY.replace("warmup = 1", 'warmup = 1\nprecision = "fp32"')))
    with pytest.raises(PliError, match="control-0.json: was made with precision bf16, the plan says fp32"): run(wants, place(copied), say=quiet)
    with pytest.raises(PliError, match="was made with precision.* bf16, the plan says fp32"): read_results(out, wants)
    assert run(read_plan(written(copied, TINY.replace("warmup = 1", 'warmup = 1\nprecision = "bf16"'))), place(copied), say=quiet) == (9, 9)


def test_the_precision_of_a_start_that_a_plan_trains(tmp_path):
    trained = {"model": "pli-tiny-48", "steps": 2, "precision": "bf16"}
    record = {"start": trained, "machine": {"device": "cpu"}}
    check_same(tmp_path, record, {"start": {"model": "pli-tiny-48", "steps": 2}})
    with pytest.raises(PliError, match="was made with precision of the start bf16, the plan says fp32"): check_same(tmp_path, record, {"start": trained | {"precision": "fp32"}})
    with pytest.raises(PliError, match="was made with start"): check_same(tmp_path, record, {"start": trained | {"steps": 3}})
    assert precisions(record | {"machine": {"device": "cuda:0"}, "start": {"model": "x", "steps": 2}}) == {"precision of the start": "bf16"}


def test_a_row_in_another_precision_than_its_control_says_so(copied):
    out = copied / "out"
    for seed in (0, 1): changed(out / f"control-{seed}.json", precision="bf16")
    study = read_results(out, read_plan(copied / "plan.toml"))
    heading, rows = arms_table(study, "all")
    row = next(row for row in rows if row[0] == "mix it")
    assert row[4].endswith(" (fp32; control in bf16)") and precision_line(study) == "Computed in fp32; in bf16: control, with 1 thread"
    changed(out / "mix-it-0.json", precision="bf16")                               # one of two seeds is enough
    study = read_results(out, read_plan(copied / "plan.toml"))
    assert next(row for row in arms_table(study, "all")[1] if row[0] == "mix it")[4].endswith(" (fp32; control in bf16)")
    write_study(out, read_plan(copied / "plan.toml"))
    assert "*Computed in fp32; in bf16: control; in bf16+fp32: mix it, with 1 thread.*" in (out / "report.md").read_text()


def test_threads_and_precision_that_differ_from_what_is_stored_are_told(copied, whole):
    plan, out, said = read_plan(copied / "plan.toml"), copied / "out", []
    for name, record in stored(out).items(): changed(out / name, machine=record["machine"] | {"threads": 3})
    for seed in (0, 1): changed(out / f"control-{seed}.json", precision="bf16")
    for name in ("half-0", "mix-it-0", "mix-it-at-2-0"): (out / f"{name}.json").unlink()
    assert run(plan, place(copied), only=["mix it"], seeds=[0], say=said.append) == (2, 2)
    assert any(line.startswith("stored results were computed with 3 threads, this process has 1: ranks can differ") for line in said)
    assert any("another precision than the control: mix it, seed 0 (fp32; control is stored in bf16)" in line for line in said)
    shutil.copytree(whole / "runs", copied / "runs", dirs_exist_ok=True)
    assert run(plan, place(copied), say=said.append) == (9, 9) and any(line.startswith("these results were computed with 1 and 3 threads") for line in said)
    said.clear()
    run(plan, place(copied), say=said.append)
    assert said == ["9 of 9 results are there"]                                    # nothing is computed any more


def test_a_result_from_before_pictures_were_compared(copied):
    "Where no picture is there twice, nothing was ever a false negative, and the row stays."
    path, plan = copied / "out" / "control-0.json", copied / "plan.toml"
    record = json.loads(path.read_text())
    made = {"settings": {key: value for key, value in record["settings"].items() if key != "ignore_same_picture"}}
    now = {"settings": made["settings"] | {"ignore_same_picture": True}}
    with pytest.raises(PliError, match="was made with ignore_same_picture False, the plan says True"): check_same(path, made, now)
    check_same(path, made | {"pictures twice": 0}, now)
    with pytest.raises(PliError, match="ignore_same_picture"): check_same(path, made | {"pictures twice": 1}, now)


@pytest.mark.parametrize("spoil, says", [
    (lambda text: text[:300], "not valid JSON"), (lambda text: "[]", "is no result of a study; remove the file"), (lambda text: text.replace('"ranks"', '"rank"'), "is no result of a study"),
    (lambda text: re.sub(r'("sum:1": ".{8}).', r"\1", text), "stored ranks"), (lambda text: re.sub(r'"fingerprint": ".', '"fingerprint": "x', text), "fingerprint"),
    (lambda text: re.sub(r'"queries digest": ".', '"queries digest": "x', text), "queries digest"), (lambda text: re.sub(r'"pairs digest": ".', '"pairs digest": "x', text), "pairs digest")])
def test_torn_and_foreign_results_are_named(copied, spoil, says):
    path = copied / "out" / "control-1.json"
    assert "remove the file to make it again" in str(pytest.raises(PliError, spoilt_and_read, path, spoil).value)
    changed_by(path, spoil)
    with pytest.raises(PliError, match=f"control-1.json: .*{says}"): run(read_plan(copied / "plan.toml"), place(copied), say=quiet)
    with pytest.raises(PliError, match="control-1.json.*" if "ranks" not in says else says): write_study(copied / "out", read_plan(copied / "plan.toml"))


def test_a_folder_of_other_queries_is_refused(copied):
    for path in (copied / "out").glob("*-*.json"): path.unlink()
    (copied / "out" / "start.json").unlink()
    plan = read_plan(written(copied, TINY.replace("queries = 60", "queries = 64")))
    with pytest.raises(PliError, match="queries.json: the results in this folder are about other queries"): run(plan, place(copied), say=quiet)


def test_a_model_that_an_average_needs_and_nobody_has_any_more(copied):
    (copied / "out" / "half-0.json").unlink()
    with pytest.raises(PliError, match="half, seed 0 needs the model of mix it, seed 0, and .*last is gone"): run(read_plan(copied / "plan.toml"), place(copied), say=quiet)


@pytest.fixture
def with_runs(copied, whole) -> Path:
    shutil.copytree(whole / "runs", copied / "runs")
    return copied


def test_a_run_whose_model_is_there_is_measured_and_not_trained(with_runs, monkeypatch):
    import pli.studies.results
    def never(*args): raise AssertionError("trained")
    monkeypatch.setattr(pli.studies.results, "tune", never)
    plan, before, said = read_plan(with_runs / "plan.toml"), stored(with_runs / "out"), []
    for name in ("control-1", "mix-it-0"): (with_runs / "out" / f"{name}.json").unlink()
    assert run(plan, place(with_runs), say=said.append) == (9, 9) and sum("is trained already" in line for line in said) == 2
    after = stored(with_runs / "out")
    for name in before: assert all(after[name].get(key) == before[name].get(key) for key in ("ranks", "plain recall", "plain ranks", "last loss", "settings", "fingerprint", "pairs digest")), name
    record = json.loads((with_runs / "runs" / "control-0" / "run.json").read_text())
    (with_runs / "out" / "control-0.json").unlink()
    for spoilt in ({"start": "x"}, {"pairs digest": "x"}, {"bf16": True}, {"settings": record["settings"] | {"steps": 3}}, {"settings": record["settings"] | {"seed": 1}}):      # another run's model
        changed(with_runs / "runs" / "control-0" / "run.json", **record | spoilt)
        with pytest.raises(AssertionError, match="trained"): run(plan, place(with_runs), say=quiet)
    changed(with_runs / "runs" / "control-0" / "run.json", **record)
    (with_runs / "runs" / "control-0" / "log.jsonl").write_text("")
    with pytest.raises(AssertionError, match="trained"): run(plan, place(with_runs), say=quiet)


def test_more_composers_are_measured_later(with_runs, tmp_path):
    text = TINY.replace("at = [2]\n", "")
    for seed in (0, 1): (with_runs / "out" / f"mix-it-at-2-{seed}.json").unlink()
    before, plan = stored(with_runs / "out"), read_plan(written(with_runs, text.replace('"sum:2", ', '"sum:2", "harris:1", "product:2", ')))
    said = []
    assert run(plan, place(with_runs), say=said.append) == (7, 7) and sum("with harris:1, product:2" in line for line in said) == 7
    after = stored(with_runs / "out")
    for name in before:
        assert list(after[name]["ranks"]) == list(plan.composers) == after[name]["composers"] and {spec: after[name]["ranks"][spec] for spec in before[name]["ranks"]} == before[name]["ranks"]
        assert after[name]["plain recall"] == before[name]["plain recall"] and after[name]["added later"][0]["composers"] == ["harris:1", "product:2"]
    again = place(tmp_path / "again")
    run(replace(plan, arms={"control": plan.arms["control"]}), again, seeds=[0], say=quiet)
    assert stored(again.out)["control-0.json"]["ranks"] == after["control-0.json"]["ranks"]
    assert run(plan, place(with_runs), say=said.append) == (7, 7)
    write_study(with_runs / "out", plan)
    with pytest.raises(PliError, match="was made with composers"): run(read_plan(written(with_runs, text)), place(with_runs), say=quiet)      # fewer


def test_more_composers_need_the_model(with_runs):
    plan = read_plan(written(with_runs, TINY.replace('"sum:2", ', '"sum:2", "harris:1", ')))
    with pytest.raises(PliError, match="mix-it-at-2-0.json: was made without harris:1, and models on the way are not kept; remove the file"): run(plan, place(with_runs), say=quiet)
    shutil.rmtree(with_runs / "runs" / "control-0")
    with pytest.raises(PliError, match="control-0.json: was made without harris:1; .* needs the model of control, seed 0, and .*control-0/last is gone"): run(plan, place(with_runs), say=quiet)


def test_an_average_over_seeds(with_runs):
    text = TINY + '[arms.soup]\naverage = ["mix it"]\nover_seeds = true\n[arms."cold soup"]\naverage = ["start", "mix it"]\nshares = [0.25, 0.75]\nover_seeds = true\n'
    plan = read_plan(written(with_runs, text))
    assert [job.folder for job in jobs_of(plan)][-3:] == ["half-1", "soup", "cold-soup"] and [job.folder for job in jobs_of(plan, ["soup"], [1])] == ["mix-it-1", "soup"]
    assert run(plan, place(with_runs), say=quiet) == (11, 11) and listed(plan, place(with_runs))[-1] == "there    cold soup"
    material = load_study_data(plan, with_runs, torch.device("cpu"), quiet)
    models = [load_backbone(with_runs / "runs" / f"mix-it-{seed}" / "last") for seed in (0, 1)]
    for name, wanted in {"soup": average(models), "cold soup": average([material.start(None), *models], [0.25, 0.375, 0.375])}.items():
        found = model_of(plan, Job(plan.arms[name]), material, with_runs / "runs", torch.device("cpu"))
        for key, value in wanted.model.state_dict().items(): assert torch.allclose(found.model.state_dict()[key], value, atol=1e-7)
    record = json.loads((with_runs / "out" / "soup.json").read_text())
    assert record["seeds"] == [0, 1] and record["members"].keys() == {"mix it"} and record["ranks"] not in [json.loads((with_runs / "out" / f"mix-it-{seed}.json").read_text())["ranks"] for seed in (0, 1)]
    for study in (read_results(with_runs / "out"), read_results(with_runs / "out", plan)):
        assert study.common == {"start", "soup", "cold soup"} and not study.missing
        assert difference(study, "soup")["by seed"].keys() == {0, 1} == difference(study, "mix it", "soup")["by seed"].keys() and difference(study, "soup", "start")["by seed"].keys() == {0}
        one = solved_share(study, "soup", "all").mean() - solved_share(study, "control", "all").mean()
        assert difference(study, "soup")["difference"][0] == pytest.approx(100 * one.item(), abs=0.01)
    write_study(with_runs / "out", plan)
    with pytest.raises(PliError, match=r"soup.json: was made with seeds \[0, 1\], the plan says \[0\]"): run(read_plan(written(with_runs, text.replace("seeds = [0, 1]", "seeds = [0]"))), place(with_runs), say=quiet)


def test_plain_recall_is_compared_by_its_ranks(copied):
    heading, rows = plain_table(read_results(copied / "out"))
    assert heading[3] == "words find picture R@10 minus control" and rows[1][3] == "" and re.fullmatch(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", rows[2][3])
    study = read_results(copied / "out")
    record = study.results["mix it"][0]
    assert 100 * recall_at(unpacked(record["plain ranks"]["text to picture"]["ranks"], record["plain ranks"]["text to picture"]["count"]), 10).double().mean().item() == pytest.approx(record["plain recall"]["text to picture"]["recall@10"], abs=1e-3)
    changed(copied / "out" / "mix-it-0.json", **{"plain ranks": None})              # as results were stored before
    one = plain_difference(read_results(copied / "out"), "mix it", "text to picture")     # what the other seed says
    hits = [recall_at(unpacked(study.results[arm][1]["plain ranks"]["text to picture"]["ranks"], study.results[arm][1]["plain ranks"]["text to picture"]["count"]), 10).double().mean().item() for arm in ("mix it", "control")]
    assert one[0] == pytest.approx(100 * (hits[0] - hits[1]), abs=1e-3)
    changed(copied / "out" / "mix-it-1.json", **{"plain ranks": None})
    rows = plain_table(read_results(copied / "out"))[1]
    assert rows[2][1] != "-" and rows[2][3] == "-" and rows[0][3] != "-"
    write_study(copied / "out")
    assert "remembers them: compare with *control*" in (copied / "out" / "report.md").read_text()


def test_results_know_the_code_that_made_them(copied):
    record = stored(copied / "out")["control-0.json"]
    assert record["code"] == code_digest() and "1 version of the code" in provenance_lines(read_results(copied / "out"))
    changed(copied / "out" / "control-0.json", code="0123")
    changed(copied / "out" / "control-1.json", code=None)
    assert "2 versions of the code; some results do not say which" in provenance_lines(read_results(copied / "out"))
    changed(copied / "out" / "control-0.json", code="0123+4567")
    assert "2 versions of the code, 1 of methods that other packages bring; some results do not say which" in provenance_lines(read_results(copied / "out"))


def test_a_map_calls_significant_only_where_seeds_agree(whole, monkeypatch):
    import pli.studies.page
    seen = {}
    monkeypatch.setattr(pli.studies.page, "gain_map", lambda *args, **more: seen.update(more))
    study = read_results(whole / "out")
    draw_figure(study, {"kind": "heatmap", "arms": ["mix it", "half"], "kinds": ["all", "colour"]})
    assert seen["significant"] == [[difference(study, arm, "control", kind)["significant"] for kind in ("all", "colour")] for arm in ("mix it", "half")]


def test_pictures_are_not_kept_by_every_worker(whole, monkeypatch):
    import pli.studies.run
    for workers in (0, 2):
        material = load_study_data(read_plan(whole / "plan.toml"), whole, torch.device("cpu"), quiet)
        material.kept = {}
        monkeypatch.setattr(pli.studies.run, "load_study_data", lambda *args: material)
        run(read_plan(whole / "plan.toml"), replace(place(whole), workers=workers), say=quiet)
        assert (material.kept is None) == bool(workers)


def test_kinds_of_a_figure_are_checked_before_anything_runs(tmp_path):
    plan = read_plan(written(tmp_path, TINY + '\n[[figures]]\nkind = "bars"\nkinds = ["taste"]\n'))
    with pytest.raises(PliError, match="figure 1: no queries of kind 'taste'"): run(plan, place(tmp_path), say=quiet)
    assert not (tmp_path / "runs").exists()


# Reading back

def test_numbers_are_those_of_the_evaluation(whole):
    "Composers chosen by halves, recall, differences: the same as from a benchmark at hand."
    plan = read_plan(whole / "plan.toml")
    study, material = read_results(whole / "out"), load_study_data(plan, whole, torch.device("cpu"), quiet)
    assert torch.equal(study.first, fold_of(material.benchmark)) and study.arms == tuple(plan.names()) and not study.missing and study.seeds("control") == [0, 1] and study.seeds("start") == [0]
    for kind in (None, "colour"):
        found, specs = cross_fitted({spec: as_query_ranks(ranks) for spec, ranks in study.ranks("mix it", 1).items()}, material.benchmark, kind)
        assert torch.equal(cross_fitted_ranks(study, "mix it", 1, kind or "all")[0], found.rank) and cross_fitted_ranks(study, "mix it", 1, kind or "all")[1] == specs
    rows = study.kinds["colour"]
    shares = {arm: torch.stack([recall_at(cross_fitted_ranks(study, arm, seed, "colour")[0], 10)[rows] for seed in (0, 1)]).double().mean(0) for arm in ("mix it", "control")}
    wanted = paired_bootstrap(shares["mix it"], shares["control"])
    assert difference(study, "mix it", kind="colour")["difference"] == [round(100 * value, 2) for value in wanted] and difference(study, "mix it", kind="colour")["seeds"] == 2
    assert recall_of(study, "mix it", "colour")["mean"][0] == pytest.approx(100 * shares["mix it"].mean().item(), abs=0.01)
    assert difference(study, "mix it", against="mix it")["difference"] == [0, 0, 0]
    assert solved_share(study, "start", "all", family="text").mean().item() * 100 == pytest.approx(baselines_of(study, "start", "all")["text only"], abs=0.01)


def test_what_is_missing_is_left_out_and_said(copied):
    (copied / "out" / "mix-it-1.json").unlink()
    for seed in (0, 1): (copied / "out" / f"half-{seed}.json").unlink()
    study = read_results(copied / "out")
    assert study.missing == ("mix it, seed 1", "half, seed 0", "half, seed 1") and "half" not in study.arms and difference(study, "mix it")["seeds"] == 1
    write_study(copied / "out")
    page = (copied / "out" / "report.md").read_text()
    assert "Not there yet" in page and "half, seed 1" in page and "| half |" not in page
    with pytest.raises(PliError, match="no results of arm 'half'"): difference(study, "half")
    with pytest.raises(PliError, match="no queries of kind 'taste'"): difference(study, "mix it", kind="taste")


def test_a_report_without_the_control_and_of_nothing(copied):
    for seed in (0, 1): (copied / "out" / f"control-{seed}.json").unlink()
    write_study(copied / "out")
    assert "| mix it |" in (copied / "out" / "report.md").read_text()
    for path in (copied / "out").glob("*-*.json"): path.unlink()
    (copied / "out" / "start.json").unlink()
    with pytest.raises(PliError, match="holds no results of this study yet"): read_results(copied / "out")
    with pytest.raises(PliError, match="queries.json: no such file"): read_results(copied)


def test_arms_without_a_common_seed_are_not_compared(copied):
    (copied / "out" / "mix-it-1.json").unlink()
    (copied / "out" / "control-0.json").unlink()
    study = read_results(copied / "out")
    with pytest.raises(PliError, match=r"have no seed in common: \[0\] and \[1\]"): difference(study, "mix it")
    rows = {row[0]: row for row in arms_table(study)[1]}
    assert rows["mix it"][1] == "1 (0 shared)" and rows["mix it"][4:7] == ["-"] * 3 and rows["half"][1] == "2 (1 shared)" and rows["control"][1] == "1"
    assert difference(study, "half")["by seed"].keys() == {1} and difference(study, "start")["by seed"].keys() == {1}       # the start is there for all seeds
    write_study(copied / "out")


def test_only_what_learned_alike_is_compared(copied):
    plan = written(copied, TINY.replace("at = [2]", 'at = [2]\ncontrol = "half"'))
    for seed in (0, 1):
        record = json.loads((copied / "out" / f"control-{seed}.json").read_text())
        changed(copied / "out" / f"control-{seed}.json", settings=record["settings"] | {"learning_rate": 2e-3})
    study = read_results(copied / "out")
    assert [compared_with(study, arm) for arm in study.arms] == ["control", None, None, None, None]      # the start has learned nothing, all others at another rate
    with pytest.raises(PliError, match="'half' has nothing to be compared with"): difference(study, "half")
    study.controls["mix it"] = "half"
    assert compared_with(study, "mix it") == "half" and compared_with(study, "mix it @ 2") is None and difference(study, "mix it")["against"] == "half"
    assert {row[0]: row[4] for row in arms_table(study)[1]}["half"] == "-" and "over half" in {row[0]: row[4] for row in arms_table(study)[1]}["mix it"]
    write_study(copied / "out")
    assert "**No gain is given** for" in (copied / "out" / "report.md").read_text() and ": mix it; mix it @ 2; half." in (copied / "out" / "report.md").read_text()
    assert read_plan(plan).controls() == {"mix it": "half"}
    for key, value in {"steps": 5, "batch_size": 8, "learning_rate": 1.0}.items():
        assert how_it_learned({"settings": {}}) != how_it_learned({"settings": {key: value}})
    assert how_it_learned({"settings": {}}) != how_it_learned({"settings": {}, "most pairs": 9}) and how_it_learned({"settings": {}}) != how_it_learned({"settings": {}, "at": 3}) and how_it_learned({}) == set()


def test_an_arm_on_the_way_is_compared_with_the_control_at_that_step(whole):
    study = read_results(whole / "out")
    assert compared_with(study, "mix it") == "control" and compared_with(study, "mix it @ 2") is None and compared_with(study, "half") == "control" and compared_with(study, "control") is None
    study.control = "mix it"
    assert compared_with(study, "control") == "mix it" and compared_with(study, "mix it @ 2") is None and compared_with(study, "half") == "mix it"
    study.control = "start"
    assert compared_with(study, "mix it @ 2") == "start" == compared_with(study, "half")


@pytest.mark.parametrize("difference, by_seed, wanted", [([2, 1, 3], [1, 3], True), ([2, 1, 3], [4, -0.1], False), ([2, 1, 3], [2, 0], False), ([2, 0, 3], [2, 2], False), ([-2, -3, -1], [-1, -3], True), ([-2, -3, -1], [-1, 1], False), ([-2, -3, -1], [-1], False)])
def test_a_difference_is_significant_when_interval_and_seeds_agree(difference, by_seed, wanted): assert significant(difference, by_seed) is wanted


def test_a_figure_that_cannot_be_drawn_leaves_the_tables(copied, monkeypatch):
    import pli.studies.page
    def fail(*args): raise PliError("no ink")
    monkeypatch.setattr(pli.studies.page, "draw_figure", fail)
    with pytest.raises(PliError, match=r"report.md: written, but 1 of 1 figures cannot be drawn: figure 1: no ink"): write_study(copied / "out")
    assert "| mix it |" in (copied / "out" / "report.md").read_text() and (copied / "out" / "report.json").exists()


FIGURES = """
[[figures]]
kind = "heatmap"
title = "What gains"
[[figures]]
kind = "lines"
title = "Steps"
arms = ["mix it @ 2", "mix it"]
x = [2, 4]
xlabel = "steps"
kinds = ["colour", "shape"]
[[figures]]
kind = "lines"
series = {mixed = ["mix it @ 2", "mix it"], mean = ["half", "half"]}
x = [1, 10]
logx = true
show = "recall"
kinds = ["all"]
against = "start"
[[figures]]
kind = "bars"
arms = ["start", "mix it"]
measure = "recall@1"
against = "start"
"""


def test_the_command_reports_from_files_alone(copied):
    "No model, no picture, no pairs: the data folder does not exist."
    plan = written(copied, TINY + FIGURES)
    code = "import sys; from pli.cli.main import main; import pli.studies.run as a, pli.studies.results as b, pli.studies.plan as c; a.load_study_data = a.tune = b.tune = b.load_backbone = c.load_backbone = None; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "study", *words(plan, copied, "--report", "--data", str(copied / "nowhere"))], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    names = [Path(line).name for line in done.stdout.split()]
    assert names == ["figure-1-what-gains.png", "figure-2-steps.png", "figure-3-lines.png", "figure-4-bars.png", "report.json", "report.md"] and not (copied / "runs").exists()
    for name in names[:4]: Image.open(copied / "out" / name).load()
    record, page = json.loads((copied / "out" / "report.json").read_text()), (copied / "out" / "report.md").read_text()
    assert set(record["kinds"]) == {"all", "colour", "shape", "both", "keep"} and record["kinds"]["colour"]["arms"]["mix it"]["gain"]["recall@10"]["against"] == "control"
    assert page.count("| mix it @ 2 |") == 3 * 5 + 1 and "![What gains](figure-1-what-gains.png)" in page and "5 % " not in page.replace("95 % ", "")
    again = {path.name: path.read_bytes() for path in (copied / "out").iterdir()}
    assert main(["study", *words(plan, copied, "--report")]) == 0
    assert again == {path.name: path.read_bytes() for path in (copied / "out").iterdir()}


def test_tables_have_a_row_for_each_arm(whole):
    study = read_results(whole / "out")
    heading, rows = arms_table(study, "colour")
    assert [row[0] for row in rows] == ["start", "control", "mix it", "mix it @ 2", "half"] and all(len(row) == len(heading) for row in rows) and rows[1][4:7] == ["", "", ""] and re.fullmatch(r"[+-][\d.]+ / [+-][\d.]+", rows[2][5])
    heading, rows = plain_table(study)
    assert all(len(row) == len(heading) for row in rows) and rows[0][1] != "-"


# The command

def test_levels_stand_side_by_side(whole):
    study = read_results(whole / "out")
    heading, rows = recall_table(study, [("colour", "recall@1"), ("all", "recall@10")], ["half", "control"])
    assert heading == ["recall, percent", "colour R@1", "all R@10"] and [row[0] for row in rows] == ["half", "control"]
    mean, low, high = recall_of(study, "half", "colour", "recall@1")["mean"]
    assert rows[0][1] == f"{mean:.1f} [{low:.1f}, {high:.1f}]"
    assert [row[0] for row in recall_table(study, [("all", "recall@10")])[1]] == list(study.arms)


def test_hours_count_every_run_once(copied):
    "An arm that was measured on the way was trained once."
    folder = copied / "out"
    for path in folder.glob("*-*.json"): changed(path, **{"seconds to measure": 1800, "seconds a step": None})
    changed(folder / "start.json", **{"seconds to measure": 0})
    before = hours_of(read_results(folder))
    for name in ("mix-it-0.json", "mix-it-at-2-0.json"): changed(folder / name, **{"seconds a step": 900})
    assert before == pytest.approx(0.5 * len(list(folder.glob("*-*.json")))) and hours_of(read_results(folder)) - before == pytest.approx(4 * 900 / 3600)


def test_an_arm_can_be_made_without_its_plan():
    "What the command says are the very settings of the result."
    folder = ROOT / "results" / "study" / "shop-longer"
    study = read_results(folder)
    for arm, seed in [("control", 0), ("random 0.75", 2), ("mixture", 1)]:
        typed = shlex.split(command_for_arm(study, arm, seed))
        args = make_parser().parse_args(typed[1:])
        assert tune_settings(args) == replace(TuneSettings(**study.results[arm][seed]["settings"]), seed=seed, checkpoint_every=100) and (args.pairs, args.model, args.out) == (["shop/pairs.csv"], "shop/base", f"{slug(arm)}-{seed}")
    args = make_parser().parse_args(shlex.split(command_for_arm(study, "mixture, a third of the start"))[1:])
    assert args.models == ["shop/base", "mixture-0/last"] and args.shares == [0.34, 0.66]
    args = make_parser().parse_args(shlex.split(command_for_arm(study, "mixture, soup of all seeds"))[1:])
    assert args.models == [f"mixture-{seed}/last" for seed in range(3)] and args.shares is None
    assert command_for_arm(study, "start") is None and command_for_arm(study, "control @ 100") is None


def test_a_drawn_world_has_no_command_of_its_own():
    study = read_results(ROOT / "results" / "study" / "quick")
    assert not any(command_for_arm(study, arm) for arm in study.arms)


def test_bars_are_significant_only_where_seeds_agree(whole, monkeypatch):
    import pli.studies.page
    seen = []
    monkeypatch.setattr(pli.studies.page, "gain_bars", lambda *args, **more: seen.append(more["significant"]))
    study = read_results(whole / "out")
    for show in ("gain", "recall"): draw_figure(study, {"kind": "bars", "arms": ["mix it", "half"], "kinds": ["colour"], "show": show})
    assert seen == [{"colour": [difference(study, arm, "control", "colour")["significant"] for arm in ("mix it", "half")]}, None]


def test_the_command_lists_and_refuses(whole, tmp_path, capsys):
    plan = written(tmp_path)
    assert main(["study", *words(plan, tmp_path, "--list", "--seeds", "1")]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["missing  start", "missing  control, seed 1", "missing  mix it, seed 1"]
    assert main(["study", *words(plan, tmp_path, "--only", "nobody")]) == 1
    assert capsys.readouterr().err.startswith("pli study: --only nobody: the plan has no such arm")
    assert main(["study", *words(plan, tmp_path, "--report")]) == 1
    assert "queries.json: no such file" in capsys.readouterr().err
    assert main(["study", *words(whole / "plan.toml", whole)]) == 0 and "9 of 9 results are there" in capsys.readouterr().out


@pytest.mark.parametrize("name, wanted", [("recolour + masking", "recolour-masking"), ("ARM @ 50", "arm-at-50"), ("../..", ""), ("Zoë 0.5", "zo-0.5")])
def test_names_become_parts_of_file_names(name, wanted): assert slug(name) == wanted


def test_stops_know_where_they_are(tmp_path):
    class Model:
        def save(self, folder): Path(folder).mkdir()
    stops = Stops(tmp_path, (4, 6), 9)
    assert stops.every == 1 and Stops(tmp_path, (4, 6), 12).every == 2
    for _ in range(9): stops(Model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-4", "at-6"]


# Two features a picture

def two_features(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "tools" / "two_features.py"), *map(str, words), "--device", "cpu"], capture_output=True, text=True, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})


def test_two_features_a_picture_are_measured_from_a_studys_models(whole, tmp_path):
    "What a tuned model's queries find on its own features is what the study has measured."
    given_ = ("--data", whole, "--runs", whole / "runs")
    done = two_features(whole / "plan.toml", *given_, "--arms", "mix it", "--out", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "two.json").read_text())
    study = read_results(whole / "out", read_plan(whole / "plan.toml"))
    assert set(record["arms"]) == {"mix it"} and set(record["arms"]["mix it"]) == {"0", "1"}
    for name, values in record["arms"]["mix it"].items():
        ranks = unpacked(stored(whole / "out")[f"mix-it-{name}.json"]["ranks"]["sum:1"], 60)
        kinds = study.grouping.sections()
        for kind, found in values.items(): assert found["tuned"][0] == pytest.approx(100 * (ranks[kinds[kind]] <= 10).double().mean().item(), abs=0.01)
    wrong = {"half": "only an arm that is trained has models", "start": "only an arm that is trained has models"}
    for arm, says in wrong.items():
        done = two_features(whole / "plan.toml", *given_, "--arms", arm)
        assert done.returncode == 1 and done.stderr.startswith("two_features: ") and says in done.stderr and done.stderr.count("\n") == 1
    other = written(tmp_path, TINY.replace("mix:0.5", "mix:0.6"))
    done = two_features(other, *given_, "--arms", "mix it")
    assert done.returncode == 1 and "is no finished run of mix it, seed 0 as the plan has it" in done.stderr


@pytest.mark.parametrize("machine", [{}, {"processor": 3}])
def test_a_result_that_does_not_say_where_it_was_made_is_still_shown(whole, machine):
    study = read_results(whole / "out", read_plan(whole / "plan.toml"))
    changed = {arm: {seed: {**record, "machine": machine, "versions": machine} for seed, record in own.items()} for arm, own in study.results.items()}
    assert "not named" in provenance_lines(replace(study, results=changed))[1] and "not named" not in " ".join(provenance_lines(study))


@pytest.mark.parametrize("key, value", [("machine", 5), ("machine", "a"), ("versions", None), ("date", 3)])
def test_a_result_whose_record_is_of_another_kind_is_none(copied, key, value):
    path = copied / "out" / "control-0.json"
    record = {name: each for name, each in json.loads(path.read_text()).items() if name != "sha256"}
    write_json(path, sealed(record))
    assert read_result(path)["arm"] == "control"
    write_json(path, sealed(record | {key: value}))
    with pytest.raises(PliError, match="control-0.json: is no result of a study"): read_result(path)

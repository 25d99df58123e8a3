"The `pli` command as a person meets it: real processes, one line for every mistake, runs that survive being killed."
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pli import __version__, world
from pli.cli import options, tune
from pli.backbones.loading import load_backbone
from pli.cli.main import main, make_parser, without_folders
from pli.cli.options import tune_options
from pli.cli.tune import tune_settings
from pli.cli.evaluate import wanted_composers
from pli.core import PliError, rng_for
from pli.benchmarks.own import read_queries
from pli.evaluation.ranks import all_composers
from pli.evaluation.report import decode_ranks
from pli.evaluation.validation import query_validator
from pli.evaluation.writers import report_rows
from pli.settings import setting
from pli.settings import TuneSettings

START = [sys.executable, "-c", "from pli.cli.main import main; import sys; sys.exit(main())"]
COMMANDS = ("demo", "tune", "evaluate", "compare", "submit", "score", "cache", "mask")
HEAVY = {"torch", "open_clip", "torchvision", "matplotlib", "numpy", "PIL", "fastprogress"}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}          # beside that of the tests


def pli(*words, cwd=None) -> subprocess.CompletedProcess:
    "One command in a process of its own."
    return subprocess.run([*START, *map(str, words)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=300)


MANY = """
import contextlib, io, json, os, sys
from pli.cli.main import main
done = []
for where, words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    os.chdir(where)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = main(words)
        except SystemExit as end: status = end.code
        except BaseException: import traceback; traceback.print_exc(); status = "traceback"
    done.append([status, out.getvalue(), err.getvalue()])
json.dump(done, sys.stdout)
"""


def many(cases: list[tuple[Path, list]]) -> list[tuple]:
    "Several commands one after the other in one process, each in its folder: `import torch` is paid once. Status, output, errors."
    words = json.dumps([(str(where), [str(word) for word in words]) for where, words in cases])
    done = subprocess.run([sys.executable, "-c", MANY], input=words, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    "A small world as files."
    folder = world.save_world(tmp_path_factory.mktemp("world") / "world", pairs=60, queries=24, gallery_size=80)
    shutil.copy(folder / "gallery.json", folder.parent)                   # the same names, and no pictures beside it
    return folder


TINY = ["--model", "pli-tiny-48", "--device", "cpu"]
FEW = [*TINY, "--steps", "3", "--batch-size", "16", "--learning-rate", "1e-3", "--warmup", "1", "--held-out", "0.1"]


# --- help, version, and what they cost

@pytest.mark.parametrize("words", [["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)])
def test_answers_come_without_torch(words):
    code = f"import atexit, sys; atexit.register(lambda: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))\nfrom pli.cli.main import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]" and done.stdout
    if words == ["--version"]: assert done.stdout.strip() == f"pli {__version__}"
    elif len(words) < 2: assert all(command in done.stdout for command in COMMANDS)
    else: assert done.stdout.startswith(f"usage: pli {words[0]}")


@pytest.mark.parametrize("words, says", [
    (["frobnicate"], "pli: argument COMMAND: invalid choice: 'frobnicate'"),
    (["--frobnicate"], "pli: unrecognized arguments: --frobnicate"),
    (["tune", "--out", "run", "--model", "ViT-B-32"], "pli tune: the following arguments are required: PAIRS"),
    (["tune", "pairs.csv", "--out", "run"], "pli tune: one of the arguments --prolong --model is required"),
    (["tune", "pairs.csv", "--out", "run", "--model", "ViT-B-32", "--prolong", "other"], "pli tune: argument --prolong: not allowed with argument --model"),
    (["tune", "pairs.csv", "--model", "ViT-B-32"], "pli tune: the following arguments are required: --out"),
    (["tune", "pairs.csv", "--model", "ViT-B-32", "--out", "run", "--steps", "many"], "pli tune: argument --steps: invalid int value: 'many'"),
    (["tune", "pairs.csv", "--model", "ViT-B-32", "--out", "run", "--learning-rate", "small"], "pli tune: argument --learning-rate: invalid float value: 'small'"),
    (["evaluate", "--queries", "q.json", "--gallery", "g.json"], "pli evaluate: the following arguments are required: --model"),
    (["evaluate", "--model", "ViT-B-32", "--benchmark", "cir"], "pli evaluate: argument --benchmark: invalid choice: 'cir'"),
    (["submit", "fashioniq", "--model", "ViT-B-32", "--out", "x"], "pli submit: argument benchmark: invalid choice: 'fashioniq'"),
    (["compare", "a.json"], "pli compare: the following arguments are required: B.json"),
    (["evaluate", "--model", "ViT-B-32", "--queries", "q.json", "--gallery", "g.json", "--workers", "-1"], "pli evaluate: argument --workers: '-1' is not a number"),
    (["mask", "a.png"], "pli mask: the following arguments are required: --out"),
    (["mask", "--out", "a.png"], "pli mask: the following arguments are required: PICTURE"),
    (["demo", "--seed", "x"], "pli demo: argument --seed: invalid int value: 'x'"),
])
def test_a_mistyped_option_costs_a_line(words, says, tmp_path):
    done = pli(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(says) and done.stderr.count("\n") == 1
    assert "--help" in done.stderr and not files(tmp_path)


# --- options and settings cannot drift apart

def test_every_setting_has_its_option():
    options = tune_options()
    assert [item.name for item in options.values()] == [field.name for field in dataclasses.fields(TuneSettings)]
    assert {"--one-way", "--keep-false-negatives", "--clip-weight"} <= set(options) and all(item.metadata["help"] for item in options.values())
    told = make_parser()._subparsers._group_actions[0].choices["tune"].format_help()
    assert all(option in told for option in options)
    assert tune_settings(make_parser().parse_args(["tune", "pairs.csv", "--model", "m", "--out", "o"])) == TuneSettings()


def test_a_setting_that_is_added_is_an_option_at_once(monkeypatch):
    more = dataclasses.make_dataclass("More", [("dropout", float, setting(0.25, "how much to drop"))], bases=(TuneSettings,), frozen=True)
    for module in (options, tune): monkeypatch.setattr(module, "TuneSettings", more)
    args = make_parser().parse_args(["tune", "pairs.csv", "--model", "m", "--out", "o", "--dropout", "0.5"])
    assert tune_settings(args).dropout == 0.5 and "how much to drop (default: 0.25)" in " ".join(make_parser()._subparsers._group_actions[0].choices["tune"].format_help().split())


@pytest.mark.parametrize("typed, wanted", [
    ("pli study p.toml --data /home/me/data --runs 'my runs' --only 'a b'", "pli study p.toml --data DATA --runs RUNS --only 'a b'"),
    ("pli study p.toml --data=/home/me/data", "pli study p.toml --data=DATA"), ("pli study p.toml --out data", "pli study p.toml --out data")])
def test_stored_commands_name_no_folder_of_a_machine(typed, wanted):
    assert without_folders(typed, DATA="/home/me/data", RUNS="my runs" if "my runs" in typed else None) == wanted


def test_options_arrive():
    given = {"hide": "mix:0.25", "weight": 0.5, "clip-weight": 0.25, "tune": "text", "steps": 7, "batch-size": 9, "learning-rate": 0.5, "weight-decay": 0.125,
             "warmup": 3, "schedule": "step", "clip-gradient": 0.0, "precision": "fp32", "checkpoint-every": 5, "validate-every": 2, "seed": 11,
             "avoid": "own", "batches": "kin:colour", "beta2": 0.5, "epsilon": 0.25, "preprocess": "target-pad",
             "target": "frozen", "piece": 4, "ema": 0.5}
    epochs = {"epochs": 3, "schedule": "epochs", "warmup-epochs": 2, "decay-epochs": 4, "validate-epochs": 1}
    assert {f"--{name}" for name in given | epochs} | {"--objective", "--options", "--one-way", "--keep-false-negatives", "--decay-all", "--gradient-checkpointing", "--compile"} == set(tune_options())
    base = ["tune", "pairs.csv", "--model", "m", "--out", "o"]
    settings = tune_settings(make_parser().parse_args(base + [word for name, value in given.items() for word in (f"--{name}", str(value))] + ["--one-way"]))
    assert settings == TuneSettings(**{name.replace("-", "_"): value for name, value in given.items()}, symmetric=False)
    assert all(value != getattr(TuneSettings(), name.replace("-", "_")) for name, value in given.items())
    assert tune_settings(make_parser().parse_args(base + ["--objective", "paper"])) == TuneSettings(objective="paper")
    for name in ("--weight", "--clip-weight"):                                                       # the paper's loss has neither: not ignored, but refused
        with pytest.raises(PliError, match="belong to the objective masked, not to paper"): tune_settings(make_parser().parse_args(base + ["--objective", "paper", name, "0.5"]))
    assert tune_settings(make_parser().parse_args(base)) == TuneSettings()                           # defaults live in TuneSettings only
    watched = make_parser().parse_args([*base, "--keep-every", "400", "--tensorboard"])                # no settings: they change nothing of a run
    assert (watched.keep_every, watched.tensorboard) == (400, True) and tune_settings(watched) == TuneSettings()
    usual = make_parser().parse_args(base)
    assert (usual.keep_every, usual.tensorboard) == (0, False)
    words = [word for name, value in epochs.items() for word in (f"--{name}", str(value))]
    assert tune_settings(make_parser().parse_args(base + words + ["--decay-all"])) == TuneSettings(**{name.replace("-", "_"): value for name, value in epochs.items()}, decay_all=True)


def test_composers_that_were_asked_for():
    assert wanted_composers(None) == all_composers()
    assert wanted_composers(["sum:0.25"]) == ["image", "text", "sum:0.25"]
    assert wanted_composers(["sum:1.0", " sum:1", "image", "product"]) == ["image", "text", "sum:1", "product:0.25", "product:0.5", "product:1", "product:2", "product:4"]
    for spec in ("", "nope", "sum:", "sum:x", "sum:-1", "image:2"):
        with pytest.raises(PliError): wanted_composers([spec])


# --- mistakes

def spoiled(drawn: Path) -> dict[str, tuple[list, list[str]]]:
    "Name -> a command with one mistake, and what its one line must say."
    pairs, queries, gallery = drawn / "pairs.csv", drawn / "queries.json", drawn / "gallery.json"
    one = sorted((drawn / "images").iterdir())[0]
    three = drawn / "three.csv"
    three.write_text("".join((drawn / "pairs.csv").read_text().splitlines(keepends=True)[:4]))
    tune = lambda *more, source=pairs, model=FEW: ["tune", source, "--out", "run", *model, *more]
    measure = lambda *more, q=queries, g=gallery: ["evaluate", "--queries", q, "--gallery", g, *TINY, *more]
    return {
        "hide": (tune("--hide", "nope:0.5"), ["--hide 'nope:0.5'", "known are none, random"]),
        "hide ratio": (tune("--hide", "random:1.5"), ["random: ratio"]),
        "objective": (tune("--objective", "nope"), ["--objective must be one of masked, paper, clip", "'nope'"]),
        "schedule": (tune("--schedule", "nope"), ["--schedule must be one of"]),
        "towers": (tune("--tune", "nope"), ["--tune must be one of both, image, text"]),
        "precision": (tune("--precision", "fp8"), ["--precision must be one of"]),
        "steps": (tune("--steps", "0"), ["--steps must be at least 1, got 0"]),
        "batch": (tune("--batch-size", "1"), ["--batch-size must be at least 2, got 1"]),
        "rate": (tune("--learning-rate", "nan"), ["--learning-rate must be a number of at least 0"]),
        "clip": (tune("--clip-weight", "-1"), ["--clip-weight must be"]),
        "checkpoints": (tune("--checkpoint-every", "0"), ["--checkpoint-every must be"]),
        "large batch": (tune("--batch-size", "500"), ["--batch-size 500 is more than the 54 pairs"]),
        "held out 0": (tune("--held-out", "0"), ["--held-out must be between 0 and 1, got 0"]),
        "held out 1": (tune("--held-out", "1"), ["--held-out must be between 0 and 1, got 1"]),
        "held out 7": (tune("--held-out", "7"), ["--held-out must be between 0 and 1, got 7"]),
        "held out nan": (tune("--held-out", "nan"), ["--held-out must be between 0 and 1"]),
        "too few pictures": (["tune", three, "--out", "run", *FEW], ["3 pictures are too few: validation holds out 2, and a batch needs 2 more"]),
        "nothing to prolong": (["tune", drawn / "pairs.csv", "--out", "run", "--prolong", "nowhere", "--learning-rate", "1e-4"], ["--prolong nowhere: holds no finished run"]),
        "device": (tune("--device", "nope"), ["device 'nope'", "--device auto"]),
        "no device": (tune("--device", "cuda:99"), ["device 'cuda:99' cannot be used here"]),
        "model": (tune(model=["--model", "nope", "--device", "cpu", "--batch-size", "16"]), ["model 'nope' is neither a folder"]),
        "model folder": (tune(model=["--model", drawn, "--device", "cpu", "--batch-size", "16"]), [str(drawn), "open_clip_config.json"]),
        "no pairs": (tune(source=drawn / "gone.csv"), ["gone.csv: no such file"]),
        "column": (tune("--caption-key", "words"), ["pairs.csv: expected a first line with the columns filepath and words, found filepath, title"]),
        "format": (tune(source=queries), ["queries.json: pairs are read from .csv"]),
        "root": (tune("--root", "gone"), ["root gone: no such folder"]),
        "half": (tune("--queries", queries), ["--queries and --gallery go together"]),
        "other half": (tune("--gallery", gallery), ["--queries and --gallery go together"]),
        "no queries": (tune("--queries", "gone.json", "--gallery", gallery), ["gone.json: no such file"]),
        "pictures of queries": (tune("--queries", queries, "--gallery", drawn.parent / "gallery.json"), ["80 of 80 pictures", "images/gallery_000000.png (missing picture)"]),
        "name": (tune("--model", "pli-tinny-48"), ["model 'pli-tinny-48' is neither a folder", "similar names: pli-tiny-48"]),
        "tag": (tune("--pretrained", "nope"), ["model 'pli-tiny-48' with weights 'nope' cannot be loaded"]),
        "composer": (measure("--composer", "nope"), ["unknown composer 'nope'"]),
        "weight": (measure("--composer", "sum:x"), ["sum: weight must be a number, got 'x'"]),
        "chosen on": (measure("--chosen-on", "nope"), ["--chosen-on nope", "both, colour, keep, shape"]),
        "gallery": (measure(g=drawn / "gone.json"), ["gone.json: no such file"]),
        "not json": (measure(q=pairs), ["pairs.csv: not valid JSON"]),
        "no list": (measure(q=drawn / "world.json"), ["world.json: queries are a list"]),
        "root of names": (measure("--root", drawn / "images"), ["80 of 80 pictures", "cannot be used"]),
        "out is a folder": (measure("--out", "."), [".: is a folder; name a file"]),
        "measure device": (measure("--device", "nope"), ["device 'nope'"]),
        "demo device": (["demo", "--quick", "--device", "nope"], ["device 'nope'"]),
        "demo out": (["demo", "--quick", "--device", "cpu", "--out", one], [str(one)]),
        "no picture": (["mask", pairs, "--out", "m.png"], ["pairs.csv: broken picture"]),
        "missing picture": (["mask", "gone.png", "--out", "m.png"], ["gone.png: missing picture"]),
        "mix": (["mask", one, "--hide", "mix", "--out", "m.png"], ["mix needs at least two pictures"]),
        "mask hide": (["mask", one, "--hide", "nope", "--out", "m.png"], ["--hide 'nope'"]),
        "ending": (["mask", one, "--hide", "grey", "--out", "m.jpeg"], ["m.jpeg: a figure is written as .png, .svg, .pdf"]),
        "size": (["mask", one, "--size", "50", "--out", "m.png"], ["--size must be a multiple of --patch, got 50 and 32"]),
        "negative": (["mask", one, "--size", "-32", "--patch", "-32", "--out", "m.png"], ["--size must be a multiple of --patch"]),
        "under a file": (["mask", one, "--hide", "grey", "--size", "64", "--out", pairs / "m.png"], [str(pairs)]),
    }


def test_every_mistake_costs_one_line_and_leaves_nothing(drawn, tmp_path):
    cases, before = spoiled(drawn), files(drawn)
    folders = {name: tmp_path / name for name in cases}
    for folder in folders.values(): folder.mkdir()
    wrong = []
    for (name, (words, says)), (status, out, err) in zip(cases.items(), many([(folders[name], words) for name, (words, _) in cases.items()])):
        if name == "tag": err = err.splitlines(keepends=True)[-1]         # open_clip says which tags there are, in a line of its own
        if status != 1 or err.count("\n") != 1 or not err.startswith(f"pli {words[0]}: ") or any(part not in err for part in says): wrong.append((name, status, err))
        if name in ("name", "tag") and "pairs of" in out: wrong.append((name, "reads the pairs first", out))
        if list(folders[name].iterdir()): wrong.append((name, "leaves", list(folders[name].iterdir())))
    assert not wrong
    assert files(drawn) == before


def test_a_mistake_in_a_process_of_its_own(drawn, tmp_path):
    done = pli("tune", drawn / "pairs.csv", "--out", "run", *FEW, "--hide", "nope", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("pli tune: --hide 'nope'") and done.stderr.count("\n") == 1 and not files(tmp_path)


# --- tune

def tables(drawn: Path, folder: Path) -> dict[str, Path]:
    "The same forty pairs as CSV, TSV, JSONL and a folder."
    rows = list(csv.DictReader((drawn / "pairs.csv").open(encoding="utf-8")))[:40]
    (folder / "pictures").mkdir()
    for row in rows:
        name = Path(row["filepath"]).name
        (folder / "pictures" / name).write_bytes((drawn / row["filepath"]).read_bytes())
        (folder / "pictures" / name).with_suffix(".txt").write_text(row["title"] + "\n", encoding="utf-8")
        row["filepath"] = f"pictures/{name}"
    (folder / "a.csv").write_text("filepath,title\n" + "".join(f"{row['filepath']},{row['title']}\n" for row in rows))
    (folder / "a.tsv").write_text("words\tpicture\n" + "".join(f"{row['title']}\t{row['filepath']}\n" for row in rows))
    (folder / "a.jsonl").write_text("".join(json.dumps({"image": row["filepath"], "caption": row["title"]}) + "\n" for row in rows))
    return {"csv": folder / "a.csv", "tsv": folder / "a.tsv", "jsonl": folder / "a.jsonl", "folder": folder / "pictures"}


def test_four_kinds_of_pairs_give_the_same_model(drawn, tmp_path):
    sources, few = tables(drawn, tmp_path), [*TINY, "--steps", "2", "--batch-size", "8", "--held-out", "0.1", "--learning-rate", "1e-3", "--warmup", "1"]
    keys = {"tsv": ["--image-key", "picture", "--caption-key", "words"], "folder": ["--root", tmp_path]}
    done = many([(tmp_path, ["tune", source, "--out", f"run-{kind}", *few, *keys.get(kind, [])]) for kind, source in sources.items()])
    for status, out, err in done: assert (status, err) == (0, "") and out.startswith("40 pairs of 40 pictures; 0 records left out\n") and "step 2/2: loss " in out
    models = [load_file(tmp_path / f"run-{kind}" / "last" / "open_clip_model.safetensors") for kind in sources]
    for model in models[1:]: assert all(torch.equal(model[name], value) for name, value in models[0].items())
    assert not (tmp_path / "run-csv" / "problems.jsonl").exists()


LONG = [*TINY, "--steps", "20", "--batch-size", "16", "--learning-rate", "1e-3", "--warmup", "4", "--checkpoint-every", "3", "--held-out", "0.1", "--validate-every", "5", "--hide", "recolour+random:0.5"]


def stopped_after(line: str, how: signal.Signals, *words, cwd: Path) -> tuple[int, str]:
    "Start a command and stop it as soon as a line is on the screen; its exit status and errors."
    with subprocess.Popen([*START, *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as running:   # tests that run in the background ignore it
        for seen in running.stdout:                                       # lines come when they are printed, through a pipe too
            if seen.startswith(line): running.send_signal(how); break
        _, err = running.communicate()
        return running.returncode, err


def test_a_stopped_run_goes_on_and_ends_bit_equal(drawn, tmp_path):
    command = lambda out: ["tune", drawn / "pairs.csv", "--out", out, *LONG]
    status, err = stopped_after("step 4/20", signal.SIGINT, *command("killed"), cwd=tmp_path)
    told = r"ending after this step, with a checkpoint; once more ends at once\s+pli tune: SIGINT was received: step \d+ of 20 is saved in killed, and the same command goes on from there"
    assert status == 75 and re.fullmatch(told, err.strip()), err
    assert not [name for name in files(tmp_path) if name.endswith(".part")]
    assert stopped_after("step 12/20", signal.SIGKILL, *command("killed"), cwd=tmp_path) == (-signal.SIGKILL, "")
    assert not (tmp_path / "killed" / "last").exists()
    # the same command once more; the run that nobody stopped; a finished run, which has nothing to do; another run in its folder; a folder of something else
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("mine")
    again, whole, finished, seeded, other = many([(tmp_path, words) for words in (command("killed"), command("whole"), command("whole"), [*command("whole"), "--seed", "1"], command("other"))])
    assert again[0] == whole[0] == finished[0] == 0 and again[2] == whole[2] == ""
    first = int(again[1].partition("continuing at step ")[2].split()[0])
    assert 9 <= first <= 18 and first % 3 == 0 and "continuing" not in whole[1] and "continuing at step 20 of 20" in finished[1]
    assert again[1].splitlines()[-1].replace("killed", "whole") == whole[1].splitlines()[-1] == finished[1].splitlines()[-1]
    for name in ("best", "last"):
        mine, theirs = (load_file(tmp_path / out / name / "open_clip_model.safetensors") for out in ("whole", "killed"))
        assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    assert log == (tmp_path / "killed" / "log.jsonl").read_text() and len(log.splitlines()) == 20
    assert "seed was 0, now 1" in seeded[2] and "pairs digest was" in seeded[2]                      # the seed also decides which pairs are held out
    for (status, _, err), says in ((seeded, "pli tune: whole: holds another run ("), (other, "pli tune: other: the folder is not empty")):
        assert status == 1 and err.startswith(says) and err.count("\n") == 1
    assert list(files(tmp_path / "other")) == ["diary.txt"]
    # a finished run keeps the record of the process that made it, and one that has none gets one
    record = tmp_path / "whole" / "provenance.json"
    record.write_text(record.read_text().replace('"cut texts": 0', '"cut texts": 7'))
    (tmp_path / "killed" / "provenance.json").unlink()
    assert [status for status, _, _ in many([(tmp_path, command("whole")), (tmp_path, command("killed"))])] == [0, 0]
    assert json.loads(record.read_text())["cut texts"] == 7 and json.loads((tmp_path / "killed" / "provenance.json").read_text())["cut texts"] == 0


ALONE = """
import json, sys, open_clip, torch
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{sys.argv[1]}")
words = open_clip.get_tokenizer(f"local-dir:{sys.argv[1]}")(["a red circle"])
with torch.no_grad(): print(json.dumps([model.eval().encode_image(preprocess(Image.open(sys.argv[2]))[None]).tolist(), model.encode_text(words).tolist(), "pli" in sys.modules]))
"""


def test_tuning_on_queries_keeps_the_best_and_open_clip_loads_it_alone(drawn, tmp_path):
    queries = ["--queries", drawn / "queries.json", "--gallery", drawn / "gallery.json"]
    status, out, err = many([(tmp_path, ["tune", drawn / "pairs.csv", "--out", "run", *FEW, "--steps", "6", "--validate-every", "2", *queries])])[0]
    assert (status, err) == (0, "") and "60 pairs" in out                              # with queries no pair is held out
    assert "validation: the share of the queries that find a right answer among their first ten" in out
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    scores = {record["step"]: record["score"] for record in made["scores"]}
    assert list(scores) == [0, 2, 4, 6] and made["model"] == "pli-tiny-48" and f"best validation (start {scores[0]:.4f}, best {max(scores.values()):.4f})" in out
    best = load_backbone(str(tmp_path / "run" / "best"))
    assert query_validator(read_queries(drawn / "queries.json", drawn / "gallery.json"))(best) == max(scores.values())
    picture = sorted((drawn / "images").iterdir())[0]
    alone = subprocess.run([sys.executable, "-c", ALONE, tmp_path / "run" / "best", picture], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **ENVIRONMENT})
    assert alone.returncode == 0, alone.stderr
    image, text, has_pli = json.loads(alone.stdout)
    with torch.no_grad(): mine = best.encode_image(best.pixels(Image.open(picture))[None]), best.encode_text(["a red circle"])
    assert not has_pli and torch.allclose(mine[0], torch.tensor(image), atol=1e-5) and torch.allclose(mine[1], torch.tensor(text), atol=1e-5)


def test_a_finished_run_is_prolonged_and_few_pictures_are_enough(drawn, tmp_path):
    "Ten pictures: two are held out, whatever the share says. Then twice as many steps, as another run that says its rate."
    (tmp_path / "ten.csv").write_text("".join((drawn / "pairs.csv").read_text().splitlines(keepends=True)[:11]))
    steps = ["--device", "cpu", "--steps", "2", "--batch-size", "4", "--warmup", "0", "--root", drawn]
    tune = lambda *more: (tmp_path, ["tune", "ten.csv", *steps, *more])
    first, more, no_rate, seed, half = many([tune("--out", "one", "--model", "pli-tiny-48"), tune("--out", "two", "--prolong", "one", "--learning-rate", "1e-4", "--keep-false-negatives"),
                                             tune("--out", "three", "--prolong", "one"), tune("--out", "three", "--prolong", "one", "--learning-rate", "1e-4", "--seed", "1"), tune("--out", "one", "--prolong", "one", "--learning-rate", "1e-4")])
    assert first[0] == more[0] == 0 and first[2] == more[2] == ""
    assert "validation: the share of 2 held-out pairs whose caption and hidden picture find the whole picture first" in first[1]
    assert "validation on 2 held-out pairs: each is 50.0 points" in first[1] and "step 0: validation" in first[1]
    record, made = json.loads((tmp_path / "two" / "run.json").read_text()), json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert record["pairs"] == 8 and record["steps before"] == 2 and record["settings"]["ignore_same_picture"] is False and made["prolongs"] == "one" and "model" in made
    assert json.loads((tmp_path / "one" / "run.json").read_text())["settings"]["ignore_same_picture"] is True
    for (status, _, err), says in ((no_rate, "--prolong needs --learning-rate: the run's peak was 1e-05, its schedule cosine"), (seed, "--prolong one: its --seed was 0, which also decides the held-out pairs"), (half, "one: a run is prolonged as another run")):
        assert status == 1 and err.startswith(f"pli tune: {says}") and err.count("\n") == 1
    assert not (tmp_path / "three").exists()


def test_a_prolonged_run_takes_over_the_settings(drawn, tmp_path):
    "But for those of its new steps alone; what is typed is said, and a frozen run is refused before anything is read."
    tune = lambda *more: (tmp_path, ["tune", drawn / "pairs.csv", "--device", "cpu", *more])
    usual = ["--model", "pli-tiny-48", "--steps", "2", "--batch-size", "4", "--warmup", "1"]
    rate = ["--learning-rate", "1e-4"]
    first, frozen = many([tune("--out", "one", *usual, "--tune", "text", "--hide", "none", "--schedule", "constant"), tune("--out", "frozen", *usual, "--target", "frozen")])
    assert first[0] == frozen[0] == 0
    same, other, refused, inside, longer = many([
        tune("--out", "two", "--prolong", "one", "--steps", "2", *rate), tune("--out", "three", "--prolong", "one", "--steps", "2", *rate, "--tune", "both"),
        tune("--out", "four", "--prolong", "frozen", *rate), tune("--out", "four", "--prolong", "one/last", *rate), tune("--out", "frozen", *usual, "--target", "frozen", "--steps", "3"),
    ])
    settings = lambda name: json.loads((tmp_path / name / "run.json").read_text())["settings"]
    own = {"steps", "learning_rate", "schedule", "warmup"}
    assert {name for name, value in settings("one").items() if settings("two")[name] != value} <= own and settings("two")["schedule"] == "cosine"
    assert "prolonging one: with its settings --hide none, --tune text, --batch-size 4\n" in same[1] and "was text" not in same[1]
    assert "prolonging one: with its settings --hide none, --batch-size 4\n  --tune: was text, now both\n" in other[1]
    assert refused[0] == 1 and "pairs" not in refused[1] and "--prolong frozen: its gallery was read by the model as it was before tuning" in refused[2]
    assert inside[0] == 1 and "--prolong one/last: is a model of a run; name the run, one" in inside[2]
    assert longer[0] == 1 and "steps was 2, now 3" in longer[2] and "--prolong" not in longer[2]


def test_broken_and_missing_pictures_are_counted_and_listed(drawn, tmp_path):
    shutil.copytree(drawn / "images", tmp_path / "images")
    noise = torch.randint(0, 256, (64, 64, 3), generator=rng_for(0, "noise")).byte().numpy()
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])                 # its header is whole
    (tmp_path / "text.png").write_text("not a picture")
    lines = (drawn / "pairs.csv").read_text().splitlines()
    lines += ["gone.png,a red circle", "away.png,a red square", "text.png,a blue star", "cut.png,a green heart", "../secret.png,a star", "images/x.png,"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    few = [*TINY, "--steps", "6", "--batch-size", "48", "--learning-rate", "1e-4", "--held-out", "0.1"]
    queries = ["--queries", drawn / "queries.json", "--gallery", drawn / "gallery.json"]
    done = many([(tmp_path, ["tune", "pairs.csv", "--out", "one", *few]), (tmp_path, ["tune", "pairs.csv", "--out", "two", *few, *queries])])
    for out, (status, said, err) in zip(("one", "two"), done):
        assert (status, err) == (0, "")
        assert "\n61 pairs of 61 pictures; 5 records left out\n" in "\n" + said
        for cause in ("missing picture: 2", "broken picture: 1", "outside the folder: 1", "empty caption: 1"): assert f"  {cause}\n" in said
        problems = [json.loads(line) for line in (tmp_path / out / "problems.jsonl").read_text().splitlines()]
        assert all(set(problem) == {"file", "line", "cause", "detail"} for problem in problems)
        assert [problem["line"] for problem in problems if problem["line"]] == [66, 67, 62, 63, 64]     # read first, then opened
        late = [problem for problem in problems if problem["line"] is None]
        aside = "held-out pictures cannot be read" in said
        assert [Path(problem["file"]).name for problem in late] == ["cut.png"] * (not aside)            # once, though met in every epoch
        assert ("1 pictures broke while they were read; the first: " in said) == (not aside) and "cut.png: broken picture" in said
    assert "held-out" not in done[1][1]


# --- evaluate

def test_words_centred_as_a_search_centres_them(drawn, tmp_path):
    "The option reaches late fusion and nothing else, and stands in the report."
    asked = ["evaluate", "--queries", drawn / "queries.json", "--gallery", drawn / "gallery.json", *TINY, "--composer", "sum:1", "--composer", "product:1"]
    done = many([(tmp_path, [*asked, "--word-mean", mean, "--out", f"{mean}.json", "--out", f"{mean}.md"]) for mean in ("queries", "everyday")])
    assert [each[0] for each in done] == [0, 0], done
    one, other = (json.loads((tmp_path / f"{mean}.json").read_text()) for mean in ("queries", "everyday"))
    assert (one["word mean"], other["word mean"]) == ("queries", "everyday")
    assert one["outcomes"]["sum"] == other["outcomes"]["sum"] and one["outcomes"]["product"] != other["outcomes"]["product"]
    assert "words centred on everyday captions" in (tmp_path / "everyday.md").read_text() and "centred" not in (tmp_path / "queries.md").read_text()


def test_an_evaluation_can_be_read_back(drawn, tmp_path):
    asked = ["evaluate", "--queries", drawn / "queries.json", "--gallery", drawn / "gallery.json", *TINY]
    some = ["--composer", "sum:0.25", "--composer", "product:1", "--composer", "sum:1", "--chosen-on", "colour"]
    cases = [asked + some + ["--sweep", "--out", "a.json"], asked + some + ["--out", "deep/b.json"], asked + ["--out", "all.json"], asked + ["--composer", "sum:0.25", "--workers", "1"]]
    done = many([(tmp_path, case) for case in cases])
    for status, out, err in done: assert (status, err) == (0, "")
    one, other, every = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "deep/b.json", "all.json"))
    assert one.pop("sweep")["heading"][:3] == ["composer", "all R@1", "all R@10"] and {key: value for key, value in one.items() if key != "command"} == {key: value for key, value in other.items() if key != "command"}
    assert one["benchmark"]["queries"] == 24 and one["benchmark"]["gallery"] == {kind: "80" for kind in ("both", "colour", "keep", "shape")} and one["chosen on"] == "colour" and one["model"] == "pli-tiny-48" and one["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert list(one["specs"]) == ["image", "text", "sum", "product", "best"] and set(one["specs"]["sum"]) <= {"sum:0.25", "sum:1"}
    assert list(one["kinds"]) == ["all", "both", "colour", "keep", "shape"] and all(section["halves"] for section in one["kinds"].values())
    assert len(decode_ranks(one)) == 24 and decode_ranks(one, "image").rank.min() >= 1
    for row in report_rows(one, "colour")[1]: assert all(cell in done[0][1] for cell in row)
    heading, *lines = done[0][1].splitlines()
    assert heading.split()[0] == "composer" and [line.split()[0] for line in lines[:5]] == ["image", "text", "sum:0.25", "product:1", "sum:1"]
    assert done[1][1] in done[0][1] and list(every["specs"]) == ["image", "text", "sum", "slerp", "product", "harris", "best"]
    assert done[3][1].count("sum:0.25 ") == 5 and "best" not in done[3][1].split() and "other half" not in done[3][1]


def test_the_photographs_give_what_their_readme_says(shared, tmp_path):
    shop = shared / "data" / "shop"
    done = pli("evaluate", "--model", shop / "base", "--queries", shop / "queries.dev.json", "--gallery", shop / "gallery.json", "--composer", "sum:1", "--device", "cpu", "--out", "shop.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    colour = json.loads((tmp_path / "shop.json").read_text())["kinds"]["colour"]
    found = lambda name: [colour["composers"][name][f"recall@{k}"][0] for k in (1, 10)]
    assert colour["queries"] == 1800
    assert found("sum:1") == pytest.approx([2.6, 15.7], abs=0.15)
    assert found("image") == pytest.approx([1.7, 8.7], abs=0.15) and found("text") == pytest.approx([0.0, 1.7], abs=0.15)


# --- mask

def test_masks_are_drawn(drawn, tmp_path):
    one, two = sorted((drawn / "images").iterdir())[:2]
    small = ["--size", "96", "--patch", "16"]
    hides = ["--hide", "random:0.75", "--hide", "recolour+random:0.5", "--hide", "mix:0.5"]
    cases = [["mask", one, two, *hides, "--out", "a.png", *small], ["mask", one, two, *hides, "--out", "b.PNG", *small], ["mask", one, two, *hides, "--out", "new/c.svg", *small],
             ["mask", one, two, *hides, "--out", "d.png", *small, "--seed", "1"], ["mask", one, "--out", "e.png"]]
    done = many([(tmp_path, case) for case in cases])
    for (status, out, err), case in zip(done, cases): assert (status, err) == (0, "") and out.strip() in case
    with Image.open(tmp_path / "a.png") as image: assert image.format == "PNG" and image.width > 400
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes() != (tmp_path / "d.png").read_bytes()
    assert ElementTree.parse(tmp_path / "new" / "c.svg").getroot().tag.endswith("svg")
    assert sorted(files(tmp_path)) == ["a.png", "b.PNG", "d.png", "e.png", "new/c.svg"]

def test_masks_with_words(drawn, tmp_path):
    one, two = sorted((drawn / "images").iterdir())[:2]
    usual = ["mask", one, two, "--hide", "drop:0.5", "--hide", "recolour+only:colour", "--out", "a.png", "--size", "96", "--patch", "16"]
    said = [*usual, "--caption", "a red disc", "--caption", "a blue star"]
    (status, out, err), bare, few = many([(tmp_path, said), (tmp_path, usual), (tmp_path, [*usual, "--caption", "a red disc"])])
    assert (status, err) == (0, "") and (tmp_path / "a.png").exists()
    assert bare[0] == few[0] != 0 and "--caption" in bare[2] and "1 captions for 2 pictures" in few[2]


# --- averages

@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_that_cannot_be_written_is_told_before_any_model_or_file_is_read(capsys):
    for command in (["average", "gone", "gone too"], ["submit", "cirr", "--model", "gone"], ["evaluate", "--model", "gone", "--queries", "gone.json", "--gallery", "gone.json", "--composer", "sum:1"], ["tune", "gone.csv", "--model", "gone"]):
        assert main([*command, "--out", "/proc/new/report.json"]) == 1
        said = capsys.readouterr().err
        assert "/proc/new" in said and "cannot be written" in said and said.count("\n") == 1, said


def test_average_of_two_models(tmp_path, capsys):
    for seed in (0, 1): load_backbone("pli-tiny-48", seed=seed).save(tmp_path / f"m{seed}")
    one, other = (str(tmp_path / f"m{seed}") for seed in (0, 1))
    assert main(["average", one, other, "--shares", "0.25", "0.75", "--out", str(tmp_path / "mean")]) == 0
    a, b, mean = (load_backbone(folder).model.visual.proj for folder in (one, other, str(tmp_path / "mean")))
    assert torch.allclose(mean, 0.25 * a + 0.75 * b, atol=1e-7)
    record = json.loads((tmp_path / "mean" / "provenance.json").read_text())
    assert record["models"] == [one, other] and record["shares"] == [0.25, 0.75]
    assert main(["average", "pli-tiny-48", one, "--out", str(tmp_path / "same")]) == 0
    assert torch.equal(load_backbone(str(tmp_path / "same")).model.visual.proj, a)               # a named model begins with seed 0


@pytest.mark.parametrize("words, says", [(["M"], "two models or more"), (["M", "M", "--shares", "1"], "one number a model: got 1 for 2"), (["M", "M", "--shares", "0.5", "0.6"], "sum to 1"),
                                         (["M", "M", "--shares", "nan", "1"], "sum to 1"), (["M", "pli-tiny-64"], "one shape"), (["M", "nowhere"], "nowhere")])
def test_averages_that_are_none(words, says, tmp_path, capsys):
    load_backbone("pli-tiny-48").save(tmp_path / "M")
    assert main(["average", *(str(tmp_path / "M") if word == "M" else word for word in words), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_average_replaces_nothing(tmp_path, capsys):
    load_backbone("pli-tiny-48").save(tmp_path / "M")
    before = (tmp_path / "M" / "open_clip_model.safetensors").read_bytes()
    for out in (tmp_path / "M", tmp_path / "M" / "open_clip_config.json"):
        assert main(["average", str(tmp_path / "M"), "pli-tiny-48", "--out", str(out)]) == 1 and "choose another place" in capsys.readouterr().err
    assert (tmp_path / "M" / "open_clip_model.safetensors").read_bytes() == before


def test_a_killed_average_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_backbone("pli-tiny-48", seed=1).save(tmp_path / "M")
    words = ["average", "M", "pli-tiny-48", "--out", "mean"]
    assert main(words) == 0
    whole = files(tmp_path / "mean")
    (tmp_path / "mean" / "open_clip_config.json").unlink()                # killed between its two files, and while it wrote the second
    (tmp_path / "mean" / ".open_clip_config.json.1.part").write_text("{")
    assert main(words) == 0 and files(tmp_path / "mean") == whole
    shutil.rmtree(tmp_path / "mean")
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / ".provenance.json.1.part").write_text("{")       # killed at once
    assert main(words) == 0 and files(tmp_path / "mean") == whole
    assert main([*words, "--shares", "0.25", "0.75"]) == 1 and "choose another place" in capsys.readouterr().err and files(tmp_path / "mean") == whole


# --- two at once, and a folder that goes away

def test_two_real_processes_and_a_folder_that_is_removed(drawn, tmp_path):
    "The second is refused; the first ends with an error when its folder is taken away, and writes nothing more."
    words = ["tune", str(drawn / "pairs.csv"), *TINY, "--steps", "5000", "--batch-size", "16", "--checkpoint-every", "1", "--held-out", "0.1", "--out", "run"]
    first = subprocess.Popen([*START, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    try:
        while not (tmp_path / "run" / "checkpoint.safetensors").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        second = pli(*words, cwd=tmp_path)
        assert second.returncode == 1 and second.stderr == f"pli tune: run: process {first.pid} is at work there; wait until it is done, or choose another folder\n"
        (tmp_path / "run").rename(tmp_path / "gone")
        said = first.communicate(timeout=120)[1]
        assert first.returncode == 1 and re.fullmatch("pli tune: run(/.*)?: (the|its) folder .*was removed or replaced while it .*; nothing more is written there\n", said), said
        assert not (tmp_path / "run").exists()
    finally: first.kill()


@pytest.mark.parametrize("words, option", [
    (["tune", "pairs.csv", "--model=", "--out=run"], "model"), (["tune", "pairs.csv", "--model=pli-tiny-48", "--out="], "out"), (["tune", "pairs.csv", "--model=ViT-B-32", "--pretrained=", "--out=run"], "pretrained"),
    (["tune", "pairs.csv", "--model=pli-tiny-48", "--out=run", "--queries=", "--gallery="], "queries"), (["tune", "", "--model=pli-tiny-48", "--out=run"], "pairs"),
    (["evaluate", "--queries=q.json", "--gallery=g.json", "--model=pli-tiny-48", "--rankings="], "rankings"), (["evaluate", "--queries=q.json", "--gallery=g.json", "--model=pli-tiny-48", "--composer=sum", "--composer="], "composer"),
    (["compare", "a.json", "b.json", "--out", ""], "out"), (["average", "a", "", "--out=b"], "models"), (["cache", "--cache="], "cache"), (["study", "plan.toml", "--runs="], "runs"), (["demo", "--out="], "out"),
])
def test_a_variable_that_is_not_set_is_no_option_left_out(words, option, capsys, tmp_path, monkeypatch):
    "`--pretrained \"$WEIGHTS\"` would take random weights, `--out \"$RUN\"` would train and store nothing."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended: main(words)
    assert ended.value.code == 2 and f"argument {option}: is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_figure_of_masks_has_an_end(drawn, tmp_path):
    picture = drawn / "images" / "pair_000001.png"
    hides = [word for _ in range(1000) for word in ("--hide", "blur")]
    status, out, err = many([(tmp_path, ["mask", picture, *hides, "--out", "m.png"])])[0]
    assert (status, out) == (1, "") and "1 picture under 1,000 ways of --hide and whole: a figure shows at most 1,000" in err and not (tmp_path / "m.png").exists()
    status, out, err = many([(tmp_path, ["mask", picture, "--hide", "|".join(["blur"] * 501), "--out", "m.png"])])[0]
    assert (status, out) == (1, "") and "has 501 parts" in err and len(err) < 200


def test_queries_of_the_same_words_are_told_the_option(drawn, tmp_path):
    records = [record | {"relative_caption": "in red"} for record in json.loads((drawn / "queries.json").read_text())]
    (drawn / "same.json").write_text(json.dumps(records))
    asked = ["evaluate", "--queries", drawn / "same.json", "--gallery", drawn / "gallery.json", *TINY]
    ways = ([], ["--composer", "product:1"], ["--composer", "sum:1", "--composer", "harris"])
    for status, out, err in many([(tmp_path, asked + more) for more in ways]):
        assert status == 1 and f"all {len(records)} queries have the same words" in err and "--word-mean everyday" in err and "text_mean" not in err and err.count("\n") == 1
    (drawn / "same.json").write_text(json.dumps(records[:1]))
    assert "there is one query only" in many([(tmp_path, [*asked, "--composer", "product:1"])])[0][2]

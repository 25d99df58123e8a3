"Recipes: the paper's settings under a name, an epoch that is a pass over the pairs, and a command line that overrules them."
import json
import math
import os
from pathlib import Path

import pytest
import torch

from layouts import make_fashioniq
from pli.backbones.loading import load_backbone
from pli.cli.main import main, make_parser
from pli.cli.tune import follow_recipe, read_sources, tune_settings
from pli.core import PliError
from pli.data.batches import TensorPairs
from pli.settings import TuneSettings
from pli.training.loop import check_settings, resolve_epochs, tune
from pli.training.recipes import read_recipe, recipe_names
from pli.training.step import learning_rate, make_optimiser, never_warm
from pli.world import save_world

PAPER = [f"masked-tuning-{model}-{pairs}" for model in ("vit-b-32", "vit-l-14") for pairs in ("coco", "flickr30k", "llava")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, pairs=60, queries=12, gallery_size=60)
    return folder


def test_the_papers_and_our_own_are_there():
    assert set(PAPER) | {"mixture", "frozen-gallery-text-side"} == set(recipe_names())


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_holds_what_is_known_and_says_what_is_not(name):
    recipe = read_recipe(name)
    settings = TuneSettings(**recipe.settings)
    assert (recipe.model, recipe.pretrained) == ({"b": "ViT-B-32", "l": "ViT-L-14"}[name.split("-")[3]], "openai")
    assert (settings.objective, settings.hide, settings.tune, settings.batch_size) == ("paper", "random:0.75", "both", 64)
    assert (settings.learning_rate, settings.weight_decay, settings.decay_all, settings.beta2, settings.epsilon) == (1e-6, 5e-5, True, 0.999, 1e-8)
    assert (settings.clip_gradient, settings.precision, settings.schedule, settings.validate_epochs) == (0.0, "fp32", "epochs", 1)
    assert recipe.format == ("flickr30k-all" if name.endswith("flickr30k") else "")
    assert 5 <= settings.epochs <= 10 and any("5 to 10" in line for line in recipe.open) and recipe.validate_composer == "sum:0.25"


@pytest.mark.parametrize("more, factors", [({}, [0.01, 0.208, 0.406, 0.604, 0.802, 1, 1, 1]), ({"warmup_epochs": 3, "decay_epochs": 3}, [0.01, 0.34, 0.67, 0.1, 0.1, 0.1, 0.1, 0.1])])
def test_the_schedule_goes_by_epochs(more, factors):
    settings = resolve_epochs(TuneSettings(schedule="epochs", epochs=8, batch_size=8, learning_rate=1e-6, **more), 67)
    assert settings.steps == 64                                                # eight batches of eight, three pairs left out
    rates = [learning_rate(step, settings) for step in range(64)]
    assert all(math.isclose(rate, 1e-6 * factors[step // 8]) for step, rate in enumerate(rates))
    assert never_warm(settings) is None or more


def test_a_run_that_never_reaches_its_rate_is_told():
    assert "reaches 8e-07 at most" in never_warm(TuneSettings(schedule="epochs", epochs=5, steps=50, learning_rate=1e-6))


def test_the_optimisers_constants_arrive_and_the_defaults_are_as_before():
    backbone = load_backbone("pli-tiny-48")
    usual, paper = make_optimiser(backbone, TuneSettings()), make_optimiser(backbone, TuneSettings(**read_recipe(PAPER[0]).settings))
    assert [(group["weight_decay"], group["betas"], group["eps"]) for group in usual.param_groups] == [(0.01, (0.9, 0.98), 1e-6), (0.0, (0.9, 0.98), 1e-6)]
    assert [(group["weight_decay"], group["betas"], group["eps"]) for group in paper.param_groups] == [(5e-5, (0.9, 0.999), 1e-8)] * 2


@pytest.mark.parametrize("settings, words", [
    ({"schedule": "epochs"}, "schedule epochs goes by passes over the pairs: set epochs"),
    ({"validate_epochs": 1}, "validate_epochs 1 goes by passes"),
    ({"epochs": -1}, "epochs must be at least 0"),
    ({"beta2": 1.0}, "beta2 must be at least 0 and less than 1"),
    ({"epsilon": -1.0}, "epsilon must be a number of at least 0"),
    ({"preprocess": "squash"}, "preprocess must be one of model, target-pad"),
    ({"epochs": 2, "batches": "near"}, "epochs count passes over the pairs, which batches near does not make"),
])
def test_settings_that_do_not_go_together_are_told(settings, words):
    with pytest.raises(PliError, match=words): check_settings(TuneSettings(**settings))


def test_pairs_prepared_in_another_way_are_not_tuned_on():
    pairs = TensorPairs(torch.zeros(8, 3, 48, 48, dtype=torch.uint8), ["a"] * 8)
    with pytest.raises(PliError, match="loaded with model"): tune(load_backbone("pli-tiny-48"), pairs, TuneSettings(steps=1, batch_size=4, preprocess="target-pad"))


# a file, and the command line

RECIPE = '''title = "Small"
source = "a test"
model = "pli-tiny-48"
validate_on = "fashioniq"
validate_composer = "sum:0.25"
open = ["the seed"]
[settings]
epochs = 3
validate_epochs = 1
schedule = "epochs"
warmup_epochs = 2
batch_size = 8
decay_all = true
learning_rate = 1e-4
preprocess = "target-pad"
'''


def pli(capfd, *words, status=0) -> str:
    assert main([str(word) for word in words]) == status
    said = capfd.readouterr()
    return said.out if status == 0 else said.err


def test_a_recipe_is_followed_and_continued(world, tmp_path, capfd):
    (tmp_path / "small.toml").write_text(RECIPE)
    asked = ("tune", world / "pairs.csv", "--recipe", tmp_path / "small.toml", "--held-out", "0.2", "--out", tmp_path / "run", "--device", "cpu")
    said = pli(capfd, *asked)
    assert "recipe small: Small; from a test" in said and "open: the seed" in said and "without --validate-on fashioniq=DIR held-out pairs choose it here. They are not learned from, a share of 0.2" in said
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    each = json.loads((tmp_path / "run" / "run.json").read_text())["pairs"] // 8
    assert settings["steps"] == len(log) == 3 * each and settings["preprocess"] == "target-pad"
    assert [log[epoch * each]["learning_rate"] for epoch in range(3)] == pytest.approx([1e-6, 5.05e-5, 1e-4])
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [record["step"] for record in made["scores"]] == [0, each, 2 * each, 3 * each] and made["recipe"].endswith("small.toml")
    assert f"continuing at step {3 * each} of {3 * each}" in pli(capfd, *asked)


def settings_of(*words) -> TuneSettings: return tune_settings(make_parser().parse_args(["tune", "pairs.csv", "--out", "o", *words]))


def test_what_is_typed_is_open_no_more(tmp_path):
    (tmp_path / "small.toml").write_text(RECIPE.replace('["the seed"]', '["the seed", "epochs: 3 is taken", "learning_rate: 1e-4 is taken"]'))
    asked = make_parser().parse_args(["tune", "pairs.csv", "--out", "o", "--recipe", str(tmp_path / "small.toml"), "--epochs", "2"])
    told = []
    follow_recipe(asked, told.append)
    assert [line for line in told if "open: " in line] == ["  open: the seed", "  open: learning_rate: 1e-4 is taken"]


def test_what_is_typed_overrules_a_recipe(tmp_path):
    (tmp_path / "small.toml").write_text(RECIPE)
    recipe = ("--recipe", str(tmp_path / "small.toml"))
    found = settings_of(*recipe, "--epochs", "7", "--no-decay-all", "--learning-rate", "0.5")
    assert (found.epochs, found.decay_all, found.learning_rate, found.batch_size) == (7, False, 0.5, 8)
    found = settings_of(*recipe, "--epochs", "0", "--schedule", "cosine", "--validate-epochs", "0", "--steps", "9", "--warmup", "2")
    assert (found.steps, found.epochs, found.warmup) == (9, 0, 2)
    for typed, words in ((("--steps", "9"), "--steps counts steps.*give --epochs"), (("--warmup", "9"), "--warmup counts steps.*--warmup-epochs"), (("--validate-every", "9"), "--validate-every counts steps")):
        with pytest.raises(PliError, match=words): settings_of(*recipe, *typed)
    with pytest.raises(PliError, match="--warmup-epochs belongs to --schedule epochs"): settings_of("--model", "m", "--warmup-epochs", "3")


@pytest.mark.parametrize("model", ["vit-b-32", "vit-l-14"])
@pytest.mark.parametrize("typed, count", [([], 5), (["--format", "flickr30k"], 2)])
def test_flickr30k_is_read_whole_by_its_recipe(tmp_path, model, typed, count):
    from PIL import Image
    rows = ["raw,sentids,split,filename,img_id"]
    for number, split in enumerate(("train", "val", "test", "train", "test")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
        rows.append(f'"[""Row {number}.""]",[{number}],{split},{number}.jpg,{number}')
    (tmp_path / "flickr_annotations_30k.csv").write_text("\n".join(rows) + "\n")
    words = ["tune", str(tmp_path / "flickr_annotations_30k.csv"), "--recipe", f"masked-tuning-{model}-flickr30k", "--out", "o", *typed]
    asked, told = make_parser().parse_args(words), []
    follow_recipe(asked, told.append)
    assert len(read_sources(asked, told.append)) == count
    assert any(line.startswith("  its format: flickr30k-all") for line in told) == (not typed)


def test_other_pairs_beside_a_recipe_that_names_a_format_are_told_the_option(tmp_path, capsys):
    save_world(tmp_path / "world", pairs=20)
    words = ["tune", str(tmp_path / "world" / "pairs.csv"), "--recipe", "masked-tuning-vit-b-32-flickr30k", "--model", "pli-tiny-48", "--device", "cpu", "--out", str(tmp_path / "o")]
    assert main(words) == 1
    assert "they were read as flickr30k-all, the recipe's: --format names another" in capsys.readouterr().err
    assert main([*words, "--format", "flickr30k"]) == 1 and "the recipe's" not in capsys.readouterr().err       # the user's own choice


def test_a_file_that_a_recipe_reads_otherwise_is_told_what_it_looks_like(tmp_path, capsys):
    rows = [{"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": f"row {number}"}]} for number, split in enumerate(("train", "val"))]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}))
    words = ["tune", str(tmp_path / "dataset_flickr30k.json"), "--recipe", "masked-tuning-vit-b-32-flickr30k", "--model", "pli-tiny-48", "--device", "cpu", "--out", str(tmp_path / "o")]
    assert main(words) == 1
    assert f"{tmp_path}/dataset_flickr30k.json looks like karpathy or karpathy-all" in capsys.readouterr().err
    (tmp_path / "flickr_annotations_30k.csv").write_text('raw,sentids,split,filename,img_id\n"[""Row.""]",[0],train,none.jpg,0\n')
    assert main(["tune", str(tmp_path / "flickr_annotations_30k.csv"), *words[2:]]) == 1      # read as it should be, its picture is missing
    said = capsys.readouterr().err
    assert "missing picture" in said and "looks like" not in said
    for kind in ("karpathy", "karpathy-all"):                       # and so it is read: the pictures alone are missing
        assert main([*words, "--format", kind]) == 1
        said = capsys.readouterr().err
        assert "missing picture: " in said and f"Paths start from {tmp_path}: --root, or root=, names another folder" in said


@pytest.mark.parametrize("text, words", [
    (RECIPE.replace("batch_size", "batchsize"), "batchsize is no setting"),
    ('format = "flickr"\n' + RECIPE, "format must be one of .*flickr30k-all.*, got 'flickr'"),
    (RECIPE + "hide = 3\n", "hide must be of type str"),
    ("modle = 'x'\n" + RECIPE, "modle is unknown; known are title"),
    (RECIPE.replace('["the seed"]', "3"), "open must be a list of texts"),
    (RECIPE.replace('title = "Small"\n', ""), "has no title"),
    ("title = ", "not valid TOML"),
    ("#" * 70_000, "more than the 65,536"),
])
def test_a_broken_recipe_is_named(tmp_path, text, words):
    (tmp_path / "small.toml").write_text(text)
    with pytest.raises(PliError, match=f"small.toml.*{words}"): read_recipe(tmp_path / "small.toml")


def test_a_recipe_that_is_none_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(PliError, match="a pipe, not a file"): read_recipe(tmp_path / "pipe.toml")
    with pytest.raises(PliError, match="is no recipe of pli .*masked-tuning-vit-b-32-coco"): read_recipe("masked-tuning")


def test_without_a_model_nothing_begins(world, tmp_path, capfd):
    with pytest.raises(SystemExit): main(["tune", str(world / "pairs.csv"), "--recipe", "mixture", "--out", str(tmp_path / "run")])
    assert "one of the arguments --prolong --model is required" in capfd.readouterr().err


@pytest.mark.parametrize("words, told", [
    (("--validate-on", "fashioniq"), "name the benchmark and its folder, as in fashioniq=DIR"),
    (("--validate-on", "fashion=x"), "benchmark 'fashion' is unknown"),
    (("--validate-composer", "sum:0.5"), "--validate-composer belongs to --validate-on"),
])
def test_a_validation_that_cannot_be_is_told(world, tmp_path, capfd, words, told):
    assert told in pli(capfd, "tune", world / "pairs.csv", "--model", "pli-tiny-48", "--out", tmp_path / "run", *words, status=1)


def test_the_best_step_is_chosen_on_a_benchmarks_val_queries(world, tmp_path, capfd):
    make_fashioniq(tmp_path / "fiq")
    said = pli(capfd, "tune", world / "pairs.csv", "--model", "pli-tiny-48", "--validate-on", f"fashioniq={tmp_path / 'fiq'}", "--validate-composer", "sum:0.25", "--steps", 2, "--batch-size", 8, "--warmup", 0, "--out", tmp_path / "run", "--device", "cpu")
    assert "validation: recall@10 on fashioniq val" in said and "composer sum:0.25" in said
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert len(made["scores"]) == 2 and made["validation"].startswith("recall@10 on fashioniq val") and made["pairs"]["held out"] == 0

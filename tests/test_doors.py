"Doors for others: a second kind of backbone, which no other file knows of, is tuned, evaluated, studied and searched with."
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pli
from pli.backbones.loading import load_backbone
from pli.cli.main import main
from pli.core import PliError
from pli.studies.data import WITHOUT_SAY, deciding_modules, imported_modules
from pli.world import save_world

HERE, PACKAGE = Path(__file__).parent, Path(pli.__file__).parent
ROOM = PACKAGE / "backbones"   # the only modules that know what a model of open_clip's is made of


# arrows

@pytest.mark.parametrize("path", [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != ROOM and path.name != "_modidx.py"], ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_reaches_through_a_backbone(path):
    "No module but the adapters imports open_clip or timm, names a tower's weights, or takes the model out of a backbone."
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in modules if name.split(".")[0] in ("open_clip", "timm")], (path, node.lineno)
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("logit_scale", "visual", "tokenizer"), (path, node.lineno)
            assert not (node.attr == "model" and isinstance(node.value, ast.Name) and node.value.id in ("backbone", "reader", "mean")), (path, node.lineno)
            assert not (node.attr == "config" and isinstance(node.value, ast.Name) and node.value.id == "backbone"), (path, node.lineno)


def test_every_module_that_a_study_uses_is_counted_or_has_no_say():
    "The digest of the code in a result covers everything that could change a number in it."
    counted = set(deciding_modules())
    assert {"core", "world", "losses", "composition", "metrics", "gallery.encode"} <= counted
    for room in ("backbones", "data", "hiding", "training", "benchmarks", "evaluation"): assert any(name.startswith(f"{room}.") for name in counted), room
    assert not [name for name in counted if name.startswith(("viz", "studio", "cli", "studies"))]      # pages and pictures
    for name in counted: assert imported_modules(name) <= counted | {one for one in imported_modules(name) if one.startswith(WITHOUT_SAY)}, name


# a package of somebody else's, installed

@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "A folder on the path with a module and its entry point, as pip leaves them."
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(HERE / "toy_backbone.py", folder / "toy_backbone.py")
    about = folder / "toy_backbone-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backbone\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pli.backbones]\ntoy = toy_backbone:load\n")
    return folder


@pytest.fixture
def plugged(installed, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(installed))
    return installed


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, pairs=48, queries=12, gallery_size=60)
    return folder


def pli_says(capfd, *words) -> str:
    assert main([str(word) for word in words]) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def test_another_kind_of_backbone_is_loaded_by_its_word_and_by_its_folder(plugged, tmp_path):
    toy = load_backbone("toy:small", seed=3)
    toy.save(tmp_path / "toy")
    again = load_backbone(tmp_path / "toy")
    assert type(again).__name__ == "Toy" and again.fingerprint() == toy.fingerprint() != load_backbone("toy:small", seed=4).fingerprint() and not again.training
    embedded, tokens = toy.embed_tokens(["a red heart"])
    assert torch.equal(toy.encode_embedded(embedded, tokens), toy.encode_text(["a red heart"]))


def test_a_kind_that_is_not_installed_is_named(tmp_path):
    (tmp_path / "backbone.json").write_text(json.dumps({"kind": "toy\x1b"}))
    with pytest.raises(PliError, match="names the kind 'toy.x1b', and no installed package|names the kind toy.*no installed package"): load_backbone(tmp_path)
    with pytest.raises(PliError): load_backbone("toy:small")


def test_another_kind_of_backbone_is_tuned_evaluated_and_searched_with(plugged, world, tmp_path, capfd):
    run = tmp_path / "run"
    tuned = ("tune", world / "pairs.csv", "--model", "toy:small", "--hide", "random:0.5", "--steps", 6, "--batch-size", 16, "--warmup", 1, "--out", run, "--device", "cpu")
    pli_says(capfd, *tuned)
    before = (run / "last" / "toy.safetensors").read_bytes()
    pli_says(capfd, *tuned)                                                       # a finished run is continued: nothing to do
    assert (run / "last" / "toy.safetensors").read_bytes() == before
    for model in ("toy:small", run / "last"):
        pli_says(capfd, "evaluate", "--model", model, "--queries", world / "queries.json", "--gallery", world / "gallery.json", "--root", world, "--composer", "sum:1", "--out", tmp_path / "report.json", "--device", "cpu")
        assert json.loads((tmp_path / "report.json").read_text())
    first = sorted((world / "images").glob("*.png"))[0]
    found = json.loads(pli_says(capfd, "search", world / "images", "a red heart", "--image", first, "--model", run / "last", "--k", 5, "--json"))
    assert len(found if isinstance(found, list) else found["hits"]) == 5
    assert "trust in the map" in pli_says(capfd, "search", world / "images", "a red heart", "--image", first, "--model", run / "last", "--explain", 1)


def test_a_run_with_another_kind_of_backbone_goes_on_after_a_stop(plugged, world, tmp_path, capfd):
    tuned = lambda out, steps: ("tune", world / "pairs.csv", "--model", "toy:small", "--steps", steps, "--batch-size", 16, "--warmup", 1, "--checkpoint-every", 2, "--out", out, "--device", "cpu")
    pli_says(capfd, *tuned(tmp_path / "whole", 6))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plugged), *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = "import os, pli.training.checkpoints as t, sys\nsave = t.save_checkpoint\ndef then_die(*all): save(*all); os._exit(7)\nt.save_checkpoint = then_die\nfrom pli.cli.main import main\nmain(sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", code, *map(str, tuned(tmp_path / "cut", 6))], env=environment, capture_output=True).returncode == 7
    pli_says(capfd, *tuned(tmp_path / "cut", 6))
    assert (tmp_path / "cut" / "last" / "toy.safetensors").read_bytes() == (tmp_path / "whole" / "last" / "toy.safetensors").read_bytes()


def test_another_kind_of_backbone_is_studied(plugged, tmp_path, capfd):
    (tmp_path / "plan.toml").write_text('''
title = "Toys"
control = "control"
held_out = 20
start = "toy:small"
seeds = [0, 1]
composers = ["sum:1", "product:1"]
[pairs]
world = {shape = 1, colour = 1}
count = 60
queries = 20
gallery = 80
[settings]
steps = 3
batch_size = 16
warmup = 1
[arms.control]
objective = "clip"
hide = "none"
[arms.masked]
hide = "random:0.5"
[arms.half]
average = ["start", "masked"]
''')
    pli_says(capfd, "study", tmp_path / "plan.toml", "--runs", tmp_path / "runs", "--out", tmp_path / "out", "--device", "cpu")
    assert {"masked-0.json", "control-1.json", "half-0.json", "start.json"} <= {path.name for path in (tmp_path / "out").glob("*.json")}

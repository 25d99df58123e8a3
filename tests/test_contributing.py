"The recipes of CONTRIBUTING.md, followed: each test adds one thing, in this file alone, and uses it as a reader would."
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import toy_backbone
from pli.backbones.registry import BACKBONES
from pli.benchmarks.own import read_queries
from pli.benchmarks.protocols import Reader
from pli.benchmarks.registry import BENCHMARKS
from pli.cli import options
from pli.cli import tune as tune_command
from pli.cli.main import main
from pli.core import read_json, unit
from pli.data.pairs import read_pairs
from pli.data.registry import PAIR_READERS
from pli.data.tables import PairReader, Record
from pli.losses import compose_query
from pli.methods.masked import MaskedTuning
from pli.methods.method import Method, options_of
from pli.methods.registry import METHODS
from pli.settings import TuneSettings, setting
from pli.viz.style import INK, Drawing, save_figure, styled, to_png
from pli.world import save_world

SHORT = ("--steps", 2, "--batch-size", 8, "--warmup", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, pairs=24, queries=8, gallery_size=60)
    return folder


@pytest.fixture
def toy(monkeypatch):
    "A backbone: one function in `BACKBONES`. tests/test_doors.py has it installed as somebody else's package."
    monkeypatch.setitem(BACKBONES, "toy", toy_backbone.load)
    return "toy:small"


def pli(*words): assert main([str(word) for word in words]) == 0


def test_a_backbone(toy, world, capsys):
    first = next((world / "images").glob("*.png"))
    pli("search", world / "images", "a red heart", "--image", first, "--model", toy, "--k", 3, "--json", "--device", "cpu")
    assert len(json.loads(capsys.readouterr().out)) == 3


def margin_loss(query, target, scale, margin=0.1):
    "InfoNCE in which the right answer must be better by a margin (additive margin softmax, Wang et al. 2018, arXiv 1801.05599)."
    cosines = unit(query.float()) @ unit(target.float()).T
    return cross_entropy(scale * (cosines - margin * torch.eye(len(cosines))), torch.arange(len(cosines)))


class Margin(Method):
    "Masked picture and words with a margin: a method that uses the loss."
    name, own = "margin", ("weight",)

    def loss(self, backbone, batch, settings, gallery=None):
        view = batch.hidden(backbone, settings.hide)
        query = compose_query(backbone.encode_image(view.pixels, view.hidden), backbone.encode_text(view.captions), settings.weight)
        return margin_loss(query, (gallery or backbone).encode_image(batch.pixels), backbone.scale)


def test_a_loss(toy, world, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "margin", Margin())
    right = torch.eye(4)
    assert margin_loss(right, right, 100.0) < margin_loss(right, right.roll(1, 0), 100.0)
    pli("tune", world / "pairs.csv", "--model", toy, "--objective", "margin", "--hide", "random:0.5", "--weight", 0.5, "--out", tmp_path / "run", *SHORT)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())


class Echo(MaskedTuning):
    "A method with both sides of its own: words that are said louder, a gallery that stays as it was, an option of its own."
    name, options, frozen_gallery, asks_with = "echo", {"loudness": 2.0}, True, "loud caption and hidden picture"

    def query(self, backbone, pictures, words, settings):
        return options_of(self, settings)["loudness"] * unit(backbone.encode_text(words)) + unit(pictures)

    def loss(self, backbone, batch, settings, gallery=None):
        view = batch.hidden(backbone, settings.hide)
        query = self.query(backbone, backbone.encode_image(view.pixels, view.hidden), view.captions, settings)
        with torch.no_grad(): targets = gallery.encode_image(batch.pixels)
        assert not any(weight.requires_grad for weight in gallery.parameters()) and gallery is not backbone
        return margin_loss(query, targets, backbone.scale)


def test_a_method(toy, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "echo", Echo())
    command = ["tune", world / "pairs.csv", "--model", toy, "--objective", "echo", "--options", "loudness=3", *SHORT]
    pli(*command, "--out", tmp_path / "run")
    assert "loud caption and hidden picture find the whole picture first" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "run.json")["settings"]["options"] == "loudness=3"
    pli("index", world / "images", "--model", toy, "--device", "cpu")
    capsys.readouterr()
    tuned = tmp_path / "run" / "last"
    pli("search", world / "images", "red", "--model", toy, "--query-model", tuned, "--k", 3, "--json", "--device", "cpu")      # reads what the start has encoded
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 3 and "nothing new" in said.err
    own = ["--queries", world / "queries.json", "--gallery", world / "gallery.json", "--root", world, "--composer", "sum:1", "--device", "cpu"]
    pli("evaluate", "--model", toy, "--query-model", tuned, *own, "--out", tmp_path / "report.json")
    assert "method" in read_json(tmp_path / "report.json")["specs"]            # its own query beside the composers
    for wrong in (["search", world / "images", "red", "--device", "cpu"], ["evaluate", *own]):                # not among its own features
        assert main([str(word) for word in [*wrong, "--model", tuned]]) == 1 and f"--query-model {tuned}" in capsys.readouterr().err
    assert main([str(word) for word in [*command[:-2], "--prolong", tmp_path / "run", "--learning-rate", 1e-4, "--out", tmp_path / "more"] if word not in ("--model", toy)]) == 1
    assert "a prolonged run no longer has" in capsys.readouterr().err
    assert main([str(word) for word in [*command[:-4], "--options", "noise=3", "--out", tmp_path / "no"]]) == 1 and "it has loudness" in capsys.readouterr().err


def read_lines(path, image_key, caption_key, inside):
    "Pairs as lines `picture: caption`."
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        name, _, caption = line.partition(": ")
        yield Record(str(path), number, name, caption)


def test_a_pair_source(toy, world, tmp_path, monkeypatch):
    monkeypatch.setitem(PAIR_READERS, ".pairs", PairReader(read_lines, lambda path: path.suffix == ".pairs", "a picture and a caption a line"))
    known = read_pairs(world / "pairs.csv")
    lines = [f"{Path(path).relative_to(world)}: {caption}" for path, caption in zip(known.paths, known.captions)]
    (world / "mine.pairs").write_text("\n".join([*lines, "nothing.png: a picture that is not there"]), encoding="utf-8")
    found = read_pairs(world / "mine.pairs")
    assert (found.paths, found.captions) == (known.paths, known.captions)
    assert [problem.line for problem in found.problems] == [len(lines) + 1]       # checked like every other source
    pli("tune", world / "mine.pairs", "--model", toy, "--out", tmp_path / "run", *SHORT)


def test_an_option(toy, world, tmp_path, monkeypatch):
    more = dataclasses.make_dataclass("More", [("margin", float, setting(0.1, "how much better the right answer must be"))], bases=(TuneSettings,), frozen=True)
    seen = []

    class Watching(Margin):
        name = "watching"

        def loss(self, backbone, batch, settings, gallery=None):
            seen.append(settings.margin)
            return margin_loss(backbone.encode_text(batch.captions), backbone.encode_image(batch.pixels), backbone.scale, settings.margin)

    for module in (options, tune_command): monkeypatch.setattr(module, "TuneSettings", more)      # stands for one line in the record itself
    monkeypatch.setitem(METHODS, "watching", Watching())
    pli("tune", world / "pairs.csv", "--model", toy, "--objective", "watching", "--margin", 0.25, "--out", tmp_path / "run", *SHORT)
    assert set(seen) == {0.25}


@styled
def rank_steps(ranks: dict[str, list[int]]) -> Drawing:
    "How many queries have found their answer up to each rank."
    figure = Drawing(figsize=(4, 2.5), layout="constrained")
    axis = figure.subplots()
    for name, found in ranks.items(): axis.step(sorted(found), torch.arange(1, len(found) + 1), color=INK, label=name)
    axis.set(xlabel="rank of the right answer", ylabel="queries")
    return figure


def test_a_figure(tmp_path):
    drawn = to_png(rank_steps({"start": [1, 5, 2]}))
    assert drawn == to_png(rank_steps({"start": [1, 5, 2]})) and len(drawn) < 40_000
    for ending in (".png", ".svg", ".pdf"): save_figure(rank_steps({"start": [1, 5, 2]}), tmp_path / f"steps{ending}")


def read_mine(root, split, protocol):
    found = read_queries(root / "queries.json", root / "gallery.json")
    return dataclasses.replace(found, name="mine", protocol=protocol, without_reference=protocol["reference"] == "left-out")


def test_a_benchmark(toy, world, tmp_path, monkeypatch):
    reader = Reader(splits=("",), split="", choices={"reference": ("left-out", "kept")}, protocols={"default": {}}, read=read_mine)
    monkeypatch.setitem(BENCHMARKS, "mine", reader)
    for choice in ("left-out", "kept"):
        pli("evaluate", "--benchmark", "mine", "--root", world, "--protocol", f"reference={choice}", "--model", toy, "--composer", "sum:1", "--out", tmp_path / f"{choice}.json", "--device", "cpu")
        assert f"reference={choice}" in json.loads((tmp_path / f"{choice}.json").read_text())["benchmark"]["protocol"]

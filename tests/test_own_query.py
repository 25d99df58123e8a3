"A model that was tuned beside another one's gallery, and a method that makes its query in a way of its own, are measured as they search."
import json
from dataclasses import asdict

import pytest
import torch

import toy_backbone
from pli.backbones.registry import BACKBONES
from pli.benchmarks.own import read_queries
from pli.cli.main import main
from pli.core import PliError, read_json, unit, write_json
from pli.data.pairs import read_pairs
from pli.data.batches import PairSet
from pli.evaluation.ranks import encode, encode_queries, rank_queries, scores_of, sweep
from pli.gallery.models import check_gallery_model, check_reader, features_key, features_read, tuned_with
from pli.backbones.loading import load_backbone
from pli.losses import contrastive
from pli.methods.method import Method, options_of
from pli.methods.registry import METHODS
from pli.settings import TuneSettings
from pli.training.loop import tune
from pli.world import save_world


class Loud(Method):
    "Words that are said louder, beside a gallery that stays as it was."
    name, options, frozen_gallery = "loud", {"loudness": 2.0}, True

    def query(self, backbone, pictures, words, settings):
        return options_of(self, settings)["loudness"] * unit(backbone.encode_text(words)) + unit(pictures)

    def loss(self, backbone, batch, settings, gallery=None):
        view = batch.hidden(backbone, settings.hide)
        query = self.query(backbone, backbone.encode_image(view.pixels, view.hidden), view.captions, settings)
        return contrastive(query, gallery.encode_image(batch.pixels).detach(), backbone.scale)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, pairs=24, queries=12, gallery_size=60)
    return folder


@pytest.fixture
def tuned(world, tmp_path, monkeypatch):
    "The folder of a model that Loud has tuned with a rate that moves it far."
    monkeypatch.setitem(BACKBONES, "toy", toy_backbone.load)
    monkeypatch.setitem(METHODS, "loud", Loud())
    backbone = load_backbone("toy:small")
    settings = TuneSettings(objective="loud", options="loudness=3", steps=3, batch_size=8, warmup=0, learning_rate=0.01)
    tune(backbone, PairSet(read_pairs(world / "pairs.csv"), backbone.pixels), settings, tmp_path / "run", say=lambda line: None)
    return tmp_path / "run" / "last"


def test_the_pictures_are_the_starts_the_query_is_the_methods(world, tuned):
    benchmark, start, reader = read_queries(world / "queries.json", world / "gallery.json", world), load_backbone("toy:small"), load_backbone(tuned)
    assert tuned_with(reader).options == "loudness=3" and features_read(reader) == (features_key(reader), features_key(start))
    features = encode(reader, benchmark, gallery=start)
    alone = {"start": encode(start, benchmark), "tuned": encode(reader, benchmark)}
    assert torch.equal(features.pictures, alone["start"].pictures) and torch.equal(features.references, alone["tuned"].pictures)
    assert torch.equal(features.texts, alone["tuned"].texts) and not torch.allclose(features.pictures, features.references, atol=1e-3)
    queries = encode_queries(METHODS["loud"], tuned_with(reader), reader, benchmark)
    by_hand = unit(3 * features.texts + features.references[benchmark.references])
    assert torch.allclose(queries, by_hand, atol=1e-5)
    from dataclasses import replace
    features = replace(features, queries=queries)
    for spec, rows, gallery, scores in scores_of(features, benchmark, ["method", "sum:1"], most=200):
        halves = features.references[benchmark.references[rows]], features.texts[rows]
        wanted = (by_hand[rows] if spec == "method" else unit(halves[0] + halves[1])) @ features.pictures[gallery].T
        kept = torch.isfinite(scores)
        assert torch.allclose(scores[kept], wanted[kept], atol=1e-5) and ((~kept).sum(1) == benchmark.without_reference).all()
    assert rank_queries(features, benchmark, "method").rank.tolist() == sweep(features, benchmark, ["image", "method"])["method"].rank.tolist()
    with pytest.raises(PliError, match="no queries of a method's own"): rank_queries(alone["tuned"], benchmark, "method")


def test_evaluate_names_both_models_and_refuses_the_tuned_one_alone(world, tuned, tmp_path, capsys):
    own = ["--queries", world / "queries.json", "--gallery", world / "gallery.json", "--root", world, "--device", "cpu", "--composer", "sum:1"]
    command = lambda *more: main([str(word) for word in ["evaluate", *own, *more]])
    assert command("--model", "toy:small", "--query-model", tuned, "--out", tmp_path / "a.json") == 0
    record = read_json(tmp_path / "a.json")
    assert record["query model"] == str(tuned) and set(record["outcomes"]) >= {"sum:1", "image", "text", "method"} and "query model" in capsys.readouterr().out
    features = encode(load_backbone(tuned), read_queries(world / "queries.json", world / "gallery.json", world), gallery=load_backbone("toy:small"))
    assert record["outcomes"]["image"]["rank"] == " ".join(map(str, rank_queries(features, read_queries(world / "queries.json", world / "gallery.json", world), "image").rank.tolist()))
    assert command("--model", tuned) == 1 and f"--query-model {tuned}" in capsys.readouterr().err
    assert command("--model", "toy:other", "--query-model", tuned) == 0                 # the same weights under another name
    toy_backbone.load("toy:small", seed=9).save(tmp_path / "nine")
    assert command("--model", tmp_path / "nine", "--query-model", tuned) == 1 and "reads features" in capsys.readouterr().err


def test_a_model_of_a_method_that_is_gone_is_measured_without_its_query(world, tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(METHODS, "loud")
    command = ["evaluate", "--queries", world / "queries.json", "--gallery", world / "gallery.json", "--root", world, "--composer", "sum:1", "--device", "cpu"]
    assert main([str(word) for word in [*command, "--model", "toy:small", "--query-model", tuned, "--out", tmp_path / "a.json"]]) == 0
    assert "what its own method asks with is not measured (objective must be one of" in capsys.readouterr().out
    assert "method" not in read_json(tmp_path / "a.json")["outcomes"]
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert f"model toy:small; query model {tuned}" in capsys.readouterr().out


def test_older_and_damaged_notes(tuned):
    note = tuned / "features.json"
    said = json.loads(note.read_text())
    reader = load_backbone(tuned)
    write_json(note, {"reads": said["reads"], "what": said["what"]})                    # as it was written before
    assert tuned_with(reader) is None and check_gallery_model(reader, tuned) is None and check_reader(reader, tuned, said["reads"], "toy:small") is None
    write_json(note, said | {"settings": asdict(TuneSettings()) | {"a setting of a later version": 3}})
    assert tuned_with(reader) == TuneSettings()
    for settings in ([], {"steps": "many"}, {"weight": None}):
        write_json(note, said | {"settings": settings})
        with pytest.raises(PliError, match="features.json: its settings are damaged"): tuned_with(reader)


@pytest.mark.parametrize("made", (lambda words: torch.zeros(3), lambda words: torch.full((len(words), 24), torch.nan), lambda words: [1]))
def test_a_query_that_is_no_vector_is_told(world, tuned, made):
    odd = type("Odd", (Loud,), {"name": "odd", "query": lambda self, backbone, pictures, words, settings: made(words)})()
    with pytest.raises(PliError, match="objective odd: its query must be"):
        encode_queries(odd, TuneSettings(), load_backbone(tuned), read_queries(world / "queries.json", world / "gallery.json", world))


def test_a_study_searches_the_gallery_of_the_start(tmp_path, monkeypatch, capfd):
    from pli.evaluation.ranks import rank_queries
    from pli.studies.data import load_study_data, unpacked, with_pictures
    from pli.studies.plan import read_plan
    monkeypatch.setitem(BACKBONES, "toy", toy_backbone.load)
    monkeypatch.setitem(METHODS, "loud", Loud())
    (tmp_path / "plan.toml").write_text("""
title = "Toys"
control = "control"
held_out = 20
start = "toy:small"
seeds = [0]
composers = ["sum:1"]
[pairs]
world = {shape = 1, colour = 1}
count = 60
queries = 20
gallery = 80
[settings]
steps = 3
batch_size = 16
warmup = 0
learning_rate = 0.01
[arms.control]
objective = "clip"
hide = "none"
[arms.loud]
objective = "loud"
[arms.half]
average = ["start", "loud"]
""")
    assert main(["study", str(tmp_path / "plan.toml"), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0, capfd.readouterr().err
    plan = read_plan(tmp_path / "plan.toml")
    material = with_pictures(load_study_data(plan, tmp_path, torch.device("cpu"), lambda line: None))
    start, model = load_backbone("toy:small"), load_backbone(next((tmp_path / "runs").glob("loud-0*")) / "last")
    ranks = {name: read_json(tmp_path / "out" / f"{name}-0.json") for name in ("loud", "control", "half")}
    stored = unpacked(ranks["loud"]["ranks"]["sum:1"], len(material.benchmark))
    beside, alone = (rank_queries(encode(model, material.benchmark, material.pictures, gallery=gallery), material.benchmark, "sum:1").rank for gallery in (start, None))
    assert torch.equal(stored, beside) and not torch.equal(beside, alone)
    assert {name: record.get("gallery") for name, record in ranks.items()} == {"loud": "start", "half": "start", "control": None}

"Models for and from other libraries: what is written is the same model, whole or not there, and its card says what is known and nothing else."
import fcntl
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import pli.evaluation.export as export
from pli.backbones.huggingface import PLAIN_CAPTIONS, check_layout, compare_huggingface, huggingface_pictures, mended, save_huggingface
from pli.backbones.loading import load_backbone
from pli.backbones.released import load_released, read_released
from pli.cli.main import main
from pli.core import PliError
from pli.world import save_world

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install 'pli[hf]'")


def pli(capfd, *words, status=0) -> str:
    assert main([str(word) for word in words]) == status
    said = capfd.readouterr()
    return said.out if status == 0 else said.err


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, pairs=48, queries=12, gallery_size=60)
    return folder


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["tune", str(world / "pairs.csv"), "--model", "pli-tiny-48", "--quick-gelu", "--steps", "4", "--batch-size", "16", "--warmup", "1", "--out", str(out), "--device", "cpu"]) == 0
    return out


# out, for open_clip

def test_a_run_becomes_a_folder_that_open_clip_loads_to_the_bit(run, tmp_path, capfd):
    said = pli(capfd, "export", run, tmp_path / "out", "--licence", "apache-2.0")
    assert "written for open-clip and read back" in said and "unknown" not in said
    tuned, model = load_backbone(run / "best"), open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    pixels, words = torch.rand(3, 3, 48, 48), ["a red heart", "two stars"]
    with torch.no_grad():
        assert torch.equal(model.encode_image((pixels - tuned.mean) / tuned.std), tuned.encode_image(pixels))
        assert torch.equal(model.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(words)), tuned.encode_text(words))
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("license: apache-2.0", "- model: pli-tiny-48", "- table: pairs.csv", "- hide: random:0.75", "- steps: 4", "Validation: the share of", "| 0 | 1.0000 |", "nothing is said of any benchmark"):
        assert words in card, words
    assert str(run.parent) not in card


def test_the_end_of_a_run_and_a_folder_in_it_are_found(run, tmp_path, capfd):
    pli(capfd, "export", run, "--out", tmp_path / "last", "--last")
    assert load_backbone(tmp_path / "last").fingerprint() == load_backbone(run / "last").fingerprint() != load_backbone("pli-tiny-48", quick_gelu=True).fingerprint()
    pli(capfd, "export", run / "last", tmp_path / "again")
    for out in ("last", "again"): assert "It is the end of its run" in (tmp_path / out / "README.md").read_text() and "- steps: 4" in (tmp_path / out / "README.md").read_text()


def test_the_card_holds_the_reports_of_these_weights_alone(run, world, tmp_path, capfd):
    searched = ("--queries", world / "queries.json", "--gallery", world / "gallery.json", "--root", world, "--composer", "sum:1", "--device", "cpu")
    for model, out in ((run / "last", "mine.json"), ("pli-tiny-48", "other.json")): pli(capfd, "evaluate", "--model", model, *searched, "--out", run / out)
    record = json.loads((run / "mine.json").read_text())
    (run / "broken.json").write_text(json.dumps({"weights": record["weights"], "kinds": {"all": 1}}))
    try: pli(capfd, "export", run, tmp_path / "out", "--last")
    finally:
        for name in ("mine.json", "other.json", "broken.json"): (run / name).unlink()
    card = (tmp_path / "out" / "README.md").read_text()
    mean = next(iter(next(iter(next(iter(record["kinds"].values()))["composers"].values())).values()))
    assert "{:.1f} [{:.1f}, {:.1f}]".format(*mean) in card and card.count("in percent with 95 % intervals") == 1 and "cannot be read" in card
    assert str(run.parent) not in card and f"model {run.name}/last" in card                  # where folders lie is nobody's business


@pytest.mark.parametrize("words, told", [
    (("--format", "onnx"), "unknown format onnx; known are open-clip, hf"),
    (("--licence", "mit\nbase_model: x"), "give an identifier"),
])
def test_what_cannot_be_asked_for_leaves_nothing(run, tmp_path, capfd, words, told):
    assert told in pli(capfd, "export", run, tmp_path / "out", *words, status=1)
    assert os.listdir(tmp_path) == []


def test_places_that_are_taken_and_runs_that_are_not_done_are_told(run, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "nothing is replaced" in pli(capfd, "export", run, tmp_path / "full", status=1)
    for words, told in ((("out", "--out", "other"), "OUT is given twice, as out and as other"), ((), "OUT is missing")):
        with pytest.raises(SystemExit): pli(capfd, "export", run, *words)
        assert told in capfd.readouterr().err
    (tmp_path / "file").write_text("x")
    assert "nothing is replaced" in pli(capfd, "export", run, tmp_path / "file", status=1)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_bytes((run / "run.json").read_bytes())
    assert "has not come to its end" in pli(capfd, "export", tmp_path / "begun", tmp_path / "out", status=1)
    (tmp_path / "begun" / "last").mkdir()
    assert "nothing was validated; --last" in pli(capfd, "export", tmp_path / "begun", tmp_path / "out", status=1)
    (tmp_path / "begun" / "run.json").write_text((run / "run.json").read_text().replace('"steps": 4', '"steps": 5'))
    assert "bits or words have changed" in pli(capfd, "export", tmp_path / "begun", tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()


def test_a_named_model_needs_weights(tmp_path, capfd):
    assert "say which weights" in pli(capfd, "export", "RN50", tmp_path / "out", status=1)


def test_an_empty_folder_is_taken_and_what_a_killed_one_left_is_cleared(run, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    dead, alive = tmp_path / ".out.1.part", tmp_path / ".out.2.part"
    for left in (dead, alive):
        left.mkdir()
        (left / ".lock").write_text("1")
    with open(alive / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pli(capfd, "export", run, tmp_path / "out")
    assert not dead.exists() and alive.exists() and (tmp_path / "out" / "README.md").exists()


def test_a_model_that_reads_back_as_another_is_never_there(run, tmp_path, monkeypatch):
    broken = export.LAYOUTS["open-clip"].__class__(**export.LAYOUTS["open-clip"].__dict__ | {"write": lambda backbone, folder: load_backbone("pli-tiny-48", seed=9).save(folder)})
    monkeypatch.setitem(export.LAYOUTS, "open-clip", broken)
    with pytest.raises(PliError, match="is another model when it is read back"): export.export_model(run, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_average_says_what_it_is_made_of(run, tmp_path, capfd):
    pli(capfd, "average", run / "best", run / "last", "--out", tmp_path / "mean")
    pli(capfd, "export", tmp_path / "mean", tmp_path / "out")
    assert "- averaged from: run/best, run/last" in (tmp_path / "out" / "README.md").read_text()


def test_another_kind_of_model_is_refused_by_name(tmp_path, monkeypatch):
    import toy_backbone
    from pli.backbones.registry import BACKBONES
    monkeypatch.setitem(BACKBONES, "toy", toy_backbone.load)
    with pytest.raises(PliError, match="is a Toy, no model of open_clip"): export.export_model("toy:small", tmp_path / "out")
    with pytest.raises(PliError, match="it is a Toy, no model of open_clip"): check_layout(load_backbone("toy:small"))
    assert os.listdir(tmp_path) == []


# out, for transformers

REFUSED = {"RN50": "its picture tower is a ResNet", "ViT-B-16-SigLIP": "built as CustomTextCLIP", "coca_ViT-B-32": "built as CoCa", "convnext_base": "a tower of timm"}


@pytest.mark.parametrize("name", ["RN50", "coca_ViT-B-32", "convnext_base"])
def test_architectures_without_a_place_are_refused_by_name(name):
    with pytest.raises(PliError, match=f"cannot be written in the Hugging Face CLIP layout.*{REFUSED[name]}.*Take the format open-clip"): check_layout(load_backbone(name))


@pytest.mark.parametrize("tower, change, words", [
    ("vision_cfg", {"pool_type": "avg"}, "vision_cfg: pool_type is 'avg'"),
    ("vision_cfg", {"no_ln_pre": True}, "vision_cfg: no_ln_pre is True"),
    ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg: ls_init_value is 0.1"),
    ("vision_cfg", {"image_size": [48, 64]}, "its pictures are 48 x 64"),
    ("text_cfg", {"no_causal_mask": True}, "text_cfg: no_causal_mask is True"),
    ("text_cfg", {"pool_type": "last"}, "its text is read at last"),
    ("text_cfg", {"proj_bias": True}, "text_cfg: proj_bias is True"),
    ("text_cfg", {"vocab_size": 1000}, "it knows 1,000 words"),
])
def test_settings_without_a_place_are_named(tmp_path, tower, change, words):
    tiny = load_backbone("pli-tiny-48")
    config = json.loads(json.dumps(tiny.config))
    config["model_cfg"][tower] |= change
    model = open_clip.model.CLIP(**config["model_cfg"])
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    config["preprocess_cfg"]["size"] = config["model_cfg"]["vision_cfg"]["image_size"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(PliError, match=words): check_layout(load_backbone(tmp_path))


def test_a_transform_that_pads_is_refused():
    tiny = load_backbone("pli-tiny-48")
    tiny.config["preprocess_cfg"]["resize_mode"] = "longest"
    with pytest.raises(PliError, match="resized by the longest side and padded"): huggingface_pictures(tiny)


def test_without_the_library_the_extra_is_named_and_nothing_is_written(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'pli[hf]'" in pli(capfd, "export", run, tmp_path / "out", "--format", "hf", status=1)
    assert os.listdir(tmp_path) == []


@needs_transformers
def test_a_run_becomes_a_folder_that_transformers_loads(run, tmp_path, capfd):
    from transformers import CLIPModel, CLIPProcessor
    said = pli(capfd, "export", run, tmp_path / "out", "--format", "hf")
    assert "written for hf and read back" in said and "licence of the base is unknown" in said
    tuned, model, processor = load_backbone(run / "best"), CLIPModel.from_pretrained(tmp_path / "out"), CLIPProcessor.from_pretrained(tmp_path / "out")
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == "quick_gelu" and model.config.text_config.eos_token_id == 49407
    words, pixels = ["a red heart", "two small stars on black " * 9], torch.rand(2, 3, 48, 48)
    inputs = processor.tokenizer(words, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        answer = model(pixel_values=(pixels - tuned.mean) / tuned.std, **inputs)
        unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)
        assert torch.allclose(answer.image_embeds, unit(tuned.encode_image(pixels)), atol=1e-6) and torch.allclose(answer.text_embeds, unit(tuned.encode_text(words)), atol=1e-6)
        assert torch.allclose(answer.logits_per_image, tuned.scale * unit(tuned.encode_image(pixels)) @ unit(tuned.encode_text(words)).T, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "mends texts before it reads" in card and "license: unknown" in card


@needs_transformers
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_both_activations_are_written(tmp_path, quick_gelu):
    backbone = load_backbone("pli-tiny-64", seed=2, quick_gelu=quick_gelu)
    with torch.no_grad():
        for weight in backbone.parameters(): weight.mul_(1.5)                 # far enough from 0 for the two to differ
    save_huggingface(backbone, tmp_path)
    assert max(compare_huggingface(backbone, tmp_path).pictures, compare_huggingface(backbone, tmp_path).words) < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    for tower in ("text_config", "vision_config"): config[tower]["hidden_act"] = "gelu" if quick_gelu else "quick_gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PliError, match="is another model"): compare_huggingface(backbone, tmp_path)


@needs_transformers
@pytest.mark.parametrize("name", ["text_projection.weight", "visual_projection.weight", "text_model.encoder.layers.2.self_attn.q_proj.weight", "vision_model.encoder.layers.1.mlp.fc2.bias", "text_model.embeddings.position_embedding.weight"])
def test_one_wrong_weight_is_seen(tmp_path, name):
    backbone = load_backbone("pli-tiny-48")
    save_huggingface(backbone, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {name: weights[name] + 0.01 * torch.randn_like(weights[name])}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PliError, match="is another model when it is read back"): compare_huggingface(backbone, tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PliError, match="does not find its weights"): compare_huggingface(backbone, tmp_path)


@needs_transformers
def test_other_tokens_are_seen(tmp_path):
    backbone = load_backbone("pli-tiny-48")
    save_huggingface(backbone, tmp_path)
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:1] + merges[40:]) + "\n")
    with pytest.raises(PliError, match="captions became other tokens"): compare_huggingface(backbone, tmp_path)


@needs_transformers
def test_mended_texts_become_the_same_tokens(tmp_path):
    from transformers import CLIPTokenizer
    backbone = load_backbone("pli-tiny-64")
    save_huggingface(backbone, tmp_path)
    tokenizer, own = CLIPTokenizer.from_pretrained(tmp_path), open_clip.SimpleTokenizer(context_length=24)
    end = lambda row: row[: row.index(49407) + 1]
    odd = ["it’s", "black &amp; white", "ﬁne", "ＡＢＣ", "Ã©tude", "a\x1cb", "a\u200bb", "½ ²", "straße", "नमस्ते", "½\u00a0cup", *PLAIN_CAPTIONS]
    theirs = tokenizer([mended(text) for text in odd], truncation=True, padding="max_length")["input_ids"]
    assert [end(row) for row in theirs] == [end(row) for row in own(odd).tolist()]


# in

def released(backbone, **more) -> dict:
    "What the authors' code stores of a model, by the names in its description."
    state = backbone.model.state_dict()
    image = {name.replace("visual.", "visual_encoder.", 1): weight for name, weight in state.items() if name.startswith("visual.")}
    text = {name: weight for name, weight in state.items() if not name.startswith("visual.") and name != "logit_scale"}
    towers = {"image_encoder": image | {"vision_mask_token": torch.zeros(1, 1, 128)}, "text_encoder": text, "compositor": {}}
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-6, "params": [0]}]}
    return {"model_state_dict": towers | more, "optimizer_state_dict": moments, "step": 3}


def test_a_released_checkpoint_becomes_a_model_to_the_bit(tmp_path, capfd):
    tuned = load_backbone("pli-tiny-48", seed=7, quick_gelu=True)
    torch.save(released(tuned), tmp_path / "tuned.pt")
    said = pli(capfd, "import", tmp_path / "tuned.pt", tmp_path / "out", "--model", "pli-tiny-48", "--licence", "mit")
    assert "quick gelu, as in the released code" in said and "100 is taken" in said and "stored at step 3" in said
    model, pixels = load_backbone(tmp_path / "out"), torch.rand(3, 3, 48, 48)
    assert torch.equal(model.encode_image(pixels), tuned.encode_image(pixels)) and torch.equal(model.encode_text(["a heart"]), tuned.encode_text(["a heart"]))
    assert math.isclose(float(model.scale.detach()), 100, rel_tol=1e-5) and model.config["model_cfg"]["quick_gelu"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- imported from: tuned.pt" in card and "license: mit" in card and "100 is taken" in card
    pli(capfd, "export", tmp_path / "out", tmp_path / "on")                   # what it is, is still known
    assert "- imported from: tuned.pt" in (tmp_path / "on" / "README.md").read_text()


def test_the_temperature_is_that_of_the_weights_it_was_tuned_from(tmp_path):
    base, tuned = load_backbone("pli-tiny-48", seed=1), load_backbone("pli-tiny-48", seed=7)
    base.model.logit_scale.data.fill_(3.25)
    save_file(base.model.state_dict(), tmp_path / "base.safetensors")
    torch.save(released(tuned), tmp_path / "tuned.pt")
    model, told = load_released(tmp_path / "tuned.pt", "pli-tiny-48", str(tmp_path / "base.safetensors"), quick_gelu=False)
    assert float(model.model.logit_scale) == 3.25 and torch.equal(model.encode_text(["a"]), tuned.encode_text(["a"])) and "base.safetensors" in " ".join(told)


class Evil:
    def __reduce__(self): return (os.mkdir, ("ran",))


@pytest.mark.parametrize("make, words", [
    (lambda tiny: released(tiny, compositor={"combiner.weight": torch.zeros(2)}), "learned head .1 entry under compositor"),
    (lambda tiny: tiny.model.state_dict(), "is no checkpoint of masked tuning's authors"),
    (lambda tiny: {"model_state_dict": [1, 2]}, "is no checkpoint of masked tuning's authors"),
    (lambda tiny: released(tiny, image_encoder={"blocks.0.weight": torch.zeros(2)}), "blocks.0.weight is in its image_encoder.*such as BLIP"),
    (lambda tiny: released(tiny, text_encoder={"ln_final.weight": "words"}), "ln_final.weight among its weights is no tensor"),
    (lambda tiny: released(tiny, text_encoder={"ln_final.weight": torch.zeros(128)}), "weights of another model: it lacks"),
    (lambda tiny: released(tiny, text_encoder={"visual.proj": torch.zeros(2)}), "both towers hold visual.proj"),
    (lambda tiny: released(tiny, text_encoder={n: w * float("nan") for n, w in released(tiny)["model_state_dict"]["text_encoder"].items()}), "not finite"),
    (lambda tiny: released(tiny) | {"step": Evil()}, "a pickle that asks for"),
])
def test_what_is_no_such_checkpoint_is_told_and_not_run(tmp_path, capfd, monkeypatch, make, words):
    import re
    monkeypatch.chdir(tmp_path)
    torch.save(make(load_backbone("pli-tiny-48")), "tuned.pt")
    assert re.search(words, pli(capfd, "import", "tuned.pt", "out", "--model", "pli-tiny-48", status=1))
    assert os.listdir(tmp_path) == ["tuned.pt"]


def test_the_other_way_names_the_command(tmp_path):
    torch.save(released(load_backbone("pli-tiny-48")), tmp_path / "tuned.pt")
    with pytest.raises(PliError, match="pli import tuned.pt OUT --model NAME"): load_backbone("pli-tiny-48", str(tmp_path / "tuned.pt"))
    assert read_released(tmp_path / "tuned.pt").step == 3


# strangers

@pytest.mark.parametrize("evil", ["![a](http://x.example/a.png)", "<img src=x>", "a\n\n# Free of charge", "x | y ` z", "\x1b[31mred\u202e", "[mit](javascript:1)"])
def test_a_stranger_writes_words_and_nothing_else(run, tmp_path, capfd, evil):
    made = json.loads((run / "provenance.json").read_text())
    copy = tmp_path / "run"
    (copy / "best").mkdir(parents=True)
    (copy / "last").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"): (copy / "best" / name).write_bytes((run / "best" / name).read_bytes())
    (copy / "run.json").write_text(json.dumps({"settings": {"hide": evil, evil: 1}, "pairs": evil, "start": evil}))
    (copy / "provenance.json").write_text(json.dumps(made | {"model": evil, "pretrained": evil, "pairs": {"table": evil}, "validation": evil, "scores": [{"step": evil, "score": evil}], "versions": {"pli": evil}}))
    pli(capfd, "export", copy, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "](" not in card and "<img" not in card and "\n# Free" not in card and "\x1b" not in card and "\u202e" not in card
    assert card.split("---")[1].count("\n") == 6


@pytest.mark.parametrize("tune_what", ["both", "text"])
def test_a_model_that_asks_another_gallery_says_so_in_its_copy(tune_what, tmp_path):
    "The note of a run with frozen targets goes along, and the card names both models, also where the text tower alone was tuned."
    import rank_worker
    from pli.core import read_json
    from pli.gallery.models import check_gallery_model
    from pli.settings import TuneSettings
    from pli.training.loop import tune
    settings = TuneSettings(steps=2, batch_size=12, warmup=0, target="frozen", learning_rate=1e-3, tune=tune_what)
    tune(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), settings, tmp_path / "run", say=lambda line: None)
    export.export_model(tmp_path / "run", tmp_path / "out", last=True)
    assert read_json(tmp_path / "out" / "features.json") == read_json(tmp_path / "run" / "last" / "features.json")
    if tune_what == "both":
        with pytest.raises(PliError, match="was tuned to ask a gallery that the model before tuning has made"):
            check_gallery_model(load_backbone(str(tmp_path / "out")), "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--model BASE --query-model FOLDER" in card and '--model FOLDER` searches' not in card

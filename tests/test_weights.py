"Files of weights as they come from strangers: what they are, what is in them, what they leave open; and configurations that want too much."
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from pli.backbones import load_backbone
from pli.core import PliError
from pli.weights import check_kind, in_whole_words, read_weights

SMALL = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
         "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "pliweights.json").write_text(json.dumps(SMALL))
    (folder / "pliweights-custom.json").write_text(json.dumps(SMALL | {"custom_text": True}))
    (folder / "pliweights-large.json").write_text(json.dumps(SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"image_size": 64}}))
    (folder / "pliweights-long.json").write_text(json.dumps(SMALL | {"text_cfg": SMALL["text_cfg"] | {"context_length": 20}}))
    (folder / "pliweights-biased.json").write_text(json.dumps(SMALL | {"init_logit_bias": -10}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def small(configs): return load_backbone("pliweights", seed=3)


def state(backbone): return {key: value.clone() for key, value in backbone.model.state_dict().items()}


# ---- what kind of file

class Whole(torch.nn.Module):
    "OpenAI's layout: the names of CLIP, three numbers, and code."
    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if part not in place._modules: place.add_module(part, torch.nn.Module())
                place = place._modules[part]
            place.register_buffer(last, value.half() if value.ndim > 1 else value)
        for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 49408)): self.register_buffer(name, torch.tensor(value))

    def forward(self, pixels: torch.Tensor): return pixels * 2


@pytest.fixture(scope="module")
def torchscript(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("openai") / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(Whole(state(small)), torch.ones(1), check_trace=False), str(path))
    return path


@pytest.mark.parametrize("name", ["ViT-B-32.pt", "weights.safetensors", "weights.bin"])
def test_a_torchscript_file_is_recognised_whatever_its_name(torchscript, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(torchscript.read_bytes())
    with pytest.raises(PliError, match="is a TorchScript program.*loading it runs the code in it.*convert it once: python -c .*--quick-gelu") as caught: load_backbone("pliweights", str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_the_recipe_for_openais_file_works_as_it_is_printed(small, torchscript):
    with pytest.raises(PliError) as caught: check_kind(torchscript)
    command = re.search(r"python (-c \".*\") and then give", str(caught.value))[1]
    subprocess.run([sys.executable, *shlex.split(command)], check=True, cwd=torchscript.parent)
    made = torchscript.with_suffix(".safetensors")
    assert made.exists()
    again = load_backbone("pliweights", str(made))
    for key, value in state(small).items(): assert torch.allclose(again.model.state_dict()[key], value, atol=1e-3), key


def zipped(path, members, pack=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", pack) as archive:
        for name, value in members.items(): archive.writestr(name, value)


def packed_bomb(path):
    torch.save({"visual.proj": torch.zeros(2_000_000)}, path)
    with zipfile.ZipFile(path) as archive: members = {entry: archive.read(entry) for entry in archive.namelist()}
    zipped(path, members, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("make, words", [
    (lambda path: path.write_bytes(b""), "it is empty"),
    (lambda path: path.write_text("<!DOCTYPE html>\n<html><head><title>Log in</title>"), "it is a web page"),
    (lambda path: path.write_text("\n  <html>"), "it is a web page"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605157884\n"), "pointer of Git LFS.*git lfs pull"),
    (lambda path: zipped(path, {"photos/a.txt": "hello"}), "zip archive, but no file of PyTorch"),
    (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(500)), "not whole"),
    (packed_bomb, "compressed zip archive"),
    (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "GGUF"),
    (lambda path: path.write_text("\x1b".join("not \u2028weights")), "neither safetensors nor a file of PyTorch"),
    (lambda path: path.write_text("epoch,loss\n1,2\n"), "it is text, and no weights: it begins with 'epoch,loss"),
    (lambda path: path.write_bytes((2**40).to_bytes(8, "little") + b"{" + b" " * 200), "not whole or not valid"),            # a header that is larger than any file
    (lambda path: path.write_bytes((90).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99999999,99999],"data_offsets":[0,39999959600004]}}'.ljust(90)), "not whole or not valid"),
    (lambda path: torch.save([torch.zeros(2)], path), "holds no weights, but an object of kind list"),
    (lambda path: torch.save({"epoch": 3, "loss": 0.5}, path), "holds no weights, but a table with epoch, loss"),
    (lambda path: torch.save(torch.zeros(3), path), "holds no weights, but an object of kind Tensor"),
    (lambda path: torch.save({"visual.proj": torch.zeros(2), "note": "text"}, path), "note among its weights is no tensor, but an object of kind str"),
    (lambda path: torch.save(torch.nn.Linear(2, 2), path), "a pickle that asks for torch.nn.modules.linear.Linear"),
    (lambda path: torch.save({"model_state_dict": {"image_encoder": {"visual_encoder.proj": torch.zeros(2)}, "text_encoder": {"text_projection": torch.zeros(2)}, "compositor": {}}, "step": 9}, path),
     "checkpoint of masked tuning's authors"),
    (lambda path: save_file({"fc.weight": torch.zeros(2, 2), "layer1.bn.bias": torch.zeros(2)}, path), "weights of another model: it lacks ln_final.bias, .* and 47 more; it holds what the model has no place for: fc.weight, layer1.bn.bias"),
    (lambda path: save_file({"vision_model.post_layernorm.weight": torch.zeros(2)}, path), "those of the transformers library"),
])
def test_other_files_are_told_by_name(small, tmp_path, make, words):
    path = tmp_path / "weights.pt"
    make(path)
    with pytest.raises(PliError, match=words) as caught: load_backbone("pliweights", str(path))
    message = str(caught.value)
    assert message.startswith("model 'pliweights' with weights") and str(path) in message and message.isprintable() and not message.rstrip(")").endswith("...") and "weights_only" not in message


def test_no_file_and_no_pipe_is_waited_for(tmp_path):
    import os
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "nothing.pt", tmp_path): 
        with pytest.raises(PliError, match="no such file"): read_weights(path)


@pytest.mark.parametrize("cut", [1, 100, 5000, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_half_a_file_is_named(small, tmp_path, kind, cut):
    path = tmp_path / f"weights.{kind}"
    save_file(state(small), path) if kind == "safetensors" else torch.save(state(small), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut if cut > 1 or isinstance(cut, int) else int(cut * len(whole))])
    with pytest.raises(PliError, match="weights.(safetensors|pt): it") as caught: load_backbone("pliweights", str(path))
    assert len(str(caught.value)) < 900


def test_shapes_that_differ_are_named(small, tmp_path):
    weights = state(small) | {"text_projection": torch.zeros(7, 5), "logit_scale": torch.zeros(4)}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(PliError, match=r"another shape are .*text_projection \(7 x 5 in the file, 16 x 24 in the model\)") as caught: load_backbone("pliweights", str(tmp_path / "w.safetensors"))
    assert "logit_scale (4 in the file, a number in the model)" in str(caught.value)


@pytest.mark.parametrize("text", ["word " * 200, "x" * 1000, "\x1b[31mred " * 100, ""])
def test_what_a_library_says_ends_after_a_word(text):
    line = in_whole_words(text)
    assert line.isprintable() and len(line) <= 304
    if " " in text and len(line) > 300: assert line.endswith("word ...") or line.endswith("red ...")


# ---- what is in it

@pytest.mark.parametrize("wrap", [
    lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model_state_dict": w, "optimizer_state_dict": {}, "loss": 0.1}, lambda w: {"CLIP": w, "epoch": 1},
    lambda w: {f"module.{key}": value for key, value in w.items()}, lambda w: {"state_dict": {f"model.{key}": value for key, value in w.items()}, "pytorch-lightning_version": "2.1"},
    lambda w: {"model": {f"module._orig_mod.{key}": value for key, value in w.items()}}, lambda w: {**w, "input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(49408)},
])
@pytest.mark.parametrize("name", ["pliweights", "pliweights-custom"])
def test_wrappers_and_prefixes_are_taken_off(small, tmp_path, wrap, name):
    torch.save(wrap(state(small)), tmp_path / "epoch_1.pt")
    again = load_backbone(name, str(tmp_path / "epoch_1.pt"), seed=99)
    words = ["a red shirt"]
    with torch.no_grad(): assert torch.equal(again.encode_text(words), small.encode_text(words)) and torch.equal(again.model.visual.proj, small.model.visual.proj)


@pytest.mark.parametrize("name, words", [("pliweights-large", "visual.positional_embedding was stretched from 17 x 32 to 65 x 32"), ("pliweights-long", "positional_embedding was stretched from 12 x 16 to 20 x 16"),
                                         ("pliweights-biased", "no logit_bias, 0 is taken")])
def test_what_is_made_to_fit_is_told(small, tmp_path, name, words):
    save_file(state(small), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=words): ours = load_backbone(name, str(tmp_path / "w.safetensors"))
    theirs = open_clip.create_model(name, str(tmp_path / "w.safetensors"))
    for key, value in theirs.state_dict().items(): assert torch.equal(ours.model.state_dict()[key], value)      # and is what open_clip makes of it


def test_weights_that_fit_are_put_in_without_a_word(small, tmp_path, recwarn):
    save_file(state(small), tmp_path / "w.safetensors")
    load_backbone("pliweights", str(tmp_path / "w.safetensors"))
    assert not recwarn.list
    assert load_file(tmp_path / "w.safetensors").keys() == small.model.state_dict().keys()

"Files of weights as they come from strangers: what they are, what is in them, what they leave open; and configurations that want too much."
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pli.backbones.loading import load_backbone
from pli.core import PliError
from pli.backbones.weights import PREPROCESS_VALUES, Notice, bytes_needed, check_config, check_file_kind, check_preprocess, in_whole_words, offline_for, out_of_reach, read_weights, similar_names, weights_names

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
    with pytest.raises(PliError) as caught: check_file_kind(torchscript)
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
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a pipe, not a file"), (tmp_path / "nothing.pt", "no such file"), (tmp_path, "a folder, not a file"), (Path("/dev/zero"), "a device, not a file")):
        with pytest.raises(PliError, match=words): read_weights(path)
        if words != "no such file":
            with pytest.raises(PliError, match=f"--pretrained {re.escape(str(path))}: .*not a file of weights"): load_backbone("pliweights", str(path))


@pytest.mark.parametrize("beginning, words", [(b"text, and then nothing for ever", "it is text"), (None, "need .* GiB of memory"), (b"\x80\x02", "need .* GiB of memory")])
def test_a_file_that_says_it_is_huge_costs_nothing(small, tmp_path, beginning, words):
    path = tmp_path / "weights.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**36], "data_offsets": [0, 2**38]}}).encode()
    path.write_bytes(beginning.ljust(1024, b" ") if beginning else len(header).to_bytes(8, "little") + header)
    os.truncate(path, path.stat().st_size + 2**38)          # of holes: no byte of it lies on the disk
    with pytest.raises(PliError, match=words): load_backbone("pliweights", str(path))


def test_an_archive_that_unpacks_to_more_than_there_is(small, tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("params/x.npy", bytes(2**24))
    monkeypatch.setattr("pli.backbones.weights._memory_free", lambda: 2**23)
    with pytest.raises(PliError, match="need 0.0 GiB of memory"): read_weights(path)


def test_a_table_that_lies_in_itself_ends(small, tmp_path):
    table = {}
    table["model"] = table
    torch.save(table, tmp_path / "weights.pt")
    with pytest.raises(PliError, match="it holds no weights"): load_backbone("pliweights", str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("change, words", [
    (lambda value: value * float("nan"), "numbers that are not finite are"), (lambda value: value.float() + float("inf"), "numbers that are not finite are"),
    (lambda value: value.to(torch.int32), "of whole or complex numbers"), (lambda value: value.to(torch.complex64), "of whole or complex numbers"),
    (lambda value: value.to_sparse(), "without plain numbers"), (lambda value: value.to("meta"), "without plain numbers"),
])
def test_values_that_are_no_weights_are_told_by_name(small, tmp_path, change, words):
    weights = state(small)
    weights["visual.proj"] = change(weights["visual.proj"])
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(PliError, match=f"damaged, or made for something else: .*{words}.* visual.proj"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # torch's own, about sparse tensors
        load_backbone("pliweights", str(tmp_path / "weights.pt"))


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
    lambda w: {"model": {f"module._orig_mod.{key}": value for key, value in w.items()}},
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


# ---- what a configuration may ask for

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install transformers sentencepiece")


def folder_with(small, folder, change=None, **more):
    "A model folder whose configuration was changed; its weights are as older versions wrote them, and say nothing."
    small.save(folder)
    save_file(load_file(folder / "open_clip_model.safetensors"), folder / "open_clip_model.safetensors")
    path = folder / "open_clip_config.json"
    record = json.loads(path.read_text())
    for key, value in more.items(): record[key] = record.get(key, {}) | value if isinstance(value, dict) else value
    if change: change(record["model_cfg"])
    path.write_text(json.dumps(record))
    return folder


def add_words(folder, evil=None):
    "Real files of a tokenizer of the transformers library; with code beside them that leaves a mark."
    words = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "red": 5, "blue": 6, "shirt": 7, "in": 8, "long": 9}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for token, i in list(words.items())[:4]]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [words[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")}}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": template, "decoder": None,
                                                       "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "model_max_length": 512}
    if evil is not None:
        (folder / "words.py").write_text(f"from pathlib import Path\nPath({str(evil)!r}).write_text('ran')\nfrom transformers import PreTrainedTokenizerFast\nclass Words(PreTrainedTokenizerFast): pass\n")
        config |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def hub_words(config, **more): config["text_cfg"] |= {"hf_tokenizer_name": "org/words", **more}


@needs_transformers
def test_code_beside_a_tokenizer_is_never_run(small, tmp_path):
    mark = tmp_path / "mark"
    folder = folder_with(small, tmp_path / "model", lambda config: hub_words(config, tokenizer_kwargs={"trust_remote_code": True}))
    add_words(folder, mark)
    with pytest.raises(PliError, match="tokenizer_kwargs: trust_remote_code is not allowed"): load_backbone(folder)
    assert not mark.exists()
    folder_with(small, folder, lambda config: hub_words(config))                                    # without the argument the library would ask the user
    code = f"from pli.backbones.loading import load_backbone\nload_backbone({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], input="y\ny\n", capture_output=True, text=True, timeout=120)
    assert "its tokenizer org/words is a program that lies beside it, and that is not run here" in done.stderr
    assert not mark.exists() and "[y/N]" not in done.stdout + done.stderr
    folder_with(small, folder, lambda config: hub_words(config, tokenizer_kwargs={"trust_remote_code": True}))
    code = f"import open_clip\nopen_clip.get_tokenizer('local-dir:{folder}')"
    subprocess.run([sys.executable, "-c", code], input=b"y\n", capture_output=True, timeout=120)
    assert mark.exists()                                                                             # it was a live one


@needs_transformers
def test_a_folder_with_a_tokenizer_of_its_own_is_read_and_saved(small, tmp_path):
    folder = folder_with(small, tmp_path / "model", lambda config: hub_words(config, tokenizer_kwargs={"strip_sep_token": False, "clean": "canonicalize"}))
    add_words(folder)
    backbone = load_backbone(folder)
    assert backbone.tokenizer(["A red shirt!"])[0].tolist() == [2, 4, 5, 7, 3] + [1] * 7
    backbone.save(tmp_path / "again")
    assert load_backbone(tmp_path / "again").tokenizer(["a red shirt"])[0].tolist() == [2, 4, 5, 7, 3] + [1] * 7


@pytest.mark.parametrize("change, words", [
    (lambda config: hub_words(config, tokenizer_kwargs={"use_auth_token": "x"}), "use_auth_token is not allowed"),
    (lambda config: hub_words(config, tokenizer_kwargs={"trust_remote_code": False}), "trust_remote_code is not allowed"),
    (lambda config: hub_words(config, tokenizer_kwargs={"code_revision": "x", "revision": "y"}), "code_revision is not allowed"),
    (lambda config: hub_words(config, tokenizer_kwargs={"clean": "__import__"}), "clean is '__import__'; known are whitespace"),
    (lambda config: hub_words(config, tokenizer_kwargs={"strip_sep_token": "yes"}), "strip_sep_token is 'yes'"),
    (lambda config: hub_words(config, tokenizer_kwargs=["trust_remote_code"]), "tokenizer_kwargs must be a table"),
    (lambda config: hub_words(config, tokenizer_mode="bert_clips"), "tokenizer_mode is 'bert_clips'"),
    (lambda config: config["text_cfg"].update(tokenizer_kwargs={"bpe_path": "/etc/passwd"}), "bpe_path is not allowed"),
    (lambda config: config["text_cfg"].update(tokenizer_kwargs={"additional_special_tokens": ["(a+)+"]}), "additional_special_tokens is not allowed"),
    (lambda config: config["text_cfg"].update(tokenizer_kwargs={"reduction_mask": "random"}), "reduction_mask is not allowed"),
    (lambda config: config["text_cfg"].update(tokenizer_kwargs={"trust\x1b[31m": 1}), r"trust\\x1b\[31m is not allowed"),
    (lambda config: config["text_cfg"].update(hf_tokenizer_name=["a"]), "hf_tokenizer_name must be the name"),
    (lambda config: config["text_cfg"].update(hf_model_name="evil/model"), "hf_model_name 'evil/model' is no text tower"),
    (lambda config: config["text_cfg"].update(hf_model_name="../secret"), "hf_model_name '../secret' is no text tower"),
    (lambda config: config["vision_cfg"].update(timm_model_name="hf-hub:evil/model"), "timm_model_name 'hf-hub:evil/model' is no plain name"),
    (lambda config: config["vision_cfg"].update(timm_model_name="local-dir:/tmp"), "timm_model_name 'local-dir:/tmp' is no plain name"),
    (lambda config: config["vision_cfg"].update(timm_model_name=["resnet50"]), "is no plain name"),
    (lambda config: config["vision_cfg"].update(timm_model_name="no_such_tower", timm_model_pretrained=True), "cannot be loaded.*no_such_tower"),
    (lambda config: config["text_cfg"].update(vocab_size=10**12), "text_cfg: vocab_size must be a number from 1 to 16,777,216, got 1000000000000"),
    (lambda config: config["text_cfg"].update(vocab_size=2**24, width=2**15, heads=512), "needs about [0-9,.]+ GiB of memory, and [0-9,.]+ GiB are free"),
    (lambda config: config["text_cfg"].update(context_length=10**6), "text_cfg: context_length must be"),
    (lambda config: config["text_cfg"].update(layers=1000, width=2**14, heads=256), "GiB of memory"),
    (lambda config: config["vision_cfg"].update(layers=10**9), "vision_cfg: layers must be"),
    (lambda config: config["vision_cfg"].update(layers=[1, 1, 1, 10**9]), "vision_cfg: layers must be"),
    (lambda config: config["vision_cfg"].update(layers=[1000] * 4, width=4096), "GiB of memory"),
    (lambda config: config["vision_cfg"].update(image_size=10**6), "vision_cfg: image_size must be"),
    (lambda config: config["vision_cfg"].update(image_size=-32), "vision_cfg: image_size must be"),
    (lambda config: config["vision_cfg"].update(image_size=16384, patch_size=1, width=32768), "GiB of memory"),
    (lambda config: config["vision_cfg"].update(patch_size=0), "vision_cfg: patch_size must be"),
    (lambda config: config["vision_cfg"].update(width="32"), "vision_cfg: width must be"),
    (lambda config: config["vision_cfg"].update(mlp_ratio=1e9), "vision_cfg: mlp_ratio must be"),
    (lambda config: config.update(embed_dim=10**9), "model_cfg: embed_dim must be"),
    (lambda config: config.update(embed_dim=True), "model_cfg: embed_dim must be"),
    (lambda config: config.update(quick_gelu="no"), "quick_gelu must be true or false, got 'no'"),
    (lambda config: config.update(vision_cfg=[1]), "vision_cfg must be a table"),
    (lambda config: config.update(multimodal_cfg={"layers": 10**9}, custom_text=True), "multimodal_cfg: layers must be"),
])
def test_what_a_configuration_may_not_ask_for(small, tmp_path, change, words):
    folder = folder_with(small, tmp_path / "model", change)
    began = time.perf_counter()
    with pytest.raises(PliError, match=words) as caught: load_backbone(folder)
    assert str(folder) in str(caught.value) and str(caught.value).isprintable() and time.perf_counter() - began < 5


@pytest.mark.parametrize("name, fine", [("org/words", True), ("bert-base-uncased", True), ("timm/ViT-B-16-SigLIP2", True), ("/etc", False), ("../words", False), ("./words", False), ("~/words", False), ("a/b/c", False), ("C:\\words", False), ("", True), ("org/..", False)])
def test_a_tokenizer_on_this_machine_is_not_followed_from_the_hub(name, fine):
    if fine: check_config("hf-hub:x", {"model_cfg": SMALL | {"text_cfg": SMALL["text_cfg"] | {"hf_tokenizer_name": name}}})
    else:
        with pytest.raises(PliError, match="is a path on this machine"): check_config("hf-hub:x", {"model_cfg": SMALL | {"text_cfg": SMALL["text_cfg"] | {"hf_tokenizer_name": name}}})


def test_every_model_of_open_clip_asks_for_what_is_allowed(monkeypatch):
    monkeypatch.setattr("pli.backbones.weights._memory_free", lambda: 2**45)
    names = [name for name in open_clip.list_models() if not name.startswith("pli")]
    assert len(names) > 140
    for name in names: check_config(name, {"model_cfg": open_clip.get_model_config(name)})
    for name, tag in open_clip.list_pretrained():
        check_preprocess(name, {key: value for key, value in open_clip.get_pretrained_cfg(name, tag).items() if key in PREPROCESS_VALUES})


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336", "RN50", "RN50x16", "coca_ViT-B-32", "ViT-S-16-alt", "pliweights"])
def test_memory_is_reckoned_before_it_is_used(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"): model = open_clip.create_model(name, load_weights=False, device="meta")
    count = sum(weight.numel() for weight in model.parameters())
    size = config["vision_cfg"]["image_size"]
    assert count * 0.9 < (bytes_needed(config) / 4 - 3 * size**2) / 2 < count * 1.15


# ---- how pictures are shown

@pytest.mark.parametrize("change, words", [
    ({"maen": [0.5] * 3}, "maen is unknown; known are size, mode, mean"), ({"mean": [0.5, 0.5]}, r"mean must be three numbers, got \[0.5, 0.5\]"), ({"mean": 0.5}, "mean must be three numbers"), ({"mean": ["0.5"] * 3}, "mean must be"),
    ({"mean": [float("nan")] * 3}, "mean must be"), ({"std": [0.5, 0, 0.5]}, "std must be three numbers above 0"), ({"std": [1e999] * 3}, "std must be"), ({"interpolation": "foo"}, "interpolation must be bicubic, bilinear or random, got 'foo'"),
    ({"interpolation": ["bicubic"]}, "interpolation must be"), ({"resize_mode": "crop"}, "resize_mode must be"), ({"size": -4}, "size must be one or two numbers from 1 to"), ({"size": [32, 0]}, "size must be"), ({"size": "32"}, "size must be"),
    ({"size": 10**7}, "size must be"), ({"fill_color": -1}, "fill_color must be"), ({"mode": "L"}, "mode must be RGB, got 'L'"), ({"mean": True}, "mean must be"),
])
def test_a_broken_preprocess_cfg_is_told_at_once(small, tmp_path, change, words):
    folder = folder_with(small, tmp_path / "model", preprocess_cfg=change)
    with pytest.raises(PliError, match=f"open_clip_config.json: preprocess_cfg: {words}"): load_backbone(folder)


def test_a_preprocess_cfg_that_is_no_table(small, tmp_path):
    with pytest.raises(PliError, match="preprocess_cfg must be a table"): load_backbone(folder_with(small, tmp_path / "model", preprocess_cfg=[1]))


def test_a_pipe_in_place_of_a_configuration_is_not_waited_for(small, tmp_path):
    folder = folder_with(small, tmp_path / "model")
    (folder / "open_clip_config.json").unlink()
    os.mkfifo(folder / "open_clip_config.json")
    with pytest.raises(PliError, match="is no file|regular"): load_backbone(folder)


# ---- a tokenizer that cannot be made is told before pictures are read

def test_a_tokenizer_that_cannot_be_made_is_told_when_the_model_is_loaded(small, tmp_path):
    folder = folder_with(small, tmp_path / "model", lambda config: hub_words(config))
    words = "needs a package that is not installed.*pip install transformers" if importlib.util.find_spec("transformers") is None else "cannot be made, and words cannot be read without it"
    with pytest.raises(PliError, match=f"its tokenizer org/words|{words}") as caught: load_backbone(folder)
    assert re.search(words, str(caught.value))


def test_without_transformers_the_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PliError, match="needs a package that is not installed.*pip install transformers"): load_backbone(folder_with(small, tmp_path / "model", lambda config: hub_words(config)))


# ---- the activation, and other things that a file leaves open

@pytest.fixture
def doubtful(configs, monkeypatch):
    "A small model of which open_clip knows two tags that differ, as it does of ViT-B-32."
    usual = {"url": "", "hf_hub": "", "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711), "interpolation": "bicubic", "resize_mode": "shortest"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "pliweights", {"openai": usual | {"quick_gelu": True}, "laion": usual})
    return usual


def activation(backbone): return type(backbone.model.visual.transformer.resblocks[0].mlp.gelu).__name__, type(backbone.model.transformer.resblocks[0].mlp.gelu).__name__


GELU, QUICK = ("GELU", "GELU"), ("QuickGELU", "QuickGELU")


def test_an_activation_that_nothing_says_is_assumed_and_told(small, tmp_path, doubtful):
    save_file(state(small), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="w.safetensors: does not say its activation, gelu is assumed.*--quick-gelu") as caught: backbone = load_backbone("pliweights", str(tmp_path / "w.safetensors"))
    assert len(caught) == 1 and activation(backbone) == GELU and backbone.choices == {"activation": "gelu, assumed"} and backbone.title == "pliweights, activation: gelu, assumed"
    backbone.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is False
    again = load_backbone(tmp_path / "run")                                                  # what was assumed once is never a fact later
    assert again.choices == {"activation": "gelu, assumed"}


@pytest.mark.parametrize("asked, wanted", [(True, QUICK), (False, GELU)])
def test_the_option_decides_and_is_saved(small, tmp_path, doubtful, recwarn, asked, wanted):
    save_file(state(small), tmp_path / "w.safetensors")
    backbone = load_backbone("pliweights", str(tmp_path / "w.safetensors"), quick_gelu=asked)
    assert activation(backbone) == wanted and backbone.choices["activation"].endswith("gelu, as asked for") and not recwarn.list
    backbone.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is asked
    again, theirs = load_backbone(tmp_path / "run"), open_clip.create_model(f"local-dir:{tmp_path / 'run'}").eval()
    assert activation(again) == wanted and again.choices["activation"].endswith("gelu, as its configuration says")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert torch.equal(theirs.encode_image((pixels - again.mean) / again.std), backbone.encode_image(pixels))
    parted = load_backbone("pliweights", str(tmp_path / "run" / "open_clip_model.safetensors"))
    assert activation(parted) == wanted
    (tmp_path / "lonely.safetensors").write_bytes((tmp_path / "run" / "open_clip_model.safetensors").read_bytes())
    parted = load_backbone("pliweights", str(tmp_path / "lonely.safetensors"))
    assert activation(parted) == wanted and parted.choices["activation"].endswith("as its metadata says")


def beside(text): return lambda small, folder: [folder.joinpath("open_clip_config.json").write_text(json.dumps(text)), save_file(state(small), folder / "w.safetensors")] and folder / "w.safetensors"


def params(**lines):
    def make(small, folder):
        (folder / "checkpoints").mkdir()
        (folder / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in ({"model": "pliweights", "pretrained": "", "force_quick_gelu": False, "image_mean": None} | lines).items()))
        torch.save({"epoch": 1, "name": "run", "state_dict": state(small)}, folder / "checkpoints" / "epoch_1.pt")
        return folder / "checkpoints" / "epoch_1.pt"
    return make


def checkpoint(name="w.pt", **more):
    def make(small, folder):
        torch.save({**more.get("top", {}), "state_dict": state(small) | more.get("inside", {})}, folder / name)
        return folder / name
    return make


OURS = {"model_cfg": SMALL | {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}}
NUMBERS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(49408)}


@pytest.mark.parametrize("make, wanted, source", [
    (beside(OURS), QUICK, "open_clip_config.json beside it"), (beside({"model_cfg": SMALL}), GELU, "open_clip_config.json beside it"),
    (beside({"model_cfg": SMALL | {"quick_gelu": True, "embed_dim": 25}}), GELU, None), (beside([1]), GELU, None), (beside({"model_cfg": 3}), GELU, None),
    (params(force_quick_gelu=True), QUICK, "params.txt of its run"), (params(), GELU, "params.txt of its run"), (params(pretrained="laion"), GELU, "params.txt of its run"),
    (params(pretrained="openai"), GELU, None), (params(pretrained="/data/openai.pt"), GELU, None), (params(model="ViT-L-14", force_quick_gelu=True), GELU, None),
    (checkpoint(top={"name": "2026_01_01-model_ViT-B-32-quickgelu-lr_0.001"}), QUICK, "the name of its run"), (checkpoint(inside=NUMBERS), QUICK, "its layout, which is OpenAI's own,"),
    (checkpoint("vit_b_32-quickgelu-laion400m_e31-d867053b.pt"), QUICK, "its name"), (checkpoint("epoch_1.pt"), GELU, None),
])
def test_evidence_decides(small, tmp_path, doubtful, make, wanted, source):
    path = make(small, tmp_path)
    said = "is built, as|assumed" if wanted == QUICK or source is None else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backbone = load_backbone("pliweights", str(path))
    lines = [str(each.message) for each in caught if issubclass(each.category, Notice)]
    assert activation(backbone) == wanted and len(lines) == (said is not None)
    assert backbone.choices["activation"] == (f"{'quick gelu' if wanted == QUICK else 'gelu'}, as {source} says" if source else "gelu, assumed")
    backbone.save(tmp_path / "run")
    assert activation(load_backbone(tmp_path / "run")) == wanted


@pytest.mark.parametrize("metadata, config", [(True, False), (False, True)])
def test_evidence_against_evidence_is_told(small, tmp_path, doubtful, metadata, config):
    "Metadata of a file against the configuration beside it, as a file by its name and as a folder."
    said = lambda quick: json.dumps({"model_cfg": SMALL | {"quick_gelu": quick}})
    save_file(state(small), tmp_path / "open_clip_model.safetensors", {"open_clip_config": said(metadata)})
    (tmp_path / "open_clip_config.json").write_text(said(config))
    words = ["gelu", "quick gelu"]
    with pytest.warns(Notice, match=f"{words[metadata]} is built, as its metadata says, but open_clip_config.json beside it says {words[config]}; --quick-gelu or"):
        assert activation(load_backbone("pliweights", str(tmp_path / "open_clip_model.safetensors"))) == (QUICK if metadata else GELU)
    with pytest.warns(Notice, match=f"{words[config]} is built, as its configuration says, but the metadata of its weights says {words[metadata]}; --quick-gelu or"):
        assert activation(load_backbone(tmp_path)) == (QUICK if config else GELU)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        load_backbone(tmp_path, quick_gelu=config)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"model_cfg": ' + "9" * 5000 + "}", "{", ""])
def test_what_lies_beside_weights_and_is_nothing_stops_nothing(small, tmp_path, text):
    save_file(state(small), tmp_path / "w.safetensors", {"open_clip_config": text})
    for name in ("open_clip_config.json", "params.txt", "provenance.json"): (tmp_path / name).write_text(text)
    assert activation(load_backbone("pliweights", str(tmp_path / "w.safetensors"))) == GELU


def test_a_known_file_is_known_by_its_digest(small, tmp_path, doubtful, monkeypatch):
    path = checkpoint("pliweights-known-00000000.pt")(small, tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / f"pliweights-known-{digest[:8]}.pt")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "pliweights", {"known": doubtful | {"quick_gelu": True, "mean": (0.5,) * 3, "url": f"https://github.com/mlfoundations/open_clip/{path.name}"}, "laion": doubtful})
    with pytest.warns(UserWarning, match="quick gelu is built, as open_clip's record"): backbone = load_backbone("pliweights", str(path))
    assert activation(backbone) == QUICK and backbone.mean.flatten().tolist() == [0.5] * 3
    path.write_bytes(checkpoint("other.pt", top={"epoch": 3})(small, tmp_path).read_bytes())
    with pytest.warns(UserWarning, match="assumed"): assert activation(load_backbone("pliweights", str(path))) == GELU


def test_words_against_evidence_are_told(small, tmp_path, doubtful):
    path = beside(OURS)(small, tmp_path)
    with pytest.warns(UserWarning, match="gelu is built, as asked for, but open_clip_config.json beside it says quick gelu"): assert activation(load_backbone("pliweights", str(path), quick_gelu=False)) == GELU
    folder = folder_with(small, tmp_path / "model", lambda config: config.update(quick_gelu=True))
    with pytest.warns(UserWarning, match="gelu is built, as asked for, but it is quick gelu, as its configuration says"): assert activation(load_backbone(folder, quick_gelu=False)) == GELU


def test_an_older_run_of_a_file_that_did_not_say_is_told(small, tmp_path, doubtful, recwarn):
    folder = folder_with(small, tmp_path / "run" / "best", lambda config: config.pop("quick_gelu"))
    load_backbone(folder)
    assert not recwarn.list
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"model": "pliweights", "pretrained": "there/tuned.pt"}))
    with pytest.warns(UserWarning, match="was tuned by an older pli from there/tuned.pt, which did not say its activation"): old = load_backbone(folder)
    assert old.choices == {"activation": "gelu, assumed"}
    assert activation(load_backbone(folder, quick_gelu=True)) == QUICK
    for about in ({"model": "pliweights", "pretrained": "openai"}, {"model": "pliweights", "pretrained": None}, [1], {"model": 3, "pretrained": 4}):
        (tmp_path / "run" / "provenance.json").write_text(json.dumps(about))
        assert load_backbone(folder).choices == {"activation": "gelu, as its configuration says"}


def test_how_pictures_are_normalised_comes_from_evidence_or_from_the_tags(small, tmp_path, doubtful, monkeypatch):
    path = beside(OURS)(small, tmp_path)
    with pytest.warns(UserWarning): backbone = load_backbone("pliweights", str(path))
    assert backbone.mean.flatten().tolist() == [0.5] * 3 and backbone.std.flatten().tolist() == [0.25] * 3 and backbone.config["preprocess_cfg"]["resize_mode"] == "squash"
    (tmp_path / "open_clip_config.json").unlink()
    half = doubtful | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "pliweights", {"one": half, "two": half})
    backbone = load_backbone("pliweights", str(path))                                                     # as of SigLIP: all tags agree
    assert backbone.mean.flatten().tolist() == [0.5] * 3 and backbone.config["preprocess_cfg"]["resize_mode"] == "squash" and backbone.choices == {"activation": "gelu, as the name of the model says"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "pliweights", {"one": half, "two": doubtful})
    with pytest.warns(UserWarning, match="the tags of pliweights differ; OpenAI's mean and deviation are assumed"): backbone = load_backbone("pliweights", str(path))
    assert "assumed" in backbone.title and backbone.mean.flatten()[0].item() == pytest.approx(0.48145466)
    backbone.save(tmp_path / "run")
    assert load_backbone(tmp_path / "run").choices["normalisation"].endswith("assumed")


def test_the_command_line_says_it_in_one_line_and_in_every_record(small, tmp_path, doubtful, capsys, monkeypatch):
    from pli.cli.main import main
    save_file(state(small), tmp_path / "w.safetensors")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 10, 10)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"a picture of number {i}")
    (tmp_path / "gallery.json").write_text(json.dumps(["0.png", "1.png", "2.png", "3.png"]))
    (tmp_path / "queries.json").write_text(json.dumps([{"reference_img_id": f"{i}.png", "relative_caption": f"redder by {i}", "target_img_id": f"{(i + 1) % 4}.png", "gt_img_ids": [f"{(i + 1) % 4}.png"]} for i in range(4)]))
    common = ["--model", "pliweights", "--pretrained", str(tmp_path / "w.safetensors"), "--device", "cpu"]
    evaluate = ["evaluate", "--queries", str(tmp_path / "queries.json"), "--gallery", str(tmp_path / "gallery.json"), "--root", str(tmp_path / "pictures"), "--out", str(tmp_path / "r.json"), *common]
    assert main(evaluate) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("pli evaluate: ") and "gelu is assumed" in err and "activation gelu, assumed" in out
    assert json.loads((tmp_path / "r.json").read_text())["activation"] == "gelu, assumed"
    assert main([*evaluate, "--quick-gelu"]) == 0
    out, err = capsys.readouterr()
    assert not err and "activation" not in out and json.loads((tmp_path / "r.json").read_text())["activation"] == "quick gelu, as asked for"
    assert main(["cache"]) == 0
    assert "pliweights, activation: gelu, assumed" in capsys.readouterr().out
    run = ["tune", str(tmp_path / "pictures"), "--out", str(tmp_path / "run"), "--queries", str(tmp_path / "queries.json"), "--gallery", str(tmp_path / "gallery.json"), "--steps", "2", "--batch-size", "4", "--precision", "fp32", *common]
    monkeypatch.chdir(tmp_path / "pictures")
    for file in ("queries.json", "gallery.json"): (tmp_path / "pictures" / file).write_bytes((tmp_path / file).read_bytes())
    run[run.index("--queries") + 1], run[run.index("--gallery") + 1] = "queries.json", "gallery.json"
    assert main(run) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["activation"] == json.loads((tmp_path / "run" / "provenance.json").read_text())["activation"] == "gelu, assumed"
    assert main([*run, "--quick-gelu"]) == 1 and "activation was 'gelu, assumed', now 'quick gelu, as asked for'" in capsys.readouterr().err


# ---- names and downloads

@pytest.mark.parametrize("name", ["vit-b-32", "ViT-B32", "vitb32", "VIT_B_32", "vit_b/32", "openai/clip-vit-base-patch32", "clip-vit-base-patch32", "ViT-B-33"])
def test_the_name_that_was_meant_is_the_first_suggestion(name):
    with pytest.raises(PliError, match="nor a name that open_clip knows; similar names: ViT-B-32[,$]?"): load_backbone(name)


@pytest.mark.parametrize("name, meant", [("openai/clip-vit-large-patch14", "ViT-L-14"), ("openai/clip-vit-large-patch14-336", "ViT-L-14-336"), ("rn-50", "RN50"), ("resnet50", "RN50"), ("vit-so400m-14-siglip", "ViT-SO400M-14-SigLIP"), ("pli_tiny_48", "pli-tiny-48")])
def test_other_names(name, meant): assert meant in similar_names(name, [*open_clip.list_models(), "pli-tiny-48"])


def test_nothing_near_is_not_suggested():
    with pytest.raises(PliError) as caught: load_backbone("zzzzqqqq\x1b[31m")
    assert "similar" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("tag, words", [("openia", "did you mean openai"), ("laion2b-s34b", "did you mean laion2b_s34b_b79k"), ("there/no.pt", "no such file, and no such tag"), ("zzz", "did you mean openai")])
def test_tags(tag, words):
    with pytest.raises(PliError, match=f"model 'ViT-B-32' with weights '{tag}' cannot be loaded: .*{words}"): load_backbone("ViT-B-32", tag)


@pytest.fixture(params=["refuses", "hangs"])
def nobody(request, monkeypatch, tmp_path):
    "An address that refuses, or one that takes the call and never answers; and an empty cache."
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    if request.param == "hangs": server.listen()
    for key in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield tmp_path / "cache"
    server.close()


@pytest.mark.parametrize("name, tag, missing", [("ViT-B-32", "laion2b_s34b_b79k", r"laion/CLIP-ViT-B-32-laion2B-s34B-b79K \(open_clip_model.safetensors\)"), ("ViT-B-32", "openai", "timm/vit_base_patch32_clip_224.openai"), ("hf-hub:org/model", None, r"org/model \(open_clip_config.json\)")])
def test_without_a_network_it_is_said_at_once(nobody, name, tag, missing):
    began = time.perf_counter()
    with pytest.raises(PliError, match=f"{missing}.* is not on this machine, and http://127.0.0.1:[0-9]+ cannot be reached .*models--.*HF_HUB_OFFLINE=1"): load_backbone(name, tag, cache_dir=str(nobody))
    assert time.perf_counter() - began < 8
    assert not nobody.exists()


def cached(small, cache, repository):
    "A repository as huggingface_hub keeps it."
    place = cache / f"models--{repository.replace('/', '--')}"
    small.save(place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)


def test_without_a_network_the_cache_is_used(nobody, small):
    cached(small, nobody, "org/model")
    began = time.perf_counter()
    again = load_backbone("hf-hub:org/model", cache_dir=str(nobody))
    for key, value in state(small).items(): assert torch.equal(again.model.state_dict()[key], value)
    assert again.choices == {"activation": "gelu, as its configuration says"} and huggingface_hub.constants.HF_HUB_OFFLINE is False and time.perf_counter() - began < 20


def test_offline_mode_is_obeyed_without_a_try(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("pli.backbones.weights.out_of_reach", lambda address: pytest.fail("the network was tried"))
    with pytest.raises(PliError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"): load_backbone("ViT-B-32", "openai", cache_dir=str(tmp_path))


def test_a_hub_that_answers_is_asked(monkeypatch, tmp_path, small):
    "What it says is what counts, here that there is no such repository."
    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self): self.send_error(404)
        do_GET = do_HEAD
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert out_of_reach(address) == ""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert offline_for("org/model", weights_names(), str(tmp_path)) is False
    server.shutdown(); server.server_close()


def test_the_configuration_of_a_repository_is_checked_like_that_of_a_folder(nobody, small):
    cached(small, nobody, "org/evil")
    path = next(nobody.rglob("open_clip_config.json"))
    record = json.loads(path.read_text())
    record["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "org/words", "tokenizer_kwargs": {"trust_remote_code": True}}
    path.write_text(json.dumps(record))
    with pytest.raises(PliError, match="hf-hub:org/evil: open_clip_config.json: text_cfg: tokenizer_kwargs: trust_remote_code is not allowed"): load_backbone("hf-hub:org/evil", cache_dir=str(nobody))


def test_every_file_that_is_no_weights_gets_advice():
    from pli.backbones.weights import _NO_WEIGHTS
    for kind, text in _NO_WEIGHTS.items(): assert re.search(r"\b(again|name|give|bring|run|take|convert)\b", text), kind

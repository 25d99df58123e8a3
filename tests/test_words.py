"Texts that are longer than a model reads: counted exactly, told once, by every kind of tokenizer."
import importlib.util
import json
import warnings

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer

from pli.backbones.openclip import CutTextWarning, cut_texts
from pli.backbones.loading import load_backbone
from pli.core import rng_for
from pli.data.batches import TensorPairs
from pli.gallery.encode import encode_texts
from pli.settings import TuneSettings
from pli.training.loop import tune

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install transformers sentencepiece")
SIMPLE = open_clip.SimpleTokenizer(context_length=10)


def by_hand(tokenizer, texts, room):
    "Cut, if there are more pieces than places beside start and end."
    return [text for text in texts if len(tokenizer.encode(text)) + 2 > room]


@pytest.mark.parametrize("count", range(0, 25))
@pytest.mark.parametrize("piece", ["red", "!", "0", "é", "<end_of_text>"])
def test_open_clips_own_tokenizer(count, piece):
    text = " ".join([piece] * count)
    assert cut_texts(SIMPLE, [text, "a"], SIMPLE([text, "a"])) == by_hand(SIMPLE, [text, "a"], 10)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_texts(texts):
    assert cut_texts(SIMPLE, texts, SIMPLE(texts)) == by_hand(SIMPLE, texts, 10)


def word_level(tmp_path, side="right", specials=True):
    "A real tokenizer of the transformers library, with or without marks around a text."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "[BOS]": 6}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials: inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", bos_token="[BOS]", eos_token="[SEP]", padding_side=side).save_pretrained(tmp_path)
    return tmp_path


@needs_transformers
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("more", [{}, {"strip_sep_token": True}])
def test_tokenizers_of_transformers(tmp_path, side, specials, more):
    tokenizer = HFTokenizer(str(word_level(tmp_path, side, specials)), context_length=8, **more)
    texts = [" ".join(["a", "b"] * 20)[:2 * n - 1] if n else "" for n in range(20)]
    assert cut_texts(tokenizer, texts, tokenizer(texts)) == texts[9 - 2 * specials:]


@needs_transformers
def test_the_kind_that_ends_with_a_class_token(tmp_path):
    tokenizer = HFTokenizer(str(word_level(tmp_path)), context_length=8, tokenizer_mode="clips")
    texts = [" ".join(["a"] * n) for n in range(1, 20)]
    assert cut_texts(tokenizer, texts, tokenizer(texts)) == [text for text in texts if text.count("a") > 5]      # start, end and class


@needs_transformers
def test_siglips_kind_whose_end_is_its_padding(tmp_path):
    "Its vocabulary is a download; the class and its padding are real, the vocabulary is ours."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({"<unk>": 2, "</s>": 1, "a": 4, "b": 5, "<pad>": 0}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.post_processor = pre_tokenizers.Whitespace(), processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = SigLipTokenizer.__new__(SigLipTokenizer)
    tokenizer.tokenizer, tokenizer.context_length = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>"), 8
    texts = [" ".join(["a"] * n) for n in range(1, 20)]
    assert tokenizer(["a"])[0].tolist() == [4] + [1] * 7
    assert cut_texts(tokenizer, texts, tokenizer(texts)) == texts[7:]


def test_a_function_that_cannot_read_with_more_room_tells_nothing():
    assert cut_texts(lambda texts: torch.ones(len(texts), 4), ["a"], torch.ones(1, 4)) == []


# ---- told once, counted always

LONG = "the same coat with long sleeves and a belt and two large pockets at its sides in "


@pytest.fixture
def tiny(): return load_backbone("pli-tiny-48")


def test_two_queries_that_the_model_cannot_tell_apart_are_told(tiny):
    with pytest.warns(CutTextWarning, match="2 of 3 texts are longer than the model's 16 tokens and were cut; the first: the same coat") as caught, torch.no_grad():
        features = tiny.encode_text([LONG + "red", LONG + "blue", "in red"])
    assert torch.equal(features[0], features[1]) and list(tiny.cut_texts) == [LONG + "red", LONG + "blue"] and len(caught) == 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        tiny.encode_text([LONG + "red", LONG + "green"])                                       # told already, but counted
    assert len(tiny.cut_texts) == 3


def test_a_pass_over_many_texts_is_told_once_with_all_counted(tiny):
    texts = [f"a shirt {i}" for i in range(30)] + [f"{LONG}{i}" for i in range(5)] * 2
    with pytest.warns(CutTextWarning, match="5 of 35 texts are longer") as caught: encode_texts(tiny, texts, batch_size=4)
    assert len(caught) == 1 and len(tiny.cut_texts) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_texts(tiny, ["short", "shorter"]); encode_texts(tiny, texts)
    with pytest.warns(CutTextWarning, match="1 of 2 texts is longer than the model's 16 tokens and was cut"): encode_texts(tiny, [LONG + "\x1b[31m", "b"])


def test_the_line_is_safe_to_print(tiny):
    with pytest.warns(CutTextWarning) as caught: tiny.check_words([LONG + "\x1b[31m\n" + "x" * 5000])
    assert str(caught[0].message).isprintable() and len(str(caught[0].message)) < 400


def test_tuning_tells_before_the_first_step(tiny, tmp_path):
    pixels = torch.randint(0, 256, (12, 3, 48, 48), generator=rng_for(0, "words"), dtype=torch.uint8)
    data = TensorPairs(pixels, [f"{LONG}{i}" if i % 3 == 0 else f"a shirt {i}" for i in range(12)])
    with pytest.warns(CutTextWarning, match="4 of 12 texts are longer") as caught: tune(tiny, data, TuneSettings(steps=3, batch_size=4, precision="fp32"), tmp_path, say=lambda line: None)
    assert len(caught) == 1 and len(tiny.cut_texts) == 4


def test_reports_hold_the_count(tmp_path, capsys):
    from PIL import Image

    from pli.cli.main import main
    for i in range(4): Image.new("RGB", (48, 48), (60 * i, 10, 10)).save(tmp_path / f"{i}.png")
    (tmp_path / "gallery.json").write_text(json.dumps([f"{i}.png" for i in range(4)]))
    (tmp_path / "queries.json").write_text(json.dumps([{"reference_img_id": f"{i}.png", "relative_caption": f"{LONG if i < 2 else ''}{i}", "target_img_id": f"{(i + 1) % 4}.png", "gt_img_ids": [f"{(i + 1) % 4}.png"]} for i in range(4)]))
    assert main(["evaluate", "--queries", str(tmp_path / "queries.json"), "--gallery", str(tmp_path / "gallery.json"), "--model", "pli-tiny-48", "--device", "cpu", "--no-cache", "--out", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    assert err == f"pli evaluate: 2 of 4 texts are longer than the model's 16 tokens and were cut; the first: {LONG}0\n" and json.loads((tmp_path / "r.json").read_text())["cut texts"] == 2
    assert "2 texts cut at the model's length" in out

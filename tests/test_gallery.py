"pli.gallery.encode: crops by hand, one feature a picture whatever the batch, a store that survives kills, faults and changed checkpoints, search against a slow sort."
import copy
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pli.gallery import encode as gallery
from pli.backbones.loading import load_backbone
from pli.core import PliError, create_locked, rng_for, unit
from pli.data.pictures import PictureError
from pli.gallery.encode import BATCH_MULTIPLE, BrokenPictures, FeatureCache, PictureFiles, box_of, cache_folder, check_files, content_key, crop_around, encode_files, encode_pictures, encode_pixels, encode_texts, features_of, read_shard, search, _tile_shape, top_k, unusable, write_shard

NAMES = [f"{number:03}.png" for number in range(100)]


def save(path: Path, seed: int, size: int = 12) -> Path:
    "A small picture of coloured noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=rng_for(seed, "picture"), dtype=torch.uint8).numpy()).save(path, "PNG")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(NAMES): save(folder / name, number)
    return folder


@pytest.fixture
def tiny(): return load_backbone("pli-tiny-48")


@pytest.fixture(scope="module")
def features(root):
    "What everything below must give, to the bit."
    return encode_files(load_backbone("pli-tiny-48"), NAMES, root)


@pytest.fixture
def cache(tmp_path): return FeatureCache(tmp_path / "cache")


def shards(cache: FeatureCache) -> list[Path]: return sorted(cache.folder.rglob("*.safetensors"))


def stored(cache: FeatureCache) -> int: return sum(entry.pictures for entry in cache.entries())


class Watch:
    "Stands in for a model's encoder: keeps how many pictures it was shown, and may stop."
    def __init__(self, backbone, stop=None):
        self.backbone, self.stop, self.calls = backbone, stop, 0
        backbone.encode_image = self

    def __call__(self, pixels):
        if self.calls == self.stop: raise KeyboardInterrupt
        self.calls += 1
        assert len(pixels) == BATCH_MULTIPLE
        return type(self.backbone).encode_image(self.backbone, pixels)


# --- crops

@pytest.mark.parametrize("box, corner, size", [   # in a picture of 100 x 60: the upper left pixel, and what is cut, by hand
    ((50, 20, 20, 10), (36, 13), (34, 17)),       # 50 - 14, 20 - 7; 1.7 times
    ((5, 5, 10, 10), (0, 0), (17, 17)),           # 5 - 7 < 0: from the edge on, and the full 17 from there
    ((90, 50, 20, 20), (76, 36), (24, 24)),       # 76 + 34 > 100, 36 + 34 > 60
    ((0, 0, 100, 60), (0, 0), (100, 60)),
    ((99, 0, 1, 60), (98, 0), (2, 60)),           # 98.3 to 100, rounded
    ((-5, -5, 10, 10), (0, 0), (17, 17)),         # half of it is outside
    ((10, 10, 4, 4), (7, 7), (7, 7)),             # 7.2 to 14.0
    ((10.5, 10.25, 2, 30), (9, 0), (3, 51)),      # 9.1 to 12.5 (to even), -10.75 to 51
    (np.array([50, 20, 20, 10]), (36, 13), (34, 17)),
    (torch.tensor([50, 20, 20, 10]), (36, 13), (34, 17)),
])
def test_a_crop_by_hand(box, corner, size):
    y, x = np.mgrid[:60, :100]
    picture = Image.fromarray(np.stack([x + 1, y + 1, 0 * x + 7], -1).astype(np.uint8))       # every pixel says where it is
    found = np.asarray(crop_around(picture, box)).astype(int)
    side = max(size)
    wanted = np.zeros((side, side, 3), int)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    wanted[top : top + size[1], left : left + size[0]] = np.asarray(picture)[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]]
    assert (found == wanted).all()


def test_a_crop_without_surroundings():
    assert crop_around(Image.new("RGB", (100, 60), "white"), (50, 20, 20, 10), dilate=0).getbbox() == (0, 5, 20, 15)


@pytest.mark.parametrize("box, says", [
    ((100, 0, 5, 5), "lies outside the picture of 100 x 60"), ((0, 60, 5, 5), "lies outside"), ((-5, 0, 5, 5), "lies outside"), ((0, -9, 5, 5), "lies outside"),
    ((1, 1, 0, 5), "above 0"), ((1, 1, 5, 0), "above 0"), ((1, 1, -5, 5), "above 0"), ((1, 1, math.nan, 5), "finite"), ((math.inf, 1, 5, 5), "finite"), ((1, math.nan, 5, 5), "finite"),
    ((1, 2, 3), "four numbers"), ((1, 2, 3, 4, 5), "four numbers"), ((1, 2, 3, None), "four numbers"), ("1234", "four numbers"), (["1", "2", "3", "4"], "four numbers"), (7, "four numbers"), ({}, "four numbers"),
    ((0, 0, 0.1, 0.1), "no whole pixel"), ((99.9, 0, 9, 0.01), "no whole pixel"),
])
def test_a_box_that_is_none(box, says):
    with pytest.raises(PliError) as caught: crop_around(Image.new("RGB", (100, 60)), box)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_boxes_of_any_kind():
    assert box_of([1, 2.5, 3, 4]) == box_of(np.array([1, 2.5, 3, 4])) == box_of(iter((1, 2.5, 3, 4))) == (1, 2.5, 3, 4)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(st.floats(-50, 90), st.floats(-50, 90), st.floats(-1, 90), st.floats(-1, 90)))
def test_any_box_is_cut_or_refused(width, height, box):
    try: cut = crop_around(Image.new("RGB", (width, height), "white"), box)
    except PliError: return
    left, top, right, bottom = cut.getbbox()
    assert cut.width == cut.height == max(right - left, bottom - top) and right - left <= width and bottom - top <= height


# --- files

def test_what_cannot_be_used_is_told_at_once(root, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    os.symlink(root / "000.png", tmp_path / "good.png")
    names = ["good.png", "text.png", "gone.png", "empty.png", "good.png/below.png"]
    found = unusable(iter(names), tmp_path)
    assert {number: error.cause for number, error in found.items()} == {1: "broken picture", 2: "missing picture", 3: "broken picture", 4: "missing picture"}
    assert unusable([], tmp_path) == {} and unusable(NAMES, root) == {}
    with pytest.raises(PliError, match=r"4 of 5 pictures in .* cannot be used: text.png \(broken picture\), gone.png \(missing picture\)"): check_files(names, tmp_path)
    with pytest.raises(PliError, match="4 of 5 pictures"): PictureFiles(names, tmp_path, pil_to_tensor)
    assert len(PictureFiles(names, tmp_path, pil_to_tensor, check=False)) == 5
    with pytest.raises(PictureError, match="text.png: broken picture"): encode_pictures(load_backbone("pli-tiny-48"), PictureFiles(names[1:], tmp_path, pil_to_tensor, check=False))


def test_parts_of_pictures(root, tiny, features):
    box = (2, 2, 4, 4)
    with pytest.raises(PliError, match="3 pictures, but 2 boxes"): PictureFiles(NAMES[:3], root, tiny.pixels, [None, None])
    with pytest.raises(PliError, match="001.png: box .*above 0"): PictureFiles(NAMES[:2], root, tiny.pixels, [None, (1, 1, 0, 4)])
    files = PictureFiles(NAMES[:2], root, tiny.pixels, (None, box))
    assert torch.equal(files[1], tiny.pixels(crop_around(Image.open(root / NAMES[1]), box))) and torch.equal(files[0], tiny.pixels(Image.open(root / NAMES[0])))
    found = encode_files(tiny, [NAMES[0]] * 4, root, [None, box, list(box), (2, 2, 4, 5)])
    assert torch.equal(found[0], features[0]) and torch.equal(found[1], found[2]) and len(found.unique(dim=0)) == 3
    with pytest.raises(BrokenPictures, match="000.png: unusable box .box .99, 0, 1, 1. lies outside"): encode_files(tiny, NAMES[:1], root, [(99, 0, 1, 1)])


# --- one feature a picture

def test_a_picture_has_one_feature(root, tiny, features):
    pixels = torch.stack([tiny.pixels(Image.open(root / name)) for name in NAMES])
    assert torch.equal(encode_pixels(tiny, pixels), features)
    assert torch.allclose(features, unit(tiny.encode_image(pixels)).detach(), atol=1e-6) and torch.allclose(features.norm(dim=1), torch.ones(100), atol=1e-6)
    for size in (3, 31, 33):
        assert torch.equal(encode_pictures(tiny, PictureFiles(NAMES[:36], root, tiny.pixels, check=False), batch_size=size), features[:36])
    assert torch.equal(encode_files(tiny, NAMES[:36], root), features[:36])
    order = torch.randperm(100, generator=rng_for(0, "order"))
    assert torch.equal(encode_files(tiny, [NAMES[i] for i in order], root), features[order])
    for number in (0, 57, 99): assert torch.equal(encode_pixels(tiny, pixels[number : number + 1])[0], features[number])
    assert not torch.equal(tiny.encode_image(pixels[:32]), tiny.encode_image(pixels[1:33]))


def test_threads_change_nothing(root, tiny, features):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(encode_files(tiny, NAMES[:40], root), features[:40])
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_and_without_a_cache(root, tiny, features, cache, workers):
    found = [encode_files(tiny, NAMES, root, cache=cache, workers=workers) for _ in range(2)]
    assert torch.equal(found[0], features) and torch.equal(found[1], features) and found[0].dtype == torch.float32
    assert stored(cache) == 100


def test_nothing_to_encode(root, tiny, cache):
    for call in (lambda: encode_files(tiny, [], root, cache=cache), lambda: encode_pictures(tiny, torch.zeros(0, 3, 48, 48, dtype=torch.uint8))):
        with pytest.raises(PliError, match="no picture to encode"): call()
    with pytest.raises(PliError, match="no text to encode"): encode_texts(tiny, [])
    assert not cache.folder.exists()


def test_each_text_once(tiny):
    asked = []
    tiny.encode_text = lambda texts: asked.extend(texts) or type(tiny).encode_text(tiny, texts)
    words = ["in red", "larger", "in red", "ünïcode", "larger"]
    found = encode_texts(tiny, iter(words), batch_size=2)
    assert asked == ["in red", "larger", "ünïcode"] and torch.equal(found[0], found[2]) and torch.equal(found[1], found[4]) and found.shape == (5, tiny.encode_text(["a"]).shape[1])


# --- the cache: what a feature belongs to

def test_a_full_cache_needs_no_model(root, tiny, features, cache):
    watch = Watch(tiny)
    encode_files(tiny, NAMES[:50], root, cache=cache)
    assert watch.calls == 2 and stored(cache) == 50
    assert torch.equal(encode_files(tiny, NAMES[::-1], root, cache=cache), features.flip(0))
    assert watch.calls == 4                                          # only the 50 others
    assert torch.equal(encode_files(tiny, NAMES[20:70], root, cache=cache), features[20:70]) and watch.calls == 4


def test_the_same_picture_under_many_names(root, tiny, features, tmp_path, cache):
    odd = ["größe 日本.png", "a b\n\t.png", "deep/er/..jpg", "-rf", "'\"; $(x).png", os.fsdecode(b"\xff\xfe.png"), "e\u0301.png", "\u00e9.png", "x" * 250]
    for name in odd:
        (tmp_path / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd" / name).write_bytes((root / "003.png").read_bytes())
    watch = Watch(tiny)
    assert torch.equal(encode_files(tiny, odd, tmp_path / "odd", cache=cache), features[[3] * len(odd)])
    assert watch.calls == 1 and stored(cache) == 1
    assert torch.equal(encode_files(tiny, ["003.png"], root, cache=cache), features[3:4]) and watch.calls == 1


def test_another_picture_under_the_same_name(root, tiny, features, tmp_path, cache):
    path = tmp_path / "one.bmp"
    Image.open(root / "000.png").save(path)
    status = path.stat()
    assert torch.equal(encode_files(tiny, ["one.bmp"], tmp_path, cache=cache), features[:1])
    Image.open(root / "001.png").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns      # sizes and dates prove nothing
    assert torch.equal(encode_files(tiny, ["one.bmp"], tmp_path, cache=cache), features[1:2])


def test_keys(root, tmp_path):
    boxes = [None, (0, 0, 2, 2), (0, 0, 2, 3), (0, 0, 2.5, 3)]
    assert len({content_key(root / name, box) for name in NAMES[:3] for box in boxes}) == 12
    assert content_key(root / "000.png", (0, 0, 2, 2)) == content_key(root / "000.png", [0.0, 0, 2, 2])
    with pytest.raises(PliError): content_key(root / "000.png", (0, 0, 0, 2))


def test_a_changed_checkpoint_never_reads_old_features(root, tiny, features, cache):
    encode_files(tiny, NAMES, root, cache=cache)
    weights = dict(tiny.model.visual.named_parameters())
    for name in list(weights)[:: max(1, len(weights) // 6)]:
        last = weights[name].data.flatten()[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(before, torch.tensor(math.inf)))   # the smallest step there is
        assert torch.equal(encode_files(tiny, NAMES[:3], root, cache=cache), encode_files(tiny, NAMES[:3], root))
        last.copy_(before)
    assert len(cache.entries()) == 1 + len(list(weights)[:: max(1, len(weights) // 6)])
    other = load_backbone("pli-tiny-48", seed=1)
    assert not torch.allclose(encode_files(other, NAMES, root, cache=cache), features, atol=0.01)
    watch = Watch(tiny)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features) and watch.calls == 0


def test_the_digest_of_weights(tiny, tmp_path):
    told = tiny.fingerprint()
    tiny.save(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    again.encode_text(["words"])
    assert again.fingerprint() == told and len(told) == 64 and again.name != tiny.name
    seen = {told}
    def changed():
        seen.add(tiny.fingerprint())
        return len(seen)
    tiny.config["model_cfg"]["quick_gelu"] = True
    assert changed() == 2
    block = tiny.model.visual.transformer.resblocks[0]
    block.ln_1.weight.data[0], block.ln_2.weight.data[0] = 2.0, 3.0
    assert changed() == 3
    block.ln_1, block.ln_2 = block.ln_2, block.ln_1                   # the same bytes under other names
    assert changed() == 4
    assert tiny.double() is tiny and changed() == 5


def test_what_else_decides_a_feature(root, tiny, cache):
    said = [features_of(tiny)]
    def new():
        said.append(features_of(tiny))
        return said[-1] not in said[:-1]
    assert not new()
    small = [lambda picture: pil_to_tensor(picture.resize((48, 48), Image.Resampling.BOX)), lambda picture: pil_to_tensor(picture.resize((48, 48), Image.Resampling.NEAREST))]
    for name, value in (("preprocess", "by hand"), ("pixels", small[0]), ("pixels", small[1]), ("mean", tiny.mean + 0.01)):
        setattr(tiny, name, value)
        assert new()
    tiny.config["preprocess_cfg"]["interpolation"] = "nearest"
    assert new()
    with torch.autocast("cpu", torch.bfloat16): assert new() and said[-1]["precision"] == "float32, autocast bfloat16"
    assert json.loads(json.dumps(said)) == said and "0x" not in json.dumps(said)
    assert torch.equal(encode_files(tiny, NAMES[:3], root, cache=cache), encode_files(tiny, NAMES[:3], root))


def test_another_transform_by_name(tiny, tmp_path, cache):
    Image.fromarray(np.arange(40 * 12 * 3, dtype=np.uint32).reshape(12, 40, 3).astype(np.uint8)).save(tmp_path / "wide.png")
    padded = load_backbone("pli-tiny-48", preprocess="target-pad")
    found = [encode_files(backbone, ["wide.png"], tmp_path, cache=cache) for backbone in (tiny, padded) for _ in range(2)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.allclose(found[0], found[2], atol=1e-3)
    assert sorted(entry.transform for entry in cache.entries()) == ["model", "target-pad"]


def test_a_model_that_is_trained_is_refused(root, tiny, cache):
    with pytest.raises(PliError, match="training mode"): encode_files(tiny.train(), NAMES, root, cache=cache)


# --- the cache: kills, faults, several at once

def test_stopped_in_the_middle(root, tiny, features, cache):
    Watch(tiny, stop=2)
    with pytest.raises(KeyboardInterrupt): encode_files(tiny, NAMES, root, cache=cache)
    assert stored(cache) == 64
    watch = Watch(tiny)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features) and watch.calls == 2 and stored(cache) == 100


def test_a_broken_picture_costs_nothing_that_was_done(root, tiny, tmp_path, cache, features):
    for name in NAMES: (tmp_path / name).write_bytes((root / name).read_bytes())
    whole = (tmp_path / "090.png").read_bytes()
    (tmp_path / "090.png").write_bytes(whole[:-60])                   # its header is whole
    with pytest.raises(BrokenPictures, match="^[^;]*090.png: broken picture[^;]*$") as caught: encode_files(tiny, NAMES, tmp_path, cache=cache)
    assert list(caught.value.errors) == ["090.png"] and stored(cache) == 99                         # all others are kept
    (tmp_path / "010.png").write_bytes(whole[:-60])
    with pytest.raises(BrokenPictures, match="^2 pictures cannot be used: .*010.png: .*; .*090.png: ") as caught: encode_files(tiny, NAMES, tmp_path, cache=cache, workers=1)
    (tmp_path / "010.png").write_bytes((root / "010.png").read_bytes())
    (tmp_path / "090.png").write_bytes(whole)
    assert torch.equal(encode_files(tiny, NAMES, tmp_path, cache=cache), features)


def test_files_that_go_away_or_change(root, tiny, cache, monkeypatch):
    with pytest.raises(BrokenPictures, match="gone.png: missing picture"): encode_files(tiny, ["000.png", "gone.png"], root, cache=cache, check=False)
    with pytest.raises(BrokenPictures, match="broken picture"): encode_files(tiny, ["."], root, cache=cache, check=False)
    with pytest.raises(PliError, match="1 of 2 pictures"): encode_files(tiny, ["000.png", "gone.png"], root, cache=cache)
    keys = iter([b"1" * 32, b"2" * 32])
    monkeypatch.setattr(gallery, "content_key", lambda path, box: next(keys))
    with pytest.raises(BrokenPictures, match="001.png: changing picture"): encode_files(tiny, ["001.png"], root, cache=cache)
    assert stored(cache) == 1                                                              # only 000.png is as it was


@pytest.mark.parametrize("setting, value, count", [("SHARD", 32, 4), ("SHARD", 60, 2), ("SECONDS", 0, 4), ("SHARD", 5000, 1)])
def test_shards(root, tiny, features, cache, monkeypatch, setting, value, count):
    monkeypatch.setattr(gallery, setting, value)
    encode_files(tiny, NAMES, root, cache=cache)
    assert len(shards(cache)) == count and stored(cache) == 100
    found = {key: feature for path in shards(cache) for key, feature in zip(*read_shard(path))}
    assert torch.equal(torch.stack([found[content_key(root / name)] for name in NAMES]), features)
    assert {path.name for path in cache.folder.rglob("*") if path.is_file()} == {path.name for path in shards(cache)} | {"model.json"}      # and no pickle


def spoil_by(how, whole: bytes) -> bytes:
    return {"empty": lambda: b"", "header": lambda: whole[:5], "half": lambda: whole[: len(whole) // 2], "one byte short": lambda: whole[:-1], "longer": lambda: whole + b"x",
            "zeros": lambda: whole[:-4096] + bytes(4096), "one bit": lambda: whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:], "text": lambda: b"{}" * 500,
            "other keys": lambda: whole.replace(b'"keys"', b'"kex0"'), "no digest": lambda: whole.replace(b'"sha256"', b'"sha257"')}[how]()


@pytest.mark.parametrize("how", ["empty", "header", "half", "one byte short", "longer", "zeros", "one bit", "text", "other keys", "no digest"])
def test_a_broken_shard(root, tiny, features, cache, monkeypatch, capsys, how):
    monkeypatch.setattr(gallery, "SHARD", 32)
    encode_files(tiny, NAMES, root, cache=cache)
    victim = shards(cache)[1]
    victim.write_bytes(spoil_by(how, victim.read_bytes()))
    cache.entries()                                                   # a list may be asked for at any time
    watch = Watch(tiny)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(victim) in lines[0] and "are broken" in lines[0] and "encoded again" in lines[0]
    assert watch.calls == 1 and not victim.exists() and stored(cache) == 100
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features) and watch.calls == 1 and not capsys.readouterr().err


def test_something_else_where_a_shard_should_be(root, tiny, features, cache, capsys):
    encode_files(tiny, NAMES[:40], root, cache=cache)
    (cache.entries()[0].folder / "1-0123456789ab.safetensors").mkdir()
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features) and stored(cache) == 100
    assert "encoded again" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), gallery.SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_costs_a_line(root, tiny, features, cache, monkeypatch, capsys, error):
    def full(*_, **__): raise error
    monkeypatch.setattr(gallery, "save_tensors", full)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)
    assert "features cannot be stored" in capsys.readouterr().err and not shards(cache)
    assert not [path for path in cache.folder.rglob("*") if path.suffix == ".part"]


def test_a_cache_that_is_no_folder(root, tiny, features, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    cache = FeatureCache(tmp_path / "file")
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features) and "features cannot be stored" in capsys.readouterr().err
    assert cache.entries() == [] and cache.clear() == [] and (tmp_path / "file").read_text() == "mine"


def test_two_shards_with_the_same_pictures(root, tiny, features, cache):
    encode_files(tiny, NAMES[:3], root, cache=cache)
    keys, found = read_shard(shards(cache)[0])
    write_shard(cache.entries()[0].folder, keys, found)
    assert len(shards(cache)) == 2 and stored(cache) == 3
    assert torch.equal(encode_files(tiny, NAMES[:3], root, cache=cache), features[:3])


def test_what_a_killed_run_left_is_swept(root, tiny, cache):
    encode_files(tiny, NAMES[:3], root, cache=cache)
    left, written = (cache.entries()[0].folder / f".{name}.safetensors.1.part" for name in ("left", "written"))
    left.write_bytes(b"half")
    file = create_locked(written)                                                # as `atomic` does: another process would be at it
    encode_files(tiny, NAMES[:3], root, cache=cache)
    assert not left.exists() and written.exists()
    os.close(file)


SCRIPT = """
import sys, time
import numpy as np
import torch
from pathlib import Path
from pli.gallery import encode as gallery
from pli.backbones.loading import load_backbone
torch.set_num_threads(1)
root, folder, out, pause, start = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5]
gallery.SHARD = 32
tiny = load_backbone("pli-tiny-48")
def slowly(pixels):
    time.sleep(pause)
    return type(tiny).encode_image(tiny, pixels)
tiny.encode_image = slowly
Path(start).touch()
while len(list(Path(start).parent.glob("start*"))) < 1 + (pause < 1): time.sleep(0.01)
np.save(out, gallery.encode_files(tiny, sorted(path.name for path in root.iterdir()), root, cache=gallery.FeatureCache(folder)).numpy())
"""


def begin(root, cache, out: Path, pause: float, start: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), str(cache.folder), str(out), str(pause), str(start)], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_killed_and_resumed(root, tiny, features, cache, tmp_path):
    process = begin(root, cache, tmp_path / "never.npy", 2, tmp_path / "start")
    try:
        deadline = time.monotonic() + 120
        while not shards(cache):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "never.npy").exists()
    done = stored(cache)
    assert done in (32, 64)
    watch = Watch(tiny)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)
    assert watch.calls == math.ceil((100 - done) / 32)


def test_two_processes_at_once(root, tiny, features, cache, tmp_path):
    outs = [tmp_path / "a.npy", tmp_path / "b.npy"]
    processes = [begin(root, cache, out, 0.1, tmp_path / f"start {out.stem}") for out in outs]
    for process in processes: assert process.wait(timeout=120) == 0
    for out in outs: assert torch.equal(torch.from_numpy(np.load(out, allow_pickle=False)), features)
    assert stored(cache) == 100 and not [path for path in cache.folder.rglob("*") if path.suffix == ".part"]
    watch = Watch(tiny)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features) and watch.calls == 0


def test_cleared_while_it_is_filled(root, tiny, features, cache, monkeypatch):
    monkeypatch.setattr(gallery, "SHARD", 32)
    class Clearing(Watch):
        def __call__(self, pixels):
            if self.calls == 2: cache.clear()
            return super().__call__(pixels)
    Clearing(tiny)
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)
    assert stored(cache) == 36 and cache.entries()[0].model == "pli-tiny-48"


# --- the cache: what people see

def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PLI_CACHE", str(tmp_path / "mine"))
    assert FeatureCache().folder == tmp_path / "mine" and FeatureCache(tmp_path / "x").folder == tmp_path / "x" and FeatureCache("x").folder == Path("x")
    monkeypatch.setenv("PLI_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pli" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pli" / "features"
    assert not (tmp_path / "mine").exists()


def test_a_list_of_what_is_kept(root, tiny, cache):
    assert cache.entries() == [] and cache.clear() == []
    other = load_backbone("pli-tiny-64")
    encode_files(tiny, NAMES, root, cache=cache)
    encode_files(other, NAMES[:7], root, cache=cache)
    first = next(entry for entry in cache.entries() if entry.model == "pli-tiny-48")
    past = time.time() - 9 * 86400
    for path in first.folder.iterdir(): os.utime(path, (past, past))
    second, first = cache.entries()                                    # the last used first
    assert (first.model, first.transform, first.precision, first.pictures) == ("pli-tiny-48", "model", "float32", 100)
    assert (second.model, second.pictures) == ("pli-tiny-64", 7) and first.used < second.used
    assert first.bytes == sum(path.stat().st_size for path in first.folder.iterdir()) > 100 * 4 * 32
    said = json.loads((first.folder / "model.json").read_text())
    assert said["model"] == "pli-tiny-48" and said["tower"] == tiny.fingerprint("image") and said["transform"]["name"] == "model" and "may be deleted" in said["what"] and said["made"] == first.made
    encode_files(tiny, NAMES[:1], root, cache=cache)                   # reading is using
    assert [entry.model for entry in cache.entries()][0] == "pli-tiny-48" or cache.entries()[0].used == cache.entries()[1].used


def test_clearing(root, tiny, cache):
    for backbone in (tiny, load_backbone("pli-tiny-48", seed=1), load_backbone("pli-tiny-64")): encode_files(backbone, NAMES[:5], root, cache=cache)
    with pytest.raises(PliError, match="no stored features are called 'ViT-B-32'; there are [0-9a-f]{16}, [0-9a-f]{16}, [0-9a-f]{16}$"): cache.clear("ViT-B-32")
    mine = cache.folder / "notes.txt", cache.folder / "0123456789abcdef" / "thesis.safetensors", next(e for e in cache.entries() if e.model == "pli-tiny-64").folder / "mine.txt"
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert [entry.model for entry in cache.clear("pli-tiny-48")] == ["pli-tiny-48"] * 2
    assert [entry.model for entry in cache.entries()] == ["pli-tiny-64"]
    assert len(cache.clear()) == 1 and cache.entries() == [] and all(path.read_text() == "mine" for path in mine) and len(list(cache.folder.rglob("*"))) == 5
    with pytest.raises(PliError, match="there is nothing"): cache.clear("pli-tiny-48")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"model": 7, "transform": "x"}', '{"model": "a\\nb\\u001b[31m"}', "\udcff"])
def test_a_description_that_is_broken(root, tiny, features, cache, text):
    encode_files(tiny, NAMES[:5], root, cache=cache)
    path = cache.entries()[0].folder / "model.json"
    path.unlink() if text is None else path.write_bytes(text.encode(errors="surrogateescape"))
    entry, = cache.entries()
    assert entry.pictures == 5 and entry.transform == "unknown" and "\n" not in entry.model
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)
    assert len(cache.clear()) == 1


def test_a_model_with_an_odd_name(root, tiny, cache):
    tiny.name = "local-dir:" + os.fsdecode(b"/tr\xff\nain/") + "x" * 300
    encode_files(tiny, NAMES[:5], root, cache=cache)
    assert cache.entries()[0].model.startswith("local-dir:/tr\\udcff\\nain/xxx")
    assert len(cache.clear(tiny.name)) == 1


# --- the best k

def slow_top_k(row: list[float], k: int) -> list[int]: return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


coarse = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1e30, math.inf])


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 60).flatmap(lambda n: st.lists(st.lists(coarse, min_size=n, max_size=n), min_size=1, max_size=5)), st.integers(1, 70))
def test_top_k_against_a_slow_sort(rows, k):
    assert top_k(torch.tensor(rows), k).tolist() == [slow_top_k(row, k) for row in rows]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=200), st.integers(1, 200))
def test_top_k_of_any_scores(row, k):
    for dtype in (torch.float32, torch.float64): assert top_k(torch.tensor([row], dtype=dtype), k).tolist() == [slow_top_k(row, k)]


def test_ties_in_a_wide_gallery():
    scores = torch.zeros(3, 100_000)
    scores[1, 77_777:] = 1
    scores[2, ::5000] = torch.arange(20).float()
    found = top_k(scores, 30)
    assert found[0].tolist() == list(range(30)) and found[1].tolist() == list(range(77_777, 77_807))
    assert found[2].tolist() == [5000 * i for i in range(19, 0, -1)] + list(range(11))      # picture 0 has the score 0 itself
    assert top_k(scores.long(), 30).tolist() == found.tolist() and found.dtype == torch.int64


def test_scores_that_cannot_be_ordered():
    with pytest.raises(PliError, match="query 2: a score is not a number"): top_k(torch.tensor([[0.0, 1], [1, 0], [math.nan, 5], [math.nan, 0]]), 1)
    with pytest.raises(PliError, match="k >= 1, got 0"): top_k(torch.zeros(1, 3), 0)
    with pytest.raises(PliError, match="got 1 dimensions"): top_k(torch.zeros(3), 1)
    assert top_k(torch.zeros(0, 3), 2).shape == (0, 2) and top_k(torch.zeros(2, 0), 5).shape == (2, 0)


# --- search

@settings(deadline=None, max_examples=150)
@given(st.integers(0, 70), st.integers(1, 300), st.integers(1, 8), st.integers(1, 320), st.integers(4096, 60_000), st.integers(0, 2**30), st.booleans())
def test_search_against_a_slow_sort(queries, pictures, width, k, budget, seed, leave):
    chance = rng_for(seed, "search")
    asked, held = (torch.randint(-2, 3, (n, width), generator=chance).float() for n in (queries, pictures))
    out = torch.randint(-1, pictures, (queries,), generator=chance) if leave else None
    scores, found = search(asked, held, k, out, budget)
    assert scores.shape == found.shape == (queries, min(k, pictures))
    for query, row in enumerate((asked @ held.T).tolist()):
        order = [i for i in slow_top_k(row, pictures) if out is None or i != out[query]][:k]
        missing = min(k, pictures) - len(order)
        assert found[query].tolist() == order + [-1] * missing and scores[query].tolist() == [row[i] for i in order] + [-math.inf] * missing


def random_features(count: int, width: int, name: str) -> torch.Tensor: return unit(torch.randn(count, width, generator=rng_for(0, name)))


def test_search_of_real_numbers(monkeypatch):
    monkeypatch.setattr(gallery, "TILE", 1024)
    asked, held = random_features(70, 100, "queries"), random_features(5003, 100, "gallery")
    exact = asked.double() @ held.double().T
    scores, found = search(asked, held, 50)
    assert torch.allclose(scores.double(), exact.gather(1, found), atol=1e-6) and (scores[:, :-1] >= scores[:, 1:]).all()
    assert (exact.gather(1, found)[:, -1] >= exact.topk(50).values[:, -1] - 1e-6).all() and all(len(set(row)) == 50 for row in found.tolist())
    for budget in (4096, 50_000, 10**6): assert all(torch.equal(a, b) for a, b in zip(search(asked, held, 50, budget=budget), (scores, found)))
    for rows in ([3], [69, 2, 5], list(range(33))): assert torch.equal(search(asked[rows], held, 50)[0], scores[rows])
    assert torch.equal(search(asked.double(), held.double(), 50)[1], exact.topk(50).indices)
    assert search(asked.half(), held.half(), 50)[0].dtype == torch.float32


@pytest.mark.parametrize("pictures", [5, 17, 97, 1003, 2000])
@pytest.mark.parametrize("queries", [1, 3, 50])
def test_the_same_picture_under_many_numbers(pictures, queries):
    "In a product of odd shape they can get several scores."
    held = random_features(1, 768, "picture").expand(pictures, -1).contiguous()
    scores, found = search(random_features(queries, 768, "queries"), held, 60)
    assert (found == torch.arange(min(60, pictures))).all() and all(len(row.unique()) == 1 for row in scores)


@settings(deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 10**7), st.integers(0, 2**31), st.sampled_from([4, 8]))
def test_the_budget_holds(queries, pictures, budget, size):
    if budget < size * 32 * 32:
        with pytest.raises(PliError, match=f"give at least {size * 1024}"): _tile_shape(queries, pictures, budget, size)
        return
    tall, wide = _tile_shape(queries, pictures, budget, size)
    assert tall * wide * size <= budget and tall % 32 == wide % 32 == 0 and tall >= 32 and wide >= 32 and tall < queries + 32 and wide < pictures + 32


def test_no_more_scores_than_the_budget_are_seen(monkeypatch):
    seen, real = [], gallery.top_k
    monkeypatch.setattr(gallery, "top_k", lambda scores, k: seen.append(scores.numel() * scores.element_size()) or real(scores, k))
    search(random_features(200, 16, "queries"), random_features(20_000, 16, "gallery"), 50, budget=2**20)
    assert max(seen) <= 2**20 and sum(seen) == 200 * 20_000 * 4


@pytest.mark.parametrize("change, says", [
    ({"gallery": torch.zeros(0, 8)}, "the gallery is empty"), ({"gallery": torch.zeros(5, 7)}, "queries are 8 numbers wide and the gallery 7"), ({"gallery": torch.zeros(8)}, "must be .number, width."),
    ({"k": 0}, "k >= 1, got 0"), ({"budget": 1000}, "a budget of 1000 bytes is too small"), ({"left_out": torch.tensor([0])}, "left_out must hold one number a query .4."),
    ({"left_out": torch.tensor([0, 1, 5, 9])}, "query 2: left-out picture 5 is outside the gallery of 5 pictures"), ({"left_out": torch.tensor([0, -2, 1, 1])}, "query 1: left-out picture -2"),
    ({"queries": torch.zeros(4, 8).index_fill(0, torch.tensor([2]), math.nan)}, "query 2: its feature holds a number that is not finite"),
    ({"gallery": torch.zeros(5, 8).index_fill(0, torch.tensor([3]), -math.inf)}, "gallery picture 3: its feature holds"),
    ({"gallery": torch.tensor([[math.inf] * 8, [-math.inf] * 8])}, "gallery picture 0: its feature holds"),
])
def test_features_that_cannot_be_searched(change, says):
    with pytest.raises(PliError, match=says): search(**({"queries": torch.zeros(4, 8), "gallery": torch.zeros(5, 8), "k": 3} | change))


# --- strangers' files and damage

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


@needs_pipes
def test_pipes_and_links_in_the_cache_are_not_waited_for(root, tiny, features, cache, capsys):
    encode_files(tiny, NAMES[:40], root, cache=cache)
    folder = cache.entries()[0].folder
    os.mkfifo(folder / "1-0123456789ab.safetensors"), os.symlink("/dev/zero", folder / "2-0123456789ab.safetensors"), os.symlink("gone", folder / "3-0123456789ab.safetensors")
    (folder / "model.json").unlink(), os.mkfifo(folder / "model.json")
    assert cache.entries()[0].pictures == 40
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and any("a pipe, not a file" in line for line in lines) and any("a device, not a file" in line for line in lines)
    assert (folder / "1-0123456789ab.safetensors").exists()             # not ours, so not removed
    cache.clear()
    assert not folder.exists()


@needs_pipes
def test_pictures_that_are_no_files(root, tiny, cache, tmp_path):
    (tmp_path / "a.png").write_bytes((root / NAMES[0]).read_bytes())
    os.mkfifo(tmp_path / "pipe.png"), os.symlink("/dev/zero", tmp_path / "endless.png")
    with pytest.raises(BrokenPictures) as caught: encode_files(tiny, ["a.png", "pipe.png", "endless.png", "gone.png"], tmp_path, cache=cache, check=False)
    said = {name: str(error) for name, error in caught.value.errors.items()}
    assert "a pipe, not a file" in said["pipe.png"] and "a device, not a file" in said["endless.png"] and "missing picture" in said["gone.png"]
    with pytest.raises(PliError, match="a pipe, not a file"): content_key(tmp_path / "pipe.png")


def test_any_flipped_bit_in_a_shard_is_noticed(root, tiny, features, cache, capsys):
    "Header and body: never other features, and never a traceback."
    encode_files(tiny, NAMES[:8], root, cache=cache)
    path = shards(cache)[0]
    whole, known = path.read_bytes(), dict(zip(*map(list, gallery.read_shard(path))))
    places = torch.randperm(len(whole) * 8, generator=torch.Generator().manual_seed(0))[:500].tolist() + list(range(8 * 300))
    noticed = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try: keys, found = gallery.read_shard(path)
        except (ValueError, OSError): noticed += 1
        else: assert all(torch.equal(row, known[key]) for key, row in zip(keys, found)) and len(keys) == 8
        gallery.keys_in(path)
    assert noticed > 0.95 * len(places)                                  # the rest is white space in the header


def test_a_killed_write_leaves_a_part_that_is_never_read(root, tiny, features, cache, tmp_path):
    encode_files(tiny, NAMES[:8], root, cache=cache)
    folder = cache.entries()[0].folder
    half = shards(cache)[0].read_bytes()
    (folder / ".9-0123456789ab.safetensors.1.part").write_bytes(half[: len(half) // 2])
    assert torch.equal(encode_files(tiny, NAMES[:8], root, cache=cache), features[:8]) and len(shards(cache)) == 1


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_shards_have_the_usual_permissions(root, tiny, cache):
    encode_files(tiny, NAMES[:8], root, cache=cache)
    assert {path.stat().st_mode & 0o777 for path in [*shards(cache), cache.entries()[0].folder / "model.json"]} == {0o666 & ~mask()}


def mask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_more_workers_than_a_machine_can_bear(root, tiny):
    for number in (-1, 10**6):
        with pytest.raises(PliError, match=f"workers must be 0 to .* got {number}"): encode_files(tiny, NAMES[:2], root, workers=number)
        with pytest.raises(PliError, match="workers must be 0 to"): encode_pictures(tiny, torch.zeros(2, 3, 48, 48, dtype=torch.uint8), workers=number)


def test_a_square_around_a_long_box_is_bounded():
    with pytest.raises(PliError, match="a square around them has 20000 x 20000 pixels; 89,478,485 are the most"): crop_around(Image.new("1", (20_000, 10)), (0, 0, 20_000, 10))


def test_a_picture_that_would_grow_by_padding_is_refused_before_it_does(tmp_path):
    from pli.backbones.transforms import TargetPad
    with pytest.raises(PliError, match="20000 x 200: padded to 20000 x 16000 it has 320,000,000 pixels; 180,000,000 are the most"): TargetPad()(Image.new("1", (20_000, 200)))
    Image.new("RGB", (16_000, 100)).save(tmp_path / "a.png")
    error = PictureFiles(["a.png"], tmp_path, TargetPad())[0]
    assert isinstance(error, PictureError) and error.cause == "too large picture" and "padded to 16000 x 12800" in str(error)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_reading_process_that_is_killed_is_one_line(root, tiny, features, cache):
    def dying(picture):
        os.kill(os.getpid(), signal.SIGKILL)
    backbone = copy.copy(tiny)
    backbone.pixels = dying
    with pytest.raises(PliError, match="^a process that reads pictures died .*; often memory .* use fewer workers, or 0. .* the same command goes on from there$"):
        encode_files(backbone, NAMES, root, cache=cache, workers=1)
    assert not [path for path in cache.folder.rglob("*") if path.suffix == ".part"]
    assert torch.equal(encode_files(tiny, NAMES, root, cache=cache), features)

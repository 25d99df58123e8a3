"pli.data: odd pictures, malformed tables, hostile paths, sources of one's own, batches that survive a restart."
import gzip
import json
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pli.core import PliError
from pli.data.pictures import MOST_PIXELS, PictureError, open_header, open_picture
from pli.data.batches import Batch, ResumableBatchSampler, BatchPartners, PairSet, TensorPairs, collate
from pli.data.pairs import Pairs, read_pairs, split_pairs
from pli.core import printable
from pli.data.registry import PAIR_READERS
from pli.data.tables import TABLE_BYTES, UNPACKED_BYTES, PairReader, Record, SkippedRecord, text_lines


def save(path: Path, colour=(200, 30, 30), size=(12, 10), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def causes(pairs: Pairs) -> dict:
    return {problem.line: problem.cause for problem in pairs.problems}


def pixels(picture: Image.Image) -> torch.Tensor:  # at module level: loader workers pickle it
    return torch.from_numpy(np.array(picture.resize((8, 8)))).permute(2, 0, 1)


# --- pictures

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((10, 10, 10, 255), (0, 0, 4, 8))
    path = tmp_path / "a.png"
    if mode == "P": picture.quantize(4).save(path)
    else: picture.convert(mode).save(path)
    seen = open_picture(path)
    assert seen.mode == "RGB" and seen.getpixel((7, 0)) == (255, 255, 255)
    assert max(seen.getpixel((0, 0))) <= 12


def test_half_transparent_is_blended(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode, colour", [("P", 1), ("L", 7), ("RGB", (1, 2, 3))])
def test_transparent_key_colour(tmp_path, mode, colour):
    picture = Image.new(mode, (4, 4), colour)
    if mode == "P": picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.save(tmp_path / "a.png", transparency=colour)
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    upright = Image.new("RGB", (32, 64), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 16))            # red in the upper left corner
    stored = upright.transpose(Image.Transpose[turn[orientation]]) if orientation in turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    seen = open_picture(tmp_path / f"a.{suffix}")
    assert seen.size == (32, 64)
    corner = seen.getpixel((4, 4))
    assert corner[0] > 200 and corner[2] < 60


def test_nonsense_exif_does_not_lose_the_picture(tmp_path):
    save(tmp_path / "a.jpg", exif=b"Exif\0\0this is not a TIFF header")
    assert open_picture(tmp_path / "a.jpg").size == (12, 10)
    exif = Image.Exif()
    exif[0x0112] = 99
    save(tmp_path / "b.jpg", exif=exif)
    assert open_picture(tmp_path / "b.jpg").size == (12, 10)


def tiff(values: np.ndarray, bits: int | None = None, photometric: int = 1, **ranges) -> bytes:
    "An uncompressed TIFF written by hand: grey or RGB, any bits, with `SMinSampleValue` and `SMaxSampleValue` where they are given."
    height, width, channels = values.shape if values.ndim == 3 else (*values.shape, 1)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    if bits == 12:
        rows = ["".join(f"{value:012b}" for value in row.ravel()) for row in values]
        data = b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    else: data = values.tobytes()
    bits = bits or 8 * values.dtype.itemsize
    entries = {256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits] * channels), 259: ("H", [1]), 262: ("H", [2 if channels == 3 else photometric]), 273: ("I", [0]),
               277: ("H", [channels]), 278: ("I", [height]), 279: ("I", [len(data)]), 339: ("H", [kind] * channels)}
    entries |= {{"black": 340, "white": 341, "subfile": 254}[name]: ("I" if name == "subfile" else "f" if kind == 3 else "i" if kind == 2 else "H", [value] * (1 if name == "subfile" else channels))
                for name, value in ranges.items()}
    head, far, at = b"", b"", 8 + 2 + 12 * len(entries) + 4
    size = sum(len(said) * struct.calcsize(code) for code, said in entries.values() if len(said) * struct.calcsize(code) > 4)
    entries[273] = ("I", [at + size])
    for tag, (code, said) in sorted(entries.items()):
        raw = struct.pack(f"<{len(said)}{code}", *said)
        if len(raw) > 4: far, raw = far + raw, struct.pack("<I", at + len(far))
        head += struct.pack("<HHI", tag, {"H": 3, "I": 4, "f": 11, "i": 9}[code], len(said)) + raw.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + head + struct.pack("<I", 0) + far + data


def grey(path: Path) -> list[int]:
    seen = np.asarray(open_picture(path))
    assert (seen[..., :1] == seen).all()
    return seen[0, :, 0].tolist()


U16, I16, U32, I32, F32 = (lambda *values, kind=kind: np.array([values], kind) for kind in (np.uint16, np.int16, np.uint32, np.int32, np.float32))

@pytest.mark.parametrize("content, expected", [
    (tiff(U16(0, 32896, 65535)), [0, 128, 255]),
    (tiff(U16(0, 257, 514)), [0, 1, 2]),                                   # a dark picture stays dark
    (tiff(U16(0, 2048, 4095), bits=12), [0, 128, 255]),
    (tiff(U16(0, 16, 32), bits=12), [0, 1, 2]),
    (tiff(U16(0, 2048, 4095), white=4095), [0, 128, 255]),                 # 12 bits in 16, and the file says so
    (tiff(U16(0, 2048, 4095)), [0, 8, 16]),                                # ... and does not say so
    (tiff(U16(1000, 1500, 2000, 3000), black=1000, white=2000), [0, 128, 255, 255]),
    (tiff(U16(0, 32896, 65535), photometric=0), [255, 127, 0]),            # white is zero
    (tiff(U16(0, 1024, 4095), bits=12, photometric=1, white=4095), [0, 64, 255]),
    (tiff(U32(0, 2**31, 2**32 - 1)), [0, 128, 255]),
    (tiff(U32(0, 65535, 1 << 24)), [0, 0, 1]),
    (tiff(I16(-100, 1, 100), black=-100, white=100), [0, 129, 255]),
    (tiff(I32(0, 32896, 65535), black=0, white=65535), [0, 128, 255]),
    (tiff(F32(0, 0.5, 1)), [0, 128, 255]),
    (tiff(F32(0, 0.004, 0.008)), [0, 1, 2]),
    (tiff(F32(0, 0.25, 1), photometric=0), [255, 191, 0]),
    (tiff(F32(0, 500, 1000), black=0, white=1000), [0, 128, 255]),
    (tiff(F32(np.nan, 0.5, 1)), [0, 128, 255]),
])
def test_deep_grey_has_the_range_that_its_file_states(tmp_path, content, expected):
    (tmp_path / "a.tif").write_bytes(content)
    assert grey(tmp_path / "a.tif") == expected


@pytest.mark.parametrize("content, words", [
    (tiff(F32(0, 128, 255)), "floating point numbers from 0 to 255, and the file does not say which is black"),
    (tiff(F32(-0.5, 0, 0.5)), "from -0.5 to 0.5"),
    (tiff(F32(0, 0.5, np.inf)), "from 0 to inf"),
    (tiff(F32(np.nan, np.nan)), "from nan to nan"),
    (tiff(I16(-100, 0, 100)), "whole numbers with a sign from -100 to 100"),
    (tiff(I32(0, 1, 2)), "whole numbers with a sign from 0 to 2"),
    (tiff(U16(0, 1, 2), black=9, white=9), "range from 9 to 9, which is none"),
    (tiff(F32(0, 1), black=0, white=np.inf), "range from 0 to inf, which is none"),
    (tiff(np.zeros((2, 2, 3), np.uint16), white=4095), "state a range of values from 0 to 4,?095"),
])
def test_a_range_that_no_file_states_is_not_guessed(tmp_path, content, words):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(PictureError, match="a.tif: unknown range") as caught: open_picture(tmp_path / "a.tif")
    assert words.replace(",?", "") in str(caught.value) and "save it with 8" in str(caught.value)


def test_range_of_other_formats(tmp_path):
    deep = np.array([[0, 2048, 4095, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(np.tile(deep, (8, 2))).save(tmp_path / "a.jp2")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + deep.astype(">u2").tobytes())
    for name in ("a.png", "a.jp2", "a.pgm"): assert grey(tmp_path / name)[:4] == [0, 8, 16, 255], name
    (tmp_path / "b.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert grey(tmp_path / "b.pgm") == [0, 128, 255]
    (tmp_path / "c.ppm").write_bytes(b"Pf 2 1 -1.0\n" + np.array([0, 7], "<f4").tobytes())
    with pytest.raises(PictureError, match="from 0 to 7"): open_picture(tmp_path / "c.ppm")


def png(width: int, height: int, kind: int, data: bytes, clear: bytes = b"") -> bytes:
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)) + (chunk(b"tRNS", clear) if clear else b"")
            + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


def test_sixteen_bit_colour(tmp_path):
    colours = [(4096, 32768, 65535), (0, 256, 512)]
    row = struct.pack(">6H", *colours[0], *colours[1])
    (tmp_path / "a.png").write_bytes(png(2, 1, 2, b"\0" + row))
    (tmp_path / "b.png").write_bytes(png(2, 1, 2, b"\0" + row, struct.pack(">3H", *colours[0])))
    (tmp_path / "a.tif").write_bytes(tiff(np.array([colours], np.uint16)))
    for name in ("a.png", "a.tif"): assert np.asarray(open_picture(tmp_path / name)).tolist() == [[[16, 128, 255], [0, 1, 2]]], name
    assert np.asarray(open_picture(tmp_path / "b.png")).tolist() == [[[255, 255, 255], [0, 1, 2]]]     # its transparent colour has 16 bits, too


def test_sixteen_bit_png_with_a_transparent_value(tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 2, 0, 2 * (b"\0" + struct.pack(">HH", 1000, 40000)), struct.pack(">H", 1000)))
    seen = np.asarray(open_picture(tmp_path / "a.png"))[0, :, 0]
    assert seen.tolist() == [255, 156]


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg"), ("L", "jpg"), ("CMYK", "tif"), ("P", "gif"), ("P", "bmp")])
def test_other_modes(tmp_path, mode, suffix):
    Image.new("RGB", (9, 7), "white").convert(mode).save(tmp_path / f"a.{suffix}")
    seen = open_picture(tmp_path / f"a.{suffix}")
    assert seen.mode == "RGB" and seen.size == (9, 7) and min(seen.getpixel((3, 3))) >= 250


def test_lab_is_converted_or_refused_by_name(tmp_path):
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "a.tif")
    try: assert min(open_picture(tmp_path / "a.tif").getpixel((0, 0))) > 250  # newer versions of Pillow
    except PliError as error: assert "a.tif: broken picture" in str(error) and "LAB" in str(error)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    red, green, blue = open_picture(tmp_path / f"a.{suffix}").getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_cut_short(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    with pytest.raises(PictureError, match=f"a.{suffix}: broken picture"): open_picture(path)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for name, message in {"empty.jpg": "empty", "text.jpg": "not one of", "script.eps": "a PostScript document; save its page as PNG", "gone.jpg": "no such file",
                          "text.jpg/a.jpg": "no such file", ".": "not a file", "a\0b.jpg": "null"}.items():
        with pytest.raises(PliError, match=message): open_picture(f"{tmp_path}/{name}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(PictureError, match="not a file"): open_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("side", [int(MOST_PIXELS ** 0.5) + 10, 40_000])
def test_decompression_bomb(tmp_path, side):
    Image.new("1", (1, 1)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(PictureError, match="a.png: too large picture"): open_picture(tmp_path / "a.png")


def encoded(suffix: str) -> bytes:
    import io
    file = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8))
    (picture.convert("RGB") if suffix in ("jpeg", "ppm") else picture.quantize(8) if suffix == "gif" else picture).save(file, suffix)
    return file.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8), st.floats(0, 1))
def test_damaged_bytes_give_a_picture_or_a_pli_error(tmp_path_factory, suffix, changes, keep):
    data = bytearray(encoded(suffix))
    for place, value in changes: data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("damaged") / f"a.{suffix}"
    path.write_bytes(data[:int(keep * len(data))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: assert open_picture(path).mode == "RGB"
        except PliError as error: assert f"a.{suffix}" in str(error)


@pytest.mark.parametrize("name, head, words", [
    ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC/HEIF picture, and this installation of Pillow cannot read it; convert it to JPEG or PNG"),
    ("a.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC/HEIF picture"),
    ("a.cr2", b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file"),
    ("a.tif", b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file"),
    ("a.CR3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a camera's raw file"),
    ("a.jxl", b"\xff\x0a\0\0", "a JPEG XL picture; convert it"),
    ("a.svg", b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "an SVG drawing; save it as PNG"),
    ("a.pdf", b"%PDF-1.7", "a PDF document"),
    ("a.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "a video; save one of its frames"),
    ("a.avi", b"RIFF\0\0\0\0AVI LIST", "a video"),
    ("a.jpg", b"\n<!DOCTYPE html><title>404", "a web page, probably an error message in place of the picture; fetch the picture again"),
    ("a.jpg", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("a.png", b"\x89PNG\r\n\x1a\n", "it begins like a PNG, but is damaged or of a rare kind"),
    ("a.tif", tiff(np.zeros((1, 3), np.float64)), "it begins like a TIFF, but is damaged or of a rare kind; if a picture viewer can open it, save it again as PNG"),
    ("a.tif", tiff(np.zeros((2, 2, 3), np.uint8), subfile=1), "begins with a thumbnail"),
    ("a.nef", tiff(np.zeros((2, 2, 3), np.uint8)), "a camera's raw file"),
])
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, monkeypatch, name, head, words):
    monkeypatch.setattr("pli.data.decoders.has_extra", lambda name: False)           # what test_decoders.py looks at
    (tmp_path / name).write_bytes(head)
    with pytest.raises(PictureError) as caught: open_picture(tmp_path / name)
    assert words in str(caught.value) and caught.value.cause in ("unsupported picture", "broken picture")
    assert (caught.value.cause == "broken picture") == words.startswith(("it begins like", "a web page", "git lfs"))


def test_avif_that_pillow_cannot_read(tmp_path, monkeypatch):
    import pli.data.pictures
    monkeypatch.setattr(pli.data.pictures, "readable_formats", lambda: ("JPEG", "PNG"))
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf")
    with pytest.raises(PictureError, match="an AVIF picture, and this installation of Pillow cannot read it; convert it"): open_picture(tmp_path / "a.avif")


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (2010, 10)])
def test_a_strip_is_refused_before_it_is_resized(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(PictureError, match=f"{size[0]} x {size[1]}: one side is more than 200 times the other") as caught: open_picture(tmp_path / "a.png")
    assert caught.value.cause == "too long picture"
    (tmp_path / "a.csv").write_text("filepath,title\na.png,a strip\nb.png,long\n")
    Image.new("RGB", (2000, 10)).save(tmp_path / "b.png")
    pairs = read_pairs(tmp_path / "a.csv")
    assert causes(pairs) == {2: "too long picture"} and pairs.captions == ("long",)


def test_no_descriptor_is_left_open(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "a.tif"), (tmp_path / "b.png").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for name in ("a.png", "a.tif"):
            open_picture(tmp_path / name)
            open_header(tmp_path / name).close()
        for opener in (open_picture, open_header):
            with pytest.raises(PictureError): opener(tmp_path / "b.png")


def test_what_a_model_cannot_take_costs_one_pair(mixed):
    def refuse(picture): raise PliError("padded to a square it would hold too much")
    index, tensor, reason = PairSet(mixed, refuse)[0]
    assert tensor is None and "0.jpg: padded to a square" in reason and reason.path.endswith("0.jpg")


def test_picture_error_survives_a_process_border():
    error = pickle.loads(pickle.dumps(PictureError("a.jpg", "broken picture", "cut")))
    assert str(error) == "a.jpg: broken picture (cut)" and error.cause == "broken picture"


def test_shown_disarms_terminals():
    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc" and printable("\udce9") == "\\udce9" and len(printable("x" * 9999)) < 250


# --- tables

def test_columns_delimiters_and_keys(tmp_path):
    save(tmp_path / "a.png")
    for name, text, keys in [
        ("a.csv", "filepath,title\na.png,\"red, very\"\n", {}),
        ("b.csv", "id,title,filepath\n1,\"red, very\",a.png\n", {}),
        ("c.tsv", "filepath\ttitle\na.png\tred, very\n", {}),
        ("d.csv", "filepath\ttitle\na.png\tred, very\n", {}),
        ("e.csv", "filepath;title\r\na.png;red, very\r\n", {}),
        ("f.csv", "\ufefffile, words\na.png,\" red, very \"", {"image_key": "file", "caption_key": "words"}),
        ("g.jsonl", '{"filepath": "a.png", "title": "red, very"}\n\n', {}),
        ("h.JSONL", '\ufeff{"image": "a.png", "caption": "red, very", "extra": [1]}', {}),
        ("i.jsonl", '{"f": "a.png", "t": "red, very"}', {"image_key": "f", "caption_key": "t"}),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        pairs = read_pairs(tmp_path / name, **keys)
        assert list(pairs) == [(tmp_path / "a.png", "red, very")] and not pairs.problems, name


def test_captions_may_hold_line_breaks_and_unicode_separators(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text('filepath,title\na.png,"two\nlines"\na.png,one\u2028line\x0b!\nb.png,gone\n', encoding="utf-8")
    pairs = read_pairs(tmp_path / "a.csv")
    assert pairs.captions == ("two\nlines", "one\u2028line\x0b!") and causes(pairs) == {5: "missing picture"}


def test_every_malformed_row_is_listed_with_its_line(tmp_path):
    save(tmp_path / "a.png")
    rows = [b"filepath,title", b"a.png,fine", b"a.png", b"a.png,one,too many", b"a.png,   ", b",no picture", b"a.png,caf\xe9", b"",
            b'a.png,"never closed', b'a.png,"closed" and on', b"a.png,\xe4\xb8\xad\xe6\x96\x87", b"../a.png,out", b"gone.png,gone"]
    (tmp_path / "a.csv").write_bytes(b"\n".join(rows))
    pairs = read_pairs(tmp_path / "a.csv")
    assert pairs.captions == ("fine", "\u4e2d\u6587")
    assert causes(pairs) == {3: "ragged row", 4: "ragged row", 5: "empty caption", 6: "no picture named", 7: "wrong encoding",
                             9: "broken quotes", 10: "broken quotes", 12: "outside the folder", 13: "missing picture"}


def test_malformed_json_lines(tmp_path):
    save(tmp_path / "a.png")
    good = '{"filepath": "a.png", "title": "fine"}'
    rows = [good, "{", "[1, 2]", '{"filepath": "a.png"}', '{"title": "x"}', '{"filepath": 3, "title": "x"}', '{"filepath": "a.png", "title": null}',
            '{"filepath": "a.png", "title": "\\ud800"}', '{"filepath": "a.png", "title": ""}', "[" * 100_000, '{"filepath": "a\\u0000", "title": "x"}', "null", good]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    pairs = read_pairs(tmp_path / "a.jsonl")
    assert pairs.captions == ("fine", "fine") and len(pairs.problems) == len(rows) - 2
    assert causes(pairs) == {2: "bad JSON", 3: "bad JSON", 4: "missing field", 5: "missing field", 6: "not text", 7: "not text", 8: "wrong encoding",
                             9: "empty caption", 10: "bad JSON", 11: "outside the folder", 12: "bad JSON"}


def test_report_and_problem_file(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_bytes(b"filepath,title\n" + b"a.png,fine\n" * 2 + b"g\x1b[31m.png,gone\n" * 5 + b"a.png,caf\xe9\n")
    pairs = read_pairs(tmp_path / "a.csv")
    text = pairs.report()
    assert text.startswith("2 pairs of 1 pictures; 6 records left out")
    assert "missing picture: 5" in text and "and 2 more" in text and "line 4" in text and "\x1b" not in text
    text.encode("utf-8")
    pairs.write_problems(tmp_path / "out" / "problems.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert len(written) == 6 and all(set(record) == {"file", "line", "cause", "detail"} for record in written)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"", "found an empty file"),
    ("a.csv", b"\n\n", "found an empty line"),
    ("a.csv", b"picture,words\na.png,x\n", "columns filepath and title, found picture, words; name other columns with --image-key / image_key="),
    ("a.csv", b"filepath,title,title\na.png,x,y\n", "2 columns called 'title'"),
    ("a.csv", b"filepath,title\n", "no usable pair. Expected records"),
    ("a.csv", b"filepath,title\ngone.png,x\n", "missing picture: 1; the first is .*line 2"),
    ("a.csv", "filepath,title\na.png,x\n".encode("utf-16"), "save it as UTF-8"),
    ("a.jsonl", b"", "no usable pair"),
    ("a.jsonl", b'{"a": 1}\n', "no filepath or image or file_name .*, found a"),
    ("a.xlsx", b"PK", r"pairs are read from \.csv, \.tsv, .* files \(packed as \.gz or not\)"),
    ("a.csv.gz", b"\x1f\x8b\x08", "is packed by gzip and damaged or cut short"),
    ("a.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3garbage!", "is packed by gzip and damaged or cut short"),
])
def test_unusable_files_say_what_was_expected(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PliError, match=message): read_pairs(tmp_path / name)


HERE = '{"file_name": "a.png", "text": "red"}'

def test_packed_tables(tmp_path):
    save(tmp_path / "a.png")
    for name, text in {"a.csv.gz": "filepath,title\na.png,red\n", "a.TSV.GZ": "filepath\ttitle\na.png\tred\n", "a.jsonl.gz": HERE, "plain.csv.gz": "filepath,title\na.png,red\n"}.items():
        (tmp_path / name).write_bytes(text.encode() if name.startswith("plain") else gzip.compress(text.encode()))
        assert read_pairs(tmp_path / name).captions == ("red",), name
    (tmp_path / "misnamed.csv").write_bytes(gzip.compress(b"filepath,title\na.png,red\n"))
    assert read_pairs(tmp_path / "misnamed.csv").captions == ("red",)
    (tmp_path / "two.csv.gz").write_bytes(gzip.compress(b"filepath,title\n") + gzip.compress(b"a.png,red\n"))   # as pigz and cat make them
    assert read_pairs(tmp_path / "two.csv.gz").captions == ("red",)


def test_a_gzip_bomb_is_stopped(tmp_path):
    with gzip.open(tmp_path / "bomb.csv.gz", "wb", 1) as file:
        file.write(b"filepath,title\n")
        for _ in range(64): file.write(b"\0" * 2**20)
    assert (tmp_path / "bomb.csv.gz").stat().st_size < 2**19
    with pytest.raises(PliError, match="bomb.csv.gz: unpacks to more than 33,554,432 bytes; if that is right, unpack it first"): text_lines(tmp_path / "bomb.csv.gz", 2**25)
    assert UNPACKED_BYTES <= 2**30 and TABLE_BYTES > UNPACKED_BYTES            # what is used where no limit is named
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"\0" * 2**22)), save(tmp_path / "b.png"), save(tmp_path / "a.png"), (tmp_path / "a.txt").write_text("red")
    assert [problem.cause for problem in read_pairs(tmp_path).problems] == ["unreadable caption file"]


def test_lists_of_captions_and_hugging_face_names(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    rows = [HERE, '{"file_name": "b.png", "text": ["blue", " round "]}', '{"file_name": "b.png", "text": []}', '{"file_name": "b.png", "text": ["x", 3, ""]}',
            '{"file_name": ["b.png"], "text": "x"}', '{"file_name": "b.png", "text": {"a": 1}}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    pairs = read_pairs(tmp_path / "metadata.jsonl")
    assert list(zip(pairs.names, pairs.captions)) == [("a.png", "red"), ("b.png", "blue"), ("b.png", "round"), ("b.png", "x")]
    assert [(problem.line, problem.cause) for problem in pairs.problems] == [(3, "empty caption"), (4, "not text"), (4, "empty caption"), (5, "not text"), (6, "not text")]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,red\n")
    assert read_pairs(tmp_path / "metadata.csv").captions == ("red",)
    with pytest.raises(PliError, match="There is metadata.csv, metadata.jsonl: did you mean"): read_pairs(tmp_path)


def test_two_columns_that_could_be_meant_are_said(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("path,text,title,image\nx,y,red,a.png\n")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "red", "text": "y"}\n' * 3)
    pairs = read_pairs(tmp_path / "a.csv")
    assert list(pairs) == [(tmp_path / "a.png", "red")] and len(pairs.notes) == 2
    assert "reads 'image'; 'path' is there, too" in pairs.report() and "reads 'title'; 'text' is there, too" in pairs.report()
    for limit in (None, 1):
        pairs = read_pairs(tmp_path / "a.jsonl", limit=limit)
        assert len(pairs.notes) == 1 and "reads 'caption'; 'text' is there, too" in pairs.notes[0]
    assert not read_pairs(tmp_path / "a.jsonl", caption_key="caption").notes and read_pairs(tmp_path / "a.jsonl", caption_key="text").captions == ("y",) * 3


def parquet(path: Path, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    save(tmp_path / "a.png")
    pairs = read_pairs(parquet(tmp_path / "a.parquet", id=[1, 2, 3, 4], filepath=["a.png", None, "../b.png", "a.png"], title=["red", "x", "y", None]))
    assert pairs.captions == ("red",) and causes(pairs) == {2: "not text", 3: "outside the folder", 4: "not text"}
    pairs = read_pairs(parquet(tmp_path / "b.parquet", file_name=["a.png"] * 3, text=[["red", "round"], [], ["x", None]]))
    assert pairs.captions == ("red", "round", "x") and [(problem.line, problem.cause) for problem in pairs.problems] == [(2, "empty caption"), (3, "not text")]
    for columns, words in [({"filepath": [b"x"], "title": ["x"]}, "column 'filepath' holds binary, not text"), ({"image": [{"bytes": b"x", "path": "a"}], "text": ["x"]}, "column 'image' holds struct<"),
                           ({"filepath": ["a.png"], "words": ["x"]}, "expected the columns filepath and title, found filepath, words; name other columns"), ({"image": [1], "text": ["x"]}, "int64")]:
        with pytest.raises(PliError, match=words): read_pairs(parquet(tmp_path / "c.parquet", **columns))
    whole = (tmp_path / "a.parquet").read_bytes()
    for broken in (whole[:len(whole) // 2], b"PAR1", b"", b"PAR1" + b"\xff" * 200 + whole[204:]):
        (tmp_path / "d.parquet").write_bytes(broken)
        with pytest.raises(PliError, match="d.parquet: is (no Parquet file that can be read|damaged)"): read_pairs(tmp_path / "d.parquet")


def test_parquet_of_one_long_text_a_million_times_stays_small(tmp_path):
    "Read column-wise and coded: 20,000 rows of the same 100,000 letters are not 2 GB."
    import tracemalloc
    path = parquet(tmp_path / "a.parquet", filepath=["a.png"] * 20_000, title=["x" * 100_000] * 20_000)
    assert path.stat().st_size < 1e6
    tracemalloc.start()
    assert len(read_pairs(path, check=False)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e8


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(PliError, match=r'a.parquet: reading Parquet needs pyarrow: pip install "pli\[parquet\]"'): read_pairs(tmp_path / "a.parquet")


def test_missing_source_bad_limit_bad_root(tmp_path):
    with pytest.raises(PliError, match="no such file or folder"): read_pairs(tmp_path / "gone.csv")
    (tmp_path / "a.csv").write_text("filepath,title\na.png,x\n")
    with pytest.raises(PliError, match="limit"): read_pairs(tmp_path / "a.csv", limit=0)
    with pytest.raises(PliError, match="no such folder"): read_pairs(tmp_path / "a.csv", root=tmp_path / "gone")


def test_limit_and_no_check(tmp_path):
    (tmp_path / "a.csv").write_text("filepath,title\n" + "".join(f"{i}.png,picture {i}\n" for i in range(9)))
    pairs = read_pairs(tmp_path / "a.csv", check=False, limit=4)
    assert len(pairs) == 4 and pairs[3] == (tmp_path / "3.png", "picture 3") and pairs.names == ["0.png", "1.png", "2.png", "3.png"]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["a.csv", "a.tsv", "a.jsonl"]))
def test_no_bytes_crash_the_readers(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content if name == "a.jsonl" else b"filepath,title\n".replace(b",", b"\t" if name == "a.tsv" else b",") + content)
    try: pairs = read_pairs(path, check=False)
    except PliError: return
    pairs.report().encode("utf-8")
    base = os.path.join(path.parent, "")
    assert all(os.path.normpath(place).startswith(base) for place in pairs.paths)


# --- the fence

def test_paths_stay_inside(tmp_path):
    inside, outside = tmp_path / "set", tmp_path / "set-other"
    save(inside / "a.png"), save(outside / "secret.png")
    os.symlink(outside, inside / "linked"), os.symlink(outside / "secret.png", inside / "link.png"), os.symlink(inside / "a.png", inside / "fine.png")
    names = ["a.png", "sub/../a.png", str(inside / "a.png"), "fine.png",
             "../set-other/secret.png", str(outside / "secret.png"), "linked/secret.png", "link.png", "/etc/passwd", "x/../../set-other/secret.png", ".", ".."]
    (inside / "a.csv").write_text("filepath,title\n" + "".join(f"{name},x\n" for name in names))
    for check in (True, False):
        pairs = read_pairs(inside / "a.csv", check=check)
        assert pairs.names == ["a.png", "a.png", "a.png", "fine.png"]
        assert set(causes(pairs).values()) == {"outside the folder"} and len(pairs.problems) == 8


def test_another_root(tmp_path, monkeypatch):
    save(tmp_path / "pictures" / "a.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.csv").write_text(f"filepath,title\na.png,x\n{tmp_path / 'pictures' / 'a.png'},y\n../lists/a.csv,z\n")
    pairs = read_pairs(tmp_path / "lists" / "a.csv", root=tmp_path / "pictures")
    assert len(pairs) == 2 and causes(pairs) == {4: "outside the folder"}
    monkeypatch.chdir(tmp_path)
    assert read_pairs("lists/a.csv", root="pictures").paths[0] == os.path.join("pictures", "a.png")
    assert len(read_pairs("lists/a.csv", root="/")) == 1  # only the absolute one is there


# --- folders

def test_folder(tmp_path):
    save(tmp_path / "a.PNG"), save(tmp_path / "deep" / "er" / "b.jpg"), save(tmp_path / "c.png"), save(tmp_path / "d.png"), save(tmp_path / ".hidden" / "e.png")
    (tmp_path / "a.txt").write_text("red\n\n a red field \n", encoding="utf-8-sig")
    (tmp_path / "deep" / "er" / "b.TXT").write_text("deep")
    (tmp_path / "c.txt").write_text("\n \n")
    (tmp_path / "README.txt").write_text("about")
    save(tmp_path / "f.png"), (tmp_path / "f.txt").write_bytes("zwei".encode("utf-16"))
    save(tmp_path / "g.png"), (tmp_path / "g.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "h.png").touch(), (tmp_path / "h.txt").write_text("no picture at all")
    pairs = read_pairs(tmp_path)
    assert list(zip(pairs.names, pairs.captions)) == [("a.PNG", "red"), ("a.PNG", "a red field"), ("g.png", "fine"), ("deep/er/b.jpg", "deep")]
    assert sorted((Path(p.file).name, p.line, p.cause) for p in pairs.problems) == [
        ("README.txt", None, "caption without picture"), ("c.txt", None, "empty caption"), ("d.png", None, "no caption file"),
        ("f.txt", None, "wrong encoding"), ("g.txt", 2, "wrong encoding"), ("h.txt", 1, "broken picture")]


def test_folder_with_relative_path_and_links(tmp_path, monkeypatch):
    save(tmp_path / "set" / "a.png"), (tmp_path / "set" / "a.txt").write_text("red")
    save(tmp_path / "far" / "b.png"), os.symlink(tmp_path / "far", tmp_path / "set" / "far"), os.symlink(tmp_path / "far" / "b.png", tmp_path / "set" / "b.png")
    (tmp_path / "set" / "b.txt").write_text("a link")
    monkeypatch.chdir(tmp_path)
    pairs = read_pairs("set")
    assert pairs.paths == (os.path.join("set", "a.png"),) and {p.cause for p in pairs.problems} == {"linked folder", "outside the folder"}
    assert read_pairs("set", root=".").names == ["set/a.png", "set/b.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_caption_files_are_inside_the_fence_and_regular(tmp_path):
    inside = tmp_path / "set"
    for name in "abcdefgh": save(inside / f"{name}.png")
    (inside / "a.txt").write_text("fine")
    (tmp_path / "secret").write_text("root:x:0:0\n"), os.symlink(tmp_path / "secret", inside / "b.txt")
    os.mkfifo(inside / "c.txt"), os.symlink("/dev/zero", inside / "d.txt"), os.symlink("a.txt", inside / "e.txt"), os.symlink("gone", inside / "f.txt")
    with open(inside / "g.txt", "wb") as file: file.truncate(2**20 + 1)
    os.symlink("h.txt", inside / "h.txt")
    pairs = read_pairs(inside)
    assert list(zip(pairs.names, pairs.captions)) == [("a.png", "fine"), ("e.png", "fine")]
    found = {Path(problem.file).name: (problem.cause, problem.detail) for problem in pairs.problems}
    assert {name: cause for name, (cause, _) in found.items()} == {"b.txt": "outside the folder", "d.txt": "outside the folder", "c.txt": "unreadable caption file",
                                                                   "f.txt": "unreadable caption file", "g.txt": "unreadable caption file", "h.txt": "unreadable caption file"}
    for name, words in {"b.txt": "is a link out of the folder", "c.txt": "a pipe, not a file", "f.txt": "no such file", "g.txt": "more than the 1,048,576", "h.txt": "links"}.items():
        assert words in found[name][1], found[name]
    assert "--root / root=" in found["b.txt"][1] and "root:x" not in pairs.report()
    (inside / "far").mkdir(), save(inside / "far" / "i.png"), os.symlink("/dev/zero", inside / "far" / "i.txt")
    assert "a device, not a file" in str(read_pairs(inside, root="/").problems)                     # allowed to lead there, and still no file


def test_links_that_the_user_named_are_followed(tmp_path, monkeypatch):
    save(tmp_path / "store" / "x" / "a.png"), (tmp_path / "store" / "x" / "a.txt").write_text("red")
    (tmp_path / "set").mkdir(), os.symlink(tmp_path / "store", tmp_path / "set" / "images"), os.symlink(tmp_path / "store", tmp_path / "link")
    (tmp_path / "set" / "a.csv").write_text("filepath,title\nimages/x/a.png,red\n")
    (tmp_path / "b.csv").write_text("filepath,title\nx/a.png,red\n")
    assert read_pairs(tmp_path / "link").captions == read_pairs(tmp_path / "b.csv", root=tmp_path / "link").captions == ("red",)
    with pytest.raises(PliError, match=r"images/x/a.png is a link out of the folder .*set, to .*store/x/a.png; name the folder that holds it with --root"): read_pairs(tmp_path / "set" / "a.csv")
    both = f"{tmp_path / 'set'}{os.pathsep}{tmp_path / 'store'}"
    assert read_pairs(tmp_path / "set" / "a.csv", root=both).names == ["images/x/a.png"]
    assert read_pairs(tmp_path / "set", root=both).names == ["images/x/a.png"]                      # a folder that is a link is walked through, too
    with pytest.raises(PliError, match="linked folder: 1"): read_pairs(tmp_path / "set")
    with pytest.raises(PliError, match="root .*gone: no such folder"): read_pairs(tmp_path / "set" / "a.csv", root=f"{tmp_path}{os.pathsep}{tmp_path / 'gone'}")
    (tmp_path / "c:d").mkdir(), save(tmp_path / "c:d" / "x" / "a.png")
    assert len(read_pairs(tmp_path / "b.csv", root=tmp_path / "c:d")) == 1                          # a folder whose name holds a colon


def test_loops_of_links_are_said(tmp_path):
    save(tmp_path / "set" / "a.png"), (tmp_path / "set" / "a.txt").write_text("red"), (tmp_path / "set" / "deep").mkdir()
    os.symlink(tmp_path / "set", tmp_path / "set" / "deep" / "up"), os.symlink("deep", tmp_path / "set" / "again"), os.symlink("round.png", tmp_path / "set" / "round.png")
    (tmp_path / "set" / "round.txt").write_text("a link to itself")
    pairs = read_pairs(tmp_path / "set")
    assert pairs.captions == ("red",)
    linked = [problem.detail for problem in pairs.problems if problem.cause == "linked folder"]
    assert len(linked) == 2 and all("read anyway or goes round in a circle" in detail for detail in linked)
    assert any("links" in problem.detail for problem in pairs.problems if problem.cause == "broken picture")
    os.symlink(tmp_path, tmp_path / "set" / "out"), os.symlink(tmp_path / "set", tmp_path / "set" / "self")
    assert len(read_pairs(tmp_path / "set", root=f"{tmp_path / 'set'}{os.pathsep}{tmp_path}")) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything is readable here")
def test_a_folder_that_may_not_be_read_is_said(tmp_path):
    save(tmp_path / "a.png"), (tmp_path / "a.txt").write_text("red"), (tmp_path / "shut").mkdir(0o000)
    assert [problem.cause for problem in read_pairs(tmp_path).problems] == ["unreadable folder"]


@pytest.mark.skipif(os.name == "nt", reason="a backslash separates folders here")
def test_names_in_other_spellings_are_found_and_counted(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    save(tmp_path / "sub" / "a.png"), save(tmp_path / f"{decomposed}.png", (0, 0, 200)), save(tmp_path / "b" / f"{composed}.png"), save(tmp_path / "x\\y.png")
    names = ["sub\\a.png", f"{composed}.png", f"b/{decomposed}.png", f"b\\{decomposed}.png", "x\\y.png", f"{decomposed}.png", "sub\\gone.png", "..\\..\\out.png", "sub/a.png"]
    (tmp_path / "a.csv").write_text("filepath,title\n" + "".join(f"{name},x\n" for name in names), encoding="utf-8")
    for check in (True, False):
        pairs = read_pairs(tmp_path / "a.csv", check=check)
        assert pairs.names[:6] == ["sub/a.png", f"{decomposed}.png", f"b/{composed}.png", f"b/{composed}.png", "x\\y.png", f"{decomposed}.png"]
        assert causes(pairs) == ({8: "missing picture", 9: "outside the folder"} if check else {9: "outside the folder"})
        assert pairs.notes[0].startswith("4 names were found under another spelling") and "note: 4 names" in pairs.report()
    save(tmp_path / f"{composed}.png", (200, 0, 0))                              # both are there: the exact name counts
    found = read_pairs(tmp_path / "a.csv").paths
    assert open_picture(found[1]).getpixel((0, 0))[0] > 150 and open_picture(found[5]).getpixel((0, 0))[2] > 150


def test_a_raw_file_with_a_caption_is_told_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("pli.data.decoders.has_extra", lambda name: False)
    save(tmp_path / "a.png"), (tmp_path / "a.txt").write_text("red")
    for name in ("b.nef", "c.heic", "d.pdf", "e.pdf"): (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" if name == "c.heic" else b"%PDF-1.4")
    for name in "bcd": (tmp_path / f"{name}.txt").write_text("meant to be read")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 1 and {Path(problem.file).name: problem.cause for problem in pairs.problems} == {f"{name}.txt": "unsupported picture" for name in "bcd"}


def test_folder_without_captions_points_to_its_table(tmp_path):
    save(tmp_path / "images" / "a.png")
    (tmp_path / "pairs.csv").write_text("filepath,title\nimages/a.png,x\n")
    with pytest.raises(PliError, match="no caption file: 1.*There is pairs.csv"): read_pairs(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PliError, match="nothing of the kind"): read_pairs(tmp_path / "empty")


def test_no_bar_in_a_pipe(tmp_path, capsys):
    save(tmp_path / "a.png"), (tmp_path / "a.txt").write_text("red")
    read_pairs(tmp_path)
    assert capsys.readouterr() == ("", "")


# --- splits

def listed(count: int, captions: int = 2, root="r") -> Pairs:
    return Pairs(tuple(f"{root}/{i % count}.png" for i in range(count * captions)), tuple(f"caption {i}" for i in range(count * captions)), Path(root))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 3))
def test_split_is_by_picture(count, share, seed):
    pairs = listed(count)
    train, held = split_pairs(pairs, share, seed)
    assert not set(train.paths) & set(held.paths) and len(train) + len(held) == len(pairs) and len(train) and len(held)
    assert sorted(train.captions + held.captions) == sorted(pairs.captions)


def test_split_depends_on_names_only():
    _, held = split_pairs(listed(50), 0.2)
    assert len(set(held.paths)) == 10
    backwards = listed(50).take(range(99, -1, -1))
    assert set(split_pairs(backwards, 0.2)[1].paths) == set(held.paths)
    assert split_pairs(listed(50, root="elsewhere"), 0.2)[1].names == held.names
    assert set(split_pairs(listed(50), 0.2, seed=1)[1].paths) != set(held.paths)


def test_split_refuses_what_cannot_be_split():
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(PliError, match="held_out"): split_pairs(listed(5), share)
    with pytest.raises(PliError, match="at least 2 pictures"): split_pairs(listed(1))


def test_pairs_of_unequal_length():
    with pytest.raises(PliError, match="1 paths, but 2 captions"): Pairs(("a",), ("b", "c"), Path("."))


# --- items, batches, order

@pytest.fixture
def mixed(tmp_path) -> Pairs:
    for i in range(6): save(tmp_path / f"{i}.jpg", (40 * i, 0, 0), size=(40, 30))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)  # long enough to be cut after the header
    Image.fromarray(noise).save(tmp_path / "3.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:-1000])
    (tmp_path / "a.csv").write_text("filepath,title\n" + "".join(f"{i}.jpg,picture {i}\n" for i in range(6)))
    return read_pairs(tmp_path / "a.csv")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_does_not_end_the_run(mixed, workers):
    data = PairSet(mixed, pixels)
    loader = DataLoader(data, batch_sampler=ResumableBatchSampler(len(data), 3, steps=4), collate_fn=collate, num_workers=workers)
    batches = list(loader)
    assert len(batches) == 4 and all(isinstance(batch, Batch) for batch in batches)
    failed = [failure for batch in batches for failure in batch.failed]
    assert [Path(path).name for path, _ in failed] == ["3.jpg"] * 2 and "broken picture" in failed[0][1]
    for batch in batches:
        assert len(batch.indices) == len(batch.captions) == len(batch.pixels) == 3 - len(batch.failed)
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape[1:] == (3, 8, 8)
        assert batch.captions == [f"picture {i}" for i in batch.indices]
        assert all(abs(int(p[0].float().mean()) - 40 * i) < 6 for i, p in zip(batch.indices, batch.pixels))


def test_items(mixed):
    data = pickle.loads(pickle.dumps(PairSet(mixed, pixels)))
    index, tensor, caption = data[1]
    assert (index, tensor.shape, tensor.dtype, caption) == (1, (3, 8, 8), torch.uint8, "picture 1")
    index, tensor, reason = pickle.loads(pickle.dumps(data[3]))
    assert index == 3 and tensor is None and "3.jpg: broken picture" in reason and reason.path.endswith("3.jpg")


def test_a_bug_in_pixels_fn_is_not_hidden(mixed):
    with pytest.raises(ZeroDivisionError): PairSet(mixed, lambda picture: 1 / 0)[0]


def test_collate_with_nothing_left_and_with_different_sizes():
    batch = collate([(4, None, "a.jpg: broken")])
    assert batch.indices == [] and batch.captions == [] and batch.pixels.shape == (0, 3, 0, 0) and batch.failed == [("", "a.jpg: broken")]
    items = [(0, torch.zeros(3, 8, 8, dtype=torch.uint8), "a"), (1, torch.zeros(3, 9, 8, dtype=torch.uint8), "b")]
    with pytest.raises(PliError, match="different sizes"): collate(items)


def test_tensor_pairs():
    drawn = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).reshape(5, 3, 4, 4)
    data = TensorPairs(drawn, list("abcde"))
    batch = collate([data[i] for i in (3, 0)])
    assert batch.indices == [3, 0] and batch.captions == ["d", "a"] and torch.equal(batch.pixels, drawn[[3, 0]]) and batch.failed == []
    with pytest.raises(PliError, match="uint8"): TensorPairs(drawn.float(), list("abcde"))
    with pytest.raises(PliError, match="captions"): TensorPairs(drawn, list("abc"))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(0, 30), st.integers(0, 20))
def test_order_is_the_same_after_a_restart(count, batch_size, seed, first, steps):
    if count < batch_size:
        with pytest.raises(PliError, match="batch size"): ResumableBatchSampler(count, batch_size)
        return
    whole = list(ResumableBatchSampler(count, batch_size, seed, 0, first + steps))
    order = ResumableBatchSampler(count, batch_size, seed, first, steps)
    assert len(order) == steps and list(order) == whole[first:] == list(order)
    k = count // batch_size
    for epoch in range(len(whole) // k):
        seen = sum(whole[epoch * k:(epoch + 1) * k], [])
        assert len(seen) == len(set(seen)) == k * batch_size and set(seen) <= set(range(count))


def test_order_arguments():
    assert list(ResumableBatchSampler(8, 4, seed=1, steps=2)) != list(ResumableBatchSampler(8, 4, seed=2, steps=2))
    endless = iter(ResumableBatchSampler(8, 4))
    assert [len(next(endless)) for _ in range(20)] == [4] * 20
    with pytest.raises(TypeError): len(ResumableBatchSampler(8, 4))
    for arguments in [(8, 0), (0, 1), (8, 4, 0, -1), (8, 4, 0, 0, -1)]:
        with pytest.raises(PliError): ResumableBatchSampler(*arguments)


# --- partners in a batch

@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(2, 30), st.integers(0, 3), st.integers(0, 12))
def test_partners_never_brings_a_picture_twice(data, count, seed, first):
    "Whatever the partners are, oneself and twins included: full batches, no picture twice, the same after a restart."
    pictures = data.draw(st.lists(st.integers(0, count), min_size=count, max_size=count))
    partners = data.draw(st.lists(st.lists(st.integers(0, count - 1), max_size=4), min_size=count, max_size=count))
    batch_size = data.draw(st.integers(1, len(set(pictures))))
    beside = BatchPartners(pictures, partners)
    whole = list(ResumableBatchSampler(count, batch_size, seed, 0, first + 6, beside))
    assert list(ResumableBatchSampler(count, batch_size, seed, first, 6, beside)) == whole[first:]
    for batch in whole: assert len(batch) == batch_size == len({pictures[pair] for pair in batch}) and set(batch) <= set(range(count))


def test_half_of_a_batch_are_partners():
    "Everybody has one, nobody shares one: each batch is whole couples."
    beside = BatchPartners(list(range(40)), [(pair ^ 1,) for pair in range(40)])
    for size, couples in ((8, 4), (2, 1), (9, 4)):
        for batch in ResumableBatchSampler(40, size, seed=3, steps=30, partners=beside):
            met = sum(pair ^ 1 in batch for pair in batch) // 2
            assert met >= couples - 2 if size > 2 else met == 1      # two who were drawn may be a couple already
    order = ResumableBatchSampler(40, 8, steps=10, partners=beside)
    drawn = [pair for batch in order for pair in batch[:4]]
    assert len(drawn) == 40 and len(set(drawn)) > 30                 # an epoch's order leads the batches


def test_any_partner_is_drawn_evenly():
    beside = BatchPartners(list(range(10)), [tuple(other for other in range(10) if other != pair) for pair in range(10)])
    seen = [batch[1] for batch in ResumableBatchSampler(10, 2, steps=2000, partners=beside)]
    assert min(seen.count(pair) for pair in range(10)) > 120


def test_too_few_pictures_for_partners():
    beside = BatchPartners([0, 0, 1, 1], [()] * 4)
    with pytest.raises(PliError, match="2 pictures do not fill a batch of 3"): ResumableBatchSampler(4, 3, partners=beside)
    assert all(len(batch) == 2 for batch in ResumableBatchSampler(4, 2, steps=5, partners=beside))


def test_pairs_know_their_pictures():
    drawn = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    drawn[1] = 7; drawn[3] = 7
    assert TensorPairs(drawn, list("abcd")).pictures() == [0, 1, 0, 1]
    pairs = Pairs(("/x/a.png", "/x/b.png", "/x/a.png"), ("one", "two", "three"), Path("/x"))
    assert PairSet(pairs, None).pictures() == [0, 1, 0] and PairSet(pairs, None).captions == ("one", "two", "three")


# --- real data, where it is there

def test_real_shop_pairs(shared):
    pairs = read_pairs(shared / "data" / "shop" / "pairs.csv", limit=2000)
    assert len(pairs) == 2000 and not pairs.problems
    batch = collate([PairSet(pairs, pixels)[i] for i in range(50)])
    assert len(batch.indices) == 50 and not batch.failed


def test_real_emoji_are_on_white(shared):
    pairs = read_pairs(shared / "data" / "emoji" / "pairs.csv")
    assert len(pairs) == 4904 and len(set(pairs.paths)) == 3274
    corners = [open_picture(pairs.paths[i]).getpixel((0, 0)) for i in range(0, 4904, 100)]
    assert sum(corner == (255, 255, 255) for corner in corners) > 40
    train, held = split_pairs(pairs)
    assert not set(train.paths) & set(held.paths)


def test_real_folder_without_captions(shared):
    with pytest.raises(PliError, match="no caption file: 713"): read_pairs(shared / "data" / "clothing")
    for path in sorted((shared / "data" / "clothing").rglob("*.jpg"))[:10]: assert open_picture(path).mode == "RGB"


# ---- what only looks like words, and files that only look small

@pytest.mark.parametrize("caption", ["\u200b\u200b", "\u3164", "\ufeff", "\u2800", "\u00ad\u2063", "\u202e\u202c", "\x00"])
def test_a_caption_that_nobody_sees_is_empty(tmp_path, caption):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"filepath": "a.png", "title": said} for said in (caption, f"x{caption}", "\U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "?")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert list(pairs.captions) == [line["title"] for line in lines[1:]] and [problem.cause for problem in pairs.problems] == ["empty caption"]


def test_a_second_caption_file_is_told(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.TXT", "a.txt"): (tmp_path / name).write_text(name)
    if len(list(tmp_path.iterdir())) < 3: pytest.skip("this file system knows no difference between A and a")
    pairs = read_pairs(tmp_path)
    assert pairs.captions == ("a.TXT",) and [(problem.cause, Path(problem.file).name) for problem in pairs.problems] == [("second caption file", "a.txt")]


def test_an_entry_that_is_there_twice_in_a_line_is_a_problem(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"filepath": "a.png", "title": "one", "title": "two"}\n{"filepath": "a.png", "title": "three"}\n')
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert pairs.captions == ("three",) and "the entry 'title' is there twice" in str(pairs.problems[0])


@pytest.mark.parametrize("packed", [True, False])
def test_lines_without_end_and_without_number_are_bounded(tmp_path, monkeypatch, packed):
    "A packed megabyte can hold a thousand million lines, each of which is an object in memory."
    monkeypatch.setattr("pli.data.tables._MOST_LINES", 1000)
    monkeypatch.setattr("pli.data.tables._LINE_CHARACTERS", 500)
    path = tmp_path / ("pairs.csv.gz" if packed else "pairs.csv")
    for body, words in (("\n" * 999, None), ("\n" * 1000, "more than 1,000 lines"), ("x" * 499 + "\n", None), ("x" * 501, "line 2 has more than 500 characters")):
        raw = b"filepath,title\n" + body.encode()
        path.write_bytes(gzip.compress(raw) if packed else raw)
        if words is None: assert "".join(text_lines(path)).encode() == raw
        else:
            with pytest.raises(PliError, match=words): text_lines(path)


# --- a kind of source of one's own

def read_lists(path, image_key=None, caption_key=None, inside=None):
    for file in sorted(path.glob("*.list")) if path.is_dir() else [path]:
        for line, text in enumerate(text_lines(file), 1):
            name, _, caption = text.strip().partition(" ")
            yield Record(str(file), line, name, caption) if caption else SkippedRecord(str(file), line, "no caption", "a name alone")


@pytest.fixture
def lists(tmp_path):
    for name in ("a.png", "b.png"): Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "mine.list").write_text("a.png a cup\nb.png\n../c.png a fork\n")
    return tmp_path / "mine.list"


def check_lists(source):
    pairs = read_pairs(source)
    assert pairs.names == ["a.png"] and pairs.captions == ("a cup",)
    assert [problem.cause for problem in pairs.problems] == ["no caption", "outside the folder"]


def test_a_source_is_added_by_one_object_and_one_name(lists, monkeypatch):
    with pytest.raises(PliError, match="pairs are read from .csv, .tsv, .jsonl, .ndjson, .parquet files"): read_pairs(lists)
    monkeypatch.setitem(PAIR_READERS, ".list", PairReader(read_lists, lambda path: path.suffix == ".list", "a name and a caption a line"))
    check_lists(lists)
    lists.write_text("b.png\n")
    with pytest.raises(PliError, match="Expected a name and a caption a line, found no caption: 1"): read_pairs(lists)


def test_a_kind_of_folder_goes_before_plain_folders_and_a_package_may_bring_it(lists, monkeypatch):
    site = lists.parent / "site"
    (site / "lists-1.0.dist-info").mkdir(parents=True)
    (site / "lists-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lists\nVersion: 1.0\n")
    (site / "lists-1.0.dist-info" / "entry_points.txt").write_text("[pli.pairs]\nlists = somebodys_lists:reader\n")
    (site / "somebodys_lists.py").write_text("from pli.data.tables import PairReader\nfrom test_data import read_lists\n"
                                             "reader = PairReader(read_lists, lambda path: any(path.glob('*.list')))\n")
    with pytest.raises(PliError, match="no usable pair"): read_pairs(lists.parent)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    check_lists(lists.parent)

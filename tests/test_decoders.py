"HEIC and camera raw: read in another process, which may die without taking this one along."
import io
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, features

from pli.data import decoders
from pli.backbones.loading import load_backbone
from pli.data.pictures import PictureError, open_header, open_picture
from pli.gallery.index import update
from pli.gallery.store import PictureTable

heic = pytest.mark.skipif(not decoders.has_extra("heic"), reason='needs pip install "pli[heic]"')
raw = pytest.mark.skipif(not decoders.has_extra("raw"), reason='needs pip install "pli[raw]"')


def dng(width: int, height: int, preview: bytes | None = None, side: tuple[int, int] = (0, 0), turn: int = 1, claimed: tuple[int, int] | None = None) -> bytes:
    "A camera's raw file as small as one can be: one mosaic of 16 bits and, in an IFD of its own, a JPEG preview."
    mosaic = np.linspace(0, 60000, width * height).astype("<u2").tobytes()
    said = claimed or (width, height)
    rational = lambda values: ("r", [part for value in values for part in (round(value * 10000), 10000)])
    first = {254: ("I", [0]), 256: ("I", [said[0]]), 257: ("I", [said[1]]), 258: ("H", [16]), 259: ("H", [1]), 262: ("H", [32803]), 271: ("s", b"Pli\0"), 272: ("s", b"Drawn\0"), 273: ("I", ["mosaic"]), 274: ("H", [turn]), 277: ("H", [1]),
             278: ("I", [said[1]]), 279: ("I", [len(mosaic)]), 306: ("s", b"2024:05:01 12:30:00\0"), 33421: ("H", [2, 2]), 33422: ("B", [0, 1, 1, 2]), 50706: ("B", [1, 4, 0, 0]), 50708: ("s", b"Pli Drawn\0"),
             50717: ("I", [65535]), 50721: rational([1, 0, 0, 0, 1, 0, 0, 0, 1]), 50728: rational([1, 1, 1])}
    second = {254: ("I", [1]), 256: ("I", [side[0]]), 257: ("I", [side[1]]), 258: ("H", [8, 8, 8]), 259: ("H", [7]), 262: ("H", [6]), 273: ("I", ["preview"]), 277: ("H", [3]), 278: ("I", [side[1]]), 279: ("I", [len(preview or b"")])}
    if preview: first[330] = ("I", ["second"])
    kinds = {"B": (1, "B"), "s": (2, "s"), "H": (3, "H"), "I": (4, "I"), "r": (10, "i")}
    places = {"mosaic": 0, "preview": 0, "second": 0}
    for _ in range(2):                                    # once to measure, once to write
        out = bytearray(b"II*\0\x08\0\0\0")
        for name, table in (("first", first), ("second", second)) if preview else (("first", first),):
            places[name] = len(out)
            entries, far, after = b"", b"", len(out) + 2 + 12 * len(table) + 4
            for tag, (kind, values) in sorted(table.items()):
                number, code = kinds[kind]
                data = values if kind == "s" else struct.pack(f"<{len(values)}{code}", *(places.get(value, value) for value in values))
                count = len(data) if kind == "s" else len(values) // (2 if kind == "r" else 1)
                if len(data) > 4:
                    entries += struct.pack("<HHII", tag, number, count, after + len(far))
                    far += data + b"\0" * (len(data) % 2)
                else: entries += struct.pack("<HHI", tag, number, count) + data.ljust(4, b"\0")
            out += struct.pack("<H", len(table)) + entries + b"\0\0\0\0" + far
        for name, data in (("mosaic", mosaic), ("preview", preview or b"")):
            places[name] = len(out)
            out += data
    return bytes(out)


def scene(width: int = 640, height: int = 480) -> Image.Image:
    "Red on the left, blue on the right."
    picture = Image.new("RGB", (width, height), "blue")
    picture.paste((255, 0, 0), (0, 0, width // 2, height))
    return picture


def heic_bytes(picture: Image.Image, turn: int = 1, **options) -> bytes:
    import pillow_heif
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x0132] = turn, "2024:05:01 12:30:00"
    made = pillow_heif.from_pillow(picture)
    made.save(file, exif=exif.tobytes(), **options)
    return file.getvalue()


def jpeg_bytes(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file.getvalue()


def is_red(picture: Image.Image, place: tuple[float, float]) -> bool:
    red, _, blue = picture.getpixel((int(place[0] * picture.width), int(place[1] * picture.height)))
    return red > 200 and blue < 60


@heic
@pytest.mark.parametrize("turn, size, red", [(1, (64, 48), (0.2, 0.5)), (6, (48, 64), (0.5, 0.2)), (3, (64, 48), (0.8, 0.5)), (8, (48, 64), (0.5, 0.8))])
def test_a_heic_picture_is_upright(tmp_path, turn, size, red):
    (tmp_path / "a.heic").write_bytes(heic_bytes(scene(64, 48), turn))
    picture = open_picture(tmp_path / "a.heic")
    assert picture.mode == "RGB" and picture.size == size and is_red(picture, red) and not is_red(picture, (1 - red[0], 1 - red[1]))
    with open_header(tmp_path / "a.heic") as header: assert header.size == size and header.getexif()[0x0132] == "2024:05:01 12:30:00"


@heic
def test_a_transparent_heic_picture_lies_on_white_and_its_name_does_not_matter(tmp_path):
    (tmp_path / "a.jpg").write_bytes(heic_bytes(Image.new("RGBA", (40, 30), (255, 0, 0, 0))))
    assert min(open_picture(tmp_path / "a.jpg").getpixel((20, 15))) > 250


@heic
def test_a_large_heic_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(heic_bytes(scene(64, 48)))
    monkeypatch.setattr("pli.data.pictures.MOST_PIXELS", 3000)
    with pytest.raises(PictureError, match="64 x 48"): open_picture(tmp_path / "a.heic")
    about, _, body = decoders._ask("heic", (tmp_path / "a.heic").read_bytes(), True, 3000)
    assert about["size"] == [64, 48] and body == b""


@raw
@pytest.mark.parametrize("turn, size, red", [(1, (640, 480), (0.2, 0.5)), (6, (480, 640), (0.5, 0.2)), (3, (640, 480), (0.8, 0.5)), (8, (480, 640), (0.5, 0.8))])
def test_the_preview_of_a_raw_file_is_upright(tmp_path, turn, size, red):
    (tmp_path / "a.dng").write_bytes(dng(64, 48, jpeg_bytes(scene()), (640, 480), turn))
    picture = open_picture(tmp_path / "a.dng")
    assert picture.mode == "RGB" and picture.size == size and is_red(picture, red) and not is_red(picture, (1 - red[0], 1 - red[1]))
    with open_header(tmp_path / "a.dng") as header: assert header.getexif()[0x0132] == "2024:05:01 12:30:00"


@raw
def test_a_raw_file_without_a_preview_or_with_a_tiny_one_is_developed(tmp_path):
    for name, made in (("none", dng(640, 480)), ("tiny", dng(640, 480, jpeg_bytes(scene(160, 120)), (160, 120)))):
        (tmp_path / f"{name}.dng").write_bytes(made)
        picture = open_picture(tmp_path / f"{name}.dng")
        assert picture.size == (320, 240) and sum(picture.getpixel((10, 5))) < sum(picture.getpixel((300, 230)))       # the mosaic grows brighter


@raw
def test_a_raw_file_that_claims_to_be_huge_is_refused(tmp_path):
    (tmp_path / "a.dng").write_bytes(dng(64, 48, claimed=(60000, 60000)))
    with pytest.raises(PictureError, match="a camera's raw file"): open_picture(tmp_path / "a.dng")


@pytest.mark.parametrize("kind", [pytest.param("heic", marks=heic), pytest.param("raw", marks=raw)])
def test_damaged_files_are_named_and_nothing_dies(tmp_path, kind):
    "Bytes turned over at 40 places each, and files cut off: a picture or a `PictureError`, never anything else."
    good = heic_bytes(scene(64, 48)) if kind == "heic" else dng(64, 48, jpeg_bytes(scene()), (640, 480))
    dice, path = np.random.default_rng(0), tmp_path / ("a.heic" if kind == "heic" else "a.dng")
    outcomes = {"read": 0, "refused": 0}
    for round in range(24):
        bad = bytearray(good[: int(dice.integers(20, len(good)))] if round % 3 == 0 else good)
        for place in dice.integers(0, min(len(bad), 2000), 8 if round % 3 else 0): bad[place] = int(dice.integers(0, 256))
        path.write_bytes(bad)
        try: outcomes["read"] += open_picture(path).mode == "RGB"
        except PictureError as error:
            outcomes["refused"] += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert sum(outcomes.values()) == 24 and outcomes["refused"] > 4
    path.write_bytes(good)
    assert open_picture(path).mode == "RGB"


CRASH = """
import os, sys, json
line = sys.stdin.buffer.readline()
sys.stdin.buffer.read(json.loads(line)["bytes"])
{deed}
"""


@heic
@pytest.mark.parametrize("deed, words", [("os.kill(os.getpid(), 11)", "crashed (signal 11)"), ("import time; time.sleep(60)", "needs more than"), ("print('{', flush=True)", "crashed"), ("os._exit(3)", "crashed")])
def test_a_decoder_that_dies_costs_one_picture(tmp_path, monkeypatch, deed, words):
    "A real process that dies, hangs or talks nonsense in the decoder's place."
    (tmp_path / "a.heic").write_bytes(heic_bytes(scene(64, 48)))
    decoders._stop()
    monkeypatch.setattr(decoders, "DECODE_SECONDS", 3)
    odd = subprocess.Popen([sys.executable, "-c", CRASH.format(deed=deed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    monkeypatch.setattr(decoders, "_server", (os.getpid(), odd))
    with pytest.raises(PictureError) as caught: open_picture(tmp_path / "a.heic")
    assert words in str(caught.value) and "a.heic" in str(caught.value)
    monkeypatch.setattr(decoders, "DECODE_SECONDS", 60)
    assert open_picture(tmp_path / "a.heic").size == (64, 48)                    # by a new one


@heic
def test_an_index_lives_on_when_the_decoder_is_killed(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3): (folder / f"{number}.heic").write_bytes(heic_bytes(scene(60 + number, 48)))
    assert decoders._ask("heic", (folder / "0.heic").read_bytes(), False, 10**6)[0]["size"] == [60, 48]
    os.kill(decoders._server[1].pid, signal.SIGKILL)
    decoders._server[1].wait()
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table: assert update(table, folder, load_backbone("pli-tiny-48"), workers=2).encoded == 3


@heic
@raw
def test_what_an_extra_would_read_is_left_out_by_name_until_it_is_there(tmp_path, monkeypatch):
    folder, backbone = tmp_path / "photos", load_backbone("pli-tiny-48")
    folder.mkdir()
    (folder / "a.heic").write_bytes(heic_bytes(scene(64, 48)))
    (folder / "b.dng").write_bytes(dng(64, 48, jpeg_bytes(scene()), (640, 480)))
    scene(64, 48).save(folder / "c.png")
    honest = decoders.has_extra
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        for module in ("pli.data.decoders", "pli.gallery.index"): monkeypatch.setattr(f"{module}.has_extra", lambda name: False)
        changes = update(table, folder, backbone)
        told = "\n".join(changes.lines())
        assert changes.encoded == 1 and '1 HEIC picture was left out: pip install "pli[heic]"' in told and '1 raw file of a camera was left out: pip install "pli[raw]"' in told
        assert "cannot be read" not in told
        assert update(table, folder, backbone).encoded == 0
        for module in ("pli.data.decoders", "pli.gallery.index"): monkeypatch.setattr(f"{module}.has_extra", honest)
        assert update(table, folder, backbone).encoded == 2
        assert {found.path: found.taken for found in table.select()} == {"a.heic": "2024-05-01T12:30:00", "b.dng": "2024-05-01T12:30:00", "c.png": None}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_by_pillow_itself(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(64, 48).save(tmp_path / "a.avif", exif=exif)
    picture = open_picture(tmp_path / "a.avif")
    assert picture.size == (48, 64) and is_red(picture, (0.5, 0.2))


def test_importing_registers_nothing():
    done = subprocess.run([sys.executable, "-c", "import sys; from PIL import Image; import pli.data.decoders; print('HEIF' in Image.OPEN, 'pillow_heif' in sys.modules, 'rawpy' in sys.modules, 'torch' in sys.modules)"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(decoders.__file__))})
    assert done.stdout.split() == ["False"] * 4, done.stderr

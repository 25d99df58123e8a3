#!/usr/bin/env python3
"""The strip of pictures in README: one query, and what a model finds before and after tuning. Runs what `pli demo` prints last.

pli demo                               train, tune and leave pictures, start and model in pli-demo/ (some minutes)
python tools/strip.py pli-demo         write results/strip.png and results/strip.json
"""
import argparse
import contextlib
import io
import json
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from pli.cli.main import main as pli
from pli.core import rng_for, provenance, write_json
from pli.demo import DemoSettings
from pli.world import make_queries

ROOT = Path(__file__).resolve().parents[1]
SHOWN, SIDE, GAP, TOP = 6, 112, 14, 42        # pictures in a row; pixels of one, between two, above a row
INK, FAINT, RIGHT = "#2b2b2b", "#767676", "#00805c"


def first_query(settings: DemoSettings) -> tuple[int, str, list[int]]:
    "The first test query of the demo that changes one thing and keeps all else, not a chosen one: reference, words, right answers."
    drawn = make_queries(settings.queries, settings.gallery, rng_for(settings.seed, "test"))
    row = list(drawn.kinds).index("keep")
    texts, answers = drawn.texts[row], drawn.answers[row]
    return int(drawn.references[row]), texts if isinstance(texts, str) else texts[0], [int(answer) for answer in answers]


def search(demo: Path, model: str, words: str, picture: Path, count: int) -> list[str]:
    "Names of what `pli search` lists, best first."
    listed = io.StringIO()
    with contextlib.redirect_stdout(listed):
        if pli(["search", str(demo / "pictures"), words, "--image", str(picture), "--model", str(demo / model), "--k", str(count), "--json"]):
            raise SystemExit("pli search failed")
    return [hit["path"] for hit in json.loads(listed.getvalue())]


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: str = INK, anchor: str = "la") -> None:
    name = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    draw.text(place, text, ink, ImageFont.truetype(str(name), size), anchor=anchor)


def picture(sheet: Image.Image, file: Path, x: int, y: int, frame: str | None = None) -> None:
    sheet.paste(Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
    if frame: ImageDraw.Draw(sheet).rectangle((x - 5, y - 5, x + SIDE + 4, y + SIDE + 4), outline=frame, width=5)


def strip(demo: Path, record: dict) -> Image.Image:
    "Left the query, beside it a row for each model; the right answer is framed, and ticked for those who see no colours."
    left, height = SIDE + 96, TOP + SIDE + GAP
    sheet = Image.new("RGB", (left + SHOWN * (SIDE + GAP) + 6, 2 * height + 12), "white")
    draw, middle = ImageDraw.Draw(sheet), height - SIDE // 2
    write(draw, (12 + SIDE // 2, middle - 8), "the query", 27, FAINT, "md")
    picture(sheet, demo / "pictures" / record["reference"], 12, middle)
    write(draw, (12 + SIDE // 2, middle + SIDE + 32), f"+ “{record['words']}”", 32, anchor="mm")
    write(draw, (SIDE + 50, height + 6), "→", 48, FAINT, "mm")
    for row, (model, label) in enumerate((("start", "before tuning"), ("model", "after tuning"))):
        y = row * height + TOP + 4
        write(draw, (left, y - 10), label, 28, FAINT, "ld")
        for number, name in enumerate(record["found"][model][:SHOWN]):
            x, right = left + number * (SIDE + GAP), name in record["right"]
            picture(sheet, demo / "pictures" / name, x, y, RIGHT if right else None)
            if right: write(draw, (x + 4, y + 2), "✓", 30, RIGHT)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that pli demo wrote")
    demo, settings = parser.parse_args().demo, DemoSettings()
    about = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    if about["settings"]["seed"] != settings.seed or about["settings"]["gallery"] != settings.gallery:
        raise SystemExit(f"{demo} holds another demo: run pli demo without options")
    reference, words, right = first_query(settings)
    named = lambda number: f"{number:04d}.png"
    record = {"provenance": provenance("pli demo && python tools/strip.py pli-demo", settings.seed, torch.device("cpu")), "demo": about["provenance"]["date"],
              "reference": named(reference), "words": words, "right": [named(number) for number in right], "gallery": settings.gallery, "found": {}, "place": {}}
    for model in ("start", "model"):
        found = search(demo, model, words, demo / "pictures" / named(reference), settings.gallery)
        record["place"][model] = 1 + min(map(found.index, record["right"]))
        record["found"][model] = found[:SHOWN]
    image = strip(demo, record)
    image.quantize(64, dither=Image.Dither.NONE).save(ROOT / "results" / "strip.png", optimize=True)
    write_json(ROOT / "results" / "strip.json", record)
    print(f"results/strip.png: “{words}” finds the right answer at place {record['place']['start']:,} before tuning, {record['place']['model']:,} after")


if __name__ == "__main__": main()

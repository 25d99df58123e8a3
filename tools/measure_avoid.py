"""Measure words to avoid: which formula, how strong, on queries whose right answers are known.

    pli demo --out demo
    pli tune SHOP/pairs.csv --model SHOP/base --hide recolour+random:0.5 --steps 120 --batch-size 128 --learning-rate 3e-4 --warmup 20 --out tuned
    python tools/measure_avoid.py --demo demo --shop SHOP --tuned tuned/last --out results/avoid.json

Formula and strength are chosen on every other query and reported on the rest. What is avoided is what a person would see and not want: the value of an attribute
(a colour, a pattern, a wearer) that is most frequent among the first ten hits of the same search without it. A hit counts nothing where it shows that; else it counts
the share of what was asked for that it has. The figure is the mean over the first ten hits, in percent of what the best ten pictures would get.
"""
import argparse
import csv
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pli import world
from pli.backbones.loading import load_backbone
from pli.composition import Sum
from pli.core import PliError, rng_for, provenance, read_json, unit, write_json
from pli.demo import WORLDS, DemoSettings
from pli.gallery.encode import FeatureCache, encode_files, encode_pictures, encode_texts, top_k
from pli.gallery.ranking import everyday_mean
from pli.metrics import bootstrap, paired_bootstrap

FIRST, QUERIES = 10, 200
COLOURS = ("black", "white", "blue", "red", "green", "grey", "brown", "pink", "purple", "yellow", "navy", "beige", "orange", "maroon", "silver", "gold")
WEARERS = ("men", "women", "boys", "girls")
THINGS = ("shirt", "t-shirt", "shoes", "handbag", "watch", "top", "kurta", "jeans", "dress", "cap", "sandals", "backpack", "shorts", "flip flops", "sunglasses", "heels", "wallet", "belt")


# formulas: (what a picture scores, what it has of the avoided words, ...) -> new scores

@dataclass
class Lists:
    "What formulas are made of: each `(queries, pictures)`, or `(queries, 1)`."
    scores: Tensor     # cosines with the query
    raw: Tensor        # cosines with the words to avoid
    along: Tensor      # products with the words to avoid, centred
    centred: Tensor    # cosines, both sides centred
    contrast: Tensor   # cosines with the words to avoid, less those with what is wanted, in words
    overlap: Tensor    # cosine of query and words to avoid, both as they are
    overlap_centred: Tensor   # product of query and words to avoid, the words centred


def stretched(each: Tensor) -> Tensor:
    low, high = each.amin(1, keepdim=True), each.amax(1, keepdim=True)
    return (each - low) / (high - low).clamp_min(1e-6)


def standard(each: Tensor) -> Tensor: return (each - each.mean(1, keepdim=True)) / each.std(1, keepdim=True).clamp_min(1e-6)


FORMULAS = {
    "query - b * words": (lambda x, b: x.scores - b * x.raw, (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    "query - b * centred words": (lambda x, b: x.scores - b * x.along, (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    "query without its part along the words": (lambda x, b: x.scores - b * x.overlap * x.raw, (0.5, 1.0, 1.5, 2.0)),
    "query without its part along the centred words": (lambda x, b: x.scores - b * x.overlap_centred * x.along, (0.5, 1.0, 1.5, 2.0)),
    "stretched - b * stretched": (lambda x, b: stretched(x.scores) - b * stretched(x.raw), (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    "stretched - b * stretched centred": (lambda x, b: stretched(x.scores) - b * stretched(x.centred), (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)),
    "stretched - b * stretched contrast": (lambda x, b: stretched(x.scores) - b * stretched(x.contrast), (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)),
    "standard - b * standard centred": (lambda x, b: standard(x.scores) - b * standard(x.centred), (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    "standard - b * standard centred, above its mean": (lambda x, b: standard(x.scores) - b * standard(x.centred).clamp_min(0), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
    "standard - b * standard contrast, above its mean": (lambda x, b: standard(x.scores) - b * standard(x.contrast).clamp_min(0), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
    "stretched * (1 - stretched centred) ^ b": (lambda x, b: stretched(x.scores) * (1 - stretched(x.centred)) ** b, (0.1, 0.25, 0.5, 1.0, 2.0)),
}
NOTHING = "nothing avoided"


@dataclass
class Query:
    "One search, and what its hits are worth."
    feature: Tensor           # `(width,)` unit, of the composed query
    wanted: str               # in words; empty for a picture alone
    avoid: str
    worth: Tensor             # `(pictures,)` from 0 to 1; 0 where the avoided thing shows
    shows: Tensor             # `(pictures,)` bool: the avoided thing
    without: int = -1         # the reference, which takes no part


@dataclass
class Case:
    "Queries of one kind, for one model."
    model: str
    kind: str
    features: Tensor          # `(pictures, width)` of the gallery
    queries: list[Query]


def lists_of(case: Case, texts: dict[str, Tensor], text_mean: Tensor) -> Lists:
    "What the formulas need."
    queries, words = torch.stack([query.feature for query in case.queries]), torch.stack([texts[query.avoid] for query in case.queries])
    wanted = torch.stack([texts[query.wanted] if query.wanted else unit(text_mean) for query in case.queries])
    against, pictures = unit(words - text_mean), case.features.T
    raw, centred = words @ pictures, against @ unit(case.features - case.features.mean(0)).T
    return Lists(queries @ pictures, raw, against @ pictures, centred, raw - wanted @ pictures, (queries * words).sum(1, keepdim=True), (queries * against).sum(1, keepdim=True))


def measured(case: Case, lists: Lists, formula, strength: float) -> tuple[Tensor, Tensor]:
    "`(queries,)` what the first hits are worth, and the share of them that shows what was to be avoided."
    scores = (lists.scores if formula is None else formula(lists, strength)).clone()
    worth, shows = torch.stack([query.worth for query in case.queries]), torch.stack([query.shows for query in case.queries])
    rows, left_out = zip(*[(row, query.without) for row, query in enumerate(case.queries) if query.without >= 0]) if any(query.without >= 0 for query in case.queries) else ((), ())
    scores[list(rows), list(left_out)], worth[list(rows), list(left_out)] = -torch.inf, 0
    first = scores.topk(FIRST, dim=1).indices
    return worth.gather(1, first).mean(1).double() / worth.topk(FIRST, dim=1).values.mean(1).double(), shows.gather(1, first).double().mean(1)


def most_shown(values: Tensor, feature: Tensor, features: Tensor, without: int = -1) -> int:
    "The value that is most frequent among the first hits; -1 is no value."
    scores = features @ feature
    if without >= 0: scores[without] = -torch.inf
    first = values[top_k(scores[None], FIRST)[0]]
    first = first[first >= 0]
    return int(first.bincount().argmax()) if len(first) else -1


# the drawn world: everything is known

def drawn_models(demo: Path) -> dict[str, tuple]:   # title -> model, attributes that captions mention
    "Models of both worlds of the demo, before and after masked tuning."
    return {f"drawn, {title}: {arm}": (load_backbone(demo / "runs" / title.replace(" ", "-") / arm.replace(" ", "-") / "last"), tuple(said)) for title, said in WORLDS.items() for arm in ("start", "masked tuning")}


def unseen() -> Tensor:
    "Attributes of the demo's gallery, which none of its models has seen."
    settings = DemoSettings()
    return world.make_queries(settings.queries, settings.gallery, rng_for(settings.seed, "test")).attributes


def drawn_cases(title: str, backbone, names: tuple[str, ...], attributes: Tensor) -> list[Case]:
    "Words, a picture, and both, each with a word for what is not wanted; `names`: the attributes that captions mention."
    features, chance, cases = encode_pictures(backbone, world.render(attributes, 48)), random.Random(0), []
    values = [world.ATTRIBUTES[name] for name in names]
    columns = [world.COLUMN[name] for name in names]
    said = {(i, v): encode_texts(backbone, [world.sentence({names[i]: value})])[0] for i, own in enumerate(values) for v, value in enumerate(own)}
    for kind in ("words", "picture", "picture and words"):
        queries = []
        while len(queries) < QUERIES:
            one, other = chance.sample(range(len(names)), 2)
            row, value = chance.randrange(len(attributes)), chance.randrange(len(values[one]))
            words, picture = said[one, value], features[row]
            if kind == "picture and words" and attributes[row, columns[one]] == value: continue
            feature = {"words": words, "picture": picture, "picture and words": Sum(1.0).parts(picture[None], words[None])[0][0]}[kind]
            without = -1 if kind == "words" else row
            avoided = most_shown(attributes[:, columns[other]], feature, features, without)
            shows, fits = attributes[:, columns[other]] == avoided, (attributes[:, columns[one]] == value).double()
            kept = [column for name, column in world.COLUMN.items() if column not in (columns[other], *([columns[one]] if kind != "picture" else []))]
            same = (attributes[:, kept] == attributes[row, kept]).double().mean(1)
            worth = {"words": fits, "picture": same, "picture and words": (fits + same) / 2}[kind] * ~shows
            bare = values[other][avoided]
            avoid = bare if chance.random() < 0.5 else world.sentence({names[other]: bare})
            queries.append(Query(feature, "" if kind == "picture" else world.sentence({names[one]: values[one][value]}), avoid, worth, shows, without))
        cases.append(Case(title, f"drawn, {kind}", features, queries))
    return cases


# the shop: captions say colour and wearer

def captioned(shop: Path, count: int) -> tuple[list[str], list[str]]:
    "Files and captions of some pictures whose caption names one colour, one wearer and one thing."
    with open(shop / "pairs.csv", encoding="utf-8", newline="") as file: rows = [(row["filepath"], row["title"].lower()) for row in csv.DictReader(file)]
    fit = [(name, text) for name, text in rows if all(len(values_in(text, known)) == 1 for known in (COLOURS, WEARERS)) and values_in(text, THINGS)]
    random.Random(0).shuffle(fit)
    return [name for name, _ in fit[:count]], [text for _, text in fit[:count]]


def values_in(text: str, known: tuple[str, ...]) -> list[int]:
    "Which of some words a caption has."
    return [number for number, word in enumerate(known) if re.search(rf"\b{word}(?:es|s)?\b", text)]


def shop_cases(title: str, backbone, shop: Path) -> list[Case]:
    "Words without a colour or wearer, over captioned pictures; and `this, X instead of Y` as picture, X, without Y, over the gallery."
    names, texts = captioned(shop, 4000)
    features, chance = encode_files(backbone, names, shop, cache=FeatureCache(), check=False), random.Random(0)
    tables = {"colour": (COLOURS, torch.tensor([values_in(text, COLOURS)[0] for text in texts])), "wearer": (WEARERS, torch.tensor([values_in(text, WEARERS)[0] for text in texts]))}
    things, queries = [set(values_in(text, THINGS)) for text in texts], []
    common = [number for number in range(len(THINGS)) if sum(number in own for own in things) >= 60]
    forms = [("{}", "{}"), ("a {}", "{}"), ("{}", "in {}"), ("a {}", "in {}"), ("a photo of a {}", "{}")]
    for thing in common:
        fits = torch.tensor([float(thing in own) for own in things])
        for about, (known, own) in tables.items():
            for form, how in forms:
                wanted = form.format(THINGS[thing])
                feature = encode_texts(backbone, [wanted])[0]
                avoided = most_shown(own, feature, features)
                shows = own == avoided
                how = f"for {known[avoided]}" if about == "wearer" and how != "{}" else how.format(known[avoided])
                queries.append(Query(feature, wanted, how, fits.double() * ~shows, shows))
    chance.shuffle(queries)
    gallery, records = read_json(shop / "gallery.json"), read_json(shop / "queries.dev.json")
    place, pictures, asked = {name: number for number, name in enumerate(gallery)}, encode_files(backbone, gallery, shop, cache=FeatureCache(), check=False), []
    for record in records:
        if not (found := re.fullmatch("(.+) instead of (.+)", record["relative_caption"])): continue
        new, old = found.groups()
        row, words = place[record["reference_img_id"]], encode_texts(backbone, [f"in {new}" if record["kind"] == "colour" else new])[0]
        worth = torch.zeros(len(gallery), dtype=torch.double)
        worth[[place[name] for name in record["gt_img_ids"]]] = 1
        asked.append((Query(Sum(1.0).parts(pictures[row][None], words[None])[0][0], new, old, worth, torch.zeros(len(gallery), dtype=torch.bool), row), record["kind"]))
    composed = [Case(title, f"shop, picture and words, {kind}", pictures, [query for query, own in asked if own == kind]) for kind in dict.fromkeys(own for _, own in asked)]
    return [Case(title, "shop, words", features, queries), *composed]


# choose on one half, report on the other

def half(case: Case, first: bool) -> Tensor: return torch.arange(len(case.queries)) % 2 == (0 if first else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, metavar="DIR", help="what pli demo --out DIR has left")
    parser.add_argument("--shop", type=Path, required=True, metavar="DIR", help="pairs.csv, gallery.json, queries.dev.json, images/ and base/")
    parser.add_argument("--tuned", type=Path, metavar="DIR", help="a model tuned from SHOP/base")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    args = parser.parse_args()
    cases, tables, attributes = [], [], unseen()
    try:
        for title, (backbone, names) in drawn_models(args.demo).items(): add(cases, tables, backbone, drawn_cases(title, backbone, names, attributes))
        for title, folder in ({"shop: start": args.shop / "base"} | ({"shop: masked tuning": args.tuned} if args.tuned else {})).items():
            backbone = load_backbone(folder)
            add(cases, tables, backbone, shop_cases(title, backbone, args.shop))
    except PliError as error: sys.exit(f"measure_avoid: {error}")
    record = provenance("python tools/measure_avoid.py --demo DEMO --shop SHOP" + " --tuned TUNED" * bool(args.tuned), 0) | {"what": __doc__.split("\n\n")[2].replace("\n", " "), "measure": f"worth of the first {FIRST} hits, percent of the best possible"} | conclusions(cases, tables)
    print(json.dumps({key: record[key] for key in ("chosen", "formulas")}, indent=1))
    for row in record["cases"]: print(json.dumps(row))
    if args.out: write_json(args.out, record)


def add(cases: list[Case], tables: list[dict], backbone, made: list[Case]) -> None:
    "Measure every formula at every strength for some queries."
    mean = everyday_mean(backbone)
    for case in made:
        case.queries = [query for query in case.queries if query.worth.any()]          # all that was asked for shows what is to be avoided
        said = sorted({text for query in case.queries for text in (query.avoid, query.wanted) if text})
        lists = lists_of(case, dict(zip(said, encode_texts(backbone, said))), mean)
        table = {(NOTHING, 0.0): measured(case, lists, None, 0.0)}
        for name, (formula, strengths) in FORMULAS.items():
            for strength in strengths: table[name, strength] = measured(case, lists, formula, strength)
        cases.append(case)
        tables.append(table)
        print(f"{case.model}; {case.kind}: {len(case.queries)} queries", file=sys.stderr, flush=True)


def conclusions(cases: list[Case], tables: list[dict]) -> dict:
    "What each formula reaches with the strength that is best on one half, on the other half; cases count alike."
    score = lambda key, first: sum(table[key][0][half(case, first)].mean().item() for case, table in zip(cases, tables)) / len(cases)
    percent = lambda value: round(100 * value, 2)
    formulas = {}
    for name, (_, strengths) in ({NOTHING: (None, (0.0,))} | FORMULAS).items():
        best = max(strengths, key=lambda strength: score((name, strength), True))
        formulas[name] = {"strength": best, "choosing half": percent(score((name, best), True)), "other half": percent(score((name, best), False)),
                          "by strength, other half": {f"{strength:g}": percent(score((name, strength), False)) for strength in strengths}}
    chosen = max(formulas, key=lambda name: formulas[name]["choosing half"])
    rows = []
    for case, table in zip(cases, tables):
        rows_of, keys = half(case, False), {NOTHING: (NOTHING, 0.0), "chosen": (chosen, formulas[chosen]["strength"])}
        row = {"model": case.model, "queries of": case.kind, "count": int(rows_of.sum())}
        for name, key in keys.items():
            row[name] = {"worth": [percent(value) for value in bootstrap(table[key][0][rows_of])], "shows what was to be avoided": percent(table[key][1][rows_of].mean().item())}
        row["difference"] = [percent(value) for value in paired_bootstrap(table[keys["chosen"]][0][rows_of], table[NOTHING, 0.0][0][rows_of])]
        row["every formula"] = {name: percent(table[name, found["strength"]][0][rows_of].mean().item()) for name, found in formulas.items()}
        rows.append(row)
    return {"chosen": {"formula": chosen, "strength": formulas[chosen]["strength"]}, "formulas": formulas, "cases": rows}


if __name__ == "__main__": main()

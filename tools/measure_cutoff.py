"""Measure what could tell hits that fit from hits that are no better than chance: on queries with known answers, on the same queries with all answers taken away, and on nonsense.

    python tools/measure_cutoff.py --demo demo --shop SHOP --tuned tuned/last --clothing CLOTHING --out results/cutoff.json

demo and tuned/last are those of tools/measure_avoid.py. Every query gives its first 20 hits. A hit is *right* where the query's known answers say so; *absent* are the hits of the
same query after all right pictures were taken out of the gallery; *nonsense* are the hits of words that have nothing to do with the gallery. A measure is good if one threshold,
for all queries of all kinds, keeps the right ones and leaves out the others. AUC: how often a right hit has more of the measure than another; 50 is a coin, 100 is perfect.
"""
import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measure_avoid import COLOURS, THINGS, captioned, drawn_models, unseen, values_in
from torch import Tensor

from pli import world
from pli.backbones.loading import load_backbone
from pli.composition import Sum
from pli.core import PliError, provenance, read_json, write_json
from pli.gallery.encode import FeatureCache, encode_files, encode_pictures, encode_texts, top_k
from pli.gallery.ranking import everyday_captions

FIRST, QUERIES, NOISE = 20, 150, len(everyday_captions())
NONSENSE = ("quarterly tax report", "a plate of spaghetti", "the moon landing", "an oil tanker at sea", "two dentists laughing", "how to repair a bicycle", "a chess game", "a volcano erupting", "wedding cake", "a map of Portugal",
            "an x-ray of a knee", "a crowded subway", "snow on the mountains", "football players", "a cup of coffee", "the inside of a church", "a herd of elephants", "rain on a window", "a birthday party", "a page of a book",
            "asdf qwer zxcv", "lorem ipsum dolor", "xyzzy", "blue screen of death", "a giraffe", "a kitchen sink", "traffic jam", "an old castle", "fireworks", "a bowl of fruit")


@dataclass
class Asked:
    "A query, and which pictures are right."
    picture: Tensor | None   # `(width,)`
    words: Tensor | None
    right: Tensor            # `(pictures,)` bool
    without: int = -1


def together(picture: Tensor | None, words: Tensor | None) -> Tensor:
    "`(n, width)` query vectors of pictures, words or both."
    if picture is None or words is None: return words if picture is None else picture
    return Sum(1.0).parts(picture, words)[0]


def noise_of(asked: Asked, features: Tensor, captions: Tensor) -> Tensor:   # `(NOISE, width)`
    "Queries of the same kind that have nothing to do with this one: everyday captions, pictures of the gallery, or one of each."
    rows = torch.linspace(0, len(features) - 1, NOISE).long()
    return together(None if asked.picture is None else features[rows], None if asked.words is None else captions)


def rows_of(asked: Asked, features: Tensor, captions: Tensor, absent: bool) -> dict[str, Tensor]:
    "The measures of the first hits, and whether they are right."
    query = together(None if asked.picture is None else asked.picture[None], None if asked.words is None else asked.words[None])[0]
    scores, part = features @ query, torch.ones(len(features), dtype=torch.bool)
    if asked.without >= 0: part[asked.without] = False
    if absent: part &= ~asked.right
    hits = top_k(scores.masked_fill(~part, -torch.inf)[None], FIRST)[0]
    found, noise = scores[hits], features[hits] @ noise_of(asked, features, captions).T
    gallery = (found - scores[part].mean()) / scores[part].std()
    unrelated = (found - noise.mean(1)) / noise.std(1)
    words = (features[hits] @ asked.words - (features[hits] @ captions.T).mean(1)) / (features[hits] @ captions.T).std(1) if asked.words is not None else unrelated
    return {"score": found, "above the gallery": gallery, "above unrelated queries": unrelated, "words above everyday captions": words, "the lesser of both": torch.minimum(gallery, unrelated), "the sum of both": gallery + unrelated, "right": asked.right[hits]}


def auc(right: Tensor, other: Tensor) -> float:
    "How often a right hit has more, in percent."
    order = torch.cat([right, other]).double()
    ranks = torch.empty_like(order)
    values, places, counts = order.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[places]
    return 100 * ((ranks[: len(right)].sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(other))).item()


def drawn(backbone, attributes: Tensor) -> tuple[Tensor, dict[str, list[Asked]]]:
    "Two properties in words; a picture of a shape and colour, and another colour in words."
    features, chance = encode_pictures(backbone, world.render(attributes, 48)), random.Random(0)
    shape, colour = (attributes[:, world.COLUMN[name]] for name in ("shape", "colour"))
    both, kinds = [(s, c) for s in range(8) for c in range(8)], {"words": [], "picture and words": [], "picture": []}
    said = {(s, c): encode_texts(backbone, [world.sentence({"shape": world.ATTRIBUTES["shape"][s], "colour": world.ATTRIBUTES["colour"][c]})])[0] for s, c in both}
    tint = encode_texts(backbone, [f"in {name}" for name in world.COLOURS])
    for s, c in both: kinds["words"].append(Asked(None, said[s, c], (shape == s) & (colour == c)))
    for _ in range(QUERIES):
        row, new = chance.randrange(len(attributes)), chance.randrange(8)
        if new == colour[row]: continue
        kinds["picture and words"].append(Asked(features[row], tint[new], (shape == shape[row]) & (colour == new), row))
        right = (shape == shape[row]) & (colour == colour[row])
        right[row] = False
        kinds["picture"].append(Asked(features[row], None, right, row))
    return features, kinds


def shop(backbone, folder: Path) -> tuple[Tensor, dict[str, list[Asked]]]:
    "A thing in a colour, over captioned pictures."
    names, texts = captioned(folder, 4000)
    features, asked = encode_files(backbone, names, folder, cache=FeatureCache(), check=False), []
    colour, things = torch.tensor([values_in(text, COLOURS)[0] for text in texts]), [set(values_in(text, THINGS)) for text in texts]
    for thing, name in enumerate(THINGS):
        own = torch.tensor([thing in each for each in things])
        for number, tint in enumerate(COLOURS):
            right = own & (colour == number)
            if right.sum() >= 5: asked.append(Asked(None, encode_texts(backbone, [f"{tint} {name}"])[0], right))
    return features, {"words": asked}


def composed(backbone, folder: Path) -> tuple[Tensor, dict[str, list[Asked]]]:
    "The development queries: a picture, and the colour that it should have."
    gallery, records, asked = read_json(folder / "gallery.json"), read_json(folder / "queries.dev.json"), []
    place, features = {name: number for number, name in enumerate(gallery)}, encode_files(backbone, gallery, folder, cache=FeatureCache(), check=False)
    for record in [record for record in records if record["kind"] == "colour"][:QUERIES]:
        right, row = torch.zeros(len(gallery), dtype=torch.bool), place[record["reference_img_id"]]
        right[[place[name] for name in record["gt_img_ids"]]] = True
        asked.append(Asked(features[row], encode_texts(backbone, [record["relative_caption"]])[0], right, row))
    return features, {"picture and words": asked}


def clothes(backbone, folder: Path) -> tuple[Tensor, dict[str, list[Asked]]]:
    "Photographs of people's own clothes, by kind."
    files = sorted(path for path in folder.rglob("*.jpg"))
    kinds, features = [path.parent.name for path in files], encode_files(backbone, [str(path.relative_to(folder)) for path in files], folder, cache=FeatureCache(), check=False)
    said = {"longsleeve": "a long sleeved shirt", "outwear": "a jacket", "t-shirt": "a t-shirt"}
    of = lambda kind, form: encode_texts(backbone, [form.format(said.get(kind, kind))])[0]
    return features, {"words": [Asked(None, of(kind, form), torch.tensor([own == kind for own in kinds])) for kind in sorted(set(kinds)) for form in ("{}", "{} for women", "black {}")]}


def measured(title: str, backbone, made: tuple[Tensor, dict[str, list[Asked]]]) -> list[dict]:
    "How well each measure tells right hits from others, for one model and gallery."
    (features, kinds), found = made, []
    captions, nonsense = encode_texts(backbone, everyday_captions()), encode_texts(backbone, NONSENSE)
    for kind, queries in kinds.items():
        right, wrong, absent = [], [], []
        for asked in queries:
            rows = rows_of(asked, features, captions, False)
            right.append({name: value[rows["right"]] for name, value in rows.items()})
            wrong.append({name: value[~rows["right"]] for name, value in rows.items()})
            absent.append(rows_of(asked, features, captions, True))
        silly = [rows_of(Asked(None if kind == "words" else queries[number % len(queries)].picture, words, torch.zeros(len(features), dtype=torch.bool), -1 if kind == "words" else queries[number % len(queries)].without), features, captions, False)
                 for number, words in enumerate(nonsense)] if kind != "picture" else []
        found.append({"model and gallery": title, "kind": kind, "queries": len(queries), "parts": {name: {key: torch.cat([each[key] for each in part]) for key in part[0] if key != "right"} for name, part in {"right": right, "wrong": wrong, "absent": absent, "nonsense": silly}.items() if part}})
        print(f"{title}; {kind}: {len(queries)} queries", file=sys.stderr, flush=True)
    return found


def summary(cases: list[dict]) -> dict:
    "AUC of every measure, for each case and with one threshold for all."
    measures, rows = list(cases[0]["parts"]["right"]), []
    for case in cases:
        parts = case["parts"]
        rows.append({key: case[key] for key in ("model and gallery", "kind", "queries")} | {"right hits": len(parts["right"]["score"])}
                    | {f"right against {name}": {measure: round(auc(parts["right"][measure], parts[name][measure]), 1) for measure in measures} for name in parts if name != "right" and len(parts[name]["score"]) and len(parts["right"]["score"])}
                    | {"quantiles": {measure: {name: [round(part[measure].quantile(q).item(), 2) for q in (0.1, 0.5, 0.9)] for name, part in parts.items() if len(part[measure])} for measure in measures}})
    pooled = {}
    for against in ("wrong", "absent", "nonsense"):
        some = [case["parts"] for case in cases if against in case["parts"]]
        joint = lambda name, measure: torch.cat([part[name][measure][:: max(1, len(part[name][measure]) // 500)] for part in some])
        pooled[against] = {measure: {"AUC": round(auc(joint("right", measure), joint(against, measure)), 1), "kept where 90 % of the right are": round(100 * (joint(against, measure) >= joint("right", measure).quantile(0.1)).double().mean().item(), 1),
                                     "threshold": round(joint("right", measure).quantile(0.1).item(), 3)} for measure in measures}
    return {"one threshold for all": pooled, "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("demo", "shop", "tuned", "clothing"): parser.add_argument(f"--{name}", type=Path, required=name != "tuned", metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    args = parser.parse_args()
    cases = []
    try:
        for title, folder in ({"shop: start": args.shop / "base"} | ({"shop: masked tuning": args.tuned} if args.tuned else {})).items():
            backbone = load_backbone(folder)
            cases += measured(f"{title}, captioned pictures", backbone, shop(backbone, args.shop)) + measured(f"{title}, gallery", backbone, composed(backbone, args.shop)) + measured(f"{title}, other photographs", backbone, clothes(backbone, args.clothing))
        for title, (backbone, _) in drawn_models(args.demo).items(): cases += measured(title, backbone, drawn(backbone, unseen()))
    except PliError as error: sys.exit(f"measure_cutoff: {error}")
    record = provenance("python tools/measure_cutoff.py --demo DEMO --shop SHOP" + " --tuned TUNED" * bool(args.tuned) + " --clothing CLOTHING", 0) | summary(cases)
    print(json.dumps(record["one threshold for all"], indent=1))
    if args.out: write_json(args.out, record)


if __name__ == "__main__": main()

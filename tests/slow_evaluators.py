"""The official evaluators once more, from their definitions: own readers, a loop over the queries, one full sort each. Nothing of `pli` is used here, and nothing here is fast."""
import json
from collections import defaultdict
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

MEASURES = {
    "fashioniq": ("recall@10", "recall@50"),
    "cirr": ("recall@1", "recall@5", "recall@10", "recall@50", "subset recall@1", "subset recall@2", "subset recall@3", "mean(recall@5, subset recall@1)"),
    "circo": ("mAP@5", "mAP@10", "mAP@25", "mAP@50", "recall@5", "recall@10", "recall@25", "recall@50"),
    "genecis": ("recall@1", "recall@2", "recall@3"),
}
CATEGORIES = ("dress", "shirt", "toptee")


class Query(NamedTuple):
    "A composed query by names, as the official files write them."
    id: str
    kind: str
    reference: str
    right: tuple[str, ...]            # the main answer first
    gallery: tuple[str, ...]          # what is ranked; queries that search the same pictures share one tuple
    words: tuple[str, ...] = ()       # one text, or several whose unit features are averaged
    left_out: str = ""                # taken out of the ranking
    subset: tuple[str, ...] = ()      # CIRR: the pictures of the subset ranking
    aspects: tuple[str, ...] = ()     # CIRCO: the semantic aspects


def load(path: Path): return json.loads(path.read_text(encoding="utf-8"))


def joined(first: str, second: str, joining: str) -> str:
    "Two captions as one text: as CLIP4Cir writes them, as SEARLE does, or just with `and`."
    if joining == "clip4cir": return f"{first.strip('.?, ').capitalize()} and {second.strip('.?, ')}"
    if joining == "reversed": return f"{second} and {first}"
    if joining == "strip": return f"{first.strip('.?, ')} and {second.strip('.?, ')}"
    return f"{first} and {second}"


def authors_words(text: str) -> str:
    "What the released code of masked tuning makes of a caption, or of two joined."
    return text.strip().replace(".", "dotmark").replace("?", "questionmark").replace("&", "andmark").replace("*", "starmark")


def masked_fashioniq(root: Path) -> Iterator[Query]:
    "The pairs of the text files as masked tuning's authors read them: each line with the caption of the next or the last one, over all pictures that the file names, the reference left out."
    for category in CATEGORIES:
        lines = (root / "captions_pairs" / f"fashion_iq-val-cap-{category}.txt").read_text(encoding="utf-8").split("\n")
        fields = [line.split(";") for line in lines if line]
        stem = lambda path: path.split("/")[-1].split(".")[0]
        searched = tuple(sorted({stem(row[end]) for row in fields for end in (0, 1)}))
        for i, row in enumerate(fields):
            partner = fields[i + 1] if i % 2 == 0 else fields[i - 1]
            yield Query(f"{category}-{i // 2}/{'ab'[i % 2]}", category, stem(row[0]), (stem(row[1]),), searched, (authors_words(row[-1] + " and " + partner[-1]),), left_out=stem(row[0]))


def fashioniq(root: Path, gallery: str = "split", reference: str = "kept", joining: str = "clip4cir", orders: str = "one", authors: bool = False) -> Iterator[Query]:
    "The validation queries of each category over the pictures of its split file, or over those that its queries name."
    if authors: yield from masked_fashioniq(root)
    if authors: return
    for category in CATEGORIES:
        records = load(root / "captions" / f"cap.{category}.val.json")
        if gallery == "split": searched = tuple(load(root / "image_splits" / f"split.{category}.val.json"))
        else: searched = tuple(sorted({record[end] for record in records for end in ("candidate", "target")}))
        for number, record in enumerate(records):
            first, second = record["captions"]
            forth, back = joined(first, second, joining), joined(second, first, joining)
            asked = {"one": {"": (forth,)}, "averaged": {"": (forth, back)}, "both": {"/a": (forth,), "/b": (back,)}}[orders]
            for order, words in asked.items():
                yield Query(f"{category}-{number}{order}", category, record["candidate"], (record["target"],), searched, words,
                            left_out=record["candidate"] if reference == "left-out" else "")


def cirr(root: Path, reference: str = "left-out", authors: bool = False, most: int | None = None) -> Iterator[Query]:
    "The validation queries over all pictures of the split without the reference, and over the set that the reference comes from."
    searched = tuple(load(root / "image_splits" / "split.rc2.val.json"))
    for record in load(root / "captions" / "cap.rc2.val.json")[:most]:
        subset = tuple(name for name in record["img_set"]["members"] if name != record["reference"])
        yield Query(str(record["pairid"]), "all", record["reference"], (record["target_hard"],), searched, (authors_words(record["caption"]) if authors else record["caption"],),
                    left_out=record["reference"] if reference == "left-out" else "", subset=subset)


def circo(root: Path, gallery: tuple[str, ...], reference: str = "kept") -> Iterator[Query]:
    "The validation queries over a given gallery, all ground truths of each."
    for record in load(root / "annotations" / "val.json"):
        main, shown = str(record["target_img_id"]), str(record["reference_img_id"])
        right = (main, *(str(number) for number in record["gt_img_ids"] if str(number) != main))
        yield Query(str(record["id"]), "all", shown, right, gallery, (record["relative_caption"],), left_out=shown if reference == "left-out" else "",
                    aspects=tuple(record["semantic_aspects"]))


def seen(picture: dict) -> str:
    "The name of a GeneCIS picture: its number, and where a box is looked at, the box."
    return str(picture["val_image_id"]) if "val_image_id" in picture else f"{picture['image_id']}@{','.join(str(number) for number in picture['instance_bbox'])}"


def genecis(root: Path, tasks: tuple[str, ...] = ("focus_object", "change_object")) -> Iterator[Query]:
    "The queries of some tasks, each over its own pictures and the target; a picture named twice is one picture."
    for task in tasks:
        for number, record in enumerate(load(root / f"{task}.json")):
            target, own = seen(record["target"]), [seen(picture) for picture in record["gallery"]]
            yield Query(f"{task}-{number}", task, seen(record["reference"]), (target,), tuple(dict.fromkeys([target, *own])), (record["condition"],))


def ranking(names: tuple[str, ...], scores: np.ndarray, late: tuple[str, ...], left_out: str = "", most: int = 50) -> list[str]:
    "The pictures, best first, as far as any measure looks; of equal scores those in `late` come last; without what is left out."
    held_back = [names.index(name) for name in late]
    arranged = np.concatenate([np.delete(np.arange(len(names)), held_back), held_back]).astype(int)
    order = arranged[np.argsort(-scores[arranged], kind="stable")]
    return [names[i] for i in order[: most + 1] if names[i] != left_out][:most]


def average_precision(ranked: list[str], right: tuple[str, ...], k: int) -> float:
    "The sum of the precision at every one of the first k ranks that holds a right answer, over min(k, number of right answers)."
    found, total = 0, 0.0
    for rank, name in enumerate(ranked[:k], start=1):
        if name in right:
            found += 1
            total += found / rank
    return total / min(k, len(right))


def measured(query: Query, scores: np.ndarray, subset_scores: np.ndarray, measures: tuple[str, ...]) -> dict[str, float]:
    "One query's measures, from the scores of its gallery and of its subset."
    main = query.right[:1]
    for_recall = ranking(query.gallery, scores, main, query.left_out)
    for_precision = for_recall if len(query.right) == 1 else ranking(query.gallery, scores, query.right, query.left_out)
    for_subset = ranking(query.subset, subset_scores, main) if query.subset else []
    found = {}
    for measure in measures:
        name, _, k = measure.rpartition("@")
        if measure == "mean(recall@5, subset recall@1)": found[measure] = (found["recall@5"] + found["subset recall@1"]) / 2
        elif name == "recall": found[measure] = float(main[0] in for_recall[: int(k)])
        elif name == "subset recall": found[measure] = float(main[0] in for_subset[: int(k)])
        elif name == "mAP": found[measure] = average_precision(for_precision, query.right, int(k))
    return found


def one(rows: np.ndarray) -> np.ndarray:
    "Every row brought to length one."
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def evaluate(queries: list[Query], pictures: dict[str, np.ndarray], words: dict[str, np.ndarray], weight: float, measures: tuple[str, ...], raw: bool = False) -> dict[str, dict[str, float]]:
    "Query -> measure -> value for the composed query unit(words) + weight * unit(reference) and the inner product with every picture; `raw`: half of each, as long as they are."
    sharing, found, alike = defaultdict(list), {}, (lambda rows: 0.5 * rows) if raw else one
    for query in queries: sharing[query.gallery].append(query)
    for gallery, group in sharing.items():
        searched = one(np.stack([pictures[name] for name in gallery])).T
        asked = alike(np.stack([words[query.id] for query in group])) + weight * alike(np.stack([pictures[query.reference] for query in group]))
        asked = one(asked)
        for query, vector, scores in zip(group, asked, asked @ searched):
            subset = np.array([one(pictures[name]) @ vector for name in query.subset])
            found[query.id] = measured(query, scores, subset, measures)
    return found


def mean(found: dict[str, dict[str, float]], ids: list[str], measure: str) -> float:
    "The mean of one measure over some queries."
    return sum(found[each][measure] for each in ids) / len(ids)


def by_kind(queries: list[Query], found: dict[str, dict[str, float]], measure: str) -> dict[str, float]:
    "Kind -> mean over its queries."
    return {kind: mean(found, [query.id for query in queries if query.kind == kind], measure) for kind in dict.fromkeys(query.kind for query in queries)}


def by_aspect(queries: list[Query], found: dict[str, dict[str, float]], measure: str) -> dict[str, float]:
    "Aspect -> mean over the queries that carry it."
    every = dict.fromkeys(aspect for query in queries for aspect in query.aspects)
    return {aspect: mean(found, [query.id for query in queries if aspect in query.aspects], measure) for aspect in every}


def summary(queries: list[Query], found: dict[str, dict[str, float]], measure: str) -> float:
    "The mean of the kinds' means: the categories of FashionIQ, the tasks of GeneCIS; CIRR and CIRCO have one kind."
    kinds = by_kind(queries, found, measure)
    return sum(kinds.values()) / len(kinds)

"Small made-up benchmarks in each official layout, with pictures; every function returns the folder to read from."
import json
from pathlib import Path

import torch
from PIL import Image

from pli.core import rng_for

CATEGORIES = ("dress", "shirt", "toptee")
WORDS = ("is red", "has longer sleeves.", "more colourful, ", "show two of them", "on a größere table", "plain?")
ASPECTS = ("cardinality", "addition", "negation", "viewpoint")


def write(path: Path, what) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what, ensure_ascii=False), encoding="utf-8")
    return path


def edit(path: Path, change) -> Path:
    "Rewrite a JSON file with what `change` makes of it; a `change` that returns nothing has changed it in place."
    said = json.loads(path.read_text(encoding="utf-8"))
    changed = change(said)
    return write(path, said if changed is None else changed)


def picture(path: Path, size=(12, 10)) -> Path:
    "A picture that depends on its name alone; JPEG or PNG by its ending."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=rng_for("picture", path.stem)).byte()
    Image.fromarray(pixels.numpy()).save(path)
    return path


def _two(row: int, count: int) -> tuple[int, int]:
    "A reference and a target that differ, among `count` pictures."
    reference, target = row % count, (2 * row + 1) % count
    return reference, target if target != reference else (target + 1) % count


def make_fashioniq(folder: Path, queries: int = 6, gallery: int = 15, home: str = "", images: str = "images", suffix: str = ".jpg", pictures: bool = True) -> Path:
    "Three categories with train, val and test; `images` may hold `{category}`; picture `shared` is in every category."
    base = folder / home
    for category in CATEGORIES:
        for split in ("train", "val", "test"):
            names = [f"{category[0].upper()}{split[:2]}{i:03d}" for i in range(gallery - 1)] + [f"shared{split}"]
            records = []
            for row in range(queries):
                reference, target = _two(row, gallery)
                record = {"target": names[target], "candidate": names[reference], "captions": [WORDS[row % len(WORDS)], f"{category} number {row}"]}
                records.append(record if split != "test" else {key: record[key] for key in ("candidate", "captions")})
            write(base / "captions" / f"cap.{category}.{split}.json", records)
            write(base / "image_splits" / f"split.{category}.{split}.json", names)
            for name in names if pictures else (): picture(base / images.format(category=category) / f"{name}{suffix}")
    return folder


def add_pairs(folder: Path, split: str = "val") -> Path:
    "The text files that masked tuning's authors read, beside a made-up FashionIQ: some records are not in them, and one caption holds a semicolon."
    for category in CATEGORIES:
        records = json.loads((folder / "captions" / f"cap.{category}.{split}.json").read_text(encoding="utf-8"))
        kept = [record for row, record in enumerate(records) if row % 4 != 2]
        lines = [f"{category}/{record['candidate']}.jpg;{category}/{record['target']}.jpg;{'a night;' * (row == 1)}{caption} \n"
                 for row, record in enumerate(kept) for caption in record["captions"]]
        (folder / "captions_pairs").mkdir(exist_ok=True)
        (folder / "captions_pairs" / f"fashion_iq-{split}-cap-{category}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def make_cirr(folder: Path, queries: int = 8, gallery: int = 60, home: str = "", images: str = "", pictures: bool = True) -> Path:
    "Splits train, val and test1; annotations in `home`, pictures in `images`, both below the folder. Train pictures lie one folder deeper."
    for split, where in (("train", "train/0"), ("val", "dev"), ("test1", "test1")):
        names = [f"{where.split('/')[0]}-{i}-0-img{i % 2}" for i in range(gallery)]
        records = []
        for row in range(queries):
            reference, target = _two(row, gallery)
            members = list(dict.fromkeys([reference, target, *((reference + 7 * i) % gallery for i in range(1, 9))]))[:6]
            members.sort(key=lambda i: (i * 7 + row) % gallery)
            record = {"pairid": 100 + row, "reference": names[reference], "target_hard": names[target], "target_soft": {names[target]: 1.0}, "caption": WORDS[row % len(WORDS)],
                      "img_set": {"id": row, "members": [names[i] for i in members], "reference_rank": 2, "target_rank": 3}}
            if split == "test1": del record["target_hard"], record["target_soft"], record["img_set"]["target_rank"]
            records.append(record)
        write(folder / home / "captions" / f"cap.rc2.{split}.json", records)
        write(folder / home / "image_splits" / f"split.rc2.{split}.json", {name: f"./{where}/{name}.png" for name in names})
        for name in names if pictures else (): picture(folder / images / where / f"{name}.png")
    return folder


def make_circo(folder: Path, queries: int = 8, gallery: int = 60, home: str = "", coco: str = "COCO2017_unlabeled", info: bool = True, pictures: bool = True) -> Path:
    "Splits val and test over one gallery; `info=False` leaves the list of the gallery away."
    base = folder / home
    ids = [7 + 13 * i for i in range(gallery)]
    for split in ("val", "test"):
        records = []
        for row in range(queries):
            reference, target = _two(row, gallery)
            right = [target, *(i for i in range(target + 1, target + 1 + row % 4) if i < gallery and i != reference)]
            record = {"reference_img_id": ids[reference], "target_img_id": ids[target], "relative_caption": WORDS[row % len(WORDS)], "shared_concept": "a thing",
                      "gt_img_ids": [ids[i] for i in right], "id": row, "semantic_aspects": [ASPECTS[row % 4], ASPECTS[(row + 1) % 4]]}
            if split == "test": record = {key: record[key] for key in ("reference_img_id", "relative_caption", "shared_concept", "id")}
            records.append(record)
        write(base / "annotations" / f"{split}.json", records)
    listed = {"info": {}, "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 10, "width": 12} for i in ids], "licenses": []}
    if info: write(base / coco / "annotations" / "image_info_unlabeled2017.json", listed)
    for i in ids if pictures else (): picture(base / coco / "unlabeled2017" / f"{i:012d}.jpg")
    return folder


TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")


def make_genecis(folder: Path, queries: int = 5, gallery: int = 7, tasks=TASKS, home: str = "", coco: str = "val2017", vg: str = "VG_100K", pictures: bool = True) -> Path:
    "Queries with a small gallery each; the attribute tasks look at boxes, two of them in some pictures."
    for task in tasks:
        attribute = task.endswith("attribute")

        def item(i: int) -> dict:
            if not attribute: return {"val_image_id": 1000 + i}
            return {"image_id": 2000 + i // 2, "instance_bbox": [2 + i % 2, 1, 5, 4.5 if i % 3 else 4]}

        records = []
        for row in range(queries):
            around = [row * 3 + i for i in range(gallery + 2)]
            records.append({"condition": f"{WORDS[row % len(WORDS)]}", "reference": item(around[0]), "target": item(around[1]), "gallery": [item(i) for i in around[2:]]})
            if pictures:
                for i in around: picture(folder / (f"{vg}/{2000 + i // 2}.jpg" if attribute else f"{coco}/{1000 + i:012d}.jpg"))
        write(folder / home / f"{task}.json", records)
    return folder

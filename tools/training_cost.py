"""What tuning would cost on GPUs that are not here: an estimate on paper, from counted operations and stated assumptions.

    python tools/training_cost.py [--recount] [--gpu-check results/gpu-check.json] [--loader results/loader-speed.json] [--out results/training-cost.json]

counted     operations of a sample's step, forward and backward, by torch's FlopCounterMode on random weights: masked at 0.75, the same with a
            frozen target, and the plain CLIP loss; and of reading a whole picture forward. A multiplication and an addition are two
assumed     shares of a GPU's published speed, links, pictures a second of a core: `ASSUMED`, with where each number is from
measured    where results/gpu-check.json holds step times of a whole check, they take the place of the assumed shares; where
            results/loader-speed.json is there, its pictures a second do

Hours are samples times seconds a sample; what comes on top is told beside them: gradients, features and pixels between GPUs, loading. Counting
takes some minutes for ViT-L-14 on a slow processor; counts that --out holds already are kept unless --recount says otherwise.
"""
import argparse
import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from pli.backbones.loading import load_backbone
from pli.core import provenance, read_json, rng_for, write_json
from pli.methods.method import TrainingBatch
from pli.methods.registry import method_named
from pli.settings import TuneSettings
from pli.training.step import plain_attention
from pli.training.targets import KnownFeatures

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("ViT-B-32", "ViT-L-14")
WAYS = {"masked 0.75": {}, "masked 0.75, frozen target": {"target": "frozen"}, "CLIP loss, nothing hidden": {"objective": "clip"}}
# all captions of a batch are padded to its longest: one as long as the longest of 64 of COCO's, and one as long as the models read
CAPTIONS = {"19": "a man and a woman on the street next to a red bus with two dogs standing", "77": " ".join(["a"] * 75)}
ASSUMED = {
    "GPU": {"value": "H100 SXM", "from": "NVIDIA, H100 Tensor Core GPU data sheet"},
    "peak, operations a second": {"value": 989e12, "from": "NVIDIA, H100 SXM data sheet: bf16, dense"},
    "shares of the peak that are reached": {"value": [0.25, 0.4], "from": "a choice: what such models reach in practice lies mostly between; nothing here was measured on such a GPU"},
    "link inside a node, bytes a second and direction": {"value": 450e9, "from": "NVIDIA, NVLink 4: 900 GB/s in both directions together"},
    "link between nodes, bytes a second and GPU": {"value": 50e9, "from": "InfiniBand NDR, 400 Gbit/s for each GPU"},
    "way of the exchange": {"value": "a ring", "from": "as fast as its slowest link; a tree of nodes does better"},
    "GPUs of a node": {"value": 8, "from": "as in an HGX H100"},
    "share of a step that is the way back": {"value": 2 / 3, "from": "twice the operations of the way forward; gradients can travel in the meantime"},
    "pictures a second of one core": {"value": 200, "from": "a guess for 500 px JPEGs; tools/loader_speed.py measures it"},
    "cores for each GPU": {"value": 16, "from": "a usual node: 128 cores for 8 GPUs"},
    "tokens of the longest caption of a batch": {"value": {"COCO": 19, "pairs from the web": 77}, "from": "COCO: of a batch of 64; the web: as many as the models read, an upper bound"},
    "pairs of a GPU": {"value": {"ViT-B-32": 256, "ViT-L-14": 64}, "from": "a choice that fits into 80 GB"},
}
RUNS = {
    "COCO, 10 epochs": {"pairs": 591_753, "pictures": 118_287, "epochs": 10, "tokens": 19, "from": "captions_train2017.json; the recipe's epochs"},
    "LLaVA's pairs of CC3M, 10 epochs": {"pairs": 595_375, "pictures": 595_375, "epochs": 10, "tokens": 77, "from": "LLaVA's metadata.json; the recipe's epochs"},
    "CC3M, 10 epochs": {"pairs": 3_318_333, "pictures": 3_318_333, "epochs": 10, "tokens": 77, "from": "training pairs as published, Sharma et al. 2018: nominal, many of its addresses are gone; as many epochs as for the pairs that LLaVA took of it"},
    "LAION-400M, 1 epoch": {"pairs": 400_000_000, "pictures": 400_000_000, "epochs": 1, "tokens": 77, "from": "its nominal size; links that have died since not taken off"},
}
GPUS = (1, 8, 64)


def count(name: str) -> dict:
    "Operations of a sample, and what the model is."
    backbone, found = load_backbone(name), {}
    pixels = torch.rand(2, 3, *backbone.size, generator=rng_for(0, "pixels"))
    weights = sum(weight.numel() for weight in backbone.parameters())
    # with gradients on: without, attention takes a way that the counter does not know
    with plain_attention(True), FlopCounterMode(display=False) as counter: whole = backbone.encode_image(pixels).detach()
    picture = counter.get_total_flops() // 2
    for tokens, caption in CAPTIONS.items():
        found[tokens] = {"a whole picture, forward": picture}
        for way, more in WAYS.items():
            settings = TuneSettings(hide="random:0.75", batch_size=2, **more)
            gallery = KnownFeatures(backbone, pixels, whole) if settings.target == "frozen" else None
            batch = TrainingBatch(pixels, [caption] * 2, rng_for(0, "hide"))
            with plain_attention(True), backbone.shortcuts(), FlopCounterMode(display=False) as counter:
                method_named(settings.objective).loss(backbone, batch, settings, gallery).backward()
            found[tokens][way] = counter.get_total_flops() // 2
            backbone.zero_grad(set_to_none=True)
    return {"weights": weights, "width": backbone.width, "pixels": list(backbone.size), "operations of a sample, by tokens": found}


def measured_steps(path: Path) -> tuple[dict, dict | None]:
    "Seconds a sample by model and way, from a check of a GPU; and where it is from. Nothing where there is none, or only a rehearsal."
    if not path.is_file(): return {}, None
    record = read_json(path)
    steps = record.get("parts", {}).get("step", {})
    if not str(record["machine"].get("device", "")).startswith("cuda"): return {}, None
    names = {"masked 0.75": "pli", "masked 0.75, frozen target": "frozen"}
    found = {model: {way: steps[model]["seconds a step"][name]["median"] / steps[model]["batch"] for way, name in names.items()} for model in MODELS if model in steps}
    return found, {"file": path.name, "gpu": record["machine"].get("gpu"), "date": record["date"]} if found else None


def measured_loader(path: Path) -> tuple[float, dict | None]:
    "Pictures a second of one core, and where it is from."
    if not path.is_file(): return ASSUMED["pictures a second of one core"]["value"], None
    record = read_json(path)
    if "--quick" in record["command"]: return ASSUMED["pictures a second of one core"]["value"], None
    return record["pictures a second of one core"], {"file": path.name, "processor": record["machine"]["processor"], "date": record["date"]}


def seconds_of_sample(counts: dict, model: str, way: str, steps: dict, tokens: int = 19) -> dict[str, float]:
    "By the share of the peak that is assumed, or as measured, which was with captions of COCO's lengths."
    by_tokens, peak = counts[model]["operations of a sample, by tokens"], ASSUMED["peak, operations a second"]["value"]
    operations = by_tokens[str(tokens)][way]
    if model not in steps: return {f"at {share:.0%} of the peak": operations / share / peak for share in ASSUMED["shares of the peak that are reached"]["value"]}
    near = way if way in steps[model] else "masked 0.75"
    if (way, tokens) == (near, 19): return {"measured": steps[model][way]}
    return {"scaled from a measured step": steps[model][near] * operations / by_tokens["19"][near]}


def hours(counts: dict, steps: dict, core: float) -> list[dict]:
    "Hours of every run, way and number of GPUs, with nothing between them in the way; and those that the loader allows at best."
    rows, fed = [], 1 / (ASSUMED["cores for each GPU"]["value"] * core)                  # seconds a picture of a GPU's share of the loader
    for model in counts:
        for way in WAYS:
            for run, of in RUNS.items():
                times = seconds_of_sample(counts, model, way, steps, of["tokens"])
                operations = counts[model]["operations of a sample, by tokens"][str(of["tokens"])]
                samples, whole = of["pairs"] * of["epochs"], of["pictures"] * ("frozen" in way)          # a frozen target reads every picture once before
                share = operations["a whole picture, forward"] / operations[way]
                gpu_hours = {basis: (samples + whole * share) * seconds / 3600 for basis, seconds in times.items()}
                quick = min(times.values())
                loaded = (samples * max(quick, fed) + whole * max(quick * share, fed)) / 3600
                rows.append({
                    "model": model, "way": way, "run": run, "GPU-hours": gpu_hours, "hours": {str(gpus): {basis: each / gpus for basis, each in gpu_hours.items()} for gpus in GPUS},
                    "hours with loading, at best": {str(gpus): loaded / gpus for gpus in GPUS},
                })
    return rows


def link(gpus: int) -> float:
    "Bytes a second of the slowest link of a ring."
    return ASSUMED["link inside a node, bytes a second and direction" if gpus <= ASSUMED["GPUs of a node"]["value"] else "link between nodes, bytes a second and GPU"]["value"]


def exchange(counts: dict, steps: dict) -> list[dict]:
    "What travels between GPUs in a step of the masked objective, and how long it takes beside computing."
    rows, way, back = [], "masked 0.75", ASSUMED["share of a step that is the way back"]["value"]
    for model, of in counts.items():
        for gpus in GPUS[1:]:
            own = ASSUMED["pairs of a GPU"]["value"][model]
            batch, ring = own * gpus, (gpus - 1) / gpus
            sizes = {"gradients": 2 * ring * of["weights"] * 4, "features": 3 * ring * batch * of["width"] * 4, "pixels": ring * batch * 3 * of["pixels"][0] * of["pixels"][1]}
            seconds = {name: size / link(gpus) for name, size in sizes.items()}
            fastest = min(seconds_of_sample(counts, model, way, steps).values())
            rows.append({
                "model": model, "GPUs": gpus, "pairs of a GPU": own, "batch": batch, "bytes a GPU": {name: round(size) for name, size in sizes.items()},
                "seconds": seconds, "seconds of computing": fastest * own, "gradients hidden by the way back": seconds["gradients"] <= back * fastest * own,
                "least pairs of a GPU that hide the gradients": int(-(-seconds["gradients"] // (back * fastest))), "share in the open": (seconds["features"] + seconds["pixels"] + max(0.0, seconds["gradients"] - back * fastest * own)) / (fastest * own),
                "memory of the whole batch on each GPU, bytes": {"pixels as floats": batch * 3 * of["pixels"][0] * of["pixels"][1] * 4, "scores": batch * batch * 4},
                "steps of an epoch of COCO": RUNS["COCO, 10 epochs"]["pairs"] // batch,
            })
    return rows


def loading(counts: dict, steps: dict, core: float) -> list[dict]:
    "Pictures a second that a GPU wants, and the cores that it takes."
    rows = []
    for model in counts:
        for way in WAYS:
            for basis, seconds in seconds_of_sample(counts, model, way, steps).items():
                cores = 1 / seconds / core
                rows.append({"model": model, "way": way, "basis": basis, "pictures a second of a GPU": 1 / seconds, "cores a GPU": cores, "share of the speed that loading allows": min(1.0, ASSUMED["cores for each GPU"]["value"] / cores)})
    return rows


def estimate(counts: dict, steps: dict, core: float) -> dict:
    "Everything that follows from counts, assumptions and measurements."
    return {"hours": hours(counts, steps, core), "between GPUs": exchange(counts, steps), "loading": loading(counts, steps, core)}


def rounded(value):
    "Six digits are plenty."
    if isinstance(value, dict): return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recount", action="store_true", help="count operations again, though --out holds counts")
    parser.add_argument("--gpu-check", type=Path, default=ROOT / "results" / "gpu-check.json", metavar="FILE", help="step times of a GPU (default: results/gpu-check.json, where it is there)")
    parser.add_argument("--loader", type=Path, default=ROOT / "results" / "loader-speed.json", metavar="FILE", help="speed of the loader (default: results/loader-speed.json, where it is there)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "training-cost.json", metavar="FILE", help="JSON file for the record")
    args = parser.parse_args()
    held = read_json(args.out) if args.out.is_file() else {}
    if held and not args.recount: counts, counted = held["counts"], held["counted"]
    else: counts, counted = {model: count(model) for model in MODELS}, {key: value for key, value in provenance("FlopCounterMode", 0).items() if key in ("date", "versions")}
    steps, steps_from = measured_steps(args.gpu_check)
    core, core_from = measured_loader(args.loader)
    record = {
        "what": "an estimate on paper; what is not named under `measured` was measured nowhere", **provenance("python tools/training_cost.py", 0), "counted": counted, "counts": counts, "assumed": ASSUMED,
        "measured": {"step times": steps_from, "seconds a sample": steps or None, "loader": core_from, "pictures a second of one core": core if core_from else None}, "runs": RUNS, **rounded(estimate(counts, steps, core)),
    }
    write_json(args.out, record)
    print(json.dumps({key: record[key] for key in ("counts", "measured")}, indent=1))


if __name__ == "__main__": main()

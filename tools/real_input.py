"""Real pictures: tune and measure on the `shop` photographs and the `emoji` drawings, and store the tables in results/.

    python tools/real_input.py DATA [--sets shop emoji] [--seeds 0 1 2]

DATA holds the folders `shop` and `emoji`, each with pairs.csv, gallery.json and queries.dev.json. Runs live in build/ and are continued
or skipped when they are there; only numbers go into results/. One row takes five to ten minutes on one core.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

from pli.backbones import load_backbone
from pli.benchmarks import Benchmark, read_queries
from pli.cli import main as pli
from pli.core import PliError, provenance, read_json, write_json
from pli.evaluate import encode, outcomes_from, report, sweep
from pli.metrics import bootstrap, paired_bootstrap, paired_ratio, recall_at

ARMS = {   # row -> how it is tuned; every arm starts from the same weights and takes the same steps over the same pairs
    "control": ["--objective", "clip", "--hide", "none"],
    "random masking": ["--hide", "random:0.75"],
    "recolour + masking": ["--hide", "recolour+random:0.5"],
}
STEPS = {"shop": ["--steps", "250", "--batch-size", "256", "--learning-rate", "3e-4", "--checkpoint-every", "50"],
         "emoji": ["--steps", "200", "--batch-size", "128", "--learning-rate", "2e-4", "--checkpoint-every", "50"]}
FIRST = ["--objective", "clip", "--hide", "none", "--steps", "500", "--batch-size", "128", "--learning-rate", "1e-3", "--checkpoint-every", "100"]


def run(*words: object) -> None:
    "One `pli` command; stops when it fails."
    words = [str(word) for word in words]
    print("$ pli", *words, flush=True)
    if pli(words): raise SystemExit(1)


def start_model(data: Path, runs: Path) -> Path:
    "The model every arm starts from: the one that comes with the data, or a small CLIP trained on the pairs."
    if (data / "base").is_dir(): return data / "base"
    if not (runs / "start" / "last").is_dir(): run("tune", data / "pairs.csv", "--model", "pli-tiny-64", "--out", runs / "start", *FIRST, "--device", "cpu")
    return runs / "start" / "last"


def measure(queries: Benchmark, model: Path, out: Path) -> dict:
    "The reports of one model, a kind of query each with the composers chosen on that kind; from their file, or made now."
    if not out.exists():
        print(f"measuring {model}", flush=True)
        table = sweep(encode(load_backbone(model), queries), queries)
        write_json(out, {kind: report(table, queries, kind) for kind in sorted(set(queries.kinds))})
    return read_json(out)


def solved(reports: list[dict], kind: str, k: int) -> torch.Tensor:
    "For every query, the share of seeds that solve it at k with the composer chosen on its kind."
    return torch.stack([recall_at(outcomes_from(one[kind]).rank, k) for one in reports]).mean(0)


def row_of(reports: list[dict], control: list[dict], kinds: dict[str, torch.Tensor]) -> dict:
    "Recall per kind over all seeds, what each seed gave, and the paired comparison with the control."
    row = {"seeds": len(reports), "kinds": {}}
    for kind, rows in kinds.items():
        found = {"composers": [one[kind]["specs"]["best"] for one in reports]}
        for k in (1, 5, 10):
            mine, theirs = solved(reports, kind, k)[rows], solved(control, kind, k)[rows]
            found[f"recall@{k}"] = [round(100 * value, 2) for value in bootstrap(mine)]
            found[f"recall@{k} by seed"] = [round(100 * recall_at(outcomes_from(one[kind]).rank, k)[rows].mean().item(), 2) for one in reports]
            if reports is not control:
                found[f"recall@{k} minus control"] = [round(100 * value, 2) for value in paired_bootstrap(mine, theirs)]
                if theirs.any(): found[f"recall@{k} over control"] = [round(value, 3) if math.isfinite(value) else None for value in paired_ratio(mine, theirs)]
        found["families"] = {family: [round(sum(one[kind]["kinds"][kind]["composers"][family][f"recall@{k}"][0] for one in reports) / len(reports), 2) for k in (1, 10)]
                             for family in reports[0][kind]["specs"]}
        found["halves"] = [one[kind]["kinds"][kind]["halves"] for one in reports]
        row["kinds"][kind] = found
    return row


def study(name: str, root: Path, seeds: list[int], runs: Path, results: Path) -> None:
    "Train what is missing, measure, and write one small result file."
    data, runs = root / name, runs / name
    if not (data / "pairs.csv").is_file(): raise PliError(f"{data / 'pairs.csv'}: no such file; DATA is the folder that holds {name}/")
    model = start_model(data, runs)
    queries = read_queries(data / "queries.dev.json", data / "gallery.json")
    reports = {"start": [measure(queries, model, runs / "start.json")]}
    for seed in seeds:
        for arm, options in ARMS.items():
            folder = runs / f"{arm.replace(' + ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "last").is_dir():   # a run ends by writing it
                run("tune", data / "pairs.csv", "--model", model, "--out", folder, *options, *STEPS[name], "--seed", seed, "--device", "cpu")
            reports.setdefault(arm, []).append(measure(queries, folder / "last", folder.with_suffix(".json")))
    kinds = {kind: torch.tensor([k == kind for k in queries.kinds]) for kind in sorted(set(queries.kinds))}
    command = " ".join(["python tools/real_input.py DATA --sets", name, "--seeds", *map(str, seeds)])
    record = provenance(command, seeds[0]) | {
        "seeds": seeds, "queries": {kind: int(rows.sum()) for kind, rows in kinds.items()}, "gallery": len(queries.galleries[0]),
        "composers chosen on": "the other half of the queries of the same kind, by recall@10, over every composer and weight, for every row alike",
        "settings": {arm: " ".join(options + STEPS[name]) for arm, options in ARMS.items()},
        "rows": {arm: row_of(found, reports["control"], kinds) for arm, found in reports.items()}}
    write_json(results / f"{name}.json", record)
    for arm, row in record["rows"].items():
        print(arm, {kind: (found["recall@1"][0], found["recall@10"][0]) for kind, found in row["kinds"].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["shop", "emoji"], choices=["shop", "emoji"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("build"))
    args = parser.parse_args()
    try:
        for name in args.sets: study(name, args.data, args.seeds, args.runs, Path(__file__).parent.parent / "results")
    except PliError as error: sys.exit(f"real_input: {error}")


if __name__ == "__main__": main()

"""Two features a picture: what queries of a tuned model find on the start's features, on its own, and on both.

    pli study studies/shop-frozen.toml --data DATA --runs RUNS --out OUT --only "mixture, both towers" "mixture and CLIP loss, gallery tuned with it"
    python tools/two_features.py studies/shop-frozen.toml --data DATA --runs RUNS --arms "mixture, both towers" "mixture and CLIP loss, gallery tuned with it" --out results/two-features.json

A tuned model reads the queries: `sum:1` of its feature of the reference and of the words. The gallery is that of the start (frozen), of the tuned model
(tuned), or both: the mean of the two cosines, which is one product over features twice as wide. Plain search keeps the start's text tower and the start's
features in every case, and so stays as it was. Recall@10 in percent with its interval over queries, by kind; the models of a study are in its RUNS.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pli.backbones.loading import load_backbone
from pli.core import PliError, pick_device, provenance, write_json
from pli.evaluation.choosing import grouping_of, percent
from pli.evaluation.ranks import Features, encode, rank_queries
from pli.metrics import bootstrap, paired_bootstrap, recall_at
from pli.studies.data import load_study_data, with_pictures
from pli.studies.plan import read_plan
from pli.studies.results import end_of, finished
from pli.studies.run import jobs_of

COMPOSER = "sum:1"


def both(asked: Features, frozen: torch.Tensor) -> Features:
    "Features twice as wide, whose cosine with a query is the mean of the two."
    twice = lambda one, other: torch.cat([one, other], 1) / 2**0.5
    return Features(twice(frozen, asked.pictures), twice(asked.texts, asked.texts), references=twice(asked.pictures, asked.pictures))


def recall(features: Features, benchmark) -> dict[str, torch.Tensor]:
    "Whether each query of a kind finds a right answer among its first ten."
    found = recall_at(rank_queries(features, benchmark, COMPOSER).rank, 10).double()
    return {kind: found[rows] for kind, rows in grouping_of(benchmark).sections().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, metavar="PLAN.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder that the plan's paths start from")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the study's models")
    parser.add_argument("--arms", nargs="+", required=True, help="arms of the plan; every seed whose model lies in RUNS is measured")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the best that is there)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the record")
    args = parser.parse_args()
    device, plan = pick_device(args.device), read_plan(args.plan)
    jobs = [job for job in jobs_of(plan, args.arms) if job.name in args.arms]
    if wrong := [job.name for job in jobs if job.arm is None or job.arm.average]: raise PliError(f"--arms {', '.join(wrong)}: only an arm that is trained has models of its own")
    models = {(job.name, job.seed): (job, args.runs / job.folder) for job in jobs if (args.runs / job.folder / end_of(job.arm.settings)).is_dir()}
    if lacking := [arm for arm in args.arms if not any(name == arm for name, _ in models)]: raise PliError(f"{args.runs}: holds no model of {', '.join(lacking)}; run the study first")
    material = with_pictures(load_study_data(plan, args.data, device))
    benchmark, start = material.benchmark, material.start(None)
    for job, folder in models.values():
        if finished(folder, replace(job.arm.settings, seed=job.seed), start, material.pairs(job.arm.most_pairs)) is None: raise PliError(f"{folder}: is no finished run of {job.title} as the plan has it")
    untuned = encode(start, benchmark, material.pictures)
    base, found = recall(untuned, benchmark), {}
    for (arm, seed), (job, folder) in models.items():
        asked = encode(load_backbone(folder / end_of(job.arm.settings), device=device), benchmark, material.pictures)
        ways = {"frozen": replace(asked, pictures=untuned.pictures, references=asked.pictures), "tuned": asked, "both": both(asked, untuned.pictures)}
        values = {way: recall(features, benchmark) for way, features in ways.items()}
        found.setdefault(arm, {})[str(seed)] = {
            kind: {way: percent(bootstrap(values[way][kind])) for way in ways}
            | {f"{one} - {other}": percent(paired_bootstrap(values[one][kind], values[other][kind])) for one, other in (("both", "tuned"), ("both", "frozen"))}
            for kind in base
        }
    record = {
        "what": f"{plan.title}: recall@10 of {COMPOSER} by kind, a tuned model's queries on three galleries; percent, [value, low, high]",
        **provenance(f"python tools/two_features.py {args.plan} --data DATA --runs RUNS --arms " + " ".join(f'"{arm}"' for arm in args.arms), 0, device),
        "fingerprint of the start": material.print_of(plan, None), "queries digest": benchmark.digest(),
        "queries": {kind: len(rows) for kind, rows in base.items()}, "start": {kind: percent(bootstrap(rows)) for kind, rows in base.items()},
        "arms": found, "bytes of features a picture": {"one": 4 * start.width, "two": 8 * start.width},
    }
    if args.out: write_json(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    try: main()
    except PliError as error: sys.exit(f"two_features: {error}")

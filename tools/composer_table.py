"""Which composer a search should use where nobody names one: recall@10 of every composer, from the stored ranks of all studies.

    python tools/composer_table.py       # writes results/composers.json

A row of a study is a model: an arm with a seed. Its figure for a composer is recall@10, the mean over the kinds of queries; a study's is the mean over its models, untuned
(the start) and tuned apart; the last is the mean over kinds of data, so that four studies of the drawn world do not outvote one of photographs. Nothing is chosen on the queries
that it is reported on: each composer is a fixed one, with a fixed weight.
"""
import argparse
import sys
from pathlib import Path

from pli.core import PliError, provenance, write_json
from pli.evaluation.writers import format_text
from pli.studies.findings import Study, read_results
from pli.gallery.search import DEFAULT_COMPOSER
from pli.metrics import recall_at
from pli.studies.plan import read_plan

ROOT = Path(__file__).parent.parent
DATA = {"photographs": ("shop", "shop-longer"), "emoji": ("emoji",), "drawn": ("world", "world-shares", "world-captions-30", "world-captions-70", "world-captions-100")}   # data -> studies
STATES = ("untuned", "tuned")


def of_model(study: Study, arm: str, seed: int) -> dict[str, float]:
    "Recall@10 in percent of every composer, the mean over kinds."
    kinds = [rows for name, rows in study.kinds.items() if name != "all"] or list(study.kinds.values())
    hits = {spec: recall_at(ranks, 10).double() for spec, ranks in study.ranks(arm, seed).items()}
    return {spec: 100 * sum(found[rows].mean().item() for rows in kinds) / len(kinds) for spec, found in hits.items()}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    "The mean of every composer that all rows have."
    specs = [spec for spec in rows[0] if all(spec in row for row in rows)]
    return {spec: sum(row[spec] for row in rows) / len(rows) for spec in specs}


def of_study(study: Study) -> dict[str, dict]:
    "The models of a study, untuned and tuned."
    arms = {"untuned": [arm for arm in study.arms if arm == "start"], "tuned": [arm for arm in study.arms if arm != "start"]}
    rows = {state: [of_model(study, arm, seed) for arm in own for seed in study.seeds(arm)] for state, own in arms.items()}
    return {state: {"models": len(own), "recall@10": mean(own), "best composer of": counted(own)} for state, own in rows.items() if own}


def counted(rows: list[dict[str, float]]) -> dict[str, int]:
    "How many models each composer is the best of."
    best = [max(row, key=row.get) for row in rows]
    return {spec: best.count(spec) for spec in rows[0] if spec in best}


def by_data(studies: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:   # data -> state -> spec -> percent
    "The mean over the studies of each kind of data."
    own = lambda names, state: [studies[name][state]["recall@10"] for name in names if state in studies.get(name, {})]
    return {data: {state: mean(rows) for state in STATES if (rows := own(names, state))} for data, names in DATA.items() if any(name in studies for name in names)}


def table_of(studies: dict[str, dict]) -> dict[str, dict[str, float]]:   # state -> spec -> percent
    "The mean over kinds of data."
    found = by_data(studies)
    return {state: mean([rows[state] for rows in found.values() if state in rows]) for state in STATES}


def verdict(table: dict[str, dict[str, float]], spec: str) -> dict[str, dict]:
    "How a composer stands: what it reaches, what the best one does, and the difference in points."
    return {state: {"reaches": row[spec], "best": (best := max(row, key=row.get)), "which reaches": row[best], "loses": row[best] - row[spec]} for state, row in table.items()}


def rounded(found): return {key: rounded(value) for key, value in found.items()} if isinstance(found, dict) else round(found, 2) if isinstance(found, float) else found


def stored(root: Path = ROOT, data: tuple[str, ...] = tuple(DATA)) -> dict[str, dict]:
    "Every study that has results."
    there = [name for kind in data for name in DATA[kind] if any((root / "results" / "study" / name).glob("*.json"))]
    return {name: of_study(read_results(root / "results" / "study" / name, read_plan(root / "studies" / f"{name}.toml"))) for name in there}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "composers.json", metavar="FILE", help="JSON file for the record (default: results/composers.json)")
    args = parser.parse_args()
    try: studies = stored()
    except PliError as error: sys.exit(f"composer_table: {error}")
    table = table_of(studies)
    each = by_data(studies)
    columns = [(data, state) for data, found in each.items() for state in found]
    rows = [[spec, *(f"{table[state][spec]:.1f}" for state in STATES), *(f"{each[data][state][spec]:.1f}" for data, state in columns)] for spec in sorted(table["tuned"], key=lambda spec: -table["tuned"][spec])]
    print(format_text(["composer", *STATES, *(f"{data}: {state}" for data, state in columns)], rows))
    found = verdict(table, DEFAULT_COMPOSER)
    for state, told in found.items(): print(f"{state}: {DEFAULT_COMPOSER} reaches {told['reaches']:.1f}, the best, {told['best']}, {told['which reaches']:.1f}")
    write_json(args.out, provenance("python tools/composer_table.py", 0) | rounded({"default": {"composer": DEFAULT_COMPOSER} | found, "mean over data": table, "data": each, "studies": studies}))


if __name__ == "__main__": main()

"""Kill, fill, double and damage real commands, and look whether anything is lost or passes in silence: `tests/faults.py`, from the command line.

    python tools/faults.py --seconds 900 --out results/faults.json
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import faults  # noqa: E402

from pli.core import provenance, write_json  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=240, help="how long to go on (default: 240); the round that is going on is finished")
    parser.add_argument("--seed", type=int, default=0, help="decides commands, faults, places; a moment is only as exact as the machine's clock (default: 0)")
    parser.add_argument("--round", type=int, nargs="+", default=[], metavar="N", help="only these rounds, as a fault names them")
    parser.add_argument("--out", metavar="FILE", help="write what was done and found, as JSON")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    harness = faults.run(args.seconds, args.seed, args.round, lambda line: print(line, flush=True))
    print(harness.summary())
    if args.out:
        command = f"python tools/faults.py --seconds {args.seconds:g} --seed {args.seed}"
        write_json(args.out, provenance(command, args.seed) | {"summary": harness.summary(), "counts": dict(sorted(harness.counts.items())), "faults": harness.faults})
    return 1 if harness.faults else 0


if __name__ == "__main__": sys.exit(main())

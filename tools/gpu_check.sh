#!/usr/bin/env bash
# All that only a GPU can show, in at most 8 minutes: tools/gpu_check.sh [--device cuda] [--quick] [--out results/gpu-check.json]
# `tools/gpu_check.sh --device cpu --quick` rehearses it on a processor. PYTHON names another interpreter than the development environment's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv-dev/bin/python ]; then python=.venv-dev/bin/python; else python=python3; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" tools/gpu_check.py "$@"

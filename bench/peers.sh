#!/bin/sh
# Compare the losses with those of TRL, Liger Kernel, torchtune and TextBrewer, as PyPI has them, and write the section "Agreement" of RESULTS.md.
# They are no dependencies of this project, so they get an environment of their own: 1.5 GB, and two minutes where torch's CPU build is at hand.
# TRL comes with all that it asks for, the others without: their losses need torch alone, the rest of them triton, torchao or tensorboard.
# usage: bench/peers.sh [FOLDER OF THE ENVIRONMENT] [--no-write]     (default: build/peers, which `make clean` removes)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
env=$root/build/peers
case ${1:-} in ''|--*) ;; *) env=$1; shift;; esac
pip="$env/bin/python -m pip install -q"
[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
$pip torch==2.13.0 fastcore numpy tqdm
for p in trl liger-kernel torchtune textbrewer; do
    alone=--no-deps
    [ $p != trl ] || alone=
    if $pip $alone $p 2>"$env/$p.log"; then rm -f "$env/$p.why"; else grep ERROR "$env/$p.log" | tail -n 1 >"$env/$p.why"; fi
done
PYTHONPATH=$root "$env/bin/python" "$root/bench/peers.py" "$@"

#!/bin/sh
# Compare the losses with those of TRL, Liger Kernel, torchtune and TextBrewer, as PyPI has them. They are no dependencies of this project, so they get
# an environment of their own, of about 3 GB; one that cannot be installed is named in the table.
# usage: bench/peers.sh [FOLDER OF THE ENVIRONMENT]     (default: .peers in the root of the repository; delete it when done)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
env=${1:-$root/.peers}
[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
"$env/bin/pip" install -q torch==2.13.0 fastcore
for p in trl liger-kernel textbrewer torchtune; do "$env/bin/pip" install -q "$p" || echo "pip cannot install $p"; done
PYTHONPATH=$root "$env/bin/python" "$root/bench/peers.py"

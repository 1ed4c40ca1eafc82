#!/usr/bin/env bash
# Training a model of width 128 and four layers beside six busy processes: as it is, with threads that spin at every barrier as
# PyTorch's own do, and the Llama of transformers; each also on the quiet machine.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
python -m everlong.bench.busy 6 6

#!/usr/bin/env bash
# What `import everlong` adds to `import torch`, in new processes that take turns.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
python -m everlong.bench.startup 15

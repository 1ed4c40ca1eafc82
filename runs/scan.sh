#!/usr/bin/env bash
# The selective scan of Mamba-130M, 1 x 2048 x 1536 x 16 in fp32: against the loop that defines it, and its gradients' cost.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench ops --goals --ops selective_scan --cases mamba-130m --dtypes fp32 --seconds 20 --out runs/bench/scan

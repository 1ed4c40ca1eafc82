#!/usr/bin/env bash
# Sixteen rows decoded together against one, Mamba-130M, Mamba-2-130M and RWKV-7-0.1B.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --measure batch --weights fp32,bf16 --batches 1,4,16 --seconds 30 --out runs/bench/batch

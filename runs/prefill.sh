#!/usr/bin/env bash
# Mamba-130M reads a prompt of 2048 tokens in bf16, beside transformers (bf16) and llama.cpp (f16) on the same weights.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --models mamba-130m --measure prefill --weights bf16 --lengths 2048 \
  --against transformers,llama.cpp --seconds 120 --out runs/bench/prefill

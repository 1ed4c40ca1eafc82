#!/usr/bin/env bash
# Mamba-2-130M and RWKV-7-0.1B: prompts in bf16, decoding in four formats, beside the peers that have them.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --models mamba2-130m,rwkv7-0.1b --measure prefill --weights bf16 --lengths 2048 \
  --against transformers,llama.cpp --seconds 60 --out runs/bench/others-prefill
everlong bench models --goals --models mamba2-130m,rwkv7-0.1b --measure decode --contexts 512 \
  --against llama.cpp --seconds 60 --out runs/bench/others-decode

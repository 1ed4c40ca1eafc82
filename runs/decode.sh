#!/usr/bin/env bash
# Mamba-130M decodes one row in fp32, bf16, int8 and int4, beside llama.cpp (f32, f16, Q8_0, Q4_0) and the memory's limit.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --models mamba-130m --measure decode --contexts 512 \
  --against llama.cpp --seconds 60 --out runs/bench/decode

#!/usr/bin/env bash
# Models with attention decode one row: a Llama at four contexts beside llama.cpp, and hybrids shaped like RecurrentGemma
# and Jamba in bf16 and int4, each beside the memory's limit for weights, keys and values.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --models llama-124m --measure decode --weights bf16 --contexts 16,1024,8192,32768 \
  --against llama.cpp --seconds 60 --out runs/bench/llama
everlong bench models --goals --models griffin-200m,jamba-200m --measure decode --weights bf16,int4 --contexts 16,2048 \
  --seconds 30 --out runs/bench/hybrids

#!/usr/bin/env bash
# What length costs a Mamba-130M: prompts from 2K to 128K, tokens after 1K and after 128K, memory over 10K and 1M tokens.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --models mamba-130m --measure prefill,decode,memory --weights bf16 \
  --lengths 2048,8192,32768,131072 --contexts 1024,131072 --texts 10000,1000000 \
  --seconds 300 --minutes 120 --out runs/bench/growth

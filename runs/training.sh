#!/usr/bin/env bash
# Training at width 256, 6 layers, 4 x 512 bytes, in fp32 and bf16: ours beside the Llama and the Mamba of transformers.
# Its Mamba takes more than a minute for one step.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --measure training --against transformers --seconds 90 --out runs/bench/training

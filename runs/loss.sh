#!/usr/bin/env bash
# The loss over a vocabulary of 50,280 and its gradients, in memory, beside all logits at once.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
everlong bench models --goals --measure loss --out runs/bench/loss

#!/usr/bin/env bash
# What texts of new lengths cost a small Mamba: memory of 200 prompts, and training beside one length of as many tokens.
set -e
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
python -m everlong.bench.lengths 200 9

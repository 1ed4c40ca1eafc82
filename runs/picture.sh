#!/usr/bin/env bash
# docs/report.png: the top of the report that `make run` left in runs/compare, or of the report given, by a headless Chromium.
set -e
cd "$(dirname "$0")/.."
report=$(realpath "${1:-runs/compare/report.html}")
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,1907 --force-device-scale-factor=0.8 \
  --virtual-time-budget=10000   --screenshot="$PWD/docs/report.png" "file://$report?theme=light"

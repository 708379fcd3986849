#!/usr/bin/env bash
# The whole way on one machine by the command `qlora`: fetches the demo model (SmolLM2-135M-Instruct), measures it on the demo task,
# fine-tunes it with QLoRA while you watch, and measures it again. About five minutes on two CPU cores, after the build. Arguments go to
# `qlora train`.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(./scripts/demo-model.sh | tail -n 1)
cargo build --release --locked --package qlora-cli
qlora=${CARGO_TARGET_DIR:-target}/release/qlora
measure=("$qlora" eval --model "$model" --exact-match --max-new-tokens 48 --batch-size 25)

printf '\nBefore training:\n'
"${measure[@]}" examples/data/demo_heldout.jsonl
printf '\n'
"$qlora" train examples/quickstart.toml --set "model.model_name_or_path=$model" "$@"
printf '\nAfter it:\n'
"${measure[@]}" --adapter output/quickstart examples/data/demo_heldout.jsonl

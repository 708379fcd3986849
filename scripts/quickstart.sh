#!/usr/bin/env bash
# The whole way on one machine: fetches the demo model (SmolLM2-135M-Instruct), measures it on the demo task, fine-tunes it
# with QLoRA while you watch, and measures it again. About five minutes on two CPU cores, after the build.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(./scripts/demo-model.sh | tail -n 1)
cargo build --release --locked --example quickstart
exec ./target/release/examples/quickstart --model "$model" "$@"

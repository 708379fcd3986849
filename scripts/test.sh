#!/usr/bin/env bash
# Fetches the demo model if it is not there, and runs all tests. Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/demo-model.sh
cargo test --workspace --locked "$@"

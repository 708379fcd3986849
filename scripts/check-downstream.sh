#!/usr/bin/env bash
# Builds and runs the crates outside the workspace that depend on `qlora` by path, as users' crates do: a model of their own
# (tests/downstream) and a training loop of their own (tests/downstream_loop).
set -euo pipefail
cd "$(dirname "$0")/.."
for crate in downstream downstream_loop; do
  # The same dependency versions and target folder as the workspace, so that only the crate itself is compiled.
  cp Cargo.lock "tests/$crate/Cargo.lock"
  CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target} cargo run --quiet --manifest-path "tests/$crate/Cargo.toml"
done

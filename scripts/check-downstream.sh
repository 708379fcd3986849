#!/usr/bin/env bash
# Builds and runs a crate outside the workspace that depends on `qlora` by path, as a user's crate does.
set -euo pipefail
cd "$(dirname "$0")/.."
# The same dependency versions and target folder as the workspace, so that only the crate itself is compiled.
cp Cargo.lock tests/downstream/Cargo.lock
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target} cargo run --quiet --manifest-path tests/downstream/Cargo.toml

#!/usr/bin/env bash
# Packages every crate as crates.io would get it, builds each package, and checks that the kernels' sources travel along.
set -euo pipefail
cd "$(dirname "$0")/.."
# cargo unpacks our packages by name and version, and would build what it unpacked in an earlier run.
rm -rf "${CARGO_HOME:-$HOME/.cargo}"/registry/{src,cache}/*/qlora-{kernels,core,trainer}-*
cargo package --workspace --locked --allow-dirty
cargo package --list -p qlora-kernels --allow-dirty | grep -q '^kernels/' || {
    echo "the package of qlora-kernels lacks kernels/" >&2
    exit 1
}

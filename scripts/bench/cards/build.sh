#!/usr/bin/env bash
# Packs the CUDA tests for every card's suite (suites.sh): binaries that hold the intermediate code (PTX) of one architecture
# and nothing else, so that the driver of a newer GPU has to translate it.
#
#   scripts/bench/cards/build.sh [--out DIR] [ARCHITECTURE ...]       75 80 86 89 90 unless given
#
# Writes DIR/qlora-gpu-75.tar.xz and so on (target/cards unless given). candle's own kernels are built for the same
# architecture. Each takes the time of a full build: some 15 minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

out=${CARGO_TARGET_DIR:-target}/cards
if [ "${1:-}" = --out ]; then
    out=$2
    shift 2
fi
mkdir -p "$out"
[ $# -gt 0 ] || set -- 75 80 86 89 90
for architecture in "$@"; do
    # candle has no bf16 below 80: its code for 75 is that of f16 and f32.
    QLORA_CUDA_PTX_ONLY=$architecture CUDA_COMPUTE_CAP=$architecture \
        scripts/gpu-bundle.sh --no-benches --out "$out/qlora-gpu-$architecture.tar.xz"
done

#!/usr/bin/env bash
# Builds programs that run on every supported NVIDIA GPU, and checks what is in them.
#
#   scripts/build-cuda.sh [cargo build's options]      such as --example finetune; the command qlora unless given
#
# Our kernels are compiled for each of $QLORA_CUDA_ARCHS; candle's exist once a program and are made for $CUDA_COMPUTE_CAP, the
# oldest of them, as PTX that the driver translates. The defaults are what the toolkit knows: with CUDA 13 the newest, with CUDA 11.8
# up to 90. The toolkit is the one on the PATH or in $CUDA_HOME (scripts/cuda-toolkit.sh and scripts/cuda-toolkit-11.sh make one
# without root).
#
# book/src/guide/cuda-builds.md says which driver a program then needs, how large it is and how long this takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p') || true
read -r major minor <<<"${release:-0 0}"
# The oldest driver that takes this toolkit's PTX; scripts/cuda-modules.py checks it against what is in the program.
case $major.$minor in
11.8) archs="75 80 86 89 90" driver=520 ;;
13.0) archs="75 80 86 89 90 100 120" driver=580 ;;
0.0) echo "build-cuda: $nvcc does not run: which toolkit? scripts/cuda-toolkit.sh makes one" >&2 && exit 1 ;;
*) archs= driver= && : "${QLORA_CUDA_ARCHS:?"CUDA $major.$minor is not one this script knows: say for which architectures"}" ;;
esac
# Of those, what the kernels are written for.
first=$(sed -n 's/^const OLDEST: u32 = \([0-9]*\);/\1/p' crates/qlora-kernels/build.rs)
archs=$(for arch in $archs; do [ "$arch" -lt "$first" ] || echo "$arch"; done | paste -sd, -)
export QLORA_CUDA_ARCHS=${QLORA_CUDA_ARCHS:-$archs}
oldest=$(tr ',' '\n' <<<"$QLORA_CUDA_ARCHS" | sort -n | head -n 1)
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-$oldest}

echo "build-cuda: CUDA $major.$minor, our kernels for $QLORA_CUDA_ARCHS, candle's for $CUDA_COMPUTE_CAP" >&2
[ $# -gt 0 ] || set -- -p qlora-cli
start=$SECONDS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
messages=$work/messages
cargo build --release --locked --features cuda --message-format=json-render-diagnostics "$@" >"$messages"
echo "build-cuda: built in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s" >&2

programs=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' "$messages" | sort -u)
[ -n "$programs" ] || { echo "build-cuda: no program was built" >&2 && exit 1; }
for program in $programs; do
    strip -o "$work/stripped" "$program"
    megabytes() { echo $(($(stat -c %s "$1") / 1000000)); }
    echo "$program: $(megabytes "$program") MB, $(megabytes "$work/stripped") MB stripped"
    scripts/cuda-modules.py "$program" --expect "$QLORA_CUDA_ARCHS" ${driver:+--driver "$driver"}
done

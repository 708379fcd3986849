#!/usr/bin/env bash
# Checks, without a GPU, what the kernels' launchers choose under the limits of every card: kernels/launches/launches.cpp runs
# on the host alone, with a stand-in for the CUDA runtime that records launches.
#
#   scripts/check-launches.sh [--write] [--objects DIR]
#
# Under every architecture's limits no launch may ask for more shared memory or threads than there are, no launcher may leave
# an error behind, and those that have no other way must take every shape. For an H200 the launches (kernel, grid, block,
# shared memory) have to be those of kernels/launches/h200.txt.gz; --write replaces them, for a change that means to.
#
# Needs the CUDA toolkit (scripts/cuda-toolkit.sh; source its env.sh) and compiles the kernels for Hopper, hardly optimized (only
# their static shared memory counts): some minutes the first time. --objects names a folder of <kernel>.o that are compiled
# already (for 90a, with QLORA_HOPPER).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

write='' objects=''
while [ $# -gt 0 ]; do
    case $1 in
    --write) write=1 ;;
    --objects) objects=$2 && shift ;;
    *) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
    esac
    shift
done
home=${CUDA_HOME:-/usr/local/cuda}
kernels=(attention_forward attention_backward cross_entropy lora_ds_db nf4_gemv nf4_gemv16 nf4_small_gemm bf16_gemv
    decode_attention rms_norm dequantize_4bit)
work=${CARGO_TARGET_DIR:-target}/launches
mkdir -p "$work"

if [ -z "$objects" ]; then
    objects=$work
    for kernel in "${kernels[@]}"; do
        # Headers count as changes of everything.
        if [ -e "$work/$kernel.o" ]; then
            newer=$(find kernels -maxdepth 1 \( -name "$kernel.cu" -o -name '*.cuh' \) -newer "$work/$kernel.o")
            [ -n "$newer" ] || continue
        fi
        suffix='' hopper=''
        if grep -q '#include "wgmma.cuh"' "kernels/$kernel.cu"; then
            suffix=a hopper=-DQLORA_HOPPER
        fi
        "$home/bin/nvcc" -O1 -Xptxas -O0 -std=c++17 --expt-relaxed-constexpr ${hopper:+"$hopper"} \
            "-gencode=arch=compute_90$suffix,code=sm_90$suffix" -c "kernels/$kernel.cu" -o "$work/$kernel.o" \
            >"$work/$kernel.log" 2>&1 || { cat "$work/$kernel.log" && exit 1; }
    done
fi
program=$work/launches
files=()
for kernel in "${kernels[@]}"; do files+=("$objects/$kernel.o"); done
${CXX:-g++} -std=c++17 -O1 -I "$home/include" kernels/launches/launches.cpp kernels/launches/fake_runtime.cpp \
    "${files[@]}" -o "$program"

kept=kernels/launches/h200.txt.gz
"$program" 90 132 >"$work/h200.txt"
if [ -n "$write" ]; then
    gzip -9n <"$work/h200.txt" >"$kept"
elif ! diff <(gzip -dc "$kept") "$work/h200.txt" >"$work/h200.diff"; then
    head -n 20 "$work/h200.diff"
    echo "the launches on an H200 changed: $work/h200.diff has all of it (--write keeps the new ones)"
    exit 1
fi
# T4, A100, RTX 3060, RTX 4090, B200, RTX 5090.
for card in "75 40" "80 108" "86 28" "89 128" "100 148" "120 170"; do
    # shellcheck disable=SC2086
    "$program" $card >"$work/${card%% *}.txt"
done

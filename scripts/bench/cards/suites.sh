#!/usr/bin/env bash
# Runs the CUDA tests as they would run on other cards, on one Hopper GPU: binaries with one architecture's intermediate code
# alone (build.sh), translated by the driver, under the limits of that architecture (QLORA_DEVICE_LIMITS).
#
#   scripts/bench/cards/suites.sh [--out DIR] [--timeout SECONDS] FOLDER
#
# FOLDER holds the archives of build.sh, qlora-gpu-75.tar.xz and so on. For each: the whole suite with our own attention
# (cuDNN hidden) and once more with cuDNN; the code of 89 also under the limits of 12.0 (RTX 50). Writes DIR/suites.csv
# (results unless given), one line a run: code, limits, cuDNN, tests that passed, failed and were ignored, binaries that
# failed, seconds. A run's logs are beside it. Fails if a test or a binary failed, or if a run had no tests.
set -uo pipefail

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
out=results limit=1800
while [ $# -gt 1 ]; do
    case $1 in
    --out) out=$2 ;;
    --timeout) limit=$2 ;;
    *) break ;;
    esac
    shift 2
done
if [ $# != 1 ] || [ ! -d "$1" ]; then
    usage
    exit 2
fi
folder=$(cd "$1" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Cards of each architecture: T4, A100, RTX 3060, RTX 4090; a Hopper has its own limits.
limits_of() {
    case $1 in
    75) echo "sm=75,sms=40" ;;
    80) echo "sm=80,sms=108" ;;
    86) echo "sm=86,sms=28" ;;
    89) echo "sm=89,sms=128" ;;
    90) echo "sm=90" ;;
    120) echo "sm=120,sms=170" ;;
    esac
}

echo "code,limits,cudnn,passed,failed,ignored,binaries_failed,seconds" >"$out/suites.csv"
bad=0
# run CODE ARCHITECTURE CUDNN
run() {
    local code=$1 limits name=$1-as-$2-cudnn-$3 start=$SECONDS
    limits=$(limits_of "$2")
    local -a settings=("CUDA_FORCE_PTX_JIT=1" "QLORA_DEVICE_LIMITS=$limits" "QLORA_REQUIRE_GPU=1")
    # No library lies there: our own kernels run.
    [ "$3" = on ] || settings+=("QLORA_CUDNN_PATH=/nonexistent")
    env "${settings[@]}" "$work/$code/qlora-gpu/run.sh" --no-benches --timeout "$limit" --out "$out/$name" \
        >"$out/$name.log" 2>&1
    local passed failed ignored binaries
    count() {
        grep -hE '^test result' "$out/$name"/test-*.txt 2>/dev/null |
            sed -E "s/.* ([0-9]+) $1;.*/\1/" | awk '{ sum += $1 } END { print sum + 0 }'
    }
    passed=$(count passed) failed=$(count failed) ignored=$(count ignored)
    binaries=$(grep -c '^FAILED' "$out/$name.log")
    echo "$code,\"$limits\",$3,$passed,$failed,$ignored,$binaries,$((SECONDS - start))" | tee -a "$out/suites.csv"
    [ "$passed" -gt 0 ] && [ "$failed" = 0 ] && [ "$binaries" = 0 ] || bad=1
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
found=0
for archive in "$folder"/qlora-gpu-*.tar.xz; do
    [ -e "$archive" ] || continue
    found=1
    code=$(basename "$archive" .tar.xz)
    code=${code#qlora-gpu-}
    mkdir "$work/$code"
    tar -xf "$archive" -C "$work/$code"
    for cudnn in off on; do run "$code" "$code" "$cudnn"; done
    [ "$code" != 89 ] || run 89 120 off
    rm -rf "${work:?}/$code"
done
if [ $found = 0 ]; then
    echo "no qlora-gpu-*.tar.xz in $folder: build.sh writes them"
    exit 2
fi
exit $bad

#!/usr/bin/env bash
# Runs every CUDA test of the kernels under compute-sanitizer, each by itself: memcheck, racecheck and initcheck.
#
#   scripts/bench/cards/sanitize.sh [--out DIR] [--tools "memcheck racecheck initcheck"] [--timeout SECONDS] [--jobs N] CUDA_OPS
#
# CUDA_OPS is the test binary of that name (target/debug/deps/cuda_ops-*, or tests/qlora-kernels--cuda_ops of a bundle).
# Writes DIR/sanitizer.csv (results unless given), one line a test and tool: test, tool, findings, others, status, seconds. A finding
# is an error of the sanitizer; others are those inside kernels of cuBLASLt, which synchronize by means that racecheck does not see; a test that fails or runs out of time has its status there. Tests that start other
# processes or take gigabytes (`memory`, `huge`, `nccl`) are left to the ordinary suites. N tests run at a time, over the GPUs there are.
# Fails on any finding or failed test.
set -uo pipefail

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
out=results tools="memcheck racecheck initcheck" limit=1200 jobs=1
while [ $# -gt 1 ]; do
    case $1 in
    --out) out=$2 ;;
    --tools) tools=$2 ;;
    --timeout) limit=$2 ;;
    --jobs) jobs=$2 ;;
    *) break ;;
    esac
    shift 2
done
if [ $# != 1 ] || [ ! -x "$1" ]; then
    usage
    exit 2
fi
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"
    exit 2
fi
binary=$1
mkdir -p "$out"
mapfile -t tests < <("$binary" --list 2>/dev/null | sed -n 's/: test$//p' | grep -vE '^(memory|huge|harness|nccl)::')
if [ ${#tests[@]} = 0 ]; then
    echo "$binary lists no tests: was it built with the feature cuda?"
    exit 2
fi

echo "test,tool,findings,others,status,seconds" >"$out/sanitizer.csv"
gpus=$(nvidia-smi --list-gpus | wc -l)
# one NUMBER TEST TOOL: a line of the table
one() {
    local test=$2 tool=$3 start=$SECONDS log=$out/$3-${2//::/-}.log
    # 86 is the status of a finding; the pool's memory is looked at by allocation.
    local options=(--tool "$tool" --error-exitcode 86 --print-limit 20)
    case $tool in
    memcheck) options+=(--leak-check no) ;;
    esac
    CUDA_VISIBLE_DEVICES=$(($1 % gpus)) QLORA_REQUIRE_GPU=1 timeout "$limit" compute-sanitizer "${options[@]}" \
        "$binary" --exact "$test" --test-threads=1 >"$log" 2>&1
    local status=$? findings others
    # Without a summary the sanitizer did not get to the end.
    findings=$(sed -nE 's/^=+ (ERROR SUMMARY: ([0-9]+) error.*|RACECHECK SUMMARY: ([0-9]+) hazard.*)/\2\3/p' "$log" |
        awk '{ sum += $1 } END { print NR ? sum : "none" }')
    others=$(grep -cE 'Race reported between (Read|Write) access at nvjet_' "$log")
    if [ "$findings" != none ] && [ "$others" -gt 0 ]; then
        findings=$((findings - others))
        [ "$findings" != 0 ] || [ "$status" != 86 ] || status=0
    fi
    grep -q '^test result: ok. 1 passed' "$log" || status="$status: no test passed"
    echo "$test,$tool,$findings,$others,$status,$((SECONDS - start))" | tee -a "$out/sanitizer.csv"
}
export -f one
export out binary limit gpus
for tool in $tools; do printf "%s $tool\n" "${tests[@]}"; done |
    awk '{ print NR, $0 }' | xargs -P "$jobs" -L 1 bash -c 'one "$@"' one
# A line of every test and tool, without a finding.
lines=$(grep -cE ',0,[0-9]+,0,[0-9]+$' "$out/sanitizer.csv")
[ "$lines" = $((${#tests[@]} * $(wc -w <<<"$tools"))) ]

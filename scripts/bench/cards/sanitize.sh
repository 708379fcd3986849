#!/usr/bin/env bash
# Runs every CUDA test of the kernels under compute-sanitizer, each by itself: memcheck, racecheck and initcheck.
#
#   scripts/bench/cards/sanitize.sh [--out DIR] [--tools "memcheck racecheck initcheck"] [--timeout SECONDS] CUDA_OPS
#
# CUDA_OPS is the test binary of that name (target/debug/deps/cuda_ops-*, or tests/qlora-kernels--cuda_ops of a bundle).
# Writes DIR/sanitizer.csv (results unless given), one line a test and tool: test, tool, findings, status, seconds. A finding
# is an error of the sanitizer; a test that fails or runs out of time has its status there. Tests that start other
# processes or take gigabytes (`memory`, `huge`) are left to the ordinary suites. Fails on any finding or failed test.
set -uo pipefail

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
out=results tools="memcheck racecheck initcheck" limit=1200
while [ $# -gt 1 ]; do
    case $1 in
    --out) out=$2 ;;
    --tools) tools=$2 ;;
    --timeout) limit=$2 ;;
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
mapfile -t tests < <("$binary" --list 2>/dev/null | sed -n 's/: test$//p' | grep -vE '^(memory|huge|harness)::')
if [ ${#tests[@]} = 0 ]; then
    echo "$binary lists no tests: was it built with the feature cuda?"
    exit 2
fi

echo "test,tool,findings,status,seconds" >"$out/sanitizer.csv"
bad=0
for test in "${tests[@]}"; do
    for tool in $tools; do
        start=$SECONDS log=$out/$tool-${test//::/-}.log
        # 86 is the status of a finding; the pool's memory is looked at by allocation.
        options=(--tool "$tool" --error-exitcode 86 --print-limit 20)
        case $tool in
        memcheck) options+=(--leak-check no) ;;
        initcheck) options+=(--track-unused-memory no) ;;
        esac
        QLORA_REQUIRE_GPU=1 timeout "$limit" compute-sanitizer "${options[@]}" \
            "$binary" --exact "$test" --test-threads=1 >"$log" 2>&1
        status=$?
        findings=$(sed -nE 's/^=+ (ERROR SUMMARY: ([0-9]+) error.*|RACECHECK SUMMARY: ([0-9]+) hazard.*)/\2\3/p' "$log" |
            awk '{ sum += $1 } END { print NR ? sum : "none" }')
        # Without a summary the sanitizer did not get to the end.
        [ "$status" = 0 ] && [ "$findings" = 0 ] || bad=1
        grep -q '^test result: ok. 1 passed' "$log" || bad=1
        echo "$test,$tool,$findings,$status,$((SECONDS - start))" | tee -a "$out/sanitizer.csv"
    done
done
exit $bad

#!/usr/bin/env bash
# Kills a run of `finetune` again and again, resumes it each time, and compares where it ends with a run that nobody killed:
# adapter, optimizer and log must have the same bits.
#
#     scripts/kill-resume.sh target/release/examples/finetune my.toml 100
#     scripts/kill-resume.sh target/release/examples/finetune my.toml 30 --set training.full_determinism=true
#
# Arguments after the number of kills go to the program. SIGKILL comes at random moments: most while it trains, every tenth while
# it starts, every third as soon as a checkpoint is being written. A run that comes to its end is compared, and the next one
# begins; after the last kill the run goes on to its end. Environment: SEED (of the moments, 1), WORK (folder for the runs, a
# temporary one), LOG (WORK/kill-resume.log). Small `save_steps` make for many checkpoints. Ends with 1 if anything differs.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
fi
program=$1 config=$2 kills=$3
shift 3
seed=${SEED:-1}
RANDOM=$seed
work=${WORK:-$(mktemp -d)}
log=${LOG:-$work/kill-resume.log}
mkdir -p "$work"
reference=$work/reference out=$work/run
rm -rf "$reference" "$out"
: >"$log"

say() { printf '%s\n' "$*" | tee -a "$log"; }
now() { echo $(($(date +%s%N) / 1000000)); }
below() { echo $(((RANDOM * 32768 + RANDOM) % ($1 > 0 ? $1 : 1))); }
pause() { sleep "$(printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)))"; }
alive() { kill -0 "$1" 2>/dev/null; }
# In place of the shell, so that the signal reaches it.
run() {
    exec "$program" "$config" "${@:2}" --set "training.output_dir=$1" --set training.resume_from_checkpoint=true \
        --set training.overwrite_output_dir=false >"$1.stdout" 2>"$1.stderr"
}
latest() { (cd "$1" 2>/dev/null && ls -d checkpoint-* 2>/dev/null | grep -E '^checkpoint-[0-9]+$' | sort -t- -k2 -n | tail -1) || true; }
leftovers() { (cd "$1" 2>/dev/null && ls -d ./*.tmp-* 2>/dev/null | head -1 | cut -c3-) || true; }
# The log without what differs from run to run.
steps() { sed -E 's/,"(tokens_per_second|peak_memory|anonymous_memory|gpu_peak_memory|eval_runtime)":[^,}]*//g' "$1/metrics.jsonl"; }

failed() {
    say "FAILED: $*"
    tail -5 "$out.stderr" | tee -a "$log"
    exit 1
}

runs=0 hit=0 killed=0
compare() {
    cmp -s "$reference/adapter_model.safetensors" "$out/adapter_model.safetensors" || failed "the adapter of run $runs differs"
    cmp -s "$reference/$last/optimizer.safetensors" "$out/$last/optimizer.safetensors" || failed "the optimizer of run $runs differs"
    cmp -s <(steps "$reference") <(steps "$out") || failed "the log of run $runs differs"
    [ -z "$(leftovers "$out")" ] || failed "run $runs left $(leftovers "$out")"
    runs=$((runs + 1)) killed=$((killed + hit)) hit=0
    rm -rf "$out"
}

say "program: $(basename "$program"), configuration: $(basename "$config"), arguments: $*, kills: $kills, seed: $seed"
begin=$(now)
(run "$reference" "$@") &
pid=$!
until [ -s "$reference/metrics.jsonl" ] || ! alive $pid; do sleep 0.005; done
first=$(($(now) - begin))
wait $pid || { tail -5 "$reference.stderr"; exit 1; }
whole=$(($(now) - begin))
last=$(latest "$reference")
say "uninterrupted: first step after $first ms, end after $whole ms at $last, adapter $(sha256sum <"$reference/adapter_model.safetensors" | cut -c1-16)"

count=0 saving=0 starting=0
while [ "$count" -lt "$kills" ]; do
    number=$((count + 1))
    (run "$out" "$@") &
    pid=$!
    begin=$(now)
    if [ $((number % 10)) -eq 0 ]; then
        pause "$(below "$first")"
    else
        pause $((first * 3 / 4 + $(below $((whole - first * 3 / 4)))))
        if [ $((number % 3)) -eq 0 ]; then
            # Within the next checkpoint; at any moment of it by the chance of when this loop looks.
            while alive $pid && ! compgen -G "$out/checkpoint-*.tmp-*" >/dev/null; do :; done
        fi
    fi
    kill -KILL $pid || true
    status=0
    wait $pid || status=$?
    case $status in
    137)
        count=$number hit=1
        after=$(($(now) - begin)) left=$(leftovers "$out") at=$(latest "$out")
        [ -z "$left" ] || saving=$((saving + 1))
        [ -n "$at" ] || starting=$((starting + 1))
        say "kill $count: run $runs, after $after ms, latest ${at:-none}${left:+, while writing ${left%%.tmp-*}}"
        ;;
    0) compare ;;
    *) failed "run $runs ended with status $status" ;;
    esac
    # Bash reports every killed job.
done 2>/dev/null
(run "$out" "$@") || failed "run $runs ended with an error"
compare
say "$kills kills ($saving while writing, $starting before the first checkpoint) of $killed runs: every adapter, optimizer and log is the uninterrupted run's, bit for bit"

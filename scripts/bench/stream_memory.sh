#!/usr/bin/env bash
# What data that is streamed takes of memory: rows are made while they are read, so the disk need not hold them. Fails at 256 MB.
#
#     scripts/bench/stream_memory.sh 3       # GB
set -euo pipefail
cd "$(dirname "$0")/../.."
STREAM_GB=${1:-3} cargo test -p qlora-trainer --lib -- --ignored --nocapture --exact \
    data::stream::tests::memory_does_not_grow_with_the_data

#!/usr/bin/env bash
# How fast rows are ready to train on, against the tokenizer's encode_batch on the same rows and cores. Fails below 90%.
#
#     scripts/bench/load_rows.sh 1000000       # rows
set -euo pipefail
cd "$(dirname "$0")/../.."
TOKENIZER=$(scripts/demo-model.sh | tail -1) ROWS=${1:-1000000} cargo test -p qlora-trainer --lib -- --ignored --nocapture --exact \
    data::load::tests::rows_are_ready_about_as_fast_as_they_are_tokenized

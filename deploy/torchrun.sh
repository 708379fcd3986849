#!/usr/bin/env bash
# Ranks started by torchrun, on one host or several. On every host the same, with its number:
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 deploy/torchrun.sh qlora.toml
#
# Arguments go to `qlora train`. NPROC_PER_NODE: processes a host (gpu: one for each). MAX_RESTARTS: how often torchrun starts all ranks
# again after one failed; they go on from the last checkpoint. Without it, and on one host, `qlora train --nproc-per-node auto` does the
# same without PyTorch. (`--` keeps torchrun from taking options such as --r for its own.)
set -euo pipefail
exec "${TORCHRUN:-torchrun}" --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --max-restarts "${MAX_RESTARTS:-3}" --no-python -- \
    "${QLORA:-qlora}" train "$@" --resume-from-checkpoint true

#!/usr/bin/env bash
# Ranks started by Open MPI: a process for each slot of the hosts.
#
#     HOSTFILE=hosts deploy/openmpi.sh qlora.toml          # lines of `host slots=8`; the first host has rank 0
#     NP=2 deploy/openmpi.sh qlora.toml                    # this host alone
#
# Arguments go to `qlora train`. Of MPI only the starting is used: ranks find each other at MASTER_ADDR, and gradients go over NCCL.
set -euo pipefail
options=(--bind-to none -x PATH -x LD_LIBRARY_PATH)
if [ -n "${HOSTFILE:-}" ]; then
    first=$(sed -E 's/#.*//; s/[[:space:]].*//' "$HOSTFILE" | grep -m1 .)
    options+=(--hostfile "$HOSTFILE" -x "MASTER_ADDR=${MASTER_ADDR:-$first}")
fi
[ -z "${NP:-}" ] || options+=(-n "$NP")
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
for name in HF_HOME HF_TOKEN HF_HUB_OFFLINE NCCL_DEBUG NCCL_SOCKET_IFNAME QLORA_NCCL_PATH; do
    [ -z "${!name+set}" ] || options+=(-x "$name")
done
exec "${MPIRUN:-mpirun}" "${options[@]}" "${QLORA:-qlora}" train "$@" --resume-from-checkpoint true

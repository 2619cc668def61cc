#!/usr/bin/env bash
# An evaluation by several processes of this machine: a pod in small, or one process a GPU.
#
#   configs/pods/local.sh COUNT CONFIG OUT [flags of kvjax eval]
#   configs/pods/local.sh 2 configs/eval/tiny.toml results/tiny
#
# On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=4 gives each process four devices; with
# GPUS=1 process i sees GPU i alone. PORT is where they meet.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
count=$1 config=$2 out=$3
shift 3
export KVJAX_PROCESSES=$count JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-9911}
pids=()
for ((i = 0; i < count; i++)); do
  KVJAX_PROCESS=$i ${GPUS:+env CUDA_VISIBLE_DEVICES=$i} \
    "${PYTHON:-python}" -m kvjax.cli eval --config "$config" --out "$out" --distributed "$@" &
  pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null' EXIT
for pid in "${pids[@]}"; do wait "$pid"; done
trap - EXIT

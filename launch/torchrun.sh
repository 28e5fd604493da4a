#!/usr/bin/env bash
# Starts the ranks of this node under torchrun. With several nodes, run it on each node with the same RDZV_ENDPOINT. When a
# rank dies, the ranks of all nodes restart, at most MAX_RESTARTS times, and resume from the newest intact checkpoint.
#
#   launch/torchrun.sh [--dry-run] X.yaml [KEY=VALUE]...
#
# Environment variables, with defaults:
#   NPROC_PER_NODE  ranks on this node: a number, or auto (one for each GPU, or for each CPU without GPUs)   [auto]
#   NNODES          number of nodes                                                      [1]
#   RDZV_ENDPOINT   HOST:PORT of the rendezvous, the same on every node; required if NNODES > 1
#   RDZV_IS_HOST    1 on the node HOST, 0 on the others                     [torchrun compares host names]
#   LOCAL_ADDR      name or address of this node that the other nodes can reach          [its host name]
#   RDZV_ID         name of the job, the same on every node                              [flagscale-like]
#   MAX_RESTARTS    maximum number of restarts of all ranks                              [3]
#   PYTHON          Python interpreter in which flagscale_like is installed              [python3]
# Kubeflow's training operator sets PET_NNODES, PET_NPROC_PER_NODE, PET_RDZV_ENDPOINT and PET_RDZV_ID instead.
#
# On SIGTERM, the ranks finish the step, save and stop. torchrun kills remaining ranks after 30 s, so resilience.grace_s must
# be shorter.
# Example: NPROC_PER_NODE=8 launch/torchrun.sh examples/aquila2/7b.yaml parallel.tp=2 parallel.sp=true
set -euo pipefail

fail() { echo "error: $*" >&2; exit 10; }

dry_run=
if [[ ${1-} == --dry-run ]]; then dry_run=1; shift; fi
(($# >= 1)) || fail "usage: launch/torchrun.sh [--dry-run] X.yaml [KEY=VALUE]..."

nodes=${NNODES:-${PET_NNODES:-1}}
ranks=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-auto}}
endpoint=${RDZV_ENDPOINT:-${PET_RDZV_ENDPOINT:-}}
restarts=${MAX_RESTARTS:-3}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES ($nodes) must be a number"
[[ $ranks =~ ^([1-9][0-9]*|auto|gpu|cpu)$ ]] || fail "NPROC_PER_NODE ($ranks) must be a number, or auto"
[[ $restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS ($restarts) must be a number"

if [[ $nodes == 1 ]]; then endpoint=${endpoint:-localhost:0}; fi # port 0: any free port
[[ -n $endpoint ]] || fail "NNODES is $nodes: give RDZV_ENDPOINT=HOST:PORT, the same on every node"

command=("${PYTHON:-python3}" -m flagscale_like.runtime.torchrun --nnodes "$nodes" --nproc-per-node "$ranks")
command+=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${RDZV_ID:-${PET_RDZV_ID:-flagscale-like}}")
[[ -z ${RDZV_IS_HOST-} ]] || command+=(--rdzv-conf "is_host=$RDZV_IS_HOST")
[[ -z ${LOCAL_ADDR-} ]] || command+=(--local-addr "$LOCAL_ADDR")
command+=(--max-restarts "$restarts")
command+=(-m flagscale_like train "$@")

if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
# With exec, torchrun receives the signals sent to this script, and its exit code is the script's.
exec "${command[@]}"

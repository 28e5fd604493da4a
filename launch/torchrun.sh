#!/usr/bin/env bash
# Starts the ranks of this node under torchrun: one node, or one of several that meet at RDZV_ENDPOINT. When a rank dies, the
# ranks of all nodes start again, at most MAX_RESTARTS times, and go on from the newest whole checkpoint.
#
#   launch/torchrun.sh [--dry-run] X.yaml [KEY=VALUE]...
#
# Environment, and what holds where it is unset:
#   NPROC_PER_NODE  ranks of a node: a number, or auto: one a GPU, else one a CPU   [auto]
#   NNODES          nodes                                                          [1]
#   RDZV_ENDPOINT   HOST:PORT, the same on every node; needed where NNODES > 1
#   RDZV_IS_HOST    1 on HOST and 0 elsewhere; torchrun compares host names         [left to torchrun]
#   LOCAL_ADDR      a name or address of this node that the others can reach         [its host name]
#   RDZV_ID         the job's name, the same on every node                         [flagscale-like]
#   MAX_RESTARTS    restarts of all ranks                                          [3]
#   PYTHON          the interpreter that has flagscale_like                        [python3]
# Kubeflow's training operator says the same in PET_NNODES, PET_NPROC_PER_NODE, PET_RDZV_ENDPOINT, PET_RDZV_ID.
#
# SIGTERM: the ranks finish the step, save and stop. torchrun kills what is left after 30 s, so keep resilience.grace_s below.
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

if [[ $nodes == 1 ]]; then endpoint=${endpoint:-localhost:0}; fi # any free port
[[ -n $endpoint ]] || fail "NNODES is $nodes: give RDZV_ENDPOINT=HOST:PORT, the same on every node"

command=("${PYTHON:-python3}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks")
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
# exec: signals to this script's process reach torchrun, and its exit code is this script's
exec "${command[@]}"

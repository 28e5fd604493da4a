#!/usr/bin/env bash
# Starts, checks and stops a run on the nodes of a hostfile over ssh.
#
#   launch/ssh_hostfile.sh [--dry-run] start|status|stop HOSTFILE X.yaml [KEY=VALUE]...
#
# HOSTFILE has one line for each node: `host slots=8`, and `port=2222` if ssh listens on another port. All nodes have the same
# number of slots; # starts a comment. FlagScale's `type=A800` and MPI's `max_slots=8` may be there, and change nothing: all
# nodes run the same layout. The rendezvous runs on the first node. Each node needs this folder at the same path, and ssh access without a password.
# `start` returns when torchrun runs on all nodes; it continues after this terminal is closed. `stop` lets the ranks finish the
# step and save. Give the same HOSTFILE and YAML file to start, status and stop.
#
# Environment variables, with defaults. PYTHON, PYTHONPATH, MAX_RESTARTS, OMP_NUM_THREADS, NCCL_*, GLOO_*, FLAGSCALE_* and
# CUDA_* are passed on to torchrun.sh:
#   JOB    name of the run; the logs are LOGS/JOB/HOST.log on each node   [the YAML file's name]
#   LOGS   folder of the logs                                             [runs/logs]
#   PORT   rendezvous port on the first node                              [29400]
#
# Shell injection is not possible: host names are checked, and each word is passed to the remote shell in single quotes.
# Example: launch/ssh_hostfile.sh start hosts.txt examples/aquila2/34b.yaml
set -euo pipefail

fail() { echo "error: $*" >&2; exit 10; }

# Quotes words for a remote POSIX shell, which interprets nothing between single quotes.
quote() {
  local word
  for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}

dry_run=
if [[ ${1-} == --dry-run ]]; then dry_run=1; shift; fi
(($# >= 3)) || fail "usage: launch/ssh_hostfile.sh [--dry-run] start|status|stop HOSTFILE X.yaml [KEY=VALUE]..."
verb=$1 hostfile=$2 config=$3
shift 2
[[ $verb =~ ^(start|status|stop)$ ]] || fail "$verb: say start, status or stop"
[[ -r $hostfile ]] || fail "hostfile $hostfile: cannot be read"

hosts=() ports=() slots=
number=0
declare -A line_of=()
while IFS= read -r line || [[ -n $line ]]; do
  number=$((number + 1))
  line=${line%%#*}
  [[ $line =~ [^[:space:]] ]] || continue
  # A host name must not start with a dash, which ssh would read as an option.
  [[ $line =~ ^[[:space:]]*([A-Za-z0-9_][A-Za-z0-9_.@-]*)(([[:space:]]+[a-z_]+[[:space:]]*=[[:space:]]*[A-Za-z0-9_.-]+)*)[[:space:]]*$ ]] ||
    fail "hostfile $hostfile:$number: '$line': write it as \`name slots=8\`"
  host=${BASH_REMATCH[1]} options=${BASH_REMATCH[2]} here=1 ssh_port=22
  while [[ $options =~ ^[[:space:]]+([a-z_]+)[[:space:]]*=[[:space:]]*([A-Za-z0-9_.-]+)(.*)$ ]]; do
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]} options=${BASH_REMATCH[3]}
    [[ $name =~ ^(slots|max_slots|port|type)$ ]] ||
      fail "hostfile $hostfile:$number: $name is not known: give slots, port, max_slots or type"
    [[ $name == type || $value =~ ^[1-9][0-9]{0,4}$ ]] || fail "hostfile $hostfile:$number: $name=$value: must be a number"
    case $name in slots) here=$value ;; port) ssh_port=$value ;; esac
  done
  [[ -z ${line_of[$host]-} ]] ||
    fail "hostfile $hostfile:$number: $host is in line ${line_of[$host]} already: give each host once, with all its slots"
  line_of[$host]=$number
  hosts+=("$host") ports+=("$ssh_port")
  [[ -z $slots || $slots == "$here" ]] ||
    fail "hostfile $hostfile:$number: $host has $here slots, the others $slots: every node must offer the same"
  slots=$here
done <"$hostfile"
((${#hosts[@]})) || fail "hostfile $hostfile: names no host"

job=${JOB:-$(basename "$config" .yaml)}
[[ $job =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || fail "JOB ($job) must be letters, digits, dots, dashes: it names files"
port=${PORT:-29400}
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "PORT ($port) must be a number"
logs=${LOGS:-runs/logs}/$job

passed=()
while IFS= read -r name; do
  case $name in PYTHON | PYTHONPATH | MAX_RESTARTS | OMP_NUM_THREADS | NCCL_* | GLOO_* | FLAGSCALE_* | CUDA_*)
    passed+=("$name=${!name}") ;;
  esac
done < <(compgen -e)

# Prints the command for one node. A pid file names the process to stop. To check that the pid still belongs to the run, the
# command looks for the job's name in the process's command line.
remote() {
  local host=$1 pid log alive
  shift
  log=$(quote "$logs/$host.log") pid=$(quote "$logs/$host.pid")
  alive="pid=\$(cat $pid 2>/dev/null) && cat \"/proc/\$pid/cmdline\" 2>/dev/null | tr '\\0' '\\n' | grep -qxF $(quote "$job")"
  printf 'cd %s&& ' "$(quote "$PWD")"
  # shellcheck disable=SC2016 # $pid and $! are the remote shell's
  case $verb in
    start)
      printf 'if %s; then echo already running >&2; exit 1; fi; ' "$alive"
      printf 'mkdir -p %s&& { %s>>%s2>&1 </dev/null & echo $! >%s; }' "$(quote "$logs")" "$(quote env \
        NNODES="${#hosts[@]}" NPROC_PER_NODE="$slots" RDZV_ENDPOINT="${hosts[0]#*@}:$port" RDZV_ID="$job" \
        RDZV_IS_HOST="$([[ $host == "${hosts[0]}" ]] && echo 1 || echo 0)" LOCAL_ADDR="${host#*@}" "${passed[@]}" \
        setsid launch/torchrun.sh "$@")" "$log" "$pid"
      ;;
    status) printf 'if %s; then echo running; tail -n 1 %s; else echo stopped; fi' "$alive" "$log" ;;
    stop) printf 'if %s; then kill -TERM "$pid"; echo stopping; else echo stopped; fi' "$alive" ;;
  esac
}

code=0
for index in "${!hosts[@]}"; do
  host=${hosts[$index]}
  command=(ssh -n -o BatchMode=yes -o ConnectTimeout=10)
  [[ ${ports[$index]} == 22 ]] || command+=(-p "${ports[$index]}")
  command+=(-- "$host" "$(remote "$host" "$@")")
  if [[ -n $dry_run ]]; then
    printf '%s ' "${command[@]:0:${#command[@]}-1}"
    printf '\n    %s\n' "${command[-1]}"
  elif said=$("${command[@]}" 2>&1); then
    echo "$host: ${said:-started, log $logs/$host.log}"
  else
    echo "$host: failed: $said" >&2
    code=15
  fi
done
exit "$code"

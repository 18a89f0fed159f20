#!/usr/bin/env bash
# N processes on this machine, joined like the hosts of a cluster, to try out what a pod will do.
#
#   launch/local.sh [--dry_run] -n 2 --config=configs/bert_tiny.py --workdir=/tmp/run [any other flag of llm_jax.main]
#
# --dry_run prints the command of each process and runs nothing.
# The log shown is that of process 0. The others write to WORKDIR/process-I.log, the end of which is
# shown if one fails. SIGTERM or Ctrl-C makes all processes save the step and stop. A process that
# fails ends the others, and its exit status is that of the launcher. JAX_PLATFORMS is cpu unless it is
# set: one process drives all accelerators of a machine and needs no launcher.
set -euo pipefail

usage() { echo "usage: launch/local.sh [--dry_run] -n PROCESSES --config=FILE --workdir=DIR [flags of llm_jax.main]" >&2; exit 2; }

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1; shift; fi
[[ $# -ge 2 && $1 == -n && $2 =~ ^[1-9][0-9]*$ ]] || usage
count=$2
shift 2
workdir=
for flag in "$@"; do [[ $flag == --workdir=* ]] && workdir=${flag#--workdir=}; done
[[ -n $workdir ]] || usage
[[ -n $dry_run ]] || mkdir -p "$workdir"

python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# Each process gets its own cores, so that their threads do not compete; with fewer cores than processes
# they share.
pin() {
  local cores each first
  cores=$(nproc)
  each=$((cores >= count ? cores / count : 1))
  first=$(($1 * each % cores))
  echo "$first-$((first + each - 1))"
}

pids=()
for ((i = 0; i < count; i++)); do
  command=("$python" -m llm_jax.main "$@")
  ((count > 1)) && command+=("--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$i")
  if command -v taskset > /dev/null && command -v nproc > /dev/null; then command=(taskset -c "$(pin "$i")" "${command[@]}"); fi
  if [[ -n $dry_run ]]; then printf '%q ' "${command[@]}"; echo; continue; fi
  if ((i == 0)); then "${command[@]}" & else "${command[@]}" > "$workdir/process-$i.log" 2>&1 & fi
  pids+=($!)
done
[[ -z $dry_run ]] || exit 0
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT

# The first failure counts. The other processes stop by themselves (llm_jax/parallel/hosts.py); those
# that have not after a minute are killed.
status=0
deadline=
running=("${pids[@]}")
while ((${#running[@]})); do
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then left+=("$pid"); continue; fi
    code=0
    wait "$pid" || code=$?
    if ((code && !status)); then
      status=$code
      deadline=$((SECONDS + 60))
      for ((i = 0; i < count; i++)); do
        if [[ ${pids[i]} == "$pid" ]]; then
          echo "launch/local.sh: process $i ended with status $code; the others follow." >&2
          ((i == 0)) || tail -n 5 "$workdir/process-$i.log" >&2
        fi
      done
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [[ -n $deadline ]] && ((SECONDS > deadline && ${#running[@]})); then kill -KILL "${running[@]}" 2> /dev/null || true; fi
  ((${#running[@]})) && sleep 0.2
done
exit "$status"

#!/usr/bin/env bash
# The same command on all hosts of a TPU pod of TPU VMs, through gcloud. The processes find each other
# through the metadata of the pod.
#
#   launch/tpu_vm_pod.sh [--dry_run] --tpu=NAME --zone=ZONE --config=configs/bert_base.py --workdir=/shared/run [any other flag]
#
# Once, beforehand, on all hosts (the folder of the run must be on a disk that all of them share):
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='git clone URL llm_jax && pip install -e llm_jax[tpu]'
# To save and stop: the same with --worker=0 --command='pkill -TERM -f llm_jax.main'. Closing this
# script does not stop the processes.
#
# --dry_run prints the command. Environment: REMOTE_DIR, the checkout on the hosts (llm_jax); REMOTE_PYTHON (python3).
set -euo pipefail

usage() {
  echo "usage: launch/tpu_vm_pod.sh [--dry_run] --tpu=NAME --zone=ZONE --config=FILE --workdir=DIR [flags of llm_jax.main]" >&2
  exit 2
}

dry_run=
tpu=
zone=
config=
workdir=
flags=()
for flag in "$@"; do
  case $flag in
    --dry_run) dry_run=1 ;;
    --tpu=?*) tpu=${flag#*=} ;;
    --zone=?*) zone=${flag#*=} ;;
    *)
      flags+=("$flag")
      [[ $flag == --config=?* ]] && config=1
      [[ $flag == --workdir=?* ]] && workdir=1
      ;;
  esac
done
[[ -n $tpu && -n $zone && -n $config && -n $workdir ]] || usage

# The shells of the hosts parse the command once more, so each word is quoted.
printf -v remote 'cd %q && exec %q -m llm_jax.main' "${REMOTE_DIR:-llm_jax}" "${REMOTE_PYTHON:-python3}"
printf -v words ' %q' "${flags[@]}"
command=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone" --worker=all "--command=$remote$words")

if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"

#!/usr/bin/env bash
# Runs a command of moe-jax on all hosts of a TPU slice, or of several slices:
#
#   launch/tpu_pod.sh --name=moe --zone=us-east5-a --type=v6e-64 --slices=2 \
#     --runtime=v2-alpha-tpuv6e --source=gs://bucket/moe_jax.tar.gz -- \
#     moe-jax train --config=configs/lm/mixtral_8x7b.py --workdir=gs://bucket/run
#
# Needs: gcloud, logged in, with a project and the right to use TPUs; a key for ssh
# (ssh-add); a workdir in a bucket or on a disk that all hosts have mounted.
#
# It requests the TPUs as a queued resource, unless one of this name is there, waits for
# them, installs SOURCE (an archive of this repository in a bucket) on every host, and
# starts the command on all of them. The same command goes on after a failure. Nothing is
# deleted: at the end it prints the command that does. --spot asks for spot TPUs;
# --dry-run prints every command.
set -euo pipefail

die() {
  echo "tpu_pod.sh: $1" >&2
  exit 2
}

name='' zone='' type='' runtime='' source='' slices=1 spot='' dry_run=
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --source=*) source=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "$1: no such option (see the head of this file)" ;;
  esac
  shift
done
for option in name zone type runtime source; do
  [[ -n ${!option} ]] || die "--$option is missing"
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: must be a number, 1 or more"
[[ $source == gs://* ]] || die "--source=$source: must be an archive in gs://"
(($#)) || die "no command: write it after --"

tpus=(gcloud compute tpus)
if ((slices > 1)); then
  nodes=(--node-count "$slices" --node-prefix "$name")
else
  nodes=(--node-id "$name")
fi
# Without the batch size, gcloud would wait for the first 64 hosts before it starts the
# others, and these for the others.
ssh=("${tpus[@]}" queued-resources ssh "$name" --zone "$zone" --node=all --worker=all
  --batch-size=all)
create=("${tpus[@]}" queued-resources create "$name" --zone "$zone"
  --accelerator-type "$type" --runtime-version "$runtime" "${nodes[@]}")
[[ -z $spot ]] || create+=(--spot)
describe=("${tpus[@]}" queued-resources describe "$name" --zone "$zone")
delete=("${tpus[@]}" queued-resources delete "$name" --zone "$zone" --force)

printf -v archive '%q' "$source"
printf -v command '%q ' "$@"
install="set -eo pipefail; mkdir -p moe_jax && gcloud storage cat $archive | tar -xz -C moe_jax"
install+="; cd moe_jax && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
# shellcheck disable=SC2016  # $PATH is that of the hosts
start='cd moe_jax && PATH="$PWD/.venv/bin:$PATH" exec '"${command% }"

run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_all_hosts() { run "${ssh[@]}" --command "$1"; }

if [[ -n $dry_run ]] || ! "${describe[@]}" >/dev/null 2>&1; then
  run "${create[@]}"
fi
if [[ -n $dry_run ]]; then
  run "${describe[@]}" '--format=value(state.state)'
else
  while state=$("${describe[@]}" '--format=value(state.state)') && [[ $state != ACTIVE ]]; do
    case $state in
      FAILED | SUSPENDING | SUSPENDED)
        echo "tpu_pod.sh: $name is $state; delete it and start again: ${delete[*]}" >&2
        exit 1
        ;;
    esac
    echo "tpu_pod.sh: $name is $state; waiting"
    sleep 30
  done
fi
on_all_hosts "$install"
status=0
on_all_hosts "$start" || status=$?
echo "tpu_pod.sh: the TPUs are still there; to give them back: ${delete[*]}"
exit "$status"

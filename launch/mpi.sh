#!/usr/bin/env bash
# Runs a command of moe-jax as several processes by mpirun, of Open MPI 4 or 5:
#
#   launch/mpi.sh -n 16 --hosts=node1:8,node2:8 -- \
#     moe-jax train --config=configs/lm/mixtral_8x7b.py --workdir=/shared/run
#
# Needs: mpirun on this host, moe-jax on the PATH of all hosts, a workdir that all see,
# and a free port on the first host (--port, 29400). Without --hosts all processes run
# on this one. On GPUs start one process a GPU, or one a host.
#
# Open MPI 5 does not tell its processes where process 0 is, so its address is passed on;
# the program takes number and index from mpirun. --dry-run prints the command; what
# stands in MPIRUN_FLAGS is added to it (as --allow-run-as-root in a container).
set -euo pipefail

die() {
  echo "mpi.sh: $1" >&2
  exit 2
}

processes='' hosts='' port=29400 dry_run=
while (($#)); do
  case $1 in
    -n) processes=${2:-} && shift ;;
    --hosts=*) hosts=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "$1: no such option (-n, --hosts=, --port=, --dry-run, then -- COMMAND)" ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "-n $processes: must be a number of processes"
[[ $port =~ ^[1-9][0-9]*$ && $port -le 65535 ]] || die "--port=$port: must be 1 to 65535"
(($#)) || die "no command: write it after --"

first=127.0.0.1
where=()
if [[ -n $hosts ]]; then
  first=${hosts%%[:,]*}
  where=(--host "$hosts")
fi
# Processes in the order of the hosts, so that the first has process 0, and not bound
# to one core each: XLA has threads of its own.
read -ra flags <<<"${MPIRUN_FLAGS:-}"
run=(mpirun "${flags[@]}" -n "$processes" "${where[@]}" --map-by slot --bind-to none
  --tag-output -x "MOE_JAX_COORDINATOR=$first:$port" "$@")

if [[ -n $dry_run ]]; then
  printf '%q ' "${run[@]}"
  echo
  exit 0
fi
command -v mpirun >/dev/null || die "mpirun is not here: install Open MPI"
exec "${run[@]}"

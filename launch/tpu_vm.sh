#!/usr/bin/env bash
# Training on Cloud TPU VMs: create the slices, copy this project, run a command on every worker, read its log, delete.
#
#   launch/tpu_vm.sh create --name mor17 --zone us-west4-a --topology v5e-256
#   launch/tpu_vm.sh copy   --name mor17 --zone us-west4-a
#   launch/tpu_vm.sh run    --name mor17 --zone us-west4-a -- launch.train --config configs/mor.py:1.7b,nr=3 \
#                           --workdir gs://my-bucket/runs/mor17
#   launch/tpu_vm.sh logs   --name mor17 --zone us-west4-a
#   launch/tpu_vm.sh delete --name mor17 --zone us-west4-a
#
# Options: --project P, --topology v5e-256 (v5e-256x4: four slices), --spot, --version RUNTIME, --worker N (logs),
# --slices N (copy, run, logs: as created), --dry_run prints the commands and runs none. `run` returns at once: the
# command goes on without the connection and is started again, from its last checkpoint, while it ends with status 75.
# `copy` leaves what it sent in build/mor_jax.tar.gz of this project.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -euo/p' "$0" | sed -n 's/^# \{0,1\}//p'
}

action="${1:-}"
[[ "$action" == --help || "$action" == -h ]] && { usage; exit 0; }
[[ "$action" =~ ^(create|copy|run|logs|delete)$ ]] || fail "say create, copy, run, logs or delete; see --help."
shift

name="" zone="" project="" topology="" version="" worker=0 slices=1 spot=false dry_run=false
while [[ $# -gt 0 ]]; do
  option="${1%%=*}"
  case "$option" in
    --spot) spot=true; shift; continue ;;
    --dry_run) dry_run=true; shift; continue ;;
    --) shift; break ;;
    --name | --zone | --project | --topology | --version | --worker | --slices) ;;
    *) fail "there is no option $1; see --help." ;;
  esac
  if [[ "$1" == *=* ]]; then
    value="${1#*=}"
    shift
  else
    [[ $# -ge 2 ]] || fail "$1 needs a value."
    value="$2"
    shift 2
  fi
  printf -v "${option#--}" '%s' "$value"
done
[[ -n "$name" && -n "$zone" ]] || fail "give --name and --zone."
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name $name: lower-case letters, digits and dashes."
[[ "$slices" =~ ^[1-9][0-9]*$ && "$worker" =~ ^[0-9]+$ ]] || fail "--slices and --worker are numbers."

# Prints a command as one would type it and, unless this is a dry run, runs it.
do_it() {
  printf '%q ' "$@" | sed 's/ $//'
  printf '\n'
  $dry_run || "$@"
}

where=(--zone="$zone")
[[ -n "$project" ]] && where+=(--project="$project")

# The TPUs of the job: NAME, or NAME-0 ... NAME-(N-1) when it has several slices.
nodes() {
  if [[ "$slices" -eq 1 ]]; then
    echo "$name"
  else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}

ssh_all() { # node, command
  do_it gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker=all --command="$2"
}

case "$action" in
  create)
    [[ "$topology" =~ ^(v4|v5e|v5p|v6e)-([0-9]+)(x([0-9]+))?$ ]] || fail "--topology is v5e-256, v6e-64x2, v5p-128 or the like."
    chip="${BASH_REMATCH[1]}" size="${BASH_REMATCH[2]}" slices="${BASH_REMATCH[4]:-1}"
    case "$chip" in
      v4) type="v4-$size" default=tpu-ubuntu2204-base ;;
      v5e) type="v5litepod-$size" default=v2-alpha-tpuv5-lite ;;
      v5p) type="v5p-$size" default=v2-alpha-tpuv5 ;;
      v6e) type="v6e-$size" default=v2-alpha-tpuv6e ;;
    esac
    request=(gcloud compute tpus queued-resources create "$name" "${where[@]}" --accelerator-type="$type"
      --runtime-version="${version:-$default}")
    if [[ "$slices" -eq 1 ]]; then
      request+=(--node-id="$name")
    else
      request+=(--node-count="$slices" --node-prefix="$name")
    fi
    $spot && request+=(--spot)
    do_it "${request[@]}"
    ;;
  copy)
    cd "$(dirname "$0")/.."
    do_it mkdir -p build
    do_it git archive --format=tar.gz --output=build/mor_jax.tar.gz HEAD
    for node in $(nodes); do
      do_it gcloud compute tpus tpu-vm scp build/mor_jax.tar.gz "$node:mor_jax.tar.gz" "${where[@]}" --worker=all
      ssh_all "$node" 'mkdir -p mor_jax && tar -xzf mor_jax.tar.gz -C mor_jax && cd mor_jax && python3 -m venv .venv && .venv/bin/pip install --quiet -e ".[tpu,gcs]"'
    done
    ;;
  run)
    [[ $# -gt 0 && "$1" == launch.* ]] || fail "say what to run after --, e.g. -- launch.train --config ... --workdir gs://..."
    printf -v command '%q ' "$@"
    loop="while :; do .venv/bin/python -m ${command% }; s=\$?; [ \$s -eq 75 ] || exit \$s; sleep 10; done"
    for node in $(nodes); do
      ssh_all "$node" "cd mor_jax && nohup bash -c $(printf '%q' "$loop") >> ~/mor_jax.log 2>&1 < /dev/null &"
    done
    ;;
  logs)
    do_it gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" "${where[@]}" --worker="$worker" \
      --command="tail -n 100 -F mor_jax.log"
    ;;
  delete)
    do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    ;;
esac

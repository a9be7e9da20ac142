#!/usr/bin/env bash
# Train on all GPUs of this node, and go on by itself after a failure:
#   bash launch/multinode.sh configs/small.py [--key=value ...]      # or --resume=out/small, with the run's own settings
# On several nodes run the same line on each, over a shared file system for out_dir and the same data everywhere:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multinode.sh configs/small.py      # NODE_RANK=1 on the other
#
# Every attempt is a new torchrun that continues from the newest complete checkpoint. torchrun's own --max-restarts is
# left alone: with gloo it meets stale addresses of dead ranks (pytorch issue 135712). TERM, INT, HUP (unless nohup
# keeps it away) or USR1 lets the ranks finish their step and save, and then ends with status 75. Three failures without
# a new checkpoint in between end with status 1, a mistake in the settings, the data or the run folder with 2.
#   NPROC_PER_NODE  ranks here (auto: one a GPU)   MASTER_PORT  29500   PYTHON  python   MAX_FAILURES  3
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  540: seconds to finish a step and save after a signal, then torchrun kills the ranks;
#                                   less than the 600 in slurm.sbatch and k8s.yaml. Raise both where a save takes longer
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# What a rank names to continue with: this script from anywhere, with the environment that it was given.
export NANOK2_LAUNCHER="$(
    for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE PYTHON MAX_FAILURES OMP_NUM_THREADS \
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT CUDA_VISIBLE_DEVICES; do [ -z "${!name+x}" ] || printf %s=%q\  $name "${!name}"; done
    printf 'bash %q' "$PWD/launch/multinode.sh")"
: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${NPROC_PER_NODE:=auto}"
: "${PYTHON:=python}" "${MAX_FAILURES:=3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
export PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGQUIT,SIGUSR1"  # torchrun's option: else it dies of USR1
[[ "$(trap -p HUP)" == *"''"* ]] || PET_SIGNALS_TO_HANDLE+=",SIGHUP"  # under nohup torchrun would not ignore it

# Refuses mistakes in the settings before any rank starts, and knows where the run will lie.
about="$("$PYTHON" -m settings "$@")" || exit 2
out="${about%$'\n'*}" start="${about##*$'\n'}"
latest() { cat "$out/checkpoints/latest" 2>/dev/null; }
mkdir -p "$(dirname "$out")" && launched="$(mktemp "$(dirname "$out")/.launched.XXXXXX")" || exit 2
export NANOK2_REFUSED="$launched"  # ranks write into it if they refuse to start
trap 'rm -f "$launched"' EXIT

child="" stopping=""
# shellcheck disable=SC2329  # a trap calls it
stop() {
    stopping=yes
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT HUP USR1

# What the first attempt was told about its start, to overwrite, to resume from elsewhere, to skip data, is spent only
# when a checkpoint of this launch is there; until then it holds for what this launch itself has begun. Later words win.
continuing=("$@" --out_dir="$out" --resume=auto --no-overwrite --skip_sequences=0)
choose_words() {
    local newest
    newest="$(latest)"
    if [ "$start" = any ] || [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] \
        || { [ -n "$newest" ] && [ "$out/checkpoints/$newest" -nt "$launched" ]; }; then
        words=("${continuing[@]}")
    elif [ "$out/config.json" -nt "$launched" ]; then
        words=("$@" --overwrite)
    else
        words=("$@")
    fi
}

failures=0
while [ -z "$stopping" ]; do
    before="$(latest)"
    choose_words "$@"
    "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC_PER_NODE" \
        --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --max_restarts=0 train.py "${words[@]}" &
    child=$!
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do  # a trap interrupts wait
        wait "$child"
        status=$?
    done
    [ "$status" -eq 0 ] && [ -z "$stopping" ] && exit 0
    [ -s "$launched" ] && exit 2
    [ "$(latest)" != "$before" ] && failures=0
    failures=$((failures + 1))
    [ -n "$stopping" ] && break
    if [ "$failures" -ge "$MAX_FAILURES" ]; then
        echo "multinode.sh: $failures failures without a new checkpoint in $out: giving up" >&2
        exit 1
    fi
    echo "multinode.sh: torchrun ended with status $status; continuing from ${before:+the newest checkpoint of }$out" >&2
    sleep 1
done
exit 75

#!/usr/bin/env bash
# On a machine with a GPU and torch: the tests that need one, whole steps of configs/small.py, a run of it, and every
# kernel's bench; JSON and logs go to $OUT or a folder outside of the checkout, a table of ratios comes last. It ends within 9 minutes
# ($BUDGET seconds): what there was no time for is named, and parts can be run alone.
#   bash bench/gpu.sh                 # tests step run kernels
#   bash bench/gpu.sh more            # the other tests of the kernels, configs/gpt.py, ranks over NCCL
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON="${PYTHON:-python3}"
export OUT="${OUT:-${TMPDIR:-/tmp}/nanok2-bench}"
mkdir -p "$OUT"
PARTS="${*:-tests step run kernels}"
BUDGET="${BUDGET:-525}"
failed=""

part() { [[ " $PARTS " == *" $1 "* ]]; }

try() {  # try SECONDS LOG ARGUMENTS: python with arguments, at most so long; its last lines are shown, failures kept
    local limit="$1" log="$OUT/$2.txt" left=$((BUDGET - SECONDS))
    shift 2
    echo "== $* (at $SECONDS s)"
    if [ "$left" -lt 10 ]; then failed="$failed [no time for $*]"; return; fi
    timeout --signal=INT --kill-after=5 $((limit < left ? limit : left)) "$PYTHON" "$@" > "$log" 2>&1 \
        || failed="$failed [$* exited with $?]"
    tail -n 25 "$log"
}

if part tests; then
    try 150 tests-kernels -m pytest -q -m gpu tests/test_triton_*.py -rf --tb=short --durations=3
    try 130 tests-gpu -m pytest -q -m gpu tests/test_gpu.py -rf --tb=short --durations=3
fi
if part step; then try 130 step-small -m bench.step configs/small.py --global_batch_size=256; fi
if part run; then  # some hundred steps on real text, an eighth of the batch
    [ -d data/stdlib ] || try 60 prepare -m data.prepare stdlib --vocab_size=2048
    run="${TMPDIR:-/tmp}/nanok2-small"
    try 100 run-small train.py configs/small.py --data=data/stdlib --out_dir="$run" --overwrite --wandb=off \
        --max_steps=200 --global_batch_size=64 --save_interval=0 --sample_interval=0 --eval_interval=0 --log_interval=20
    cp "$run/metrics.jsonl" "$OUT/run-small.jsonl"
fi
if part kernels; then
    for kernel in experts cross_entropy newton_schulz routing; do try 60 "bench-$kernel" -m "bench.$kernel"; done
    try 120 bench-attention -m bench.attention
fi
if part more; then
    try 120 tests-more -m pytest -q tests/test_triton_*.py -rf --tb=short \
        -k "not_a_number or underflow or tile_map or infin or without_tokens or rules or library or outside or large"
    try 90 step-gpt -m bench.step configs/gpt.py --global_batch_size=64
    ranks=(-m bench.ranks configs/small.py --global_batch_size=64)  # plain, then one rank of FSDP2 over NCCL
    try 90 ranks-plain "${ranks[@]}"
    try 90 ranks-nccl -m torch.distributed.run --standalone --nproc_per_node=1 "${ranks[@]}"
fi
"$PYTHON" -m bench.summary
if [ -n "$failed" ]; then echo "failed:$failed"; exit 1; fi

#!/usr/bin/env bash
# On a machine with a GPU and torch: the tests that need one, steps of configs/small.py beside its dense twin and others,
# the start and the speed of train.py, and every kernel's bench. JSON and logs go to $OUT or a folder outside of the
# checkout, a table comes last. It ends within 7 minutes ($BUDGET seconds): what there was no time for is named, and each
# part can be run alone (run compares with the newest result of step).
#   bash bench/gpu.sh                 # step run start tests kernels: the first ones leave the others compiled kernels
#   bash bench/gpu.sh more            # the other tests of the kernels, ranks over NCCL
#   bash bench/gpu.sh contest         # experts against a dense model: the text of data.prepare packages, $ARM_SECONDS each
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON="${PYTHON:-python3}"
export OUT="${OUT:-${TMPDIR:-/tmp}/nanok2-bench}"
mkdir -p "$OUT"
PARTS="${*:-step run start tests kernels}"
BUDGET="${BUDGET:-420}"
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

if part step; then try 120 step-small -m bench.step configs/small.py; fi
if part run; then try 60 run-small -m bench.training run configs/small.py --global_batch_size=256; fi
if part start; then try 90 start-small -m bench.training start configs/small.py; fi
if part tests; then  # they wait for compilers more than for the GPU, so several processes share it
    share=(); "$PYTHON" -c "import xdist" 2> /dev/null && share=(-n 6)
    export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}"
    try 120 tests-gpu -m pytest -q -m gpu tests/test_gpu.py -rf --tb=short --durations=5 "${share[@]}"
    try 90 tests-kernels -m pytest -q -m gpu tests/test_triton_*.py -rf --tb=short --durations=3 "${share[@]}"
    unset TORCHINDUCTOR_COMPILE_THREADS
fi
if part kernels; then
    for kernel in experts attention cross_entropy newton_schulz routing; do
        try 60 "bench-$kernel" -m "bench.$kernel"
    done
fi
if part more; then
    try 120 tests-more -m pytest -q tests/test_triton_*.py -rf --tb=short \
        -k "not_a_number or underflow or tile_map or infin or without_tokens or rules or library or outside or large"
    ranks=(-m bench.ranks configs/small.py --global_batch_size=64)  # plain, then one rank of FSDP2 over NCCL
    try 90 ranks-plain "${ranks[@]}"
    try 90 ranks-nccl -m torch.distributed.run --standalone --nproc_per_node=1 "${ranks[@]}"
fi
if part contest; then
    contest=(-m bench.contest moe-dense --seeds=1 --data="${DATA:-data/packages}" --vocab_size=4096)
    try 60 contest-debug "${contest[@]}" --lr=1e-2,1e-2 --dtype=bfloat16 --out="$OUT/contest-debug"
    try 400 contest-small "${contest[@]}" --config=configs/small.py --lr=4e-3,4e-3 --global_batch_size=64 \
        --eval_batches=8 --seconds="${ARM_SECONDS:-90}" --out="$OUT/contest-small"
fi
compgen -G "$OUT/*.json" > /dev/null && "$PYTHON" -m bench.summary
if [ -n "$failed" ]; then echo "failed:$failed"; exit 1; fi

#!/usr/bin/env bash
# On a machine with a GPU and torch: the gpu-marked tests, then the benches; JSON goes to $OUT or bench/results/.
#   bash bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON="${PYTHON:-python3}"
"$PYTHON" -m pytest -q -m gpu tests/test_gpu.py
tests=$?
"$PYTHON" -m bench.experts
"$PYTHON" -m bench.step configs/small.py
"$PYTHON" -m bench.step configs/small.py --no-compile
"$PYTHON" -m bench.step configs/gpt.py
"$PYTHON" -m bench.ranks configs/small.py --global_batch_size=64  # plain, then one rank of FSDP2 over NCCL
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 -m bench.ranks configs/small.py --global_batch_size=64
echo "gpu tests exited with $tests"
exit $tests

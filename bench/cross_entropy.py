"""The linear cross-entropy, forward and backward: chunks in Triton against chunks in PyTorch, whole logits, the same
compiled, and the libraries'; then Triton's kernel alone against its traffic.

    python -m bench.cross_entropy
"""

import torch
import torch.nn.functional as F

import bench
import errors
from kernels import backend, cross_entropy
from kernels.cross_entropy import IGNORE, cross_entropy_twin, linear_cross_entropy

FLOPS, BANDWIDTH = 788e12, 4.3e12  # an H200's, in bf16, as measured by a large matmul and a large copy
SIZES = {"small": (32768, 768, 50304), "moonlight": (8192, 2048, 163840), "K2": (8192, 7168, 163840)}  # N, D, V
COMPILED = ("small", "moonlight")  # the compiler takes its seconds
SMALL = {"twins only": (512, 64, 2000)}


def losses(name, N, D, V, device, dtype, missing):
    """Seconds of every arm."""
    hidden = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, device=device) / D**0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)

    def arm(on, function):
        def run():
            hidden.grad = weight.grad = None
            with backend.running(on):
                function(hidden, weight, targets).backward()
        return run
    arms = {"chunks in PyTorch": arm(False, linear_cross_entropy), "twin": arm(False, cross_entropy_twin)}
    if device.type == "cuda":
        arms["chunks in Triton"] = arm(True, linear_cross_entropy)
        if name in COMPILED:
            arms["compiled twin"] = arm(False, torch.compile(cross_entropy_twin, dynamic=False, fullgraph=True))
        else:
            missing[f"{name}, compiled twin"] = "left out for time"
        if hasattr(F, "linear_cross_entropy"):
            arms["F.linear_cross_entropy"] = arm(False, lambda hidden, weight, targets: F.linear_cross_entropy(
                hidden, weight.to(dtype), targets, reduction="sum"))
        else:
            missing["F.linear_cross_entropy"] = f"not in torch {torch.__version__}"
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
            liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            arms["Liger"] = arm(False, lambda hidden, weight, targets: liger(weight.to(dtype), hidden, targets))
        except ImportError as error:
            missing["Liger"] = str(error)
    memory = {}
    for key, run in list(arms.items()):  # once alone: what runs at all, and its peak of memory
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            run()
            if device.type == "cuda":
                memory[key] = (torch.cuda.max_memory_allocated() - before) / 2**30
        except (RuntimeError, TypeError, NotImplementedError) as error:
            missing[f"{name}, {key}"] = str(error).splitlines()[0]
            del arms[key]
    seconds = bench.interleaved(arms, rounds=5, warmup=2)
    return seconds, memory


def kernel_alone(N, D, V, device, dtype):
    """(seconds, bytes at least) of the kernel on one chunk: logits read and written once."""
    rows = min(N, cross_entropy.chunk_rows(N, V, dtype.itemsize, device.type))
    logits = torch.randn(rows, V, device=device, dtype=dtype)
    targets = torch.randint(0, V, (rows,), device=device)
    targets[::10] = IGNORE
    from kernels.triton_cross_entropy import cross_entropy_
    spent = bench.interleaved({"kernel": lambda: cross_entropy_(logits, targets, 0.0, IGNORE, True)})["kernel"]
    return spent, 2 * rows * V * dtype.itemsize


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype, missing, result, ratios = torch.bfloat16 if on_gpu else torch.float32, {}, {}, {}
    if not on_gpu:
        missing["Triton, compiled twin, libraries"] = "no CUDA device: small sizes, the twins alone"
    for name, size in (SIZES if on_gpu else SMALL).items():
        N, D, V = size
        seconds, memory = losses(name, N, D, V, device, dtype, missing)
        result[name] = {"N, D, V": size, "seconds": seconds, "GiB": memory}
        for arm, spent in seconds.items():
            rate = 6 * N * V * D / spent
            share = f", {rate / FLOPS:4.0%} of the roofline, {memory[arm]:5.1f} GiB" if on_gpu else ""
            print(f"{name:10} {arm:24} {1e3 * spent:9.2f} ms {seconds['chunks in PyTorch'] / spent:5.2f} x chunks in "
                  f"PyTorch {rate / 1e12:6.1f} TFLOP/s{share}", flush=True)
        if on_gpu:
            ratios[f"loss, {name}: chunks in PyTorch / triton, time"] = seconds["chunks in PyTorch"] / seconds[
                "chunks in Triton"]
            spent, least = kernel_alone(N, D, V, device, dtype)
            result[name]["kernel"] = {"seconds": spent, "bytes": least}
            print(f"{name:10} kernel alone, one chunk   {1e3 * spent:9.2f} ms {least / spent / 1e9:6.0f} GB/s, "
                  f"{least / spent / BANDWIDTH:4.0%} of the bandwidth if the second reading is L2's", flush=True)
            torch.cuda.empty_cache()
    for arm, reason in missing.items():
        print(f"not run: {arm}: {reason}")
    bench.save(f"cross_entropy-{device.type}", {"ratios": ratios, "results": result, "missing": missing})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

"""The expert MLPs: the per-expert loop against F.grouped_mm, forward and backward, in fp32 and bf16.

    python -m bench.experts
"""

import torch

import bench
from kernels.experts import mlp_grouped, mlp_loop

SHAPES = {"debug": (8192, 8, 128, 128), "wide": (16384, 8, 256, 256), "fine": (16384, 64, 256, 64)}  # S, E, D, F


def compare(S, E, D, F, dtype, device):
    """Median seconds of each twin, forward and backward, on S rows that chance spreads over E experts."""
    rows = torch.randn(S, D, device=device, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(E, 2 * F, D, device=device, dtype=dtype, requires_grad=True)
    down = torch.randn(E, D, F, device=device, dtype=dtype, requires_grad=True)
    counts = torch.bincount(torch.randint(0, E, (S,), device=device), minlength=E)
    grad = torch.randn(S, D, device=device, dtype=dtype)
    return bench.interleaved({mlp.__name__: lambda mlp=mlp: mlp(rows, counts, gate_up, down).backward(grad)
                              for mlp in (mlp_loop, mlp_grouped)})


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            seconds = compare(*shape, dtype, device)
            S, _, D, F = shape
            ratio = seconds["mlp_loop"] / seconds["mlp_grouped"]
            rates = {arm: 18 * S * D * F / spent / 1e9 for arm, spent in seconds.items()}
            result[f"{name} {dtype}"] = {"shape": shape, "gflops": rates, "loop over grouped": ratio}
            print(f"{name:6} {str(dtype):15} loop {rates['mlp_loop']:8.0f}  grouped {rates['mlp_grouped']:8.0f} GFLOP/s"
                  f"  grouped is {ratio:.2f} times as fast")
    bench.save(f"experts-{device}", result)


if __name__ == "__main__":
    main()

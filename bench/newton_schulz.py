"""Newton-Schulz: Triton's symmetric products against their twins, product by product and as a whole, plain and as
replayed CUDA graphs, beside the compiled twin and torch.optim.Muon's function.

    python -m bench.newton_schulz
"""

import torch
from torch.optim import _muon as torch_muon

import bench
import errors
from kernels import backend, newton_schulz
from kernels.newton_schulz import newton_schulz_replayed, symmetric_product_twin

FLOPS, BANDWIDTH = 788e12, 4.3e12  # an H200's, in bf16, as measured by a large matmul and a large copy
STACKS = {  # B, M, K: batches of matrices of one shape as muon.py makes them
    "small, experts": (512, 256, 768), "small, o_proj": (12, 768, 768), "small, q_proj": (12, 1152, 768),
    "moonlight, experts": (16, 1408, 2048), "moonlight, q_proj": (4, 3072, 2048),
    "K2, experts": (4, 2048, 7168), "K2, o_proj": (1, 7168, 8192)}
SMALL = {"twins only": (8, 64, 192), "tall": (8, 192, 64)}
COMPILED = ("small, experts", "moonlight, experts", "K2, experts", "twins only")  # the compiler takes its seconds


def bound(B, M, K):
    """(FLOPs of the three full products, seconds that a step takes at least: half the arithmetic in the symmetric ones,
    every operand read once and every result written once)."""
    size, flops, half = 2, 2 * M * M * K, M * M * K
    parts = [(half, M * K + M * M), (M**3, 2 * M * M), (flops, 2 * M * K + M * M)]
    return B * (2 * flops + 2 * M**3), sum(B * max(f / FLOPS, size * n / BANDWIDTH) for f, n in parts)


def repeated(function, times=10):
    return lambda: [function() for _ in range(times)][-1]


def products(B, M, K, device, dtype):
    """Seconds of every product of a step, alone."""
    from kernels.triton_newton_schulz import symmetric_product
    X = torch.randn(B, M, K, device=device, dtype=dtype) / K**0.5
    gram = symmetric_product_twin(X)
    arms = {"gram bmm": lambda: torch.bmm(X, X.mT), "gram triton": lambda: symmetric_product(X),
            "polynomial baddbmm": lambda: torch.baddbmm(gram, gram, gram, beta=-4.8, alpha=2.0),
            "polynomial triton": lambda: symmetric_product(gram, gram, 2.0, -4.8, 3.4),
            "last baddbmm": lambda: torch.baddbmm(X, gram, X, beta=3.4), "last bmm": lambda: torch.bmm(gram, X)}
    return {name: spent / 10 for name, spent in
            bench.interleaved({name: repeated(arm) for name, arm in arms.items()}).items()}


def whole(name, B, rows, columns, device, dtype, missing):
    """Seconds of every arm on the whole function, five steps."""
    G = torch.randn(B, rows, columns, device=device, dtype=dtype)

    def chosen(on, function):
        def arm():
            with backend.running(on):
                return function()
        return arm
    plain = lambda: newton_schulz.newton_schulz(G, dtype=dtype)
    arms = {"twin": chosen(False, plain)}
    if device.type == "cuda":
        arms |= {"triton": chosen(True, plain),
                 "triton replayed": chosen(True, lambda: newton_schulz_replayed(G, dtype=dtype))}
        if G.numel() > newton_schulz.REPLAY_ELEMENTS:
            missing[f"{name}, replayed"] = "larger than REPLAY_ELEMENTS: newton_schulz itself"
        if name in COMPILED:
            compiled = torch.compile(newton_schulz.newton_schulz, dynamic=False, fullgraph=True)
            arms["compiled twin"] = chosen(False, lambda: compiled(G, dtype=dtype))
        else:
            missing[f"{name}, compiled twin"] = "left out for time"
        function = torch_muon._zeropower_via_newtonschulz
        arms["torch.optim, each"] = lambda: [function(g, (3.4445, -4.775, 2.0315), 5, 1e-7) for g in G]
    seconds = bench.interleaved(arms, rounds=5, warmup=2)
    return seconds


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype, missing, result, ratios = torch.bfloat16 if on_gpu else torch.float32, {}, {}, {}
    if not on_gpu:
        missing["triton, replayed, compiled twin, torch.optim"] = "no CUDA device: small sizes, the twin alone"
    for name, (B, rows, columns) in (STACKS if on_gpu else SMALL).items():
        M, K = sorted((rows, columns))
        flops, least = bound(B, M, K)
        seconds = whole(name, B, rows, columns, device, dtype, missing)
        result[name] = {"shape": (B, rows, columns), "seconds": seconds, "products": {}}
        for arm, spent in seconds.items():
            share = f", {5 * least / spent:4.0%} of the roofline" if on_gpu else ""
            print(f"{name:18} {str((B, rows, columns)):18} {arm:18} {1e3 * spent:9.2f} ms "
                  f"{seconds['twin'] / spent:5.2f} x twin {5 * flops / spent / 1e12:6.1f} full TFLOP/s{share}",
                  flush=True)
        if not on_gpu:
            continue
        ratios[f"Newton-Schulz, {name}: twin / triton, time"] = seconds["twin"] / seconds["triton"]
        result[name]["products"] = alone = products(B, M, K, device, dtype)
        work = {"gram": (2 * M * M * K, M * K + M * M), "polynomial": (2 * M**3, 2 * M * M),
                "last": (2 * M * M * K, 2 * M * K + M * M)}
        for arm, spent in alone.items():
            flops, elements = (B * part for part in work[arm.split()[0]])
            print(f"{'':18} {arm:37} {1e6 * spent:9.1f} us {flops / spent / 1e12:6.1f} full TFLOP/s "
                  f"{2 * elements / spent / 1e9:6.0f} GB/s", flush=True)
        print(f"{'':18} triton pays from a short side of {newton_schulz.SMALLEST_M} by now; here it is {M}")
    for arm, reason in missing.items():
        print(f"not run: {arm}: {reason}")
    bench.save(f"newton_schulz-{device.type}", {"ratios": ratios, "results": result, "missing": missing})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

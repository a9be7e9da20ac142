"""Attention: every arm of kernels/attention.py forward and backward at the models' sizes, the maximum alone, decoding.

    python -m bench.attention [--tune]

--tune, on a GPU: Triton's kernels one by one with other tiles, for triton_attention.blocks; minutes of compiling.
"""

import torch

import bench
import errors
from kernels import attention, backend, selfcheck

PEAK_FLOPS, PEAK_BYTES = 788e12, 4.3e12  # an H200, measured
# (B, T, H, Q, V); the K2 slice has 8,192 tokens
SIZES = {"small": (32, 1024, 6, 192, 128), "moonlight": (4, 4096, 16, 192, 128), "k2": (2, 4096, 64, 192, 128)}
CPU_SIZES = {"tiny": (2, 256, 4, 24, 16), "narrow": (2, 512, 3, 96, 64)}
DECODE = {"small": (8, 1024, 12, 256, 32), "moonlight": (16, 4096, 16, 512, 64), "k2": (16, 4096, 64, 512, 64)}
CPU_DECODE = {"tiny": (2, 256, 4, 16, 4), "narrow": (2, 1024, 12, 256, 32)}  # (B, S, H, R, P)
# FLOPs over visible pairs as multiples of (Q, V), of the method. Triton's backward does (8, 6): its two kernels make
# the scores twice, so that no sum needs atomics.
WORK = {"forward": (2, 2), "backward": (6, 4)}


def runnable(shape, dtype, device, documents):
    """({arm: function}, {arm: why not}) for one size; every arm was compared with the twin."""
    B, T, H, Q, V = shape
    tensors, first = attention.sample(B, H, T, Q, V, dtype, device, documents)
    functions, reasons = {}, {}
    arms = {**attention.ARMS, "math compiled": torch.compile(attention.attention_math, dynamic=False)}
    chunks = -(-T // attention.QUERY_CHUNK)
    for name, arm in arms.items():
        arm = torch.compile(arm, dynamic=False) if name in attention.COMPILED_ALONE else arm
        if documents and name not in (*attention.KNOW_DOCUMENTS, "math compiled"):
            reasons[name] = "does not know documents"
        elif name == "triton" and not backend.triton_runs(tensors[0]):
            reasons[name] = "needs a GPU"
        elif name in ("cudnn", "flash", "flex") and device == "cpu":
            reasons[name] = "needs a GPU"
        elif name == "math compiled" and (chunks > 8 or documents):
            reasons[name] = "as without documents" if documents else f"{chunks} unrolled chunks compile too long"
        else:
            run = lambda arm=arm: attention.forward_and_backward(arm, tensors, Q**-0.5, first)
            try:
                reasons[name] = attention.wrong(arm, H, T, Q, V, dtype, device, documents)
                run()
            except Exception as error:  # whatever a library says
                reasons[name] = f"{type(error).__name__}: {str(error).strip()[:100]}"
            if reasons[name] is None:
                functions[name] = run
    return functions, {name: why for name, why in reasons.items() if why}


def report(label, seconds, flops, n_bytes):
    """A line per arm: time, rates, share of the roofline (on a GPU), and time as a multiple of the first arm's."""
    rows, reference = {}, next(iter(seconds))
    roofline = max(flops / PEAK_FLOPS, n_bytes / PEAK_BYTES)
    for arm, spent in seconds.items():
        rows[arm] = {"ms": 1000 * spent, "tflops": flops / spent / 1e12, "gbytes": n_bytes / spent / 1e9,
                     f"over {reference}": spent / seconds[reference]}
        if torch.cuda.is_available():
            rows[arm]["roofline"] = roofline / spent
        print(f"{label:24} {arm:14} {1000 * spent:9.3f} ms {rows[arm]['tflops']:8.2f} TFLOP/s "
              f"{rows[arm]['gbytes']:8.1f} GB/s  {spent / seconds[reference]:6.2f} x {reference}"
              + (f"  {roofline / spent:6.1%} of the roofline" if torch.cuda.is_available() else ""))
    return rows


def attend(name, shape, dtype, device, documents):
    B, T, H, Q, V = shape
    torch._dynamo.reset()  # or the later sizes would exceed its limit of compiled variants and run uncompiled
    functions, reasons = runnable(shape, dtype, device, documents)
    pairs = B * H * T * (T + 1) / 2 / (3 if documents else 1)  # _sample has three documents
    flops = pairs * sum(WORK[part][0] * Q + WORK[part][1] * V for part in ("forward", "backward"))
    n_bytes = B * H * T * (8 * Q + 7 * V) * dtype.itemsize  # q, k, v, o read or written by each pass at least once
    label = name + " documents" * documents
    rows = report(label, bench.interleaved(functions, rounds=7, warmup=2), flops, n_bytes)
    for arm, why in reasons.items():
        print(f"{label:24} {arm:14}         - {why}")
    return {"shape": shape, "arms": rows, "not run": reasons}


def maximum(name, shape, dtype, device):
    B, T, H, Q, _ = shape
    (q, k, *_), _ = attention.sample(B, H, T, Q, Q, dtype, device, False)
    lse = torch.arange(1, T + 1, device=device).log().expand(B, H, T).contiguous()  # as of logits 0: no head is peaked
    limit = torch.tensor(100.0, device=device)
    arms = {"twin": lambda: attention.max_logit_math(q, k, Q**-0.5)}
    if backend.triton_runs(q):
        arms["triton"] = lambda: attention.max_logit(q, k, Q**-0.5)
        arms["with an LSE"] = lambda: attention.max_logit(q, k, Q**-0.5, None, lse)
        arms["above 100"] = lambda: attention.max_logit(q, k, Q**-0.5, None, lse, limit)  # a step that is not logged
    return report(name + " maximum", bench.interleaved(arms, rounds=5, warmup=2), B * H * T * (T + 1) * Q,
                  2 * B * H * T * Q * dtype.itemsize)


def decode(name, shape, dtype, device):
    B, S, H, R, P = shape
    q, cache = (torch.randn(*size, R + P, device=device, dtype=dtype) for size in ((B, H), (B, S)))
    compiled = torch.compile(attention.latent_decode_math, dynamic=False)
    arms = {"twin": lambda: attention.latent_decode_math(q, cache, 0.05, R),
            "twin compiled": lambda: compiled(q, cache, 0.05, R)}
    if backend.triton_runs(q):
        arms["triton"] = lambda: attention.latent_decode(q, cache, 0.05, R)
    return report(name + " decode", bench.interleaved(arms, rounds=15, warmup=3), 2 * B * H * S * (2 * R + P),
                  B * S * (R + P) * dtype.itemsize)


def tune(name, B, T, H, Q, V):
    """Median milliseconds of each kernel with other tiles; those that do not fit say so."""
    from kernels import triton_attention as kernels
    (q, k, v, grad), _ = attention.sample(B, H, T, Q, V, torch.bfloat16, "cuda", False)
    scale, original = Q**-0.5, kernels.blocks
    o, lse, _ = kernels.forward(q, k, v, scale)
    calls = {"forward": lambda: kernels.forward(q, k, v, scale), "maximum": lambda: kernels.max_logits(q, k, scale)}
    calls |= {kernel: lambda: kernels.backward(grad, q, k, v, o, lse, scale) for kernel in ("dq", "dkdv")}
    for kernel, call in calls.items():
        found = {}
        for large, small in ((128, 64), (128, 128), (64, 64), (128, 32), (64, 32)):
            for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
                sizes = {"BM": small, "BN": large} if kernel == "dkdv" else {"BM": large, "BN": small}
                tile = {**sizes, "num_warps": warps, "num_stages": stages}
                kernels.blocks = lambda asked, *shape, kernel=kernel, tile=tile: (
                    {**tile, "EVEN": True} if asked == kernel else original(asked, *shape))
                try:
                    found[str(tile)] = 1000 * bench.interleaved({"": call}, rounds=5, warmup=2)[""]
                except Exception as error:
                    print(f"{name} {kernel} {tile}: {type(error).__name__}")
        for tile, spent in sorted(found.items(), key=lambda item: item[1])[:4]:
            print(f"{name} {kernel} {tile}: {spent:.3f} ms" + " for the whole backward" * (kernel[0] == "d"))
    kernels.blocks = original


def main(argv):
    if set(argv) - {"--tune"}:
        raise errors.UserError(f"what is {' '.join(argv)}? There is --tune, --out=FOLDER, and --help")
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    selfcheck.use("triton" if cuda else "torch", torch.device(device), dtype)
    if not cuda:
        print("no GPU: small sizes, PyTorch only")
    if "--tune" in argv:
        if not cuda:
            raise errors.UserError("--tune needs a GPU")
        for name in ("small", "k2"):
            tune(name, *SIZES[name])
        return
    result = {"ratios": {}, "attention": {}, "maximum": {}, "decode": {}}
    for name, shape in (SIZES if cuda else CPU_SIZES).items():
        for documents in (False, True):
            label = name + " documents" * documents
            result["attention"][label] = attend(name, shape, dtype, device, documents)
            ms = {arm: row["ms"] for arm, row in result["attention"][label]["arms"].items()}
            others = [spent for arm, spent in ms.items() if arm != "triton"]
            if "triton" in ms and others:
                result["ratios"][f"attention, {label}: fastest other arm / triton, time"] = min(others) / ms["triton"]
            bench.save(f"attention-{device}", result)  # what is known, in case the rest is not done in time
        result["maximum"][name] = maximum(name, shape, dtype, device)
    for name, shape in (DECODE if cuda else CPU_DECODE).items():
        result["decode"][name] = decode(name, shape, dtype, device)
    bench.save(f"attention-{device}", result)


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

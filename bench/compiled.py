"""Every Triton kernel compiled for an H100 or H200 (sm_90a) at real sizes: registers, spills, shared memory, wgmma.
The experts', whose tiles depend on what fits, for an A100 (sm_80) and an RTX 4090 or L40S (sm_89) too.
Needs no GPU: the launchers run on meta tensors, and what they would launch is compiled instead.

    python -m bench.compiled [part of a case's name ...]
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

import bench
import errors
from errors import UserError, said

SHARED_LIMIT = {90: 227 * 1024, 89: 99 * 1024, 80: 163 * 1024}  # bytes that one block may use
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1"}
OPTIONS = {"num_warps", "num_stages", "maxnreg"}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


CASES = {}  # name -> function that calls launchers with meta tensors
ARCHITECTURES = {}  # of cases for another than sm_90a


def case(function):
    CASES[function.__name__] = function
    return function


def products(B, M, K, dtype=torch.bfloat16):
    from kernels.triton_newton_schulz import normalised, symmetric_product
    normalised(meta(B, M, K, dtype=dtype), dtype, 1.0)
    gram = symmetric_product(meta(B, M, K, dtype=dtype))
    symmetric_product(meta(B, K, M, dtype=dtype).mT)
    symmetric_product(gram, gram, 2.0, -4.8, 3.4)


@case
def newton_schulz_small():
    products(704, 256, 768)


@case
def newton_schulz_k2():
    products(4, 2048, 7168)


@case
def newton_schulz_fp32():
    products(4, 768, 1152, torch.float32)


def loss_of_chunk(N, V, dtype=torch.bfloat16):
    from kernels.triton_cross_entropy import cross_entropy_
    for write in (True, False):
        cross_entropy_(meta(N, V, dtype=dtype), meta(N, dtype=torch.int64), 1e-4, -100, write)


@case
def momentum_small():
    from kernels.triton_momentum import direction, update_
    moving, noise = meta(64, 512, 768, dtype=torch.float32), meta(64 * 512, dtype=torch.bool)
    ahead = direction(moving, moving, noise, 0.95, True, torch.bfloat16)
    update_(moving.view(-1, 768), ahead, meta(dtype=torch.float32), 0.1, 0.7)


@case
def cross_entropy_small():
    from kernels.triton_cross_entropy import rescale_
    loss_of_chunk(9472, 50304)
    for gradient in (meta(9472, 768), meta(50304, 768, dtype=torch.float32)):
        rescale_(gradient, meta(dtype=torch.float32), 2.0**-19)


@case
def cross_entropy_k2():
    loss_of_chunk(2816, 163840)


@case
def cross_entropy_odd_and_fp32():
    loss_of_chunk(1000, 50257)
    loss_of_chunk(1000, 50304, torch.float32)
    loss_of_chunk(1000, 257, torch.float32)


def route_and_sort(T, B, E, K, n_group=1, topk_group=1):
    from kernels import triton_routing
    logits = meta(B * T, E, dtype=torch.float32)
    triton_routing.route(logits, meta(E, dtype=torch.float32), B, K, n_group, topk_group, True, 2.5)
    chosen = meta(B * T, K, dtype=torch.int64)
    triton_routing.route_backward(logits, chosen, meta(B * T, K, dtype=torch.float32), meta(dtype=torch.float32),
                                  meta(B, E, dtype=torch.int32), True, 2.5)
    triton_routing.sort_by_expert(chosen, E)


def experts(N, D, F, E, K, dtype=torch.bfloat16):
    from kernels import triton_experts
    order = meta(N * K, dtype=torch.int64)
    inputs = (meta(N, D, dtype=dtype), meta(N, K, dtype=torch.float32), order, order, meta(E, dtype=torch.int64),
              meta(E, 2 * F, D, dtype=dtype), meta(E, D, F, dtype=dtype))
    y, z = triton_experts.forward(*inputs)
    grads = [meta(*matrix.shape, dtype=torch.float32) for matrix in inputs[-2:]]
    triton_experts.backward(y, *inputs, z, *grads, meta(dtype=torch.float32))


@case
def routing_small():
    route_and_sort(1024, 64, 64, 7)


@case
def routing_k2():
    route_and_sort(4096, 2, 384, 8)


@case
def routing_deepseek_v3():
    route_and_sort(4096, 2, 256, 8, 8, 4)


@case
def experts_small():
    experts(65536, 768, 256, 64, 7)


@case
def experts_k2():
    experts(8192, 7168, 2048, 384, 8)


@case
def experts_few_rows():
    experts(256, 768, 256, 64, 7)


@case
def experts_fp32():
    experts(4096, 768, 256, 64, 7, torch.float32)


@case
def experts_fp16():
    experts(4096, 768, 256, 64, 7, torch.float16)


@case
def experts_of_odd_width():
    experts(4096, 720, 208, 64, 7)
    experts(4096, 720, 200, 64, 7)


def experts_elsewhere(architecture):
    """small and moonlight on a GPU that is no H100, with the tiles that it gets."""
    from unittest.mock import patch
    with patch("kernels.expert_tiles.shared_limit", lambda: SHARED_LIMIT[architecture]):
        experts(32768, 768, 256, 64, 7)
        experts(8192, 2048, 1408, 64, 6)


@case
def experts_ampere():
    experts_elsewhere(80)


@case
def experts_ada():
    experts_elsewhere(89)


ARCHITECTURES |= {"experts_ampere": 80, "experts_ada": 89}


def attend(B, T, H, Q, V, documents=False, dtype=torch.bfloat16):
    from kernels import triton_attention
    q, k, v, o = (meta(B, T, H, width, dtype=dtype).transpose(1, 2) for width in (Q, Q, V, V))
    first = meta(B, T, dtype=torch.int32) if documents else None
    triton_attention.forward(q, k, v, 0.1, first)
    triton_attention.backward(o, q, k, v, o, meta(B, H, T, dtype=torch.float32), 0.1, first)
    triton_attention.max_logits(q, k, 0.1, first)
    triton_attention.max_logits(q, k, 0.1, first, meta(B, H, T, dtype=torch.float32), meta(H, dtype=torch.float32))


@case
def attention_small():
    attend(32, 1024, 12, 96, 64)
    attend(32, 1000, 12, 96, 64)


@case
def attention_documents():
    attend(32, 1024, 12, 96, 64, True)
    attend(32, 1000, 12, 96, 64, True)


@case
def attention_k2():
    attend(2, 4096, 64, 192, 128)
    attend(2, 4000, 64, 192, 128)


@case
def attention_k2_documents():
    attend(2, 4096, 64, 192, 128, True)
    attend(2, 4000, 64, 192, 128, True)


@case
def attention_narrow():
    attend(32, 512, 6, 48, 32)
    attend(32, 256, 4, 24, 16)
    attend(32, 1024, 12, 64, 64)
    attend(8, 2048, 16, 128, 128)


@case
def attention_fp32():
    attend(2, 200, 3, 96, 64, True, torch.float32)
    attend(1, 256, 2, 192, 128, False, torch.float32)


@case
def decode():
    from kernels import triton_decode
    for B, S, H, R, P, dtype in ((1, 4096, 64, 512, 64, torch.bfloat16), (8, 1024, 12, 256, 32, torch.bfloat16),
                                 (8, 1024, 12, 256, 32, torch.float32)):
        cache = meta(B, S, R + P, dtype=dtype)
        triton_decode.latent_decode(meta(B, H, R + P, dtype=dtype), cache, 0.1, R)


# ----------------------------------------------------------------------------- compile instead of launching

def launches_of(function):
    """[(kernel, arguments by name, launch options)] of everything that function() would launch."""
    from triton.runtime.jit import JITFunction
    found, original = [], JITFunction.run

    def record(self, *args, grid, warmup, **keywords):
        options = {key: keywords.pop(key) for key in list(keywords) if key in OPTIONS}
        found.append((self, dict(zip(self.arg_names, args)) | keywords, options))
    JITFunction.run = record
    try:
        function()
    finally:
        JITFunction.run = original
    return found


def compile_launch(kernel, arguments, options, architecture=90):
    """Registers, spilled bytes, shared memory and whether there is a wgmma, of one launch compiled for sm_90a (or 80,
    or 89)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = "*" + TYPES[value.dtype], True
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -2**31 <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        gpu = f"sm_{architecture}{'a' * (architecture >= 90)}"
        report = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={gpu}", ptx, "-o", "/dev/null"],
                                capture_output=True, encoding="utf-8", errors="replace")
        if report.returncode:
            raise RuntimeError(f"ptxas: {report.stderr.strip()[:300]}")
        report = report.stderr
    number = lambda pattern: int(re.search(pattern, report)[1])
    return {"registers": number(r"Used (\d+) registers"), "spilled": number(r"(\d+) bytes spill stores"),
            "shared": compiled.metadata.shared, "wgmma": "wgmma" in compiled.asm["ptx"],
            "warps": compiled.metadata.num_warps}


def version():
    """That of Triton, to which the compiler's inner functions belong that are called here."""
    try:
        from triton import __version__
    except Exception as error:  # a damaged one raises anything
        raise UserError(f"this needs Triton ({said(error)}): pip install -r requirements-dev.txt") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("where Triton interprets, nothing is compiled: unset TRITON_INTERPRET")
    return __version__


def rows_of(name, version):
    """What every launch of a case compiles to; whatever another Triton says against it, in one line."""
    try:
        return [{"kernel": kernel.__name__,
                 **compile_launch(kernel, arguments, options, ARCHITECTURES.get(name, 90))}
                for kernel, arguments, options in launches_of(CASES[name])]
    except Exception as error:
        raise UserError(f"Triton {version} does not compile {name} as the one in requirements-dev.txt does: "
                        f"{said(error)}") from error


def main(parts):
    rows, seen, bad, triton_version = {}, set(), [], version()
    if unknown := [part for part in parts if not any(part in name for name in CASES)]:
        raise UserError(f"no case is called {' or '.join(unknown)}: {', '.join(CASES)}")
    for name in CASES:
        if parts and not any(part in name for part in parts):
            continue
        for row in rows_of(name, triton_version):
            key = (name, *row.values())
            if key in seen:
                continue
            seen.add(key)
            rows.setdefault(name, []).append(row)
            print(f"{name:24} {row['kernel']:28} {row['registers']:4} registers, {row['spilled']:4} B spilled, "
                  f"{row['shared'] / 1024:6.1f} KB shared, {row['warps']} warps{', wgmma' * row['wgmma']}", flush=True)
            if row["spilled"] or row["shared"] > SHARED_LIMIT[ARCHITECTURES.get(name, 90)]:
                bad.append(f"{name} {row['kernel']}")
    if not parts:
        bench.save("compiled-sm90a", {"cases": rows, "triton": triton_version})
    return "spills, or more shared memory than a block has: " + ", ".join(bad) if bad else 0


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

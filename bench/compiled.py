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
from unittest.mock import patch

import torch

import bench
import errors
from errors import UserError, said

SHARED_LIMIT = {90: 227 * 1024, 89: 99 * 1024, 80: 163 * 1024}  # bytes that one block may use
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1"}
OPTIONS = {"num_warps", "num_stages", "maxnreg"}
# Calls of kernels/triton_ahead.py, in bf16 for sm_90a unless one of the two tables below says otherwise.
CASES = {
    "newton_schulz_small": [["products", 704, 256, 768]],
    "newton_schulz_k2": [["products", 4, 2048, 7168]],
    "newton_schulz_fp32": [["products", 4, 768, 1152]],
    "momentum_small": [["steps", 64 * 512, 768]],
    "cross_entropy_small": [["loss_of_chunk", 9472, 50304]],
    "cross_entropy_k2": [["loss_of_chunk", 2816, 163840]],
    "cross_entropy_odd": [["loss_of_chunk", 1000, 50257]],
    "cross_entropy_fp32": [["loss_of_chunk", 1000, 50304], ["loss_of_chunk", 1000, 257]],
    "routing_small": [["route_and_sort", 1024, 64, 64, 7]],
    "routing_k2": [["route_and_sort", 4096, 2, 384, 8]],
    "routing_deepseek_v3": [["route_and_sort", 4096, 2, 256, 8, 8, 4]],
    "experts_small": [["experts", 65536, 768, 256, 64, 7]],
    "experts_k2": [["experts", 8192, 7168, 2048, 384, 8]],
    "experts_few_rows": [["experts", 256, 768, 256, 64, 7]],
    "experts_fp32": [["experts", 4096, 768, 256, 64, 7]],
    "experts_fp16": [["experts", 4096, 768, 256, 64, 7]],
    "experts_of_odd_width": [["experts", 4096, 720, 208, 64, 7], ["experts", 4096, 720, 200, 64, 7]],
    "experts_ampere": [["experts", 32768, 768, 256, 64, 7], ["experts", 8192, 2048, 1408, 64, 6]],
    "experts_ada": [["experts", 32768, 768, 256, 64, 7], ["experts", 8192, 2048, 1408, 64, 6]],
    "attention_small": [[call, 32, T, 12, 96, *V] for T in (1024, 1000) for call, *V in (["attend", 64], ["maxima"])],
    "attention_documents": [["attend", 32, 1024, 12, 96, 64, True], ["attend", 32, 1000, 12, 96, 64, True],
                            ["maxima", 32, 1000, 12, 96, True]],
    "attention_k2": [[call, 2, T, 64, 192, *V] for T in (4096, 4000) for call, *V in (["attend", 128], ["maxima"])],
    "attention_k2_documents": [["attend", 2, T, 64, 192, 128, True] for T in (4096, 4000)],
    "attention_narrow": [["attend", 32, 512, 6, 48, 32], ["attend", 32, 256, 4, 24, 16], ["maxima", 32, 256, 4, 24],
                         ["attend", 32, 1024, 12, 64, 64], ["attend", 8, 2048, 16, 128, 128]],
    "attention_fp32": [["attend", 2, 200, 3, 96, 64, True], ["attend", 1, 256, 2, 192, 128],
                       ["maxima", 1, 256, 2, 192]],
    "decode": [["decode", 1, 64, 4096, 512, 64], ["decode", 8, 12, 1024, 256, 32]],
    "decode_fp32": [["decode", 8, 12, 1024, 256, 32]],
}
DTYPE = {name: torch.float32 for name in CASES if name.endswith("fp32")} | {"experts_fp16": torch.float16}
ARCHITECTURE = {"experts_ampere": 80, "experts_ada": 89}  # with the tiles that fit them


def launches_of(name):
    """[(kernel, arguments by name, launch options)] of everything that a case would launch."""
    from kernels import triton_ahead
    limit = SHARED_LIMIT[ARCHITECTURE.get(name, 90)]
    with patch("kernels.expert_tiles.shared_limit", lambda: limit):
        found = triton_ahead.launches(CASES[name], DTYPE.get(name, torch.bfloat16))
    return [(kernel, dict(zip(kernel.arg_names, arguments))
             | {key: value for key, value in keywords.items() if key not in OPTIONS},
             {key: value for key, value in keywords.items() if key in OPTIONS})
            for kernel, arguments, keywords in found]


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
                 **compile_launch(kernel, arguments, options, ARCHITECTURE.get(name, 90))}
                for kernel, arguments, options in launches_of(name)]
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
            if row["spilled"] or row["shared"] > SHARED_LIMIT[ARCHITECTURE.get(name, 90)]:
                bad.append(f"{name} {row['kernel']}")
    if not parts:
        bench.save("compiled-sm90a", {"cases": rows, "triton": triton_version})
    return "spills, or more shared memory than a block has: " + ", ".join(bad) if bad else 0


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

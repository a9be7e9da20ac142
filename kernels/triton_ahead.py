"""A worker that compiles Triton's kernels before a run needs them: ahead.py starts several.

In every worker the launchers run on meta tensors, which lists what the self-check and a run of these sizes will launch;
they compile it in turns, and Triton's cache on disk hands it over. Next: ../bench/compiled.py, which judges
what is compiled.
"""

import os
import sys

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from errors import said
from kernels import (
    ahead,
    triton_attention,
    triton_cross_entropy,
    triton_decode,
    triton_experts,
    triton_momentum,
    triton_newton_schulz,
    triton_routing,
)
from kernels.expert_tiles import TILES, tile_key

# ----------------------------------------------------------------------------- what is launched, on meta tensors

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(B, T, H, Q, V, documents=False, dtype=torch.bfloat16):
    q, k, v, o = (meta(B, T, H, width, dtype=dtype).transpose(1, 2) for width in (Q, Q, V, V))
    first = meta(B, T, dtype=torch.int32) if documents else None
    triton_attention.forward(q, k, v, 0.1, first)
    triton_attention.backward(o, q, k, v, o, meta(B, H, T, dtype=torch.float32), 0.1, first)


def maxima(B, T, H, Q, documents=False, dtype=torch.bfloat16):
    q, k = (meta(B, T, H, Q, dtype=dtype).transpose(1, 2) for _ in range(2))
    first = meta(B, T, dtype=torch.int32) if documents else None
    triton_attention.max_logits(q, k, 0.1, first)
    triton_attention.max_logits(q, k, 0.1, first, meta(B, H, T, dtype=torch.float32), meta(H, dtype=torch.float32))


def route_and_sort(T, B, E, K, n_group=1, topk_group=1):
    logits = meta(B * T, E, dtype=torch.float32)
    triton_routing.route(logits, meta(E, dtype=torch.float32), B, K, n_group, topk_group, True, 2.5)
    chosen = meta(B * T, K, dtype=torch.int64)
    triton_routing.route_backward(logits, chosen, meta(B * T, K, dtype=torch.float32), meta(dtype=torch.float32),
                                  meta(B, E, dtype=torch.int32), True, 2.5)
    triton_routing.sort_by_expert(chosen, E)


def experts(N, D, F, E, K, dtype=torch.bfloat16):
    order = meta(N * K, dtype=torch.int64)
    inputs = (meta(N, D, dtype=dtype), meta(N, K, dtype=torch.float32), order, order, meta(E, dtype=torch.int64),
              meta(E, 2 * F, D, dtype=dtype), meta(E, D, F, dtype=dtype))
    y, z = triton_experts.forward(*inputs)
    grads = [meta(*matrix.shape, dtype=torch.float32) for matrix in inputs[-2:]]
    triton_experts.backward(y, *inputs, z, *grads, meta(dtype=torch.float32))


def loss_of_chunk(N, V, dtype=torch.bfloat16):
    for write in (True, False):
        triton_cross_entropy.cross_entropy_(meta(N, V, dtype=dtype), meta(N, dtype=torch.int64), 1e-4, -100, write)
    for gradient in (meta(N, 64, dtype=dtype), meta(V, 64, dtype=torch.float32)):
        triton_cross_entropy.rescale_(gradient, meta(dtype=torch.float32), 1e-6)


def products(B, M, K, dtype=torch.bfloat16):
    triton_newton_schulz.normalised(meta(B, M, K, dtype=dtype), dtype, 1.0)
    gram = triton_newton_schulz.symmetric_product(meta(B, M, K, dtype=dtype))
    triton_newton_schulz.symmetric_product(meta(B, K, M, dtype=dtype).mT)
    triton_newton_schulz.symmetric_product(gram, gram, 2.0, -4.8, 3.4)


def steps(rows, columns, dtype=torch.bfloat16):
    moving, noise = meta(rows, columns, dtype=torch.float32), meta(rows, dtype=torch.bool)
    ahead = triton_momentum.direction(moving, moving, noise, 0.95, True, dtype)
    triton_momentum.update_(moving, ahead, meta(dtype=torch.float32), 0.1, 0.7)


def with_tiles(tiles, N, D, F, E, K, dtype=torch.bfloat16):
    TILES.update({tile_key(kernel, D, F, N * K // E, dtype): tuple(tile) for kernel, tile in tiles.items()})
    experts(N, D, F, E, K, dtype)


def decode(B, H, S, R, P, dtype=torch.bfloat16):
    triton_decode.latent_decode(meta(B, H, R + P, dtype=dtype), meta(B, S, R + P, dtype=dtype), 0.1, R)


CALLS = {function.__name__: function
         for function in (attend, maxima, route_and_sort, experts, with_tiles, loss_of_chunk, products, steps, decode)}


# ----------------------------------------------------------------------------- a worker

def launches(calls, dtype):
    """[(kernel, arguments, keywords)] of what calls, [name of CALLS, its arguments], launch, each kind once."""
    found, original = {}, JITFunction.run

    def record(kernel, *arguments, grid, warmup, **keywords):
        kinds = [_kind(value, parameter.is_constexpr) for value, parameter in zip(arguments, kernel.params)]
        found.setdefault((kernel.__name__, *kinds, *sorted(keywords.items())), (kernel, arguments, keywords))
    JITFunction.run = record
    try:
        for name, *arguments in calls:
            CALLS[name](*arguments, **({} if name == "route_and_sort" else {"dtype": dtype}))
    finally:
        JITFunction.run = original
    return list(found.values())


def _kind(value, constant):
    """What Triton compiles for: of integers that are no constants, whether they are 1, multiples of 16, of 32 bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    whole = isinstance(value, int) and not constant
    return (value == 1, value % 16 == 0, -2**31 <= value < 2**31) if whole else repr(value)


def compile_in_turn(calls, dtype, niceness=0):
    """Compile what the other workers have not begun, what takes longest first, and the launchers that call it. The grid
    does not matter."""
    os.nice(niceness)
    slowness = lambda launch: launch[0].src.count("dot") + 4 * launch[0].src.count("argmax")
    todo = sorted(launches(calls, getattr(torch, dtype)), key=slowness, reverse=True)
    for turn in ahead.turns():
        if turn >= len(todo):
            break
        kernel, arguments, keywords = todo[turn]
        try:
            compiled = kernel.run(*arguments, grid=(1,), warmup=True, **keywords)
            driver.active.launcher_cls(compiled.src, compiled.metadata)
        except Exception as error:  # whatever a compiler says: where it is needed, it will say it again
            print(f"kernels: {kernel.__name__} does not compile ahead: {said(error)}", file=sys.stderr)

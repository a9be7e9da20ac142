"""Attention of single queries to MLA's latent cache in Triton, for generation: the keys of a sequence are split in
ranges that run in parallel, each gives a part of the output and its log-sum-exp, and these are weighed together after.

Shapes: B batch, H heads, S cached positions, W = R + P cache width: latent, which is also the value, and RoPE key. R
and P are padded to the powers of two R0 and P0. Next: attention.py, which wraps `latent_decode` in a torch.library op.
"""

import torch
import triton
import triton.language as tl

from kernels.backend import INTERPRETED
from kernels.triton_attention import LOG2E, LOWEST, dot_transposed, load_tile, rows_of, store_tile


# One query per sequence against the latent cache: the part of the output, and its log-sum-exp, of one range of keys.
# Grid: (range, 16 heads, sequence). Bound by reading the cache, once per 16 heads; 2 (W + R) FLOPs per head and key.
@triton.jit(do_not_specialize=["S", "length"])
def decode_kernel(q, cache, part, lse, scale, q_b, q_h, cache_b, cache_s, H, S, length, W: tl.constexpr,
                  R: tl.constexpr, R0: tl.constexpr, P0: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    piece, pieces, b = tl.program_id(0), tl.num_programs(0), tl.cast(tl.program_id(2), tl.int64)
    h0, columns = tl.program_id(1) * BH, tl.arange(0, BN)
    q, cache = q + b * q_b, cache + b * cache_b
    q0 = load_tile(q, h0, q_h, H, 0, R, BH, R0, False, R0 == R)
    q1 = load_tile(q, h0, q_h, H, R, W, BH, P0, False, R + P0 == W)
    begin = piece * length
    end = tl.minimum(begin + length, S)
    c = scale * LOG2E
    m, l = tl.full([BH], LOWEST, tl.float32), tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, R0], tl.float32)
    for n0 in range(begin, end, BN):
        latent = load_tile(cache, n0, cache_s, end, 0, R, BN, R0, False, R0 == R)
        s = dot_transposed(q0, q1, latent, load_tile(cache, n0, cache_s, end, R, W, BN, P0, False, R + P0 == W), True)
        s = tl.where((n0 + columns < end)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s * c - (m_new * c)[:, None])
        alpha = tl.exp2((m - m_new) * c)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    heads = h0 + tl.arange(0, BH)
    tl.store(lse + (b * H + heads) * pieces + piece, m * scale + tl.log(l), mask=heads < H)
    store_tile(part + (b * H * pieces + piece) * R, h0, pieces * R, H, 0, R, acc / l[:, None], BH, R0)


def latent_decode(q_BHW, cache_BSW, scale, value_width):
    """o_BHR = softmax(scale q cache^T) cache[..., :R], with R = value_width."""
    q, cache = rows_of(q_BHW, cache_BSW)
    (B, H, W), S, R = q.shape, cache.shape[1], value_width
    assert S > 0
    BN, warps, stages = (16, 4, 1) if q.dtype == torch.float32 and not INTERPRETED else (64, 8, 2)
    head_tiles = triton.cdiv(H, 16)
    pieces = max(1, min(triton.cdiv(S, BN), 264 // max(1, B * head_tiles)))  # two programs for each of 132 processors
    length = triton.cdiv(triton.cdiv(S, pieces), BN) * BN
    pieces = triton.cdiv(S, length)
    part = torch.empty(B, H, pieces, R, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, pieces, dtype=torch.float32, device=q.device)
    if part.numel():
        decode_kernel[(pieces, head_tiles, B)](
            q, cache, part, lse, scale, *q.stride()[:2], *cache.stride()[:2], H, S, length, W=W, R=R,
            R0=max(16, triton.next_power_of_2(R)), P0=max(16, triton.next_power_of_2(W - R)), BH=16, BN=BN,
            num_warps=warps, num_stages=stages)
    return (lse.softmax(-1).unsqueeze(2) @ part).squeeze(2).to(q.dtype)

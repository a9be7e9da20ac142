"""Causal attention in Triton, forward and backward, with the exact maximum of the logits; and the maximum alone.

The method is FlashAttention's (arXiv 2205.14135, 2307.08691): tiles of scores exist only on chip, the softmax is
rescaled as tiles arrive, and the backward makes the probabilities again from the saved log-sum-exp. No atomics: every
output element is the sum of one program's loop, so results repeat bit for bit. Documents: `first` is the first position
that a query sees; it never decreases along a row, so both loops stay contiguous ranges.

Shapes: B batch, H heads, T positions, Q query-key width, V value width. A dot wants powers of two: Q is split in Q0 +
Q1 (192 = 128 + 64) and what is left over is masked; V is padded to V0. BM queries and BN keys make a tile.
Next: attention.py, which wraps the launchers at the end in torch.library ops; triton_decode.py.
"""

import torch
import triton
import triton.language as tl

from kernels.backend import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a running maximum starts here: unlike -inf it can be subtracted from itself

# ----------------------------------------------------------------------------- pieces

@triton.jit
def load_tile(base, start, stride, n_rows, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """Rows start..start+ROWS of a matrix with n_rows rows and `width` columns, from `column` on; 0 beyond either. ALL_
    says that nothing is beyond, which saves the registers of a mask."""
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if ALL_ROWS and ALL_COLUMNS:
        tile = tl.load(pointers)
    elif ALL_COLUMNS:
        tile = tl.load(pointers, mask=(start + rows < n_rows)[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=(start + rows < n_rows)[:, None] & (columns < width)[None, :], other=0.0)
    return tile


@triton.jit
def load_parts(base, start, stride, T, Q: tl.constexpr, ROWS: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr,
               EVEN: tl.constexpr):
    """Rows of q or k in two parts; the second is the first if there is none."""
    part0 = load_tile(base, start, stride, T, 0, Q, ROWS, Q0, EVEN, Q0 <= Q)
    part1 = part0
    if Q1 > 0:
        part1 = load_tile(base, start, stride, T, Q0, Q, ROWS, Q1, EVEN, Q0 + Q1 == Q)
    return part0, part1


@triton.jit
def store_tile(base, start, stride, n_rows, column, width, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    mask = (start + rows < n_rows)[:, None] & (columns < width)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot_transposed(a0, a1, b0, b1, TWO: tl.constexpr):
    """[a0 a1] [b0 b1]^T; the second halves count only if TWO."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if TWO:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def head_base(pointer, head, H, stride_b, stride_h):
    return pointer + tl.cast(head // H, tl.int64) * stride_b + tl.cast(head % H, tl.int64) * stride_h


@triton.jit
def key_ranges(first, m0, T, BM: tl.constexpr, BN: tl.constexpr, DOCUMENTS: tl.constexpr):
    """For the queries m0..m0+BM: where the keys start that any of them sees, and where those start that all see."""
    some, all = 0, 0
    if DOCUMENTS:
        some = tl.load(first + m0) // BN * BN
        all = tl.minimum(tl.cdiv(tl.load(first + tl.minimum(m0 + BM, T) - 1), BN) * BN, m0)
    return some, all


@triton.jit
def keys_of(part: tl.constexpr, some, all, m0, T, BM: tl.constexpr):
    """The range of keys of each part of a loop: tiles with document borders, tiles seen whole, the diagonal."""
    if part == 0:
        begin, end = some, all
    elif part == 1:
        begin, end = all, m0
    else:
        begin, end = m0, tl.minimum(m0 + BM, T)
    return begin, end


# ----------------------------------------------------------------------------- forward

# o, lse and one maximum per program. Grid: (query tile, head), a head's tiles side by side so that its keys stay in L2,
# the longest first. 2 (Q + V) FLOPs per visible pair; traffic q + o + lse, and k, v once per query tile, mostly L2's.
@triton.jit
def forward_kernel(q, k, v, o, lse, top, first, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T,
                   Q: tl.constexpr, V: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, DOCUMENTS: tl.constexpr):
    tiles = tl.cdiv(T, BM)
    head, m0 = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, k = head_base(q, head, H, q_b, q_h), head_base(k, head, H, k_b, k_h)
    v, o = head_base(v, head, H, v_b, v_h), head_base(o, head, H, tl.cast(T, tl.int64) * H * V, V)
    rows, columns = m0 + tl.arange(0, BM), tl.arange(0, BN)
    valid = rows < T
    q0, q1 = load_parts(q, m0, q_t, T, Q, BM, Q0, Q1, EVEN)
    if DOCUMENTS:
        first += head // H * T
        first_rows = tl.load(first + rows, mask=valid, other=0)
    some, all = key_ranges(first, m0, T, BM, BN, DOCUMENTS)
    c = scale * LOG2E
    m, l = tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, V0], tl.float32)
    for part in tl.static_range(3):
        begin, end = keys_of(part, some, all, m0, T, BM)
        if DOCUMENTS or part > 0:
            for n0 in range(begin, end, BN):
                k0, k1 = load_parts(k, n0, k_t, T, Q, BN, Q0, Q1, EVEN)
                values = load_tile(v, n0, v_t, T, 0, V, BN, V0, EVEN, V0 == V)
                s = dot_transposed(q0, q1, k0, k1, Q1 > 0)
                if part == 2:
                    s = tl.where((n0 + columns)[None, :] <= rows[:, None], s, float("-inf"))
                if DOCUMENTS and part != 1:
                    s = tl.where((n0 + columns)[None, :] >= first_rows[:, None], s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                p = tl.exp2(s * c - (m_new * c)[:, None])
                alpha = tl.exp2((m - m_new) * c)
                l = l * alpha + tl.sum(p, 1)
                acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
                m = m_new
    store_tile(o, m0, H * V, T, 0, V, acc / l[:, None], BM, V0)
    tl.store(lse + tl.cast(head, tl.int64) * T + rows, m * scale + tl.log(l), mask=valid)
    # tl.max drops NaN; a row's sum of probabilities does not, and is NaN for infinite scores too
    broken = tl.sum(tl.where(valid & ~(l > 0), float("nan"), 0.0), 0)
    tl.store(top + tl.program_id(0), tl.max(tl.where(valid, m, float("-inf")), 0) * scale + broken)


# The maximum alone, for attention computed elsewhere: the same loop with one product. 2 Q FLOPs per visible pair, and
# none in a program whose log-sum-exps all lie below the head's `below` (NaN is not below): their largest stands in.
@triton.jit
def maximum_kernel(q, k, top, first, lse, below, scale, q_b, q_h, q_t, k_b, k_h, k_t, H, T, Q: tl.constexpr,
                   Q0: tl.constexpr, Q1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
                   DOCUMENTS: tl.constexpr, SKIP: tl.constexpr):
    tiles = tl.cdiv(T, BM)
    head, m0 = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, k = head_base(q, head, H, q_b, q_h), head_base(k, head, H, k_b, k_h)
    rows, columns = m0 + tl.arange(0, BM), tl.arange(0, BN)
    valid = rows < T
    if SKIP:
        bound = tl.max(tl.load(lse + tl.cast(head, tl.int64) * T + rows, mask=valid, other=float("-inf")), 0)
        if bound < tl.load(below + head % H):
            tl.store(top + tl.program_id(0), bound)
            return
    q0, q1 = load_parts(q, m0, q_t, T, Q, BM, Q0, Q1, EVEN)
    if DOCUMENTS:
        first += head // H * T
        first_rows = tl.load(first + rows, mask=valid, other=0)
    some, all = key_ranges(first, m0, T, BM, BN, DOCUMENTS)
    largest = tl.full([BM, BN], float("-inf"), tl.float32)
    for part in tl.static_range(3):
        begin, end = keys_of(part, some, all, m0, T, BM)
        if DOCUMENTS or part > 0:
            for n0 in range(begin, end, BN):
                k0, k1 = load_parts(k, n0, k_t, T, Q, BN, Q0, Q1, EVEN)
                s = dot_transposed(q0, q1, k0, k1, Q1 > 0)
                if part == 2:
                    s = tl.where(valid[:, None] & ((n0 + columns)[None, :] <= rows[:, None]), s, float("-inf"))
                if DOCUMENTS and part != 1:
                    s = tl.where((n0 + columns)[None, :] >= first_rows[:, None], s, float("-inf"))
                largest = tl.maximum(largest, s, propagate_nan=tl.PropagateNan.ALL)
    largest = tl.where(valid[:, None], largest, float("-inf"))
    broken = tl.sum(tl.sum(tl.where(largest != largest, float("nan"), 0.0), 1), 0)
    tl.store(top + tl.program_id(0), tl.max(tl.max(largest, 1), 0) * scale + broken)


# ----------------------------------------------------------------------------- backward

# dq, and delta = rowsum(do * o) for the next kernel. Grid and loop as forward's. 2 (2 Q + V) FLOPs per visible pair.
@triton.jit
def dq_kernel(q, k, v, o, do, lse, delta, dq, first, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
              do_b, do_h, do_t, H, T, Q: tl.constexpr, V: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr,
              V0: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, DOCUMENTS: tl.constexpr):
    tiles = tl.cdiv(T, BM)
    head, m0 = tl.program_id(0) // tiles, (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, k = head_base(q, head, H, q_b, q_h), head_base(k, head, H, k_b, k_h)
    v, do = head_base(v, head, H, v_b, v_h), head_base(do, head, H, do_b, do_h)
    size = tl.cast(T, tl.int64) * H
    o, dq = head_base(o, head, H, size * V, V), head_base(dq, head, H, size * Q, Q)
    rows, columns = m0 + tl.arange(0, BM), tl.arange(0, BN)
    valid, numbers = rows < T, tl.cast(head, tl.int64) * T + rows
    q0, q1 = load_parts(q, m0, q_t, T, Q, BM, Q0, Q1, EVEN)
    grad = load_tile(do, m0, do_t, T, 0, V, BM, V0, EVEN, V0 == V)
    delta_rows = tl.sum(grad.to(tl.float32) * load_tile(o, m0, H * V, T, 0, V, BM, V0, EVEN, V0 == V).to(tl.float32), 1)
    tl.store(delta + numbers, delta_rows, mask=valid)
    lse_rows = tl.load(lse + numbers, mask=valid, other=float("inf")) * LOG2E  # inf: rows beyond T get p = 0
    if DOCUMENTS:
        first += head // H * T
        first_rows = tl.load(first + rows, mask=valid, other=0)
    some, all = key_ranges(first, m0, T, BM, BN, DOCUMENTS)
    c = scale * LOG2E
    dq0 = tl.zeros([BM, Q0], tl.float32)
    dq1 = tl.zeros([BM, Q1 if Q1 > 0 else 16], tl.float32)
    for part in tl.static_range(3):
        begin, end = keys_of(part, some, all, m0, T, BM)
        if DOCUMENTS or part > 0:
            for n0 in range(begin, end, BN):
                k0, k1 = load_parts(k, n0, k_t, T, Q, BN, Q0, Q1, EVEN)
                values = load_tile(v, n0, v_t, T, 0, V, BN, V0, EVEN, V0 == V)
                p = tl.exp2(dot_transposed(q0, q1, k0, k1, Q1 > 0) * c - lse_rows[:, None])
                if part == 2:
                    p = tl.where((n0 + columns)[None, :] <= rows[:, None], p, 0.0)
                if DOCUMENTS and part != 1:
                    p = tl.where((n0 + columns)[None, :] >= first_rows[:, None], p, 0.0)
                dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
                ds = (p * (dp - delta_rows[:, None])).to(k0.dtype)
                dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
                if Q1 > 0:
                    dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    store_tile(dq, m0, H * Q, T, 0, Q, dq0 * scale, BM, Q0)
    if Q1 > 0:
        store_tile(dq, m0, H * Q, T, Q0, Q, dq1 * scale, BM, Q1)


# dk and dv. Grid: (key tile, head); loops over the queries that see the tile, scores transposed (keys are rows), so
# that p and ds stay in registers for the products that consume them. 2 (2 Q + 2 V) FLOPs per visible pair.
@triton.jit
def dkdv_kernel(q, k, v, do, lse, delta, dk, dv, first, last, scale, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                do_b, do_h, do_t, H, T, Q: tl.constexpr, V: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr,
                V0: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, DOCUMENTS: tl.constexpr):
    tiles = tl.cdiv(T, BN)
    head, n0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN  # the first keys have the longest loops
    q, k = head_base(q, head, H, q_b, q_h), head_base(k, head, H, k_b, k_h)
    v, do = head_base(v, head, H, v_b, v_h), head_base(do, head, H, do_b, do_h)
    size = tl.cast(T, tl.int64) * H
    dk, dv = head_base(dk, head, H, size * Q, Q), head_base(dv, head, H, size * V, V)
    lse += tl.cast(head, tl.int64) * T
    delta += tl.cast(head, tl.int64) * T
    keys = n0 + tl.arange(0, BN)
    k0, k1 = load_parts(k, n0, k_t, T, Q, BN, Q0, Q1, EVEN)
    values = load_tile(v, n0, v_t, T, 0, V, BN, V0, EVEN, V0 == V)
    all, some = T, T  # up to here every query sees all keys of the tile, or may see some
    if DOCUMENTS:
        first += head // H * T
        last += head // H * T  # the end of the queries that see a key
        all = tl.maximum(tl.load(last + n0) // BM * BM, n0 + BN)
        some = tl.load(last + tl.minimum(n0 + BN, T) - 1)
    c = scale * LOG2E
    dk0, dv0 = tl.zeros([BN, Q0], tl.float32), tl.zeros([BN, V0], tl.float32)
    dk1 = tl.zeros([BN, Q1 if Q1 > 0 else 16], tl.float32)
    for part in tl.static_range(3):  # the diagonal, tiles seen whole, tiles with document borders
        if part == 0:
            begin, end = n0, tl.minimum(n0 + BN, some)
        elif part == 1:
            begin, end = n0 + BN, all
        else:
            begin, end = all, some
        if DOCUMENTS or part < 2:
            for m0 in range(begin, end, BM):
                rows = m0 + tl.arange(0, BM)
                q0, q1 = load_parts(q, m0, q_t, T, Q, BM, Q0, Q1, EVEN)
                lse_rows = tl.load(lse + rows, mask=rows < T, other=float("inf")) * LOG2E
                p = tl.exp2(dot_transposed(k0, k1, q0, q1, Q1 > 0) * c - lse_rows[None, :])
                if part == 0:
                    p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
                if DOCUMENTS and part != 1:
                    first_rows = tl.load(first + rows, mask=rows < T, other=0)
                    p = tl.where(keys[:, None] >= first_rows[None, :], p, 0.0)
                grad = load_tile(do, m0, do_t, T, 0, V, BM, V0, EVEN, V0 == V)
                dv0 = tl.dot(p.to(grad.dtype), grad, dv0, input_precision="ieee")
                dp = tl.dot(values, tl.trans(grad), input_precision="ieee")
                delta_rows = tl.load(delta + rows, mask=rows < T, other=0.0)
                ds = (p * (dp - delta_rows[None, :])).to(q0.dtype)
                dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
                if Q1 > 0:
                    dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    store_tile(dv, n0, H * V, T, 0, V, dv0, BN, V0)
    store_tile(dk, n0, H * Q, T, 0, Q, dk0 * scale, BN, Q0)
    if Q1 > 0:
        store_tile(dk, n0, H * Q, T, Q0, Q, dk1 * scale, BN, Q1)


# ----------------------------------------------------------------------------- launchers

def split_width(width):
    """(Q0, Q1), powers of two of at least 16, or Q1 = 0, that cover a head width with little padding."""
    whole = max(16, triton.next_power_of_2(width))
    if width <= 16 or width == whole:
        return whole, 0
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)


def blocks(kernel, T, Q, V, dtype):
    """Tile sizes, warps and stages of a kernel; checked for spills and shared memory by bench/compiled.py, timed by
    bench/attention.py --tune. BN divides BM; in dkdv BM divides BN. Partial tiles need registers for masks."""
    if INTERPRETED:
        BM, BN, warps, stages = (64, 128, 4, 1) if kernel == "dkdv" else (128, 64, 4, 1)
    elif dtype == torch.float32:  # no tensor cores: for tests
        BM, BN, warps, stages = 16, 16, 8, 1
    elif kernel in ("dq", "dkdv") and Q + V <= 160:  # two programs on a multiprocessor hide each other's softmax
        BM, BN, warps, stages = 64, 64, 4, 2
    elif kernel == "dkdv":  # the sums dk and dv fill the registers: 160 of 255 a thread at 192/128
        BM, BN, warps, stages = (32, 128, 8, 3) if T % 128 == 0 else (32, 64, 8, 2)
    elif kernel == "dq":
        BM, BN, warps, stages = (128, 64, 8, 2) if T % 128 == 0 else (128, 32, 8, 2)
    else:
        BM, BN, warps, stages = 128, 64, 8, 3
    return {"BM": BM, "BN": BN, "EVEN": T % max(BM, BN) == 0, "num_warps": warps, "num_stages": stages}


def widths(q_BHTQ, v_BHTV):
    Q, V = q_BHTQ.shape[3], v_BHTV.shape[3]
    Q0, Q1 = split_width(Q)
    return {"Q": Q, "V": V, "Q0": Q0, "Q1": Q1, "V0": max(16, triton.next_power_of_2(V))}


def rows_of(*tensors):
    """Tensors whose last dimension is contiguous: as they are, or copied (never the model's own)."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def empty_heads(B, H, T, width, like):
    """(B, H, T, width) whose memory is (B, T, H, width), which the projection after attention reads without a copy."""
    return torch.empty(B, T, H, width, dtype=like.dtype, device=like.device).transpose(1, 2)


def per_head(top, B, H):
    return top.view(B, H, -1).amax((0, 2)) if top.numel() else top.new_full((H,), float("-inf"))


def forward(q_BHTQ, k_BHTQ, v_BHTV, scale, first_BT=None):
    """(o_BHTV, lse_BHT, max_H): attention, the log-sum-exp of every query's logits, and each head's largest logit."""
    q, k, v = rows_of(q_BHTQ, k_BHTQ, v_BHTV)
    (B, H, T, Q), V = q.shape, v.shape[3]
    tile = blocks("forward", T, Q, V, q.dtype)
    tiles = triton.cdiv(T, tile["BM"])
    o = empty_heads(B, H, T, V, q)
    lse, top = (torch.empty(B, H, n, dtype=torch.float32, device=q.device) for n in (T, tiles))
    if top.numel():
        forward_kernel[(B * H * tiles,)](
            q, k, v, o, lse, top, first_BT, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, T,
            **widths(q, v), DOCUMENTS=first_BT is not None, **tile)
    return o, lse, per_head(top, B, H)


def backward(do_BHTV, q_BHTQ, k_BHTQ, v_BHTV, o_BHTV, lse_BHT, scale, first_BT=None):
    """(dq, dk, dv) from what forward was given and gave."""
    do, q, k, v = rows_of(do_BHTV, q_BHTQ, k_BHTQ, v_BHTV)
    (B, H, T, Q), V = q.shape, v.shape[3]
    dq, dk, dv = (empty_heads(B, H, T, width, q) for width in (Q, Q, V))
    if not lse_BHT.numel():
        return dq, dk, dv
    assert o_BHTV.transpose(1, 2).is_contiguous() and lse_BHT.is_contiguous(), "o and lse as forward made them"
    delta, last_BT = torch.empty_like(lse_BHT), None
    if first_BT is not None:
        places = torch.arange(T, dtype=torch.int32, device=q.device).expand(B, T).contiguous()
        last_BT = torch.searchsorted(first_BT, places, right=True, out_int32=True)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], H, T]
    constants = widths(q, v) | {"DOCUMENTS": first_BT is not None}
    tile = blocks("dq", T, Q, V, q.dtype)
    dq_kernel[(B * H * triton.cdiv(T, tile["BM"]),)](
        q, k, v, o_BHTV, do, lse_BHT, delta, dq, first_BT, scale, *strides, **constants, **tile)
    tile = blocks("dkdv", T, Q, V, q.dtype)
    dkdv_kernel[(B * H * triton.cdiv(T, tile["BN"]),)](
        q, k, v, do, lse_BHT, delta, dk, dv, first_BT, last_BT, scale, *strides, **constants, **tile)
    return dq, dk, dv


def max_logits(q_BHTQ, k_BHTQ, scale, first_BT=None, lse_BHT=None, below_H=None):
    """The largest scaled visible logit of every head (H,), fp32. With lse_BHT and below_H (attention.skip_below), of
    tiles of queries whose log-sum-exp lies below it the largest log-sum-exp, which is no smaller."""
    q, k = rows_of(q_BHTQ, k_BHTQ)
    B, H, T, Q = q.shape
    tile = blocks("maximum", T, Q, Q, q.dtype)
    tiles = triton.cdiv(T, tile["BM"])
    top = torch.empty(B, H, tiles, dtype=torch.float32, device=q.device)
    if top.numel():
        constants = {name: value for name, value in widths(q, k).items() if name[0] == "Q"}
        maximum_kernel[(B * H * tiles,)](
            q, k, top, first_BT, None if lse_BHT is None else lse_BHT.contiguous(), below_H, scale, *q.stride()[:3],
            *k.stride()[:3], H, T, **constants, DOCUMENTS=first_BT is not None, SKIP=lse_BHT is not None, **tile)
    return per_head(top, B, H)

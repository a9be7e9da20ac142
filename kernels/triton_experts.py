"""The routed experts in Triton: gathers inside the matmuls, SwiGLU in their epilogues, sums without atomics.

Forward: `up` (gather, gate and up products, SwiGLU), `down` (rows x weights), `combine` (weighted sum per token).
Backward: `down_backward` (gather of the gradient, SwiGLU backwards, gradient of the router's weight), `down` again with
gate_up, `combine` again without weights, and `weight_gradient` twice. Between them only x, the pre-activation z and the
router's weights are kept: the router's weight multiplies after the down projection, so its gradient is <a, dy W>, which
needs no output of any expert (the idea of SonicMoE, arXiv 2512.14080, section 3).

Rows lie in expert order and no expert's rows are padded: a tile belongs to one expert, its last rows are masked. How
many tiles there are is known only on the device; the grid has room for all cases, programs without one return at once.
A tile's blocks of columns are neighbours in the grid: they run together and share its rows in the cache.
Shapes: experts.py. M, N, K in a kernel are the sides of its matmul.   Next: experts.py, triton_routing.py (tile_map).
"""

import math

import torch
import triton
import triton.language as tl
from torch.nn.functional import grouped_mm

from kernels import backend
from kernels.expert_tiles import TILES, blocks, tile_key
from kernels.triton_routing import tile_map

LIBRARY = set()  # the products that F.grouped_mm computes, of "y", "dx", "d_down", "d_gate_up": see choose_products

# ----------------------------------------------------------------------------- kernels

@triton.jit
def up_kernel(x, gate_up, order, tiles, z, a, D, F, n_blocks, TOP_K: tl.constexpr, EVEN: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # z[s] = gate_up[e] x[order[s] // TOP_K],  a = silu(z_gate) * z_up.  Grid: row tiles x blocks of F.
    tile, block = tiles + 3 * (tl.program_id(0) // n_blocks), tl.program_id(0) % n_blocks
    expert, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if start < end:
        row = start + tl.arange(0, BLOCK_M)
        real = row < end
        token = tl.load(order + row, mask=real, other=0) // TOP_K
        column, k = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        inside = column < F
        x_tile = x + token[:, None] * D + k[None, :]
        gate_tile = gate_up + expert.to(tl.int64) * 2 * F * D + column[None, :] * D + k[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for done in range(0, D, BLOCK_K):
            there = k < (D if EVEN else D - done)
            x_MK = tl.load(x_tile, mask=real[:, None] & there[None, :], other=0)
            gate_KN = tl.load(gate_tile, mask=inside[None, :] & there[:, None], other=0)
            up_KN = tl.load(gate_tile + F * D, mask=inside[None, :] & there[:, None], other=0)
            gate = tl.dot(x_MK, gate_KN, gate, input_precision="ieee")
            up = tl.dot(x_MK, up_KN, up, input_precision="ieee")
            x_tile += BLOCK_K
            gate_tile += BLOCK_K
        place = row.to(tl.int64)[:, None]
        write = real[:, None] & inside[None, :]
        gate, up = gate.to(z.dtype.element_ty), up.to(z.dtype.element_ty)  # the backward will see them rounded
        tl.store(z + place * 2 * F + column[None, :], gate, mask=write)
        tl.store(z + place * 2 * F + F + column[None, :], up, mask=write)
        gate = gate.to(tl.float32)
        tl.store(a + place * F + column[None, :], gate * tl.sigmoid(gate) * up.to(tl.float32), mask=write)


@triton.jit
def down_kernel(rows, weight, tiles, out, K, N, stride_k, stride_n, n_blocks, EVEN: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # out[s, n] = sum over k of rows[s, k] * weight[e, k, n] with any strides.  Grid: row tiles x blocks of N.
    tile, block = tiles + 3 * (tl.program_id(0) // n_blocks), tl.program_id(0) % n_blocks
    expert, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if start < end:
        row = start + tl.arange(0, BLOCK_M)
        real, place = row < end, row.to(tl.int64)[:, None]
        column, k = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        inside = column < N
        row_tile = rows + place * K + k[None, :]
        weight_tile = weight + expert.to(tl.int64) * K * N + k[:, None] * stride_k + column[None, :] * stride_n
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for done in range(0, K, BLOCK_K):
            there = k < (K if EVEN else K - done)
            rows_MK = tl.load(row_tile, mask=real[:, None] & there[None, :], other=0)
            weight_KN = tl.load(weight_tile, mask=inside[None, :] & there[:, None], other=0)
            total = tl.dot(rows_MK, weight_KN, total, input_precision="ieee")
            row_tile += BLOCK_K
            weight_tile += BLOCK_K * stride_k
        tl.store(out + place * N + column[None, :], total, mask=real[:, None] & inside[None, :])


@triton.jit
def _halves(total):
    return tl.split(total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _swiglu_backward(b, w, z, dz, weighted_a, place, real, column, F):
    # Writes dz and w a for some columns of b; returns the rows' sums of a b.
    write = real[:, None] & (column < F)[None, :]
    gate = tl.load(z + place * 2 * F + column[None, :], mask=write, other=0).to(tl.float32)
    up = tl.load(z + place * 2 * F + F + column[None, :], mask=write, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(weighted_a + place * F + column[None, :], w * silu * up, mask=write)
    tl.store(dz + place * 2 * F + column[None, :], w * b * up * (sigmoid + silu * (1 - sigmoid)), mask=write)
    tl.store(dz + place * 2 * F + F + column[None, :], w * b * silu, mask=write)
    return tl.sum(b * silu * up, 1)


@triton.jit
def down_backward_kernel(grad, down, order, tiles, weights, z, dz, weighted_a, grad_weights, token_of, D, F, n_blocks,
                         TOP_K: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_K: tl.constexpr):
    # With b = grad[token] down[e] and w the router's weight of the row: dz = w b through SwiGLU, w a for the gradient
    # of down, and <a, b> over this block of F, for the gradient of w; the first also writes the rows' tokens.
    # Grid: row tiles x blocks of F.
    tile, block = tiles + 3 * (tl.program_id(0) // n_blocks), tl.program_id(0) % n_blocks
    expert, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if start < end:
        row = start + tl.arange(0, BLOCK_M)
        real, place = row < end, row.to(tl.int64)[:, None]
        choice = tl.load(order + row, mask=real, other=0)
        column, k = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        inside = column < F
        grad_tile = grad + (choice // TOP_K)[:, None] * D + k[None, :]
        down_tile = down + expert.to(tl.int64) * D * F + k[:, None] * F + column[None, :]
        b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for done in range(0, D, BLOCK_K):
            there = k < (D if EVEN else D - done)
            grad_MK = tl.load(grad_tile, mask=real[:, None] & there[None, :], other=0)
            down_KN = tl.load(down_tile, mask=inside[None, :] & there[:, None], other=0)
            b = tl.dot(grad_MK, down_KN, b, input_precision="ieee")
            grad_tile += BLOCK_K
            down_tile += BLOCK_K * F
        w = tl.load(weights + choice, mask=real, other=0).to(tl.float32)[:, None]
        # In two halves: the whole epilogue at once would not fit into the registers.
        left, right = _halves(b)
        half = block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        product = _swiglu_backward(left, w, z, dz, weighted_a, place, real, half, F)
        product += _swiglu_backward(right, w, z, dz, weighted_a, place, real, half + BLOCK_N // 2, F)
        tl.store(grad_weights + choice * n_blocks + block, product, mask=real)
        tl.store(token_of + row, (choice // TOP_K).to(tl.int32), mask=real & (block == 0))


@triton.jit
def by_load_kernel(counts, table, E, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    # (expert, first row, end of its rows), experts with most rows first: a long sum that starts late would end alone.
    e, other = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E_PAD)
    rows = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
    rows_of_other = tl.load(counts + other, mask=other < E, other=-1).to(tl.int32)[None, :]
    before = other[None, :] < e[:, None]
    first = tl.sum(tl.where(before, rows_of_other, 0), 1)
    ahead = (rows_of_other > rows[:, None]) | ((rows_of_other == rows[:, None]) & before)
    place = table + 3 * tl.sum(ahead.to(tl.int32), 1)
    tl.store(place, e, mask=e < E)
    tl.store(place + 1, first, mask=e < E)
    tl.store(place + 2, first + rows, mask=e < E)


@triton.jit
def _store_sum(place, total, add, inside):
    if add:
        total += tl.load(place, mask=inside, other=0).to(tl.float32)
    tl.store(place, total, mask=inside)


@triton.jit
def _store_half(place, half, add, m, n, M, N, WIDTH: tl.constexpr):
    # Both quarters of a half of a sum; n: the columns of the first one.
    low, high = _halves(half)
    _store_sum(place, low, add, (m < M)[:, None] & (n < N)[None, :])
    _store_sum(place + WIDTH // 2, high, add, (m < M)[:, None] & (n + WIDTH // 2 < N)[None, :])


@triton.jit
def weight_gradient_kernel(left, right, token_of, experts, begun, out, M, N, GATHER_LEFT: tl.constexpr,
                           EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # out[e, m, n] = sum over the rows s of expert e of left[s, m] * right[s, n], in fp32 until it is stored; one of the
    # two is read at token_of[s]. An expert without rows gets zeros. Where begun is not 0, the sum is added to out; else
    # out is not read, for it may hold anything.  Grid: blocks of (M, N), experts by load.
    entry, m_blocks = experts + 3 * tl.program_id(1), tl.cdiv(M, BLOCK_M)
    expert, start, end, add = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(begun) != 0
    m = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Tokens are read one step ahead: a load whose address is loaded in the same step would halve the pipeline's depth.
    token = tl.load(token_of + start + k, mask=start + k < end, other=0)
    for first in range(start, end, BLOCK_K):
        real = (first + k < end)[:, None]
        left_row, right_row = (token, first + k) if GATHER_LEFT else (first + k, token)
        left_KM = tl.load(left + left_row.to(tl.int64)[:, None] * M + m[None, :],
                          mask=real if EVEN else real & (m < M)[None, :], other=0)
        right_KN = tl.load(right + right_row.to(tl.int64)[:, None] * N + n[None, :],
                           mask=real if EVEN else real & (n < N)[None, :], other=0)
        token = tl.load(token_of + first + BLOCK_K + k, mask=first + BLOCK_K + k < end, other=0)
        total = tl.dot(left_KM.T, right_KN, total, input_precision="ieee")
    # In quarters: what is read would not fit into the registers beside the whole sum.
    quarter = tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N // 4)
    place = expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + quarter[None, :]
    low, high = _halves(total)
    _store_half(out + place, low, add, m, quarter, M, N, BLOCK_N // 2)
    _store_half(out + place + BLOCK_N // 2, high, add, m, quarter + BLOCK_N // 2, M, N, BLOCK_N // 2)


@triton.jit
def combine_kernel(rows, place, weights, first, second, out, n_tokens, n_rows, D, J: tl.constexpr,
                   WEIGHTED: tl.constexpr, ADDENDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    # out[t] = sum over j of weights[t, j] * rows[place[t, j]], j in order, in fp32; places from n_rows on add nothing.
    # Then first[t] and second[t] are added, as many as there are.
    # Grid: blocks of tokens, blocks of D.
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for j in tl.static_range(J):
        row = tl.load(place + token * J + j, mask=token < n_tokens, other=n_rows)
        there = (row < n_rows)[:, None] & (d < D)[None, :]
        values = tl.load(rows + row[:, None] * D + d[None, :], mask=there, other=0)
        if WEIGHTED:
            weight = tl.load(weights + token * J + j, mask=row < n_rows, other=0)
            total += weight[:, None] * values.to(tl.float32)
        else:
            total += values.to(tl.float32)
    place = token.to(tl.int64)[:, None] * D + d[None, :]
    inside = (token < n_tokens)[:, None] & (d < D)[None, :]
    if ADDENDS >= 1:
        total += tl.load(first + place, mask=inside, other=0).to(tl.float32)
    if ADDENDS == 2:
        total += tl.load(second + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + place, total, mask=inside)


# ----------------------------------------------------------------------------- launchers

def combine(rows_SD, place_NJ, weights_NJ=None, first=None, second=None):
    """y_ND = sum over j of weights_NJ * rows_SD[place_NJ], in the rows' dtype; experts.sum_rows is its twin. first and
    second are added to it."""
    rows_SD, place_NJ = rows_SD.contiguous(), place_NJ.contiguous()
    (n_tokens, J), (n_rows, D) = place_NJ.shape, rows_SD.shape
    out_ND = torch.empty(n_tokens, D, dtype=rows_SD.dtype, device=rows_SD.device)
    block_t, block_d = (64, triton.next_power_of_2(D)) if backend.INTERPRETED else (8, 256)
    weights = rows_SD if weights_NJ is None else weights_NJ.contiguous()
    addends = [addend.contiguous() for addend in (first, second) if addend is not None]
    pointers = (*addends, rows_SD, rows_SD)[:2]  # of what is not there nothing is read
    if n_tokens:
        combine_kernel[triton.cdiv(n_tokens, block_t), triton.cdiv(D, block_d)](
            rows_SD, place_NJ, weights, *pointers, out_ND, n_tokens, n_rows, D, J, weights_NJ is not None, len(addends),
            block_t, block_d)
    return out_ND


def up(x_ND, gate_up_E2FD, order, counts_E, top_k):
    """z_S2F and a_SF: the rows' products with gate and up of their experts, and SwiGLU of them."""
    (E, F2, D), S = gate_up_E2FD.shape, len(order)
    z_S2F, a_SF = (torch.empty(S, width, dtype=x_ND.dtype, device=x_ND.device) for width in (F2, F2 // 2))
    b = blocks("up", D, F2 // 2, S // E, x_ND.dtype)
    tiles, n_tiles = tile_map(counts_E, S, b["BLOCK_M"])
    n_blocks = triton.cdiv(F2 // 2, b["BLOCK_N"])
    up_kernel[n_tiles * n_blocks,](
        x_ND, gate_up_E2FD, order, tiles, z_S2F, a_SF, D, F2 // 2, n_blocks, top_k, D % b["BLOCK_K"] == 0, **b)
    return z_S2F, a_SF


def down(product, rows_SK, weight_EKN, counts_E):
    """out_SN: every row times its expert's matrix, which may be a transposed view."""
    if product in LIBRARY:
        return grouped_mm(rows_SK, weight_EKN, offs=counts_E.cumsum(0).to(torch.int32))
    (S, K), (E, _, N) = rows_SK.shape, weight_EKN.shape
    out_SN = torch.empty(S, N, dtype=rows_SK.dtype, device=rows_SK.device)
    b = blocks(product, N, K if product == "y" else K // 2, S // E, rows_SK.dtype)
    tiles, n_tiles = tile_map(counts_E, S, b["BLOCK_M"])
    n_blocks = triton.cdiv(N, b["BLOCK_N"])
    down_kernel[n_tiles * n_blocks,](
        rows_SK, weight_EKN, tiles, out_SN, K, N, *weight_EKN.stride()[1:], n_blocks, K % b["BLOCK_K"] == 0, **b)
    return out_SN


def down_backward(grad_ND, down_EDF, order, counts_E, weights_NK, z_S2F):
    """dz_S2F, the rows of a times their router's weight, the gradient of the weights, and the rows' tokens (int32)."""
    (E, D, F), S, top_k = down_EDF.shape, len(order), weights_NK.shape[1]
    dz_S2F, token_S = torch.empty_like(z_S2F), torch.empty(S, dtype=torch.int32, device=order.device)
    weighted_SF = torch.empty(S, F, dtype=grad_ND.dtype, device=grad_ND.device)
    b = blocks("down_backward", D, F, S // E, grad_ND.dtype)
    n_blocks = triton.cdiv(F, b["BLOCK_N"])
    make = torch.empty if S == weights_NK.numel() else torch.zeros  # choices of other ranks stay 0
    products = make(weights_NK.numel(), n_blocks, device=grad_ND.device)
    tiles, n_tiles = tile_map(counts_E, S, b["BLOCK_M"])
    down_backward_kernel[n_tiles * n_blocks,](
        grad_ND, down_EDF, order, tiles, weights_NK, z_S2F, dz_S2F, weighted_SF, products, token_S, D, F, n_blocks,
        top_k, D % b["BLOCK_K"] == 0, **b)
    return dz_S2F, weighted_SF, products.sum(1).view_as(weights_NK), token_S


def weight_gradient(product, left, right, token_S, counts_E, out_EMN, begun):
    """Per expert the sum over its rows of left^T right. One has a row per token: of "d_down" it is left, of "d_gate_up"
    right. Written into out_EMN, or added to it where begun, a tensor of one number, is not 0. Returns out_EMN."""
    gather_left = product == "d_down"
    if product in LIBRARY:
        rows = (left if gather_left else right).index_select(0, token_S)
        left, right = (rows, right) if gather_left else (left, rows)
        made_EMN = grouped_mm(left.mT, right, offs=counts_E.cumsum(0).to(torch.int32))
        return out_EMN.masked_fill_(begun == 0, 0).add_(made_EMN)
    E, M, N = out_EMN.shape
    b = blocks(product, *((M, N) if gather_left else (N, M // 2)), len(token_S) // E, left.dtype)
    even = M % b["BLOCK_M"] == 0 and N % b["BLOCK_N"] == 0
    experts_E3 = torch.empty(E, 3, dtype=torch.int32, device=left.device)
    by_load_kernel[triton.cdiv(E, 8),](counts_E, experts_E3, E, triton.next_power_of_2(E), 8)
    weight_gradient_kernel[triton.cdiv(M, b["BLOCK_M"]) * triton.cdiv(N, b["BLOCK_N"]), E](
        left, right, token_S, experts_E3, begun, out_EMN, M, N, gather_left, even, **b)
    return out_EMN


def forward(x_ND, weights_NK, order, inverse, counts_E, gate_up_E2FD, down_EDF, first=None, second=None):
    """Returns y_ND, with first and second added where given, and z_S2F, the pre-activation that the backward wants."""
    z_S2F, a_SF = up(x_ND, gate_up_E2FD, order, counts_E, weights_NK.shape[1])
    y_SD = down("y", a_SF, down_EDF.mT, counts_E)
    return combine(y_SD, inverse.view_as(weights_NK), weights_NK, first, second), z_S2F


def backward(grad_ND, x_ND, weights_NK, order, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F, gate_up_grad,
             down_grad, begun):
    """Gradients of x and weights; those of the two matrices go into gate_up_grad and down_grad: see weight_gradient."""
    dz_S2F, weighted_SF, grad_weights, token_S = down_backward(grad_ND, down_EDF, order, counts_E, weights_NK, z_S2F)
    weight_gradient("d_down", grad_ND, weighted_SF, token_S, counts_E, down_grad, begun)
    weight_gradient("d_gate_up", dz_S2F, x_ND, token_S, counts_E, gate_up_grad, begun)
    grad_x = combine(down("dx", dz_S2F, gate_up_E2FD, counts_E), inverse.view_as(weights_NK))
    return grad_x, grad_weights


def backward_input(grad_ND, x_ND, weights_NK, order, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F):
    """The same in two: gradients of x and weights, and a function of (gate_up_grad, down_grad, begun) for the rest."""
    dz_S2F, weighted_SF, grad_weights, token_S = down_backward(grad_ND, down_EDF, order, counts_E, weights_NK, z_S2F)
    grad_x = combine(down("dx", dz_S2F, gate_up_E2FD, counts_E), inverse.view_as(weights_NK))

    def backward_weights(gate_up_grad, down_grad, begun):
        weight_gradient("d_down", grad_ND, weighted_SF, token_S, counts_E, down_grad, begun)
        weight_gradient("d_gate_up", dz_S2F, x_ND, token_S, counts_E, gate_up_grad, begun)
    return grad_x, grad_weights, backward_weights


# ----------------------------------------------------------------------------- which library product is faster

def kernel_arms(N, top_k, E, D, F, dtype, device):
    """{kernel: function of nothing that runs it at this size}, on rows that chance spreads over all experts but the
    first; the gradients of weights are in fp32."""
    S, generator = N * top_k, torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device=device, dtype=dtype, generator=generator)
    chosen = torch.randint(min(1, E - 1), E, (S,), device=device, generator=generator)
    counts_E, order = torch.bincount(chosen, minlength=E), chosen.argsort()
    x_ND, a_SF, z_S2F, weights_NK = random(N, D), random(S, F), random(S, 2 * F), random(N, top_k).float()
    gate_up_E2FD, down_EDF, token_S = random(E, 2 * F, D), random(E, D, F), (order // top_k).to(torch.int32)
    into = lambda matrix: (torch.empty_like(matrix, dtype=torch.float32), torch.zeros((), device=device))
    return {"up": lambda: up(x_ND, gate_up_E2FD, order, counts_E, top_k),
            "y": lambda: down("y", a_SF, down_EDF.mT, counts_E),
            "down_backward": lambda: down_backward(x_ND, down_EDF, order, counts_E, weights_NK, z_S2F),
            "d_down": lambda: weight_gradient("d_down", x_ND, a_SF, token_S, counts_E, *into(down_EDF)),
            "d_gate_up": lambda: weight_gradient("d_gate_up", z_S2F, x_ND, token_S, counts_E, *into(gate_up_E2FD)),
            "dx": lambda: down("dx", z_S2F, gate_up_E2FD, counts_E)}


def tile_arms(N, top_k, E, D, F, dtype, device):
    """{kernel: function(tile) that runs it at this size with that tile}, whatever TILES says."""
    def arm(kernel, compute):
        def run(tile):
            before = dict(TILES)
            TILES[tile_key(kernel, D, F, N * top_k // E, dtype)] = tile
            try:
                return compute()
            finally:
                TILES.clear()
                TILES.update(before)
        return run
    return {kernel: arm(kernel, compute) for kernel, compute in kernel_arms(N, top_k, E, D, F, dtype, device).items()}


def product_arms(N, top_k, E, D, F, dtype, device):
    """Those of kernel_arms that F.grouped_mm can compute too."""
    arms = kernel_arms(N, top_k, E, D, F, dtype, device)
    return {product: arms[product] for product in ("y", "dx", "d_down", "d_gate_up")}


def choose_products(N, top_k, E, D, F, dtype, device):
    """Measure every product both ways and give those to F.grouped_mm that it computes faster, and right: an expert
    without rows is where versions of it went wrong. Returns a line to print. It wants bf16 and rows of whole 16 bytes;
    otherwise there is nothing to choose."""
    LIBRARY.clear()
    if dtype != torch.bfloat16 or D % 8 or F % 8:
        return "expert products: triton"
    told, faster = [], set()
    for product, compute in product_arms(N, top_k, E, D, F, dtype, device).items():
        expected, ours = compute().float(), backend.milliseconds(compute, device)
        LIBRARY.add(product)
        try:
            right = (compute() - expected).norm() <= 1e-2 * expected.norm()
            library = backend.milliseconds(compute, device) if right else math.inf
        except RuntimeError:  # out of memory, or not for this GPU
            library = math.nan
        LIBRARY.clear()
        told.append(f"{product} {ours:.2f} ({library:.2f})")
        if library < ours:
            faster.add(product)
    LIBRARY.update(faster)
    return f"expert products, ms by triton (grouped_mm; inf: wrong, nan: cannot): {', '.join(told)}"

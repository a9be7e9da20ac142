"""The router in Triton: choice, weights, counts and balance sums in one pass over the logits, and back; the counting
sort into expert order; the map from tiles of sorted rows to experts.

Sums over tokens go through one partial sum per program, which a second kernel adds up in a fixed order: no atomics, no
host sync. Partial sums lie expert by expert, so that this kernel reads one line of them for each.
Shapes: routing.py.   Next: routing.py (the twin and the public functions), triton_experts.py.
"""

import torch
import triton
import triton.language as tl

from kernels import backend

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


ELEMENTS = 2**18 if backend.INTERPRETED else 4096  # rows x experts of one program
LINE = 2048  # partial sums of one expert that a program reads at once


def _block(n_rows, n_experts, elements=None):
    """(rows per program, number of experts as a power of two)."""
    padded = triton.next_power_of_2(n_experts)
    rows = max(1, (elements or ELEMENTS) // padded)
    return min(rows, triton.next_power_of_2(max(n_rows, 1))) if backend.INTERPRETED else rows, padded


# ----------------------------------------------------------------------------- choice

@triton.jit
def _without_dropped_groups(choice, column, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr,
                            PADDED_G: tl.constexpr):
    # -inf for the experts outside the TOPK_GROUP groups whose two best sum highest.
    group = tl.arange(0, PADDED_G)
    score = tl.full((choice.shape[0], PADDED_G), float("-inf"), tl.float32)
    for g in tl.static_range(N_GROUP):
        member = tl.where((column // GROUP_SIZE == g)[None, :], choice, float("-inf"))
        first = tl.argmax(member, 1, tie_break_left=True)
        both = tl.max(member, 1) + tl.max(tl.where(column[None, :] == first[:, None], float("-inf"), member), 1)
        score = tl.where((group == g)[None, :], both[:, None], score)
    kept = tl.zeros_like(score)
    for _ in tl.static_range(TOPK_GROUP):
        best = tl.argmax(tl.where(kept > 0, float("-inf"), score), 1, tie_break_left=True)
        kept = tl.where(group[None, :] == best[:, None], 1.0, kept)
    for g in tl.static_range(N_GROUP):
        keep = tl.sum(tl.where((group == g)[None, :], kept, 0.0), 1)
        dropped = (keep == 0)[:, None] & (column // GROUP_SIZE == g)[None, :]
        choice = tl.where(dropped, float("-inf"), choice)
    return choice


@triton.jit
def route_kernel(logits, bias, weights, chosen, counts, shares, T, E, scale, TOP_K: tl.constexpr,
                 NORMALISE: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr,
                 PADDED_G: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr):
    # Grid: sequences, blocks of their tokens. Reads the logits once; writes weights and choices, and this block's
    # number of choices and sum of score shares of every expert.
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, real, e = tl.program_id(0) * T + t, t < T, tl.arange(0, E_PAD)
    exists = real[:, None] & (e < E)[None, :]
    logit = tl.load(logits + token.to(tl.int64)[:, None] * E + e[None, :], mask=exists, other=float("-inf"))
    score = tl.sigmoid(logit)  # 0 where there is none
    choice = score + tl.load(bias + e, mask=e < E, other=0)[None, :]
    choice = tl.where(choice != choice, float("inf"), choice)  # NaN is chosen first, as in the twin's sort
    choice = tl.where((e < E)[None, :], choice, float("-inf"))
    if N_GROUP > 1:
        choice = _without_dropped_groups(choice, e, N_GROUP, TOPK_GROUP, GROUP_SIZE, PADDED_G)
    k = tl.arange(0, K_PAD)
    weight = tl.zeros((BLOCK, K_PAD), tl.float32)
    picks = tl.zeros((BLOCK, E_PAD), tl.int32)
    for turn in tl.static_range(TOP_K):
        best = tl.argmax(choice, 1, tie_break_left=True)  # the lowest among equals
        picked = e[None, :] == best[:, None]
        weight = tl.where((k == turn)[None, :], tl.sum(tl.where(picked, score, 0.0), 1)[:, None], weight)
        tl.store(chosen + token.to(tl.int64) * TOP_K + turn, best.to(tl.int64), mask=real)
        choice = tl.where(picked, float("-inf"), choice)
        picks += (picked & real[:, None]).to(tl.int32)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1)[:, None] + 1e-20)
    tl.store(weights + token.to(tl.int64)[:, None] * TOP_K + k[None, :], weight * scale,
             mask=real[:, None] & (k < TOP_K)[None, :])
    share = tl.where(exists, score / tl.maximum(tl.sum(score, 1), TINY)[:, None], 0.0)
    n_blocks = tl.num_programs(1)
    partial = e * tl.num_programs(0) * n_blocks + tl.program_id(0) * n_blocks + tl.program_id(1)
    tl.store(counts + partial, tl.sum(picks, 0), mask=e < E)
    tl.store(shares + partial, tl.sum(share, 0), mask=e < E)


@triton.jit
def route_sums_kernel(counts, shares, counts_BE, counts_E, balances_E, B, n_blocks, fraction, ROWS: tl.constexpr,
                      WIDTH: tl.constexpr):
    # Adds up one expert's partial sums: its choices in every sequence and in all, and its term of the balance loss, the
    # sum over the sequences of fraction * choices * shares. Grid: experts.
    e, E = tl.program_id(0), tl.num_programs(0)
    chosen, balance = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, B, ROWS):
        b, block = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
        count, share = tl.zeros((ROWS, WIDTH), tl.int32), tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, n_blocks, WIDTH):
            place = (e * B + b[:, None]) * n_blocks + start + block[None, :]
            there = (b < B)[:, None] & (block < n_blocks - start)[None, :]
            count += tl.load(counts + place, mask=there, other=0)
            share += tl.load(shares + place, mask=there, other=0)
        count_B = tl.sum(count, 1)
        tl.store(counts_BE + b * E + e, count_B, mask=b < B)
        chosen += count_B
        balance += fraction * count_B.to(tl.float32) * tl.sum(share, 1)
    tl.store(counts_E + e, tl.sum(chosen, 0).to(tl.int64))
    tl.store(balances_E + e, tl.sum(balance, 0))


@triton.jit
def route_backward_kernel(logits, chosen, grad_weights, grad_balance, counts_BE, grad_logits, T, E, scale, fraction,
                          TOP_K: tl.constexpr, NORMALISE: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    # route_kernel's grid. The scores are computed again; a chosen expert's weight and every expert's share of them, by
    # the balance loss, lead back to them.
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token, real, e = (tl.program_id(0) * T + t).to(tl.int64), t < T, tl.arange(0, E_PAD)
    exists = real[:, None] & (e < E)[None, :]
    score = tl.sigmoid(tl.load(logits + token[:, None] * E + e[None, :], mask=exists, other=float("-inf")))
    direct = tl.zeros((BLOCK, E_PAD), tl.float32)  # gradient of the weight of each chosen expert, at that expert
    is_chosen = tl.zeros((BLOCK, E_PAD), tl.float32)
    for turn in tl.static_range(TOP_K):
        best = tl.load(chosen + token * TOP_K + turn, mask=real, other=E)
        grad = tl.load(grad_weights + token * TOP_K + turn, mask=real, other=0)
        picked = e[None, :] == best[:, None]
        direct = tl.where(picked, grad[:, None] * scale, direct)
        is_chosen = tl.where(picked, 1.0, is_chosen)
    grad_score = direct
    if NORMALISE:
        total = tl.sum(is_chosen * score, 1) + 1e-20
        grad_score = (direct - is_chosen * (tl.sum(direct * score, 1) / total)[:, None]) / total[:, None]
    total = tl.sum(score, 1)
    floor = tl.maximum(total, TINY)[:, None]
    counts = tl.load(counts_BE + tl.program_id(0) * E + e, mask=e < E, other=0).to(tl.float32)
    grad_share = (tl.load(grad_balance) * fraction * counts)[None, :]
    through_total = tl.where(total >= TINY, tl.sum(grad_share * (score / floor), 1), 0.0)[:, None]
    grad_score += (grad_share - through_total) / floor
    tl.store(grad_logits + token[:, None] * E + e[None, :], grad_score * score * (1 - score), mask=exists)


def route(logits_NE, bias_E, batch_size, top_k, n_group, topk_group, normalise, scale):
    """Returns weights_NK, experts_NK, the balance loss, counts_E (int64), and counts_BE (int32) of every sequence."""
    N, E = logits_NE.shape
    T = N // batch_size
    block, E_pad = _block(T, E)
    n_blocks = triton.cdiv(T, block)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits_NE.device)
    weights_NK, experts_NK = new(N, top_k), new(N, top_k, dtype=torch.int64)
    counts, shares = new(E, batch_size, n_blocks, dtype=torch.int32), new(E, batch_size, n_blocks)
    if N:
        route_kernel[batch_size, n_blocks](
            logits_NE, bias_E, weights_NK, experts_NK, counts, shares, T, E, scale, top_k, normalise, n_group,
            topk_group, E // n_group, triton.next_power_of_2(n_group), E_pad, triton.next_power_of_2(top_k), block,
            num_warps=8 if E_pad >= 256 else 4)
    counts_BE, counts_E, balances_E = new(batch_size, E, dtype=torch.int32), new(E, dtype=torch.int64), new(E)
    width = min(triton.next_power_of_2(max(n_blocks, 1)), LINE)
    route_sums_kernel[E,](
        counts, shares, counts_BE, counts_E, balances_E, batch_size, n_blocks, E / (top_k * max(T, 1) ** 2),
        min(triton.next_power_of_2(batch_size), LINE // width), width)
    return weights_NK, experts_NK, balances_E.sum(), counts_E, counts_BE


def route_backward(logits_NE, experts_NK, grad_weights_NK, grad_balance, counts_BE, normalise, scale):
    """The gradient of the logits."""
    (N, E), (batch_size, _), top_k = logits_NE.shape, counts_BE.shape, experts_NK.shape[1]
    T = N // batch_size
    block, E_pad = _block(T, E)
    grad_NE = torch.empty_like(logits_NE)
    if N:
        route_backward_kernel[batch_size, triton.cdiv(T, block)](
            logits_NE, experts_NK, grad_weights_NK.contiguous(), grad_balance, counts_BE, grad_NE, T, E, scale,
            E / (top_k * T**2), top_k, normalise, E_pad, block, num_warps=8 if E_pad >= 256 else 4)
    return grad_NE


# ----------------------------------------------------------------------------- sort

@triton.jit
def histogram_kernel(keys, counts, n_rows, n_keys, CHUNK: tl.constexpr, BINS: tl.constexpr):
    # How often each key stands in a chunk of rows, key by key. Grid: chunks.
    row, key = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BINS)
    found = tl.load(keys + row, mask=row < n_rows, other=n_keys).to(tl.int32)
    is_key = (found[:, None] == key[None, :]).to(tl.int32)
    tl.store(counts + key * tl.num_programs(0) + tl.program_id(0), tl.sum(is_key, 0), mask=key < n_keys)


@triton.jit
def scan_kernel(counts, before, totals, n_chunks, WIDTH: tl.constexpr):
    # How many rows of one key stand in the chunks before each, and in all. Grid: keys.
    line = tl.program_id(0) * n_chunks
    total = tl.zeros((), tl.int32)
    for start in range(0, n_chunks, WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        count = tl.load(counts + line + chunk, mask=chunk < n_chunks, other=0)
        tl.store(before + line + chunk, total + tl.cumsum(count, 0) - count, mask=chunk < n_chunks)
        total += tl.sum(count, 0)
    tl.store(totals + tl.program_id(0), total.to(tl.int64))


@triton.jit
def place_kernel(keys, before, totals, order, inverse, n_rows, n_keys, CHUNK: tl.constexpr, BINS: tl.constexpr):
    # A row's place: the rows of all lower keys, those of its own key in the chunks before, those before it in this
    # chunk. Grid: chunks.
    row, key = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BINS)
    found = tl.load(keys + row, mask=row < n_rows, other=n_keys).to(tl.int32)
    is_key = (found[:, None] == key[None, :]).to(tl.int32)
    total = tl.load(totals + key, mask=key < n_keys, other=0).to(tl.int32)
    first = tl.load(before + key * tl.num_programs(0) + tl.program_id(0), mask=key < n_keys, other=0)
    first += tl.cumsum(total, 0) - total
    place = tl.sum(is_key * (first[None, :] + tl.cumsum(is_key, 0) - 1), 1).to(tl.int64)
    tl.store(order + place, row.to(tl.int64), mask=row < n_rows)
    tl.store(inverse + row, place, mask=row < n_rows)


def sort_by_expert(experts_NK, n_keys):
    """Stable counting sort of the flat choices: order, inverse and counts, int64; every choice is below n_keys."""
    keys, device = experts_NK.flatten(), experts_NK.device
    S = len(keys)
    chunk, bins = _block(S, n_keys, 4 * ELEMENTS)  # long chunks: the table of their counts is small then
    n_chunks = triton.cdiv(S, chunk)
    order, inverse = torch.empty_like(keys), torch.empty_like(keys)
    counts, before = (torch.empty(n_keys, n_chunks, dtype=torch.int32, device=device) for _ in range(2))
    totals = torch.empty(n_keys, dtype=torch.int64, device=device)
    if S:
        histogram_kernel[n_chunks,](keys, counts, S, n_keys, chunk, bins, num_warps=8)
    scan_kernel[n_keys,](counts, before, totals, n_chunks, min(triton.next_power_of_2(max(n_chunks, 1)), LINE))
    if S:
        place_kernel[n_chunks,](keys, before, totals, order, inverse, S, n_keys, chunk, bins, num_warps=8)
    return order, inverse, totals


@triton.jit
def tile_map_kernel(counts, tiles, n_tiles, E, ROWS: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    # (expert, first row, end of the expert's rows) of every tile of ROWS rows; no rows beyond the last tile.
    tile, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E_PAD)
    count = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
    tiles_E = (count + ROWS - 1) // ROWS
    row_ends, tile_ends = tl.cumsum(count, 0), tl.cumsum(tiles_E, 0)
    here = (tile[:, None] >= (tile_ends - tiles_E)[None, :]) & (tile[:, None] < tile_ends[None, :])
    first = (row_ends - count)[None, :] + (tile[:, None] - (tile_ends - tiles_E)[None, :]) * ROWS
    tl.store(tiles + 3 * tile, tl.sum(tl.where(here, e[None, :], 0), 1), mask=tile < n_tiles)
    tl.store(tiles + 3 * tile + 1, tl.sum(tl.where(here, first, 0), 1), mask=tile < n_tiles)
    tl.store(tiles + 3 * tile + 2, tl.sum(tl.where(here, row_ends[None, :], 0), 1), mask=tile < n_tiles)


def tile_map(counts_E, n_rows, rows):
    """(tiles, 3) int32 for row tiles of `rows` rows, and how many tiles there can be: every expert may have one that is
    not full."""
    E = len(counts_E)
    n_tiles = min(triton.cdiv(n_rows, rows) + E, max(n_rows, 1))
    tiles = torch.empty(n_tiles, 3, dtype=torch.int32, device=counts_E.device)
    block, E_pad = _block(n_tiles, E)
    tile_map_kernel[triton.cdiv(n_tiles, block),](counts_E, tiles, n_tiles, E, rows, E_pad, block)
    return tiles, n_tiles

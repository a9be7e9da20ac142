"""Causal attention on a CPU, in fp32: forward and backward take a few batch rows at a time, and a chunk of their
queries, so that scores are made, used and forgotten in the processor's cache. The backward makes them again, which
costs less than to fetch them from memory; the per-head maximum of the scores falls out of the forward.

attention.py has the twin, attention_math, the shapes and what first_BT means. Next: ../mla.py.

Shapes besides: n heads of all the batch rows at hand, c queries of a chunk, s keys up to its last query.
"""

import torch
from torch import Tensor

QUERY_CHUNK = 128
CACHED = 2**17  # scores that one thread holds at once: 512 KiB


def forward(q_BHTQ, k_BHTQ, v_BHTV, scale, first_BT):
    """(o_BHTV, max_logit_H)."""
    B, H, T, _ = q_BHTQ.shape
    o_BHTV, maxima = _heads(v_BHTV), [torch.full((H,), float("-inf"))]
    for rows in _batch_rows(B, H, T):
        q, k, v = q_BHTQ[rows].flatten(0, 1) * scale, k_BHTQ[rows].flatten(0, 1), v_BHTV[rows].flatten(0, 1)
        for queries in _chunks(T):
            scores_ncs, end = _masked_scores(q, k, queries, first_BT, rows, H)
            maxima.append(scores_ncs.unflatten(0, (-1, H)).amax((0, 2, 3)))
            o_BHTV[rows, :, queries] = (scores_ncs.softmax(-1) @ v[:, :end]).unflatten(0, (-1, H))
    return o_BHTV, torch.stack(maxima).amax(0)


def backward(do_BHTV, q_BHTQ, k_BHTQ, v_BHTV, o_BHTV, scale, first_BT):
    """Gradients of q, k and v."""
    B, H, T, _ = q_BHTQ.shape
    grads = [_heads(x) for x in (q_BHTQ, k_BHTQ, v_BHTV)]
    for rows in _batch_rows(B, H, T):
        q, k, v, do, o = (x[rows].flatten(0, 1) for x in (q_BHTQ, k_BHTQ, v_BHTV, do_BHTV, o_BHTV))
        q, along_nT1 = q * scale, (do * o).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, memory_format=torch.contiguous_format), torch.zeros_like(
            v, memory_format=torch.contiguous_format)
        for queries in _chunks(T):
            scores_ncs, end = _masked_scores(q, k, queries, first_BT, rows, H)
            weights_ncs, do_ncV = scores_ncs.softmax(-1), do[:, queries]
            dv[:, :end].baddbmm_(weights_ncs.mT, do_ncV)
            dscores_ncs = (do_ncV @ v[:, :end].mT).sub_(along_nT1[:, queries]).mul_(weights_ncs)
            torch.bmm(dscores_ncs, k[:, :end], out=dq[:, queries])
            dk[:, :end].baddbmm_(dscores_ncs.mT, q[:, queries])
        for grad, made in zip(grads, (dq.mul_(scale), dk, dv)):
            grad[rows] = made.unflatten(0, (-1, H))
    return tuple(grads)


def _heads(like_BHTX):
    """Room for as many numbers, laid out (B, T, H, X), as the projections around attention have them."""
    return like_BHTX.new_empty(like_BHTX.transpose(1, 2).shape).transpose(1, 2)


def _batch_rows(B, H, T):
    many = max(1, CACHED * torch.get_num_threads() // (H * min(QUERY_CHUNK, T) * T or 1))
    return [slice(start, min(start + many, B)) for start in range(0, B, many)]


def _chunks(T):
    return [slice(start, min(start + QUERY_CHUNK, T)) for start in range(0, T, QUERY_CHUNK)]


def _masked_scores(q_nTQ, k_nTQ, queries, first_BT, rows, H):
    """(scores of a chunk of queries, scaled already, -inf where hidden; the end of the keys that they may see)."""
    end = queries.stop
    scores_ncs = q_nTQ[:, queries] @ k_nTQ[:, :end].mT
    width = end - queries.start
    scores_ncs[..., queries] += torch.full((width, width), float("-inf"), dtype=q_nTQ.dtype).triu_(1)
    if first_BT is not None:
        before_bcs = torch.arange(end) < first_BT[rows, queries, None]
        scores_ncs.masked_fill_(before_bcs.repeat_interleave(H, 0), float("-inf"))
    return scores_ncs, end


# ----------------------------------------------------------------------------- as an operator, opaque to torch.compile

@torch.library.custom_op("nanok2::loop_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, scale, first)


@attend.register_fake
def _(q, k, v, scale, first):
    return _heads(v), q.new_empty(q.shape[1])


@torch.library.custom_op("nanok2::loop_attention_backward", mutates_args=())
def _attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float,
                     first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return backward(do, q, k, v, o, scale, first)


@_attend_backward.register_fake
def _(do, q, k, v, o, scale, first):
    return tuple(_heads(x) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, first = inputs
    ctx.save_for_backward(q, k, v, output[0], first)


def _backward(ctx, do, _maximum):
    q, k, v, o, first = ctx.saved_tensors
    return *_attend_backward(do, q, k, v, o, ctx.scale, first), None, None


attend.register_autograd(_backward, setup_context=_save)

"""Token routing: scores to chosen experts and weights, and the sort that puts rows in expert order.

DeepSeek-V3's sigmoid router with a selection bias (arXiv 2412.19437, section 2.1.2). `route` and `sort_by_expert` run
either the code here or the kernels of triton_routing.py. Next: experts.py.

Shapes: N tokens, E experts, K experts per token, G groups, B sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend


def router_logits(x_ND, weight_ED):
    """The router's logits in fp32, of weights rounded to x's dtype like every other weight, so that they are the same
    wherever they were gathered from. In bf16 on CUDA without copies in fp32; fp16 has too little range for that."""
    if backend.triton_runs(x_ND) and x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
        return WideLogits.apply(x_ND, weight_ED)
    return F.linear(x_ND.float(), weight_ED.to(x_ND.dtype).float())


def _wide_product(left, right):
    """left @ right of bf16 matrices in fp32. PyTorch offers it on CUDA alone."""
    return torch.mm(left, right, out_dtype=torch.float32)


class WideLogits(torch.autograd.Function):
    """x_ND @ weight_ED.T in fp32 out of bf16. The fp32 gradient goes back as two bf16 parts, 16 of its 24 bits."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED):
        ctx.save_for_backward(x_ND, weight_ED)
        return _wide_product(x_ND, weight_ED.to(x_ND.dtype).T)

    @staticmethod
    def backward(ctx, grad_NE):
        x_ND, weight_ED = ctx.saved_tensors
        high_NE = grad_NE.to(x_ND.dtype)
        parts_N2E = torch.cat((high_NE, (grad_NE - high_NE.float()).to(x_ND.dtype)), dim=1)
        weight = weight_ED.to(x_ND.dtype)
        high_ED, low_ED = _wide_product(parts_N2E.T, x_ND).chunk(2)
        return parts_N2E @ torch.cat((weight, weight)), (high_ED + low_ED).to(weight_ED.dtype)


def route(logits_NE, bias_E, batch_size, top_k, n_group=1, topk_group=1, normalise=True, scale=1.0):
    """The router, from the logits of batch_size sequences to all that is wanted of it: weights_NK (fp32), experts_NK
    (int64), the balance loss summed over the sequences, and counts_E (int64). The parts say more: choose,
    sequence_balance, count_choices."""
    options = (top_k, n_group, topk_group, normalise, scale)
    if not backend.triton_runs(logits_NE):
        weights_NK, experts_NK, scores_NE = choose(logits_NE, bias_E, *options)
        balance = sequence_balance(scores_NE, experts_NK, batch_size)
        return weights_NK, experts_NK, balance, count_choices(experts_NK, logits_NE.shape[1])
    return _route(logits_NE.float(), bias_E, batch_size, *options)[:4]


def choose(logits_NE, bias_E, top_k, n_group=1, topk_group=1, normalise=True, scale=1.0):
    """Choose top_k experts for every token; everything in fp32, ties go to the lowest expert index.

    The bias steers the selection only; the weights are the unbiased scores, so the router's gradient flows through
    the chosen scores alone. With n_group > 1 only topk_group groups take part, those whose two best biased scores sum
    highest.

    Returns weights_NK (fp32), experts_NK (int64), scores_NE (fp32 sigmoid scores, which the balance loss needs).
    """
    scores_NE = logits_NE.float().sigmoid()
    with torch.no_grad():
        experts_NK = _lowest_index_topk(biased_scores(scores_NE, bias_E, n_group, topk_group), top_k)
    weights_NK = scores_NE.gather(1, experts_NK)
    if normalise:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    return weights_NK * scale, experts_NK, scores_NE


def biased_scores(scores_NE, bias_E, n_group=1, topk_group=1):
    """What the choice goes by: score + bias, and -inf for the experts of groups that a token may not use."""
    choice_NE = scores_NE + bias_E
    if n_group == 1:
        return choice_NE
    choice_NGe = choice_NE.unflatten(1, (n_group, -1))
    group_score_NG = choice_NGe.topk(2, dim=-1).values.sum(-1)
    kept = _lowest_index_topk(group_score_NG, topk_group)
    dropped_NG = torch.ones_like(group_score_NG, dtype=torch.bool).scatter_(1, kept, False)
    return choice_NGe.masked_fill(dropped_NG.unsqueeze(-1), float("-inf")).flatten(1)


def _lowest_index_topk(values, k):
    # torch.topk breaks ties arbitrarily; a stable sort keeps equal values in index order, the same on every device.
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # There a quarter of the time: topk of integers that order like (value, lowest index first), so that none are equal.
    bits, last = values.float().contiguous().view(torch.int32), values.shape[-1] - 1
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).masked_fill(values.isnan(), 0x7FFFFFFF)  # which comes first
    keys = ordered.long() << 32 | torch.arange(last, -1, -1)
    return last - (keys.topk(k).values & 0xFFFFFFFF)


def count_choices(experts_NK, n_experts):
    """How often each expert was chosen, int64."""
    flat = experts_NK.flatten()
    return flat.new_zeros(n_experts).scatter_add_(0, flat, torch.ones_like(flat))


def sort_by_expert(experts_NK, n_experts, n_choices=None):
    """Stable sort of the N*K (token, choice) rows by expert, without a host sync.

    Returns order (sorted row -> flat row n*K+k), inverse (flat row -> sorted row), counts_E, all int64. With n_choices
    only that many choices are of experts that exist; the others, marked n_experts, are left out of order and counts,
    and inverse places them beyond the end of order.
    """
    if backend.triton_runs(experts_NK):
        order, inverse, counts = _sort_by_expert(experts_NK, n_experts + (n_choices is not None))
        return order[:n_choices], inverse, counts[:n_experts]
    flat = experts_NK.flatten()
    keys = flat.to(torch.int16) if flat.device.type == "cpu" else flat  # MOST_EXPERTS fit, and it is faster there
    order = keys.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    if n_choices is not None:
        return order[:n_choices], inverse, count_choices(experts_NK, n_experts + 1)[:n_experts]
    return order, inverse, count_choices(experts_NK, n_experts)


def sequence_balance(scores_NE, experts_NK, batch_size):
    """Sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20), summed over the sequences of the batch.

    f_i = E/(K T) * (times expert i was chosen in the sequence), P_i = its mean share of the scores; the loss is
    sum_i f_i P_i, which is 1 for a perfectly even router. Only P carries a gradient. Returns a scalar.
    """
    n_experts, top_k = scores_NE.shape[1], experts_NK.shape[1]
    # Shares against the sum of all scores. The floor only guards 0/0: scores that all underflow must not look balanced.
    shares_NE = scores_NE / scores_NE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    shares_BTE = shares_NE.unflatten(0, (batch_size, -1))
    chosen_BTK = experts_NK.unflatten(0, (batch_size, -1))
    counts_BE = torch.zeros(batch_size, n_experts, device=scores_NE.device)
    counts_BE.scatter_add_(1, chosen_BTK.flatten(1), torch.ones_like(chosen_BTK.flatten(1), dtype=torch.float32))
    fraction_BE = counts_BE * (n_experts / (top_k * shares_BTE.shape[1]))
    return (fraction_BE * shares_BTE.mean(1)).sum()


def z_loss(logits_NE, real_N=None):
    """The squared log-sum-exp of every token's logits, summed over the tokens, those that are real if not all are
    (ST-MoE, arXiv 2202.08906, eq. 5). Of a sigmoid router it bounds the scores from above: at 0 the exponentials, which
    the scores stay below, sum to 1. Weights do not change with the scale of small scores, since they are normalised."""
    squares_N = logits_NE.float().logsumexp(-1).square()
    return (squares_N if real_N is None else squares_N * real_N).sum()


# ----------------------------------------------------------------------------- the Triton kernels as operators

@torch.library.custom_op("nanok2::route", mutates_args=())
def _route(logits_NE: Tensor, bias_E: Tensor, batch_size: int, top_k: int, n_group: int, topk_group: int,
           normalise: bool, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from kernels import triton_routing
    return triton_routing.route(logits_NE.contiguous(), bias_E, batch_size, top_k, n_group, topk_group, normalise,
                                scale)


@_route.register_fake
def _(logits_NE, bias_E, batch_size, top_k, n_group, topk_group, normalise, scale):
    N, E = logits_NE.shape
    return (logits_NE.new_empty(N, top_k), logits_NE.new_empty(N, top_k, dtype=torch.int64), logits_NE.new_empty(()),
            logits_NE.new_empty(E, dtype=torch.int64), logits_NE.new_empty(batch_size, E, dtype=torch.int32))


@torch.library.custom_op("nanok2::route_backward", mutates_args=())
def _route_backward(logits_NE: Tensor, experts_NK: Tensor, grad_weights_NK: Tensor, grad_balance: Tensor,
                    counts_BE: Tensor, normalise: bool, scale: float) -> Tensor:
    from kernels import triton_routing
    return triton_routing.route_backward(logits_NE.contiguous(), experts_NK, grad_weights_NK, grad_balance, counts_BE,
                                         normalise, scale)


@_route_backward.register_fake
def _(logits_NE, experts_NK, grad_weights_NK, grad_balance, counts_BE, normalise, scale):
    return torch.empty_like(logits_NE, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1], output[4])
    ctx.options = inputs[-2:]


def _backward(ctx, grad_weights_NK, _, grad_balance, *__):
    logits_NE, experts_NK, counts_BE = ctx.saved_tensors
    return _route_backward(logits_NE, experts_NK, grad_weights_NK, grad_balance, counts_BE, *ctx.options), *[None] * 7


_route.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("nanok2::sort_by_expert", mutates_args=())
def _sort_by_expert(experts_NK: Tensor, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    from kernels import triton_routing
    return triton_routing.sort_by_expert(experts_NK, n_keys)


@_sort_by_expert.register_fake
def _(experts_NK, n_keys):
    flat = experts_NK.new_empty(experts_NK.numel())
    return flat, torch.empty_like(flat), experts_NK.new_empty(n_keys)

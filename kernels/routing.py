"""Token routing: scores to chosen experts and weights, and the sort that puts rows in expert order.

DeepSeek-V3's sigmoid router with a selection bias (arXiv 2412.19437, section 2.1.2). Next: experts.py.

Shapes: N tokens, E experts, K experts per token, G groups.
"""

import torch


def route(logits_NE, bias_E, top_k, n_group=1, topk_group=1, normalise=True, scale=1.0):
    """Choose top_k experts for every token; everything in fp32, ties go to the lowest expert index.

    The bias steers the selection only; the weights are the unbiased scores, so the router's gradient flows through
    the chosen scores alone. With n_group > 1 only topk_group groups take part, those whose two best biased scores sum
    highest.

    Returns weights_NK (fp32), experts_NK (int64), scores_NE (fp32 sigmoid scores, which the balance loss needs).
    """
    scores_NE = logits_NE.float().sigmoid()
    with torch.no_grad():
        choice_NE = scores_NE + bias_E
        if n_group > 1:
            choice_NGe = choice_NE.unflatten(1, (n_group, -1))
            group_score_NG = choice_NGe.topk(2, dim=-1).values.sum(-1)
            kept = _lowest_index_topk(group_score_NG, topk_group)
            dropped_NG = torch.ones_like(group_score_NG, dtype=torch.bool).scatter_(1, kept, False)
            choice_NE = choice_NGe.masked_fill(dropped_NG.unsqueeze(-1), float("-inf")).flatten(1)
        experts_NK = _lowest_index_topk(choice_NE, top_k)
    weights_NK = scores_NE.gather(1, experts_NK)
    if normalise:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    return weights_NK * scale, experts_NK, scores_NE


def _lowest_index_topk(values, k):
    # torch.topk breaks ties arbitrarily; a stable sort keeps equal values in index order, the same on every device.
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def count_choices(experts_NK, n_experts):
    """How often each expert was chosen, int64."""
    flat = experts_NK.flatten()
    return flat.new_zeros(n_experts).scatter_add_(0, flat, torch.ones_like(flat))


def sort_by_expert(experts_NK, n_experts, n_choices=None):
    """Stable counting sort of the N*K (token, choice) rows by expert, without a host sync.

    Returns order (sorted row -> flat row n*K+k), inverse (flat row -> sorted row), counts_E, all int64. With n_choices
    only that many choices are of experts that exist; the others, marked n_experts, are left out of order and counts,
    and inverse places them beyond the end of order.
    """
    flat = experts_NK.flatten()
    order = flat.argsort(stable=True)
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

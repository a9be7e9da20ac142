"""Quantile balancing: the router biases that would have given every expert its share of the tokens of a step.

A token goes to an expert if score + bias exceeds the token's cutoff, its (K+1)-th largest biased score. So for this
token the expert needed a bias of cutoff - score, and with the K/E quantile of that over all tokens it would have had
its share of them, K/E, had the cutoffs stayed (Kimi K3 report, section 2.3.3; kexue.fm/archives/11619). With group
limits the cutoff is the (K+1)-th of the groups that the token kept. Experts of the others are compared with it as well:
were they out of reach, they would ask for ever more bias, and their groups would take turns at taking every token.

The quantiles come from histograms of BINS bins (appendix D), which micro-batches and ranks add up. Unlike there, a
token counts at both ends of its bin, by how near they are: so the biases move no further than the scores do, and ranks
that round otherwise do not differ by a bin. Plain PyTorch operations without a host sync, behind either router.

Shapes: N tokens, E experts, K experts per token, C = BINS + 1 ends of bins.   Next: routing.py, ../moe.py.
"""

import torch

from kernels import routing

BINS = 1000
PART_BITS = 8
PARTS = 1 << PART_BITS  # of a token, shared out between the ends of its bin


def bins(bias_E):
    """(low, width): where the bins of all experts begin, and how wide they are. Biases to be found lie in them, since
    scores lie in 0..1 and a cutoff between the lowest bias and the highest one plus 1."""
    low, high = bias_E.min() - 1, bias_E.max() + 1
    return low, (high - low) / BINS


@torch.no_grad()
def needed_biases(logits_NE, bias_E, experts_NK, n_group=1, topk_group=1):
    """The bias that each expert needed for each token, (N, E) in fp32, of a router that chose experts_NK < all."""
    scores_NE = logits_NE.float().sigmoid()
    choice_NE = routing.biased_scores(scores_NE, bias_E, n_group, topk_group)
    cutoff_N1 = choice_NE.scatter_(1, experts_NK, float("-inf")).amax(1, keepdim=True)
    return cutoff_N1 - scores_NE


@torch.no_grad()
def histogram(needed_NE, bias_E, real_N=None):
    """Parts of tokens at the ends of each expert's bins, (E, C) in int32; those of the tokens that are real, if not all
    are. What is no number falls anywhere: the step will be skipped."""
    E = needed_NE.shape[1]
    low, width = bins(bias_E)
    place_NE = (needed_NE - low).mul_(PARTS / width).int().clamp_(0, BINS * PARTS - 1)  # in parts of a bin
    above_NE, whole = place_NE & PARTS - 1, PARTS
    if real_N is not None:
        above_NE, whole = above_NE * real_N[:, None], PARTS * real_N[:, None].int()
    first_E = torch.arange(0, E * (BINS + 1), BINS + 1, device=needed_NE.device)
    cell = (place_NE >> PART_BITS).long().add_(first_E).flatten()
    counts = torch.zeros(E * (BINS + 1), dtype=torch.int32, device=needed_NE.device)
    counts.scatter_add_(0, cell, (whole - above_NE).flatten()).scatter_add_(0, cell.add_(1), above_NE.flatten())
    return counts.view(E, BINS + 1)


@torch.no_grad()
def solve(histogram_EC, bias_E, top_k):
    """The biases (E), mean-centred, from the histogram (int64) of all tokens of a step in which they were bias_E. Parts
    at an end of a bin count as spread over the halves of both bins beside it."""
    E = len(bias_E)
    low, width = bins(bias_E)
    below_EC = histogram_EC.cumsum(1)
    share_E1 = (below_EC[:, -1:] * top_k + E - 1) // E  # in whole numbers: exact with any number of tokens
    cell_E1 = (below_EC < share_E1).sum(1, keepdim=True)
    here_E1 = histogram_EC.gather(1, cell_E1)
    inside_E1 = (share_E1 - below_EC.gather(1, cell_E1) + here_E1) / here_E1.clamp(min=1)
    solved_E = (low + width * (cell_E1 - 0.5 + inside_E1)).flatten()
    return solved_E - solved_E.mean()

"""Quantile balancing: the router biases that would have given every expert its share of the tokens of a step.

A token goes to an expert if score + bias exceeds the token's cutoff, its (K+1)-th largest biased score. So for this
token the expert needed a bias of cutoff - score, and with the K/E quantile of that over all tokens it would have had
its share of them, K/E, had the cutoffs stayed (Kimi K3 report, section 2.3.3; kexue.fm/archives/11619). With group
limits the cutoff is the (K+1)-th of the groups that the token kept. Experts of the others are compared with it as well:
were they out of reach, they would ask for ever more bias, and their groups would take turns at taking every token.

The quantiles come from histograms of BINS bins, which micro-batches and ranks add up (appendix D). These are whole
numbers, so that layouts whose scores differ in the last bits find the very same biases, but for rare tokens at the edge
of a bin. Plain PyTorch operations without a host sync, behind either router.

Shapes: N tokens, E experts, K experts per token, C = BINS.   Next: routing.py, ../moe.py.
"""

import torch

from kernels import routing

BINS = 1000


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
    """How many tokens fall into each bin of each expert, (E, C) in int32; of those that are real, if not all are. What
    is no number falls anywhere: the step will be skipped."""
    N, E = needed_NE.shape
    low, width = bins(bias_E)
    first_E = torch.arange(0, E * BINS, BINS, device=needed_NE.device)
    bin_NE = (needed_NE - low).div_(width).long().clamp_(0, BINS - 1).add_(first_E)
    ones = torch.ones_like(bin_NE, dtype=torch.int32) if real_N is None else real_N.int()[:, None].expand(N, E)
    counts = torch.zeros(E * BINS, dtype=torch.int32, device=needed_NE.device)
    return counts.scatter_add_(0, bin_NE.flatten(), ones.flatten()).view(E, BINS)


@torch.no_grad()
def solve(histogram_EC, bias_E, top_k):
    """The biases (E), mean-centred, from the histogram (int64) of all tokens of a step in which they were bias_E. The
    tokens of a bin count as spread evenly over it."""
    E = len(bias_E)
    low, width = bins(bias_E)
    below_EC = histogram_EC.cumsum(1)
    share_E1 = (below_EC[:, -1:] * top_k + E - 1) // E  # in whole numbers: exact with any number of tokens
    bin_E1 = (below_EC < share_E1).sum(1, keepdim=True)
    here_E1 = histogram_EC.gather(1, bin_E1)
    inside_E1 = (share_E1 - below_EC.gather(1, bin_E1) + here_E1) / here_E1
    solved_E = (low + width * (bin_E1 + inside_E1)).flatten()
    return torch.where(below_EC[:, -1] > 0, solved_E - solved_E.mean(), bias_E)  # as it was if there was no token

"""The mixture-of-experts layer: router, experts, and the layer that joins them with the shared expert.

Parameters carry Hugging Face's DeepSeek-V3 names (mlp.gate.weight, mlp.experts.gate_up_proj, ...). The arithmetic is in
kernels/routing.py and kernels/experts.py; model.py builds one MoE per layer after the dense ones.

Shapes: B batch, T positions, N = B*T tokens, D model width, E routed experts, K experts per token, F expert width.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import backend, quantile, routing
from kernels import experts as expert_kernels


@functools.cache
def default_scaling_factor(n_experts, top_k):
    """The routed_scaling_factor that gives K normalised experts the output size of one: E[1/sqrt(sum p^2)] over random
    Gaussian logits -> sigmoid -> top-k -> normalise (Moonlight, arXiv 2502.16982, appendix C). About sqrt(K)."""
    logits = torch.randn(20_000, n_experts, generator=torch.Generator().manual_seed(0))
    chosen = logits.sigmoid().topk(top_k).values
    shares = chosen / chosen.sum(-1, keepdim=True)
    return round(float((1 / shares.pow(2).sum(-1).sqrt()).mean()), 3)


class Routed(NamedTuple):
    """What a router tells of the tokens of a forward beside their experts. It is returned and added up outside of the
    blocks, so that recomputing a block cannot count a token twice."""
    balance: Tensor  # the balance loss summed over the sequences, unweighted
    counts_E: Tensor  # int64: how often each expert was chosen
    z: Tensor | None  # the z-loss summed over the tokens, unweighted; if the router has one
    histogram_EC: Tensor | None  # see kernels/quantile.py; of a router balanced by quantiles


class Router(nn.Module):
    """Scores every token against every expert in fp32 and picks top_k. The bias steers the selection, has no gradient,
    and is moved once per optimizer step: by update_bias_ or, with balance="quantile", by solve_bias_."""

    def __init__(self, hidden_size, n_routed_experts, num_experts_per_tok, n_group, topk_group, norm_topk_prob,
                 routed_scaling_factor, balance="sign", z_loss=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(n_routed_experts, dtype=torch.float32))
        self.options = (num_experts_per_tok, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
        self.balance, self.z_loss = balance, z_loss

    def forward(self, x_ND, batch_size=1, real_N=None):
        """weights_NK, experts_NK (see routing.route), and the Routed of batch_size sequences: real_N says which tokens
        its last two are about, None: all."""
        logits_NE, bias_E = routing.router_logits(x_ND, self.weight), self.e_score_correction_bias
        weights_NK, experts_NK, balance, counts_E = routing.route(logits_NE, bias_E, batch_size, *self.options)
        z = routing.z_loss(logits_NE, real_N) if self.training and self.z_loss else None
        histogram_EC = None
        if self.training and self.balance == "quantile":
            needed_NE = quantile.needed_biases(logits_NE, bias_E, experts_NK, *self.options[1:3])
            histogram_EC = quantile.histogram(needed_NE, bias_E, real_N)
        return weights_NK, experts_NK, Routed(balance, counts_E, z, histogram_EC)

    @torch.no_grad()
    def update_bias_(self, counts_E, rate):
        """One auxiliary-loss-free balancing step from the token counts of the whole global batch: overloaded experts
        down, underloaded up (DeepSeek-V3, section 2.1.2), mean-centred so that the bias cannot drift (Moonlight)."""
        counts_E = counts_E.float()
        sign_E = (counts_E.mean() - counts_E).sign()
        self.e_score_correction_bias += rate * (sign_E - sign_E.mean())

    def solve_bias_(self, histogram_EC):
        """Quantile balancing, from the histogram (int64) of the whole global batch: see kernels/quantile.py."""
        self.e_score_correction_bias.copy_(quantile.solve(histogram_EC, self.e_score_correction_bias, self.options[0]))


class Routing(nn.Module):
    """What all routers of a model told since the last clear(), which is what it takes to balance them: expert_counts
    (L, E) and histograms (L, E, C; none unless balance="quantile"), both int64, and z, the z-losses of all. L: MoE
    layers. Of a model in stages (ranks/pipeline.py) `routers` are those of this rank, `rows` their places among all,
    and `complete` brings the rows of the other ranks."""

    def __init__(self, routers, n_experts, balance):
        super().__init__()
        self.routers, self.balance = list(routers), balance
        self.rows, self.complete = list(range(len(self.routers))), lambda biases_LE: biases_LE
        shape = (len(routers), n_experts)
        self.register_buffer("expert_counts", torch.zeros(shape, dtype=torch.int64), persistent=False)
        shape = (len(routers) * (balance == "quantile"), n_experts, quantile.BINS)
        self.register_buffer("histograms", torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.register_buffer("z", torch.zeros(()), persistent=False)

    def clear(self):
        for total in self.buffers():
            total.zero_()

    @torch.no_grad()
    def add(self, routed, first=0):
        """Add what the routers told of a forward, the Routed of each from the first-th on, perhaps not to the last."""
        if routed:
            self.expert_counts[first:first + len(routed)] += torch.stack([r.counts_E for r in routed])
        for total_EC, r in zip(self.histograms[first:], routed):
            total_EC += r.histogram_EC
        self.z += sum(r.z for r in routed if r.z is not None)

    def balance_(self, rate):
        """One balancing step of every router, from what has been added; rate is for balance="sign"."""
        for router, row in zip(self.routers, self.rows):
            if self.balance == "sign":
                router.update_bias_(self.expert_counts[row], rate)
            elif self.balance == "quantile":
                router.solve_bias_(self.histograms[row])

    def biases(self):
        """The selection biases, (L, E). All ranks call it together."""
        biases_LE = torch.zeros(self.expert_counts.shape, device=self.expert_counts.device)
        for router, row in zip(self.routers, self.rows):
            biases_LE[row] = router.e_score_correction_bias
        return self.complete(biases_LE)


class Experts(nn.Module):
    """The stacked weights of all routed experts; gate rows stand above up rows, as in Hugging Face."""

    def __init__(self, n_routed_experts, hidden_size, moe_intermediate_size):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_routed_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_routed_experts, hidden_size, moe_intermediate_size))
        self.held = lambda weight: weight  # expert parallelism: this rank's experts of the stack
        self.gate_up_copy = self.down_copy = None  # both in the compute dtype, where they are made once a step
        self.kept_grads = None  # where the backward adds to them itself: see kernels/experts.py, into

    def copied(self):
        """{attribute for a rounded copy: the parameters that it stacks}; none for the twins, which do not read them."""
        on = backend.triton_runs(self.gate_up_proj)
        return {"gate_up_copy": [self.gate_up_proj], "down_copy": [self.down_proj]} if on else {}

    def forward(self, x_ND, weights_NK, experts_NK, n_choices=None, addends=()):
        """The weighted sum of every row's experts, plus the addends. n_choices: how many of the choices are experts
        held here, if not all; the others read as the number of experts held."""
        gate_up, down = self.held(self.gate_up_proj), self.held(self.down_proj)
        order, inverse, counts_E = routing.sort_by_expert(experts_NK, gate_up.shape[0], n_choices)
        copies = None if self.gate_up_copy is None else (self.gate_up_copy, self.down_copy)
        return expert_kernels.experts(x_ND, weights_NK, order, inverse, counts_E, gate_up, down, copies, addends,
                                      self.kept_grads)


def keep_gradients(modules, dtype):
    """Let the backward of all Experts in `modules` add to their gradients itself from now on, if Triton computes rows
    of this dtype: autograd would read and write them once more in every micro-batch. Returns ({matrix: its gradient,
    fp32 and not set yet}, begun), where the caller sets begun, a tensor of one number: 0. before the first micro-batch
    of a step, which writes anew, 1. before the others. {} and None where autograd goes on doing it.

    For matrices that are whole on this device, and experts that take part in every backward. After it the caller lets
    parameter.grad be the gradient.
    """
    kept, begun = {}, None
    for experts in (module for module in modules if isinstance(module, Experts)):
        matrices = experts.gate_up_proj, experts.down_proj
        if backend.triton_runs(matrices[0].detach()[:0].to(dtype)):
            begun = torch.zeros((), device=matrices[0].device) if begun is None else begun
            grads = [torch.empty_like(matrix, dtype=torch.float32) for matrix in matrices]
            kept |= zip(matrices, grads)
            experts.kept_grads = (*grads, begun)
    return kept, begun


class MoE(nn.Module):
    """Routed experts plus an always-on shared expert: y = sum_k w_k expert_k(x) + shared(x)."""

    def __init__(self, router, experts, shared_experts=None):
        super().__init__()
        self.gate, self.experts, self.shared_experts = router, experts, shared_experts
        self.dispatch = None  # an ExpertParallel, where other ranks have some of the experts

    def forward(self, x_BTD, residual_BTD=None, real_BT=None):
        """Returns y_BTD, plus the residual if given, and the router's Routed; real_BT: see Router.forward.

        The experts' operator takes the residual as it is, not as a view: torch.compile then keeps it for the backward,
        where it would otherwise add up its parts again in every kernel that wants it.
        """
        x_ND = x_BTD.flatten(0, 1)
        weights_NK, experts_NK, routed = self.gate(x_ND, len(x_BTD), None if real_BT is None else real_BT.flatten())
        return self.compute(x_ND, weights_NK, experts_NK, residual_BTD).view_as(x_BTD), routed

    def compute(self, x_ND, weights_NK, experts_NK, residual_BTD):
        """The experts' part, between the router's choice and the result."""
        handle = self.dispatch and self.dispatch.send(x_ND, weights_NK, experts_NK)
        shared_ND = self.shared_experts(x_ND) if self.shared_experts is not None else None  # while rows are in flight
        addends = [addend for addend in (shared_ND, residual_BTD) if addend is not None]
        if self.dispatch is None:
            return self.experts(x_ND, weights_NK, experts_NK, addends=addends)
        y_ND = self.dispatch.collect(self.experts(*self.dispatch.receive(handle)), handle)
        return expert_kernels.add_all(y_ND, addends)

"""Pipeline parallelism: consecutive blocks of a model on ranks of their own, which hand on what comes out of them.

cut() leaves a rank its stages; torch.distributed.pipelining decides who computes which micro-batch when, and carries
activations forward and their gradients back. Only the last stage has the loss. What routers want of the gradient,
balance and z-loss, every stage adds where its result leaves it. Statistics meet where those of all ranks do.
Validation and texts go through the stages one after the other, and all ranks get what comes out.

    1f1b: one stage on each of pp ranks          0 1 2 3       of m micro-batches' time (pp - 1) / (m + pp - 1) is idle
    interleaved: two on each, in turns           0 1 2 3       half as much, for twice the traffic
                                                 4 5 6 7

    zero_bubble: as 1f1b, but the gradients of weights wait (kernels/later.py) until a rank has nothing else to do: with
    forward, input's and weights' gradient of equal cost (pp - 1) / (3 m + pp - 1), for as many activations on every
    rank as 1f1b has on the first. The head's weights do not wait: they get their gradient in the forward.

1F1B: Harlap et al., arXiv 1806.03377; interleaved: Narayanan et al., arXiv 2104.04473, section 2.2; zero bubble: Qi et
al., arXiv 2401.10241, section 2.3 (ZB-H1).

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

import dataclasses
import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from counting import flops_by_layer
from kernels import later
from kernels.cross_entropy import IGNORE

# Of m micro-batches' time a rank of pp is idle for (pp - 1) / (this m), if its stages cost what those of others do.
BUBBLE = {"1f1b": 1, "interleaved": 2, "zero_bubble": 3}


def spans(costs, n):
    """n consecutive ranges of layers, none empty, that make the largest sum of costs as small as it can be."""
    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    least = {(0, 0): (0.0, None)}  # (stages, layers in them): (their largest sum, where the last one begins)
    for stages in range(1, n + 1):
        for end in range(stages, len(costs) + 1):
            least[stages, end] = min((max(least[stages - 1, begin][0], ends[end] - ends[begin]), begin)
                                     for begin in range(stages - 1, end) if (stages - 1, begin) in least)
    found, end = [], len(costs)
    for stages in range(n, 0, -1):
        begin = least[stages, end][1]
        found.append(range(begin, end))
        end = begin
    return found[::-1]


# ----------------------------------------------------------------------------- stages

class Share(torch.autograd.Function):
    """x as it is; its backward gives `share`, a number, the gradient 1 of a loss."""

    @staticmethod
    def forward(ctx, x_BTD, share):
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD):
        return grad_BTD, torch.ones((), device=grad_BTD.device)


class Stage(nn.Module):
    """The layers of a span of the model, with the embedding before the first and norm and head behind the last.
    The modules are the model's own, under whose names they are saved; FSDP2 has the stage for its root.

    weights: by what a sum of cross-entropies, and one of balance losses, is multiplied in the gradient, and in `sums`,
    which adds up (cross-entropy, balance loss, empty places) of the micro-batches. They are set before every step."""

    def __init__(self, model, index, span, last):
        super().__init__()
        self.index, self.span, self.last, self.weights, self.sums = index, span, last, None, None
        self.of = [model]  # not a part of it
        ends = [model.model.embed_tokens] * (span.start == 0) + [model.model.norm, model.lm_head] * last
        self.layers = nn.ModuleList(model.model.layers[index] for index in span)
        self.ends = nn.ModuleList(ends)

    def forward(self, x, targets_BT=None, first_BT=None, cache=None):
        """What goes into the next stage, x_BTD; of the last stage logits (B, T, V) or, with targets, the sum of their
        cross-entropies; in training (1,), the loss of this micro-batch as it counts in the gradient."""
        model, = self.of
        x_BTD, _, told = model.trunk(x, cache, first_BT, None if targets_BT is None else targets_BT != IGNORE,
                                     self.span)
        if self.last and targets_BT is None:
            return model.lm_head(x_BTD).float()
        balance, z = model.take_in(told, self.span.start)
        if not model.training:
            return model.loss_sum(x_BTD, targets_BT, 1.0) if self.last else x_BTD
        by_token, by_sequence, alpha, scale = self.weights
        loss_sum = model.loss_sum(x_BTD, targets_BT, by_token) if self.last else torch.zeros_like(z)
        shares = (loss_sum + z) * by_token, balance * by_sequence
        empty = (targets_BT == IGNORE).sum() * self.last
        self.sums += torch.stack((*shares, empty)).detach()
        share = (shares[0] + alpha * shares[1]) * scale
        return share[None] if self.last else Share.apply(x_BTD, share)


def cut(model, layout):
    """Leave a model on the meta device only the stages of this rank; returns them. From then on model(...) is forward()
    of this module."""
    c, here = model.config, dist.get_rank(layout.across)
    owners = [*range(layout.pp)] * c.stages_a_rank()
    cuts = spans(flops_by_layer(c, c.sequence_length), len(owners))
    stages = [Stage(model, index, span, span is cuts[-1]) for index, (span, owner) in enumerate(zip(cuts, owners))
              if owner == here]
    model.pp, model.stages = layout.pp, stages
    model.here = [index for stage in stages for index in stage.span]
    for index in set(range(c.num_hidden_layers)) - set(model.here):
        model.model.layers[index] = nn.Module()
    if stages[0].span.start:
        model.model.embed_tokens = nn.Module()
    if not stages[-1].last:
        model.model.norm = model.lm_head = nn.Module()
    routing, moe = model.routing, [index for index in range(c.num_hidden_layers) if c.is_moe_layer(index)]
    routing.rows = [row for row, index in enumerate(moe) if index in model.here]
    routing.routers = [routing.routers[row] for row in routing.rows]
    routing.complete = functools.partial(_add_up, layout.across)
    model.forward = functools.partial(forward, model, layout.across, owners)
    return stages


def _add_up(group, tensor):
    dist.all_reduce(tensor, group=group)
    return tensor


# ----------------------------------------------------------------------------- forward alone

@torch.no_grad()
def forward(model, group, owners, tokens_BT, targets_BT=None, cache=None, first_BT=None):
    """K2.forward of a model in stages, for validation and texts, on all ranks of the pipeline at once: all get the
    logits, or (the sum of cross-entropies, 0.)."""
    here, mine = dist.get_rank(group), {stage.index: stage for stage in model.stages}
    rank = lambda at: dist.get_global_rank(group, at)
    x = tokens_BT
    for index, owner in enumerate(owners):
        if owner != here:
            continue
        if index and owners[index - 1] != here:
            shape = *tokens_BT.shape, model.config.hidden_size
            x = torch.empty(shape, dtype=model.compute_dtype, device=tokens_BT.device)
            dist.recv(x, rank(owners[index - 1]), group=group)
        own = cache and dataclasses.replace(cache)  # every stage begins at the same length
        x = mine[index](x, targets_BT, first_BT, own)
        if index + 1 < len(owners) and owners[index + 1] != here:
            dist.send(x.contiguous(), rank(owners[index + 1]), group=group)
    if cache is not None:
        cache.length += tokens_BT.shape[1]
    if not model.stages[-1].last:
        shape = () if targets_BT is not None else (*tokens_BT.shape, model.config.vocab_size)
        x = torch.empty(shape, device=tokens_BT.device)
    dist.broadcast(x, rank(owners[-1]), group=group)
    return x if targets_BT is None else (x, torch.zeros_like(x))


# ----------------------------------------------------------------------------- a step

class Pipeline:
    """Forward and backward of all micro-batches of a step, in the order of config.pp_schedule."""

    def __init__(self, config, model, layout, micro_batch_size, n_micro_batches, device):
        # Here, since it takes most of a second, and few want it.
        from torch.distributed import pipelining

        self.config, self.stages, self.device = config, model.stages, device
        tokens = torch.empty(micro_batch_size, config.sequence_length, dtype=torch.int64, device="meta")
        x_BTD = torch.empty(*tokens.shape, config.hidden_size, dtype=model.compute_dtype, device="meta",
                            requires_grad=True)
        n_stages = layout.pp * config.stages_a_rank()
        split = config.splits_backward()
        stages = [pipelining.PipelineStage(
            stage, stage.index, n_stages, device, input_args=x_BTD if stage.index else tokens,
            output_args=tokens.new_empty(1, dtype=torch.float32) if stage.last else x_BTD, group=layout.across,
            dw_builder=functools.partial(weights_later, stage) if split else None) for stage in self.stages]
        schedule, of = {"1f1b": (pipelining.Schedule1F1B, stages[0]),
                        "interleaved": (pipelining.ScheduleInterleaved1F1B, stages),
                        "zero_bubble": (pipelining.ScheduleInterleavedZeroBubble, stages)}[config.pp_schedule]
        self.schedule = schedule(of, n_micro_batches, loss_fn=lambda loss, targets_BT: loss.sum(), scale_grads=False)

    def __call__(self, inputs_BT, targets_BT, first_BT, loss_scale):
        """The gradients of all sequences of this rank, times loss_scale; returns what step.forward_and_backward does,
        of this rank's stages."""
        c, sums = self.config, torch.zeros(3, device=self.device)
        by_token = 1 / (c.global_batch_size * c.sequence_length)
        for stage in self.stages:
            stage.weights, stage.sums = (by_token, 1 / c.global_batch_size, c.aux_loss_alpha, loss_scale), sums
        starts = {} if first_BT is None else {"first_BT": first_BT}
        if c.splits_backward():
            later.start()
        try:
            self.schedule.step(*[inputs_BT] * (self.stages[0].index == 0), target=targets_BT, return_outputs=False,
                               targets_BT=targets_BT, **starts)
        except RuntimeError as error:  # in which the library wraps what a stage met: memory, a compiler, a lost rank
            raise (error.__cause__ or error) from None
        finally:
            later.stop()
        return sums


def weights_later(stage):
    """What is left to do of a stage's backward: a function that adds to the gradients of its weights, in the dtype of
    reductions, as FSDP2 does after a backward."""
    run = later.take()

    def weights():
        run()
        for module in stage.modules():
            if isinstance(module, FSDPModule) and (group := fully_shard.state(module)._fsdp_param_group):
                group.post_backward()
    return weights

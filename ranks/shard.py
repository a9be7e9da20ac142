"""What shards a model over ranks, applied to a finished model from outside.

FSDP2 shards every block, the experts go to the ranks of their expert-parallel group, and moe.dispatch becomes an
exchange of rows (dispatch.py); with stages a rank keeps only its own blocks (pipeline.py). Next: those two.
"""

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import SAC_IGNORED_OPS

from moe import MoE
from ranks import pipeline
from ranks.dispatch import ExpertParallel

# Selective recompute insists that the same operations come again, but FSDP2's hooks inside a block, those of the
# experts, mark other profiler ranges in the recomputation than in the forward.
SAC_IGNORED_OPS.update((torch.ops.profiler._record_function_enter_new.default,
                        torch.ops.profiler._record_function_exit._RecordFunction))

# A block may return a view, which FSDP2 could lose by an operation in place; what blocks return is only read.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def distribute(model, layout, dtype):
    """Shard a model on the meta device in place: experts over ep, then every block and the rest with FSDP2.

    Gradients are summed, never averaged: the loss is divided by the global number of tokens, and then experts, whose
    group is smaller, need no other factor than the rest. Reductions are in fp32, unless layout.reduce_dtype says else.
    """
    if layout.dense is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=getattr(torch, layout.reduce_dtype),
                                  cast_forward_inputs=False)
    # Stages keep what they have gathered until the last micro-batch: else every one of them would gather it again.
    options = {"mesh": layout.dense, "mp_policy": policy} | ({"reshard_after_forward": False} if layout.pp > 1 else {})
    for root in pipeline.cut(model, layout) if layout.pp > 1 else [model]:
        for layer in root.layers:
            if layout.ep > 1 and isinstance(layer.mlp, MoE):
                _distribute_experts(layer.mlp, layout, options)
            fully_shard(layer, **options)
        fully_shard(root, **options)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # a factor of 1 is otherwise an operation gloo lacks
        _prefetch(root, list(root.layers), model.config.num_hidden_layers)


def _distribute_experts(moe, layout, options):
    """Give this rank its experts of a layer, sharded further over the ranks that hold the same ones."""
    group_mesh = layout.expert["ep"]
    for name, p in list(moe.experts.named_parameters()):
        part = p.new_empty(p.shape[0] // layout.ep, *p.shape[1:])
        whole = DTensor.from_local(part, group_mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())
        setattr(moe.experts, name, nn.Parameter(whole))
    moe.experts.held = DTensor.to_local
    moe.dispatch = ExpertParallel(layout.rows, moe.gate.weight.shape[0])
    names = ("dp_replicate", "efsdp") if layout.dp_replicate > 1 else ("efsdp",)
    fully_shard(moe.experts, **options | {"mesh": layout.expert[names]})


def _prefetch(model, layers, n_main):
    """Gather a block's experts and the next block while this one computes: FSDP2 guesses the order only as long as the
    host runs ahead, and dispatch stops it in every layer. In the backward the block before asks for both: a block asks
    once for each of its results, at last when all is done. Layers behind the n_main first may be left out."""
    units = [[m for m in layer.modules() if isinstance(m, FSDPModule)] for layer in layers]  # the block, its experts
    for before, (module, *inner), after in zip([[], *units], [*units, [model]], [*units[1:n_main], [], [], []]):
        module.set_modules_to_forward_prefetch(inner + after)
        module.set_modules_to_backward_prefetch(before)  # inside of a block a recomputation would take it for its own


def compile_blocks(model):
    """torch.compile every block and the last norm, inside of what shards them. How many rows come from other ranks
    changes with every step: what lies between sending and collecting them stays out, but for the shared expert."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # kinds of blocks x of batches
    model.model.norm.forward = torch.compile(model.model.norm.forward, dynamic=False)
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
        if isinstance(layer.mlp, MoE) and layer.mlp.dispatch is not None:
            layer.mlp.compute = torch.compiler.disable(layer.mlp.compute)
            if layer.mlp.shared_experts is not None:
                layer.mlp.shared_experts.forward = torch.compile(layer.mlp.shared_experts.forward, dynamic=False)


def last_micro_batch(model, last):
    """Replicas need to add up their gradients only once a step, after the last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)

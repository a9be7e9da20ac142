"""A training step of one rank of many, without the many: the real model under the real parallel code, on a process
group that moves nothing and on tensors that have no memory. What this rank holds and sends is counted, for plan.py to
compare with its arithmetic: so plan and program cannot drift apart.

What only data would tell is taken as even: every expert gets as many tokens. Next: costs.py, ../ranks/parallel.py.
"""

import contextlib
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import muon
from kernels import attention, cross_entropy, experts
from model import build
from muon import local_rows
from ranks import parallel, shard
from ranks.dispatch import ExpertParallel
from ranks.pipeline import Pipeline
from routes import routes_of
from run import peak
from step import forward_and_backward, make_optimizer, update_all

OPERATIONS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce",
              "alltoall_base_": "all_to_all", "send": "send"}


class Sent(TorchDispatchMode):
    """Within it, what the collectives of this rank send, rings and direct ones, on any process group:
    {(operation, ranks of the group): bytes}."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and (operation := OPERATIONS.get(function._schema.name.split("::")[1])):
            tensors, group = (args[0], args[1]) if operation in ("all_reduce", "send") else (args[:2], args[2])
            group = dist.ProcessGroup.unbox(group)
            n = group.size()
            sent = max(tensor.numel() * tensor.element_size() for tensor in tensors) * (n - 1) / n
            if operation == "send":
                n, sent = 2, sent * n / (n - 1)
            if operation == "all_to_all" and args[4]:  # rows for every rank
                row = args[1].element_size() * args[1].shape[1:].numel()
                sent = row * (sum(args[4]) - args[4][group.rank()])
            if n > 1:
                self.bytes[operation, n] = self.bytes.get((operation, n), 0) + sent * (1 + (operation == "all_reduce"))
        return function(*args, **(kwargs or {}))


def one_step(config, model, layout, tokens_BT, forwards):
    """A step of as many forwards of the same tokens, on any process group: {"parameters", "gradients", "optimizer":
    bytes that this rank holds, "sent": Sent.bytes}."""
    model.train().compute_dtype = getattr(torch, config.dtype)
    for layer in model.layers:
        layer.recompute = config.activation_checkpointing
    parameters = list(model.parameters())
    optimizer = make_optimizer(config, model, routes_of(config, model), layout)
    with Sent() as sent:
        if model.stages:
            size, whole_BT = len(tokens_BT), torch.cat([tokens_BT] * forwards)
            sums = Pipeline(config, model, layout, size, forwards, tokens_BT.device)(whole_BT, whole_BT, None, 1.0)
        for forward in range(0 if model.stages else forwards):
            shard.last_micro_batch(model, forward == forwards - 1)
            sums = forward_and_backward(model, config, tokens_BT, tokens_BT, None, 1.0,
                                              torch.ones(()) if config.mtp_depth else None)
        norm = parallel.squared_norm(parameters, layout)
        parallel.add_up(torch.cat((sums, torch.stack((model.routing.z, norm, norm)))))
        parallel.largest(model.max_logits)
        for counts in (model.routing.expert_counts, model.routing.histograms):
            parallel.add_up(counts)
        held = {"parameters": parameters, "gradients": [p.grad for p in parameters],
                "optimizer": optimizer.named_state().values()}
        held = {what: sum(map(_bytes, tensors)) for what, tensors in held.items()}
        optimizer.begin_step()
        update_all(model, optimizer, config)
    return held | {"sent": sent.bytes}


def _bytes(tensor):
    part = local_rows(tensor)[0]
    return part.numel() * part.element_size()


def rehearse(config, n, rank, costs, layout):
    """one_step of one forward, or of one for every stage, as rank `rank` of n, in this process alone. costs, of
    costs.py, says what other ranks hold, of the same stage if there are some, and is checked for this one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    try:
        with contextlib.ExitStack() as stack:
            for target, name, value in (
                    (ExpertParallel, "sizes", lambda self, out_P2: _even(self, out_P2, config, costs)),
                    (muon, "_from_all_ranks", lambda value, group=None: _all_held(value, costs, layout, rank)),
                    # Whether the stages know their shapes, over which they vote (not in torch 2.11): they do.
                    (PipelineStage, "_warmup_forward_vote", lambda self, has_backward, received_acc: None),
                    (PipelineStage, "_warmup_backward_result", lambda self, received_result: mock.Mock(item=lambda: 1)),
                    # Fewer operations than on a CPU, as on a GPU.
                    (attention, "QUERY_CHUNK", 2**40), (cross_entropy, "CHUNK_ELEMENTS", {"cpu": 2**60}),
                    (experts, "_operator_is_best", lambda *_: True)):
                stack.enter_context(mock.patch.object(target, name, value, create=True))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            cpu, dtype = torch.device("cpu"), getattr(torch, config.dtype)
            real = parallel.make_layout(config, cpu)
            model = build(config, torch.device("meta"), lambda model: shard.distribute(model, real, dtype))
            for p in model.parameters():
                local_rows(p)  # which remembers where the rows are: it could not find out within the next
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model.to_empty(device=cpu)
            if config.tie_word_embeddings:  # as in build
                model.lm_head.weight = model.model.embed_tokens.weight
            tokens_BT = torch.zeros(parallel.split_batch(config)[0], config.sequence_length, dtype=torch.int64)
            return one_step(config, model, real, tokens_BT, config.pp)
    finally:
        dist.destroy_process_group()


def _even(dispatch, out_P2, config, costs):
    """What ExpertParallel.sizes would return if all experts were chosen alike; the sizes travel as they do there."""
    dist.all_to_all_single(torch.empty_like(out_P2), out_P2, group=dispatch.group)
    tokens = parallel.split_batch(config)[0] * config.sequence_length
    rows = round(tokens * peak.sent_rows(config, dispatch.ranks) / (dispatch.ranks - 1))
    return [[[rows, tokens * config.num_experts_per_tok // dispatch.ranks]] * dispatch.ranks] * 2


def _all_held(value, costs, layout, rank):
    """What muon asks of all ranks: the rows of every matrix, by costs; of a digest, this rank's."""
    if isinstance(value, str):
        return [value]
    everyone = [costs.held(layout, rank) for rank in range(layout.dp_shard)] * layout.dp_replicate
    assert everyone[rank % len(everyone)] == value, "launch/costs.py no longer knows how parameters are sharded"
    return everyone

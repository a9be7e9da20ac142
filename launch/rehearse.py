"""A training step of one rank of many, without the many: the real model under the real parallel code, on a process group
that moves nothing and on tensors that have no memory. It counts what this rank holds and sends, for plan.py to compare
with its arithmetic: so plan and program cannot drift apart.

What only data would tell is taken as even: every expert gets as many tokens. Next: costs.py, ../ranks/parallel.py.
"""

import contextlib
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import muon
import train
from kernels import attention, cross_entropy, experts
from model import build
from muon import local_rows
from ranks import parallel
from ranks.dispatch import ExpertParallel
from routes import routes_of

OPERATIONS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce",
              "alltoall_base_": "all_to_all"}


class Sent(TorchDispatchMode):
    """Within it, what this rank's collectives send, by rings and directly: bytes[operation, ranks of the group], and
    how many there were: counts. On any process group."""

    def __init__(self):
        super().__init__()
        self.bytes, self.counts = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and (operation := OPERATIONS.get(function._schema.name.split("::")[1])):
            tensors, group = (args[0], args[1]) if operation == "all_reduce" else (args[:2], args[2])
            group = dist.ProcessGroup.unbox(group)
            key, n = (operation, group.size()), group.size()
            size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            sent = size * (n - 1) / n * (2 if operation == "all_reduce" else 1)
            if operation == "all_to_all" and args[4]:
                row = args[1].element_size() * args[1].shape[1:].numel()
                sent = row * (sum(args[4]) - args[4][group.rank()])
            if n > 1:
                self.bytes[key] = self.bytes.get(key, 0) + sent
                self.counts[key] = self.counts.get(key, 0) + 1
        return function(*args, **(kwargs or {}))


def rehearse(config, n, rank, costs, layout, update=True):
    """One step of one micro-batch as rank `rank` of n: {"parameters", "optimizer": bytes held, "sent": Sent.bytes,
    "counts"}. costs says what other ranks hold, and is checked for this one."""
    device = torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    try:
        with contextlib.ExitStack() as stack:
            for target, name, value in (
                    (ExpertParallel, "sizes", lambda self, out_P2: _even(self, out_P2, config, costs)),
                    (muon, "_from_all_ranks", lambda value: _all_held(value, costs, layout, rank)),
                    # Fewer operations than on a CPU, as on a GPU.
                    (attention, "QUERY_CHUNK", 2**40), (cross_entropy, "CHUNK_ELEMENTS", {"cpu": 2**60}),
                    (experts, "_operator_is_best", lambda *_: True)):
                stack.enter_context(mock.patch.object(target, name, value))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            return _step(config, device, parallel.split_batch(config)[0], update)
    finally:
        dist.destroy_process_group()


def _step(config, device, size, update):
    layout, dtype = parallel.make_layout(config, device), getattr(torch, config.dtype)
    model = build(config, torch.device("meta"), lambda model: parallel.distribute(model, layout, dtype))
    found = {"parameters": sum(map(_bytes, model.parameters()))}  # and muon remembers where their rows are
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.train().compute_dtype = dtype
        for layer in model.layers:
            layer.recompute = config.activation_checkpointing
        parameters, routes = list(model.parameters()), routes_of(config, model)
        tokens = torch.zeros(size, config.sequence_length, dtype=torch.int64)
        with Sent() as sent:
            parallel.last_micro_batch(model, True)
            ahead = torch.ones(()) if config.mtp_depth else None
            sums = train.forward_and_backward(model, config, tokens, tokens, None, 1.0, ahead)
            norm = parallel.squared_norm(parameters, layout)
            parallel.add_up(torch.cat((sums, torch.stack((model.routing.z, norm, norm)))))
            parallel.largest(model.max_logits)
            parallel.add_up(model.routing.expert_counts)
            parallel.add_up(model.routing.histograms)
            found["gradients"] = sum(_bytes(p.grad) for p in parameters)
            if update:
                optimizer = train.make_optimizer(config, model, routes)
                found["optimizer"] = sum(_bytes(t) for t in optimizer.named_state().values())
                optimizer.begin_step()
                train.update_all(model, optimizer, config)
    return found | {"sent": sent.bytes, "counts": sent.counts}


def _bytes(tensor):
    part = local_rows(tensor)[0]
    return part.numel() * part.element_size()


def _even(dispatch, out_P2, config, costs):
    """What ExpertParallel.sizes would return, with the sizes travelling as they do, if all experts were chosen alike."""
    dist.all_to_all_single(torch.empty_like(out_P2), out_P2, group=dispatch.group)
    tokens = parallel.split_batch(config)[0] * config.sequence_length
    rows = round(tokens * costs.sent_rows(dispatch.ranks) / (dispatch.ranks - 1))
    return [[[rows, tokens * config.num_experts_per_tok // dispatch.ranks]] * dispatch.ranks] * 2


def _all_held(value, costs, layout, rank):
    """What muon asks of all ranks: the rows of every matrix, by costs; of a digest, this rank's."""
    if isinstance(value, str):
        return [value]
    everyone = [costs.held(layout, rank) for rank in range(layout.dp_shard)] * layout.dp_replicate
    assert everyone[rank] == value, "launch/costs.py knows the shards of the parameters no longer"
    return everyone

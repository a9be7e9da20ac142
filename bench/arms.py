"""The ways to train that bench.step compares: nanok2 and its twins, compiled PyTorch, and transformers.

dense_twin and gpt_twin make, of a config with experts, dense models of equal FLOPs a token: the first differs in
nothing but the MLPs, the second is a plain transformer with AdamW (configs/gpt.py, if the config is configs/small.py).
"""

import contextlib
import dataclasses
import functools
import time

import torch
import torch.nn.functional as F

import bench
import hf
import mtp
import owners
from counting import count_parameters, flops_per_token
from errors import UserError
from kernels import attention, backend, experts, graphs, newton_schulz
from model import build
from muon import Muon
from ranks import parallel, shard
from routes import routes_of
from run import checkpoint, peak
from step import clip_and_balance, forward_and_backward

RATE = 1e-5  # learning rate of all arms: the same tokens come again and again, and routing should stay what it is

# ----------------------------------------------------------------------------- twins

def dense_twin(config):
    """The Config of the dense model with the same attention, optimizer, batch and FLOPs a token (up to rounding
    intermediate_size to a multiple of 64, of 8 in models narrower than 512)."""
    return equal_flops(config, "intermediate_size", _multiple(config), n_routed_experts=0,
                       lr_multipliers=_rates_without(config, "experts", "router"))


def gpt_twin(config):
    """The Config of a plain transformer of the same width, depth and FLOPs a token: heads of 64, or four of them in
    models narrower than 256, one matrix for embedding and head, AdamW."""
    width = min(64, max(2, config.hidden_size // 8 * 2))
    heads = config.hidden_size // width
    return equal_flops(config, "intermediate_size", _multiple(config), n_routed_experts=0, attention="mha",
                       num_attention_heads=heads, v_head_dim=width, tie_word_embeddings=True, optimizer="adamw",
                       lr_multipliers=_rates_without(config, "experts", "router", "head"))


def _rates_without(config, *names):
    """lr_multipliers without those of parameters that the twin does not have."""
    return {name: by for name, by in config.lr_multipliers.items() if name not in names}


def _multiple(config):
    return 64 if config.hidden_size >= 512 else 8


def equal_flops(config, size, multiple, **changes):
    """config with these changes and of its own FLOPs a token, up to rounding `size`, the setting that is fitted, to a
    multiple of `multiple`. Raises UserError where that leaves them more than 3 % apart."""
    def flops(value):
        changed = dataclasses.replace(config, **changes, **{size: value})
        return flops_per_token(changed, config.sequence_length)

    few, more, wanted = flops(multiple), flops(2 * multiple), flops_per_token(config, config.sequence_length)
    fitted = multiple * max(1, round(1 + (wanted - few) / (more - few)))  # linear in between and beyond
    if abs(flops(fitted) / wanted - 1) > 0.03:
        raise UserError(f"no {size} gives {', '.join(f'{name}={value}' for name, value in changes.items())} the "
                        f"{wanted / 1e6:.3f} MFLOPs a token of the config: {fitted} gives {flops(fitted) / 1e6:.3f}")
    return dataclasses.replace(config, **changes, **{size: fitted})


def described(config):
    """A config's size in words."""
    total, active = count_parameters(config)
    flops = flops_per_token(config, config.sequence_length)
    return (f"{flops / 1e6:,.1f} MFLOPs a token, {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active, "
            f"intermediate_size {config.intermediate_size}, {config.optimizer}")


# ----------------------------------------------------------------------------- arms

@contextlib.contextmanager
def replaced(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class Arm:
    """One way to train, and what a round of it took: micro_batch(first) is forward and backward of one micro-batch,
    the first of a step or one that adds to its gradients; update() clips and steps, after() is what MuonClip does
    besides. replayed: whether a micro-batch is a CUDA graph by now."""

    replayed = False

    def __init__(self, config, device):
        self.config, self.device = config, device
        self.seconds = {"first micro-batch": [], "another micro-batch": [], "optimizer": [], "QK-clip and bias": [],
                        "host": []}
        shape = (config.micro_batch_size, config.sequence_length + 1)
        self.tokens = torch.randint(0, config.vocab_size, shape, device=device)
        self.peak_bytes, self.own_bytes, self.before = 0, 0, _allocated()

    @contextlib.contextmanager
    def switched(self):
        """What has to be switched while this arm runs."""
        yield

    def after(self):
        """Nothing, for an optimizer that is just one."""

    def step(self):
        """A round: a micro-batch that makes the gradients, one that adds to them, and the update; each waited for.
        host: how long the second kept Python; where a GPU cannot be told more than it has to do, no less than that."""
        others = _allocated() - self.own_bytes if self.own_bytes else self.before
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self.switched():
            calls = (lambda: self.micro_batch(True), lambda: self.micro_batch(False), self.update, self.after)
            for part, call in zip(self.seconds, calls):
                bench.synchronize()
                started = time.perf_counter()
                call()
                returned = time.perf_counter()
                bench.synchronize()
                self.seconds[part].append(time.perf_counter() - started)
                if part == "another micro-batch":
                    self.seconds["host"].append(returned - started)
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)
        self.own_bytes = _allocated() - others


def _allocated():
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Nanok2(Arm):
    """Our model, loss and optimizer. triton: our kernels, or PyTorch's operations; attention_arms: attention.ARM while
    it runs; graph: the micro-batch as a CUDA graph; loops: a loop over experts, and Muon matrix by matrix."""

    def __init__(self, config, device, triton, compiled, attention_arms, graph=False, loops=False):
        super().__init__(config, device)
        self.triton, self.loops, self.attention_arms, self.graph = triton, loops, attention_arms, graph
        self.model = build(config, device)
        self.model.compute_dtype = getattr(torch, config.dtype)
        _fill(self.model, config.initializer_range)
        if triton and peak.keeps_copies(config, parallel.Layout(), device):  # ours, as train.py makes it
            self.model.make_copies()
        routes = routes_of(config, self.model)
        with replaced(owners, "BATCH_ELEMENTS", 1 if loops else owners.BATCH_ELEMENTS):  # 1: matrix by matrix
            self.optimizer = Muon(self.model.named_parameters(), RATE, routes=routes,
                                  ns_dtype=self.model.compute_dtype)
        if compiled:
            shard.compile_blocks(self.model)
        self.parameters = list(self.model.parameters())
        self.model.train()
        compute = functools.partial(forward_and_backward, self.model, config)
        replay = graph and graphs.wanted(config, parallel.Layout(), device)
        self.compute = graphs.MicroBatch(compute, self.model, replay)
        if replay:
            self.optimizer.orthogonalise = newton_schulz.newton_schulz
        # one graph in step.py, two here: both are timed
        updates = self.optimizer.update, functools.partial(clip_and_balance, self.model, config)
        state = checkpoint.named_tensors(self.model, self.optimizer).values()
        self.replays = [graphs.Update(update, self.parameters, state, replay, self.compute.pool) for update in updates]
        self.scale, self.small_batches = torch.ones((), device=device), {}
        self.mtp_weight = mtp.loss_weight(config, 1, device)

    @property
    def replayed(self):
        return bool(self.compute.graphs)

    @contextlib.contextmanager
    def switched(self):
        never = lambda *_: False
        grouped = never if self.loops else experts._grouped_is_best
        operator = never if self.loops else experts._operator_is_best
        replay = 0 if self.loops else newton_schulz.REPLAY_ELEMENTS
        with backend.running(self.triton), replaced(attention, "ARM", self.attention_arms), \
                replaced(experts, "_grouped_is_best", grouped), replaced(experts, "_operator_is_best", operator), \
                replaced(newton_schulz, "REPLAY_ELEMENTS", replay), \
                replaced(newton_schulz, "_graphs", self.small_batches):  # or one arm would use up the room of others
            yield

    def micro_batch(self, first):
        self.compute(first, self.tokens[:, :-1], self.tokens[:, 1:], None, self.scale, self.mtp_weight)

    def update(self):
        norm = parallel.squared_norm(self.parameters, parallel.Layout()).sqrt().item()
        parallel.scale_gradients(self.parameters, min(1.0, self.config.grad_clip / (norm + 1e-6)))
        self.optimizer.begin_step()
        self.replays[0]()

    def after(self):
        self.replays[1]()
        self.optimizer.zero_grad()
        self.model.reset_statistics(self.config.qk_clip_tau)  # as in steps that are not logged


def _fill(model, scale):
    """init_weights in the device's own random numbers, which take no seconds."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, scale)


class Transformers(Arm):
    """Hugging Face's DeepseekV3ForCausalLM as somebody would train it who wants it fast: parameters in the compute
    dtype, experts by F.grouped_mm, layers and loss compiled, fused AdamW, no balance loss."""

    def __init__(self, config, device, compiled):
        from transformers import AutoConfig, AutoModelForCausalLM
        super().__init__(dataclasses.replace(config, optimizer="adamw"), device)
        fields = hf.to_hf_config(config, None, config.dtype)
        theirs = AutoConfig.for_model(fields.pop("model_type"), **fields, attn_implementation="sdpa",
                                      experts_implementation="grouped_mm")
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(theirs, dtype=getattr(torch, config.dtype))
        if (found := self.model.config._experts_implementation) != "grouped_mm":
            raise RuntimeError(f"this transformers computes experts by {found!r}, which is not what it is fastest with")
        _fill(self.model, config.initializer_range)
        self.model.train()
        for layer in self.model.model.layers if compiled else ():
            layer.forward = torch.compile(layer.forward, dynamic=False)
        self.loss = torch.compile(_cross_entropy, dynamic=False) if compiled else _cross_entropy
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE, (0.9, 0.95), weight_decay=0.1, fused=True)

    def micro_batch(self, first):
        hidden = self.model.model(input_ids=self.tokens[:, :-1], use_cache=False).last_hidden_state
        loss = self.loss(hidden.flatten(0, 1), self.model.lm_head.weight, self.tokens[:, 1:].flatten())
        (loss / (self.config.global_batch_size * self.config.sequence_length)).backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _cross_entropy(hidden_ND, weight_VD, targets_N):
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N, reduction="sum")

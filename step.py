"""A step of training: forward and backward over a global batch, what the ranks agree on, the update.

`Training` is a model with its optimizer and its data, and nothing of the run around them. train.py has one and records,
validates and saves what becomes of it; bench/learner.py has several, which learn in turns. All ranks make the same
calls in the same order. Next: model.py, muon.py, ranks/parallel.py, kernels/graphs.py.
"""

import functools
import math
import time
from dataclasses import dataclass

import torch

import mtp
from data.loader import prefetch
from kernels import graphs
from kernels.cross_entropy import IGNORE
from kernels.newton_schulz import newton_schulz
from model import build
from muon import SCHEDULE, Muon, local_rows, qk_clip_, schedule_factor
from ranks import parallel, shard
from ranks.pipeline import Pipeline
from routes import routes_of
from run import checkpoint, memory, peak
from run.ema import Average


@dataclass
class Found:
    """What a forward and backward found, on every rank the same: the mean loss and the norm of its gradient; the losses
    of the routers, balance and z, and of multi-token prediction (None without); how many ranks got a signal.

    fill: what sums over a batch are multiplied by to be means over its targets, above 1 where packing left places empty
    (loss and norm are already)."""
    loss: float
    norm: float
    balance: float
    z: float
    mtp_loss: float | None
    signals: float
    fill: float

    @property
    def finite(self):
        return math.isfinite(self.norm) and math.isfinite(self.loss)


class Training:
    """What learns. A model, on its device and ranks, its optimizer and, after begin(), the batches of a TrainStream.

    `step` counts the steps that began, `sequences` and `tokens` what they were given, `stream_start` the sequences that
    were of other data, `skipped` how many of the last steps were not finite, one after the other. `state`: all tensors
    of model and optimizer by name. `average`: of the weights, or None. `places`: where the stream is; `waited`: seconds
    for data since someone set it to 0."""

    def __init__(self, config, layout, device, stream):
        self.config, self.layout, self.device, self.stream = config, layout, device, stream
        self.micro_batch_size, self.accumulation = parallel.split_batch(config)
        self.tokens_per_step = config.global_batch_size * config.sequence_length
        dtype = getattr(torch, config.dtype)
        self.model = model = build(config, device, lambda model: shard.distribute(model, layout, dtype))
        model.compute_dtype = dtype
        for layer in model.layers:
            layer.recompute = config.activation_checkpointing
        self.routes = routes_of(config, model)
        memory.require(config, model, self.routes, layout, device)
        if peak.keeps_copies(config, layout, device):
            model.make_copies()
        self.optimizer = make_optimizer(config, model, self.routes, layout)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters, self.state = list(model.parameters()), checkpoint.named_tensors(model, self.optimizer)
        self.loss_scale = 2.0**16 if config.dtype == "float16" else 1.0  # or its gradients would underflow
        self.step, self.sequences, self.stream_start, self.tokens = 0, 0, 0, 0
        self.skipped, self.good_steps, self.average, self.places, self.waited = 0, 0, None, None, 0.0

    def start(self, source=None, manifest=None):
        """Draw the weights, or go on from a step folder and its manifest."""
        config, manifest = self.config, manifest or {}
        if source is None:
            self.model.init_weights(config.seed, local_rows)
        elif checkpoint.has_optimizer(source):
            checkpoint.load(source, self.state)
            self.optimizer.steps = manifest["optimizer_steps"]
            if config.dtype == manifest.get("config", {}).get("dtype") == "float16":  # others save a scale of 1
                self.loss_scale, self.good_steps = manifest.get("loss_scale", (self.loss_scale, 0))
        else:
            checkpoint.load(source, checkpoint.named_tensors(self.model))
            print(f"{source} has no optimizer state: starting with a fresh optimizer")
        self.step, self.tokens = manifest.get("step", 0), manifest.get("tokens", 0)
        self.sequences = manifest.get("sequences", 0) + config.skip_sequences
        self.stream_start = manifest.get("stream_start", 0)
        self.average = Average(self.model, config.ema) if config.ema else None
        if self.average and source:
            self.average.load(source, manifest)

    def begin(self):
        """Get ready for the first step: blocks compiled, micro-batch and update captured where that is wanted, data
        read ahead."""
        config, model = self.config, self.model
        if wants_compile(config, self.device):
            shard.compile_blocks(model)
        model.train()
        replay = graphs.wanted(config, self.layout, self.device)
        if replay:
            self.optimizer.orthogonalise = newton_schulz  # no small graphs beside the one of all
        self.micro_batch = graphs.MicroBatch(functools.partial(forward_and_backward, model, config), model, replay,
                                             self.accumulation > 1)
        self.update_weights = graphs.Update(functools.partial(update_all, model, self.optimizer, config),
                                            self.parameters, self.state.values(), replay, self.micro_batch.pool)
        if model.stages:
            self.pipeline = Pipeline(config, model, self.layout, self.micro_batch_size, self.accumulation, self.device)
        self.batches = prefetch(self.stream, self.device, range(self.step + 1, config.max_steps + 1),
                                self.sequences - self.stream_start, config.global_batch_size,
                                self.micro_batch_size, *parallel.data_share(config.pp),
                                max(3, self.accumulation * len(model.stages)), timeout=0.8 * config.step_timeout)

    def forward_backward(self, exact=False):
        """The gradients of the next global batch, and this rank's sums, as of forward_and_backward: both over
        micro-batches, divided by the whole batch, so that how it is split changes nothing. exact: the largest attention
        logits are wanted exactly, also where QK-clip does not act on them."""
        config, model, device = self.config, self.model, self.device
        self.step += 1
        factor = schedule_factor(self.step, *(getattr(config, name) for name in SCHEDULE))
        for group, peak_rate in zip(self.optimizer.param_groups, self.peak_rates):
            group["lr"] = peak_rate * factor
        model.reset_statistics(-math.inf if exact else config.qk_clip_tau)
        sums, scale = torch.zeros(3 + 2 * config.mtp_depth, device=device), torch.tensor(self.loss_scale, device=device)
        mtp_weight = mtp.loss_weight(config, self.step, device)
        if model.stages:  # which work on several micro-batches at a time
            inputs, targets = map(torch.cat, zip(*(self._next_batch() for _ in range(self.accumulation))))
            sums = sums + self.pipeline(inputs, targets, self.stream.starts(inputs), scale)
        for micro in range(0 if model.stages else self.accumulation):
            inputs, targets = self._next_batch()
            shard.last_micro_batch(model, micro == self.accumulation - 1)
            sums = sums + self.micro_batch(micro == 0, inputs, targets, self.stream.starts(inputs), scale, mtp_weight)
        self.sequences, self.tokens = self.sequences + config.global_batch_size, self.tokens + self.tokens_per_step
        return sums

    def _next_batch(self):
        wait_started = time.perf_counter()
        inputs, targets, self.places = next(self.batches)
        self.waited += time.perf_counter() - wait_started
        return inputs, targets

    def agree(self, sums, signal=False):
        """Add up over ranks what forward_backward left, the statistics of the model too: one small reduction a kind,
        and the only wait for the device in a step. signal: whether this rank got one."""
        model = self.model
        squared_norm = parallel.squared_norm(self.parameters, self.layout)
        own = torch.stack((model.routing.z, squared_norm, sums.new_tensor(signal)))
        agreed = parallel.add_up(torch.cat((sums, own)))
        parallel.largest(model.max_logits)
        parallel.add_up(model.routing.expert_counts)
        parallel.add_up(model.routing.histograms)
        loss, balance, empty, *ahead, z, squared_norm, signals = agreed.tolist()
        fill = self.tokens_per_step / max(self.tokens_per_step - empty, 1)
        return Found(loss * fill, math.sqrt(squared_norm) / self.loss_scale * fill, balance,
                     z * fill / self.tokens_per_step, ahead[0] / max(ahead[1], 1) if ahead else None, signals, fill)

    def update(self, found):
        """Clip the gradients and move the weights, or leave everything untouched if a number is not finite: momentum
        would carry it on for ever. Returns how many heads QK-clip scaled down, a tensor or 0."""
        config, clipped = self.config, 0
        if found.finite:
            limit = min(1.0, config.grad_clip / (found.norm + 1e-6)) if config.grad_clip else 1.0
            parallel.scale_gradients(self.parameters, limit / self.loss_scale * found.fill)
            self.optimizer.begin_step()
            clipped = self.update_weights()
            if self.average:
                self.average.update(self.optimizer.steps)
            self.skipped, self.good_steps = 0, self.good_steps + 1
            if config.dtype == "float16" and self.good_steps % 2000 == 0:
                self.loss_scale *= 2
        else:
            self.skipped, self.good_steps = self.skipped + 1, 0
            self.loss_scale = max(self.loss_scale / 2, 1.0)
        self.optimizer.zero_grad()
        return clipped

    def saved(self):
        """({name: tensor}, what its manifest says) of a checkpoint that start() goes on from."""
        tensors = checkpoint.named_tensors(self.model, self.optimizer)
        about = {"sequences": self.sequences, "stream_start": self.stream_start, "tokens": self.tokens,
                 "optimizer_steps": self.optimizer.steps, "loss_scale": [self.loss_scale, self.good_steps],
                 "places": self.places}
        if self.average:
            tensors, about = tensors | self.average.tensors, about | {"ema_updates": self.average.updates}
        return tensors, about


# ----------------------------------------------------------------------------- what it is made of

def make_optimizer(config, model, routes, layout):
    """The Muon of a config's rates, momentum and Newton-Schulz, for the parameters on the ranks of a stage."""
    return Muon(model.named_parameters(), config.muon_lr, config.adamw_lr, config.momentum, config.nesterov,
                config.weight_decay, config.ns_steps, getattr(torch, config.newton_schulz_dtype()),
                config.ns_coefficients, routes=routes, group=layout.stage, across=layout.across)


def wants_compile(config, device):
    """Whether the blocks of a run are compiled."""
    return config.compile or (config.compile is None and device.type == "cuda" and not config.splits_backward())


def forward_and_backward(model, config, inputs, targets, first_BT, loss_scale, mtp_weight=None):
    """One micro-batch: gradients of its share of the loss, times loss_scale. Returns (3,): its shares of the
    cross-entropy and of the balance loss of the step, and how many of its places are empty; with mtp_weight, a tensor
    by which its loss counts, (5,): the MTPBlock's cross-entropy too, as a sum, and over how many targets."""
    n_tokens = config.global_batch_size * config.sequence_length
    mtp_scale = None if mtp_weight is None else config.mtp_loss_weight / n_tokens
    loss_sum, balance_sum, *ahead = model(inputs, targets, first_BT=first_BT, scale=1 / n_tokens, mtp_scale=mtp_scale)
    loss = loss_sum / n_tokens
    balance = balance_sum / config.global_batch_size
    whole = loss + config.aux_loss_alpha * balance
    if ahead:
        whole = whole + mtp_weight * (ahead[0] / n_tokens)
    (whole * loss_scale).backward()
    return torch.stack((loss, balance, (targets == IGNORE).sum(), *ahead)).detach()


def update_all(model, optimizer, config):
    """What the gradients of a step change, but for the counts of optimizer.begin_step(); asks the host for nothing.
    Returns what clip_and_balance does."""
    optimizer.update()
    return clip_and_balance(model, config)


def clip_and_balance(model, config):
    """What follows the optimizer: QK-clip, the routers' biases, the rounded copies of what has moved. Returns how many
    heads QK-clip scaled down, a tensor or 0."""
    clipped = 0
    if config.optimizer == "muonclip":
        clipped = qk_clip_(model.layers, model.max_logits, config.qk_clip_tau, model.here)
    model.routing.balance_(config.bias_update_rate)
    model.refresh_copies(always=True)  # what a replay writes is not counted
    return clipped

"""Whole training steps of a config on random tokens, in arms that take turns: nanok2 as it runs here, compiled PyTorch
(F.grouped_mm, the fastest library attention) and eager PyTorch with a loop over experts and Muon matrix by matrix.
Tokens/s, the step's parts, and the share of time by kernel.

    python -m bench.step configs/small.py [--rounds=6] [--key=value ...]
"""

import contextlib
import re
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import bench
import config as settings
import errors
import metrics
import owners
import parallel
from kernels import attention, backend, experts, newton_schulz
from model import build, flops_per_token, pick_device
from muon import Muon, qk_clip_, route_parameters

# part of a kernel's or an operation's name -> kind; the first that fits counts, the rest is "elementwise and other"
KINDS = {"experts": ("up_kernel", "down_kernel", "down_backward_kernel", "weight_gradient_kernel", "combine_kernel",
                     "grouped_mm", "GroupedGemm", "GroupProblemShape"),
         "routing": ("route", "histogram_kernel", "scan_kernel", "place_kernel", "tile_map", "sort", "Sort"),
         "attention": ("attention", "forward_kernel", "dq_kernel", "dkdv_kernel", "maximum_kernel", "flash", "fmha",
                       "cudnn", "sdpa"),
         "loss": ("cross_entropy", "log_softmax"),
         "Newton-Schulz": ("symmetric",),
         "matmul": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "gemm", "nvjet", "cutlass"),
         "copies and gathers": ("copy", "cat", "index", "gather", "scatter", "Memcpy", "memcpy")}


def kind_of(operation):
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)),
                "elementwise and other")


class Arm:
    """One way to train: its own model and optimizer, and what is switched while they run."""

    def __init__(self, config, device, triton, compiled, attention_arms, loops=False):
        self.config, self.triton, self.loops, self.attention_arms = config, triton, loops, attention_arms
        self.model = build(config, device).init_weights(0)
        self.model.compute_dtype = getattr(torch, config.dtype)
        routes = route_parameters(self.model.named_parameters(), config.optimizer)
        with replaced(owners, "BATCH_ELEMENTS", 1 if loops else owners.BATCH_ELEMENTS):  # 1: matrix by matrix
            self.optimizer = Muon(self.model.named_parameters(), config.muon_lr, routes=routes,
                                  ns_dtype=self.model.compute_dtype)
        if compiled:
            parallel.compile_blocks(self.model)
        self.parameters = list(self.model.parameters())
        self.model.train()
        shape = (config.micro_batch_size, config.sequence_length + 1)
        self.tokens = torch.randint(0, config.vocab_size, shape, device=device)
        self.parts = {"forward and backward": [], "optimizer": [], "QK-clip and router bias": []}

    @contextlib.contextmanager
    def switched(self):
        grouped = (lambda *_: False) if self.loops else experts._grouped_is_best
        replay = 0 if self.loops else newton_schulz.REPLAY_ELEMENTS
        with backend.running(self.triton), replaced(attention, "ARM", self.attention_arms), \
                replaced(experts, "_grouped_is_best", grouped), replaced(newton_schulz, "REPLAY_ELEMENTS", replay):
            yield

    def step(self):
        with self.switched():
            for part, function in zip(self.parts, (self.gradients, self.update, self.after)):
                bench.synchronize()
                started = time.perf_counter()
                function()
                bench.synchronize()
                self.parts[part].append(time.perf_counter() - started)

    def gradients(self):
        self.model.reset_statistics()
        for _ in range(self.config.global_batch_size // self.config.micro_batch_size):
            self.micro_batch()

    def micro_batch(self):
        config = self.config
        n_tokens = config.global_batch_size * config.sequence_length
        loss, balance = self.model(self.tokens[:, :-1], self.tokens[:, 1:], scale=1 / n_tokens)
        (loss / n_tokens + config.aux_loss_alpha * balance / config.global_batch_size).backward()

    def update(self):
        norm = parallel.squared_norm(self.parameters, parallel.Layout()).sqrt().item()
        parallel.scale_gradients(self.parameters, min(1.0, self.config.grad_clip / (norm + 1e-6)))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def after(self):
        qk_clip_(self.model.layers, self.model.max_logits, self.config.qk_clip_tau)
        self.model.update_router_biases(self.config.bias_update_rate)

    def medians(self, warmup):
        return {part: sorted(seconds[warmup:])[len(seconds[warmup:]) // 2] for part, seconds in self.parts.items()}

    def profile(self, device):
        """Share of the time of one micro-batch by kind, and its twelve largest kernels."""
        with self.switched(), profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]
                                      * (device.type == "cuda")) as recorded:
            self.micro_batch()
            bench.synchronize()
        self.optimizer.zero_grad()
        spent = {}
        for event in recorded.key_averages():
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            micros = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            if micros and on_gpu == (device.type == "cuda"):
                spent[event.key] = micros
        whole, shares = sum(spent.values()), {}
        for name, micros in spent.items():
            shares[kind_of(name)] = shares.get(kind_of(name), 0) + micros / whole
        largest = sorted(spent, key=spent.get, reverse=True)[:12]
        return (dict(sorted(shares.items(), key=lambda item: -item[1])),
                {name[:80]: spent[name] / whole for name in largest})


@contextlib.contextmanager
def replaced(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def library_attention(config, device):
    """The fastest of what is not ours, as attention.ARM wants it."""
    with backend.running(False), replaced(attention, "ARM", {}):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim if config.attention == "mla" else config.v_head_dim
        shape = (config.micro_batch_size, config.num_attention_heads, config.sequence_length, width)
        print("libraries:", attention.choose_arm(shape, config.v_head_dim, getattr(torch, config.dtype), device))
        return attention.ARM


def main(argv):
    given = [word for word in argv if word.startswith("--rounds=")]
    if not all(re.fullmatch(r"--rounds=[1-9]\d*", word) for word in given):
        raise errors.UserError(f"{given[-1]} must be a number, at least 1")
    rounds = int(given[-1][9:]) if given else 6
    config, path = settings.load([word for word in argv if word not in given])
    device, warmup, name = pick_device(config.device), 2, Path(path).stem
    kernels = parallel.choose_kernels(config, device)
    on, compiled = kernels.startswith("Triton"), device.type == "cuda" and config.compile is not False
    arms = {"nanok2": Arm(config, device, on, compiled, dict(attention.ARM))}
    if compiled:
        arms["compiled PyTorch"] = Arm(config, device, False, True, library_attention(config, device))
    arms["eager PyTorch, loops"] = Arm(config, device, False, False, {}, loops=True)
    for turn in range(warmup + rounds):
        for label, arm in arms.items():
            if label != "eager PyTorch, loops" or turn < warmup + 2:  # which takes long, and little noise matters
                arm.step()
    flops = flops_per_token(config, config.sequence_length)
    peak, n_tokens = metrics.peak_flops(device), config.global_batch_size * config.sequence_length
    result, ratios, totals = {}, {}, {}
    print(f"{path}: {n_tokens:,} tokens a step, {kernels} kernels, {config.dtype}, {device}")
    for label, arm in arms.items():
        medians = arm.medians(warmup)
        totals[label] = total = sum(medians.values())
        speed = n_tokens / total
        mfu = flops * speed / peak if peak else None
        result[label] = {"tokens_per_second": speed, "gflops": flops * speed / 1e9, "seconds": medians, "mfu": mfu}
        print(f"{label}: {speed:,.0f} tokens/s, {flops * speed / 1e9:,.0f} GFLOP/s{f', MFU {mfu:.1%}' if mfu else ''}")
        print("   " + ", ".join(f"{part} {1000 * s:.1f} ms ({s / total:.1%})" for part, s in medians.items()))
    ours = result["nanok2"]
    ratios[f"{name}: optimizer's share of the step"] = ours["seconds"]["optimizer"] / totals["nanok2"]
    ratios[f"{name}: QK-clip's and the bias's share"] = ours["seconds"]["QK-clip and router bias"] / totals["nanok2"]
    if peak:
        ratios[f"{name}: MFU"] = ours["mfu"]
    for label in list(arms)[1:]:
        ratios[f"{name}: {label} / nanok2, time of a step"] = totals[label] / totals["nanok2"]
    print(*(f"{ratio:8.3f}  {what}" for what, ratio in ratios.items()), sep="\n")
    print(f"memory, all arms together: {metrics.memory_gib(device):.1f} GiB")
    saved = {"command": argv, "kernels": kernels, "ratios": ratios, "arms": result}
    bench.save(f"step-{name}-{config.dtype}-{device.type}", saved)  # now, in case the profiler is not done in time
    for label, arm in arms.items():
        if label != "eager PyTorch, loops":
            result[label]["shares"], result[label]["kernels"] = arm.profile(device)
            print(f"{label}: " + ", ".join(f"{kind} {share:.1%}" for kind, share in result[label]["shares"].items()))
            for kernel, share in result[label]["kernels"].items():
                print(f"     {share:6.1%}  {kernel}")
    bench.save(f"step-{name}-{config.dtype}-{device.type}", saved)


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

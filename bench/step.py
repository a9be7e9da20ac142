"""One training step of a config on random tokens: tokens/s, its parts, and the share of time by kind of operation.

    python -m bench.step configs/debug.py [--key=value ...]
"""

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import bench
import config as settings
import errors
import metrics
import parallel
from model import build, flops_per_token, pick_device
from muon import Muon, qk_clip_, route_parameters

# operation name -> kind; the rest is "elementwise and other"
KINDS = {"matmul": ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_dot_product", "_flash_attention",
                    "_efficient_attention", "gemm", "nvjet", "cutlass"),
         "copies and gathers": ("copy_", "cat", "index", "index_select", "gather", "scatter", "clone"),
         "softmax": ("softmax", "log_softmax")}


def kind_of(operation):
    name = operation.lower().removeprefix("aten::")
    for kind, parts in KINDS.items():
        if any(name == part or name.lstrip("_").startswith(part.lstrip("_")) for part in parts):
            return kind
    return "elementwise and other"


def main(argv=None):
    config, path = settings.load(argv)
    device = pick_device(config.device)
    model = build(config, device).init_weights(0)
    model.compute_dtype = getattr(torch, config.dtype)
    routes = route_parameters(model.named_parameters(), config.optimizer)
    optimizer = Muon(model.named_parameters(), config.muon_lr, routes=routes, ns_dtype=model.compute_dtype)
    if device.type == "cuda" and config.compile is not False:
        parallel.compile_blocks(model)
    parameters = list(model.parameters())
    model.train()
    shape = (config.micro_batch_size, config.sequence_length + 1)
    tokens = torch.randint(0, config.vocab_size, shape, device=device)
    accumulation = config.global_batch_size // config.micro_batch_size
    n_tokens = config.global_batch_size * config.sequence_length
    parts = {"forward and backward": [], "optimizer": [], "QK-clip and router bias": []}

    def timed(part, function):
        bench.synchronize()
        started = time.perf_counter()
        function()
        bench.synchronize()
        parts[part].append(time.perf_counter() - started)

    def gradients():
        model.reset_statistics()
        for _ in range(accumulation):
            loss, balance = model(tokens[:, :-1], tokens[:, 1:])
            (loss / n_tokens + config.aux_loss_alpha * balance / config.global_batch_size).backward()

    def update():
        norm = parallel.squared_norm(parameters, parallel.Layout()).sqrt().item()
        parallel.scale_gradients(parameters, min(1.0, config.grad_clip / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()

    def after():
        qk_clip_(model.layers, model.max_logits, config.qk_clip_tau)
        model.update_router_biases(config.bias_update_rate)

    def step():
        timed("forward and backward", gradients)
        timed("optimizer", update)
        timed("QK-clip and router bias", after)

    for _ in range(12):
        step()
    medians = {part: sorted(seconds[3:])[len(seconds[3:]) // 2] for part, seconds in parts.items()}
    total = sum(medians.values())
    speed, flops = n_tokens / total, flops_per_token(config, config.sequence_length)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        for _ in range(3):
            step()
    shares = {}
    for event in recorded.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        shares[kind_of(event.key)] = shares.get(kind_of(event.key), 0) + spent
    whole = sum(shares.values())
    shares = {kind: spent / whole for kind, spent in sorted(shares.items(), key=lambda item: -item[1])}
    peak = metrics.peak_flops(device)
    mfu = flops * speed / peak if peak else None
    shown = f", MFU {mfu:.1%}" if mfu else ""
    print(f"{path}: {speed:,.0f} tokens/s, {flops * speed / 1e9:,.0f} GFLOP/s{shown}, "
          f"{metrics.memory_gib(device):.1f} GiB")
    for part, seconds in medians.items():
        print(f"  {part:26} {1000 * seconds:8.1f} ms {seconds / total:6.1%}")
    for kind, share in shares.items():
        print(f"  {kind:26} {share:18.1%} of the profiled time")
    bench.save(f"step-{Path(path).stem}-{config.dtype}-{device.type}", {
        "command": argv, "tokens_per_second": speed, "gflops": flops * speed / 1e9, "seconds": medians,
        "shares": shares, "mfu": mfu, "memory_gib": metrics.memory_gib(device)})


if __name__ == "__main__":
    errors.run(lambda argv: main(argv or sys.exit("python -m bench.step CONFIG [--key=value ...]")))

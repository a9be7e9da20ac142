"""One optimizer step of a config on random tokens, in arms that take turns with nanok2: its dense twin and a plain
transformer of equal FLOPs, itself without CUDA graphs, compiled PyTorch, transformers where it is installed.
Medians of the parts, tokens/s at 16 micro-batches a step from them, memory, and what a micro-batch's time is spent on.

    python -m bench.step configs/small.py [--arms=dense,transformers] [--rounds=5] [--key=value ...]

--arms: some of dense transformers nograph gpt pytorch loops (eager PyTorch with a loop over experts, Muon matrix by
matrix; only on request). --rounds=0: only compile them.
"""

import dataclasses
import functools
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import bench
import errors
import settings
from bench.arms import Nanok2, Transformers, dense_twin, described, gpt_twin, replaced
from counting import flops_per_token
from errors import said
from kernels import attention, backend
from model import pick_device
from ranks import parallel
from step import wants_compile

WARMUP, MICRO_BATCHES = 3, 16  # rounds that do not count; micro-batches of the step whose tokens/s are given
WORDS = {"dense": "dense twin", "transformers": "transformers", "nograph": "nanok2 without graphs", "gpt": "gpt, AdamW",
         "pytorch": "compiled PyTorch", "loops": "eager loops"}

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


def shares(arm):
    """Share of the time of one micro-batch by kind, and its twelve largest kernels."""
    on_gpu = arm.device.type == "cuda"
    with arm.switched(), profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as recorded:
        arm.micro_batch(True)
        bench.synchronize()
    arm.optimizer.zero_grad()
    spent = {}
    for event in recorded.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros and on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA):
            spent[event.key] = micros
    whole, by_kind = sum(spent.values()), {}
    for name, micros in spent.items():
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0) + micros / whole
    largest = sorted(spent, key=spent.get, reverse=True)[:12]
    return (dict(sorted(by_kind.items(), key=lambda item: -item[1])),
            {name[:80]: spent[name] / whole for name in largest})


# ----------------------------------------------------------------------------- what is measured beside the arms

def matmul_peak(device, dtype):
    """FLOP/s of a large matmul, the most that anything here could reach."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / (backend.milliseconds(lambda: a @ b, device) / 1000)


@torch.library.custom_op("nanok2_bench::nothing", mutates_args=())
def _nothing(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_nothing.register_autograd(lambda context, grad: grad)


def dispatch_micros(device, calls=1000):
    """What a torch.library operator with a gradient costs over its function: microseconds of a call."""
    x = torch.zeros(1, device=device, requires_grad=True)

    def spent(function):
        started = time.perf_counter()
        for _ in range(calls):
            function(x)
        return time.perf_counter() - started
    spent(_nothing), spent(torch.empty_like)
    return 1e6 * (spent(_nothing) - spent(torch.empty_like)) / calls


# ----------------------------------------------------------------------------- arms

def library_attention(config, device):
    """The fastest of what is not ours, as attention.ARM wants it."""
    with backend.running(False), replaced(attention, "ARM", {}):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim if config.attention == "mla" else config.v_head_dim
        shape = (config.micro_batch_size, config.num_attention_heads, config.sequence_length, width)
        print("libraries:", attention.choose_arm(shape, config.v_head_dim, getattr(torch, config.dtype), device))
        return attention.ARM


def arm_makers(config, device, compiled, names, layers):
    """({name: function that makes the arm}, which kernels run): "nanok2" and those named, with so many layers. What
    they choose among is measured here, while the GPU does nothing else."""
    twins = {"dense": dense_twin, "gpt": gpt_twin}  # everything else is as nanok2
    of = {name: dataclasses.replace(twins[name](config) if name in twins else config, num_hidden_layers=layers)
          for name in ["nanok2", *names]}
    chosen, makers = {}, {}
    for name in [name for name in ("dense", "gpt", "nanok2") if name in of]:
        kernels = parallel.choose_kernels(of[name], device)
        chosen |= attention.ARM
    for name, config in of.items():
        if name == "transformers":
            makers[name] = functools.partial(Transformers, config, device, compiled)
        elif name == "pytorch":
            makers[name] = functools.partial(Nanok2, config, device, False, compiled, library_attention(config, device))
        elif name == "loops":
            makers[name] = functools.partial(Nanok2, config, device, False, False, {}, loops=True)
        else:
            makers[name] = functools.partial(Nanok2, config, device, kernels.startswith("Triton"), compiled, chosen,
                                             graph=name != "nograph")
    return makers, kernels


def compile_beside(names, argv):
    """Start a process for every arm that compiles its blocks into the caches on disk. Returns a function that waits for
    them; what one of them failed to do is done again when the arm's turn comes, and there an error counts."""
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ}  # each; it is not part of what caches ask for
    processes = {name: subprocess.Popen(
        [sys.executable, "-m", "bench.step", *argv, f"--arms={name}", "--rounds=0"], cwd=Path(__file__).parent.parent,
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") for name in names}

    def wait():
        for name, process in processes.items():
            stderr = process.communicate()[1]
            if process.returncode:
                print(f"{name}: was not compiled beforehand: {(stderr.strip().splitlines() or ['?'])[-1]:.200}")
    return wait


# ----------------------------------------------------------------------------- the table

def summed_up(arm, rounds):
    """What the last rounds of an arm say."""
    seconds = {part: statistics.median(spent[-rounds:]) for part, spent in arm.seconds.items()}
    speed, gradients = speeds(arm.config, seconds)
    return {"tokens_per_second": speed, "forward_and_backward_tokens_per_second": gradients, "seconds": seconds,
            "peak_gib": arm.peak_bytes / 2**30, "replayed": arm.replayed}


def speeds(config, seconds, n=MICRO_BATCHES):
    """tokens/s of a step of n micro-batches, and of its forward and backward alone, from the seconds of the parts."""
    tokens = n * config.micro_batch_size * config.sequence_length
    gradients = seconds["first micro-batch"] + (n - 1) * seconds["another micro-batch"]
    return tokens / (gradients + seconds["optimizer"] + seconds["QK-clip and bias"]), tokens / gradients


def tell(label, row):
    parts = ", ".join(f"{part} {1000 * spent:.1f}" for part, spent in row["seconds"].items())
    print(f"{label}: {row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.1f} GiB; ms: {parts}"
          + "; replayed" * row["replayed"], flush=True)


def over(stem, name, ours, theirs):
    """{row of the table: how much faster nanok2 is than another arm in the same rounds}"""
    label = f"{stem}: {'MoE' if name == 'dense' else 'nanok2'} over {WORDS[name]}"
    keys = {"tokens/s": "tokens_per_second", "forward and backward": "forward_and_backward_tokens_per_second"}
    return {f"{label}, {what}": ours[key] / theirs[key] for what, key in keys.items()}


def shares_of_a_step(stem, config, row, peak):
    """{row of the table: how nanok2's step divides, and how near it is to the device's matmuls}"""
    seconds = row["seconds"]
    step = MICRO_BATCHES * config.micro_batch_size * config.sequence_length / row["tokens_per_second"]
    flops = flops_per_token(config, config.sequence_length) * row["forward_and_backward_tokens_per_second"]
    return {f"{stem}: share of the measured matmul peak, forward and backward": flops / peak,
            f"{stem}: optimizer's share of the step": seconds["optimizer"] / step,
            f"{stem}: QK-clip's and the bias's share of the step": seconds["QK-clip and bias"] / step}


def given(argv):
    """(names of arms or None, rounds, the other words)"""
    words, rest = {"--arms": None, "--rounds": "5"}, []
    for word in argv:
        name, equals, value = word.partition("=")
        if name in words and equals:
            words[name] = value
        else:
            rest.append(word)
    if not words["--rounds"].isdecimal():
        raise errors.UserError(f"--rounds={words['--rounds']} must be a number, 0 or more")
    names = words["--arms"] and [name for name in words["--arms"].split(",") if name != "nanok2"]
    if unknown := set(names or ()) - set(WORDS):
        raise errors.UserError(f"no arm is called {min(unknown)!r}; there are nanok2, {', '.join(WORDS)}")
    return names, int(words["--rounds"]), rest


def default_arms():
    installed = importlib.util.find_spec("transformers") is not None
    if not installed:
        print("transformers is not installed: left out")
    return [name for name in WORDS if name != "loops" and (name != "transformers" or installed)]


def main(argv):
    names, rounds, rest = given(argv)
    names = default_arms() if names is None else names
    config, path = settings.load(rest)
    device, stem = pick_device(config.device), Path(path).stem
    compiled = wants_compile(config, device)
    torch._dynamo.config.recompile_limit = 64  # all arms compile the same blocks
    few = min(config.first_k_dense_replace + 1, config.num_hidden_layers)  # a block of each kind is all to compile
    makers, kernels = arm_makers(config, device, compiled, names, config.num_hidden_layers if rounds else few)
    if rounds == 0:
        for name in names or ["nanok2"]:
            makers[name]().step()
        return 0
    wait = compile_beside([name for name in names if name not in ("nograph", "loops")] if compiled else [], rest)
    ours = makers["nanok2"]()
    ours.step()
    wait()
    peak, tokens = matmul_peak(device, getattr(torch, config.dtype)), config.micro_batch_size * config.sequence_length
    print(f"{path}: {tokens:,} tokens a micro-batch, {MICRO_BATCHES} of them a step, {kernels} kernels, "
          f"{config.dtype}, {device}, matmul {peak / 1e12:.2f} TFLOP/s\nnanok2: {described(config)}")
    result = {"command": argv, "kernels": kernels, "tokens": tokens, "matmul_flops": peak, "ratios": {}, "arms": {},
              "failed": {}}
    save = lambda: bench.save(f"step-{stem}-{config.dtype}-{device.type}", result)
    for name in names:
        against(name, makers[name], ours, rounds, stem, result)
        save()  # now, in case there is no time for all
        gc.collect()
        torch.cuda.empty_cache()
    for _ in range(0 if names else WARMUP + rounds):
        ours.step()
    result["arms"]["nanok2"] = row = summed_up(ours, len(ours.seconds["host"]) - WARMUP - 1)
    tell("nanok2", row)
    result["ratios"] |= shares_of_a_step(stem, config, row, peak)
    result["ratios"] |= {f"{stem}: ms of Python a micro-batch, {name}": 1000 * result["arms"][name]["seconds"]["host"]
                         for name in ("nanok2", "nograph") if name in result["arms"]}
    result["ratios"][f"{stem}: microseconds to dispatch an operator of ours"] = dispatch_micros(device)
    if device.type == "cuda":
        result["ratios"] |= {f"{stem}: GiB at most, {name}": row["peak_gib"] for name, row in result["arms"].items()}
    result["shares"], result["largest"] = shares(ours)
    print("nanok2: " + ", ".join(f"{kind} {share:.1%}" for kind, share in result["shares"].items()))
    print(*(f"     {share:6.1%}  {kernel}" for kernel, share in result["largest"].items()), sep="\n")
    print(*(f"{ratio:8.3f}  {what}" for what, ratio in result["ratios"].items()), sep="\n")
    save()
    return bool(result["failed"])


def against(name, make, ours, rounds, stem, result):
    """Make an arm, let it take turns with nanok2 and add what that says, or why it says nothing, to the result."""
    try:
        arm = make()
        print(f"{WORDS[name]}: {described(arm.config)}")
        for _ in range(WARMUP + rounds):
            ours.step()
            arm.step()
    except Exception as error:  # a library's, or of too little memory: told, and the others have their turn
        result["failed"][name] = f"{type(error).__name__}: {said(error)}"
        print(f"{name}: not measured: {result['failed'][name]}")
        return
    rows = result["arms"] | {"nanok2": summed_up(ours, rounds), name: summed_up(arm, rounds)}
    for label in ("nanok2", name):
        tell(f"    {label}", rows[label])
    result["arms"] = rows
    result["ratios"] |= over(stem, name, rows["nanok2"], rows[name])


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

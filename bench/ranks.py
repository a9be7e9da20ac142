"""What the ranks say to each other in a training step: share of the time, number of collectives, bytes; with and
without packing and overlap, the stall of a checkpoint, and the cost of comparing the ranks.

    torchrun --standalone --nproc_per_node=2 -m bench.ranks configs/debug.py [--ep=2] [--key=value ...]
    python -m bench.ranks configs/debug.py      # the plain run to compare torchrun --nproc_per_node=1 with

"Waiting" is the time that this rank's main thread spends inside collectives and waits, a slower peer included. Arms:
gathered: Muon by its all-gather twin, matrix by matrix; packed: owners and buckets, every exchange waited for at once;
overlapped: as in training.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

import bench
import settings
from errors import UserError
from model import build, pick_device
from muon import Muon, local_rows, qk_clip_
from ranks import parallel, shard
from routes import routes_of
from run import checkpoint, guard

# torch 2.13 renamed two of them: both names, counted as one.
COLLECTIVES = {"all_reduce": "all_reduce", "all_to_all_single": "all_to_all", "broadcast": "broadcast",
               "all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather",
               "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}


class Meter:
    """Counts and times collectives by standing in for them in torch.distributed."""

    def __init__(self):
        self.waiting, self.counts, self.bytes, self.at_once, self.inside = 0.0, {}, {}, False, False
        for name, kind in COLLECTIVES.items():
            if hasattr(dist, name):
                setattr(dist, name, self._timed(kind, getattr(dist, name)))
        functional.all_gather_tensor = self._timed("all_gather", functional.all_gather_tensor)
        functional.wait_tensor = self._timed(None, functional.wait_tensor)

    def _timed(self, name, function):
        def call(*args, **options):
            if self.inside:
                return function(*args, **options)
            self.inside, started = True, time.perf_counter()
            result = function(*args, **options)
            self.inside = False
            if name is not None:
                self.counts[name] = self.counts.get(name, 0) + 1
                given = [t for t in [*args[:2], *options.values()] if isinstance(t, torch.Tensor)][-1]
                self.bytes[name] = self.bytes.get(name, 0) + given.numel() * given.element_size()
            if self.at_once and options.get("async_op"):
                result.wait()
            self.waiting += time.perf_counter() - started
            return Waited(self, result) if options.get("async_op") else result
        return call

    def clear(self):
        self.waiting, self.counts, self.bytes = 0.0, {}, {}


class Waited:
    def __init__(self, meter, work):
        self.meter, self.work = meter, work

    def wait(self):
        started = time.perf_counter()
        self.work.wait()
        self.meter.waiting += time.perf_counter() - started


def main(argv):
    parallel.start()
    config, path = settings.load(argv)
    if config.mtp_depth or config.pp > 1:
        raise UserError("bench.ranks has no multi-token prediction and no stages: add --mtp_depth=0 --pp=1")
    device = pick_device(config.device)
    layout = parallel.make_layout(config, device)
    micro, accumulation = parallel.split_batch(config)
    dtype = getattr(torch, config.dtype)
    model = build(config, device, lambda model: shard.distribute(model, layout, dtype))
    model.init_weights(0, local_rows).compute_dtype = dtype
    routes = routes_of(config, model)
    optimizer = Muon(model.named_parameters(), config.muon_lr, routes=routes, ns_dtype=dtype)
    if device.type == "cuda" and config.compile is not False:
        shard.compile_blocks(model)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(parallel.rank())
    tokens = torch.randint(0, config.vocab_size, (micro, config.sequence_length + 1), generator=generator).to(device)
    n_tokens = config.global_batch_size * config.sequence_length
    meter = Meter()

    def step():
        model.reset_statistics()
        for turn in range(accumulation):
            shard.last_micro_batch(model, turn == accumulation - 1)
            loss, balance = model(tokens[:, :-1], tokens[:, 1:])
            (loss / n_tokens + config.aux_loss_alpha * balance / config.global_batch_size).backward()
        norm = parallel.add_up(parallel.squared_norm(parameters, layout)).sqrt().item()
        parallel.largest(model.max_logits)
        for counts in (model.routing.expert_counts, model.routing.histograms):
            parallel.add_up(counts)
        parallel.scale_gradients(parameters, min(1.0, config.grad_clip / (norm + 1e-6)))
        started, before = time.perf_counter(), meter.waiting
        optimizer.step()
        bench.synchronize()
        spent = time.perf_counter() - started, meter.waiting - before
        qk_clip_(model.layers, model.max_logits, config.qk_clip_tau)
        model.routing.balance_(config.bias_update_rate)
        optimizer.zero_grad()
        return spent

    arms = {"gathered": ("all_gather", True), "packed": ("owners", True), "overlapped": ("owners", False)}
    results = {arm: [] for arm in arms}
    for turn in range(12):
        for arm, (exchange, at_once) in arms.items():
            optimizer.exchange, meter.at_once = exchange, at_once
            meter.clear()
            bench.synchronize()
            started = time.perf_counter()
            optimizer_seconds, optimizer_waiting = step()
            bench.synchronize()
            seconds = time.perf_counter() - started
            if turn >= 3:
                results[arm].append((seconds, meter.waiting, optimizer_seconds, optimizer_waiting))
            counts, sizes = dict(meter.counts), dict(meter.bytes)
            if turn == 11:
                results[arm] = {"step": statistics.median(r[0] for r in results[arm]),
                                "waiting": statistics.median(r[1] for r in results[arm]),
                                "optimizer": statistics.median(r[2] for r in results[arm]),
                                "optimizer_waiting": statistics.median(r[3] for r in results[arm]),
                                "collectives": counts, "bytes": sizes}
    print(f"{path}: {layout}, {config.dtype}")
    for arm, r in results.items():
        print(f"  {arm:10}  step {1000 * r['step']:7.1f} ms, waiting {r['waiting'] / r['step']:5.1%};  optimizer "
              f"{1000 * r['optimizer']:6.1f} ms, waiting {r['optimizer_waiting'] / r['optimizer']:5.1%};  "
              f"{sum(r['collectives'].values())} collectives, {sum(r['bytes'].values()) / 1e6:.1f} MB in")
    for name, count in results["overlapped"]["collectives"].items():
        print(f"    {count:4} {name}, {results['overlapped']['bytes'][name] / 1e6:.2f} MB")
    stalls = measure_saves(model, optimizer, step)
    print("  a save stalls the step by " + ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in stalls.items()))
    comparing = measure_comparing(model, optimizer, device)
    print(f"  comparing the ranks: state {1000 * comparing[0]:.1f} ms, speed {1000 * comparing[1]:.1f} ms")
    loads = optimizer.plan.loads()
    expected = optimizer.expected_traffic()
    print(f"  Muon: {expected} a step by the plan; owner load max / mean {max(loads) * len(loads) / sum(loads):.3f}")
    if parallel.rank() == 0:
        name = f"ranks-{Path(path).stem}-{layout.dp_replicate}x{layout.dp_shard}-ep{layout.ep}-{device.type}"
        name += "" if dist.is_initialized() else "-plain"
        bench.save(name, {"command": argv, "layout": str(layout), "arms": results, "save_stall": stalls,
                          "comparing": comparing, "muon_traffic": expected})


def measure_comparing(model, optimizer, device):
    """Seconds that the guard takes every check_interval steps, for the ranks' state and for their speed."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        guard.refuse_drift(checkpoint.named_tensors(model, optimizer), [0], 0)
        between = time.perf_counter()
        guard.stragglers(0.0, device)
        times.append((between - started, time.perf_counter() - between))
    return [statistics.median(column) for column in zip(*times)]


def measure_saves(model, optimizer, step):
    """Seconds that the loop stands still for a checkpoint: written at once, only copied, and the bare copy."""
    folder = Path(parallel.once(tempfile.mkdtemp))
    stalls = {}
    tensors = checkpoint.named_tensors(model, optimizer)
    for _ in range(3):  # the last: the memory is then there
        started = time.perf_counter()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        stalls["copy"] = time.perf_counter() - started
        del copies
    for name, background in (("at once", False), ("beside", True)):
        saver = checkpoint.Saver(folder, 1, None, background)
        times = []
        for number in range(3):
            started = time.perf_counter()
            saver.start(number, checkpoint.named_tensors(model, optimizer), {}, None)
            times.append(time.perf_counter() - started)
            step()
            _, result = saver.outcome(wait=True)
            if isinstance(result, OSError):
                raise result
        stalls[name] = statistics.median(times)
    parallel.once(shutil.rmtree, folder, ignore_errors=True)
    return stalls


if __name__ == "__main__":
    parallel.run(bench.command(main, __doc__))

"""How long the ranks of a pipeline wait for each other: the idle share of a step, measured and by formula.

    torchrun --standalone --nproc_per_node=2 -m bench.pipeline configs/debug.py --pp=2 --device=cpu [--key=value ...]

Busy is what a rank spends in the forwards and backwards of its stages; the rest of the step it waits. Arms: all
schedules, each with 8 and 32 micro-batches of --micro_batch_size, in turns. "even": the formula, whose stages cost the
same; "cut": what the most expensive rank alone would leave the others to wait, with the stages as they are.
"""

import dataclasses
import itertools
import statistics
import time
from pathlib import Path

import torch
from torch.distributed.pipelining import PipelineStage

import bench
import settings
from errors import UserError
from model import build, pick_device
from muon import local_rows
from ranks import parallel, shard
from ranks.pipeline import BUBBLE, Pipeline

ROUNDS, MICRO_BATCHES, SCHEDULES = 7, (8, 32), ("1f1b", "interleaved", "zero_bubble")


class Clock:
    """Adds up the time in the stages' forwards and backwards, by standing in for those of the library."""

    def __init__(self):
        self.busy = 0.0
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            setattr(PipelineStage, name, self._timed(getattr(PipelineStage, name)))

    def _timed(self, function):
        def call(*args, **options):
            bench.synchronize()
            started = time.perf_counter()
            result = function(*args, **options)
            bench.synchronize()
            self.busy += time.perf_counter() - started
            return result
        return call


def main(argv):
    parallel.start()
    config, path = settings.load(argv)
    if config.pp == 1:
        raise UserError("bench.pipeline measures stages: add --pp=2, under torchrun with as many ranks or a multiple")
    device, clock = pick_device(config.device), Clock()
    arms, weights, sizes = {}, torch.ones((), device=device), {}
    for schedule in SCHEDULES:
        of = dataclasses.replace(config, pp_schedule=schedule).check()
        layout = parallel.make_layout(of, device)
        dtype = getattr(torch, of.dtype)
        model = build(of, device, lambda model, layout=layout, dtype=dtype: shard.distribute(model, layout, dtype))
        model.init_weights(0, local_rows).train().compute_dtype = dtype
        for m in MICRO_BATCHES:
            arms[schedule, m] = model, Pipeline(of, model, layout, of.micro_batch_size, m, device)
            sizes[schedule, m] = of.micro_batch_size * m

    def step(arm):
        """(seconds, busy seconds) of one forward and backward on this rank."""
        model, pipeline = arms[arm]
        tokens_BT = torch.randint(0, config.vocab_size, (sizes[arm], config.sequence_length + 1), device=device,
                                  generator=torch.Generator(device).manual_seed(parallel.rank()))
        model.reset_statistics()
        parallel.from_all(None)
        bench.synchronize()
        clock.busy, started = 0.0, time.perf_counter()
        pipeline(tokens_BT[:, :-1], tokens_BT[:, 1:], None, weights)
        bench.synchronize()
        seconds, busy = time.perf_counter() - started, clock.busy
        for p in model.parameters():
            p.grad = None
        return seconds, busy

    results = {arm: [] for arm in arms}
    for turn, arm in itertools.product(range(ROUNDS + 1), arms):
        measured = parallel.from_all(step(arm))
        if turn:  # the first makes connections
            seconds = max(seconds for seconds, _ in measured)
            results[arm].append((seconds, [busy for _, busy in measured]))
    print(f"{layout}, micro-batches of {config.micro_batch_size} x {config.sequence_length} tokens\n"
          f"{'schedule':>12} {'micro-batches':>14} {'ms a step':>10} {'idle':>7} {'even':>7} {'cut':>7}")
    found = []
    for (schedule, m), measured in results.items():
        seconds = statistics.median(seconds for seconds, _ in measured)
        idle = statistics.median(1 - statistics.mean(busy) / seconds for seconds, busy in measured)
        even = bubble(config.pp, m, schedule)
        uneven = statistics.median(1 - statistics.mean(busy) / max(busy) for _, busy in measured)
        found.append({"schedule": schedule, "micro_batches": m, "seconds": seconds, "idle": idle, "even": even,
                      "cut": 1 - (1 - even) * (1 - uneven)})
        print(f"{schedule:>12} {m:>14} {1000 * seconds:>10.0f} {idle:>7.1%} {even:>7.1%} {found[-1]['cut']:>7.1%}")
    if parallel.rank() == 0:
        bench.save(f"pipeline-{Path(path).stem}-{parallel.ranks()}", {"config": path, "pp": config.pp, "arms": found})


def bubble(pp, m, schedule):
    """The idle share of a step of m micro-batches through stages of equal cost (see BUBBLE)."""
    return (pp - 1) / (BUBBLE[schedule] * m + pp - 1)


if __name__ == "__main__":
    parallel.run(bench.command(main, __doc__))

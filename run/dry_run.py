"""A run that is tried and not started: python train.py configs/x.py --dry_run.

Everything is built and checked as for the run itself; then a few micro-batches are trained on, each with an update, and
thrown away. What they took predicts time and memory. Nothing is written. Next: ../step.py.
"""

import time

from errors import UserError, counted, said
from kernels.backend import synchronize
from ranks import parallel
from run import checkpoint, guard, memory
from run.folder import size
from run.metrics import memory_gib
from run.terminal import duration

WARMING = {"cuda": 3}  # micro-batches before the one that is timed: compilers and captures are at work; elsewhere 1


def rehearse(training):
    """Print what the run of a step.Training that has started would need; returns it as a record. All ranks call it."""
    config, device, accumulation = training.config, training.device, training.accumulation
    steps = config.max_steps - training.step
    predicted = memory.needed(config, training.model, training.routes, training.layout, device,
                              training.micro_batch_size, accumulation)
    training.begin()
    forwards = 1 if training.model.stages else accumulation  # a pipeline works on all at a time
    training.accumulation //= forwards
    most = steps * accumulation // training.accumulation
    try:
        found, forward, update = _tried(training, WARMING.get(device.type, 1) + 1, most)
    except RuntimeError as error:
        if not guard.is_out_of_memory(error):
            raise
        raise UserError(f"out of memory in micro-batches of {counted(training.micro_batch_size, 'sequence')} "
                        f"({said(error)}): a run would go on with smaller ones; try a smaller --micro_batch_size, or "
                        "--activation_checkpointing=full") from error
    if not found.finite:
        raise UserError(f"the loss is {found.loss}, the norm of its gradient {found.norm}: lower the learning rates, "
                        "or try --dtype=float32, to see whether rounding is to blame")
    step_seconds = forwards * forward + update
    record = {"step_seconds": step_seconds, "seconds": steps * step_seconds, "memory_gib": memory_gib(device),
              "predicted_gib": predicted / 2**30,
              "checkpoint_bytes": parallel.over_stages(checkpoint.size(training.saved()[0]), config.pp)}
    print(f"dry run: everything is in order, and nothing was written\n"
          f"time      {duration(record['seconds'])} for {counted(steps, 'step')} of {step_seconds:.2f} s, "
          f"{training.tokens_per_step / step_seconds:,.0f} tokens/s, without validations, samples and saves\n"
          f"memory    {record['memory_gib']:.1f} GiB at most; predicted: {record['predicted_gib']:.1f} GiB beside "
          "Python and its libraries\n"
          f"saves     {size(record['checkpoint_bytes'])} each", flush=True)
    return record


def _tried(training, least, most):
    """(what the last of at least so many micro-batches found, its seconds, those of its update). More are tried where a
    run would skip steps and go on: a loss scale that is too large falls."""
    count, found = 0, None
    while count < most and (count < least or not found.finite and training.skipped < training.config.max_skipped_steps):
        started = time.perf_counter()
        sums = training.forward_backward()
        synchronize()
        middle = time.perf_counter()
        found = training.agree(sums)
        training.update(found)
        synchronize()
        forward, update, count = middle - started, time.perf_counter() - middle, count + 1
    return found, forward, update

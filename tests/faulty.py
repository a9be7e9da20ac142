"""Train as train.py does, with faults injected from outside; the code that trains knows nothing of them.

    FAULTS=kill@7:1,slow_data@5 FAULTS_DONE=folder python tests/faulty.py CONFIG [--key=value ...]

A fault is kind@step, kind@step:rank (without a rank it strikes all) or oom@step:rank>size. It strikes once, whatever is
started again, because a marker in the folder FAULTS_DONE remembers it; nan, spike and oom strike every time.

In the step:        kill (SIGKILL), term (SIGTERM), hang, extra_collective, nan and spike (of the gradients), drift (of
                    a router bias), drift_weights (of a parameter, for ddp), oom (in every forward of more than `size`
                    sequences, from that step on)
In reading it:      loader (an I/O error), slow_data (takes SLOW seconds)
In its checkpoint:  diskfull (the kernel's own error), kill_insave (nothing written yet), kill_midsave (files written,
                    no manifest), kill_prerename, kill_postrename (committed, but `latest` names the one before)
"""

import errno
import functools
import inspect
import os
import re
import signal
import sys
import time
import types
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import data.loader  # noqa: E402
from model import K2  # noqa: E402
from muon import Muon, local_rows  # noqa: E402
from ranks import parallel  # noqa: E402
from run import checkpoint  # noqa: E402

SLOW = 3.0
RANK = int(os.environ.get("RANK", 0))
now = types.SimpleNamespace(step=0)  # the step being computed; steps, sequences, per_step: how prefetch counts


def plan(text):
    """[(kind, step, rank or None, size)] of FAULTS."""
    faults = [re.fullmatch(r"(\w+)@(\d+)(?::(\d+))?(?:>(\d+))?", word) for word in text.split(",") if word]
    return [(f[1], int(f[2]), f[3] and int(f[3]), int(f[4] or 0)) for f in faults]


PLAN = plan(os.environ.get("FAULTS", ""))


def due(kind, step):
    """Whether a fault of that kind strikes this rank now."""
    if not any(fault[:2] == (kind, step) and fault[2] in (None, RANK) for fault in PLAN):
        return False
    if kind in ("nan", "spike"):
        return True
    marker = Path(os.environ["FAULTS_DONE"]) / f"{kind}@{step}:{RANK}"
    if marker.exists():
        return False
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return True


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def instead_of(owner, name):
    """Put the decorated function in the place of owner.name; it gets the original first."""
    def put(function):
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(lambda *args, **options: function(original, *args, **options)))
        return function
    return put


@instead_of(data.loader, "prefetch")  # before train.py takes it from there
def prefetch(original, *args, **options):
    given = inspect.signature(original).bind(*args, **options)
    given.apply_defaults()
    words = types.SimpleNamespace(**given.arguments)
    now.steps, now.sequences, now.per_step = words.steps, words.sequences, words.per_step
    for number, item in enumerate(original(*args, **options)):
        now.step = words.steps[0] + number * words.size * words.ranks // words.per_step
        yield item


@instead_of(data.loader.TrainStream, "batch")
def batch(original, self, first, size):
    step = now.steps[0] + (first - now.sequences) // now.per_step
    if due("loader", step):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if due("slow_data", step):
        time.sleep(SLOW)
    return original(self, first, size)


@instead_of(K2, "forward")
def forward(original, self, tokens_BT, *args, **options):
    if self.training:
        now.model = self
        if due("kill", now.step):
            die()
        if due("term", now.step):
            die(signal.SIGTERM)
        while due("hang", now.step) or now.__dict__.get("hanging"):
            now.hanging = True
            time.sleep(60)
        if due("extra_collective", now.step):
            dist.all_reduce(torch.zeros(1))
        for kind, step, rank, size in PLAN:
            if kind == "oom" and now.step >= step and rank in (None, RANK) and len(tokens_BT) > size:
                raise torch.OutOfMemoryError(f"out of memory, as FAULTS says, with {len(tokens_BT)} sequences")
    return original(self, tokens_BT, *args, **options)


@instead_of(parallel, "squared_norm")
@torch.no_grad()
def squared_norm(original, parameters, *args, **options):
    factor = float("nan") if due("nan", now.step) else 1e4 if due("spike", now.step) else None
    for p in parameters if factor else ():
        if p.grad is not None:
            local_rows(p.grad)[0].mul_(factor)
    return original(parameters, *args, **options)


@instead_of(Muon, "update")
@torch.no_grad()
def optimizer_step(original, self, *args):
    loss = original(self, *args)
    if due("drift", now.step):  # one expert's, as a change of all of them would be centred away
        next(b for name, b in now.model.named_buffers() if name.endswith("e_score_correction_bias"))[0] += 1
    if due("drift_weights", now.step):
        local_rows(self.param_groups[0]["params"][0])[0].add_(1)
    return loss


@instead_of(checkpoint.dcp, "save")
def save(original, *args, storage_writer, **options):
    folder = Path(storage_writer.path)  # .tmp_00000008
    step = int(folder.name.split("_")[-1])
    if due("diskfull", step):
        (folder / f"__{RANK}_0.distcp").symlink_to("/dev/full")
    if due("kill_insave", step):
        die()
    result = original(*args, storage_writer=storage_writer, **options)
    if due("kill_midsave", step):
        die()
    return result


@instead_of(os, "rename")
def rename(original, source, target, **options):
    commits = re.fullmatch(r"\.tmp_(\d+)", Path(source).name)
    if commits and due("kill_prerename", int(commits[1])):
        die()
    original(source, target, **options)
    if commits and due("kill_postrename", int(commits[1])):
        die()


if __name__ == "__main__":
    import train

    if os.environ.get("FAULTS_NO_CURVES"):  # nine tenths of a tiny run's time
        train.metrics.draw_curves = lambda folder: None
    parallel.run(train.main)

"""What a few steps spend their time and memory on: python train.py configs/x.py --profile_steps=10:13.

out_dir/profile/ then has trace.json.gz, for Perfetto (ui.perfetto.dev) or chrome://tracing, costs.txt, the operators
that took longest, and on CUDA memory.pickle, what was allocated when, for pytorch.org/memory_viz. Of many ranks the
first is looked at. Steps that are looked at are slower.
"""

import contextlib
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ranks import parallel

ROWS = 15  # of the table


class Profiler:
    """Call at(step) before every step, and close() behind the last."""

    def __init__(self, config, device, start, log):
        steps = config.profiled() if parallel.rank() == 0 else range(0)
        self.steps, self.device, self.folder = steps, device, Path(config.out_dir) / "profile"
        self.open, self.profile, self.seen, self.log = contextlib.ExitStack(), None, 0, log
        if steps and (steps[-1] <= start or steps[0] > config.max_steps):
            print(f"warning: nothing is profiled: steps {start + 1} to {config.max_steps} are still to come, not "
                  f"{config.profile_steps}", flush=True)

    def at(self, step):
        if step in self.steps:
            if self.profile is None:
                self._begin()
            self.open.close()
            self.open.enter_context(record_function(f"step {step}"))
            self.seen += 1
        else:
            self.close()

    def close(self):
        """Write what was seen, if steps were."""
        if self.profile is None:
            return
        self.open.close()
        found, self.profile = self.profile, None
        found.stop()
        self.log.attempt(f"{self.folder}/", lambda: self._write(found))

    def _write(self, found):
        self.folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(self.folder / "trace.json.gz"))
        table = costs(found.key_averages(), self.seen)
        (self.folder / "costs.txt").write_text(table, encoding="utf-8")
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        print(f"{table}profile: {self.folder}/", flush=True)

    def _begin(self):
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.profile = profile(activities=activities)
        self.profile.start()


def costs(averages, steps):
    """The operators that took longest by themselves as a table, or the kernels, if any ran on a GPU."""
    kernels = [event for event in averages if event.device_type == DeviceType.CUDA]
    taken = (lambda event: event.self_device_time_total) if kernels else (lambda event: event.self_cpu_time_total)
    events = [event for event in kernels or averages if not event.is_user_annotation]  # our own name for a step
    total = sum(map(taken, events)) or 1
    lines = [f"{'ms a step':>10} {'share':>6} {'calls':>7}  {'kernel' if kernels else 'operator'}"]
    for event in sorted(events, key=taken, reverse=True)[:ROWS]:
        lines.append(f"{taken(event) / 1000 / steps:10.2f} {taken(event) / total:6.1%} {event.count / steps:7.0f}  "
                     f"{event.key[:80]}")
    return "\n".join(lines) + "\n"

"""What a few steps spend their time and memory on: python train.py configs/x.py --profile_steps=10:13.

out_dir/profile/ then has trace.json.gz, for Perfetto (ui.perfetto.dev) or chrome://tracing, costs.txt, the operators
that took longest, and on CUDA memory.pickle, what was allocated when, for pytorch.org/memory_viz. Of many ranks the
first is looked at. Steps that are looked at are slower.
"""

import contextlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ranks import parallel

ROWS = 15  # of the table


class Profiler:
    """Call at(step) before every step, and close() behind the last."""

    def __init__(self, config, device, start, log):
        steps = config.profiled() if parallel.rank() == 0 else range(0)
        self.steps, self.device, self.folder = steps, device, Path(config.out_dir) / "profile"
        self.open, self.profile, self.log = contextlib.ExitStack(), None, log
        if steps and (steps[-1] <= start or steps[0] > config.max_steps):
            print(f"warning: nothing is profiled: steps {start + 1} to {config.max_steps} are still to come, not "
                  f"{config.profile_steps}", flush=True)

    def at(self, step):
        if step in self.steps:
            if self.profile is None:
                activities = [ProfilerActivity.CPU]
                if self.device.type == "cuda":
                    activities.append(ProfilerActivity.CUDA)
                    torch.cuda.memory._record_memory_history(max_entries=200_000)
                self.profile = profile(activities=activities)
                self.profile.start()
            self.open.close()
            self.open.enter_context(record_function(f"step {step}"))
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
        averages = found.key_averages()
        averages[:] = [event for event in averages if not event.is_user_annotation]  # our own name for a step
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = averages.table(sort_by=by, row_limit=ROWS)
        (self.folder / "costs.txt").write_text(table, encoding="utf-8")
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        print(f"{table}profile: {self.folder}/", flush=True)

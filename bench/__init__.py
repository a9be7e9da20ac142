"""What is measured: each file one command (python -m bench.<name>), results as dated JSON in bench/results/.

Speeds are given as ratios of arms that ran interleaved in one process, because absolute times belong to one machine.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from kernels.backend import synchronize


def machine():
    """What a result has to say about where it came from."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8",
                                cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git here
        commit = os.environ.get("COMMIT")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"date": datetime.date.today().isoformat(), "commit": commit or None, "device": name,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name, result):
    """Write bench/results/<date>-<name>.json (under $OUT if set) and say where."""
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today().isoformat()}-{name}.json"
    path.write_text(json.dumps({**machine(), **result}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def interleaved(arms, rounds=9, warmup=3):
    """Median seconds of each of {name: function}, one call of every arm in turn, so that noise hits all alike."""
    times = {name: [] for name in arms}
    for turn in range(warmup + rounds):
        for name, function in arms.items():
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}

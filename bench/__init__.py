"""What is measured: each file one command (python -m bench.<name> [--out=FOLDER]), results as dated JSON in a folder
outside of the checkout, or in --out (--out=bench/results for those that are to be kept).

Speeds are given as ratios of arms that ran interleaved in one process, because absolute times belong to one machine.
"""

import datetime
import inspect
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from errors import UserError
from kernels.backend import synchronize


def command(main, about):
    """main as a script's function of words, for errors.run: --help prints `about`, --out=FOLDER says where results go,
    and words that nobody reads are refused. main takes the other words, or none."""
    def run(argv):
        if {"-h", "--help"} & set(argv):
            print(about.strip())
            return
        words = iter(argv)
        rest = []
        for word in words:
            name, _, folder = word.partition("=")
            if name == "--out":
                os.environ["OUT"] = folder or next(words, "")
            else:
                rest.append(word)
        if not inspect.signature(main).parameters and rest:
            raise UserError(f"what is {' '.join(rest)}? There is --out=FOLDER, and --help")
        if status := main(rest) if inspect.signature(main).parameters else main():
            raise SystemExit(status)
    return run


def results():
    """The folder for results, from --out or the environment variable OUT."""
    return Path(os.environ.get("OUT") or Path(tempfile.gettempdir()) / "nanok2-bench")


def machine():
    """What a result has to say about where it came from."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8",
                                cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git here
        commit = os.environ.get("COMMIT")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"date": datetime.date.today().isoformat(), "commit": commit or None, "device": name,
            "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name, result):
    """Write <date>-<name>.json into the folder for results and say where."""
    folder = results()
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

"""What was measured once on a machine, remembered in a small JSON file; the search for tiles that fits into a start.

The file, kernels.json, lies in $NANOK2_CACHE, else in nanok2/ of $XDG_CACHE_HOME or ~/.cache. For every (GPU, driver,
versions, sources of this folder) it holds a date and facts, plain values under a text that says what they are about:
if one of these changes, all is measured again. Ranks and runs may write at once: each adds its facts to what the file
holds by then, under a lock, and replaces it whole. Next: selfcheck.py, which asks and tells, and expert_tiles.py.
"""

import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from pathlib import Path

import torch

from errors import said
from kernels import backend, expert_tiles

KEPT = 32  # machines, or versions of the sources, in the file: the newest
SECONDS = {"auto": 10.0, "full": 120.0}  # for tiles: half to wait for those that compile, half to measure
MOST = {"auto": 4, "full": None}  # tiles of a kernel


def path():
    """The file that remembers."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("NANOK2_CACHE") or os.path.join(cache, "nanok2")) / "kernels.json"


@functools.cache
def machine(device):
    """What a measurement depends on, besides its sizes, as one text."""
    driver = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.\d+[.\d]*", driver.read_text(encoding="utf-8")) if driver.is_file() else None
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # of another name: the sources of torch determine it
        triton = "unnamed"
    return (f"{torch.cuda.get_device_name(device)}, driver {driver[0] if driver else 'unknown'}, torch "
            f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}, triton {triton}, sources {sources()}")


def sources():
    """A checksum of this folder's files."""
    text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


@functools.cache
def _say(line):
    print(line, flush=True)


def _read(file):
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(entry["facts"], dict) and isinstance(entry["date"], str) for entry in stored.values()):
            raise ValueError("not a file of ours")
        return stored
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _say(f"kernels: {file} is ignored ({said(error)}): what it should remember is measured again")
        return {}


def recall(device, name):
    """What this machine's fact of that name is, or None; says once that it is used."""
    entry = _read(path()).get(machine(device), {"facts": {}})
    if name in entry["facts"]:
        _say(f"kernels: choices of {entry['date']} for this GPU and these sources, from {path()}; delete it or set "
             "--kernels_tuning=full to measure again")
    return entry["facts"].get(name)


def remember(device, facts):
    """Add facts of this machine. Where the folder cannot be written, that is said once, and the next start measures
    again."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stored = _read(file)
            before = stored.pop(machine(device), {"facts": {}})["facts"]
            stored[machine(device)] = {"date": datetime.date.today().isoformat(), "facts": before | facts}
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
                json.dump(dict(list(stored.items())[-KEPT:]), new, indent=1)
            os.replace(new.name, file)
    except OSError as error:
        _say(f"kernels: what was measured cannot be kept ({said(error)}): every start measures again; set NANOK2_CACHE "
             "to a folder that can be written")


def tiles_to_try(routed, how):
    """{kernel: tiles} of the experts at these sizes that fit this GPU, first the one that runs so far."""
    N, K, E, D, F, dtype = routed
    usual = {kernel: tuple(expert_tiles.blocks(kernel, D, F, N * K // E, dtype).values())
             for kernel in expert_tiles.PROMISING}
    return {kernel: list(dict.fromkeys((tile, *expert_tiles.candidates(kernel, dtype, expert_tiles.shared_limit())))
                         )[:MOST[how]] for kernel, tile in usual.items()}


def choose_tiles(routed, device, how):
    """Search the experts' tiles at these sizes and let expert_tiles.TILES hold them; returns a line to print."""
    from kernels import triton_experts
    N, K, E, D, F, dtype = routed
    best, line = search(triton_experts.tile_arms(*routed, device), tiles_to_try(routed, how), SECONDS[how] / 2, device)
    expert_tiles.TILES.update({expert_tiles.tile_key(kernel, D, F, N * K // E, dtype): tile
                               for kernel, tile in best.items()})
    return line


def search(arms, tiles, seconds, device):
    """({kernel: fastest tile}, a line to print) of {kernel: function(tile)} and {kernel: tiles, the default first}.
    Each kernel has its share of the seconds. A tile that fails, or has another result than the default, does not
    compete; one must win by 2 %: less is noise."""
    started, best, told = time.perf_counter(), {}, []
    for place, (kernel, arm) in enumerate(arms.items()):
        speeds, right = {}, None
        for tile in tiles[kernel]:
            if speeds and time.perf_counter() - started > seconds * (place + 1) / len(arms):
                break
            try:
                result = _floats(arm(tile))
                right = right or result
                if all((a - b).norm(dtype=torch.float32) <= 1e-2 * b.norm(dtype=torch.float32)
                       for a, b in zip(result, right)):
                    speeds[tile] = backend.milliseconds(functools.partial(arm, tile), device, rounds=5, warmup=2)
                else:
                    told.append(f"{kernel} {tile} is wrong")
            except Exception as error:  # a compiler's, or too much shared memory: no tile for this GPU, and said
                told.append(f"{kernel} {tile} fails ({said(error):.80})")
        if speeds:
            default, winner = next(iter(speeds)), min(speeds, key=speeds.get)
            best[kernel] = winner if speeds[winner] < 0.98 * speeds[default] else default
            told.append(f"{kernel} {speeds[best[kernel]]:.3f} with {best[kernel]} ({speeds[default]:.3f})")
    return best, (f"expert tiles in {time.perf_counter() - started:.1f} s, ms of the best of "
                  f"{sum(map(len, tiles.values()))} (of the default): " + ", ".join(told))


def _floats(result):
    return [t for t in ((result,) if isinstance(result, torch.Tensor) else result) if t.is_floating_point()]

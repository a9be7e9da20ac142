"""What train.py itself takes on random tokens: seconds from the command to the end of the first step, with empty caches
and then with what that start has left in them; and its tokens/s over those that bench.step gave for the same batch.

    python -m bench.training start configs/small.py [--key=value ...]
    python -m bench.training run configs/small.py --global_batch_size=256      # after bench.step configs/small.py
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import bench
import errors
import settings
from bench.step import speeds
from data.shards import Writer
from errors import UserError
from run import metrics

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NANOK2_CACHE")
STEPS, EARLY = 30, 10  # of a run whose tokens/s are asked for; steps that do not count


def random_shards(folder, vocab_size, n_tokens=2**22):
    """A data folder of random tokens without a tokenizer, made in a second."""
    rng = np.random.default_rng(0)
    with Writer(folder, vocab_size) as writer:
        for split, count in (("train", n_tokens), ("val", n_tokens // 64)):
            writer.write(split, rng.integers(0, vocab_size, count), 0)
        writer.finish(lambda path: None)
    return folder


def train_until(step, words, folder, environment=None):
    """Train until a step is recorded, and kill the run there: a save would only take time. Returns (when it began, its
    train records)."""
    run, log, begun = folder / "run", folder / "log.txt", time.time()
    quiet = ("--wandb=off", "--save_interval=0", "--eval_interval=0", "--sample_interval=0", "--log_interval=5")
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "train.py", *words, f"--out_dir={run}", "--overwrite", *quiet],
                                   cwd=Path(__file__).parent.parent, env={**os.environ, **(environment or {})},
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:
            records = [record for record in metrics.read_records(run / "metrics.jsonl") if record["kind"] == "train"
                       and record["time"] >= begun]
            if records and records[-1]["step"] >= step:
                return begun, records
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise UserError(f"train.py ended with {process.returncode} before step {step}:\n"
                    + log.read_text(encoding="utf-8", errors="replace")[-2000:])


def start(words, stem, folder):
    """Seconds to the first step of two runs that share caches that were empty."""
    environment = {name: str(folder / name.lower()) for name in CACHES}
    rows = {}
    for caches in ("cold", "warm"):
        begun, records = train_until(1, [*words, "--max_steps=2"], folder, environment)
        rows[f"{stem}: seconds to the first step, {caches} caches"] = records[0]["time"] - begun
        print((folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:])
    return rows


def run(words, stem, folder):
    """tokens/s of a run's later steps, as a share of what bench.step's newest result gives for that batch."""
    found = sorted(bench.results().glob(f"*-step-{stem}-*.json"))
    if not found:
        raise UserError(f"{bench.results()} has no result to compare with:  python -m bench.step {words[0]}")
    parts = json.loads(found[-1].read_text(encoding="utf-8"))["arms"]["nanok2"]["seconds"]
    config, _ = settings.load(words)
    expected, _ = speeds(config, parts, config.global_batch_size // config.micro_batch_size)
    _, records = train_until(STEPS, [*words, f"--max_steps={STEPS + 1}"], folder)
    speed = statistics.median(record["tokens_per_second"] for record in records if record["step"] > EARLY)
    print(f"train.py {speed:,.0f} tokens/s, bench.step {expected:,.0f}")
    return {f"{stem}: tokens/s of train.py over bench.step's": speed / expected}


def main(argv):
    if not argv or argv[0] not in ("start", "run"):
        raise UserError("say what to measure:  python -m bench.training start CONFIG, or run CONFIG (see --help)")
    what, *words = argv
    config, path = settings.load(words)
    stem = Path(path).stem
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = random_shards(Path(folder) / "data", min(config.vocab_size, 50257))
        words = [*words, f"--data={data}"]
        rows = {"start": start, "run": run}[what](words, stem, Path(folder))
    print(*(f"{value:8.3f}  {row}" for row, value in rows.items()), sep="\n")
    bench.save(f"{what}-{stem}", {"command": argv, "ratios": rows})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

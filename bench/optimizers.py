"""MuonClip against AdamW on one config: each at the best of several learning rates, same data, same tokens; then how
few steps MuonClip needs, with its whole schedule inside them, to reach AdamW's final validation loss.

    python -m bench.optimizers configs/debug.py [--key=value ...]
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import bench
import config as settings
import errors

RATES = {"muonclip": (5e-3, 1e-2, 2e-2), "adamw": (1e-3, 2e-3, 4e-3, 8e-3)}
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of AdamW's steps, tried for MuonClip at its best rate


def final_loss(argv, folder, optimizer, rate, steps, decay):
    """The last validation loss of one run, in a process of one thread."""
    run = Path(folder) / f"{optimizer}-{rate}-{steps}"
    words = [*argv, f"--out_dir={run}", f"--optimizer={optimizer}", f"--muon_lr={rate}", "--adamw_lr=None",
             f"--max_steps={steps}", f"--decay_steps={decay}", f"--eval_interval={steps}", "--sample_interval=0",
             "--save_interval=0", "--wandb=off"]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=Path(__file__).parent.parent, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise errors.UserError(f"the run with {optimizer} at {rate} failed: {done.stderr.strip()[-700:]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = [record["loss"] for record in records if record["kind"] == "val"][-1]
    print(f"{optimizer:9} lr {rate:<7g} {steps:5} steps  validation loss {loss:.4f}", flush=True)
    return loss


def main(argv):
    config, path = settings.load(argv)
    decay = config.decay_steps or config.max_steps // 5
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()  # only losses are compared, so runs may share the machine
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        def start(kind, rate, share):
            steps = round(config.max_steps * share)
            return pool.submit(final_loss, argv, folder, kind, rate, steps, round(decay * share))
        runs = {kind: {rate: start(kind, rate, 1.0) for rate in rates} for kind, rates in RATES.items()}
        losses = {kind: {rate: run.result() for rate, run in found.items()} for kind, found in runs.items()}
        best = {kind: min(found, key=found.get) for kind, found in losses.items()}
        target = losses["adamw"][best["adamw"]]
        runs = {share: start("muonclip", best["muonclip"], share) for share in SHARES}
        shorter = {share: run.result() for share, run in runs.items()}
    reached = [share for share, loss in {1.0: min(losses["muonclip"].values()), **shorter}.items() if loss <= target]
    print(f"AdamW's best, {target:.4f} at lr {best['adamw']:g}, is reached by MuonClip (lr {best['muonclip']:g}) in "
          + (f"{min(reached):.0%} of the steps" if reached else "no share of the steps that was tried"))
    bench.save(f"optimizers-{Path(path).stem}", {
        "command": argv, "losses": losses, "best": best, "shorter": shorter, "reached": min(reached, default=None)})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

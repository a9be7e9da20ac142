"""MuonClip against AdamW on one config: each at the best of several learning rates, same data, same tokens; then how
few steps MuonClip needs, with its whole schedule inside them, to reach AdamW's final validation loss.

    python -m bench.optimizers configs/debug.py [--key=value ...]
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import bench
import config as settings
import errors
import train

RATES = {"muonclip": (5e-3, 1e-2, 2e-2), "adamw": (2e-3, 4e-3, 8e-3)}
SHARES = (0.8, 0.65, 0.5)  # of AdamW's steps, tried for MuonClip at its best rate


def final_loss(argv, folder, optimizer, rate, steps, decay):
    run = Path(folder) / f"{optimizer}-{rate}-{steps}"
    words = [*argv, f"--out_dir={run}", f"--optimizer={optimizer}", f"--muon_lr={rate}", "--adamw_lr=None",
             f"--max_steps={steps}", f"--decay_steps={decay}", f"--eval_interval={steps}", "--sample_interval=0",
             "--wandb=off"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(words)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if record["kind"] == "val"][-1]
    print(f"{optimizer:9} lr {rate:<7g} {steps:5} steps  validation loss {loss:.4f}", flush=True)
    return loss


def main(argv):
    config, path = settings.load(argv)
    decay = config.decay_steps or config.max_steps // 5
    with tempfile.TemporaryDirectory() as folder:
        losses = {kind: {rate: final_loss(argv, folder, kind, rate, config.max_steps, decay) for rate in rates}
                  for kind, rates in RATES.items()}
        best = {kind: min(found, key=found.get) for kind, found in losses.items()}
        target = losses["adamw"][best["adamw"]]
        shorter = {}
        for share in SHARES:
            steps = round(config.max_steps * share)
            shorter[share] = final_loss(argv, folder, "muonclip", best["muonclip"], steps, round(decay * share))
            if shorter[share] > target:
                break
    reached = [share for share, loss in {1.0: min(losses["muonclip"].values()), **shorter}.items() if loss <= target]
    print(f"AdamW's best, {target:.4f} at lr {best['adamw']:g}, is reached by MuonClip (lr {best['muonclip']:g}) in "
          + (f"{min(reached):.0%} of the steps" if reached else "no share of the steps that was tried"))
    bench.save(f"optimizers-{Path(path).stem}", {
        "command": argv, "losses": losses, "best": best, "shorter": shorter, "reached": min(reached, default=None)})


if __name__ == "__main__":
    errors.run(lambda argv: main(argv or sys.exit("python -m bench.optimizers CONFIG [--key=value ...]")))

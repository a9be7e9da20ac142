"""Watching a run: metrics.jsonl, the terminal line, samples.md, W&B, the curves, memory and MFU.

metrics.jsonl is always written and is the truth; W&B gets the same keys under train/ and val/ and can never stop a run.
"""

import json
import math
import netrc
import os
import re
import resource
import sys
from pathlib import Path

import torch

from errors import UserError

# Dense bf16 peak of the datasheet, FLOP/s, by a part of the device name; MFU is null for devices that are not here.
PEAK_FLOPS = {"GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12,
              "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


SAMPLE, SAMPLE_HEAD = "\n## step {}\n\n~~~\n{}", r"\n## step ([0-9]{1,18})\n\n~~~\n"


def peak_flops(device):
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def memory_gib(device):
    """Peak memory so far: the allocator's on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class RunLog:
    """Appends records to metrics.jsonl (and W&B) and texts to samples.md. Opening it at `step` drops what an
    interrupted run wrote beyond that step, so that a resumed run leaves no line twice. Of many ranks only one writes:
    a log that is not active makes records and keeps them to itself."""

    def __init__(self, folder, config, step, run_id, active=True):
        self.folder, self.path, self.wandb = Path(folder), Path(folder) / "metrics.jsonl", None
        self.active = active
        if not active:
            self.file = open(os.devnull, "w")
            return
        records = [record for record in read_records(self.path) if record["step"] <= step]
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        samples = self.folder / "samples.md"
        if samples.exists():
            head, *parts = re.split(SAMPLE_HEAD, samples.read_text(errors="replace"))  # numbers and texts take turns
            kept = [SAMPLE.format(number, text) for number, text in zip(parts[::2], parts[1::2]) if int(number) <= step]
            replace_text(samples, head + "".join(kept))
        self.file = open(self.path, "a", buffering=1)  # a line at a time, so that a kill loses at most one
        self.wandb = start_wandb(config, self.folder, run_id)

    def write(self, kind, step, **fields):
        """Append {"kind", "step", **fields}; non-finite numbers become null, which JSON can hold. Returns the
        record."""
        fields = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in fields.items()}
        record = {"kind": kind, "step": step, **fields}
        self._try(lambda: self.file.write(json.dumps(record) + "\n"))
        numbers = {f"{kind}/{key}": v for key, v in fields.items() if isinstance(v, (int, float))}
        self._to_wandb(lambda run: run.log(numbers, step=step))
        return record

    def _try(self, action):
        """A full disk must not cost the run more than some lines of its log."""
        try:
            action()
        except OSError as error:
            print(f"warning: the log is incomplete: {error}", flush=True)

    def draw(self):
        if self.active:
            self._try(lambda: draw_curves(self.folder))

    def _to_wandb(self, action):
        if self.wandb is None:
            return
        try:
            action(self.wandb)
        except Exception as error:  # a logging service must not cost a training run
            print(f"warning: W&B failed ({error}); going on without it")
            self.wandb = None

    def sample(self, step, prompt, text):
        if not self.active:
            return
        path = self.folder / "samples.md"

        def append():
            with open(path, "a") as file:
                file.write(("" if file.tell() else "# Samples\n") + SAMPLE.format(step, f"{prompt}{text}\n~~~\n"))
        self._try(append)

    def close(self):
        self._try(self.file.close)
        self._to_wandb(lambda run: run.finish())


def replace_text(path, text):
    """Give a small file a new content, the old or the new one at every instant."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_records(path):
    """The records of a metrics.jsonl; what is none, such as a last line that a kill cut short, is left out."""
    if not Path(path).exists():
        return []
    records = []
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int \
                and 0 <= record["step"] < 2**63:
            records.append(record)
    return records


def step_line(record, max_steps, eta):
    """One terminal line of a train record; null, a number that was not finite, reads nan."""
    record = {key: math.nan if value is None and key not in ("mfu", "expert_load_max") else value
              for key, value in record.items()}
    parts = [f"step {record['step']:>{len(str(max_steps))}}/{max_steps}", f"loss {record['loss']:.4f}",
             f"lr {record['lr']:.2e}", f"norm {record['grad_norm']:.2f}", f"{record['tokens_per_second']:,.0f} tok/s"]
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    parts.append(f"logit {record['max_attention_logit']:.1f}")
    if record["expert_load_max"] is not None:
        parts.append(f"load {record['expert_load_max']:.2f}")
    return "  ".join([*parts, f"{record['memory_gib']:.1f} GiB", f"eta {duration(eta)}"])


def expert_statistics(counts_LE, biases_LE):
    """The record fields about routing, from one step's token counts of the MoE layers; None where nothing is routed."""
    if counts_LE.numel() == 0:
        return dict.fromkeys(("expert_load_max", "expert_load_min", "dead_experts", "router_bias_std"))
    load_LE = counts_LE.float() / counts_LE.float().mean(-1, keepdim=True)
    return {"expert_load_max": load_LE.max().item(), "expert_load_min": load_LE.min().item(),
            "dead_experts": int((counts_LE == 0).sum()), "router_bias_std": biases_LE.std(-1).mean().item()}


# ----------------------------------------------------------------------------- W&B

def require_wandb(config):
    """Refuse a setting that needs W&B where it is not installed, before anything begins."""
    if config.wandb in ("online", "offline"):
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError(f"wandb={config.wandb!r} needs the package: pip install wandb, or --wandb=off") from error


def start_wandb(config, folder, run_id):
    """A W&B run, or None. auto never prompts: it asks only whether the package and a login are there."""
    if config.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        return None
    mode = config.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "off")
        if mode in ("off", "disabled"):
            return None
    if mode == "online" and not _logged_in():
        print("warning: W&B has no login (wandb login); going on without it")
        return None
    try:
        return wandb.init(project=config.wandb_project, name=config.run_name or folder.name, id=run_id, resume="allow",
                          dir=str(folder), mode=mode, config=vars(config))
    except Exception as error:  # a logging service must not cost a training run
        print(f"warning: W&B did not start ({error}); going on without it")
        return None


def _logged_in():
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# ----------------------------------------------------------------------------- curves

def draw_curves(folder):
    """Draw curves.png from metrics.jsonl; returns its path."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    records = read_records(folder / "metrics.jsonl")

    def points(kind, key):  # null stands for what was not finite, and a damaged line can hold anything
        return [(record["step"], record[key]) for record in records if record["kind"] == kind
                and isinstance(record.get(key), int | float) and abs(record[key]) < 1e100]
    panels = [("loss", "nats per token", ["loss"]), ("learning rate", "", ["lr"]),
              ("gradient norm", "", ["grad_norm"]), ("throughput", "tokens/s", ["tokens_per_second"]),
              ("largest attention logit", "", ["max_attention_logit"]),
              ("expert load over mean", "", ["expert_load_max", "expert_load_min"])]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, unit, keys) in zip(axes.flat, panels):
        for key in keys:
            if found := points("train", key):
                axis.plot(*zip(*found), label=key.replace("_", " "), linewidth=1)
        if title == "loss" and (found := points("val", key)):
            axis.plot(*zip(*found), "o-", markersize=3, label="validation")
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.grid(alpha=0.3)
    temporary = folder / ".curves.png"
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    os.replace(temporary, folder / "curves.png")
    return folder / "curves.png"

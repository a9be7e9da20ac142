"""Watching a run: metrics.jsonl, the terminal line, samples.md, W&B, the curves, memory and MFU.

metrics.jsonl is always written and is the truth; W&B gets the same keys under train/, val/ and task/NAME/. None of them
can stop a run: what fails is said once, and how much was lost at the end.
"""

import collections
import json
import math
import os
import queue
import re
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

import errors
from errors import UserError, said

# Dense bf16 peak of the datasheet, FLOP/s, by a part of the device name; MFU is null for devices that are not here.
PEAK_FLOPS = {"GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12,
              "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

PATIENCE = 60.0  # seconds that a run waits for W&B at its end
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


class Pace:
    """How long the rest of a run will take, from the steps so far: the first ones, in which compilers are at work, and
    the slowest sixteenth count only while there are no others. Validations and saves count as they came."""

    def __init__(self, early=3):
        self.early, self.steps, self.others, self.seconds = early, 0, 0.0, collections.deque(maxlen=128)
        self.stopped, self.newest = time.perf_counter(), []

    def start(self):
        """A step begins."""
        self.started = time.perf_counter()

    def stop(self):
        """It has ended; what comes before the next start is something else."""
        now = time.perf_counter()
        self.add(now - self.started, self.started - self.stopped)
        self.newest.append(now - self.started)
        self.stopped = now

    def mean(self):
        """Mean seconds of the steps that have stopped since the last call."""
        mean = math.fsum(self.newest) / len(self.newest)
        self.newest = []
        return mean

    def add(self, step_seconds, other_seconds=0.0):
        """A step has taken so long, and what else happened since the one before."""
        if self.steps == self.early:
            self.seconds.clear()
        self.steps, self.others = self.steps + 1, self.others + other_seconds
        self.seconds.append(step_seconds)

    def left(self, steps):
        """Seconds for so many more steps."""
        usual = sorted(self.seconds)[:max(len(self.seconds) - len(self.seconds) // 16 - 1, 1)]
        return steps * (statistics.fmean(usual) + self.others / self.steps)


class RunLog:
    """Appends records to metrics.jsonl (and W&B) and texts to samples.md. Opening it at `step` drops what an
    interrupted run wrote beyond that step. Of many ranks only one is active: the others only make records."""

    def __init__(self, folder, config, step, run_id, active=True):
        self.folder, self.path, self.wandb = Path(folder), Path(folder) / "metrics.jsonl", None
        self.active, self.lost = active, collections.Counter()
        if not active:
            self.file = open(os.devnull, "w", encoding="utf-8")
            return
        replace_text(self.path, lines_up_to(self.path, step))
        if (samples := self.folder / "samples.md").exists():
            self.attempt("samples.md", lambda: cut_samples(samples, step))
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # a line at a time: a kill loses at most one
        self.wandb = Service(lambda: start_wandb(config, self.folder, run_id))

    def write(self, kind, step, **fields):
        """Append {"kind", "step", "time", **fields}; time: seconds since 1970 (UTC). Non-finite numbers become null,
        which JSON can hold. Returns the record."""
        fields = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in fields.items()}
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **fields}
        self.attempt("metrics.jsonl", lambda: self.file.write(json.dumps(record) + "\n"))
        under = f"task/{fields['task']}" if kind == "task" else kind
        numbers = {f"{under}/{key}": v for key, v in fields.items() if isinstance(v, (int, float))}
        if self.wandb and self.wandb.thread.is_alive():
            self.wandb.records.put((numbers, step))
        return record

    def attempt(self, what, action, must_end=lambda error: False):
        """Do what a run can do without. Whatever it raises, a full disk, a missing font, costs no more than a record, a
        picture, a sample, unless must_end(error); the first failure of a kind is said at once, their number at last."""
        try:
            return action()
        except Exception as error:
            if must_end(error):
                raise
            self.lost[what] += 1
            if self.lost[what] == 1:
                print(f"warning: {what} is incomplete ({said(error)}); the run goes on without it", flush=True)

    def draw(self):
        if self.active:
            self.attempt("curves.png", lambda: draw_curves(self.folder))

    def sample(self, step, prompt, text):
        if not self.active or text is None:
            return
        path = self.folder / "samples.md"

        def append():
            with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.write(("" if file.tell() else "# Samples\n") + SAMPLE.format(step, f"{prompt}{text}\n~~~\n"))
        self.attempt("samples.md", append)

    def close(self):
        self.attempt("metrics.jsonl", self.file.close)
        if self.wandb:
            self.wandb.close()
        for what, count in self.lost.items():
            print(f"warning: {what}: {count} time{'s' * (count > 1)} nothing could be written", flush=True)
        self.lost.clear()


def cut_samples(path, step):
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 stay what they are
    head, *parts = re.split(SAMPLE_HEAD, text)  # numbers and texts take turns
    kept = [SAMPLE.format(number, text) for number, text in zip(parts[::2], parts[1::2]) if int(number) <= step]
    replace_text(path, head + "".join(kept))


class Service:
    """W&B, which may fail or hang, in a thread of its own; the run waits for it only at the end, and not for long."""

    def __init__(self, start):
        self.records = queue.SimpleQueue()  # (numbers, step); None: the last has come
        self.thread = threading.Thread(target=self._work, args=(start,), daemon=True)
        self.thread.start()

    def close(self):
        self.records.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            print("warning: W&B does not answer; going on without its last lines", flush=True)

    def _work(self, start):
        doing = "start"
        try:
            if (run := start()) is not None:
                doing = "go on"
                for numbers, step in iter(self.records.get, None):
                    run.log(numbers, step=step)
                run.finish()
        except (Exception, SystemExit) as error:  # a logging service must not cost a training run
            print(f"warning: W&B did not {doing} ({said(error)}); the run goes on without it", flush=True)


def replace_text(path, text):
    """Give a small file a new content, the old or the new one at every instant."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
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


def lines_up_to(path, step):
    return "".join(json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step)


def step_line(record, max_steps, eta):
    """One terminal line of a train record; null, a number that was not finite, reads nan."""
    record = {key: math.nan if value is None and key not in ("mfu", "expert_load_max") else value
              for key, value in record.items()}
    parts = [f"step {record['step']:>{len(str(max_steps))}}/{max_steps}", f"loss {record['loss']:.4f}",
             f"lr {record['lr']:.2e}", f"norm {record['grad_norm']:.2f}", f"{record['tokens_per_second']:,.0f} tok/s"]
    if record["mfu"] is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    if "mtp_loss" in record:
        parts.insert(2, f"second {record['mtp_loss']:.4f}")
    parts.append(f"logit {record['max_attention_logit']:.1f}")
    if record["expert_load_max"] is not None:
        parts.append(f"load {record['expert_load_max']:.2f}")
    return "  ".join([*parts, f"{record['memory_gib']:.1f} GiB", f"eta {duration(eta)}"])


def summary(folders):
    """For python -m run.metrics RUN_FOLDER ...: how far each run is and its newest losses, a line each."""
    if {"-h", "--help"} & set(folders):
        return print("python -m run.metrics RUN_FOLDER ...: how far each run is and its newest losses")
    for folder in folders or ["."]:
        newest = {record["kind"]: record for record in read_records(Path(folder) / "metrics.jsonl")}
        if "train" not in newest:
            raise UserError(f"{folder}: no metrics.jsonl with a step in it (python -m run.metrics RUN_FOLDER ...)")
        loss, (val, bits) = newest["train"].get("loss"), map(newest.get("val", {}).get, ("loss", "bits_per_byte"))
        print(f"{folder}: step {newest['train']['step']}  loss {loss}  validation {val}  bits per byte {bits}")


def expert_statistics(counts_LE, biases_LE):
    """The record fields about routing, from one step's token counts of the MoE layers; None where nothing is routed."""
    if counts_LE.numel() == 0:
        return dict.fromkeys(("expert_load_max", "expert_load_min", "dead_experts", "router_bias_std"))
    load_LE = counts_LE.float() / counts_LE.float().mean(-1, keepdim=True)
    return {"expert_load_max": load_LE.max().item(), "expert_load_min": load_LE.min().item(),
            "dead_experts": int((counts_LE == 0).sum()), "router_bias_std": biases_LE.std(-1).mean().item()}


STEADY = 50  # steps in a row after which something is no accident
LEVERS = {
    "none": "--balance=sign, or quantile, evens the load out",
    "sign": "a larger --bias_update_rate evens the load out sooner, or --balance=quantile, without limits to groups",
    "quantile": "scores near 0 or 1 leave a bias nothing to choose by: try a lower --muon_lr, or --router_z_loss=1e-3"}


class RoutingAlarm:
    """Experts of a layer that stay without tokens, and an expert that takes more than half of all tokens, for STEADY
    steps in a row: each is told once, until it is over. Counted on the device in every step and looked at where a
    record is made; a start begins anew. Where an even load is half of all tokens already, only the first is told."""

    def __init__(self, config):
        self.config, self.steps_2LE, self.told = config, 0, set()

    def count(self, counts_LE):
        """Add a step, by its token counts of the whole global batch."""
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        crowded_LE = (2 * K * counts_LE > counts_LE.sum(-1, keepdim=True)) & (2 * K < E)
        self.steps_2LE = (self.steps_2LE + 1) * torch.stack((counts_LE == 0, crowded_LE))

    def raised(self):
        """The fields of every event that is new."""
        found = {}
        for kind, layer, expert in (self.steps_2LE >= STEADY).nonzero().tolist():
            found.setdefault((kind, layer), []).append(expert)
        new = [{"layer": self.config.first_k_dense_replace + layer, "experts": experts, "steps": STEADY,
                "trouble": ("no tokens", "more than half of all tokens")[kind], "lever": LEVERS[self.config.balance]}
               for (kind, layer), experts in found.items() if (kind, layer) not in self.told]
        self.told = set(found)
        return new


# ----------------------------------------------------------------------------- W&B

def require_wandb(config):
    """Refuse a setting that needs W&B where it is not installed, before anything begins."""
    if config.wandb in ("online", "offline"):
        try:
            import wandb  # noqa: F401
        except Exception as error:  # a damaged one raises anything
            raise UserError(f"wandb={config.wandb!r} needs the package: pip install wandb, or --wandb=off "
                            f"({said(error)})") from error


def start_wandb(config, folder, run_id):
    """A W&B run, or None. auto never prompts: it asks only whether the package and a login are there."""
    mode = config.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "off")
    if mode in ("off", "disabled"):
        return None
    if mode == "online" and not _logged_in():
        print("warning: W&B has no login (wandb login); going on without it", flush=True)
        return None
    try:
        import wandb
    except ImportError:
        return None
    return wandb.init(project=config.wandb_project, name=config.run_name or folder.name, id=run_id, resume="allow",
                      dir=str(folder), mode=mode, config=vars(config))


def _logged_in():
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    logins = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return logins.is_file() and host in logins.read_text(encoding="utf-8", errors="replace")


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
    panels = [("loss, nats per token", ["loss", "mtp_loss"]), ("learning rate", ["lr"]),
              ("gradient norm", ["grad_norm"]), ("tokens per second", ["tokens_per_second"]),
              ("largest attention logit", ["max_attention_logit"]),
              ("expert load over mean", ["expert_load_max", "expert_load_min"])]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels):
        for key in keys:
            if found := points("train", key):
                axis.plot(*zip(*found), label=key.replace("_", " "), linewidth=1)
        for key, label in (("loss", "validation"), ("ema_loss", "of the average")) if "loss" in keys else ():
            if found := points("val", key):
                axis.plot(*zip(*found), "o-", markersize=3, label=label)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    temporary = folder / ".curves.png"
    try:
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, folder / "curves.png")
    finally:
        pyplot.close(figure)  # pyplot keeps what is not closed
        temporary.unlink(missing_ok=True)
    return folder / "curves.png"


if __name__ == "__main__":
    errors.run(summary)

"""Watching a run: metrics.jsonl, its lines, samples.md, memory, MFU, and what is worth a warning.

metrics.jsonl is always written and is the truth; curves.py draws it, services.py passes it on. None of them can stop a
run: what fails is said once, and how much was lost at the end. Next: curves.py, services.py, terminal.py.
"""

import collections
import json
import math
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

import errors
from data.shards import read_json
from errors import UserError, alike_there, counted, said
from run import curves
from run.services import Service, TensorBoard, start_wandb
from run.terminal import duration

# Dense bf16 peak of the datasheet, FLOP/s, by the device name without NEUTRAL words; MFU is null for what is not here.
PEAK_FLOPS = {"GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12, "H100": 989e12,
              "H100 NVL": 835e12, "H100 PCIE": 756e12, "H800": 989e12, "A100": 312e12, "A100 PCIE": 312e12,
              "A800": 312e12, "A800 PCIE": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
NEUTRAL = re.compile(r"NVIDIA|GEFORCE|SXM\d|\d+GB|HBM3E?")

EVENTS = {  # what is printed of an event
    "routing": "layer {layer}: {trouble} for {steps} steps, experts {experts}: {lever}",
    "straggler": "rank {rank} on {host} is slow in {what}: {seconds:.3f} s, the median is {median:.3f} s",
    "crowding": "{speed:,.0f} tok/s, the best were {best:,.0f}: others work on this machine, its load is {load:.1f} on "
                "{cores} cores. Fewer threads than {threads} lose less then:  OMP_NUM_THREADS=1 {again}"}
SAMPLE, SAMPLE_HEAD = "\n## step {}\n\n~~~\n{}", r"\n## step ([0-9]{1,18})\n\n~~~\n"


def peak_flops(device):
    if device.type != "cuda":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(device).upper())
    return PEAK_FLOPS.get(" ".join(word for word in words if not NEUTRAL.fullmatch(word)))


def memory_gib(device):
    """Peak memory so far: the allocator's on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Pace:
    """How long the rest of a run will take, by the median of its last 128 steps: the first ones, in which compilers are
    at work, and those that hang do not move it. Validations and saves count as they came."""

    def __init__(self):
        self.steps, self.others, self.seconds = 0, 0.0, collections.deque(maxlen=128)
        self.began = self.stopped = time.perf_counter()
        self.newest = []

    def start(self):
        """A step begins."""
        self.started = time.perf_counter()

    def stop(self):
        """It has ended; what comes before the next start is something else."""
        now = time.perf_counter()
        self.add(now - self.started, self.started - self.stopped)
        self.newest.append(now - self.started)
        self.stopped = now

    def passed(self):
        """Seconds of all, validations and saves too."""
        return time.perf_counter() - self.began

    def mean(self):
        """Mean seconds of the steps that have stopped since the last call."""
        newest, self.newest = self.newest, []
        return statistics.fmean(newest)

    def add(self, step_seconds, other_seconds=0.0):
        """A step has taken so long, and what else happened since the one before."""
        self.steps, self.others = self.steps + 1, self.others + other_seconds
        self.seconds.append(step_seconds)

    def usual(self):
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def left(self, steps):
        """Seconds for so many more steps."""
        return steps * (self.usual() + self.others / self.steps)


class RunLog:
    """Appends records to metrics.jsonl, and passes them on, and texts to samples.md. Opening it at `step` drops what an
    interrupted run wrote beyond that step. Of many ranks only one is active: the others only make records."""

    def __init__(self, folder, config, step, run_id, active=True):
        self.folder, self.path, self.services = Path(folder), Path(folder) / "metrics.jsonl", []
        self.active, self.lost, self.drawn, self.drawing = active, collections.Counter(), -math.inf, 0.0
        if not active:
            self.file = open(os.devnull, "w", encoding="utf-8")
            return
        records, samples = read_records(self.path), []
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        backlog = [record for record in records if record["step"] <= step]
        for count, what, why in (
                (len(records) - len(backlog), "record",
                 f", and the samples, beyond step {step}: these steps are done again"),
                (sum(map(bool, lines)) - len(records), "line", " without a record, as a kill leaves them")):
            if count:
                print(f"metrics.jsonl: dropped {counted(count, what)}{why}")
        replace_text(self.path, lines_up_to(self.path, step))
        if (path := self.folder / "samples.md").exists():
            samples = self.attempt("samples.md", lambda: cut_samples(path, step)) or []
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # a line at a time: a kill loses at most one
        progress = step, max([record["step"] for record in records], default=0), samples
        self.services = [Service("W&B", lambda: start_wandb(config, self.folder, run_id, *progress), backlog)]
        if config.tensorboard:
            self.services.append(Service("TensorBoard", lambda: TensorBoard(self.folder), backlog))

    def write(self, kind, step, **fields):
        """Append {"kind", "step", "time", **fields}; time: seconds since 1970 (UTC). Non-finite numbers become null,
        which JSON can hold. Returns the record."""
        fields = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in fields.items()}
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **fields}
        self.attempt("metrics.jsonl", lambda: self.file.write(json.dumps(record) + "\n"))
        for service in self.services:
            service.put(record)
        return record

    def event(self, step, event, **fields):
        """A record of kind event, and its line."""
        self.write("event", step, event=event, **fields)
        print(f"step {step}: {EVENTS[event].format(**fields)}", flush=True)

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

    def draw(self, final=False):
        """Draw curves.png, but for a hundredth of the time at most: a long run's picture may wait, not its last one."""
        started = time.monotonic()
        if self.active and (final or started > self.drawn + 100 * self.drawing):
            self.attempt("curves.png", lambda: draw_curves(self.folder))
            self.drawn, self.drawing = time.monotonic(), time.monotonic() - started

    def sample(self, step, prompt, text):
        if not self.active or text is None:
            return
        path = self.folder / "samples.md"

        def append():
            with open(path, "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.write(("" if file.tell() else "# Samples\n") + SAMPLE.format(step, f"{prompt}{text}\n~~~\n"))
        self.attempt("samples.md", append)
        for service in self.services:
            service.put({"kind": "sample", "step": step, "time": time.time(), "text": readable(prompt + text)})

    def close(self):
        self.attempt("metrics.jsonl", self.file.close)
        for service in self.services:
            service.close()
        for what, count in self.lost.items():
            print(f"warning: {what}: {counted(count, 'time')} nothing could be written", flush=True)
        self.lost.clear()


def cut_samples(path, step):
    """Leave only the samples up to a step in a samples.md; returns them, [(step, text)]."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 stay what they are
    head, *parts = re.split(SAMPLE_HEAD, text)  # numbers and texts take turns
    kept = [(number, text) for number, text in zip(parts[::2], parts[1::2]) if int(number) <= step]
    replace_text(path, head + "".join(SAMPLE.format(*sample) for sample in kept))
    return [(int(number), readable(text.rstrip().removesuffix("~~~"))) for number, text in kept]


def readable(text):
    """A text without the bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def replace_text(path, text):
    """Give a small file a new content, the old or the new one at every instant, even if the machine loses power."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:
        file.write(text.encode("utf-8", "surrogateescape"))
        file.flush()
        os.fsync(file.fileno())
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


def expert_statistics(counts_LE, biases_LE):
    """The record fields about routing, from one step's token counts of the MoE layers; None where nothing is routed."""
    if counts_LE.numel() == 0:
        return dict.fromkeys(("expert_load_max", "expert_load_min", "dead_experts", "router_bias_std"))
    load_LE = counts_LE.float() / counts_LE.float().mean(-1, keepdim=True)
    return {"expert_load_max": load_LE.max().item(), "expert_load_min": load_LE.min().item(),
            "dead_experts": int((counts_LE == 0).sum()), "router_bias_std": biases_LE.std(-1).mean().item()}


def layers_interval(config):
    """Steps between records of all layers: some two hundred a run, where records of the run are made."""
    return config.log_interval * -(-config.max_steps // (200 * config.log_interval))


def layer_statistics(counts_LE, max_logits_LH):
    """The fields of a record of kind "layers": the tokens of every expert over the mean of its layer, from one step's
    counts of the MoE layers, and the largest attention logit of every layer, dense ones too."""
    load_LE = counts_LE / counts_LE.float().mean(-1, keepdim=True)
    logits = max_logits_LH.amax(-1).tolist()
    return {"expert_load": [[round(load, 2) for load in layer] for layer in load_LE.tolist()],
            "max_attention_logits": [round(logit, 3) if math.isfinite(logit) else None for logit in logits]}


class Crowding:
    """Tells, once, that a run on a CPU has become slow because others want its cores: threads that wait for each other
    then lose more than their share."""

    def __init__(self, device):
        self.best, self.told = 0.0, device.type != "cpu"

    def found(self, speed):
        """The fields of an event if tokens/s have fallen to a third of the best while the load exceeds the cores."""
        self.best = max(self.best, speed)
        load, cores, threads = os.getloadavg()[0], os.cpu_count(), torch.get_num_threads()
        if self.told or 3 * speed > self.best or load <= cores or threads == 1:
            return []
        self.told = True
        return [{"speed": speed, "best": self.best, "load": load, "cores": cores, "threads": threads}]


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


# ----------------------------------------------------------------------------- pictures and the command

def draw_curves(folder):
    """Draw curves.png of what a run has recorded; returns its path."""
    folder = Path(folder)
    settings = read_json(folder / "config.json").get("settings") if (folder / "config.json").exists() else None
    clips = isinstance(settings, dict) and settings.get("optimizer") == "muonclip"
    return curves.draw(folder, read_records(folder / "metrics.jsonl"), settings.get("qk_clip_tau") if clips else None)


def command(argv):
    """For python -m run.metrics RUN_FOLDER ...: how far each run is and its newest losses, a line each; of several, a
    picture that lays them on top of each other."""
    parser = errors.ArgumentParser(prog="python -m run.metrics", description=command.__doc__)
    parser.add_argument("folders", nargs="*", default=["."], metavar="RUN_FOLDER", help="at least one")
    parser.add_argument("--out", help="the picture; not given: overlay.png in the folder that holds all of them")
    args, runs = parser.parse_args(argv), {}
    for folder in args.folders:
        runs[folder] = read_records(Path(folder) / "metrics.jsonl")
        newest = {record["kind"]: record for record in runs[folder]}
        if "train" not in newest:
            raise UserError(f"{folder}: no metrics.jsonl with steps{alike_there(folder)} (python -m run.metrics RUN)")
        found = newest["train"].get("loss"), *map(newest.get("val", {}).get, ("loss", "bits_per_byte"))
        loss, val, bits = ("-" if value is None else f"{value:.5g}" for value in found)
        print(f"{folder}: step {newest['train']['step']}  loss {loss}  validation {val}  bits per byte {bits}")
    if len(runs) > 1:
        parents = [str(Path(folder).resolve().parent) for folder in runs]
        print(curves.overlay(Path(args.out or os.path.join(os.path.commonpath(parents), "overlay.png")), runs))


if __name__ == "__main__":
    errors.run(command)

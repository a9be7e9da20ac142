"""Where the records of a run go besides its folder: W&B and TensorBoard, each in a thread of its own.

metrics.jsonl is the truth. A service first gets of it what it lacks, so that a run that was resumed, or watched from
its middle on, stands there with every step once. A run that was rewound is another one for W&B (run/folder.py), with
the same group. A service may fail or hang: the run waits for it only at its end, and not for long. Next: metrics.py.
"""

import os
import queue
import shutil
import threading
from pathlib import Path

from errors import UserError, said

PATIENCE = 60.0  # seconds that a run waits for a service at its end
MOST_SAMPLES = 200  # in W&B's table, the newest: it is uploaded anew with every sample


class Service:
    """Gets records, the backlog first, from the step on that the service wants first."""

    def __init__(self, name, start, backlog):
        """start makes the service: an object with `first`, log(record) and finish(); None is no service."""
        self.name, self.records = name, queue.SimpleQueue()  # None: the last has come
        self.thread = threading.Thread(target=self._work, args=(start, backlog), daemon=True)
        self.thread.start()

    def put(self, record):
        if self.thread.is_alive():
            self.records.put(record)

    def close(self):
        self.records.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            print(f"warning: {self.name} does not answer; going on without its last lines", flush=True)

    def _work(self, start, backlog):
        doing = "start"
        try:
            if (service := start()) is not None:
                doing = "go on"
                for records in (backlog, iter(self.records.get, None)):
                    for record in records:
                        if record["step"] >= service.first:
                            service.log(record)
                service.finish()
        except (Exception, SystemExit) as error:  # a logging service must not cost a training run
            print(f"warning: {self.name} did not {doing} ({said(error)}); the run goes on without it", flush=True)


def numbers(record):
    """{name: number} of a record as services show it: train/loss, task/piqa/accuracy."""
    under = f"task/{record.get('task')}" if record["kind"] == "task" else record["kind"]
    return {f"{under}/{key}": value for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "time")}


def require(config):
    """Refuse a setting that needs a package which is not installed, before anything begins."""
    setting, name, off = f"wandb={config.wandb!r}", "wandb", "--wandb=off"
    try:
        if config.wandb in ("online", "offline"):
            import wandb  # noqa: F401
        setting, name, off = "tensorboard", "tensorboard", "--no-tensorboard"
        if config.tensorboard:
            from torch.utils import tensorboard  # noqa: F401
    except Exception as error:  # a damaged one raises anything
        raise UserError(f"{setting} needs the package: pip install {name}, or {off} ({said(error)})") from error


# ----------------------------------------------------------------------------- W&B

class WandB:
    """A run of W&B, with a table of the samples."""

    def __init__(self, wandb, config, folder, run_id, mode, start, newest, samples):
        """start: the step that training goes on from; newest: the last one that was recorded before that; samples:
        [(step, text)] so far."""
        self.wandb, self.samples = wandb, samples
        name = config.run_name or folder.name
        homes = [folder, folder.parent.parent] if folder.parent.name == "aside" else [folder]  # what is set aside keeps
        earlier = [path for home in homes for path in (home / "wandb").glob(f"offline-run-*-{run_id}")]  # the run's id
        self.run = wandb.init(
            project=config.wandb_project, name=name, id=run_id, resume="allow", dir=str(folder), mode=mode,
            group=config.wandb_group or name, tags=config.wandb_tags or None, config=vars(config))
        # Offline nobody knows what an earlier start has written but metrics.jsonl.
        self.first = self.run.step if mode != "offline" else max(start, newest) + 1 if earlier else 0

    def log(self, record):
        """Steps only rise in W&B: one it has already is not sent again."""
        if record["kind"] == "sample":
            self.samples = [*self.samples, (record["step"], record["text"])][-MOST_SAMPLES:]
            table = self.wandb.Table(columns=["step", "text"], data=list(map(list, self.samples)))
            self.run.log({"samples": table}, step=record["step"])
        elif found := numbers(record):
            self.run.log(found, step=record["step"])

    def finish(self):
        self.run.finish()


def start_wandb(config, folder, run_id, *progress):
    """A WandB, or None. auto never prompts: it asks only whether the package and a login are there."""
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
    return WandB(wandb, config, folder, run_id, mode, *progress)


def _logged_in():
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    logins = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return logins.is_file() and host in logins.read_text(encoding="utf-8", errors="replace")


# ----------------------------------------------------------------------------- TensorBoard

class TensorBoard:
    """Event files in tensorboard/ of the run folder, made anew of the records by every start."""
    first = 0

    def __init__(self, folder):
        from torch.utils.tensorboard import SummaryWriter
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(folder / "tensorboard", flush_secs=10)

    def log(self, record):
        if record["kind"] == "sample":
            self.writer.add_text("sample", f"```\n{record['text']}\n```", record["step"])
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def finish(self):
        self.writer.close()

"""A run's folder: what a new or a resumed run may do with it, and what is written before the first step.

What can be refused is refused before anything is written or deleted: a folder that holds another run, a checkpoint of
another model, tokenizer or data, a disk that is too small. Next: train.py, which asks in this order.
"""

import dataclasses
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import checkpoint
import guard
import metrics
import parallel
from data import tokenizer
from data.shards import read_json
from errors import STOPPED, UserError
from model import ModelConfig

FREE = {"aux_loss_alpha", "z_loss", "initializer_range", "max_position_embeddings"}  # of the model, without a tensor
PLAIN = {"out_dir", "run_name", "resume", "overwrite", "skip_sequences", "max_rollbacks", "new_data", "wandb",
         "wandb_project"}


def find_source(run, config):
    """The step folder to resume from, None for a new run."""
    if config.resume == "auto":
        return checkpoint.find(run) if parallel.once(checkpoint.step_folders, run / "checkpoints") else None
    return checkpoint.find(run if config.resume is True else config.resume) if config.resume else None


def refuse_to_mix(run, source, config):
    """An out_dir that holds a run is for going on with that run, unless told otherwise."""
    if holds_run(run) and not is_within(source, run) and not config.overwrite and config.resume != "auto":
        raise UserError(f"{run} holds a run already: continue it with --resume, start anew with --overwrite, or choose "
                        "another --out_dir")


def holds_run(folder):
    return (folder / "config.json").exists() or (folder / "checkpoints").exists()


def is_within(source, run):
    """Whether the step folder to resume from, if any, is one of this run's own."""
    return source is not None and run.resolve() in source.resolve().parents


def compare(config, encoder, stream, manifest, source):
    """What differs between a checkpoint and this run, a line each, where a run may change it. A UserError lists what it
    may not: the model, the tokenizer and, unless new_data says so, what decides which sequence comes when."""
    stored, now = manifest["config"], dataclasses.asdict(config)
    model = {field.name for field in dataclasses.fields(ModelConfig)} - FREE
    differing = {name: f"{name}: {stored[name]} there, {now[name]} here"
                 for name in now if name in stored and stored[name] != now[name]}
    refused = [line for name, line in differing.items() if name in model]
    if encoder and manifest.get("tokenizer") not in (None, tokenizer.fingerprint(encoder)):
        refused.append("another tokenizer there")
    if refused:
        raise UserError(f"{source} holds another model: {'; '.join(refused)}. Continue with the settings it was "
                        "trained with, or start anew without --resume")
    before, identity = {"packing": "concat", **manifest.get("stream", {})}, stream.identity()
    other = [f"{name}: {before[name]} there, {identity[name]} here"
             for name in identity if name in before and not _same(before[name], identity[name])]
    if other and not config.new_data:
        raise UserError(f"{source} was trained on another stream of data: {'; '.join(other)}. Continue on the data and "
                        "settings it had; or accept with --new_data that text is repeated or left out")
    return other + [line for name, line in differing.items() if name not in model | PLAIN | identity.keys()]


def _same(before, now):
    """Whether two identities of a stream agree. Folders may have moved: what counts is what they hold, in order."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return before == now
    return len(before) == len(now) and all(a == b for pair in zip(before.values(), now.values()) for a, b in zip(*pair))


def require_room(run, source, n_bytes, steps, config):
    """Refuse a run whose checkpoints, of n_bytes each, the disk cannot hold, or whose folder cannot be written.
    steps: how many are still to come."""
    folder = run / "checkpoints"
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise UserError(f"{run} cannot be written ({error.strerror}): choose another --out_dir") from error
    present = checkpoint.step_folders(folder)
    staying = [path for path in present if not rewound(config) or path.name <= source.name] \
        if is_within(source, run) else []
    taken = lambda paths: sum(file.stat().st_size for path in paths for file in path.iterdir())
    free += taken(present) - taken(staying)
    saves = -(-steps // config.save_interval) if config.save_interval else 1
    most = config.keep_checkpoints + 1 + bool(config.eval_interval)  # one more while it is written; the best
    need = max(min(saves + len(staying), most) * n_bytes - taken(staying), n_bytes) if steps > 0 else 0
    if need > free:
        gb = lambda n: f"{n / 1e9:,.2f} GB"
        raise UserError(f"{run}: its checkpoints, of {gb(n_bytes)} each, will need {gb(need)} more, but only "
                        f"{gb(free)} are free: make room, choose another --out_dir, lower --keep_checkpoints or set "
                        "--save_interval=0")


def rewound(config):
    """Whether a run starts from a step that was named, rather than from the newest."""
    return type(config.resume) is str and checkpoint.STEP.search(config.resume.rstrip("/")) is not None


def roll_back(run, reason, step, sequences, config, watch, log):
    """Start again from the newest checkpoint, leaving out the sequences since; returns if there is none. sequences: how
    many the run has read. Where a signal has come, the next start will meet the same trouble, and go back then."""
    if not parallel.once(checkpoint.step_folders, run / "checkpoints"):
        return
    if watch.agreed:
        log.close()
        raise SystemExit(STOPPED)
    source = checkpoint.find(run)
    manifest = parallel.once(checkpoint.read_manifest, source)
    skipped = sequences - manifest["sequences"]
    log.write("event", manifest["step"], event="rollback", reason=reason, from_step=step, source=str(source),
              sequences=[manifest["sequences"], sequences])
    print(f"step {step}: {reason}: back to {source}, leaving out {skipped} sequences", flush=True)
    log.close()
    raise parallel.Restart([*watch.words, f"--resume={source}", f"--skip_sequences={skipped}", "--no-overwrite",
                            f"--max_rollbacks={config.max_rollbacks - 1}"])  # later words win


def open_run(run, source, start, config, config_file, argv, encoder):
    """Make the run folder, or clear away what a new or rewound run replaces; returns the run's id. Only now, when
    everything that could be refused has been."""
    if config.overwrite and holds_run(run) and not is_within(source, run):
        shutil.rmtree(run / ".deleted", ignore_errors=True)
        if (run / "checkpoints").is_dir():
            os.rename(run / "checkpoints", run / ".deleted")  # at once: half a deletion would look like a run
        for path in run.iterdir():
            if path.name != guard.LOCK:  # which this process holds
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_id = provenance(run, config, config_file, argv)
    if encoder:
        tokenizer.save(encoder, run / "tokenizer")
    if source:
        checkpoint.drop_after(run / "checkpoints", start, rewound(config))
    return run_id


def provenance(run, config, config_file, argv):
    """Write config.json: settings, versions, commit and command. Returns the run's id, which a resumed run keeps."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "config.json"
    earlier = read_json(path) if path.exists() else {}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    about = {"run_id": earlier.get("run_id", secrets.token_hex(4)), "config_file": config_file, "command": argv,
             "commit": commit, "torch": torch.__version__, "python": platform.python_version(),
             "settings": dataclasses.asdict(config)}
    metrics.replace_text(path, json.dumps(about, indent=1) + "\n")
    return about["run_id"]

"""A run's folder: what a new or a resumed run may do with it, and what is written before the first step.

What can be refused is refused before anything is written or deleted: a folder that holds another run, a checkpoint of
another model, tokenizer or data, a disk that is too small. What a rewind leaves behind is set aside, as a run of its
own in aside/. Next: ../train.py, which asks in this order.
"""

import dataclasses
import datetime
import itertools
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import hf
from data import tokenizer
from data.shards import read_json
from errors import STOPPED, UserError, counted
from model import ModelConfig
from muon import SCHEDULE, schedule_factor
from ranks import parallel
from run import checkpoint, guard, metrics

# Of the model, what a resumed run may change, with a line: a stage of longer context the first three, which keeps its
# optimizer state; the next are weights in the loss, as rates are, and how router biases move; the last is spent at step
# 0. All else holds a tensor, or is the function that the tensors were trained in (num_experts_per_tok, rms_norm_eps).
FREE = {"rope_theta", "rope_scaling", "max_position_embeddings", "aux_loss_alpha", "z_loss", "router_z_loss", "balance",
        "initializer_range"}
LOGS = ("metrics.jsonl", "samples.md", "curves.png")
LAUNCH = [platform.node(), os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun's, in manifests
UNFINISHED = ".unfinished"  # in a folder of aside/, until all is there: the records that the run itself keeps
WRITTEN = ["checkpoints", *LOGS, "config.json", "tokenizer", "stacks", "wandb", "tensorboard", "aside", "profile"]
PLAIN = {"out_dir", "run_name", "resume", "overwrite", "skip_sequences", "max_rollbacks", "new_data", "wandb",
         "wandb_project", "wandb_group", "wandb_tags", "tensorboard", "verbose", "dry_run", "profile_steps"}


def find_source(run, config):
    """The step folder to resume from, None for a new run."""
    parallel.once(refuse_unfinished if config.dry_run else finish_setting_aside, run)
    repeated = any(parallel.from_all(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))  # nodes count by themselves
    if repeated and config.resume != "auto" and not parallel.starts() and (own := parallel.once(saved_by_launch, run)):
        print(f"started again by torchrun: going on with {own}, which it has saved, whatever its words say")
        config.resume, config.overwrite, config.skip_sequences = "auto", False, 0
    if rewound(config):
        parallel.once(require_step, Path(config.resume))
    source = None
    if config.resume and (config.resume != "auto" or parallel.once(checkpoint.step_folders, run / "checkpoints")):
        source = checkpoint.find(run if config.resume in (True, "auto") else config.resume)
    if config.router_is_idle():
        print("warning: num_experts_per_tok=1 with norm_topk_prob: the routers learn nothing from the loss")
    if source is None:  # what only a model that is there already may be
        dataclasses.replace(config, resume=False).check()
    return source


def saved_by_launch(run):
    """The newest checkpoint, if it is whole and this launch of torchrun has saved it."""
    newest = checkpoint.step_folders(run / "checkpoints")[-1:]
    sound = newest and not checkpoint.damage_alone(newest[0], checksums=False)
    return newest[0] if sound and checkpoint.read_manifest(newest[0]).get("launch") == LAUNCH else None


def refuse_to_mix(run, source, config):
    """An out_dir that holds a run is for going on with that run, unless told otherwise."""
    if not (run / "checkpoints").exists() and hf.is_hf(run):
        raise UserError(f"{run} holds an exported model: choose another --out_dir")
    if config.overwrite and source and not is_within(source, run) and run.resolve() in source.resolve().parents:
        raise UserError(f"--overwrite would delete {source}, which is to be continued: choose another --out_dir")
    if holds_run(run) and not is_within(source, run) and not config.overwrite and config.resume != "auto":
        raise UserError(f"{run} holds a run already: start anew with --overwrite, choose another --out_dir, or go on "
                        f"with it:  {guard.command(run)}" + f"; {source} goes on in its own folder without the config "
                        "file on the line" * (source is not None))


def holds_run(folder):
    return (folder / "config.json").exists() or (folder / "checkpoints").exists()


def is_within(source, run):
    """Whether the step folder to resume from, if any, is one of this run's own."""
    return source is not None and source.resolve().parent == (run / "checkpoints").resolve()


def require_step(folder):
    """Refuse a step folder that was named and is not there, with those that are."""
    if not folder.is_dir():
        there = ", ".join(path.name for path in checkpoint.step_folders(folder.parent)) or "none"
        kept = sorted(map(str, folder.parent.parent.glob(f"aside/*/checkpoints/{folder.name}")))
        raise UserError(f"no checkpoint {folder}; "
                        + (f"it was set aside: --resume={kept[-1]}" if kept else f"there are {there}"))


def compare(config, encoder, stream, manifest, source):
    """What differs between a checkpoint and this run, a line each, where a run may change it. A UserError lists what it
    may not: the model, the tokenizer and, unless new_data says so, what decides which sequence comes when."""
    for name in {*SCHEDULE, "muon_lr"} & manifest["config"].keys():  # of which the rates are computed
        there = manifest["config"][name]
        if isinstance(getattr(config, name), int | float) and not isinstance(there, int | float | None):
            raise UserError(f"{source}: its manifest is damaged: it has {name}={there!r}, no number: name another step")
    stored, now = _resolved(manifest["config"]), _resolved(dataclasses.asdict(config))
    model = {field.name for field in dataclasses.fields(ModelConfig)} - FREE
    differing = {name: f"{name}: {stored[name]} there, {now[name]} here"
                 for name in now if name in stored and stored[name] != now[name]}
    refused = [line for name, line in differing.items() if name in model]
    if encoder and manifest.get("tokenizer") not in (None, tokenizer.fingerprint(encoder)):
        refused.append("another tokenizer there")
    if refused:
        raise UserError(f"{source} holds another model or optimizer: {'; '.join(refused)}. Continue with the settings "
                        "that it was trained with, or start anew without --resume")
    other = other_stream(stream, manifest)
    if other and not config.new_data:
        raise UserError(f"{source} was trained on another stream of data: {'; '.join(other)}. Continue on the data and "
                        "settings it had; or accept with --new_data that this one is read from its beginning")
    unknown = [f"{name}: {stored[name]} there, unknown to this version" for name in stored if name not in now]
    silent = model | PLAIN | stream.identity().keys()
    return other + [line for name, line in differing.items() if name not in silent] + unknown


def other_stream(stream, manifest):
    """What makes a stream of data another one than that of a checkpoint, a line each."""
    before, identity = {"packing": "concat", **manifest.get("stream", {})}, stream.identity()
    return [f"{name}: {before[name]} there, {identity[name]} here"
            for name in identity if name in before and not _same(before[name], identity[name])]


def _resolved(settings):
    """Settings with the length of wsd's decay as a number, as schedule_factor uses it."""
    fifth = settings.get("max_steps", 0) // 5
    return settings | ({"decay_steps": fifth} if settings.get("decay_steps", 0) is None else {})


def rates(stored, config, start):
    """What becomes of the learning rate of a run that was trained with the settings `stored` and goes on from a step,
    in words, and how to keep it if it jumps; "" if the schedule is the same."""
    now, names = dataclasses.asdict(config), {*SCHEDULE, "muon_lr"}
    if not start or not names <= stored.keys() or all(stored[name] == now[name] for name in names):
        return ""

    def rate(settings, step, peak="muon_lr"):
        return settings[peak] * schedule_factor(min(step, settings["max_steps"]), *map(settings.get, SCHEDULE))
    before, due, after, end = rate(stored, start), rate(stored, start + 1), rate(now, start + 1), now["max_steps"]
    said = (f"learning rate: {before:.2e} at step {start}, {after:.2e} at step {start + 1}, at most "
            f"{now['muon_lr']:.2e}, {rate(now, end):.2e} at step {end}")
    if abs(after - due) <= 0.01 * due:
        return said
    keep = f"--warmup_steps=0 --muon_lr={before:.6g}"
    if stored.get("adamw_lr") is not None:
        keep += f" --adamw_lr={rate(stored, start, 'adamw_lr'):.6g}"
    return (f"warning: {said}. To hold {before:.2e}: --schedule=constant {keep}; to let it fall from there to the end: "
            f"--schedule=wsd --decay_steps={end - start} {keep}")


def data_read(identity, tokens, before):
    """{a data folder by what it holds: tokens read from it} after so many tokens of a stream, and those before it."""
    shares = dict(zip(data_keys(identity), (share for _, share, _ in identity.get("data", {}).values())))
    return before | {key: before.get(key, 0) + tokens * share / sum(shares.values()) for key, share in shares.items()}


def data_keys(identity):
    return [f"{size} tokens, {fingerprint}" for size, _, fingerprint in identity.get("data", {}).values()]


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
    within = is_within(source, run)
    if within and rewound(config) and os.stat(folder).st_dev != os.stat(run).st_dev:
        raise UserError(f"{folder} lies on another disk than {run}, so what is beyond {source.name} cannot be set "
                        "aside: choose another --out_dir for the new branch")
    replaced = (folder, run / "aside") if config.overwrite and not within else ()
    free += sum(map(bytes_in, replaced))  # what a rewind sets aside stays on the disk
    staying = [path for path in checkpoint.step_folders(folder) if path.name <= source.name] if within else []
    taken = sum(map(bytes_in, staying))
    saves = -(-steps // config.save_interval) if config.save_interval else 1
    most = config.keep_checkpoints + 1 + bool(config.eval_interval)  # one more while it is written; the best
    need = max(min(saves + len(staying), most) * n_bytes - taken, n_bytes) if steps > 0 else 0
    if need > free:
        raise UserError(f"{run}: its checkpoints, of {size(n_bytes)} each, will need {size(need)} more, but only "
                        f"{size(free)} are free: make room, lower --keep_checkpoints or set --save_interval=0")


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size(n_bytes):
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:,.2f} MB"


def rewound(config):
    """Whether a run starts from a step that was named, rather than from the newest."""
    return type(config.resume) is str and checkpoint.STEP.search(Path(config.resume).name) is not None


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
    print(f"step {step}: {reason}: back to {source}, leaving out {counted(skipped, 'sequence')}", flush=True)
    log.close()
    raise parallel.Restart([*watch.words, f"--resume={source}", f"--skip_sequences={skipped}", "--no-overwrite",
                            f"--max_rollbacks={config.max_rollbacks - 1}"])  # later words win


def open_run(run, source, start, changed, config, config_file, argv, encoder):
    """Make the run folder, or put away what a new or rewound run replaces. Only now, when everything that could be
    refused has been. Returns (the run's id, the folder of what was set aside or None)."""
    within = is_within(source, run)
    if config.overwrite and holds_run(run) and not within:
        delete(run)
    aside = put_away(run, start, rewound(config), changed) if within else None
    run_id = provenance(run, config, config_file, argv)
    if encoder:
        tokenizer.save(encoder, run / "tokenizer")
    return run_id, aside


def delete(run):
    """Delete a run, and nothing that no run writes."""
    steps, kept = checkpoint.step_folders(run / "checkpoints"), len(list(run.glob("aside/*")))
    for path in map(run.joinpath, WRITTEN):
        if path.exists():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    print(f"--overwrite: deleted the run in {run}: {counted(len(steps), 'checkpoint')}"
          + (f", up to {steps[-1].name}" if steps else "")
          + f", and {counted(kept, 'branch', 'branches')} set aside" * bool(kept))


# ---------------------------------------------------------------------- what a rewind leaves behind

def put_away(run, step, by_name, changed):
    """Clear the way of a run that continues from `step`; returns the folder of what was set aside, or None. Where the
    step was named, what lies beyond it is a branch and set aside. Otherwise the checkpoints beyond were passed over as
    damaged and become damaged_step_..., and the records matter only if something has `changed`."""
    beyond = [path for path in checkpoint.step_folders(run / "checkpoints") if checkpoint.step_of(path) > step]
    records = [record for record in metrics.read_records(run / "metrics.jsonl") if record["step"] > step]
    for path in beyond if not by_name else ():
        os.rename(path, damaged := unused(path.with_name(f"damaged_{path.name}")))
        print(f"{path} is kept as {damaged.name}")
    aside = None
    if by_name and beyond or records and (by_name or changed):
        reached = max([record["step"] for record in records] + [checkpoint.step_of(path) for path in beyond])
        aside = set_aside(run, unused(run / f"aside/step_{step:08d}_to_{reached:08d}"), step)
    point_at_what_is_there(run)
    return aside


def unused(path):
    return next(name for n in itertools.count(1)
                if not (name := path if n == 1 else path.with_name(f"{path.name}-{n}")).exists())


def set_aside(run, folder, step):
    """Give what a run holds beyond a step a folder of its own, a run like any other, and say so. A kill at any instant
    loses nothing: first come copies, which get their name when they are whole; then checkpoints move, the newest first,
    which the next start would go on with; and at the end the records that the run keeps take their place."""
    temporary, copied = run / "aside/.copies", {*LOGS, "config.json", "tokenizer"}
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run, temporary, ignore=lambda place, names: set(names) - copied if Path(place) == run else ())
    (temporary / "checkpoints").mkdir()
    metrics.replace_text(temporary / UNFINISHED, metrics.lines_up_to(run / "metrics.jsonl", step))
    os.rename(temporary, folder)
    finish_setting_aside(run)
    return folder


def refuse_unfinished(run):
    """A dry run writes nothing, and what a kill left half done has to be finished before anything is looked at."""
    if any(run.glob(f"aside/step_*/{UNFINISHED}")):
        raise UserError(f"{run} was on its way back to an earlier step when its process ended: going on with it "
                        "finishes that, which a dry run may not")


def finish_setting_aside(run):
    for kept in run.glob(f"aside/step_*/{UNFINISHED}"):
        folder, step = kept.parent, int(kept.parent.name.split("_")[1])
        for path in reversed(checkpoint.step_folders(run / "checkpoints")):
            if checkpoint.step_of(path) > step:
                os.rename(path, folder / "checkpoints" / path.name)
        for place in (folder, run):
            point_at_what_is_there(place)
        # W&B cannot take back what it has of the branch: that keeps the id, and the run goes on as another.
        about = read_json(run / "config.json") | {"run_id": secrets.token_hex(4)}
        metrics.replace_text(run / "config.json", json.dumps(about, indent=1) + "\n")
        os.replace(kept, run / "metrics.jsonl")
        moved = len(checkpoint.step_folders(folder / "checkpoints"))
        print(f"set aside what {run} holds beyond step {step}: {counted(moved, 'checkpoint')}, records and samples, "
              f"{size(bytes_in(folder))} in {folder}; delete it when you do not need it"
              + f", or go on with it:  {guard.command(folder)}" * bool(moved))


def point_at_what_is_there(run):
    """Make `latest` name the newest checkpoint, and `best` that with the lowest validation loss where one is known, of
    those since `best`, as before that may be another stage; where there is none, the pointer goes."""
    folder, losses = run / "checkpoints", validation_losses(run)
    left, best = checkpoint.step_folders(folder), checkpoint.pointed(folder, "best")
    known = [path for path in left if checkpoint.step_of(path) in losses and not (best and path.name < best.name)]
    best = min(known, key=lambda path: losses[checkpoint.step_of(path)], default=best)
    for name, target in (("latest", left[-1] if left else None), ("best", best)):
        if target:
            checkpoint.point(folder, name, target)
        else:
            (folder / name).unlink(missing_ok=True)


def validation_losses(run):
    return {record["step"]: record["loss"] for record in metrics.read_records(run / "metrics.jsonl")
            if record["kind"] == "val" and type(record.get("loss")) is float}


def best_loss(run, otherwise, stream=None, validation=None):
    """The validation loss of the checkpoint that `best` names; otherwise: if not recorded. None if there is none, or if
    it was validated on another stream, or other windows, than this run is: such losses cannot be compared."""
    best = checkpoint.pointed(run / "checkpoints", "best")
    if best and stream and not checkpoint.damage_alone(best, checksums=False):
        manifest = checkpoint.read_manifest(best)
        if other_stream(stream, manifest) or manifest.get("validated_on", validation.windows) != validation.windows:
            return None
    return validation_losses(run).get(checkpoint.step_of(best), otherwise) if best else None


def provenance(run, config, config_file, argv):
    """Write config.json: settings, versions, commit, the first command and all with their times, the working folder;
    what else it held, as from an import, stays. Returns the run's id, which a resumed run keeps."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "config.json"
    earlier = read_json(path) if path.exists() else {}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, encoding="utf-8", errors="replace").stdout.strip() \
        if shutil.which("git") else ""
    commands = earlier.get("commands", [{"words": earlier["command"], "time": None}] if "command" in earlier else [])
    now = {"words": argv, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    about = earlier | {
        "run_id": earlier.get("run_id", secrets.token_hex(4)), "config_file": config_file or earlier.get("config_file"),
        "command": earlier.get("command", argv), "commands": [*commands, now], "directory": os.getcwd(),
        "commit": commit or None, "torch": torch.__version__, "python": platform.python_version(),
        "settings": dataclasses.asdict(config)}
    if parallel.starts():  # those that are left are for this start alone
        about["settings"]["max_rollbacks"] = earlier.get("settings", {}).get("max_rollbacks", config.max_rollbacks)
    metrics.replace_text(path, json.dumps(about, indent=1) + "\n")
    return about["run_id"]

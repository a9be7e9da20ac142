"""Checkpoints: torch.distributed.checkpoint inside a commit protocol that a crash at any instant cannot break.

A step folder is written beside its place, flushed to disk, given a manifest with the size and CRC32 of every file,
and renamed: it is complete or absent. Tensors are the model's state and the optimizer's, by name; everything else
(step, settings, counters) is JSON in the manifest. Random state is not saved: every random choice in a run is a
function of the seed and the step. Nothing is unpickled except DCP's own index, and that by a reader that knows a
dozen harmless types.

Over many ranks each writes and reads its own parts, in a file of its own, and all agree on every outcome; what was
saved on one layout loads on any other, because DCP knows where in the whole tensor each part lies.

    checkpoints/step_00000500/{manifest.json, .metadata, __0_0.distcp, ...}    checkpoints/latest    checkpoints/best
"""

import errno
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from data.shards import file_crc32, read_json
from errors import UserError, counted, progress
from ranks import parallel

STEP = re.compile(r"\Astep_(\d{8})\Z")  # the whole name: a run may be called debug_step_00000003
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process without a group is meant


# ----------------------------------------------------------------------------- writing

def named_tensors(model, optimizer=None):
    """Everything that a checkpoint keeps as tensors, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        tensors |= {f"optim.{name}": tensor for name, tensor in optimizer.named_state().items()}
    return tensors


def size(tensors):
    """Bytes that a checkpoint of these tensors takes, on any layout."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def save(folder, step, tensors, about, keep, best=False, group=None):
    """Write step_<step> under `folder`, point `latest` (and `best`) to it, delete what `keep` does not cover; returns
    the step folder. All ranks call it together.

    tensors: {name: tensor}; about: JSON for the manifest; group: None, or the process group of a background thread.
    An OSError (disk full, ...), on all ranks alike, leaves the earlier checkpoints and pointers as they were.
    """
    folder, first = Path(folder), parallel.rank() == 0
    final, temporary = folder / f"step_{step:08d}", folder / f".tmp_{step:08d}"

    def prepare():
        for debris in [*folder.glob(".tmp_*"), *folder.glob(".trash_*")]:  # of a save that was killed
            shutil.rmtree(debris)
        temporary.mkdir(parents=True)

    def write():
        # One writer thread: with more, DCP loses write errors and reports a full disk as success.
        writer = dcp.FileSystemWriter(temporary, thread_count=1, sync_files=True)
        dcp.save(tensors, storage_writer=writer, no_dist=parallel.ranks() == 1, process_group=group)
        mine = [*temporary.glob(f"__{parallel.rank()}_*"), *([temporary / ".metadata"] if first else [])]
        return {path.name: {"size": path.stat().st_size, "crc32": file_crc32(path)} for path in mine}

    def commit(files):
        manifest = {"step": step, **about, "ranks": parallel.ranks(), "files": dict(sorted(files.items()))}
        manifest["crc32"] = _own_crc32(manifest)
        _write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1))
        _sync_folder(temporary)
        if final.exists():  # a damaged or rewound step of that number
            os.rename(final, folder / f".trash_{step:08d}")
        os.rename(temporary, final)
        _sync_folder(folder)
        try:
            point(folder, "latest", final)
            if best:
                point(folder, "best", final)
            _retain(folder, keep)
        except OSError as error:  # the step is safe all the same
            print(f"warning: {final} is saved, but: {error}")

    try:
        _together(prepare if first else None, group)
        written = _together(write, group)
        _together((lambda: commit(dict(ChainMap(*written)))) if first else None, group)
    except OSError as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint of step {step} not written: {error}") from error
    return final


def _together(part, group):
    """Run every rank's part (None: nothing to do); returns all results, or raises the first OSError on every rank."""
    try:
        outcome = part() if part else None, ""
    except (OSError, CheckpointException) as error:  # not a lost peer: who waits for it in here waits for nothing
        outcome = None, _root_cause(error)
    outcomes = parallel.from_all(outcome, group)
    if problem := next((problem for _, problem in outcomes if problem), ""):
        raise OSError(problem)
    return [result for result, _ in outcomes]


class Saver:
    """Saves the checkpoints of a run in a thread of its own. In the background, start() costs a copy of the tensors
    into host memory, and the writing goes on beside the training; else start() waits for its end."""

    def __init__(self, folder, keep, best_loss, background):
        self.folder, self.keep, self.best_loss = folder, keep, best_loss
        on_device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} \
            if torch.cuda.is_available() else {}  # else the thread would open a context on the first GPU
        self.thread, self.background = ThreadPoolExecutor(1, **on_device), background
        self.group = parallel.second_group() if background else None
        self.under_way = None

    def start(self, step, tensors, about, validation_loss):
        """Save a step; it becomes `best` if its validation loss, if there is one, is the lowest so far. The outcome of
        the save before must have been taken."""
        best = validation_loss is not None and not validation_loss >= (self.best_loss or math.inf)
        best_loss = validation_loss if best else self.best_loss
        if self.background:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        def work():
            path = save(self.folder, step, tensors, {**about, "best_loss": best_loss}, self.keep, best, self.group)
            self.best_loss = best_loss
            return path
        self.under_way = step, self.thread.submit(work)
        if not self.background:  # its collectives may not mix with others
            wait([self.under_way[1]])

    def outcome(self, wait):
        """(step, path or OSError) of a save that has ended since, None if there is none; `wait` for its end."""
        if self.under_way is None or not (wait or self.under_way[1].done()):
            return None
        (step, future), self.under_way = self.under_way, None
        try:
            return step, future.result()
        except OSError as error:
            return step, error


def point(folder, name, step_folder):
    """Make the pointer file `name` (latest, best) hold the name of a step folder."""
    _write_synced(folder / f".{name}", step_folder.name + "\n")
    os.replace(folder / f".{name}", folder / name)


def _retain(folder, keep):
    """Delete what is older than the newest `keep` whole checkpoints; one that lacks something does not count."""
    best = pointed(folder, "best")
    whole = [path for path in step_folders(folder) if not damage_alone(path, checksums=False)]
    for path in whole[:-keep]:
        if path != best:
            trash = path.with_name(f".trash_{step_of(path):08d}")
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(path, trash)  # at once, so that no half-deleted folder looks like a checkpoint
            shutil.rmtree(trash)


# ----------------------------------------------------------------------------- finding

def step_folders(folder):
    """The step folders of a checkpoints folder, oldest first."""
    return sorted((path for path in Path(folder).glob("step_*") if STEP.search(path.name)), key=step_of)


def find(path, which="latest"):
    """The step folder meant by a run folder, a checkpoints folder or a step folder, which must itself be sound. In a
    run, "latest" is the newest checkpoint whose files match its manifest; "best" follows the pointer."""
    path = Path(path)
    if STEP.search(path.name):
        if reason := damage(path):
            raise UserError(f"checkpoint {path} cannot be used: {reason}")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if which == "best":
        best = parallel.once(pointed, folder, "best")
        if best is None:
            raise UserError(f"{path} has no best checkpoint: none that is there was saved together with a validation "
                            "(--eval_interval); the newest is --checkpoint=latest")
        return find(best)
    for candidate in reversed(parallel.once(step_folders, folder)):  # one view of a shared file system
        if not (reason := damage(candidate)):
            return candidate
        print(f"skipping damaged checkpoint {candidate}: {reason}")
    raise UserError(f"no complete checkpoint in {path}")


def damage(step_folder):
    """What is wrong with a step folder, "" if every file has the size and checksum that the manifest records. Ranks
    share the reading, so all call it together."""
    problems = parallel.from_all(damage_alone(step_folder, parallel.rank(), parallel.ranks()))
    return next((problem for problem in problems if problem), "")


def damage_alone(step_folder, first=0, every=1, checksums=True):
    """damage() by this rank alone, of every so-manyth file from the first on."""
    try:
        files = read_manifest(step_folder)["files"]
        if unlisted := {".metadata", *(file.name for file in step_folder.glob("*.distcp"))} - files.keys():
            return f"manifest.json lacks {min(unlisted)}"
        for name, recorded in sorted(files.items())[first::every]:
            file = step_folder / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != recorded["size"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {recorded['size']}"
            if checksums and file_crc32(file) != recorded["crc32"]:
                return f"the checksum of {name} differs from the manifest"
    except (UserError, OSError) as error:  # or a bad disk, no permission, a file server that has lost it
        return str(error)
    except (KeyError, TypeError) as error:
        return f"manifest.json lacks {error}"
    return ""


class Manifest(dict):
    """manifest.json: what it has is of the kind that a run saves, and asking for what it lacks is a UserError."""

    KINDS = {"files": dict, "config": dict, "stream": dict, "read": dict, "places": dict, "loss_scale": list,
             "losses": list, "sequences": int, "stream_start": int, "tokens": int, "optimizer_steps": int,
             "ema_updates": int, "best_loss": float}

    def __init__(self, path):
        super().__init__(read_json(path))
        self.path = path
        wrong = [name for name, kind in self.KINDS.items() if name in self and (name, self[name]) != ("best_loss", None)
                 and (type(self[name]) is not kind or kind in (int, float) and not 0 <= self[name] < 2**63)]
        wrong += ["its checksum"] * (self.get("crc32", _own_crc32(self)) != _own_crc32(self))
        if wrong or self["step"] != step_of(path.parent):
            raise UserError(f"{path} is damaged: {wrong[0] if wrong else 'step'} is not what a run saves")

    def __missing__(self, name):
        raise UserError(f"{self.path} lacks {name!r}")


def read_manifest(step_folder):
    return Manifest(Path(step_folder) / "manifest.json")


# ----------------------------------------------------------------------------- reading

def load(step_folder, tensors):
    """Fill `tensors` ({name: tensor}, in place) from a step folder. Names, shapes and dtypes must match exactly;
    names that only the checkpoint has are allowed when `tensors` asks for none of their kind (the model without the
    optimizer)."""
    reader = _SafeReader(step_folder)
    stored = reader.read_metadata().state_dict_metadata
    kinds = {name.split(".")[0] for name in tensors}
    names, wanted = set(tensors), {name for name in stored if name.split(".")[0] in kinds}
    if names != wanted:  # a stage of a pipeline has some of them
        names.update(*parallel.from_all(sorted(names)))
    if differing := sorted(names ^ wanted):
        raise UserError(f"checkpoint {step_folder} is of another model or optimizer: it differs in "
                        f"{counted(len(differing), 'name')}, such as {differing[0]}")
    there = {name: (tuple(stored[name].size), stored[name].properties.dtype) for name in tensors}
    misfit = next((f"{name} is {there[name][0]} {there[name][1]}, this run has {tuple(tensor.shape)} {tensor.dtype}"
                   for name, tensor in tensors.items() if there[name] != (tuple(tensor.shape), tensor.dtype)), "")
    if misfit := next(filter(None, parallel.from_all(misfit)), ""):
        raise UserError(f"checkpoint {step_folder}: {misfit}")
    try:
        with progress(f"loading {Path(step_folder).name}", size(tensors)) as bar:
            dcp.load(tensors, storage_reader=reader, planner=_Planner(bar), no_dist=parallel.ranks() == 1)
    except (Exception, CheckpointException) as error:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in parallel.LOST):
            raise  # a rank is gone, which is no fault of the checkpoint
        raise UserError(f"checkpoint {step_folder} does not load: {_root_cause(error)}") from error


def has_optimizer(step_folder):
    return any(name.startswith("optim.") for name in _SafeReader(step_folder).read_metadata().state_dict_metadata)


class _Planner(DefaultLoadPlanner):
    """DCP's own, which tells a bar of every part that has been read."""

    def __init__(self, bar):
        super().__init__()
        self.bar = bar

    def commit_tensor(self, read_item, tensor):
        self.bar.update(tensor.numel() * tensor.element_size())


class _SafeReader(dcp.FileSystemReader):
    """DCP's index (.metadata) is a pickle; this reader admits the types that an honest index consists of and no
    other."""

    ALLOWED = {
        "torch": {"Size", "device", "dtype", "strided", "float32", "float16", "bfloat16", "float64", "int64", "int32",
                  "bool"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"Path", "PosixPath"},
        "collections": {"OrderedDict"}, "_codecs": {"encode"},
    }

    def read_metadata(self):
        class Unpickler(pickle.Unpickler):
            def find_class(self, module, name):
                module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 writes it
                if name in _SafeReader.ALLOWED.get(module, ()):
                    return super().find_class(module, name)
                raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint index")
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = Unpickler(file).load()
            if metadata.storage_meta:
                metadata.storage_meta.load_id = self.load_id
            for name, about in metadata.state_dict_metadata.items():
                name.split("."), tuple(about.size), about.properties.dtype
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"{info.relative_path} lies outside of the folder")
        except Exception as error:  # whatever the damaged or foreign pickle ran into
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return metadata


# ----------------------------------------------------------------------------- small things

def step_of(path):
    return int(STEP.search(path.name).group(1))


def pointed(folder, name):
    """The step folder that a pointer file names, None if there is none."""
    pointer = Path(folder) / name
    target = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return Path(folder) / target if STEP.match(target) and (Path(folder) / target).is_dir() else None


def _root_cause(error):
    """The innermost message of a CheckpointException, which wraps one traceback per rank."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    return f"{type(inner).__name__}: {inner}"


def _own_crc32(manifest):  # itself apart
    return zlib.crc32(json.dumps({name: manifest[name] for name in sorted(manifest) if name != "crc32"}).encode())


def _write_synced(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems keep no folder back that could be flushed, and say so
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

"""The commit protocol: complete or absent, damage named and passed over, nothing unpickled."""

import errno
import json
import os
import pickle
import shutil
import stat
import types
from unittest import mock

import pytest
import torch

from errors import UserError
from ranks import parallel
from run import checkpoint, folder


def tensors(value):
    return {
        "model.a": torch.full((3, 4), float(value)),
        "model.bias": torch.arange(5) + value,
        "optim.a.momentum": torch.rand(3, 4),
    }


@pytest.fixture
def run(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(tmp_path / "checkpoints", step, tensors(step), {"note": step}, keep=3, best=step == 4)
    return tmp_path


def test_save_and_load_are_bitwise(run):
    target, expected = tensors(0), tensors(9)
    checkpoint.save(run / "checkpoints", 9, expected, {}, keep=3)
    checkpoint.load(checkpoint.find(run), target)
    assert all(torch.equal(target[name], expected[name]) for name in expected)
    assert checkpoint.read_manifest(checkpoint.find(run))["step"] == 9


def test_pointers_and_retention(run):
    folder = run / "checkpoints"
    assert (folder / "latest").read_text().strip() == "step_00000006" and checkpoint.find(
        run, "best"
    ).name == "step_00000004"
    for step in (8, 10, 12):
        checkpoint.save(folder, step, tensors(step), {}, keep=2)
    assert [path.name for path in checkpoint.step_folders(folder)] == [
        f"step_{s:08d}" for s in (4, 10, 12)
    ]  # best stays
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    "kind, message",
    [
        ("bit", "checksum"),
        ("cut", "bytes, the manifest says"),
        ("gone", "is missing"),
        ("no manifest", "cannot be read"),
        ("half manifest", "cannot be read"),
        ("other manifest", "manifest.json lacks"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, capsys, kind, message):
    """Scorecard 17, 18."""
    newest = checkpoint.find(run)
    file, manifest = newest / "__0_0.distcp", newest / "manifest.json"
    if kind == "bit":
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 4
        file.write_bytes(raw)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif kind == "gone":
        (newest / ".metadata").unlink()
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "half manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text("{}")
    assert checkpoint.find(run).name == "step_00000004"
    assert message in capsys.readouterr().out
    with pytest.raises(UserError, match=message):
        checkpoint.find(newest)  # asked for by name, it is an error


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(run, monkeypatch, capsys, code):
    newest, original = checkpoint.find(run), checkpoint.file_crc32

    def crc32(path):
        if path.parent == newest:
            raise OSError(code, os.strerror(code), str(path))
        return original(path)

    monkeypatch.setattr(checkpoint, "file_crc32", crc32)
    assert checkpoint.find(run).name == "step_00000004"
    assert f"skipping damaged checkpoint {newest}: [Errno {code}] {os.strerror(code)}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot be used: \[Errno"):
        checkpoint.find(newest)


def test_a_kill_before_the_rename_leaves_the_last_checkpoint(run, monkeypatch):
    class Killed(BaseException):
        pass

    original = os.rename

    def die(source, target):
        if "step_" in str(target):
            raise Killed
        original(source, target)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(Killed):
        checkpoint.save(run / "checkpoints", 8, tensors(8), {}, keep=3)
    monkeypatch.undo()
    assert (run / "checkpoints/.tmp_00000008").is_dir() and checkpoint.find(run).name == "step_00000006"
    checkpoint.save(run / "checkpoints", 8, tensors(8), {}, keep=3)
    assert not list((run / "checkpoints").glob(".*")) and checkpoint.find(run).name == "step_00000008"


def test_a_full_disk_is_an_oserror_and_keeps_what_was_saved(run, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def full(self, plan, planner):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(run / "checkpoints", 8, tensors(8), {}, keep=1)
    assert checkpoint.find(run).name == "step_00000006" and not list((run / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders_gets_checkpoints(run, monkeypatch, code):
    original, there = os.fsync, len(os.listdir("/dev/fd"))

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save = lambda: checkpoint.save(run / "checkpoints", 8, tensors(8), {}, keep=9)
    if code == errno.EIO:  # a disk that fails is no such file system
        with pytest.raises(OSError, match="not written"):
            save()
    else:
        assert checkpoint.find(save()).name == "step_00000008"
    assert len(os.listdir("/dev/fd")) == there


def test_a_step_is_replaced_whole_never_written_over(run):
    before = os.stat(run / "checkpoints/step_00000006/__0_0.distcp").st_ino
    checkpoint.save(run / "checkpoints", 6, tensors(66), {}, keep=3)
    target = tensors(0)
    checkpoint.load(checkpoint.find(run), target)
    assert target["model.a"][0, 0] == 66 and os.stat(run / "checkpoints/step_00000006/__0_0.distcp").st_ino != before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.bias"), "differs in 1 name, such as model.bias"),
        (lambda t: t.update({"model.new": torch.zeros(1)}), "model.new"),
        (lambda t: t.update({"model.a": torch.zeros(3, 5)}), r"model.a is \(3, 4\)"),
        (lambda t: t.update({"model.a": torch.zeros(3, 4, dtype=torch.float64)}), "float64"),
        (lambda t: t.pop("optim.a.momentum") is None or t.update({"optim.a.exp_avg": torch.zeros(3, 4)}), "optim.a"),
    ],
)
def test_what_does_not_fit_is_refused(run, change, message):
    target = tensors(0)
    change(target)
    with pytest.raises(UserError, match=message):
        checkpoint.load(checkpoint.find(run), target)


def test_what_does_not_fit_on_another_rank_is_refused_on_this_one_too(run, monkeypatch):
    """Of a stage of a pipeline the others have no tensor to look at."""
    monkeypatch.setattr(parallel, "from_all", lambda value, group=None: [value, "model.b is (1,)"])
    with pytest.raises(UserError, match=r"step_00000006: model.b is \(1,\)"):
        checkpoint.load(run / "checkpoints/step_00000006", tensors(0))


def test_a_rank_that_is_lost_while_loading_is_no_damaged_checkpoint(run, monkeypatch):
    """A launcher starts again after the one and not after the other."""
    monkeypatch.setattr(checkpoint.dcp, "load", mock.Mock(side_effect=RuntimeError("Connection closed by peer")))
    with pytest.raises(RuntimeError, match="^Connection"):
        checkpoint.load(run / "checkpoints/step_00000006", tensors(0))


def test_the_model_can_be_loaded_without_the_optimizer(run):
    target = {name: tensor for name, tensor in tensors(0).items() if name.startswith("model.")}
    checkpoint.load(checkpoint.find(run), target)
    assert target["model.a"][0, 0] == 6 and checkpoint.has_optimizer(checkpoint.find(run))


def test_a_malicious_index_runs_no_code(run, tmp_path):
    """Scorecard 24."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    newest = checkpoint.find(run)
    (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert checkpoint.find(run).name == "step_00000004"  # the checksum already tells
    manifest = json.loads((newest / "manifest.json").read_text())
    raw = (newest / ".metadata").read_bytes()
    import zlib

    manifest["files"][".metadata"] = {"size": len(raw), "crc32": zlib.crc32(raw)}
    manifest["crc32"] = checkpoint._own_crc32(manifest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no place in a checkpoint index"):
        checkpoint.load(checkpoint.find(newest), tensors(0))
    assert not (tmp_path / "owned").exists()


def test_a_run_may_be_called_like_a_step(run):
    called = run.rename(run.with_name("debug_step_00000003"))
    assert checkpoint.find(called).name == "step_00000006" and checkpoint.find(called, "best").name == "step_00000004"
    assert not folder.rewound(types.SimpleNamespace(resume=str(called)))
    assert folder.rewound(types.SimpleNamespace(resume=f"{called}/checkpoints/step_00000006/"))
    (called / "checkpoints/old_step_00000008").mkdir()  # nor is it one of the run's
    assert checkpoint.find(called).name == "step_00000006"


def test_nothing_to_resume_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint in"):
        checkpoint.find(tmp_path)
    checkpoint.save(tmp_path / "checkpoints", 1, tensors(1), {}, keep=1)
    with pytest.raises(UserError, match="no best checkpoint"):
        checkpoint.find(tmp_path, "best")
    shutil.rmtree(tmp_path / "checkpoints/step_00000001")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find(tmp_path)

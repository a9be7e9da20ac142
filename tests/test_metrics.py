"""metrics.jsonl and config.json on the disk: they are there before the checkpoint that they go with."""

import os

import pytest

from run import checkpoint, metrics
from tests.helpers import small_run


@pytest.fixture
def flushed(monkeypatch):
    """The names of the files that are flushed, with those of renames among them."""
    names, sync, replace, rename = [], os.fsync, os.replace, os.rename
    name_of = lambda path: os.path.basename(os.fspath(path))
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(name_of(os.readlink(f"/dev/fd/{fd}"))) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: names.append(f"{name_of(a)} > {name_of(b)}") or replace(a, b))
    monkeypatch.setattr(os, "rename", lambda a, b: names.append(f"{name_of(a)} > {name_of(b)}") or rename(a, b))
    return names


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, flushed):
    metrics.replace_text(tmp_path / "config.json", "{}")
    assert flushed == [".config.json", ".config.json > config.json"]


def test_records_are_flushed_before_the_checkpoint_that_they_lead_to(tmp_path, flushed):
    small_run(tmp_path, max_steps=4, save_interval=2, decay_steps=1)
    for step in ("00000002", "00000004"):
        there = flushed.index(f".tmp_{step} > step_{step}")
        assert "metrics.jsonl" in flushed[:there], step
        del flushed[:there + 1]
    assert checkpoint.find(tmp_path / "run").name == "step_00000004"

"""--dry_run and --profile_steps: what they tell, and that a dry run writes nothing."""

import gzip
import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import settings
from errors import UserError
from run import dry_run, profile
from step import Training
from tests.helpers import assert_equal_runs, final_tensors, losses, make_config, make_data, run_train


@pytest.fixture
def config(tmp_path):
    data = make_data(tmp_path / "data", 4000, 300)
    return make_config(tmp_path / "tiny.py", data=str(data), out_dir=str(tmp_path / "run"), max_steps=6, ema=0.9,
                       hidden_size=16, num_hidden_layers=2)


def everything(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def test_a_dry_run_writes_nothing_and_tells_what_a_run_takes(config, tmp_path, capsys):
    before = everything(tmp_path)
    found = run_train(config, "--dry_run")
    told = capsys.readouterr().out
    assert everything(tmp_path) == before
    assert found["seconds"] == 6 * found["step_seconds"] > 0 and "nothing was written" in told
    assert re.search(r"time      \d+:\d\d for 6 steps of \d+\.\d\d s, [\d,]+ tokens/s", told)
    run_train(config)
    saved = final_tensors(tmp_path / "run").values()  # those of the average among them
    assert found["checkpoint_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in saved)


def test_a_dry_run_checks_what_a_run_would(config, tmp_path):
    run_train(config, "--max_steps=4")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="holds a run already"):
        run_train(config, "--dry_run")
    assert run_train(config, "--resume", "--dry_run")["seconds"] > 0  # of the two steps that are left
    with pytest.raises(UserError, match="holds another model"):
        run_train(config, "--resume", "--dry_run", "--hidden_size=32")
    with pytest.raises(UserError, match="lower the learning rates"):
        run_train(config, "--dry_run", f"--out_dir={tmp_path / 'other'}", "--initializer_range=1e18")
    assert everything(tmp_path) == before


def test_a_dry_run_counts_every_micro_batch(config, tmp_path, monkeypatch):
    """Time of a step: that of a micro-batch times how many there are, and the update once."""
    clock = iter([0.0, 5.0, 6.0, 10.0, 13.0, 14.0])  # the first is not counted
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert run_train(config, "--dry_run", "--micro_batch_size=2")["step_seconds"] == 4 * 3.0 + 1.0
    clock = iter([0.0, 5.0, 6.0])  # a run of one micro-batch has no second
    assert run_train(config, "--dry_run", "--micro_batch_size=8", "--max_steps=1")["seconds"] == 6.0


def test_a_dry_run_goes_on_where_a_run_would_skip_steps(config, monkeypatch):
    """A loss scale that starts too high falls from step to step."""
    update, skipped = Training.update, []

    def not_yet(self, found):
        if len(skipped) < 3:
            found.loss = math.inf
            skipped.append(self.step)
        return update(self, found)
    monkeypatch.setattr(Training, "update", not_yet)
    assert run_train(config, "--dry_run")["seconds"] > 0 and skipped == [1, 2, 3]
    skipped.clear()
    with pytest.raises(UserError, match="lower the learning rates"):
        run_train(config, "--dry_run", "--max_skipped_steps=2")


def test_a_dry_run_without_memory_says_what_a_run_would_do(config, monkeypatch):
    def full(self, exact=False):
        raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(Training, "forward_backward", full)
    with pytest.raises(UserError, match="micro-batches of 4 .*no room.* smaller --micro_batch_size"):
        run_train(config, "--dry_run")


def test_a_dry_run_does_not_finish_what_a_kill_left(config, tmp_path):
    run_train(config, "--max_steps=4")
    (tmp_path / "run/aside/step_00000002_to_00000004").mkdir(parents=True)
    (tmp_path / "run/aside/step_00000002_to_00000004/.unfinished").write_text("", encoding="utf-8")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="a dry run may not"):
        run_train(config, "--dry_run", "--resume")
    assert everything(tmp_path) == before


def test_profiled_steps_leave_a_trace_and_change_nothing(config, tmp_path, capsys):
    run_train(config)
    capsys.readouterr()
    run_train(config, f"--out_dir={tmp_path / 'seen'}", "--profile_steps=2:4")
    told, folder = capsys.readouterr().out, tmp_path / "seen/profile"
    assert_equal_runs(tmp_path / "run", tmp_path / "seen")
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert {name for name in names if name.startswith("step ")} == {"step 2", "step 3"} and "aten::mm" in names
    table = (folder / "costs.txt").read_text(encoding="utf-8")
    assert table in told and f"profile: {folder}/" in told and len(re.findall("%.*%", table)) == profile.ROWS + 1
    assert not (tmp_path / "run/profile").exists() and "step 2" not in table


def test_profiling_ends_with_the_run_and_says_when_it_cannot_begin(config, tmp_path, capsys):
    run_train(config, "--profile_steps=6:100")
    assert (tmp_path / "run/profile/costs.txt").exists()
    capsys.readouterr()
    run_train(config, "--resume", "--max_steps=7", "--profile_steps=2:4")
    assert "nothing is profiled: steps 7 to 7 are still to come, not 2:4" in capsys.readouterr().out
    run_train(config, "--resume", "--max_steps=8", "--profile_steps=2:9")  # what is left of the range
    said = capsys.readouterr().out
    assert "nothing is profiled" not in said and f"profile: {tmp_path / 'run/profile'}/" in said


def test_a_profile_that_cannot_be_written_costs_no_more(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile.profile, "key_averages", mock.Mock(side_effect=OSError("disk full")))
    run_train(config, "--profile_steps=2:4")
    assert "run/profile/ is incomplete" in capsys.readouterr().out and len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize("words", ["", "3", "3:3", "4:3", "a:b", "1:2:3", "-1:3", "1:3 ", "1:99999999999"])
def test_steps_that_are_none_are_refused(words):
    with pytest.raises(UserError, match="profile_steps=.*10:13"):
        settings.load(["configs/debug.py", f"--profile_steps={words}"])


def test_a_dry_run_profiles_nothing():
    assert list(settings.load(["configs/debug.py", "--profile_steps=10:13"])[0].profiled()) == [10, 11, 12]
    with pytest.raises(UserError, match="profiles no steps"):
        settings.load(["configs/debug.py", "--profile_steps=10:13", "--dry_run"])

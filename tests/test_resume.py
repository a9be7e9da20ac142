"""Resuming: after a signal, after SIGKILL, from a step, from another run; and what is refused."""

import shutil
import signal
import time

import pytest

import checkpoint
from data import prepare
from errors import STOPPED, UserError
from muon import Muon
from tests import forks
from tests.helpers import assert_equal_runs, losses, make_data, records, run_stopped, run_train


def test_ten_and_ten_are_twenty_bitwise(config, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ("--eval_interval=5", "--save_interval=10", "--sample_interval=10", "--decay_steps=4")
    run_train(config, f"--out_dir={whole}", *options)
    with pytest.MonkeyPatch.context() as patch:  # a signal arrives late in the ninth step: the tenth still counts
        original = Muon.step
        stop = lambda self: signal.raise_signal(signal.SIGTERM) if self.steps == 8 else None
        patch.setattr(Muon, "step", lambda self, *a: (stop(self), original(self, *a))[1])
        run_stopped(config, f"--out_dir={halves}", *options)
    assert losses(halves)[-1][0] == 10
    run_train(config, f"--out_dir={halves}", *options, "--resume")
    assert [step for step, _ in losses(halves)] == list(range(1, 21))
    assert_equal_runs(whole, halves)
    val = {record["step"]: record["loss"] for record in records(whole, "val")}
    del val[10]  # the signal went straight to the save
    assert val == {record["step"]: record["loss"] for record in records(halves, "val")}
    manifest = checkpoint.read_manifest(checkpoint.find(halves))
    assert manifest["sequences"] == 160 and manifest["optimizer_steps"] == 20


def test_a_killed_run_resumes_from_its_last_checkpoint_bitwise(config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_train(config, f"--out_dir={whole}", "--max_steps=30", "--save_interval=5", "--keep_checkpoints=9")
    words = [config, f"--out_dir={killed}", "--max_steps=30", "--save_interval=5", "--keep_checkpoints=9"]
    process = forks.Process(["train.py", *words])
    path, deadline = killed / "metrics.jsonl", time.time() + 120
    while time.time() < deadline and not (path.exists() and '"kind": "train", "step": 13' in path.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = losses(killed)[-1][0]
    assert 13 <= reached < 30
    run_train(*words, "--resume")
    assert records(killed, "event")[-1]["step"] == 30 and any(e["event"] == "resume" for e in records(killed, "event"))
    assert [step for step, _ in losses(killed)] == list(range(1, 31))  # no line twice
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_cleanly(config, tmp_path, number):
    words = [config, "--max_steps=100000", "--out_dir=" + str(tmp_path / "run")]
    output = tmp_path / "output"
    process = forks.Process(["train.py", *words], stdout=output)
    while process.poll() is None and not (output.exists() and "\nstep      5/" in output.read_text(encoding="utf-8")):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == STOPPED and "continue with --resume" in output.read_text(encoding="utf-8")
    step = checkpoint.read_manifest(checkpoint.find(tmp_path / "run"))["step"]
    assert step == losses(tmp_path / "run")[-1][0]


def test_resume_from_a_step_rewinds_and_from_another_run_starts_there(config, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run_train(config, "--save_interval=5", "--keep_checkpoints=9")
    before = losses(run)
    run_train(config, "--save_interval=5", "--keep_checkpoints=9", f"--resume={run}/checkpoints/step_00000010")
    assert losses(run) == before and not list((run / "checkpoints").glob(".*"))
    run_train(config, f"--resume={run}/checkpoints/step_00000015", f"--out_dir={other}", "--micro_batch_size=8")
    assert [step for step, _ in losses(other)] == [16, 17, 18, 19, 20]
    assert losses(other)[-1][1] == pytest.approx(before[-1][1], abs=1e-4)


def test_resume_refuses_another_model_and_names_the_difference(config, tmp_path):
    """Scorecard 16."""
    run_train(config, "--max_steps=2")
    with pytest.raises(UserError, match="hidden_size: 32 there, 48 here"):
        run_train(config, "--max_steps=4", "--resume", "--hidden_size=48")
    with pytest.raises(UserError, match="another model or optimizer"):
        run_train(config, "--max_steps=4", "--resume", "--optimizer=adamw")
    with pytest.raises(UserError, match="no complete checkpoint"):
        run_train(config, f"--out_dir={tmp_path / 'new'}", "--resume")
    (tmp_path / "notes.txt").write_text("\n\n".join(f"note {i} " * 30 for i in range(60)))
    prepare.main(
        [
            "text",
            str(tmp_path / "notes.txt"),
            "--split_on=\n\n",
            "--vocab_size=257",
            "--val_fraction=0.2",
            f"--out={tmp_path / 'notes'}",
        ]
    )
    with pytest.raises(UserError, match="another tokenizer"):
        run_train(config, "--max_steps=4", "--resume", f"--data={tmp_path / 'notes'}")
    assert len(losses(tmp_path / "run")) == 2


def test_a_run_folder_is_not_overwritten_by_accident(config, tmp_path):
    run_train(config, "--max_steps=2")
    with pytest.raises(UserError, match="holds a run already"):
        run_train(config, "--max_steps=3")
    run_train(config, "--max_steps=3", "--overwrite")
    assert len(losses(tmp_path / "run")) == 3


def test_a_refused_overwrite_deletes_nothing(config, tmp_path):
    run_train(config, "--max_steps=2")
    run_train(config, "--max_steps=2", f"--out_dir={tmp_path / 'keep'}")
    with pytest.raises(UserError, match="another model"):
        run_train(
            config, f"--out_dir={tmp_path / 'keep'}", f"--resume={tmp_path / 'run'}", "--hidden_size=48", "--overwrite"
        )
    assert losses(tmp_path / "keep")[-1][0] == 2 and checkpoint.find(tmp_path / "keep")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear to me")
    run_train(
        config, "--max_steps=2", f"--out_dir={tmp_path / 'mine'}", "--overwrite"
    )  # holds no run: nothing to delete
    assert (tmp_path / "mine/thesis.txt").exists()


def test_best_belongs_to_the_branch_and_the_folder(config, tmp_path):
    options = ("--eval_interval=5", "--save_interval=5", "--keep_checkpoints=9")
    run_train(config, *options)
    best = checkpoint.find(tmp_path / "run", "best")
    assert best.name == "step_00000020"
    run_train(
        config, *options, f"--resume={tmp_path / 'run'}/checkpoints/step_00000010", "--max_steps=11", "--decay_steps=1"
    )
    folder = tmp_path / "run/checkpoints"
    assert (folder / "latest").read_text().strip() == checkpoint.find(tmp_path / "run").name == "step_00000011"
    assert checkpoint.find(tmp_path / "run", "best").is_dir()
    run_train(
        config, *options, f"--resume={best.parent}/step_00000005", f"--out_dir={tmp_path / 'other'}", "--max_steps=10"
    )
    assert checkpoint.find(tmp_path / "other", "best").name == "step_00000010"


def test_a_changed_stream_is_said_and_precision_may_change(config, tmp_path, capsys):
    run_train(config, "--max_steps=4")
    words = ("--max_steps=6", "--resume", "--seed=5", "--sequence_length=16", "--dtype=float16", "--muon_lr=0.005")
    stream = ["sequence_length: 32 there, 16 here", "seed: 0 there, 5 here"]
    with pytest.raises(UserError, match="; ".join(stream) + r".*--new_data"):
        run_train(config, *words)
    assert len(losses(tmp_path / "run")) == 4
    run_train(config, *words, "--new_data")
    assert "changed: sequence_length: 32 there, 16 here" in capsys.readouterr().out
    changed = [e["changed"] for e in records(tmp_path / "run", "event") if e["event"] == "resume"]
    assert changed == [[*stream, "max_steps: 4 there, 6 here", "muon_lr: 0.01 there, 0.005 here",
                        "decay_steps: 0 there, 1 here", "dtype: float32 there, float16 here"]]
    assert records(tmp_path / "run")[-1]["tokens"] == 4 * 8 * 32 + 2 * 8 * 16


def test_resume_refuses_other_data_but_not_the_same_elsewhere(config, data, tmp_path):
    """Scorecard 14: the shards of a folder changed since the checkpoint."""
    moved = shutil.copytree(data, tmp_path / "moved")
    run_train(config, f"--data={moved}", "--max_steps=2")
    run_train(config, f"--data={data}", "--max_steps=3", "--resume")
    other = make_data(tmp_path / "other", seed=1)  # as many tokens, but others
    with pytest.raises(UserError, match="another stream of data: data: .*other.*--new_data"):
        run_train(config, f"--data={other}", "--max_steps=4", "--resume")
    run_train(config, f"--data={other}", "--max_steps=4", "--resume", "--new_data")
    assert len(losses(tmp_path / "run")) == 4


def test_a_signal_goes_straight_to_the_save(config, tmp_path, monkeypatch):
    original = Muon.step
    stop = lambda self: signal.raise_signal(signal.SIGTERM) if self.steps == 3 else None
    monkeypatch.setattr(Muon, "step", lambda self, *a: (stop(self), original(self, *a))[1])
    run_stopped(config, "--eval_interval=5", "--sample_interval=5")
    assert losses(tmp_path / "run")[-1][0] == 5 and not records(tmp_path / "run", "val")
    assert checkpoint.find(tmp_path / "run").name == "step_00000005" and not (tmp_path / "run/samples.md").exists()

"""What a run folder lets a start do: which checkpoint is the best, and what torchrun's restarts repeat."""

import json

import pytest
import torch

from errors import UserError
from model import K2
from run import checkpoint, folder
from tests.helpers import losses, make_data, records, run_restarting, run_train, small_run


def test_every_stage_has_a_best_of_its_own(tmp_path, capsys):
    """Losses on other data cannot be compared with those of the stage before, however low they were."""
    path, run = small_run(tmp_path, max_steps=4, save_interval=2, eval_interval=2, decay_steps=1), tmp_path / "run"
    old = [r | {"loss": 0.5 + r["step"] / 100} if r["kind"] == "val" else r
           for r in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old), encoding="utf-8")
    run_train(path, "--resume", "--max_steps=6")
    assert checkpoint.find(run, "best").name == "step_00000004"  # of the same stage
    capsys.readouterr()
    run_train(path, "--resume", "--max_steps=8", "--new_data",
              f"--data={make_data(tmp_path / 'other', 2000, 300, seed=1)}")
    loss = records(run, "val")[-1]["loss"]
    assert checkpoint.find(run, "best").name == "step_00000008" and loss > 0.6
    assert checkpoint.read_manifest(checkpoint.find(run))["best_loss"] == loss
    assert f"best:  validation loss {loss:.4f} at step 8" in capsys.readouterr().out
    folder.point_at_what_is_there(run)  # as every start does
    assert checkpoint.find(run, "best").name == "step_00000008"


def test_torchrun_that_starts_again_keeps_what_it_has_saved(tmp_path, monkeypatch, capsys):
    """--max-restarts repeats --overwrite and --resume=STEP; until a checkpoint is there they are meant."""
    path, run = small_run(tmp_path, max_steps=2, decay_steps=1, keep_checkpoints=9), tmp_path / "run"
    first = (run / "checkpoints/step_00000002").stat().st_mtime_ns
    monkeypatch.setattr(folder, "LAUNCH", ["node", 7])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_train(path, "--overwrite", "--save_interval=2", "--max_steps=4")  # of an earlier launch, so it goes
    second = (run / "checkpoints/step_00000002").stat().st_mtime_ns
    assert first != second and "deleted the run" in capsys.readouterr().out
    run_train(path, "--overwrite", "--max_steps=6")
    said = capsys.readouterr().out
    assert "deleted" not in said and f"going on with {run}/checkpoints/step_00000004" in said
    words = f"--resume={run}/checkpoints/step_00000002", "--skip_sequences=2"
    run_train(path, *words, "--max_steps=8")
    run_train(path, "--max_steps=9")  # refused, if it was not torchrun's
    assert [step for step, _ in losses(run)] == list(range(1, 10)) and not (run / "aside").exists()
    assert (run / "checkpoints/step_00000002").stat().st_mtime_ns == second
    assert checkpoint.read_manifest(checkpoint.find(run))["sequences"] == 9 * 2

    monkeypatch.setenv("NANOK2_STARTS", "1")  # it started itself again: a way back to a step is meant
    run_train(path, *words, "--max_steps=9")
    assert (run / "aside").exists() and checkpoint.read_manifest(checkpoint.find(run))["sequences"] == 9 * 2 + 2
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    with pytest.raises(UserError, match="holds a run already"):
        run_train(path, "--max_steps=10")


def test_what_torchrun_has_saved_stays_where_memory_does_not_suffice(tmp_path, monkeypatch):
    """The next start, which has starts of its own behind it, takes the words as they are."""
    path, run, original = small_run(tmp_path, max_steps=2, decay_steps=1), tmp_path / "run", K2.forward
    monkeypatch.setattr(folder, "LAUNCH", None)  # which the checkpoint has
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    def forward(self, tokens_BT, *args, **options):
        if self.training and len(tokens_BT) > 1:
            monkeypatch.setenv("NANOK2_STARTS", "1")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, tokens_BT, *args, **options)

    monkeypatch.setattr(K2, "forward", forward)
    _, asked = run_restarting(path, "--overwrite", "--max_steps=4")
    assert len(asked) == 2 and [step for step, _ in losses(run)] == [1, 2, 3, 4]

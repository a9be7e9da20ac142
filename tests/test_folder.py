"""What a run folder lets a start do that torchrun repeats, word for word, after a rank has died."""

import pytest
import torch

from errors import UserError
from model import K2
from run import checkpoint, folder
from tests.helpers import losses, run_restarting, run_train, small_run


def test_torchrun_that_starts_again_keeps_what_it_has_saved(tmp_path, monkeypatch, capsys):
    """--max-restarts repeats --overwrite and --resume=STEP; until a checkpoint is there they are meant."""
    path, run = small_run(tmp_path, max_steps=2, decay_steps=1, keep_checkpoints=9), tmp_path / "run"
    first = (run / "checkpoints/step_00000002").stat().st_ino
    monkeypatch.setattr(folder, "LAUNCH", ["node", 7])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_train(path, "--overwrite", "--save_interval=2", "--max_steps=4")  # of an earlier launch, so it goes
    second = (run / "checkpoints/step_00000002").stat().st_ino
    assert first != second and "deleted the run" in capsys.readouterr().out
    run_train(path, "--overwrite", "--max_steps=6")
    said = capsys.readouterr().out
    assert "deleted" not in said and f"going on with {run}/checkpoints/step_00000004" in said
    words = f"--resume={run}/checkpoints/step_00000002", "--skip_sequences=2"
    run_train(path, *words, "--max_steps=8")
    run_train(path, "--max_steps=9")  # refused, if it was not torchrun's
    assert [step for step, _ in losses(run)] == list(range(1, 10)) and not (run / "aside").exists()
    assert (run / "checkpoints/step_00000002").stat().st_ino == second
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

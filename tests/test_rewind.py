"""What a rewind leaves behind is set aside as a run of its own, whatever ends the process meanwhile."""

import json
import os
import shutil
import types
from types import SimpleNamespace

import pytest
import torch

import generate
import settings
from errors import UserError
from run import checkpoint, metrics
from run import folder as run_folder
from tests.helpers import final_tensors, losses, records, run_train, small_run


def test_a_rewind_sets_its_branch_aside_as_a_run_of_its_own(tmp_path, capsys):
    options = ("--save_interval=2", "--eval_interval=2", "--sample_interval=2", "--keep_checkpoints=9")
    run, path = tmp_path / "run", small_run(tmp_path, max_steps=8, save_interval=2, eval_interval=2, sample_interval=2,
                                            keep_checkpoints=9, decay_steps=2)
    logs = lambda folder: [(folder / name).read_text(encoding="utf-8") for name in ("metrics.jsonl", "samples.md")]
    before, tensors = logs(run), final_tensors(run)
    capsys.readouterr()
    run_train(path, *options, f"--resume={run}/checkpoints/step_00000004", "--max_steps=6", "--seed=1", "--new_data")
    aside = run / "aside/step_00000004_to_00000008"
    assert f"set aside what {run} holds beyond step 4: 2 checkpoints" in capsys.readouterr().out
    assert [path.name for path in checkpoint.step_folders(aside / "checkpoints")] == ["step_00000006", "step_00000008"]
    assert logs(aside) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in final_tensors(aside).items())
    assert generate.load(aside)[1] is not None and checkpoint.find(aside, "best").parent == aside / "checkpoints"
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6] and losses(run)[5] != losses(aside)[5]
    (event,) = [e for e in records(run, "event") if e["event"] == "resume"]
    assert event["set_aside"] == str(aside)
    with pytest.raises(UserError, match=f"no checkpoint .*set aside: --resume={aside}/checkpoints/step_00000008"):
        run_train(path, f"--resume={run}/checkpoints/step_00000008")

    run_train(path, *options, f"--resume={run}/checkpoints/step_00000004", "--max_steps=8")  # again, as at first
    assert losses(run) == losses(aside) and len(losses(run / "aside/step_00000004_to_00000006")) == 6
    run_train(path, *options, f"--resume={run}/checkpoints/step_00000004", "--max_steps=5")
    assert losses(run / "aside/step_00000004_to_00000008-2") == losses(aside)

    with pytest.raises(UserError, match="--overwrite would delete .*aside"):
        run_train(path, f"--resume={aside}", "--max_steps=9", "--overwrite")
    with pytest.raises(UserError, match="holds a run already"):
        run_train(path, f"--resume={aside}", "--max_steps=9")
    kept = logs(run)  # the branch goes on in its own folder
    run_train(f"--resume={aside}", "--max_steps=9")
    assert losses(aside)[-1][0] == 9 and logs(run) == kept
    ids = [json.loads((folder / "config.json").read_text(encoding="utf-8"))["run_id"] for folder in (run, aside)]
    assert ids[0] != ids[1]


def saved_run(folder, steps, validation):
    """A run folder of a tensor, with records of every step up to two beyond the last that was saved."""
    for step in steps:
        checkpoint.save(folder / "checkpoints", step, {"model.a": torch.full((2,), float(step))}, {}, keep=99)
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, steps[-1] + 3)]
    lines += [{"kind": "val", "step": step, "loss": loss} for step, loss in validation.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "config.json").write_text('{"settings": {}}', encoding="utf-8")
    (folder / "tokenizer").mkdir()
    return folder


def found(run):
    """Every checkpoint and record in a run and its aside folders, by what they hold."""
    folders = [run, *(path for path in run.glob("aside/*") if path.name != ".copies")]
    tensors = {"model.a": torch.zeros(2)}
    values = []
    for path in [path for folder in folders for path in checkpoint.step_folders(folder / "checkpoints")]:
        checkpoint.load(checkpoint.find(path), tensors)
        values.append(tensors["model.a"][0].item())
    return sorted(values), {record["step"] for folder in folders for record in records(folder)}


def test_a_kill_at_any_instant_of_setting_aside_loses_nothing(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(original, countdown):
        def act(*args, **options):
            if next(countdown, None) is None:
                raise Killed
            return original(*args, **options)
        return act

    for instant in range(100):
        run, countdown = saved_run(tmp_path / str(instant), (2, 4, 6, 8), {2: 3.0, 6: 1.0}), iter(range(instant))
        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "copy2"), (os, "mkdir")):
                patch.setattr(module, name, dying(getattr(module, name), countdown))
            try:
                run_folder.put_away(run, 4, True, [])
                break
            except Killed:
                pass
        assert found(run) == ([2, 4, 6, 8], set(range(1, 11)))
        begun = bool(list(run.glob("aside/step_*")))
        run_folder.finish_setting_aside(run)  # as every start does
        assert found(run) == ([2, 4, 6, 8], set(range(1, 11)))
        newest = checkpoint.find(run).name
        assert newest == ("step_00000004" if begun else "step_00000008")
        run_folder.put_away(run, 4, True, [])  # the same command again
        assert [path.name for path in run.glob("aside/step_*")] == ["step_00000004_to_00000010"]
        assert found(run) == ([2, 4, 6, 8], set(range(1, 11))) and not list(run.glob("aside/*/.unfinished"))
        assert (run / "checkpoints/latest").read_text(encoding="utf-8") == "step_00000004\n"
        assert checkpoint.find(run, "best").name == "step_00000002" and run_folder.best_loss(run, None) == 3.0
        assert checkpoint.find(run / "aside/step_00000004_to_00000010", "best").name == "step_00000006"
    assert instant > 8


def test_best_goes_where_no_validation_is_left_and_that_is_said(tmp_path):
    run = saved_run(tmp_path / "run", (2, 4), {4: 1.0})
    checkpoint.point(run / "checkpoints", "best", run / "checkpoints/step_00000004")
    run_folder.put_away(run, 2, True, [])
    with pytest.raises(UserError, match="none that is there was saved together with a validation"):
        checkpoint.find(run, "best")
    assert run_folder.best_loss(run, 1.0) is None


def test_only_what_is_done_again_is_dropped(tmp_path, capsys):
    """Records beyond the newest checkpoint go, with a line; not if the run goes on otherwise. What is damaged stays."""
    run = saved_run(tmp_path / "run", (2, 4), {})
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "tra')
    assert run_folder.put_away(run, 4, False, []) is None
    shutil.copytree(run, tmp_path / "same")
    metrics.RunLog(tmp_path / "same", types.SimpleNamespace(wandb="off", tensorboard=False), 4, "id").close()
    said = capsys.readouterr().out
    assert "dropped 1 line without a record" in said
    assert "dropped 2 records, and the samples, beyond step 4: these steps are done again" in said
    aside = run_folder.put_away(run, 4, False, ["muon_lr: 1 there, 2 here"])
    assert aside.name == "step_00000004_to_00000006" and len(metrics.read_records(aside / "metrics.jsonl")) == 6
    for number in ("", "-2"):
        assert run_folder.put_away(run, 2, False, []) is None
        assert (run / f"checkpoints/damaged_step_00000004{number}/manifest.json").exists()
        checkpoint.save(run / "checkpoints", 4, {"model.a": torch.zeros(2)}, {}, keep=9)


def test_what_is_set_aside_still_takes_its_room(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run", (2, 4, 6, 8), {})
    each = run_folder.bytes_in(run / "checkpoints/step_00000002")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2.5 * each))
    source = run / "checkpoints/step_00000002"
    make = lambda **changes: settings.Config(save_interval=2, keep_checkpoints=9, eval_interval=0, **changes)
    run_folder.require_room(run, source, each, 4, make(resume=str(source)))
    with pytest.raises(UserError, match="will need .* more, but only"):
        run_folder.require_room(run, source, each, 6, make(resume=str(source)))
    run_folder.require_room(run, None, each, 12, make(overwrite=True))  # deletes four


def test_ranks_rewind_together(tmp_path, pool):
    path, run = small_run(tmp_path, max_steps=4, save_interval=2, keep_checkpoints=9, decay_steps=1), tmp_path / "run"
    before = losses(run)
    pool.run(2, run_train, path, f"--resume={run}/checkpoints/step_00000002", "--micro_batch_size=1")
    assert losses(run / "aside/step_00000002_to_00000004") == before
    assert losses(run)[:2] == before[:2] and losses(run)[-1][1] == pytest.approx(before[-1][1], abs=1e-4)

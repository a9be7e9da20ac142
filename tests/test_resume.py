"""Resuming: after a signal, after SIGKILL, from a step, from another run; and what is refused."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import config as settings
import generate
import guard
import metrics
import runs
from data import prepare
from errors import STOPPED, UserError
from model import ModelConfig, build
from muon import Muon, schedule_factor
from tests.helpers import (
    ROOT,
    TINY,
    assert_equal_runs,
    final_tensors,
    losses,
    make_config,
    make_data,
    records,
    run_stopped,
    run_train,
    small_run,
)


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
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
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
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step") and "5/" in line:
            break
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED and shlex.split(rest)[-2:] == ["train.py", f"--resume={tmp_path / 'run'}"]
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


def test_a_run_folder_is_not_overwritten_by_accident(config, tmp_path, capsys):
    run_train(config, "--max_steps=2")
    with pytest.raises(UserError, match=f"holds a run already: .* train.py --resume={tmp_path}/run$"):
        run_train(config, "--max_steps=3")
    (tmp_path / "run/thesis.txt").write_text("dear to me")
    run_train(config, "--max_steps=3", "--overwrite")
    assert len(losses(tmp_path / "run")) == 3 and (tmp_path / "run/thesis.txt").exists()
    assert f"deleted the run in {tmp_path}/run: 1 checkpoints, up to step_00000002" in capsys.readouterr().out
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(UserError, match="holds an exported model"):
        run_train(config, f"--out_dir={tmp_path / 'hf'}", "--overwrite")


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


# ---------------------------------------------------------------------- what a rewind leaves behind


def test_a_rewind_sets_its_branch_aside_as_a_run_of_its_own(tmp_path, capsys):
    options = ("--save_interval=2", "--eval_interval=2", "--sample_interval=2", "--keep_checkpoints=9")
    run, path = tmp_path / "run", small_run(tmp_path, max_steps=8, save_interval=2, eval_interval=2, sample_interval=2,
                                            keep_checkpoints=9, decay_steps=2)
    before, tensors, samples = (run / "metrics.jsonl").read_text(), final_tensors(run), (run / "samples.md").read_text()
    capsys.readouterr()
    run_train(path, *options, f"--resume={run}/checkpoints/step_00000004", "--max_steps=6", "--seed=1", "--new_data")
    aside = run / "aside/step_00000004_to_00000008"
    assert f"set aside what {run} holds beyond step 4: 2 checkpoints" in capsys.readouterr().out
    assert [path.name for path in checkpoint.step_folders(aside / "checkpoints")] == ["step_00000006", "step_00000008"]
    assert (aside / "metrics.jsonl").read_text() == before and (aside / "samples.md").read_text() == samples
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
    kept = (run / "metrics.jsonl").read_text()  # the branch goes on in its own folder
    run_train(f"--resume={aside}", "--max_steps=9")
    assert losses(aside)[-1][0] == 9 and (run / "metrics.jsonl").read_text() == kept
    ids = [json.loads((folder / "config.json").read_text())["run_id"] for folder in (run, aside)]
    assert ids[0] != ids[1]


def saved_run(folder, steps, validation):
    """A run folder of a tensor, with records of every step up to two beyond the last that was saved."""
    for step in steps:
        checkpoint.save(folder / "checkpoints", step, {"model.a": torch.full((2,), float(step))}, {}, keep=99)
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, steps[-1] + 3)]
    lines += [{"kind": "val", "step": step, "loss": loss} for step, loss in validation.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text('{"settings": {}}')
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
                runs.put_away(run, 4, True, [])
                break
            except Killed:
                pass
        assert found(run) == ([2, 4, 6, 8], set(range(1, 11)))
        begun = bool(list(run.glob("aside/step_*")))
        runs.finish_setting_aside(run)  # as every start does
        assert found(run) == ([2, 4, 6, 8], set(range(1, 11)))
        newest = checkpoint.find(run).name
        assert newest == ("step_00000004" if begun else "step_00000008")
        runs.put_away(run, 4, True, [])  # the same command again
        assert [path.name for path in run.glob("aside/step_*")] == ["step_00000004_to_00000010"]
        assert found(run) == ([2, 4, 6, 8], set(range(1, 11))) and not list(run.glob("aside/*/.unfinished"))
        assert (run / "checkpoints/latest").read_text() == "step_00000004\n"
        assert checkpoint.find(run, "best").name == "step_00000002" and runs.best_loss(run, None) == 3.0
        assert checkpoint.find(run / "aside/step_00000004_to_00000010", "best").name == "step_00000006"
    assert instant > 8


def test_best_goes_where_no_validation_is_left_and_that_is_said(tmp_path):
    run = saved_run(tmp_path / "run", (2, 4), {4: 1.0})
    checkpoint.point(run / "checkpoints", "best", run / "checkpoints/step_00000004")
    runs.put_away(run, 2, True, [])
    with pytest.raises(UserError, match="none that is there was saved together with a validation"):
        checkpoint.find(run, "best")
    assert runs.best_loss(run, 1.0) is None


def test_only_what_is_done_again_is_dropped(tmp_path, capsys):
    """Records beyond the newest checkpoint go, with a line; not if the run goes on otherwise. What is damaged stays."""
    run = saved_run(tmp_path / "run", (2, 4), {})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert runs.put_away(run, 4, False, []) is None
    runs.say_what_goes(run, 4)
    said = capsys.readouterr().out
    assert "dropped 1 lines that are no records" in said
    assert "dropped 2 records, and the samples, beyond step 4: these steps are done again" in said
    aside = runs.put_away(run, 4, False, ["muon_lr: 1 there, 2 here"])
    assert aside.name == "step_00000004_to_00000006" and len(metrics.read_records(aside / "metrics.jsonl")) == 6
    for number in ("", "-2"):
        assert runs.put_away(run, 2, False, []) is None
        assert (run / f"checkpoints/damaged_step_00000004{number}/manifest.json").exists()
        checkpoint.save(run / "checkpoints", 4, {"model.a": torch.zeros(2)}, {}, keep=9)


def test_what_is_set_aside_still_takes_its_room(tmp_path, monkeypatch):
    run = saved_run(tmp_path / "run", (2, 4, 6, 8), {})
    each = runs.bytes_in(run / "checkpoints/step_00000002")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2.5 * each))
    source = run / "checkpoints/step_00000002"
    make = lambda **changes: settings.Config(save_interval=2, keep_checkpoints=9, eval_interval=0, **changes)
    runs.require_room(run, source, each, 4, make(resume=str(source)))
    with pytest.raises(UserError, match="will need .* more, but only"):
        runs.require_room(run, source, each, 6, make(resume=str(source)))
    runs.require_room(run, None, each, 12, make(overwrite=True))  # deletes four


def test_ranks_rewind_together(tmp_path, pool):
    path, run = small_run(tmp_path, max_steps=4, save_interval=2, keep_checkpoints=9, decay_steps=1), tmp_path / "run"
    before = losses(run)
    pool.run(2, run_train, path, f"--resume={run}/checkpoints/step_00000002", "--micro_batch_size=1")
    assert losses(run / "aside/step_00000002_to_00000004") == before
    assert losses(run)[:2] == before[:2] and losses(run)[-1][1] == pytest.approx(before[-1][1], abs=1e-4)


# ---------------------------------------------------------------------- with the run's own settings


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of two steps with settings that its config file does not have, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("ended run")
    path = make_config(folder / "tiny.py", data=str(make_data(folder / "data", 2000, 300)), hidden_size=16,
                       num_hidden_layers=2, global_batch_size=2, micro_batch_size=2)
    run_train(path, f"--out_dir={folder / 'b2'}", "--max_steps=2", "--moe_intermediate_size=8", "--muon_lr=0.003")
    return folder


def test_a_run_continues_with_its_own_settings(ended, tmp_path, monkeypatch):
    for number, words in enumerate((["--resume=RUN"], ["RUN", "--resume"], ["RUN", "--resume=auto"],
                                    ["--out_dir=RUN", "--resume"], ["--resume=RUN/checkpoints/step_00000002"],
                                    ["--resume=RUN/", "--out_dir=RUN", "--resume=auto"])):
        run = shutil.copytree(ended / "b2", tmp_path / f"moved {number}")
        run_train(*(word.replace("RUN", str(run)) for word in words), "--max_steps=3", "--warmup_steps=2")
        about = json.loads((run / "config.json").read_text())
        stored = about["settings"]
        assert losses(run)[-1][0] == 3 and stored["out_dir"] == str(run) and stored["max_steps"] == 3
        assert (stored["moe_intermediate_size"], stored["muon_lr"], stored["warmup_steps"]) == (8, 0.003, 2)
        assert about["command"][0] == str(ended / "tiny.py") == about["config_file"]
        assert [entry["words"][-1] for entry in about["commands"]] == ["--muon_lr=0.003", "--warmup_steps=2"]


def test_a_file_that_is_named_counts(ended):
    config, path = settings.load([str(ended / "tiny.py"), f"--resume={ended / 'b2'}"])
    assert config.muon_lr == 0.01 and config.out_dir == "out/tiny" and path == str(ended / "tiny.py")


def test_paths_are_meant_from_where_the_run_was_started(ended, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(ended / "b2", tmp_path / "run")
    about = json.loads((run / "config.json").read_text())
    about["settings"] |= {"data": "data", "future_setting": 7}
    del about["settings"]["z_loss"]
    (run / "config.json").write_text(json.dumps(about | {"directory": str(ended)}))
    monkeypatch.chdir(tmp_path)
    assert settings.load(["--resume=run"])[0].data == str(ended / "data")
    said = capsys.readouterr().err
    assert f"data is taken from {ended}, where run was started" in said
    assert "future_setting: 7, unknown to this version" in said and "z_loss: not recorded, so 0.0" in said
    monkeypatch.chdir(ended)
    assert settings.load([f"--resume={run}"])[0].data == "data"


@pytest.mark.parametrize("words, message", [
    (["b2"], "b2 is a run, not a config file: continue it with  python train.py --resume=b2"), (["data"], "no config file"),
    (["b2", "--overwrite"], "is a run, not a config file"), (["--resume"], "name one config file"),
    (["--resume=data"], "data has no config.json with the settings of a run: name a config file too"),
    (["--resume=no/such"], "no/such has no config.json"), (["tiny.py", "b2", "--resume"], "got .*tiny.py.*b2")])
def test_what_names_no_run_is_said(ended, monkeypatch, words, message):
    monkeypatch.chdir(ended)
    with pytest.raises(UserError, match=message):
        settings.load(words)


def test_the_command_that_continues_can_be_pasted(ended, monkeypatch):
    for name in ("WORLD_SIZE", "NANOK2_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "../train.py", "configs/debug.py"])
    assert shlex.split(guard.command(ended / "b2")) == ["python", "../train.py", f"--resume={ended / 'b2'}"]
    assert settings.load(shlex.split(guard.command(ended / "b2"))[2:])[0].out_dir == str(ended / "b2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert guard.command("out/x") == "torchrun --standalone --nproc_per_node=2 ../train.py out/x --resume=auto"
    monkeypatch.chdir(ended)
    assert guard.command("b2") == "torchrun --standalone --nproc_per_node=2 ../train.py --resume=b2"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert "--nnodes=2 --node_rank=$NODE_RANK --master_addr=10.0.0.1" in guard.command("b2")
    monkeypatch.setenv("NANOK2_LAUNCHER", "bash launch/multinode.sh")
    assert shlex.split(guard.command(ended / "b2")) == ["bash", "launch/multinode.sh", f"--resume={ended}/b2"]


def test_a_run_that_is_done_says_so_and_changes_nothing(ended, capsys):
    before = {path: path.read_bytes() for path in (ended / "b2").rglob("*") if path.is_file() and path.name != ".lock"}
    for words in ([f"--resume={ended / 'b2'}"], [ended / "tiny.py", f"--resume={ended / 'b2'}", "--max_steps=1",
                                                 f"--out_dir={ended / 'b2'}", "--moe_intermediate_size=8"]):
        capsys.readouterr()
        assert run_train(*words) is None
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "done already" in line]
        assert "step 2 is done already" in line and shlex.split(line)[-1] == "--max_steps=4"
    assert before == {path: path.read_bytes() for path in before}


# ---------------------------------------------------------------------- what a resumed run may change


LIKE_THE_LOSS = {"rope_theta": 10.0, "aux_loss_alpha": 0.5, "z_loss": 0.1, "initializer_range": 0.5,
                 "max_position_embeddings": 128,
                 "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}
THE_FUNCTION = {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 2, "norm_topk_prob": False,
                "routed_scaling_factor": 9.0, "rms_norm_eps": 1e-3}
TENSORS = {"attention": "mha", "vocab_size": 99, "hidden_size": 48, "intermediate_size": 48, "moe_intermediate_size": 8,
           "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
           "qk_rope_head_dim": 8, "v_head_dim": 4, "n_routed_experts": 16, "n_shared_experts": 2,
           "first_k_dense_replace": 2, "tie_word_embeddings": True}


def test_every_field_of_the_model_is_decided(tmp_path):
    """A field that holds no tensor is allowed to change with a line, or refused; a new one has to be put here."""
    shapes = lambda c: {n: p.shape for n, p in build(c, "meta").named_parameters(remove_duplicate=False)}
    same = lambda a, b: shapes(a) == shapes(b) and a.tie_word_embeddings == b.tie_word_embeddings
    there = ModelConfig(**TINY)
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {*LIKE_THE_LOSS, *THE_FUNCTION, *TENSORS}
    stream = SimpleNamespace(identity=dict)
    manifest = {"config": dataclasses.asdict(settings.Config(**TINY))}
    for name, value in (LIKE_THE_LOSS | THE_FUNCTION | TENSORS).items():
        assert same(there, ModelConfig(**TINY | {name: value})) == (name not in TENSORS), name
        config = settings.Config(**TINY | {"routed_scaling_factor": there.routed_scaling_factor, name: value})
        if name in LIKE_THE_LOSS:
            told = f"{name}: {getattr(there, name)} there, {value} here"
            assert runs.compare(config, None, stream, manifest, "x") == [told]
        else:
            with pytest.raises(UserError, match=f"holds another model: {name}"):
                runs.compare(config, None, stream, manifest, "x")


def test_a_stage_of_longer_context_keeps_its_optimizer_state(tmp_path, capsys):
    path, run = small_run(tmp_path, max_steps=2, decay_steps=1), tmp_path / "run"
    run_train(path, f"--resume={run}", f"--out_dir={tmp_path / 'long'}", "--max_steps=4", "--new_data",
              "--sequence_length=64", "--rope_theta=10000", "--max_position_embeddings=128",
              "--rope_scaling={'type':'yarn','factor':2.0,'original_max_position_embeddings':64}")
    said = capsys.readouterr().out
    assert "changed: rope_theta: 50000.0 there, 10000.0 here" in said and "changed: rope_scaling: None there" in said
    assert checkpoint.read_manifest(checkpoint.find(tmp_path / "long"))["optimizer_steps"] == 4
    assert generate.load(tmp_path / "long")[0].config.rope_scaling["factor"] == 2.0


@pytest.mark.parametrize("start, there, here, jumps", [
    (450, {}, {"max_steps": 900}, True),                       # wsd, ended: from 5e-4 back to 1e-2
    (450, {"schedule": "cosine"}, {"max_steps": 900, "schedule": "cosine"}, True),
    (150, {}, {"max_steps": 900}, False),                      # still at the peak
    (150, {}, {"max_steps": 300}, True),                       # in the middle of a fall
    (10, {}, {"warmup_steps": 200}, True),
    (10, {}, {"muon_lr": 5e-3}, True),
    (300, {}, {"muon_lr": 5e-3}, True),
    (300, {"adamw_lr": 3e-3}, {"max_steps": 600, "adamw_lr": 3e-3}, True),
    (450, {"decay_steps": None}, {"max_steps": 900, "decay_steps": None}, True),
    (450, {"schedule": "constant"}, {"schedule": "constant", "max_steps": 900}, False),
    (300, {}, {}, None)])
def test_what_the_rate_will_do_is_said_and_how_to_keep_it(start, there, here, jumps):
    base = dict(max_steps=450, warmup_steps=20, decay_steps=250, muon_lr=1e-2, min_lr_ratio=0.05)

    def rate(config, step, peak=None):
        decay = config.max_steps // 5 if config.decay_steps is None else config.decay_steps
        return (peak or config.muon_lr) * schedule_factor(step, config.schedule, config.max_steps, config.warmup_steps,
                                                          decay, config.min_lr_ratio)
    old, new = settings.Config(**base | there), settings.Config(**base | there | here)
    said = runs.rates(dataclasses.asdict(old), new, start)
    if jumps is None:
        assert said == ""
        return
    assert said.startswith("warning: ") == jumps and f"{rate(old, start):.2e} at step {start}" in said
    assert f"{rate(new, start + 1):.2e} at step {start + 1}" in said and ("To hold" in said) == jumps
    if not jumps:
        return
    advice = said.split("To hold")[1].split("; to let")
    hold, fall = (settings.read_flags(re.findall(r"--\S+", part)) for part in advice)
    held = settings.Config(**base | there | here | hold)
    at = rate(old, start)
    assert [rate(held, step) for step in range(start + 1, held.max_steps + 1)] == pytest.approx(
        [at] * (held.max_steps - start), rel=1e-4)
    if old.adamw_lr:
        assert held.adamw_lr == pytest.approx(rate(old, start, old.adamw_lr), rel=1e-4)
    falling = settings.Config(**base | there | here | fall)
    rates = [rate(falling, step) for step in range(start + 1, falling.max_steps + 1)]
    assert 0.98 * at < rates[0] < 1.0001 * at and rates[-1] == pytest.approx(0.05 * at, rel=1e-4)
    assert rates == sorted(rates, reverse=True)


def test_the_resume_event_holds_what_the_rate_does(tmp_path, capsys):
    path, run = small_run(tmp_path, max_steps=2, warmup_steps=1), tmp_path / "run"
    run_train(path, "--resume", "--max_steps=3", "--muon_lr=0.1")
    (event,) = [e for e in records(run, "event") if e["event"] == "resume"]
    assert event["rates"].startswith("warning: learning rate: 1.00e-02 at step 2, 1.00e-01 at step 3")
    assert event["rates"] in capsys.readouterr().out


def test_epochs_count_what_was_read_and_will_be(tmp_path, capsys):
    """2,000 tokens are 62 windows of 32: two steps of eight sequences, then two of 16; then other data, and back."""
    path, other = small_run(tmp_path, max_steps=2, decay_steps=1, global_batch_size=8), tmp_path / "other"
    make_data(other, 2000, 100, seed=1)
    shown = lambda: float(re.search(r"([\d.]+) epochs in all", capsys.readouterr().out).group(1))
    assert shown() == pytest.approx(16 / 62, abs=0.006)
    options = (path, "--resume", "--global_batch_size=16", "--new_data")
    run_train(*options, "--max_steps=4")
    assert shown() == pytest.approx(48 / 62, abs=0.006)
    run_train(*options, "--max_steps=5", f"--data={other}")
    assert shown() == pytest.approx(16 / 62, abs=0.006)
    run_train(*options, "--max_steps=6")
    assert shown() == pytest.approx(64 / 62, abs=0.006)

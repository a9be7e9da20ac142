"""A run goes on with its own settings, however it is named, and the command that continues it can be pasted."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import settings
from errors import UserError
from run import guard
from tests.helpers import ROOT, losses, make_config, make_data, run_train


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
        about = json.loads((run / "config.json").read_text(encoding="utf-8"))
        stored = about["settings"]
        assert losses(run)[-1][0] == 3 and stored["out_dir"] == str(run) and stored["max_steps"] == 3
        assert (stored["moe_intermediate_size"], stored["muon_lr"], stored["warmup_steps"]) == (8, 0.003, 2)
        assert about["command"][0] == str(ended / "tiny.py") == about["config_file"]
        assert [entry["words"][-1] for entry in about["commands"]] == ["--muon_lr=0.003", "--warmup_steps=2"]


@pytest.mark.parametrize("words, resume", [
    (["b2/checkpoints/step_00000002", "--resume"], "b2/checkpoints/step_00000002"),
    (["b2/checkpoints", "--resume"], True), (["b2/config.json", "--resume"], True), (["b2/", "--resume=auto"], "auto"),
    (["--resume=b2/checkpoints/latest"], "b2"), (["--resume=b2/checkpoints/"], "b2"),
    (["--resume=b2/config.json"], "b2"),
    (["--resume=b2/checkpoints/best"], "b2/checkpoints/step_00000001"),
    (["tiny.py", "--resume=b2/checkpoints/latest"], "b2")])
def test_a_path_into_a_run_names_it(ended, monkeypatch, words, resume):
    monkeypatch.chdir(ended)
    best = Path("b2/checkpoints/best")
    best.write_text("step_00000001\n", encoding="utf-8")
    try:
        config, _ = settings.load(words)
    finally:
        best.unlink()
    assert config.resume == resume and (config.out_dir, config.muon_lr) in (("b2", 0.003), ("out/tiny", 0.01))


def test_a_file_that_is_named_counts(ended):
    config, path = settings.load([str(ended / "tiny.py"), f"--resume={ended / 'b2'}"])
    assert config.muon_lr == 0.01 and config.out_dir == "out/tiny" and path == str(ended / "tiny.py")


def test_settings_of_another_version_are_said(ended, tmp_path, capsys):
    run = shutil.copytree(ended / "b2", tmp_path / "run")
    about = json.loads((run / "config.json").read_text(encoding="utf-8"))
    about["settings"] |= {"future_setting": 7}
    del about["settings"]["z_loss"]
    (run / "config.json").write_text(json.dumps(about), encoding="utf-8")
    settings.load([f"--resume={run}"])
    said = capsys.readouterr().err
    assert "future_setting: 7, unknown to this version" in said and "z_loss: not recorded, so 0.0" in said


@pytest.mark.parametrize("words, message", [
    (["b2"], "b2 is of a run, not a config file: continue it with  .*train.py --resume=b2$"),
    (["data"], "no config file"), (["b2/config.json"], "json is of a run, not a config file: .*train.py --resume=b2$"),
    (["b2", "--overwrite"], "is of a run, not a config file"), (["--resume"], "name one config file"),
    (["--resume=data"], "data has no config.json .*: name its config file too, before --resume=data$"),
    (["--resume=no/such"], "^there is no folder no/such$"), (["no/such", "--resume"], "^there is no folder no/such$"),
    (["tiny.py", "b2", "--resume"], "got .*tiny.py.*b2")])
def test_what_names_no_run_is_said(ended, monkeypatch, words, message):
    monkeypatch.chdir(ended)
    with pytest.raises(UserError, match=message):
        settings.load(words)


def test_the_command_that_continues_can_be_pasted(ended, monkeypatch):
    for name in ("WORLD_SIZE", "NANOK2_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "../train.py", "configs/debug.py"])
    script = os.path.relpath(ROOT / "train.py")
    assert shlex.split(guard.command(ended / "b2")) == ["python", script, f"--resume={ended / 'b2'}"]
    assert settings.load(shlex.split(guard.command(ended / "b2"))[2:])[0].out_dir == str(ended / "b2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert shlex.split(guard.command("out/x")) == [*launcher, script, "out/x", "--resume=auto"]
    monkeypatch.chdir(ended)
    script = os.path.relpath(ROOT / "train.py")
    assert shlex.split(guard.command("b2")) == [*launcher, script, "--resume=b2"] and os.path.isfile(script)
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

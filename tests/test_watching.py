"""What watches a run cannot end it: terminal, log, samples, curves, W&B; and what it says of time is right."""

import builtins
import io
import os
import random
import sys
import threading
import time
import types

import pytest
import torch

import errors
import talk.text
import train
from data import prepare
from ranks import parallel
from run import checkpoint, guard, metrics, report, services
from tests.helpers import losses, records, run_train

SHORT = ["--max_steps=3", "--decay_steps=1"]


# ---------------------------------------------------------------------- the terminal


def test_no_character_stops_a_terminal_of_another_encoding(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    errors.run(lambda argv: print("Größe 世 🙂"))
    assert raw.getvalue().decode("latin-1") == "Größe \\u4e16 \\U0001f642\n"


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")], ids=str)
def test_a_run_outlives_its_terminal(config, tmp_path, monkeypatch, error):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", told)
    run_train(config, *SHORT)
    assert sys.stdout.error is error  # as it was
    assert told.getvalue().count("warning: the terminal's lines are lost") == 1 and error.strerror in told.getvalue()
    assert len(losses(tmp_path / "run")) == 3


def ended(stream, monkeypatch, main):
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        errors.run(main)
    stream.close()  # what the interpreter does at its end must not fail either
    return end.value.code


@pytest.mark.parametrize("main", [train.main, prepare.main, lambda argv: print("x")], ids=["train", "prepare", "short"])
def test_output_that_nobody_reads_ends_quietly(main, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    assert ended(open(write, "w", encoding="utf-8"), monkeypatch, main) == 128 + 13
    assert capsys.readouterr().err == ""


def test_output_to_a_full_disk_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    assert ended(open("/dev/full", "w", encoding="utf-8"), monkeypatch, train.main) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_a_mistake_is_said_even_where_nobody_reads_the_output(monkeypatch, capsys):
    def mistaken(argv):
        print("something")
        raise errors.UserError("a mistake")

    read, write = os.pipe()
    os.close(read)
    assert ended(open(write, "w", encoding="utf-8"), monkeypatch, mistaken) == 2
    assert capsys.readouterr().err == "error: a mistake\n"


def test_another_broken_pipe_is_no_quiet_end(monkeypatch, capsys):
    def worker_died(argv):
        raise BrokenPipeError(32, "Broken pipe")

    with open(os.devnull, "w", encoding="utf-8") as stream:
        assert ended(stream, monkeypatch, worker_died) == 2
    assert "Broken pipe" in capsys.readouterr().err


# ---------------------------------------------------------------------- log, samples, curves


@pytest.mark.parametrize("error", [IndexError("an empty prompt"), RuntimeError("a kernel"), UnicodeDecodeError(
    "utf-8", b"\xff", 0, 1, "odd")], ids=lambda error: type(error).__name__)
def test_a_sample_that_fails_is_told_once_and_the_run_goes_on(config, tmp_path, monkeypatch, capsys, error):
    run_train(config, *SHORT, f"--out_dir={tmp_path / 'plain'}")

    def encode_prompt(encoder, prompt):
        raise error

    monkeypatch.setattr(report, "encode_prompt", encode_prompt)
    run_train(config, *SHORT, "--sample_interval=1", "--sample_prompts=['x', 'y']")
    said = capsys.readouterr().out
    assert said.count("warning: the sample of 'x' is incomplete") == said.count("warning: the sample of 'y' is ") == 1
    assert "warning: the sample of 'x': 3 times nothing could be written" in said
    assert losses(tmp_path / "run") == losses(tmp_path / "plain") and not (tmp_path / "run/samples.md").exists()


def test_a_sample_that_fails_in_the_midst_leaves_the_model_training(config, tmp_path, monkeypatch):
    run_train(config, *SHORT, f"--out_dir={tmp_path / 'plain'}")

    def token_bytes(encoder, token):
        raise KeyError(token)

    monkeypatch.setattr(talk.text, "token_bytes", token_bytes)
    run_train(config, *SHORT, "--sample_interval=1")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def failing_samples(error, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talk.text, "token_bytes", lambda encoder, token: (_ for _ in ()).throw(error))
        run_train(*words, *SHORT, "--sample_interval=1", "--sample_prompts=['a', 'b']", "--strategy=fsdp")


def test_samples_that_fail_on_all_ranks_let_them_go_on_together(config, tmp_path, pool):
    pool.run(2, failing_samples, KeyError("a token"), config)
    pool.run(2, run_train, config, *SHORT, f"--out_dir={tmp_path / 'plain'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain") and len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_memory_and_ctrl_c_pass_through_a_sample(config, monkeypatch, error):
    def encode_prompt(encoder, prompt):
        raise error

    monkeypatch.setattr(report, "encode_prompt", encode_prompt)
    with pytest.raises((errors.UserError, KeyboardInterrupt)):
        run_train(config, *SHORT, "--sample_interval=1")


def test_no_log_and_no_picture_ends_a_run(config, tmp_path, monkeypatch, capsys):
    def full(*words):
        raise OSError(28, "No space left on device")

    def no_matplotlib(folder):
        raise ImportError("No module named 'matplotlib'")

    original = metrics.RunLog.__init__

    def broken_from_the_start(self, *words, **options):
        original(self, *words, **options)
        self.file = types.SimpleNamespace(write=full, close=lambda: None)

    monkeypatch.setattr(metrics.RunLog, "__init__", broken_from_the_start)
    monkeypatch.setattr(metrics, "draw_curves", no_matplotlib)
    assert run_train(config, *SHORT)["step"] == 3
    said = capsys.readouterr().out
    assert said.count("warning: metrics.jsonl is incomplete (OSError: [Errno 28] No space left on device)") == 1
    assert "warning: curves.png is incomplete (ImportError: No module named 'matplotlib')" in said
    assert "warning: metrics.jsonl: 7 times nothing could be written" in said  # two a step, one save
    assert checkpoint.find(tmp_path / "run").name == "step_00000003"


def test_bytes_of_samples_that_are_no_text_stay_what_they_are(tmp_path):
    odd = b"# Samples\n\n## step 1\n\n~~~\n\xff\r\n\xc3\xa4\n~~~\n"
    (tmp_path / "samples.md").write_bytes(odd + b"\n## step 9\n\n~~~\nlater\n~~~\n")
    log = metrics.RunLog(tmp_path, types.SimpleNamespace(wandb="off", tensorboard=False), 1, "id")
    log.sample(2, "Größe ", "世界 \udcff\r\n")
    log.close()
    added = "\n## step 2\n\n~~~\nGröße 世界 ".encode() + b"\xff\r\n\n~~~\n"
    assert (tmp_path / "samples.md").read_bytes() == odd + added


def test_samples_that_cannot_be_read_end_no_run(tmp_path, capsys):
    (tmp_path / "samples.md").mkdir()
    log = metrics.RunLog(tmp_path, types.SimpleNamespace(wandb="off", tensorboard=False), 1, "id")
    log.sample(2, "a", "b")
    log.close()
    said = capsys.readouterr().out
    assert said.count("warning: samples.md is incomplete (IsADirectoryError") == 1
    assert "samples.md: 2 times nothing could be written" in said


# ---------------------------------------------------------------------- W&B


class Service:
    """Stands for the package wandb; does what it is told when it is called."""

    step = 0  # of a run that has nothing yet

    def __init__(self, **what):
        self.what, self.calls = what, []

    def __getattr__(self, name):
        def call(*words, **options):
            self.calls.append(name)
            action = self.what.get(name)
            if isinstance(action, BaseException):
                raise action
            if action:
                action()
            return self
        return call


@pytest.mark.parametrize("name, error", [("init", SystemExit(1)), ("log", ValueError("x")), ("finish", TypeError("x"))])
def test_whatever_wandb_raises_is_one_line(config, tmp_path, monkeypatch, capsys, name, error):
    monkeypatch.setitem(sys.modules, "wandb", Service(**{name: error}))
    run_train(config, *SHORT, "--wandb=offline")
    assert capsys.readouterr().out.count("warning: W&B did not ") == 1 and len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_a_service_that_hangs_is_left_behind(config, tmp_path, monkeypatch, capsys, name):
    release = threading.Event()
    monkeypatch.setattr(services, "PATIENCE", 0.2)
    monkeypatch.setitem(sys.modules, "wandb", Service(**{name: release.wait}))
    run_train(config, *SHORT, "--wandb=offline")
    release.set()
    assert "warning: W&B does not answer" in capsys.readouterr().out and len(losses(tmp_path / "run")) == 3


def test_a_damaged_package_is_refused_where_it_was_asked_for(config, monkeypatch):
    original = builtins.__import__

    def damaged(name, *words, **options):
        if name == "wandb":
            raise TypeError("Descriptors cannot be created directly")
        return original(name, *words, **options)

    monkeypatch.setattr(builtins, "__import__", damaged)
    with pytest.raises(errors.UserError, match="wandb='offline' needs the package.*--wandb=off.*Descriptors"):
        run_train(config, *SHORT, "--wandb=offline")
    run_train(config, *SHORT, "--wandb=auto")


# ---------------------------------------------------------------------- time


def test_every_record_says_when(config, tmp_path):
    before = time.time()
    run_train(config, *SHORT, "--eval_interval=2")
    times = [record["time"] for kind in ("train", "val", "event") for record in records(tmp_path / "run", kind)]
    assert len(times) > 5 and all(before - 1 < at < time.time() + 1 for at in times)


def test_the_rest_of_a_run_is_told_steadily():
    """1,000 steps of a second, the first three of a minute; one in thirty hangs for half a minute; a validation of 20 s
    every hundred."""
    rng, pace, told = random.Random(0), metrics.Pace(), []
    for step in range(1, 1001):
        took = 60 if step <= 3 else 31 if rng.random() < 1 / 30 else 1 + 0.2 * rng.random()
        pace.add(took, 20 if step % 100 == 1 and step > 1 else 0)
        told.append((step, pace.left(1000 - step)))
    assert told[0][1] == 999 * 60  # nothing else is known yet
    steady = [left / (1000 - step) for step, left in told[10:-1]]
    assert 1.05 < min(steady) and max(steady) < 2.2
    jumps = [abs(b - a) / a for a, b in zip(steady, steady[1:])]
    assert max(jumps) < 0.35 and sum(jump > 0.1 for jump in jumps) < 20
    assert told[-1][1] == 0


def test_a_pace_that_changes_is_followed():
    pace = metrics.Pace()
    for took in [1.0] * 300 + [2.0] * 128:
        pace.add(took)
    assert pace.left(10) == pytest.approx(20)


# ---------------------------------------------------------------------- ranks, signals, compilers


@pytest.mark.parametrize("seconds, slow", [([0.0001, 0.0004, 0.0001], []), ([0.006, 0.0105, 0.006], []),
                                           ([0.006, 0.013, 0.006], [1]), ([0.1, 0.19, 0.1], []),
                                           ([0.1, 0.21, 0.1], [1])])
def test_nobody_is_slow_by_less_than_a_clock_can_tell(monkeypatch, seconds, slow):
    monkeypatch.setattr(guard.parallel, "ranks", lambda: 3)
    monkeypatch.setattr(guard.parallel, "from_all", lambda mine: [(s, 0.0, "host") for s in seconds])
    assert [found["rank"] for found in guard.stragglers(0.0, torch.device("cpu"))] == slow


def test_ctrl_c_that_torchrun_repeats_is_one(monkeypatch):
    watch = guard.Guard([])
    watch.signal, ended = "SIGINT", watch._echo(2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert ended == 0 and watch._echo(2) == 2 and watch._echo(15) == 5
    watch.signal = "SIGTERM"
    assert watch._echo(2) == 0  # another signal is meant


def test_a_compiler_that_does_not_work_is_one_line(config, monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (None, "/nonexistent/g++"), "force_disable_caches": True}):
        said = r"does not work here \(InvalidCxxCompiler: No working C\+\+ compiler .*install a C\+\+.*--no-compile"
        with pytest.raises(errors.UserError, match=said):
            run_train(config, *SHORT, "--compile")
    torch._dynamo.reset()


def test_a_cache_folder_that_cannot_be_written_is_named(config, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nanok2")
    with pytest.raises(errors.UserError, match="/proc/nanok2.*TORCHINDUCTOR_CACHE_DIR name a folder"):
        run_train(config, *SHORT, "--compile")
    torch._dynamo.reset()


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA A100-SXM4-40GB", 312e12), ("A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H800 PCIe", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
def test_no_card_has_the_peak_of_another(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(torch.device("cuda")) == peak


def test_other_errors_keep_their_traceback():
    for error in (OSError(2, "a shard"), RuntimeError("a bug"), KeyError("x")):
        guard.refuse_broken_compiler(error)


def test_what_takes_long_on_a_gpu_is_announced(capsys):
    for device in ("cpu", "cuda"):
        parallel.announce("checking the kernels", torch.device(device))
    assert capsys.readouterr().out == "checking the kernels ...\n"

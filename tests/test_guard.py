"""What watches over a run: spikes and rollbacks, drifted and slow ranks, hung steps, memory, disk space."""

import math
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time

import pytest
import torch

import settings
import train
from data import loader
from errors import STOPPED, UserError
from model import K2
from muon import Muon, local_rows
from ranks import parallel
from run import checkpoint, folder, guard
from tests.helpers import (
    ROOT,
    assert_equal_runs,
    final_tensors,
    losses,
    records,
    run_restarting,
    run_stopped,
    run_train,
    stragglers,
)

# ---------------------------------------------------------------------- loss spikes


def test_a_spike_is_told_by_hand_computed_statistics():
    spikes = guard.Spikes(6.0)
    before = [3 + 0.1 * (-1) ** i for i in range(40)]  # mean 3, deviation 0.1
    assert [spikes.height(loss) for loss in before] == [None] * 40
    assert spikes.height(3.59) is None
    values = [*before, 3.59]
    expected = (4.2 - statistics.fmean(values)) / statistics.pstdev(values)
    assert spikes.height(4.2) == pytest.approx(expected) and expected > 6
    assert spikes.height(4.2) > 5.9  # one spike does not hide the next
    assert spikes.height(-4.2) is None  # only upwards
    flat = guard.Spikes(6.0, [2.0] * 64)
    assert flat.height(2.11) is None and flat.height(2.2) is not None  # a deviation of at least 1 % of the mean
    assert guard.Spikes(0.0, [2.0] * 64).height(99.0) is None  # off
    assert guard.Spikes(6.0, [2.0] * 31).height(99.0) is None  # too few to tell
    assert len(guard.Spikes(6.0, range(1000)).losses) == 128


SPIKE = 61  # the step whose data is bad
STEPS = [f"--max_steps={SPIKE + 9}", "--save_interval=20", "--decay_steps=5", "--keep_checkpoints=9",
         "--spike_sigmas=5", "--micro_batch_size=8"]


@pytest.fixture
def bad_data(monkeypatch):
    """The sequences of step 61 are noise."""
    original = loader.TrainStream.sequence

    def sequence(self, i):
        found = original(self, i)
        if i // 8 + 1 != SPIKE:
            return found
        return torch.randint(100, 256, (len(found),), generator=torch.Generator().manual_seed(i)).numpy()

    monkeypatch.setattr(loader.TrainStream, "sequence", sequence)


def test_a_spike_rolls_back_and_leaves_out_its_data(config, tmp_path, bad_data, capsys):
    """Scorecard 10, of the loss: back to step 60, without the eight sequences; then exactly the run that a user would
    get who resumes there and skips them by hand."""
    run, by_hand = tmp_path / "run", tmp_path / "by_hand"
    _, words = run_restarting(config, *STEPS, "--max_rollbacks=2")
    assert len(words) == 2 and words[1][-3:] == ["--skip_sequences=8", "--no-overwrite", "--max_rollbacks=1"]
    events = [e for e in records(run, "event") if e["event"] != "save"]
    assert [e["event"] for e in events] == ["rollback", "resume"] and events[1]["skipped"] == 8
    assert events[0]["step"] == 60 and events[0]["from_step"] == SPIKE and events[0]["sequences"] == [480, 488]
    assert "standard deviations above" in events[0]["reason"] and "leaving out 8 sequences" in capsys.readouterr().out
    assert [step for step, _ in losses(run)] == list(range(1, SPIKE + 10))
    aside = run / "aside/step_00000060_to_00000061"  # what was recorded, and no checkpoint: no gigabyte
    assert "spike" in [e["event"] for e in records(aside, "event")]
    assert not checkpoint.step_folders(aside / "checkpoints")
    assert checkpoint.read_manifest(checkpoint.find(run))["sequences"] == (SPIKE + 9) * 8 + 8
    run_train(config, *STEPS, f"--resume={run}/checkpoints/step_00000060", f"--out_dir={by_hand}", "--skip_sequences=8")
    assert losses(run)[60:] == losses(by_hand)
    one, other = final_tensors(run), final_tensors(by_hand)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_spike_is_recorded_where_no_rollback_was_asked_for(config, tmp_path, bad_data):
    run_train(config, *STEPS)
    (spike,) = [e for e in records(tmp_path / "run", "event") if e["event"] == "spike"]
    assert spike["step"] == SPIKE and spike["sigmas"] > 5 and spike["loss"] == losses(tmp_path / "run")[SPIKE - 1][1]
    assert len(losses(tmp_path / "run")) == SPIKE + 9
    # A resumed run judges with the losses before it: the same event.
    words = [f"--resume={tmp_path / 'run'}/checkpoints/step_00000060", f"--out_dir={tmp_path / 'resumed'}"]
    run_train(config, *STEPS, *words)
    (again,) = [e for e in records(tmp_path / "resumed", "event") if e["event"] == "spike"]
    assert again | {"time": 0} == spike | {"time": 0}


def test_non_finite_steps_roll_back_too_as_often_as_allowed(config, tmp_path, monkeypatch):
    original, turns = K2.forward, iter(range(10**6))

    def forward(self, *args, **options):
        loss, *rest = original(self, *args, **options)
        return (loss * math.nan if 30 <= next(turns) < 34 else loss), *rest  # steps 16 and 17

    monkeypatch.setattr(K2, "forward", forward)
    words = [config, "--max_skipped_steps=2", "--save_interval=10", "--max_rollbacks=1"]
    last, asked = run_restarting(*words)
    assert len(asked) == 2 and last["step"] == 20 and math.isfinite(last["loss"])
    (event,) = [e for e in records(tmp_path / "run", "event") if e["event"] == "rollback"]
    assert event["reason"] == "2 non-finite steps in a row" and event["sequences"] == [80, 136]
    monkeypatch.setattr(K2, "forward", lambda self, *a, **k: tuple(x * math.nan for x in original(self, *a, **k)))
    with pytest.raises(UserError, match="2 non-finite steps in a row: lower the learning rates"):
        run_restarting(*words, "--resume", "--max_steps=30")
    with pytest.raises(UserError, match="non-finite steps in a row"):  # nothing to go back to
        run_restarting(*words, "--overwrite")


def test_nothing_is_saved_while_steps_are_not_finite(config, tmp_path, monkeypatch):
    """Retention would delete what to go back to."""
    original, turns = K2.forward, iter(range(10**6))

    def forward(self, *args, **options):
        loss, *rest = original(self, *args, **options)
        return (loss * math.nan if next(turns) >= 20 else loss), *rest  # from step 11 on

    monkeypatch.setattr(K2, "forward", forward)
    words = [config, "--save_interval=2", "--keep_checkpoints=2", "--max_skipped_steps=8"]
    with pytest.raises(UserError, match="8 non-finite steps in a row"):
        run_train(*words)
    assert [p.name[-2:] for p in checkpoint.step_folders(tmp_path / "run/checkpoints")] == ["08", "10"]


def test_a_signal_together_with_a_rollback_stops_the_run(config, tmp_path, monkeypatch):
    original, turns = K2.forward, iter(range(10**6))

    def forward(self, *args, **options):
        loss, *rest = original(self, *args, **options)
        if next(turns) != 22:  # in step 12
            return loss, *rest
        signal.raise_signal(signal.SIGTERM)
        return loss * math.nan, *rest

    monkeypatch.setattr(K2, "forward", forward)
    run_stopped(config, "--save_interval=10", "--max_skipped_steps=1", "--max_rollbacks=1")
    assert checkpoint.find(tmp_path / "run").name == "step_00000010"


def test_a_signal_on_the_way_back_reaches_the_next_start(config, tmp_path, monkeypatch):
    """Which saves after its first step; it came when all ranks had agreed that there was none."""
    original, back, turns = K2.forward, folder.roll_back, iter(range(10**6))

    def forward(self, *args, **options):
        loss, *rest = original(self, *args, **options)
        return (loss * math.nan if next(turns) == 22 else loss), *rest  # in step 12

    monkeypatch.setattr(K2, "forward", forward)
    monkeypatch.setattr(folder, "roll_back", lambda *words: signal.raise_signal(signal.SIGTERM) or back(*words))
    with pytest.raises(SystemExit) as end:
        run_restarting(config, "--save_interval=10", "--max_skipped_steps=1", "--max_rollbacks=1")
    assert end.value.code == STOPPED and guard.SIGNAL not in os.environ
    assert checkpoint.find(tmp_path / "run").name == "step_00000011"


def test_a_timeout_beyond_every_clock_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="step_timeout=1000000000 must be at most 100000000"):
        run_train(config, "--step_timeout=1000000000")
    assert not (tmp_path / "run").exists()
    assert run_train(config, "--step_timeout=100000000", "--max_steps=1")["step"] == 1


def test_a_hangup_that_nohup_keeps_away_stays_away(config, monkeypatch):
    original, before = Muon.begin_step, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(Muon, "begin_step", lambda self: signal.raise_signal(signal.SIGHUP) or original(self))
    try:
        assert run_train(config, "--max_steps=3")["step"] == 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hangup_saves_unless_nohup_keeps_it_away(tmp_path):
    """torchrun hands on what it is told to handle, and would not go on ignoring a hangup itself."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PET_SIGNALS_TO_HANDLE" >> "$LOG"\nexit 1\n', encoding="utf-8")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LOG": str(tmp_path / "log")}
    for nohup in ([], ["nohup"]):
        subprocess.run([*nohup, "bash", "launch/multinode.sh", "x.py"], cwd=ROOT, env=environment, capture_output=True)
    with_it, without = [line.split(",") for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    assert set(with_it) - set(without) == {"SIGHUP"} and {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(without)
    script = (ROOT / "launch/multinode.sh").read_text(encoding="utf-8")
    assert "\ntrap stop TERM INT HUP USR1\n" in script  # run for real only of USR1


def test_skipping_needs_a_step_to_go_back_to(config):
    for words in (["--skip_sequences=8"], ["--skip_sequences=8", "--resume"], ["--skip_sequences=8", "--resume=auto"]):
        with pytest.raises(UserError, match="set --resume to a step folder"):
            run_train(config, *words)


def test_a_gradient_spike_is_clipped(config, tmp_path, monkeypatch):
    """Scorecard 10, of the gradient: ten thousand times too long, it moves the weights no further than the limit."""
    original, turns = parallel.squared_norm, iter(range(1000))

    def squared_norm(parameters, layout):
        if next(turns) == 9:
            parallel.scale_gradients(parameters, 1e4)
        return original(parameters, layout)

    run_train(config, f"--out_dir={tmp_path / 'plain'}")
    monkeypatch.setattr(parallel, "squared_norm", squared_norm)
    run_train(config)
    spiked, plain = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert records(tmp_path / "run")[9]["grad_norm"] > 5e3
    assert spiked[9:][0] == plain[9:][0] and spiked[-1][1] == pytest.approx(plain[-1][1], abs=0.05)


# ---------------------------------------------------------------------- ranks side by side


def drifting(kind, *words):
    """A run in which rank 1 changes something of its own in step 3."""
    original = Muon.update

    def step(self, *args):
        original(self, *args)
        if parallel.rank() != 1 or self.steps != 3:
            return
        if kind == "router bias":
            next(b for name, b in drifting.model.named_buffers() if name.endswith("e_score_correction_bias"))[0] += 1
        elif kind == "momentum":
            next(local_rows(t)[0] for name, t in self.named_state().items() if ".experts." in name).view(-1)[0] = 0.5
        elif kind == "weight":
            with torch.no_grad():
                local_rows(self.param_groups[0]["params"][0])[0].view(-1)[0].mul_(1 + 2**-20)  # a bit or two

    def forward(self, *args, **options):
        drifting.model = self
        return drifting.forward(self, *args, **options)

    drifting.forward = K2.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Muon, "update", torch.no_grad()(step))
        patch.setattr(K2, "forward", forward)
        try:
            train.main([str(word) for word in words])
        except UserError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("n, kind, words, ranks, name", [
    (2, "router bias", [], (0, 1), "layers.1.*e_score_correction_bias$"),
    (2, "weight", ["--strategy=ddp"], (0, 1), "^model.*weight$"),
    (4, "weight", ["--dp_replicate=2"], (1, 3), "^model.*weight$"),
    (4, "momentum", ["--dp_replicate=2", "--ep=2"], (1, 3), "^optim.*experts"),
], ids=["replicated buffer", "ddp", "hsdp", "hsdp and ep, momentum"])
def test_ranks_that_drift_apart_are_found_before_a_save(config, tmp_path, pool, n, kind, words, ranks, name):
    """Scorecard 21."""
    said = pool.run(n, drifting, kind, config, "--save_interval=2", "--check_interval=3", "--max_steps=8", *words)
    assert len(set(said)) == 1
    host = socket.gethostname()
    assert said[0].startswith(f"after step 3 ranks {ranks[0]} ({host}) and {ranks[1]} ({host}) differ in ")
    assert re.search(name, said[0].split(" differ in ")[1].split(",")[0])
    assert checkpoint.find(tmp_path / "run").name == "step_00000002"


def test_sharded_weights_have_nothing_to_be_compared_with_but_counters_have(config, pool):
    assert "differ in what they count" in pool.run(2, counting_apart, config)[0]


def counting_apart(config):
    parallel.make_layout(settings.load([config])[0], torch.device("cpu"))
    with pytest.raises(UserError) as error:
        guard.refuse_drift({"x": torch.ones(3)}, [7, 100 + parallel.rank()], 7)
    guard.refuse_drift({"x": torch.ones(3)}, [7, 100], 7)
    return str(error.value)


def slow_rank(*words):
    """Rank 1 computes slowly, rank 2 reads slowly."""
    probe, batch = guard._probe, loader.TrainStream.batch

    def late(self, first, size):
        if parallel.rank() == 2:
            time.sleep(1.0)
        return batch(self, first, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "_probe", lambda device: (100 if parallel.rank() == 1 else 1) * 0.001 + 0 * probe(device))
        patch.setattr(loader.TrainStream, "batch", late)
        train.main([str(word) for word in words])


def test_slow_ranks_are_named(config, tmp_path, pool):
    pool.run(3, slow_rank, config, "--global_batch_size=6", "--micro_batch_size=2", "--max_steps=4",
             "--check_interval=4")
    found = [(e["rank"], e["what"]) for e in stragglers(tmp_path / "run")]
    assert found == [(1, "computing"), (2, "data")]


# ---------------------------------------------------------------------- memory


def test_memory_that_does_not_suffice_at_first_halves_the_micro_batch(config, tmp_path, monkeypatch, capsys):
    run_train(config, f"--out_dir={tmp_path / 'two'}", "--micro_batch_size=2")
    original = K2.forward

    def forward(self, tokens_BT, *args, **options):
        if self.training and len(tokens_BT) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, tokens_BT, *args, **options)

    monkeypatch.setattr(K2, "forward", forward)
    _, words = run_restarting(config, "--micro_batch_size=8", "--overwrite")
    assert [word for word in words[-1] if word.startswith("--micro")][-1] == "--micro_batch_size=2" and len(words) == 3
    assert_equal_runs(tmp_path / "run", tmp_path / "two")
    assert "starting again with 4 and 2 forwards a step, the same global batch" in capsys.readouterr().err
    # From another run's step: what the first start wrote is replaced.
    source = f"--resume={tmp_path / 'two'}/checkpoints/step_00000020"
    run_restarting(config, f"--out_dir={tmp_path / 'on'}", source, "--max_steps=22", "--micro_batch_size=8")
    assert [step for step, _ in losses(tmp_path / "on")] == [21, 22]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), MemoryError(),
], ids=["torch", "cpu", "library", "python"])
def test_memory_that_does_not_suffice_later_is_an_error_with_the_levers(config, tmp_path, monkeypatch, error):
    original, turns = Muon.begin_step, iter(range(100))

    def step(self, *args):
        if next(turns) == 6:
            raise error
        return original(self, *args)

    monkeypatch.setattr(Muon, "begin_step", step)
    with pytest.raises(UserError, match=r"out of memory in step 7 .*--micro_batch_size \(now 4\).*--resume"):
        run_train(config, "--save_interval=5")
    assert checkpoint.find(tmp_path / "run").name == "step_00000005"
    run_train(config, "--resume")


def test_another_error_stays_what_it_is(config, monkeypatch):
    monkeypatch.setattr(Muon, "begin_step", lambda self: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_train(config)


def test_a_process_that_really_gets_no_memory_says_so_in_one_line(config, tmp_path):
    code = ("import errors, train; from run import memory; memory.require = lambda *_: None; "  # unforeseen
            "errors.run(train.main)")
    words = ["-c", code, config, "--sequence_length=4096", "--max_position_embeddings=4096", "--micro_batch_size=1024",
             "--global_batch_size=1024", "--hidden_size=512", "--max_steps=1"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100, env={**os.environ},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--micro_batch_size (now 1024)" in done.stderr

"""Kills at random instants and at the worst ones: what was saved is kept, and the run ends as if undisturbed."""

import os
import random
import signal
import time

import pytest

from run import checkpoint
from tests.attempts import GONE, Attempt, abandoned, assert_tidy, debris, newest, segments
from tests.helpers import assert_equal_runs, make_config, records, run_script, run_train

KILLS = int(os.environ.get("KILLS", 0))
STEPS = 40 if KILLS else 12


@pytest.fixture
def often_saved(tmp_path, data):
    """A config that saves every two steps and keeps two checkpoints."""
    return make_config(tmp_path / "tiny.py", data=str(data), max_steps=STEPS, save_interval=2, keep_checkpoints=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_kills_at_random_instants_lose_nothing(often_saved, tmp_path, ranks):
    """Scorecard 1. Whole runs, one after the other, until all kills are used up; every one must end as the undisturbed
    one did."""
    kills = KILLS or (3 if ranks == 1 else 1)
    began, before, rng = time.monotonic(), segments(), random.Random(ranks)
    whole = Attempt([often_saved], tmp_path / "whole", ranks)
    assert whole.wait() == 0, whole.output()
    fell, slowest, runs, start_up = {}, 0.0, 0, None
    while sum(fell.values()) < kills:
        out, runs = tmp_path / f"killed{runs}", runs + 1
        while True:
            saved, attempt = newest(out), Attempt([often_saved], out, ranks)
            try:
                if sum(fell.values()) < kills:
                    start_up = attempt.wait_for_instant(rng, STEPS // 2, start_up) or start_up
                    where, seconds = attempt.strike(rng)
                else:
                    where = "after the end"
                if where == "after the end":
                    assert attempt.wait() == 0, attempt.output()
                    break
            finally:
                attempt.kill_all()
            fell[where], slowest = fell.get(where, 0) + 1, max(slowest, seconds)
            assert newest(out) >= saved and "skipping damaged" not in attempt.output(), attempt.output()
            print(f"kill {sum(fell.values())} of run {runs}: {where}, newest checkpoint {newest(out)}, {debris(out)}, "
                  f"all gone after {seconds:.1f} s", flush=True)
        assert_tidy(out, STEPS)
        assert not [event for event in records(out, "event") if event["event"] == "save_failed"]
        assert_equal_runs(tmp_path / "whole", out)
        assert len(checkpoint.step_folders(out / "checkpoints")) == 2
        assert not attempt.family() and not abandoned(before)
    print(f"{ranks} ranks: {kills} kills over {runs} runs: {fell}; the others gone within {slowest:.1f} s; "
          f"{time.monotonic() - began:.0f} s in all")


@pytest.mark.parametrize("fault, kept, left", [
    ("kill_midsave@8", 6, [".tmp_00000008"]),
    ("kill_prerename@8", 6, [".tmp_00000008"]),
    ("kill_postrename@8", 8, []),
])
def test_kills_at_the_worst_instants_of_a_save(often_saved, tmp_path, fault, kept, left):
    """Scorecard 2, 3."""
    run_train(often_saved, f"--out_dir={tmp_path / 'whole'}", "--max_steps=12")
    words = [often_saved, "--max_steps=12"]
    attempt = Attempt(words, tmp_path / "run", faults=fault)
    assert attempt.wait(GONE) == -signal.SIGKILL
    assert newest(tmp_path / "run") == kept and debris(tmp_path / "run") == left
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000006\n"
    again = Attempt(words, tmp_path / "run", faults=fault)
    assert again.wait(GONE) == 0 and f"resumed from {tmp_path / 'run'}/checkpoints/step_{kept:08d}" in again.output()
    assert_tidy(tmp_path / "run", 12)
    assert not [event for event in records(tmp_path / "run", "event") if event["event"] == "save_failed"]
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_an_io_error_of_the_reading_thread_ends_the_run_with_its_step(often_saved, tmp_path):
    """Scorecard 23."""
    attempt = Attempt([often_saved], tmp_path / "run", faults="loader@6")
    assert attempt.wait(GONE) == 2
    assert "error: the data of step 6 cannot be read: [Errno 5] Input/output error" in attempt.output()
    assert "Traceback" not in attempt.output() and [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """The bench of all disturbances, for as long as CI can spare: with this seed it is three of them. In the run in
    peace everything has been there once, saves and a validation, before its memory is looked at for the first time."""
    words = ["--minutes=10", "--runs=1", "--long_steps=40", "--seed=2", f"--out={tmp_path}"]
    done = run_script("-m", "bench.soak", *words, check=0)
    assert "lost or different: 0; left: {'processes': [], 'shared memory': []}; flat: True" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 8])
def test_ranks_do_not_outlive_their_launcher(often_saved, tmp_path, step):
    attempt = Attempt([often_saved, "--max_steps=100000"], tmp_path / "run", ranks=2)
    attempt.wait_for_step(step)
    attempt.process.kill()
    attempt.wait(10)

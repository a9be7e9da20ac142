"""Kills at random instants and at the worst ones: what was saved is kept, and the run ends as if undisturbed."""

import os
import random
import time

import pytest

import checkpoint
from tests.attempts import GONE, Attempt, abandoned, assert_tidy, debris, newest, segments, send
from tests.helpers import assert_equal_runs, make_config, records, run_train

KILLS = int(os.environ.get("KILLS", 3))
STEPS = 40
SIGKILL = 9


@pytest.fixture
def often_saved(tmp_path, data):
    """A config that saves every two steps and keeps two checkpoints."""
    return make_config(tmp_path / "tiny.py", data=str(data), max_steps=STEPS, save_interval=2, keep_checkpoints=2)


def wait_for_instant(attempt, rng, start_up):
    """Return at a random instant of the attempt's life: while it starts (one time in three), or in the next half of the
    training, which is the same chance for every step and within a step and its save. start_up: the seconds of the last
    one, None at first. Returns those of this one if it was seen."""
    if start_up and rng.random() < 1 / 3:
        time.sleep(rng.random() * start_up)
        return None
    while not attempt.steps() and attempt.running():
        time.sleep(0.01)
    first = time.monotonic()
    target = rng.randrange(1, STEPS // 2)
    while len(attempt.steps()) < target and attempt.running():
        time.sleep(0.005)
    pace = (time.monotonic() - first) / max(target - 1, 1) if target > 1 else 0.1
    time.sleep(rng.random() * 2 * pace)
    return first - attempt.started


def strike(attempt, rng):
    """Kill a rank or, one time in three, everything at once; returns (where it fell, seconds until all were gone)."""
    pids = attempt.ranks()
    if not attempt.running():
        return "after the end", 0.0
    struck = time.monotonic()
    if pids and rng.random() < 2 / 3:
        send(rng.choice(pids), SIGKILL)
        attempt.wait(GONE)
    else:
        attempt.kill_all()
    if attempt.process.returncode == 0:
        return "after the end", 0.0
    where = "in a save" if debris(attempt.out) else "in the steps" if attempt.steps() else "while starting"
    return where, time.monotonic() - struck


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_kills_at_random_instants_lose_nothing(often_saved, tmp_path, request, ranks):
    """Whole runs, one after the other, until all kills are used up; every one must end as the undisturbed one did."""
    began, before, rng = time.monotonic(), segments(), random.Random(ranks)
    if ranks == 1:
        run_train(often_saved, f"--out_dir={tmp_path / 'whole'}")
    else:
        request.getfixturevalue("pool").run(ranks, run_train, often_saved, f"--out_dir={tmp_path / 'whole'}")
    fell, slowest, runs, start_up = {}, 0.0, 0, None
    while sum(fell.values()) < KILLS:
        out, runs = tmp_path / f"killed{runs}", runs + 1
        while True:
            saved, attempt = newest(out), Attempt([often_saved], out, ranks)
            try:
                if sum(fell.values()) < KILLS:
                    start_up = wait_for_instant(attempt, rng, start_up) or start_up
                    where, seconds = strike(attempt, rng)
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
        assert_equal_runs(tmp_path / "whole", out)
        assert len(checkpoint.step_folders(out / "checkpoints")) == 2
        assert not attempt.family() and not abandoned(before)
    print(f"{ranks} ranks: {KILLS} kills over {runs} runs: {fell}; the others gone within {slowest:.1f} s; "
          f"{time.monotonic() - began:.0f} s in all")


@pytest.mark.parametrize("fault, kept, left", [
    ("kill_midsave@8", 6, [".tmp_00000008"]),
    ("kill_prerename@8", 6, [".tmp_00000008"]),
    ("kill_postrename@8", 8, []),
])
def test_kills_at_the_worst_instants_of_a_save(often_saved, tmp_path, fault, kept, left):
    run_train(often_saved, f"--out_dir={tmp_path / 'whole'}", "--max_steps=12")
    words = [often_saved, "--max_steps=12"]
    attempt = Attempt(words, tmp_path / "run", faults=fault)
    assert attempt.wait(GONE) == -SIGKILL and newest(tmp_path / "run") == kept and debris(tmp_path / "run") == left
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000006\n"
    again = Attempt(words, tmp_path / "run", faults=fault)
    assert again.wait(GONE) == 0 and f"resumed from {tmp_path / 'run'}/checkpoints/step_{kept:08d}" in again.output()
    assert_tidy(tmp_path / "run", 12)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_an_io_error_of_the_reading_thread_ends_the_run_with_its_step(often_saved, tmp_path):
    attempt = Attempt([often_saved], tmp_path / "run", faults="loader@6")
    assert attempt.wait(GONE) == 2
    assert "error: the data of step 6 cannot be read: [Errno 5] Input/output error" in attempt.output()
    assert "Traceback" not in attempt.output() and [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5]

"""Faults of disks, folders and processes: what is refused at the start, and what a crash or a hang leaves behind.

Every fault of the scorecard has a test here or beside what it strikes; its docstring says "Scorecard <number>".
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from errors import UserError
from muon import Muon
from run import checkpoint, guard
from tests import forks
from tests.attempts import Attempt
from tests.helpers import (
    ROOT,
    assert_equal_runs,
    final_tensors,
    losses,
    make_config,
    make_data,
    records,
    run_script,
    run_train,
)

# ---------------------------------------------------------------------- disks


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_at_the_start(config, tmp_path, monkeypatch):
    run_train(config, "--max_steps=2")
    folder = checkpoint.find(tmp_path / "run")
    n_bytes = checkpoint.size(final_tensors(tmp_path / "run"))
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert n_bytes < written < 1.5 * n_bytes + 100_000  # the estimate is close; this model is small
    usage = shutil.disk_usage(tmp_path)
    words = ["--save_interval=2", "--keep_checkpoints=2"]

    def free(n):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(n)))

    refused = r"of .* [kMG]B each, will need .* [kMG]B more, but only .* free: make room"
    free(2.5 * n_bytes)  # three at a time: one more while it is written
    with pytest.raises(UserError, match=refused):
        run_train(config, *words, f"--out_dir={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists() and len(losses(tmp_path / "run")) == 2
    run_train(config, *words, f"--out_dir={tmp_path / 'new'}", "--save_interval=0")  # needs room for one
    free(1.5 * n_bytes)  # one is there: two more
    with pytest.raises(UserError, match=refused):
        run_train(config, *words, "--resume")
    free(0.5 * n_bytes)  # what is there goes only when the next is whole
    with pytest.raises(UserError, match=refused):
        run_train(config, "--resume", "--max_steps=3", "--keep_checkpoints=1")
    run_train(config, "--overwrite", "--max_steps=3", "--keep_checkpoints=1")  # but here it goes at once
    free(2.5 * n_bytes)
    run_train(config, *words, "--resume")


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file/run", "/proc/nanok2", "/proc/self"):
        with pytest.raises(UserError, match=f"{out} cannot be written .*: choose another --out_dir"):
            run_train(config, f"--out_dir={out}")


def test_retention_counts_only_whole_checkpoints(tmp_path):
    """Scorecard 25: a folder without its manifest, or one that lost a file, is none; the last good one stays."""
    tensors = {"model.x": torch.arange(6.0)}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors, {}, keep=9)
    (tmp_path / "step_00000002/manifest.json").unlink()
    (tmp_path / "step_00000003/__0_0.distcp").unlink()
    checkpoint.save(tmp_path, 4, tensors, {}, keep=2)
    assert [path.name[-1] for path in checkpoint.step_folders(tmp_path)] == ["1", "2", "3", "4"]
    checkpoint.save(tmp_path, 5, tensors, {}, keep=2)
    assert [path.name[-1] for path in checkpoint.step_folders(tmp_path)] == ["2", "3", "4", "5"]
    assert checkpoint.find(tmp_path).name == "step_00000005"
    assert not list(tmp_path.glob(".*"))


def test_a_failed_background_save_is_reported_while_the_run_goes_on(config, tmp_path, monkeypatch):
    original = checkpoint.save

    def save(folder, step, *rest):
        if step == 5:
            raise OSError("No space left on device")
        return original(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    run_train(config, "--save_interval=5", "--async_save")
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    at = next(i for i, record in enumerate(written) if record.get("event") == "save_failed")
    assert written[at]["step"] == 5 and max(r["step"] for r in written[:at]) <= 6  # at the next step
    assert checkpoint.find(tmp_path / "run").name == "step_00000020"


def test_two_runs_do_not_write_into_one_folder(config, tmp_path, monkeypatch):
    original, refused = Muon.begin_step, []

    def step(self, *args):
        if not refused:
            refused.append(None)
            for words in ([], ["--resume=auto"], ["--overwrite"]):
                done = run_script("train.py", config, *words)
                refused.append((done.returncode, done.stderr))
        return original(self, *args)

    monkeypatch.setattr(Muon, "begin_step", step)
    run_train(config, "--max_steps=3")
    for status, said in refused[1:]:
        assert status == 2 and f"in use by process {os.getpid()} on {socket.gethostname()}: wait" in said
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]
    run_train(config, "--max_steps=4", "--resume")  # the lock is gone with its holder


def test_a_shard_cut_short_under_a_running_training_ends_it_and_is_named_at_the_next_start(tmp_path):
    """The kernel answers with SIGBUS: no Python code can catch it, but the stack says where it was."""
    data = make_data(tmp_path / "data")
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"), save_interval=2,
                         max_steps=100_000, log_interval=1)
    process = forks.Process(["train.py", config], stdout=tmp_path / "output")
    while not (tmp_path / "run/checkpoints/latest").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.truncate(data / "train_000000.bin", 4096)
    assert process.wait(timeout=60) == -signal.SIGBUS
    assert "Bus error" in (tmp_path / "output").read_text() and "loader.py" in (tmp_path / "output").read_text()
    done = run_script("train.py", config, "--resume")
    assert done.returncode == 2 and "train_000000.bin is truncated" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_no_file_gets_their_lines(tmp_path, closed):
    code = ("import errors, faulthandler, os, sys; faulthandler.enable(); file = open(sys.argv[1], 'w'); errors.run("
            "lambda argv: (print('out'), print('err', file=sys.stderr), os.write(1, b'1'), os.write(2, b'2'), "
            "sys.__stdout__.flush(), sys.__stderr__.flush(), print('done', file=file)))")
    command = shlex.join([sys.executable, "-c", code, str(tmp_path / "file")])
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done
    assert (tmp_path / "file").read_text(encoding="utf-8") == "done\n"
    assert (done.stdout, done.stderr) == ("" if " >" in f" {closed}" else "out\n1", "" if "2>" in closed else "err\n2")


# ---------------------------------------------------------------------- real processes, real ranks


def faulty(n, faults, tmp_path, *words):
    """(status, output) of a run with faults on n ranks."""
    attempt = Attempt(words, tmp_path / "run", n, faults)
    try:
        return attempt.wait(150), attempt.output()
    finally:
        attempt.kill_all()


@pytest.fixture
def short(tmp_path, data):
    return make_config(tmp_path / "short.py", data=str(data), out_dir=str(tmp_path / "run"), save_interval=4,
                       max_steps=8)


def test_a_hung_step_ends_with_its_stack(short, tmp_path):
    status, output = faulty(1, "hang@6", tmp_path, short, "--step_timeout=3")
    assert status == guard.HUNG and "has been in step 6 for " in output
    assert re.search(f"From the last checkpoint: .* --resume={tmp_path / 'run'}", output)
    stack = (tmp_path / "run/stacks/rank_00000.txt").read_text()
    assert "in train" in stack and "faulty.py" in stack
    assert checkpoint.find(tmp_path / "run").name == "step_00000004"


@pytest.mark.slow
def test_a_hung_rank_ends_all_with_their_stacks_and_the_run_goes_on(short, tmp_path):
    """Scorecard 19."""
    status, output = faulty(2, "hang@6:1", tmp_path, short, "--step_timeout=4")
    assert status != 0 and "rank 1 on" in output
    stacks = [(tmp_path / f"run/stacks/rank_0000{rank}.txt").read_text() for rank in range(2)]
    assert "torch/distributed" in stacks[0].split("in train")[0]  # waits in a collective
    assert "torch/distributed" not in stacks[1].split("in train")[0]  # the culprit
    status, output = faulty(2, "hang@6:1", tmp_path, short)  # it hangs only once
    assert status == 0 and [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9)), output


@pytest.mark.slow
def test_memory_of_one_rank_halves_the_micro_batch_of_all(short, tmp_path, pool):
    """Scorecard 22: all ranks start themselves again, under the same torchrun, and the run is that of the smaller
    micro-batch."""
    status, output = faulty(2, "oom@1:1>2", tmp_path, short, "--micro_batch_size=4")
    assert status == 0 and output.count("starting again with 2 and 2 forwards a step") == 1, output
    assert [e["event"] for e in records(tmp_path / "run", "event")] == ["restart", "save", "save"]
    pool.run(2, run_train, short, "--micro_batch_size=2", f"--out_dir={tmp_path / 'two'}")
    assert_equal_runs(tmp_path / "run", tmp_path / "two")


def test_a_collective_too_many_is_never_a_success(short, tmp_path):
    """Scorecard 20."""
    status, output = faulty(2, "extra_collective@6:1", tmp_path, short, "--step_timeout=4")
    assert status != 0 and "done: " not in output and checkpoint.find(tmp_path / "run").name == "step_00000004"


def test_peers_of_a_rank_with_an_error_say_a_line_and_no_traceback(short, tmp_path):
    status, output = faulty(2, "loader@6:1", tmp_path, short)
    assert status != 0 and "error: the data of step 6 cannot be read" in output
    assert output.count("error: rank 0 lost a peer") <= 1 and "Traceback" not in output.split("torch/distributed/")[0]


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(short, tmp_path):
    attempt = Attempt([short], tmp_path / "run", 2, "hang@6:1")
    try:
        attempt.wait_for_step(5)
        time.sleep(1)
        waiting = attempt.ranks()[0]
        os.kill(waiting, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(waiting, signal.SIGINT)
        deadline = time.monotonic() + 10
        while waiting in attempt.ranks():
            time.sleep(0.1)
            assert time.monotonic() < deadline
    finally:
        attempt.kill_all()


@pytest.mark.slow
def test_ranks_roll_back_together(short, tmp_path):
    """All start themselves again under the same torchrun; here the trouble is in the steps, not in the data, so that
    it comes again."""
    status, output = faulty(2, "nan@6:1,nan@7:1", tmp_path, short, "--max_skipped_steps=2", "--max_rollbacks=1")
    assert status != 0 and "error: 2 non-finite steps in a row" in output and "Traceback" not in output.split("W1")[0]
    events = [(e["event"], e["step"]) for e in records(tmp_path / "run", "event")]
    assert events == [("save", 4), ("rollback", 4), ("resume", 4), ("skip", 6), ("skip", 7)]

"""Trainings through everything that may happen to them:  python -m bench.soak --minutes=10 [--ranks=2] [--seed=0]
(the limit of all of it: the run that it cuts off is not judged; --out=FOLDER for the result)

Whole runs of a small model, one after the other, every one disturbed a few times and continued with --resume=auto, and
at its end compared with an undisturbed run: all losses and all final tensors, bitwise. What happens to them is in
DISTURBANCES, at random instants. Before that, a long run in peace shows whether memory and open files stay what they
are, for a third of the time at most. Ends with status 1 if anything was lost, differs, or is left behind. Linux, as it
reads /proc.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import bench
import errors
from errors import STOPPED, UserError
from tests.attempts import Attempt, abandoned, assert_tidy, newest, segments, send
from tests.helpers import assert_equal_runs, make_config, make_data

STEPS = 40
KILLS = ["kill", "kill_insave", "kill_midsave", "kill_prerename", "kill_postrename"]
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


class Soak:
    """What all disturbances share: the words of the training, chance, and a tally of what has happened."""

    def __init__(self, folder, ranks, seed):
        self.folder, self.ranks, self.rng = Path(folder), ranks, random.Random(seed)
        self.data = make_data(self.folder / "data")
        self.words = [make_config(self.folder / "tiny.py", data=str(self.data), max_steps=STEPS, save_interval=2,
                                  keep_checkpoints=2, eval_interval=10)]
        self.start_up, self.tally, self.slowest, self.children = None, Counter(), 0.0, []

    def start(self, out, faults="", extra=(), **options):
        shutil.rmtree(f"{out}.faults", ignore_errors=True)  # a new draw may name the same step again
        attempt = Attempt([*self.words, *extra], out, self.ranks, faults, **options)
        self.children.append(attempt)
        return attempt

    def start_any(self, out, faults=""):
        """An attempt as it may be in practice too: with curves, with saves beside the training."""
        return self.start(out, faults, ["--async_save"] * (self.rng.random() < 0.3), curves=self.rng.random() < 0.2)

    def instant(self, attempt):
        self.start_up = attempt.wait_for_instant(self.rng, STEPS // 3, self.start_up) or self.start_up

    def strike(self, attempt):
        where, seconds = attempt.strike(self.rng)
        self.slowest = max(self.slowest, seconds)
        return where

    def fault(self, out, *kinds):
        """One of the kinds, in a step (of a checkpoint) soon to come, on any rank."""
        step = min(newest(out) + 2 * self.rng.randrange(1, 6), STEPS)
        kind = self.rng.choice(kinds)
        return f"{kind}@{step}:{0 if 'rename' in kind else self.rng.randrange(self.ranks)}"  # the first rank renames

    def after_fault(self, attempt):
        """Return when the fault has struck, or everything is over."""
        while attempt.running() and not list(Path(attempt.mark).glob("*")):
            time.sleep(0.01)

    def refused(self, attempt, *texts):
        """The attempt ended with one readable error, which holds the texts; of many ranks the others then say that they
        lost their peer."""
        status, output = attempt.wait(), attempt.output()
        assert status == 2 or (self.ranks > 1 and status), f"ended with {status}:\n{output}"
        first = output.split("Traceback")[0] if self.ranks > 1 else output
        assert all(text in first for text in ("error: ", *texts)) and "Traceback" not in first, output


# ---------------------------------------------------------------------- disturbances: each starts and ends an attempt
# and returns in a word what became of it, or None if it cannot be done now

def killed(soak, out):
    attempt = soak.start_any(out)
    soak.instant(attempt)
    return soak.strike(attempt)


def killed_at_the_worst(soak, out):
    attempt = soak.start_any(out, soak.fault(out, *KILLS))
    return "died" if attempt.wait() else "after the end"


def signalled(soak, out):
    """To one rank or to all: a run that trains already saves and ends, one that starts just ends."""
    attempt, number = soak.start_any(out), soak.rng.choice(SIGNALS)
    soak.instant(attempt)
    training, pids = bool(attempt.steps()), attempt.ranks()
    for pid in pids if soak.rng.random() < 0.5 else pids[-1:]:
        send(pid, number)
    status, output = attempt.wait(), attempt.output()
    if not training and "saved step" not in output:  # or there was nobody yet who could have heard it
        return "after the end" if status == 0 else "while starting"
    assert newest(out) == attempt.steps()[-1], f"{number} and status {status}:\n{output}"
    if "saved step" not in output:  # it came after the last step
        return "after the end"
    assert soak.ranks > 1 or status == (0 if newest(out) == STEPS else STOPPED), f"status {status}"
    return "saved"


def disk_full(soak, out):
    """One rank's disk is full in one save: that checkpoint is missing, and the training goes on, unless it was the
    last."""
    attempt = soak.start_any(out, soak.fault(out, "diskfull"))
    soak.after_fault(attempt)
    soak.instant(attempt)
    where = soak.strike(attempt)
    return where if "No space left" in attempt.output() else f"{where}, before the disk was full"


def slow_data(soak, out):
    attempt = soak.start_any(out, soak.fault(out, "slow_data"))
    soak.after_fault(attempt)
    time.sleep(1)
    soak.instant(attempt)
    return soak.strike(attempt)


def read_error(soak, out):
    fault = soak.fault(out, "loader")
    soak.refused(soak.start_any(out, fault), f"the data of step {fault[7:].split(':')[0]} cannot be read", "[Errno 5]")
    return "refused"


def flip_a_bit(path, rng, first=0):
    content = bytearray(path.read_bytes())
    content[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def corrupt_shard(soak, out):
    """A flipped bit or a missing end: refused by name before the first step, and fine when it is repaired."""
    shard = soak.rng.choice(sorted(soak.data.glob("*.bin")))
    whole = shard.read_bytes()
    if soak.rng.random() < 0.5:
        flip_a_bit(shard, soak.rng)
    else:
        shard.write_bytes(whole[:-soak.rng.randrange(1, len(whole))])
    try:
        attempt = soak.start_any(out)
        soak.refused(attempt, shard.name)
        assert not attempt.steps()
    finally:
        shard.write_bytes(whole)
    return "refused"


def damaged_checkpoint(soak, out):
    """Bits of the newest checkpoint change, or a file is missing: the one before is used."""
    steps = sorted((out / "checkpoints").glob("step_*"))
    if len(steps) < 2:
        return None
    victim = soak.rng.choice(sorted(steps[-1].iterdir()))
    if victim.name == "manifest.json" or soak.rng.random() < 0.2:
        victim.unlink()
    else:
        flip_a_bit(victim, soak.rng)
    attempt = soak.start_any(out)
    attempt.wait_for_step(1)
    assert f"skipping damaged checkpoint {steps[-1]}" in attempt.output(), attempt.output()
    assert not attempt.steps() or attempt.steps()[0] == int(steps[-2].name[5:]) + 1, attempt.output()
    soak.instant(attempt)
    return soak.strike(attempt)


def read_only(soak, out):
    """A folder that may not be written to is refused; root may write everywhere."""
    if os.getuid() == 0 or not out.exists():
        return None
    out.chmod(0o555)
    try:
        soak.refused(soak.start(out), "Permission denied")
    finally:
        out.chmod(0o755)
    return "refused"


DISTURBANCES = {killed: 5, killed_at_the_worst: 2, signalled: 4, disk_full: 3, slow_data: 1, read_error: 1,
                corrupt_shard: 2, damaged_checkpoint: 2, read_only: 1}  # how often, against each other


# ---------------------------------------------------------------------- runs

def disturbed_run(soak, out):
    """A run through three to seven disturbances, then to its end."""
    for _ in range(soak.rng.randrange(3, 8)):
        (what,), saved = soak.rng.choices(list(DISTURBANCES), DISTURBANCES.values()), newest(out)
        outcome = what(soak, out)
        if outcome is None:
            continue
        soak.tally[what.__name__, outcome] += 1
        attempt = soak.children[-1]
        print(f"{out.name}: {what.__name__}: {outcome}; checkpoint of step {saved} -> {newest(out)}", flush=True)
        assert not attempt.family(), f"left by {what.__name__}: {attempt.family()}"
        if what is not damaged_checkpoint:
            assert newest(out) >= saved, f"{what.__name__} lost the checkpoint of step {saved}"
            assert not attempt.steps() or attempt.steps()[0] == saved + 1, attempt.output()
            assert "skipping damaged" not in attempt.output(), attempt.output()
        if newest(out) == STEPS:
            break
    attempt = soak.start(out)
    assert attempt.wait() == 0, attempt.output()
    assert_tidy(out, STEPS)
    assert_equal_runs(soak.folder / "whole", out)


class TimeUp(BaseException):
    """Of the whole command. Nothing in between takes it for a failure."""


def time_up(number, frame):
    raise TimeUp


def memory_and_files(soak, steps, until):
    """Megabytes resident and files open of the ranks, medians over the steps after a quarter and over the last ones, of
    an undisturbed run that saves, validates and draws all the time, up to `until` at most."""
    attempt, samples = soak.start(soak.folder / "long", extra=[f"--max_steps={steps}"], curves=True), []
    attempt.wait_for_step(1)
    pids = attempt.ranks()
    while attempt.running() and (step := attempt.steps()[-1]) < steps and time.monotonic() < until:
        try:
            samples += [(step, pid, resident(pid), len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids]
        except FileNotFoundError:  # it ends
            break
        time.sleep(0.05)
    if time.monotonic() < until:
        assert attempt.wait() == 0, attempt.output()
    attempt.kill_all()
    steps = max([step for step, *_ in samples], default=0)
    if steps < 20:
        return {"flat": None, "steps": steps}
    result = {"steps": steps, "samples": len(samples), "ranks": []}
    for pid in pids:
        early, late = ([sample[2:] for sample in samples if sample[1] == pid and low < sample[0] / steps <= high]
                       for low, high in ((0.25, 0.35), (0.9, 1)))
        (mb, files), (mb_late, files_late) = (map(statistics.median, zip(*part)) for part in (early, late))
        result["ranks"].append({"MB": [mb, mb_late], "files": [files, files_late]})
    result["flat"] = all(rank["MB"][1] < 1.05 * rank["MB"][0] and rank["files"][1] <= rank["files"][0] + 1
                         for rank in result["ranks"])
    return result


def resident(pid):
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0)


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--minutes", type=float, default=10, help="limit of the whole command")
    parser.add_argument("--runs", type=int, default=0, help="end after so many; 0: with the time")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long_steps", type=int, default=300, help="of the run in peace; 0: none")
    options = parser.parse_args(argv)
    if not 0 < options.minutes < 1e5 or options.ranks < 1:
        parser.error("--minutes and --ranks must be above 0")
    signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    began, before, runs, lost, long = time.monotonic(), segments(), 0, [], {"flat": None}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        soak = Soak(folder, options.ranks, options.seed)
        try:
            assert soak.start(soak.folder / "whole").wait() == 0, soak.children[0].output()
            if options.long_steps:
                long = memory_and_files(soak, options.long_steps, began + 20 * options.minutes)
            while not options.runs or runs < options.runs:
                try:
                    disturbed_run(soak, soak.folder / f"run{runs}")
                except AssertionError:
                    lost.append(traceback.format_exc())
                    print(lost[-1], file=sys.stderr, flush=True)
                    soak.children[-1].kill_all()
                runs += 1
        except TimeUp:
            print("the time is up: the run under way is not judged", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            processes = [pid for attempt in soak.children for pid in attempt.family()]
            for attempt in soak.children:
                attempt.kill_all()
    if not runs:
        raise UserError(f"no disturbed run ended within {options.minutes:g} minutes: give more --minutes")
    left = {"processes": processes, "shared memory": sorted(map(str, abandoned(before)))}
    table = [[name, outcome, count] for (name, outcome), count in sorted(soak.tally.items())]
    for name, outcome, count in table:
        print(f"{name:20} {outcome:40} {count:4}")
    for number, rank in enumerate(long.get("ranks", ())):
        print("rank {}: {:.0f} -> {:.0f} MB, {:.0f} -> {:.0f} files".format(number, *rank["MB"], *rank["files"]))
    print(f"{runs} runs of {STEPS} steps on {options.ranks} ranks, {len(soak.children)} starts, "
          f"{time.monotonic() - began:.0f} s; lost or different: {len(lost)}; left: {left}; flat: {long['flat']}; "
          f"after the loss of a rank all were gone within {soak.slowest:.1f} s")
    bench.save(f"soak-{options.ranks}-ranks", {
        **vars(options), "runs": runs, "starts": len(soak.children), "disturbances": table,
        "slowest end (s)": soak.slowest, "long run": long, "left": left, "lost": lost})
    return 1 if lost or any(left.values()) or long["flat"] is False else 0


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

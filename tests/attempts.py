"""Starting a training again and again: one attempt of it, its processes, and what it may have left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import forks
from tests.helpers import ROOT, records

GONE = 60  # seconds that whoever lost a rank may take to end


class Attempt:
    """tests/faulty.py with --resume=auto, as one process or under torchrun; forked (see forks.py) if the environment
    has FORKED. Its output goes to a file beside the run folder; its processes are known by their environment or, where
    they were forked, by the files that they leave in a folder, whoever is their parent."""

    def __init__(self, words, out, ranks=1, faults="", curves=False):
        self.out, self.mark, self.log, self.pids = Path(out), f"{out}.faults", Path(f"{out}.log"), Path(f"{out}.pids")
        self.torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                         "--monitor-interval=0.2"] if ranks > 1 else []
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
                       "FAULTS": faults, "FAULTS_DONE": self.mark, "FAULTS_NO_CURVES": "" if curves else "1"}
        words = [*self.torchrun, "tests/faulty.py", *map(str, words), f"--out_dir={out}", "--resume=auto"]
        environment = {**os.environ, **environment}
        shutil.rmtree(self.pids, ignore_errors=True)
        with open(self.log, "w") as output:
            if os.environ.get("FORKED"):
                self.process = forks.Process(words, stdout=self.log, env=environment, pids=self.pids)
            else:
                self.process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=output,
                                                stderr=output, start_new_session=True)
        self.started = time.monotonic()

    def output(self):
        return self.log.read_text(errors="replace")

    def steps(self):
        """The steps that this attempt has finished."""
        return [int(step) for step in re.findall(r"^step +(\d+)/\d+  loss", self.output(), re.M)]

    def running(self):
        return self.process.poll() is None

    def family(self):
        """Every process of this attempt, zombies aside."""
        return [pid for pid in all_pids() if f"FAULTS_DONE={self.mark}" in words_of(pid, "environ")
                or (self.pids / str(pid)).exists() and any(words_of(pid, "cmdline"))]

    def ranks(self):
        """Those that train, by rank."""
        found = {}
        for pid in self.family():
            words = words_of(pid, "cmdline")
            if (self.pids / str(pid)).exists():
                rank = (self.pids / str(pid)).read_text(encoding="utf-8")
                if rank or not self.torchrun:
                    found[int(rank or 0)] = pid
            elif "tests/faulty.py" in words and "torch.distributed.run" not in words:
                rank = next((word[5:] for word in words_of(pid, "environ") if word.startswith("RANK=")), "0")
                found[int(rank)] = pid
        return [pid for _, pid in sorted(found.items())]

    def kill_all(self):
        self.process.kill()
        while pids := self.family():  # again, for those that were being started
            for pid in pids:
                send(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        return self.process.wait()

    def wait(self, seconds=300):
        """The exit status, when every process is gone; too slow an end is killed and an error."""
        deadline = time.monotonic() + seconds
        while self.running() or self.family():
            if time.monotonic() > deadline:
                left = self.family()
                self.kill_all()
                raise AssertionError(f"processes {left} were still there after {seconds} s:\n{self.output()[-3000:]}")
            time.sleep(0.02)
        return self.process.returncode

    def wait_for_instant(self, rng, steps, start_up=None):
        """Return at a random instant of a life: while it starts (one time in three), or in one of the next `steps`
        steps, within it or its save. start_up: the seconds that the last one took, None at first. Returns those of
        this one if they were seen."""
        if start_up and rng.random() < 1 / 3:
            time.sleep(rng.random() * start_up)
            return None
        self.wait_for_step(1)
        first = time.monotonic()
        target = rng.randrange(1, steps)
        self.wait_for_step(target)
        pace = (time.monotonic() - first) / (target - 1) if target > 1 else 0.1
        time.sleep(rng.random() * 2 * pace)
        return first - self.started

    def wait_for_step(self, number):
        while self.running() and len(self.steps()) < number:
            time.sleep(0.005)

    def strike(self, rng):
        """Kill a rank or, one time in three, everything at once; returns (where it fell, seconds until all were
        gone)."""
        pids, struck = self.ranks(), time.monotonic()
        if pids and self.running() and rng.random() < 2 / 3:
            send(rng.choice(pids), signal.SIGKILL)
            self.wait(GONE)
        else:
            self.kill_all()
        return self.where(), time.monotonic() - struck

    def where(self):
        """The part of its life in which a killed attempt ended."""
        if self.process.returncode == 0:
            return "after the end"
        return "in a save" if debris(self.out) else "in the steps" if self.steps() else "while starting"


def all_pids():
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def words_of(pid, what):
    """The words of /proc/PID/cmdline or environ; none of a process that has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it was faster
        pass


def segments():
    """This user's shared memory: files in /dev/shm and System V segments that somebody may be attached to."""
    files = set()
    for path in Path("/dev/shm").iterdir():
        try:
            files |= {str(path)} if path.stat().st_uid == os.getuid() else set()
        except FileNotFoundError:  # another's, gone meanwhile
            pass
    return files | {row["shmid"] for row in system_v() if row["uid"] == str(os.getuid())}


def system_v():
    names, *rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    return [dict(zip(names, row)) for row in rows]


def abandoned(before):
    """What of segments() is new and belongs to no process any more; others on this machine make some too, such as the
    semaphores of multiprocessing, which training does not use."""
    new = {name for name in segments() - before if "/sem.mp-" not in str(name)}
    mapped = {line.split()[-1] for pid in all_pids() for line in "\n".join(words_of(pid, "maps")).splitlines()
              if "/dev/shm/" in line}
    attached = {row["shmid"] for row in system_v() if row["nattch"] != "0"}
    return new - mapped - attached


def debris(out):
    """Half-written or half-deleted checkpoints."""
    return [path.name for path in (Path(out) / "checkpoints").glob(".t*_*")]


def newest(out):
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name[5:]) for path in (Path(out) / "checkpoints").glob("step_*")), default=0)


def assert_tidy(out, steps):
    """A finished run has every step once and nothing half done."""
    assert [record["step"] for record in records(out)] == list(range(1, steps + 1))
    assert not debris(out) and newest(out) == steps

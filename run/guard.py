"""What watches over a long run: signals, hung steps, memory that does not suffice, loss spikes, ranks that drift apart.

Nothing here changes a number of the training. What can go on goes on by itself; what cannot ends with the cause and the
next command, and the newest checkpoint is where it continues. Next: folder.py, what a run folder lets a run do.
"""

import collections
import faulthandler
import fcntl
import math
import os
import re
import select
import shlex
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path

import torch

from errors import Lossy, UserError, said, started, to_nowhere
from muon import local_rows
from ranks import parallel
from run.terminal import Live

SIGNAL = "NANOK2_SIGNAL"  # environment: one that came when the process had to start again
LOCK = ".lock"  # in a run folder: held by the process that trains into it
HUNG = 124  # exit status of a rank whose step did not end, as that of timeout(1)
EARLY = 3  # steps in which compilers are at work, and in which memory may turn out to be too small


class Guard:
    """Watches the loop of a run from its begin() to the end of the with statement.

    Signals: SIGTERM, SIGINT, SIGUSR1 and, unless nohup ignores it, SIGHUP are noted in `signal`, so that the loop can
    save; a second one ends at once, even inside a collective, but not its echo: some launchers deliver one twice.
    Ranks act only on what they have agreed on: `agreed` counts those whose signal the last reduction carried.

    Hung steps: what the loop announces with beat() may take step_timeout seconds; then every rank writes its stacks to
    out_dir/stacks/ and ends. The rank that waits for nobody is the cause.

    Memory: running out of it in the first steps starts all ranks again with half the micro-batch and twice the
    accumulation; later, or on the CPU, it becomes an error that names the levers.
    """

    def __init__(self, words):
        self.words, self.config, self.log = words, None, None
        self.signal, self.agreed, self.noted = os.environ.pop(SIGNAL, None), 0, -math.inf
        self.doing, self.since, self.deadline, self.early, self.listening = "the start", 0.0, math.inf, False, False
        self.over, self.handlers, self.lock, self.live = threading.Event(), {}, None, None
        self.parent = os.getppid()

    def claim(self, run):
        """Refuse a folder into which another process is training. The system frees the lock however this one ends."""
        if self.lock or not run.is_dir():
            return
        try:
            self.lock = open(run / LOCK, "a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{run} cannot be written ({error.strerror}): choose another --out_dir") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.seek(0)
            raise UserError(f"{run} is in use by {self.lock.read().strip()}: wait for its end, or choose another "
                            f"--out_dir; if that machine is gone, remove {run / LOCK}") from error
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {run} cannot be locked ({error.strerror}): start no second run there")
        self.lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.lock, flush=True)

    def begin(self, config, start):
        self.config = config
        self.live.begin(start, config.max_steps)
        self.handlers = {number: signal.signal(number, self._note)
                         for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
                         if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)}
        self.inbox, outbox = socket.socketpair()
        outbox.setblocking(False)
        self.outbox, self.woken = outbox, signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        self.beat("the first batch", patient=True)
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def beat(self, doing, patient=False):
        """The main thread is about to do something; patient: it has 12 times as long, as where compilers are at work or
        files are written."""
        early = patient and doing.startswith("step ")
        self.listening = early or self.early  # a rank that runs out of memory may be one step behind
        self.doing, self.early, self.since = doing, early, time.monotonic()
        self.live.doing(doing)
        allowed = self.config.step_timeout * (12 if patient else 1)
        self.deadline = self.since + allowed
        # Python's own timer needs no interpreter lock: it ends what our thread could not.
        faulthandler.dump_traceback_later(1.2 * allowed + 10, exit=True, file=sys.__stderr__)

    def __enter__(self):
        self.terminal = sys.stdout, sys.stderr  # a full disk or a closed pipe behind them must not end a run
        self.live = Live(Lossy(sys.stdout, sys.stderr), Lossy(sys.stderr, None))
        sys.stdout, sys.stderr = self.live.out, self.live.err
        return self

    def __exit__(self, kind, error, trace):
        self.over.set()
        self.live.close()
        sys.stdout, sys.stderr = self.terminal
        for stream in self.terminal:
            try:
                stream.flush()
            except (OSError, ValueError):  # Lossy has said so; it is no failure of the run
                to_nowhere(stream)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.handlers:
            signal.set_wakeup_fd(self.woken)
        if self.lock:
            self.lock.close()
        if isinstance(error, parallel.Restart) and self.signal:  # it came on the way back to a checkpoint
            os.environ[SIGNAL] = self.signal
        if self.listening and error is not None and (words := parallel.note("restart")):
            self._prepare_restart()
            raise parallel.Restart(words) from error  # a rank that started again was missed in a collective
        if self.config is None and isinstance(error, UserError):
            parallel.leave_note("refused", True)  # one more start would meet the same
        if error is not None and "NANOK2_REFUSED" in os.environ and parallel.note("refused"):
            Path(os.environ["NANOK2_REFUSED"]).write_text("refused\n", encoding="utf-8")  # for launch/multinode.sh
        if is_out_of_memory(error):
            self._out_of_memory(error)
        refuse_broken_compiler(error)

    def _note(self, number, frame):
        if self.signal is None:
            self.signal, self.noted = signal.Signals(number).name, time.monotonic()
            print(f"{self.signal}: finishing the step, then saving; once more to stop at once", flush=True)
        elif time.monotonic() > self.noted + self._echo(number):
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)

    def _echo(self, number):
        """Seconds in which a signal is taken for the echo of the one before it: of a terminal's Ctrl-C, torchrun sends
        one more to its ranks."""
        if number != signal.SIGINT:
            return 5
        return 2 if self.signal == "SIGINT" and "TORCHELASTIC_RUN_ID" in os.environ else 0

    def _watch(self):
        first = math.inf
        while not self.over.is_set():
            if select.select([self.inbox], [], [], min(1.0, self.config.step_timeout / 10))[0]:
                for number in self.inbox.recv(64):  # Python's handlers wait until the main thread leaves native code
                    if number in self.handlers and time.monotonic() > first + self._echo(number):
                        time.sleep(1)  # where the main thread can, it has ended by now
                        os._exit(128 + number)
                    first = min(first, time.monotonic())
            if self.listening and (words := parallel.note("restart")):
                self._prepare_restart()
                parallel.start_again(words)
            if self.signal is None and os.getppid() != self.parent and "TORCHELASTIC_RUN_ID" in os.environ:
                self.signal = "the loss of the launcher"  # nobody would end us: its next start wants the run folder
            if time.monotonic() > self.deadline or parallel.note("hung"):
                self._give_up()

    def _give_up(self):
        parallel.leave_note("hung", True)  # all others write down where they are
        seconds = time.monotonic() - self.since
        where = f"rank {parallel.rank()} on {socket.gethostname()} has been in {self.doing} for {seconds:.0f} s"
        path = Path(self.config.out_dir) / "stacks" / f"rank_{parallel.rank():05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                print(where, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a full disk: the process must end all the same
            print(f"warning: {path} cannot be written ({error})", file=sys.stderr, flush=True)
        print(f"error: {where}: hung? The stacks of all ranks are in {path.parent}/. If nothing hangs, raise "
              f"--step_timeout. From the last checkpoint:  {command(self.config.out_dir)}", file=sys.stderr, flush=True)
        time.sleep(5)  # the first to end ends the others: let them write too
        os._exit(HUNG)

    def _prepare_restart(self):
        self.live.close()
        if self.signal:
            os.environ[SIGNAL] = self.signal
        if self.log:
            self.log.close()  # W&B lets nobody else continue an open run

    def _out_of_memory(self, error):
        if self.config is None:
            raise UserError(f"out of memory before the first step ({said(error)}): the parameters and their "
                            "optimizer state alone are too much; use more ranks, or a smaller model") from error
        size, forwards = parallel.split_batch(self.config)
        smaller = max(parallel.forward_sizes(self.config, size // 2), default=0)
        if self.early and isinstance(error, torch.OutOfMemoryError) and smaller:
            print(f"out of memory in {self.doing} with {size} sequences a forward: starting again with {smaller} and "
                  f"{size * forwards // smaller} forwards a step, the same global batch", file=sys.stderr, flush=True)
            words = [*self.words, f"--micro_batch_size={smaller}"]  # later words win
            if self.config.resume in (False, "auto"):
                words += [f"--out_dir={self.config.out_dir}", "--resume=auto", "--no-overwrite", "--skip_sequences=0"]
            else:
                words.append("--overwrite")  # of the folder that this start has made
            self._prepare_restart()
            parallel.leave_note("restart", words)
            raise parallel.Restart(words) from error
        raise UserError(f"out of memory in {self.doing} ({said(error)}). What lowers it: --micro_batch_size "
                        f"(now {size}), --activation_checkpointing=full, a shorter --sequence_length, more ranks, "
                        f"--ep, --no-cuda_graph. From the last checkpoint:  {command(self.config.out_dir)}") from error


def command(run, *words):
    """What continues a run, or begins it again if it has saved nothing, to be pasted: by the launcher that is at work,
    as far as a rank knows it."""
    here, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1
    launcher, (python, script) = os.environ.get("NANOK2_LAUNCHER"), started("train.py")
    if launcher is None and "WORLD_SIZE" in os.environ:
        nodes = int(os.environ["WORLD_SIZE"]) // here
        place = (f"--nnodes={nodes} --node_rank=$NODE_RANK --master_addr={os.environ.get('MASTER_ADDR')} "
                 f"--master_port={os.environ.get('MASTER_PORT')}" if nodes > 1 else "--standalone")
        launcher = f"{shlex.quote(sys.executable)} -m torch.distributed.run {place} --nproc_per_node={here} {script}"
    resume = [f"--resume={run}"] if (Path(run) / "checkpoints/latest").exists() else [str(run), "--resume=auto"]
    return f"{launcher or f'{python} {script}'} {shlex.join([*resume, *words])}"


def refuse_broken_compiler(error):
    """A UserError if torch.compile cannot work here: no compiler, one that fails, no Python.h, no cache folder."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "BackendCompilerFailed" in kinds or "OSError" in kinds and any(
            "_inductor" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        told = [line for line in str(error).splitlines() if re.search(r"(?i)error|no working|no such|failed", line)]
        raise UserError(f"torch.compile does not work here ({' | '.join(told[:3])[:500] or said(error)}): install a "
                        "C++ compiler (g++) and Python's headers (python3-dev), let TORCHINDUCTOR_CACHE_DIR name a "
                        "folder that can be written, or train with --no-compile") from error


def is_out_of_memory(error):
    """Whether an exception says so, whoever refused: PyTorch's allocators, the driver, a library, Python."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or \
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


# ----------------------------------------------------------------------------- loss spikes

class Spikes:
    """Tells a loss that stands out from the last 128. The losses go into checkpoints, so that a resumed run judges as
    an uninterrupted one would."""

    def __init__(self, sigmas, losses=()):
        self.sigmas, self.losses = sigmas, collections.deque(losses, maxlen=128)

    def height(self, loss):
        """How many standard deviations (of at least 1 % of the mean) a finite loss lies above the mean of those before
        it, if that is a spike; None if not, or while there are fewer than 32. Remembers the loss."""
        height = None
        if self.sigmas and len(self.losses) >= 32:
            mean = statistics.fmean(self.losses)
            deviation = max(statistics.pstdev(self.losses, mean), 0.01 * mean)
            if loss - mean > self.sigmas * deviation:
                height = (loss - mean) / deviation
                loss = mean + self.sigmas * deviation  # remembered as it is, it would hide the next
        self.losses.append(loss)
        return height


# ----------------------------------------------------------------------------- ranks side by side

@torch.no_grad()
def refuse_drift(tensors, numbers, step, run="OUT_DIR"):
    """Ranks that hold the same part of the state must hold the same bits: raises a UserError that names the ranks and a
    tensor if not. tensors: {name: tensor}; numbers: what every rank counts for itself. All ranks call it together."""
    if parallel.ranks() == 1:
        return
    names = zlib.crc32(repr(sorted(tensors)).encode())  # stages of a pipeline have different ones
    parts = {name: f"{parallel.part_of(tensor)} of {names}" for name, tensor in tensors.items()}
    sums = dict(zip(tensors, torch.stack([_bit_sum(tensor) for tensor in tensors.values()]).tolist()))
    mine = {part: zlib.crc32(repr([sums[name] for name in tensors if parts[name] == part]).encode())
            for part in set(parts.values())}
    everyone = parallel.from_all((mine | {"numbers": numbers}, socket.gethostname()))
    for part in sorted({part for held, _ in everyone for part in held}):
        groups = collections.defaultdict(list)
        for rank, (held, _) in enumerate(everyone):
            if part in held:
                groups[repr(held[part])].append(rank)
        if len(groups) > 1:
            details = [held for held in parallel.from_all({name: sums[name] for name in tensors if parts[name] == part})
                       if held] or [{}]
            name = next((name for name in details[0] if len({held[name] for held in details}) > 1), "what they count")
            hosts = [host for _, host in everyone]
            apart = " and ".join(", ".join(f"{rank} ({hosts[rank]})" for rank in ranks) for ranks in groups.values())
            raise UserError(f"after step {step} ranks {apart} differ in {name}, which they should hold alike: a fault "
                            "of one machine, its memory or a link. Nothing of this was saved. From the last "
                            f"checkpoint, best without the machine that is the odd one:  {command(run)}")


def _bit_sum(tensor):
    """The sum of a tensor's bits as integers: what one flipped bit changes, and the order of adding does not."""
    local, _ = local_rows(tensor)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    return local.contiguous().view(kind).sum(dtype=torch.int64)


def stragglers(waited, device):
    """The ranks that are slow, as [{rank, host, what, seconds, median}]: in a fixed piece of arithmetic, by twice the
    median and 5 ms, below which a clock tells nothing; in waiting for data, by a second. waited: this rank's seconds
    for its data since the last call."""
    if parallel.ranks() == 1:
        return []
    everyone = parallel.from_all((_probe(device), waited, socket.gethostname()))
    found = []
    slow_by = {"computing": lambda s, m: s > max(2 * m, m + 0.005), "data": lambda s, m: s > m + 1}
    for at, (what, slow) in enumerate(slow_by.items()):
        middle = statistics.median_low(entry[at] for entry in everyone)
        found += [{"rank": rank, "host": entry[2], "what": what, "seconds": entry[at], "median": middle}
                  for rank, entry in enumerate(everyone) if slow(entry[at], middle)]
    return found


def _probe(device):
    """Seconds for matrix products that keep the device busy for five milliseconds or more; the best of five."""
    n, repeat, dtype = (2048, 200, torch.bfloat16) if device.type == "cuda" else (512, 2, torch.float32)
    x, times = torch.zeros(n, n, device=device, dtype=dtype), []
    for _ in range(5):
        start, y = time.perf_counter(), x
        for _ in range(repeat):
            y = y @ x
        y[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)

"""The terminal of a run: its lines scroll by above a live one with bar, loss, rate and the time that is left.

Where stdout is a file or a pipe there is no live line, and every record is a line of its own. On a terminal the live
line stands for the records, and the newest one stays where something else is said: a validation, a save, an event.
Next: metrics.py, which makes the lines; guard.py, which says what a run is about to do.
"""

import shutil
import sys
import threading

from tqdm import tqdm

PLACE = 38  # columns behind the bar


def duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Live:
    """The live line of a run, and out and err, the streams to print on meanwhile."""

    def __init__(self, out, err):
        self.bar, self.pending, self.at_work, self.terminal = None, "", "", out
        self.lock = threading.RLock()  # a save beside the training and the guard speak too
        self.out, self.err = Above(out, self), Above(err, self)

    def begin(self, start, steps):
        """Show the line, where there is a terminal; `start` of the steps are done."""
        if sys.stdout is self.out and self.terminal.isatty():  # of ranks, only the first speaks
            self.bar = tqdm(total=steps, initial=start, file=self.terminal, dynamic_ncols=True, leave=False,
                            bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}", mininterval=0.2)

    def step(self, step, loss, speed, left):
        """A step is done: its loss, the run's tokens per second, the seconds that are left."""
        if self.bar is not None:
            self.at_work = f"loss {loss:.4f}  {speed:,.0f} tok/s  eta {duration(left)}"
            self.bar.set_description_str(self.at_work.ljust(PLACE), refresh=False)
            self.bar.update(step - self.bar.n)

    def doing(self, what):
        """What takes the place of steps for a while: a validation, a save, the compilers in the first step."""
        if self.bar is not None:
            steps = what.startswith("step ") and self.at_work
            self.bar.set_description_str((self.at_work if steps else f"{what} ...").ljust(PLACE), refresh=not steps)

    def record(self, line):
        """The line of a record: printed, or kept until something else is said."""
        if self.bar is None:
            print(line, flush=True)
        else:
            self.pending = fitting(line, shutil.get_terminal_size().columns)

    def say(self, text, stream):
        """Write whole lines above the live one."""
        kept, self.pending = self.pending, ""
        self.bar.clear()
        self.terminal.write(kept + "\n" * bool(kept))  # also where stderr, which speaks, is a file
        stream.write(text)
        self.bar.refresh()

    def close(self):
        """End the line, which leaves no trace; what was printed of an unfinished line comes too."""
        with self.lock:
            if self.bar is not None:
                self.bar.close()
                self.bar = None
                self.terminal.write(self.pending + "\n" * bool(self.pending) + self.out.rest + self.err.rest)


class Above:
    """A text stream whose lines stand above the live one, if there is one."""

    def __init__(self, stream, live):
        self.stream, self.live, self.rest = stream, live, ""

    def write(self, text):
        with self.live.lock:
            if self.live.bar is None:
                self.stream.write(text)
                return
            lines, end, rest = (self.rest + text).rpartition("\n")
            self.rest = rest.rpartition("\r")[2]  # of a line that was written over, the last
            if end:
                self.live.say(lines + end, self.stream)

    def isatty(self):
        """Whether there is place for another bar."""
        return self.live.bar is None and self.stream.isatty()

    def flush(self):
        """The streams below write at once."""

    def __getattr__(self, name):
        return getattr(self.stream, name)


def fitting(line, columns):
    """As many of a line's parts, two spaces apart, as fit."""
    while len(line) >= columns and "  " in line.strip():
        line = line.rpartition("  ")[0].rstrip()
    return line

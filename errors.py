"""The one exception for mistakes of the user's, the command-line wrapper that prints it as one line, what command lines
share to find such mistakes, a terminal that cannot raise, and the bar that says there how far something long is.

Everything else that goes wrong is a bug and keeps its traceback. Next: config.py, where most of these are raised.
"""

import argparse
import contextlib
import difflib
import functools
import os
import re
import select
import shlex
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

STOPPED = 75  # exit status of a run that a signal ended, saved and to be continued (EX_TEMPFAIL)
for _name, _mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
    if getattr(sys, _name) is None:  # closed by who started us, as with >&-: lines go nowhere, above all into no file
        _stream = open(os.devnull, _mode, encoding="utf-8")  # that would be opened next and get the number 1 or 2
        vars(sys).update({_name: _stream, f"__{_name}__": _stream})


class UserError(ValueError):
    """Wrong input: a bad setting, a damaged file, a missing folder. The message names the cause and what to do next."""

    def __str__(self):
        return one_line(super().__str__())


def one_line(text):
    """The text as a line that any terminal shows, of at most 1,000 characters: it may quote what stood in a file."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)
    return line if len(line) <= 1000 else f"{line[:700]} ... {line[-290:]}"  # what to do stands at the end


def said(error):
    """An exception of any kind in a few words: its name and the first line of its message."""
    return one_line(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}").removesuffix(": ")


def counted(n, one, many=None):
    """So many of something in words: 1 step, 2,000 steps; many: where an s does not do."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def started(script):
    """What starts one of our scripts from here, quoted for a shell: Python as it was called, and the script's path."""
    path = os.path.relpath(Path(__file__).with_name(script))
    return shlex.quote(sys.orig_argv[0] or sys.executable), shlex.quote(path)


def progress(what, total=None, unit="B", over=None):
    """A bar for what may take long, or goes over something: on a terminal, after a second, until it is done. Of several
    ranks only the first has one."""
    return tqdm(over, what, total, leave=False, file=sys.stdout, disable=None, unit=unit, unit_scale=True, delay=1)


def alike(word, known):
    """What was meant by a word that is none of the known ones, as "; did you mean it?", or "" if nothing is near."""
    near = difflib.get_close_matches(word, known, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def alike_there(name):
    """As `alike`, of a path that does not exist, among those in its folder."""
    path = Path(name)
    there = os.listdir(path.parent) if path.parent.is_dir() and not path.exists() else []
    near = difflib.get_close_matches(path.name, there, 1, 0.7)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def existing(name, use):
    """The path of what a command line names to be read, a file, a pipe or a device; a UserError if it is not there.
    use: the option, and what it takes."""
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{name} is a folder: {use}")
    if not path.exists():
        raise UserError(f"no file {name}{alike_there(name)} ({use})")
    return path


def require_place(name, option):
    """Refuse a file to be written where there is no folder, before the work that it is to tell of."""
    if name and not Path(name).parent.is_dir():
        raise UserError(f"{option}={name}: no folder {Path(name).parent}: make it first, or name another file")


class ArgumentParser(argparse.ArgumentParser):
    """One whose mistakes are one line, that guesses no abbreviation, takes --a-b for --a_b and knows what is like an
    option that there is not."""
    __init__ = functools.partialmethod(argparse.ArgumentParser.__init__, allow_abbrev=False)

    def parse_args(self, words=None):
        """Only names are altered: what follows an option that takes one value is that, if it is no option itself."""
        left, known, self.words = list(sys.argv[1:] if words is None else words), self._option_string_actions, []
        named = lambda word: re.sub(r"^--[\w-]+(?==|\Z)", lambda name: "--" + name[0][2:].replace("-", "_"), word)
        while left and self.words[-1:] != ["--"]:  # behind that there are no options
            word = named(left.pop(0))
            like = left and difflib.get_close_matches(named(left[0]).split("=")[0], known, 1, 0.8)
            if left and word in known and known[word].nargs is None and not like:
                word += f"={left.pop(0)}"
            self.words.append(word)
            if re.fullmatch(r"--[\w-]+=--", word):  # argparse would drop it
                self.error(f"{word}: -- alone is no value")
        return super().parse_args(self.words + left)

    def error(self, message):
        options = [option for action in self._actions for option in action.option_strings]
        given = (word.partition("=")[0] for word in self.words if word.startswith("--"))
        hint = next((alike(name, options) for name in given if name not in options), "")
        raise UserError(f"{message}{hint} (see --help)")


def run(main, pause=0.0):
    """Call main(argv) for a script. A UserError, and what the system refuses (a full disk, a folder without
    permission), becomes one line on stderr and exit status 2; Ctrl-C exit status 130; where the reader of our output
    has gone (head, less) we end without a word, as commands do. pause: seconds to wait before saying it, for one of
    many ranks that make the same mistake: the first to speak ends the others."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal's encoding lacks becomes an escape
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        try:
            main(sys.argv[1:])
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except (UserError, OSError) as error:
        unwritten = isinstance(error, OSError)
        if unwritten and isinstance(error.__context__, UserError):
            error = error.__context__  # which came before what could not be written
        nobody_reads = isinstance(error, BrokenPipeError) and reader_has_gone(sys.stdout)
        if unwritten:
            to_nowhere(sys.stdout)  # what cannot be written must not fail once more at the interpreter's end
        if nobody_reads:
            sys.exit(128 + signal.SIGPIPE)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(pause)
        message = re.sub(r"^\[Errno \d+\] ", "", str(error))
        print(f"error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on to ranks that had it already
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def reader_has_gone(stream):
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))  # errors are reported unasked


def to_nowhere(stream):
    """Let all that a stream still holds and gets vanish."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class Lossy:
    """A text stream that loses what cannot be written, on a full disk or when its reader has gone, instead of raising;
    the first loss is said on `other`."""

    def __init__(self, stream, other):
        self.stream, self.other = stream, other

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError, RuntimeError) as error:  # closed; or a signal's handler writes amid a write
            other, self.other = self.other, None
            if other is not None:
                Lossy(other, None).write(f"warning: the terminal's lines are lost ({error}); the run goes on\n")

    def flush(self):
        """Every line is written at once."""

    def __getattr__(self, name):
        return getattr(self.stream, name)

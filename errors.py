"""The one exception for mistakes of the user's, and the command-line wrapper that prints it as one line.

Everything else that goes wrong is a bug and keeps its traceback. Next: config.py, where most of these are raised.
"""

import signal
import sys
import time

STOPPED = 75  # exit status of a run that a signal ended, saved and to be continued (EX_TEMPFAIL)


class UserError(ValueError):
    """Wrong input: a bad setting, a damaged file, a missing folder. The message names the cause and what to do next."""

    def __str__(self):
        return one_line(super().__str__())


def one_line(text):
    """The text as a line that any terminal shows, of at most 1,000 characters: it may quote what stood in a file."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text)
    return line if len(line) <= 1000 else f"{line[:700]} ... {line[-290:]}"  # what to do stands at the end


def run(main, pause=0.0):
    """Call main(argv) for a script. A UserError, and what the system refuses (a full disk, a folder without
    permission), becomes one line on stderr and exit status 2; Ctrl-C exit status 130. pause: seconds to wait before
    saying it, for one of many ranks that make the same mistake: the first to speak ends the others."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(pause)
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

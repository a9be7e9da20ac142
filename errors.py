"""The one exception for mistakes of the user's, and the command-line wrapper that prints it as one line.

Everything else that goes wrong is a bug and keeps its traceback. Next: config.py, where most of these are raised.
"""

import sys


class UserError(ValueError):
    """Wrong input: a bad setting, a damaged file, a missing folder. The message names the cause and what to do next."""


def run(main):
    """Call main(argv) for a script. A UserError, and what the system refuses (a full disk, a folder without
    permission), becomes one line on stderr and exit status 2; Ctrl-C exit status 130."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

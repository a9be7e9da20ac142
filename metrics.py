"""python metrics.py RUN_FOLDER ...: the old name of  python -m run.metrics RUN_FOLDER ...   Next: run/metrics.py."""

import errors
from run.metrics import command

if __name__ == "__main__":
    errors.run(command)

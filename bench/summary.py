"""All results of one run of bench/gpu.sh in one short table, what matters most first.

    python -m bench.summary [--out=FOLDER]
"""

import json

import bench
import errors

FIRST = ("step-small-", "start-", "run-", "step-")  # parts of file names, in the order of their rows; then the rest


def main():
    found = sorted(bench.results().glob("*.json"))
    if not found:
        raise errors.UserError(f"no results in {bench.results()}: name their folder with --out=FOLDER")
    place = lambda path: next((n for n, part in enumerate(FIRST) if f"-{part}" in path.name), len(FIRST))
    for path in sorted(found, key=place):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, ratio in (result.get("ratios") or {}).items():
            print(f"{ratio:8.3f}  {name}")


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

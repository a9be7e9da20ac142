"""The ratios of all results of one run of bench/gpu.sh, in one short table.

    python -m bench.summary [--out=FOLDER]
"""

import json

import bench
import errors


def main():
    found = sorted(bench.results().glob("*.json"))
    if not found:
        raise errors.UserError(f"no results in {bench.results()}: name their folder with --out=FOLDER")
    for path in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, ratio in (result.get("ratios") or {}).items():
            print(f"{ratio:8.3f}  {name}")


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

"""The ratios of all results of one run of bench/gpu.sh, in one short table.

    OUT=folder python -m bench.summary
"""

import json
import os
from pathlib import Path


def main():
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, ratio in (result.get("ratios") or {}).items():
            print(f"{ratio:8.3f}  {name}")


if __name__ == "__main__":
    main()

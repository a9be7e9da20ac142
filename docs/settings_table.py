"""docs/settings.md, made of what train.py --help says:  python -m docs.settings_table     (a test compares the two)"""

import re
from pathlib import Path

import errors
import settings

PAGE = Path(__file__).parent / "settings.md"
HEAD = """\
# Settings

This page is made by `python -m docs.settings_table`; the reasons stand in `config.py` and `model.py`.

```bash
python train.py --help
python train.py configs/debug.py --help          # with what that file sets, marked, and the defaults beside it
python train.py configs/debug.py --max_steps=50 --muon_lr=5e-3 --no-nesterov --out_dir=out/try
```

- *Precedence*: the command line, then the config file, then the defaults below.
- *On the line* `--key value` is the same as `--key=value`; `--key` alone means True, `--no-key` False. None, numbers
  (`3e-4`), lists and `{folder: weight}` are written as in Python.
- *A config file* is Python assignments. It may compute (names with a leading underscore are its own) and import another
  one (`from configs.small import *`).
- *Mistakes*: a typo names the nearest setting. A wrong type or an impossible combination says what would be valid. The
  names of other trainers (`--lr`, `--batch_size`, `--n_layer`) lead to ours.
- *The batch*: `global_batch_size` sequences of `sequence_length` tokens make one optimizer step. The ranks share them,
  each in portions of `micro_batch_size`. The portions change memory and speed, not the result.
- *The model's* settings have the names of Kimi K2's `config.json`.
"""
TABLE = """
## {}

| setting | default | type | what and why |
| --- | --- | --- | --- |
"""


def page():
    """The text of docs/settings.md."""
    lines = [HEAD]
    for group, entries in re.findall(r"\n(\w+)\n((?:  --.*\n {8}.*\n?)+)", settings.help_text()):
        lines.append(TABLE.format(group.capitalize()))
        for name, default, kinds, why in re.findall(r"  --(\w+)=(.*)  \((.*)\)\n {8}(.*)", entries):
            lines.append(f"| `{name}` | `{default}` | {kinds.replace(' | ', ' or ')} | {why} |\n")
    return "".join(lines)


def main(argv):
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    errors.run(main)

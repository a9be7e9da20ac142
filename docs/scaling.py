"""The table and the picture of docs/scaling.md and the layouts at the head of the configs, as launch/plan.py predicts
today:  python -m docs.scaling [FOLDER]

Every row is a config on so many GPUs: at its own global batch, and at one that grows with the GPUs. FOLDER is the
repository's own unless named. tests/test_plan.py predicts some rows anew, and holds the heads against the table.
"""

import dataclasses
import re
from pathlib import Path

import matplotlib

import errors
import settings
from docs.pictures import DARK, STYLE
from errors import UserError
from launch.costs import GIB, GPUS
from launch.plan import plans

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of what draws)

ROOT = Path(__file__).parent.parent
ROWS = {"small": ("h100", 1, 8, 64, 512, 2048), "medium": ("h100", 1, 8, 64, 512, 2048),
        "moonlight": ("h100", 8, 64, 512, 2048), "k2": ("h200", 512, 2048)}
PER_GPU = {"small": 64, "moonlight": 16, "k2": 8}  # sequences of a step on each, where the global batch grows
PLANNED = "Planned by docs/scaling.py, stages x replicas x shards, GiB a GPU, a step:\n"  # at the head of a config
BEGIN, END = "<!-- planned -->\n", "<!-- end -->"
HEAD = ("| config, GPUs | sequences a step | layout | GiB | step | tokens/s a GPU | MFU | the longest part |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n")


def row(name, n, per_gpu=None):
    """One line of the table, as a list of texts."""
    config, gpu = settings.load([f"configs/{name}.py"])[0], ROWS[name][0]
    if per_gpu:
        config = dataclasses.replace(config, global_batch_size=per_gpu * n)
    label = [f"{name}, {n} x {gpu}", f"{config.global_batch_size:,}"]
    try:
        best = plans(config, n, GPUS[gpu], min(n, 8))[0]
    except UserError:
        return [*label, "not with this global batch", *["-"] * 5]
    c, layout = best.costs.config, best.layout
    parts = [best.mesh(), f"ep {layout.ep}" * (layout.ep > 1),
             f"micro-batch {best.micro_batch_size}", f"{c.activation_checkpointing} recomputed"
             * (c.activation_checkpointing != "none")]
    return [*label, ", ".join(filter(None, parts)), f"{sum(best.memory.values()) / GIB:.1f}", f"{best.step:.3g} s",
            f"{best.tokens / best.step / n:,.0f}", f"{best.mfu:.1%}",
            max(best.seconds, key=best.seconds.get)]


def head(name, rows):
    """The lines at the head of a config, of its rows at its own global batch that fit."""
    own = [r for r in rows if r[0].startswith(f"{name}, ")][:len(ROWS[name]) - 1]
    return "".join(f"    {r[0].split(', ')[1]}: {r[2]}: {r[3]} GiB, {r[4]}\n" for r in own if r[3] != "-")


def draw(rows):
    """GPU-hours for a billion tokens against GPUs, from the lines of the table; a figure."""
    figure, axes = pyplot.subplots(1, len(PER_GPU), figsize=(8, 2.6), layout="constrained")
    for axis, name in zip(axes, PER_GPU):
        own = [r for r in rows if r[0].startswith(f"{name},")]
        most = 0.0
        kinds = {"own global batch": own[:len(ROWS[name]) - 1], "batch grows with the GPUs": own[len(ROWS[name]) - 1:]}
        for style, (label, some) in zip(("-o", "--s"), kinds.items()):
            points = [(int(r[0].split()[1]), 1e9 / 3600 / float(r[5].replace(",", ""))) for r in some if r[5] != "-"]
            axis.plot(*zip(*points), style, color=DARK, label=label, markersize=4, linewidth=1)
            most = max(most, *(hours for _, hours in points))
        axis.set(xscale="log", xlabel="GPUs", title=f"{name}, {ROWS[name][0]}", ylim=(0, 1.2 * most))
        axis.set_xticks(ROWS[name][1:], map(str, ROWS[name][1:]))
        axis.minorticks_off()
    axes[0].set_ylabel("GPU-hours a billion tokens")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def main(argv):
    folder = Path(argv[0]) if argv else ROOT
    rows = [row(name, n) for name, (_, *sizes) in ROWS.items() for n in sizes]
    rows += [row(name, n, per_gpu) for name, per_gpu in PER_GPU.items() for n in ROWS[name][1:]]
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    table = HEAD + "".join(f"| {' | '.join(r)} |\n" for r in rows)
    page = re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + table + END, page, flags=re.S)
    for name in ROWS:
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        text = (ROOT / f"configs/{name}.py").read_text(encoding="utf-8")
        text = re.sub(f"({PLANNED})(?:    .*\n)*", lambda found, name=name: found[1] + head(name, rows), text)
        (folder / f"configs/{name}.py").write_text(text, encoding="utf-8")
    for name in ("docs", "assets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "docs/scaling.md").write_text(page, encoding="utf-8")
    with pyplot.rc_context(STYLE):
        draw(rows).savefig(folder / "assets/scaling.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    errors.run(main)

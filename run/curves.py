"""The pictures of a run, and of several on top of each other, drawn from their records.

Made for a width of 800 pixels, and for print: lines differ in dashes and grey, and both colour scales grow darker with
the number. Next: metrics.py, which makes the records and calls this.
"""

import contextlib
import math
import os

import numpy as np

WIDTH, DPI = 8.0, 140  # inches; 1,120 pixels, of which 800 are enough to read it
LINES = [("black", "-"), ("#d95f02", "--"), ("#1f78b4", "-."), ("#666666", ":"), ("#1b9e77", (0, (6, 1, 1, 1, 1, 1))),
         ("#7570b3", (0, (3, 1)))]
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.spines.top": False,
         "axes.spines.right": False, "legend.fontsize": 8, "legend.frameon": False, "font.family": "DejaVu Sans"}
MOST_POINTS, MOST_ROWS = 2000, 500  # of a line, of an image


# ----------------------------------------------------------------------------- what is drawn

def points(records, kind, key):
    """(steps, values), as arrays, of what is a number; null stands for what was not finite, and a damaged line can hold
    anything."""
    found = [(record["step"], record[key]) for record in records if record["kind"] == kind
             and isinstance(record.get(key), int | float) and abs(record[key]) < 1e100]
    steps, values = np.array(found[::-(-len(found) // MOST_POINTS) or 1], np.float64).reshape(-1, 2).T
    return steps, values


def smooth(values):
    """A moving average over a twentieth of the values, and five at least; at the ends over half of that."""
    half, at = max(len(values) // 40, min(len(values) // 4, 2)), np.arange(len(values))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[end] - sums[first]) / (end - first)


def hours(records):
    """(steps, hours until then) of the train records: what lies between a start and the record before it, a night
    perhaps, does not count."""
    steps, passed, total, before = [0.0], [0.0], 0.0, None
    for record in records:
        at = record.get("time")
        if not isinstance(at, int | float) or not abs(at) < 1e100:
            continue
        if before is not None and (record["kind"], record.get("event")) != ("event", "resume"):
            total += max(at - before, 0.0) / 3600
        before = at
        if record["kind"] == "train" and record["step"] > steps[-1]:
            steps.append(float(record["step"]))
            passed.append(total)
    return np.array(steps), np.array(passed)


def grids(records, key):
    """(steps, one row a layer or expert, values): the records of all layers as an image of (rows, records), and how
    many rows a layer has. Of records that differ in shape, the newest shape counts."""
    found = [(record["step"], rows) for record in records if record["kind"] == "layers"
             and (rows := _rectangle(record.get(key))) is not None]
    found = [(step, rows) for step, rows in found if rows.shape == found[-1][1].shape]
    found = found[::-(-len(found) // 400) or 1]
    if not found:
        return None
    steps, rows = zip(*found)
    rows_LET = np.stack(rows, -1)
    L, E, _ = rows_LET.shape
    if (size := -(-L * E // MOST_ROWS)) > 1:  # of so many neighbours, the one that is the furthest from even
        parts = np.split(rows_LET, range(size, E, size), axis=1)
        odd = [np.abs(np.log(np.maximum(part, 0.01))).argmax(1, keepdims=True) for part in parts]
        rows_LET = np.concatenate([np.take_along_axis(part, at, 1) for part, at in zip(parts, odd)], axis=1)
    return np.array(steps, np.float64), rows_LET.reshape(-1, rows_LET.shape[2]), rows_LET.shape[1]


def _rectangle(value):
    """A list of numbers, or of equally long lists of them, as an array (layers, 1 or experts); None for all else."""
    try:
        rows = np.array(value, np.float64)
    except (TypeError, ValueError):
        return None
    return rows.reshape(len(rows), -1) if rows.ndim in (1, 2) and rows.size else None


# ----------------------------------------------------------------------------- one run

def draw(folder, records, clip):
    """Draw curves.png into a run's folder; returns its path. clip: the logit at which QK-clip acts, None without it."""
    load, logits = grids(records, "expert_load"), grids(records, "max_attention_logits")
    pictures = [picture for picture in (load, logits) if picture]
    height = 6.6 + 2.2 * len(pictures)
    with _page(folder / "curves.png", height) as figure:
        grid = figure.add_gridspec(  # by hand: to let matplotlib find the margins takes as long as all the drawing
            3 + len(pictures), 2, height_ratios=[1.5, 1, 1] + [1.25] * len(pictures), left=0.085, right=0.975,
            top=1 - 0.62 / height, bottom=0.45 / height, hspace=0.56, wspace=0.22)
        _draw_loss(figure.add_subplot(grid[0, :]), records)
        last = [("tokens of an expert over the mean", "expert_load_max", "expert_load_min")] if load else \
            [("largest attention logit", "max_attention_logit")]
        for number, (title, *keys) in enumerate([("learning rate", "lr"), ("gradient norm", "grad_norm"),
                                                 ("tokens per second", "tokens_per_second"), *last]):
            _draw_lines(figure.add_subplot(grid[1 + number // 2, number % 2]), records, title, keys)
        if load:
            _draw_grid(figure, figure.add_subplot(grid[3, :]), load, "load of every expert, a band a layer",
                       (0.25, 4.0), {0.25: "1/4 or less", 0.5: "1/2", 1: "mean", 2: "2", 4: "4 or more"},
                       len(logits[1]) - len(load[1]) // load[2] if logits else 0)
        if logits:
            top = clip or float(np.nanmax(logits[1], initial=1.0))
            ticks = {value: f"{value:g}" for value in (0.1, 1, 10, 100, 1000) if value < top}
            _draw_grid(figure, figure.add_subplot(grid[-1, :]), logits, "largest attention logit of every layer",
                       (top / 1000, top), ticks | {top: f"clip {top:g}" if clip else f"{top:.3g}"}, 0)
    return folder / "curves.png"


def _draw_lines(axis, records, title, keys):
    for key, (color, dashes) in zip(keys, LINES):
        axis.plot(*points(records, "train", key), color=color, linestyle=dashes, linewidth=1,
                  label="busiest" if key.endswith("max") else "idlest")
    if len(keys) > 1:
        axis.legend()
    if keys == ["tokens_per_second"]:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda value, _: _short(value))
    _frame(axis, title)


def _draw_loss(axis, records):
    steps, values = points(records, "train", "loss")
    axis.plot(steps, values, color="#b0b0b0", linewidth=0.8, label="training")
    axis.plot(steps, smooth(values), color="black", linewidth=1.6, label="training, smoothed")
    steps, values_ahead = points(records, "train", "mtp_loss")
    if len(steps):
        axis.plot(steps, smooth(values_ahead), ":", color="#666666", label="of the token after the next, smoothed")
    for key, label, look, color in (("loss", "validation", "o--", "#d95f02"),
                                    ("ema_loss", "validation of the average", "^-.", "#1f78b4")):
        found = points(records, "val", key)
        if len(found[0]):
            axis.plot(*found, look, color=color, label=label, linewidth=1.2, markersize=4)
    _zoom(axis, values)
    axis.set_xlim(left=0)
    axis.legend(ncols=2)
    _frame(axis, "loss, nats per token")
    at, passed = hours(records)
    trained = points(records, "train", "tokens")
    if len(at) < 2 or not len(trained[0]):
        return
    above = axis.secondary_xaxis("top")
    ticks = [tick for tick in axis.get_xticks() if 0 < tick <= at[-1]]
    labels = [f"{_short(np.interp(tick, *trained))}\n{_clock(np.interp(tick, at, passed))}" for tick in ticks]
    above.set_xticks(ticks, labels)
    axis.annotate("tokens\ntime", (0, 1), (-6, 7), "axes fraction", "offset points", ha="right")


def _draw_grid(figure, axis, picture, title, span, ticks, first_layer):
    """An image of rows over steps, dark where the number is large, with its scale; bands of layers are told apart."""
    from matplotlib.colors import LogNorm
    steps, rows, band = picture
    edges = np.concatenate(([steps[0] - (steps[1] - steps[0]) / 2 if len(steps) > 1 else steps[0] - 1],
                            (steps[1:] + steps[:-1]) / 2, [steps[-1] + 1]))
    image = axis.pcolorfast(edges, np.arange(len(rows) + 1), np.clip(np.nan_to_num(rows, nan=span[0]), *span),
                            norm=LogNorm(*span), cmap="YlGnBu")
    n = len(rows) // band
    for layer in range(1, n if n <= 16 else 0):  # of more, the lines would hide what they part
        axis.axhline(layer * band, color="white", linewidth=1.5)
    shown = range(0, n, -(-n // 8))
    axis.set_yticks([(layer + 0.5) * band for layer in shown], [f"layer {first_layer + layer}" for layer in shown])
    axis.invert_yaxis()
    _frame(axis, title, grid=False)
    x, y, width, height = axis.get_position().bounds
    axis.set_position((x, y, 0.88 * width, height))
    bar = figure.colorbar(image, cax=figure.add_axes((x + 0.89 * width, y, 0.015, height)))
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.minorticks_off()


# ----------------------------------------------------------------------------- several runs

def overlay(path, runs):
    """Draw several runs, {name: records}, on top of each other: losses by tokens and by hours, and what may explain
    them. Returns the path."""
    with _page(path, 7.5, "constrained") as figure:
        grid = figure.add_gridspec(3, 2, height_ratios=[1.5, 1, 1])
        for place, title, kind, key, by in (
                (grid[0, 0], "training loss, smoothed, by tokens", "train", "loss", "tokens"),
                (grid[0, 1], "training loss, smoothed, by time", "train", "loss", "time"),
                (grid[1, 0], "validation loss by tokens", "val", "loss", "tokens"),
                (grid[1, 1], "gradient norm by step", "train", "grad_norm", "steps"),
                (grid[2, 0], "tokens per second by step", "train", "tokens_per_second", "steps"),
                (grid[2, 1], "largest attention logit by step", "train", "max_attention_logit", "steps")):
            axis = figure.add_subplot(place)
            for number, (name, records) in enumerate(runs.items()):
                color, dashes = LINES[number % len(LINES)]
                x, y = points(records, kind, key)
                if by != "steps":
                    known = hours(records) if by == "time" else points(records, "train", "tokens")
                    x = np.interp(x, *known) if len(known[0]) else x[:0]
                y = y[:len(x)] if kind == "val" else smooth(y[:len(x)])
                axis.plot(x, y, color=color, linestyle=dashes, linewidth=1.3, label=name,
                          marker="o" if kind == "val" else None, markersize=3)
            _frame(axis, title, by=by)
            if key == "loss":
                axis.locator_params("x", nbins=5)
                _zoom(axis, np.concatenate([points(records, kind, key)[1] for records in runs.values()]))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return path


# ----------------------------------------------------------------------------- small things

def _zoom(axis, values):
    """Let the fall from a uniform guess take no more of a loss's axis than the upper third."""
    if len(values) > 8:
        low, usual = values.min(), np.quantile(values, 0.85)
        axis.set_ylim(low - 0.05 * (usual - low), min(values.max(), low + 1.5 * (usual - low)) + 0.02)


@contextlib.contextmanager
def _page(path, height, layout=None):
    """A figure, which is saved in the end; none of pyplot's, which keeps what is not closed."""
    import matplotlib
    from matplotlib.figure import Figure
    temporary = path.with_name(f".{path.name}")
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, height), dpi=DPI, layout=layout)
        yield figure
        try:
            figure.savefig(temporary, format="png")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _frame(axis, title, by="steps", grid=True):
    axis.set_title(title, loc="left")
    axis.set_xlabel({"steps": "step"}.get(by, by))
    if by != "steps":
        axis.xaxis.set_major_formatter(lambda value, _: _short(value) if by == "tokens" else _clock(value))
    if grid:
        axis.grid(alpha=0.3)


def _short(number):
    """123.4M"""
    power = min(max(int(math.log10(max(abs(number), 1))) // 3, 0), 4)
    return f"{number / 1000**power:.3g}{' kMGT'[power].strip().replace('G', 'B')}"


def _clock(hours):
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"

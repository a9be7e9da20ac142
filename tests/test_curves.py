"""The pictures: what they are drawn from, against sums by hand; whether they can be read small and without colour."""

import json

import matplotlib
import numpy as np
import pytest
from matplotlib import figure, pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

import errors
from run import curves, metrics
from tests.helpers import records, run_train

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of red, green and blue (ITU-R BT.709)


def lines(steps, **more):
    """Records of a run with a night between steps 4 and 5."""
    for step in range(1, steps + 1):
        at = 3600.0 * step + 50_000 * (step > 4)
        if step == 5:
            yield {"kind": "event", "event": "resume", "step": 4, "time": at - 1800}
        yield {"kind": "train", "step": step, "time": at, "tokens": 100 * step, "loss": 7 / step, "lr": 1e-3,
               "grad_norm": None, "tokens_per_second": 10.0, "max_attention_logit": 2.0, **more}


def folder_of(place, found, **settings):
    place.mkdir()
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    (place / "config.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    return place


def figures(monkeypatch):
    """The list of the figures that are saved from now on."""
    drawn, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, *words, **options: (drawn.append(self), save(self, *words, **options)))
    return drawn


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("n", [1, 2, 7, 200])
def test_a_smoothed_line_is_a_mean_over_neighbours(n):
    values = np.random.default_rng(0).random(n)
    half = max(n // 40, min(n // 4, 2))
    expected = [values[max(i - half, 0):i + half + 1].mean() for i in range(n)]
    assert curves.smooth(values) == pytest.approx(expected)


def test_nights_between_two_starts_are_no_hours():
    steps, hours = curves.hours([*lines(6), {"kind": "val", "step": 6, "time": "soon"}])
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6] and hours == pytest.approx([0, 0, 1, 2, 3, 3.5, 4.5])


def test_rows_of_an_image_are_the_experts_of_every_layer():
    load = np.arange(24.0).reshape(4, 2, 3)  # records, layers, experts
    found = [{"kind": "layers", "step": 10 * i, "expert_load": load[i].tolist()} for i in range(4)]
    odd = [{"kind": "layers", "step": 5, "expert_load": value} for value in (None, "x", [[1], [1, 2]], [[1.0]], [], 3)]
    steps, rows, band = curves.grids(odd + found, "expert_load")
    assert steps.tolist() == [0, 10, 20, 30] and band == 3
    assert (rows == load.transpose(1, 2, 0).reshape(6, 4)).all() and curves.grids(odd[:3], "expert_load") is None


def test_of_too_many_experts_the_most_uneven_stay(monkeypatch):
    load = np.ones((2, 2, 6))
    load[0, 0, 1], load[1, 1, 5] = 9.0, 0.0
    monkeypatch.setattr(curves, "MOST_ROWS", 4)
    found = [{"kind": "layers", "step": i, "expert_load": load[i].tolist()} for i in range(2)]
    _, rows, band = curves.grids(found, "expert_load")
    assert rows.tolist() == [[9, 1], [1, 1], [1, 1], [1, 0]] and band == 2


def test_a_run_records_all_layers_as_its_records_say(config, tmp_path):
    run_train(config, "--max_steps=3", "--decay_steps=1", "--mtp_depth=1")
    for of_all, record in zip(records(tmp_path / "run", "layers"), records(tmp_path / "run"), strict=True):
        load, logits = of_all["expert_load"], of_all["max_attention_logits"]
        assert [len(layer) for layer in load] == [8, 8, 8] and len(logits) == 4  # the first is dense, the last MTP's
        assert max(map(max, load)) == pytest.approx(record["expert_load_max"], abs=0.006)
        assert min(map(min, load)) == pytest.approx(record["expert_load_min"], abs=0.006)
        assert max(logits) == pytest.approx(record["max_attention_logit"], abs=6e-4)
        assert [sum(layer) / 8 for layer in load] == pytest.approx([1, 1, 1], abs=0.006)


def test_records_of_all_layers_are_some_two_hundred(config):
    from settings import load
    for steps, every in ((20, 1), (200, 1), (201, 2), (10_000, 50)):
        assert metrics.layers_interval(load([config, f"--max_steps={steps}"])[0]) == every
    assert metrics.layers_interval(load([config, "--max_steps=10_000", "--log_interval=40"])[0]) == 80


# ---------------------------------------------------------------------- the pictures


@pytest.mark.curves
def test_every_panel_is_there_and_can_be_read_small_and_grey(tmp_path, monkeypatch):
    """At 800 pixels no text is below 8 pixels, and none is cut off; where colours differ, greys or dashes do too."""
    drawn = figures(monkeypatch)
    layers = [{"kind": "layers", "step": step, "expert_load": np.ones((2, 4)).tolist(),
               "max_attention_logits": [1.0, None, 120.0]} for step in range(1, 9)]
    found = [*lines(8, mtp_loss=3.0, expert_load_max=2.0, expert_load_min=0.1), *layers,
             {"kind": "val", "step": 1, "loss": 6.5, "ema_loss": 6.4}]
    run = folder_of(tmp_path / "run", found, optimizer="muonclip", qk_clip_tau=50.0)
    size = pyplot.imread(metrics.draw_curves(run)).shape
    (picture,) = drawn
    titles = [axis.get_title(loc="left") for axis in picture.axes]
    assert len([title for title in titles if title]) == 7 and "load of every expert, a band a layer" in titles
    (scale,) = [axis for axis in picture.axes if "clip 50" in [text.get_text() for text in axis.get_yticklabels()]]
    assert scale.get_ylim()[1] == pytest.approx(50)
    losses = picture.axes[0]
    labels = [line.get_label() for line in losses.lines]
    assert labels == ["training", "training, smoothed", "of the token after the next, smoothed", "validation",
                      "validation of the average"]
    assert losses.lines[3].get_xdata().tolist() == [1]  # from the first one on
    looks = [(line.get_linestyle(), line.get_marker(), round(float(to_rgb(line.get_color()) @ LUMINANCE), 1))
             for line in losses.lines]
    assert len(set(looks)) == len(looks)
    renderer = FigureCanvasAgg(picture).get_renderer()
    texts = [text for text in picture.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(boxes) > 50
    for text, box in zip(texts, boxes):
        assert text.get_fontsize() / 72 * picture.dpi * 800 / size[1] >= 8, text
        ticks = [tick for axis in picture.axes for tick in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        assert text in ticks or box.x0 >= 0 and box.x1 <= picture.bbox.x1 and box.y1 <= picture.bbox.y1, text


def test_colour_scales_are_scales_of_grey_and_dashes_tell_lines_apart():
    greys = matplotlib.colormaps["YlGnBu"](np.linspace(0, 1, 100))[:, :3] @ LUMINANCE
    assert (np.diff(greys) < 0).all()
    assert len({str(dashes) for _, dashes in curves.LINES}) == len(curves.LINES)


@pytest.mark.curves
@pytest.mark.parametrize("found", [[], list(lines(1)), list(lines(9)), [
    {"kind": "layers", "step": 3, "expert_load": [[0.0, None]], "max_attention_logits": [None, 1e-9]}]], ids=len)
def test_whatever_is_there_is_drawn(tmp_path, found):
    run = folder_of(tmp_path / "run", found, optimizer="adamw")
    assert pyplot.imread(metrics.draw_curves(run)).shape[1] >= 800 and not list(run.glob(".*"))


@pytest.mark.curves
def test_a_picture_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def font(self, path, **options):
        path.write_bytes(b"half")
        raise RuntimeError("a font")

    monkeypatch.setattr(figure.Figure, "savefig", font)
    with pytest.raises(RuntimeError):
        metrics.draw_curves(tmp_path)
    assert not list(tmp_path.iterdir()) and not pyplot.get_fignums()


def test_pictures_take_a_hundredth_of_the_time_and_come_at_the_end(tmp_path, monkeypatch):
    now, drawn = [1000.0], []

    def draw(folder):
        drawn.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "draw_curves", draw)
    log = metrics.RunLog(tmp_path, None, 0, None, active=False)
    log.active = True
    for _ in range(1000):
        now[0] += 1.0
        log.draw()
    log.draw(final=True)
    assert drawn[0] == 1001 and 0.5 * len(drawn) < 0.011 * (now[0] - 1000) and drawn[-1] == now[0] - 0.5


# ---------------------------------------------------------------------- python -m run.metrics


def test_the_command_tells_every_run_and_lays_them_on_top_of_each_other(tmp_path, capsys, monkeypatch):
    val = {"kind": "val", "step": 8, "loss": 3.24591234567, "bits_per_byte": 0.5}
    a, b = folder_of(tmp_path / "a", [*lines(8), val]), folder_of(tmp_path / "b", list(lines(4)))
    metrics.command([str(a)])
    assert capsys.readouterr().out == f"{a}: step 8  loss 0.875  validation 3.2459  bits per byte 0.5\n"
    drawn = figures(monkeypatch)
    metrics.command([str(a), str(b)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{b}: step 4  loss 1.75  validation -  bits per byte -", str(tmp_path / "overlay.png")]
    by_tokens, by_time = drawn[0].axes[:2]
    for axis, ends in ((by_tokens, [800, 400]), (by_time, [6.5, 3.0])):  # hours: without the night and to the first
        assert [line.get_xdata()[-1] for line in axis.lines] == pytest.approx(ends)
        assert [line.get_label() for line in axis.lines] == [str(a), str(b)]
    monkeypatch.setattr(curves, "overlay", lambda path, runs: path)
    metrics.command([str(a), str(b), "--out=mine.png"])
    assert capsys.readouterr().out.endswith("\nmine.png\n")


def test_the_command_says_what_it_wants(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        metrics.command(["--help"])
    assert end.value.code == 0 and "RUN_FOLDER" in capsys.readouterr().out
    for words, message in (([], "python -m run.metrics RUN"), (["--x"], "--x"), ([str(tmp_path)], "no metrics"),
                           ([f"{tmp_path}s"], f"with steps; did you mean {tmp_path}?")):
        with pytest.raises(errors.UserError, match=message):
            metrics.command(words)

"""What stands on a terminal in the end and meanwhile, as a screen would show it; and that logs stay plain."""

import io
import os
import types

import pytest
import torch

import errors
from run import guard, metrics
from run.terminal import Live, fitting
from tests.helpers import run_train

SHORT = ["--max_steps=4", "--decay_steps=1", "--log_interval=2", "--save_interval=2", "--eval_interval=2"]


class Screen(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self):
        return True

    def lines(self):
        """What it shows: a carriage return goes back, and what follows writes over what was there."""
        shown = []
        for line in self.getvalue().split("\n"):
            row = ""
            for part in line.split("\r"):
                row = part + row[len(part):]
            shown.append(row.rstrip())
        return shown


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Screen()


def test_a_run_on_a_terminal(config, tmp_path, screen, monkeypatch):
    """The records that are kept stand above what was said next; no line is mixed with the bar, and no bar is left."""
    monkeypatch.setattr("sys.stdout", screen)
    run_train(config, *SHORT)
    run, shown = tmp_path / "run", screen.lines()
    assert "/4 |" in screen.getvalue() and not any("|" in line for line in shown)
    assert shown[0].startswith("run: 0.") and "epochs in all, into" in shown[2]
    firsts = [line.split(" ", 2)[:2] for line in shown[3:10]]
    assert firsts == [["step", "2/4"], *[["step", "2:"]] * 2, ["step", "4/4"], *[["step", "4:"]] * 2, ["done:", ""]]
    assert shown[5] == f"step 2: saved {run}/checkpoints/step_00000002, the best so far"
    assert shown[-1] == "" and shown[-2].startswith("go on: ") and shown[-2].endswith(f"--resume={run} --max_steps=8")
    assert all(len(line) < 80 for line in shown if "/4  loss" in line)


def test_a_run_into_a_log(config, tmp_path, capsys):
    run_train(config, *SHORT, "--verbose")
    said = capsys.readouterr().out
    assert "\r" not in said and [line[:8] for line in said.splitlines() if line.startswith("step ") and "/4 " in line] \
        == ["step 1/4", "step 2/4", "step 4/4"]
    assert "  muon  model.layers.*.mlp.gate.weight" in said  # --verbose


def live(screen, monkeypatch):
    """A Live on the screen, in the middle of a run."""
    found = Live(screen, io.StringIO())
    monkeypatch.setattr("sys.stdout", found.out)
    found.begin(10, 20)
    found.step(12, 1.5, 12_345.0, 3723)
    return found


def test_what_is_printed_stands_whole_above_the_live_line(screen, monkeypatch):
    line = live(screen, monkeypatch)
    print("a ", end="")
    print("b")
    line.record("step 12/20  loss 1.5")
    line.record("step 13/20  loss 1.4")
    print("two\nlines")
    print("10 %\r20 %\rhalf", end="")
    line.doing("the save of step 13")
    bar = screen.lines()[-1]
    assert screen.lines()[:-1] == ["a b", "step 13/20  loss 1.4", "two", "lines"] and bar.startswith("12/20 |")
    assert bar.endswith("| the save of step 13 ...") and len(bar) <= 80
    line.step(14, 1.25, 12_345.0, 3723)
    line.bar.refresh()
    assert screen.lines()[-1].endswith("| loss 1.2500  12,345 tok/s  eta 1:02:03")
    line.record("step 14/20  loss 1.25")
    line.close()
    assert screen.lines()[4:] == ["step 14/20  loss 1.25", "half"]
    line.close()
    print("later")
    assert screen.lines()[-2:] == ["halflater", ""]


def test_a_record_stays_on_the_terminal_where_errors_go_to_a_file(screen, monkeypatch):
    line, errors_file = live(screen, monkeypatch), io.StringIO()
    line.err.stream = errors_file
    line.record("step 12/20  loss 1.5")
    line.err.write("warning: slow\n")
    assert errors_file.getvalue() == "warning: slow\n" and screen.lines()[0] == "step 12/20  loss 1.5"
    line.close()
    assert screen.lines() == ["step 12/20  loss 1.5", ""]


def test_no_other_bar_appears_beside_the_live_line(screen, monkeypatch):
    line = live(screen, monkeypatch)
    assert errors.progress("checksum", 10).disable and not line.out.isatty()
    line.close()
    assert not errors.progress("checksum", 10).disable


@pytest.mark.parametrize("stream", [io.StringIO(), types.SimpleNamespace(isatty=lambda: True)], ids=["log", "rank 1"])
def test_without_a_terminal_of_its_own_there_is_no_live_line(monkeypatch, stream, capsys):
    line = Live(stream, io.StringIO())
    line.begin(0, 10)  # sys.stdout is another: a rank that has been silenced
    line.step(1, 1.0, 1.0, 1)
    line.doing("a validation")
    line.record("step 1/10")
    assert line.bar is None and capsys.readouterr().out == "step 1/10\n"


def test_an_error_ends_the_live_line(screen, monkeypatch):
    monkeypatch.setattr("sys.stdout", screen)
    with pytest.raises(ZeroDivisionError), guard.Guard([]) as watch:
        watch.live.begin(0, 10)
        watch.live.record("step 1/10")
        assert watch.live.bar is not None
        1 / 0  # noqa: B018
    assert watch.live.bar is None and screen.lines() == ["step 1/10", ""]


def test_a_line_gives_up_its_last_parts_to_fit():
    line = "step   1/450  loss 7.6561  lr 5.00e-04  0.8 GiB  eta 4:40"
    assert [fitting(line, n) for n in (99, 58, 57, 30, 5)] == [
        line, line, line[:-10], "step   1/450  loss 7.6561", "step"]


# ---------------------------------------------------------------------- progress


def test_a_checkpoint_that_is_read_tells_every_byte(config, tmp_path, monkeypatch):
    from run import checkpoint
    told = {}

    class Bar:
        def __init__(self, what, total):
            self.what, told[what] = what, [total, 0]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            told[self.what][1] += n

    run_train(config, *SHORT)
    step = checkpoint.find(tmp_path / "run")
    stored = checkpoint._SafeReader(step).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in stored.items()}
    monkeypatch.setattr(checkpoint, "progress", Bar)
    monkeypatch.setattr("data.shards.progress", Bar)
    checkpoint.load(step, tensors)
    checkpoint.find(tmp_path / "run")
    n_bytes, file = checkpoint.size(tensors), step / "__0_0.distcp"
    assert told == {"loading step_00000004": [n_bytes, n_bytes], "checksum of .metadata": [
        (step / ".metadata").stat().st_size] * 2, "checksum of __0_0.distcp": [file.stat().st_size] * 2}


# ---------------------------------------------------------------------- a crowded machine


def test_a_cpu_that_others_use_is_told_once(monkeypatch):
    load = [5.0]
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    crowding = metrics.Crowding(torch.device("cpu"))
    assert [crowding.found(speed) for speed in (9000.0, 12_000.0, 4001.0)] == [[], [], []]
    load[0] = 2.0
    assert crowding.found(300.0) == []  # slow, but not for others' sake
    load[0] = 2.1
    (event,) = crowding.found(4000.0)
    assert event == {"speed": 4000.0, "best": 12_000.0, "load": 2.1, "cores": 2, "threads": 2}
    assert crowding.found(300.0) == []
    assert "Fewer threads than 2 lose less" in metrics.EVENTS["crowding"].format(again="python", **event)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for other in (metrics.Crowding(torch.device("cpu")), metrics.Crowding(torch.device("cuda"))):
        assert other.found(9000.0) == other.found(1.0) == []

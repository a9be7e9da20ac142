"""W&B and TensorBoard get every step once, whatever happened to a run: resumed, killed, rewound, watched later."""

import json
import shutil
import sys
import types

import pytest

import errors
from run import services
from run.services import Service
from tests.helpers import run_train, small_run

SETTINGS = dict(max_steps=4, save_interval=2, eval_interval=2, decay_steps=1, keep_checkpoints=9)
ON = ["--wandb=online", "--wandb_group=mine", "--wandb_tags=['a', 'b']", "--sample_interval=2"]


class Site:
    """Stands for W&B's: keeps runs by their id, and takes no step below one that it has."""

    def __init__(self):
        self.runs, self.options, self.refused = {}, [], []

    def init(self, **options):
        self.options.append(options)
        self.here = self.runs.setdefault(options["id"], {})
        return self

    @property
    def step(self):
        return max(self.here, default=-1) + 1

    def Table(self, columns, data):
        return columns, data

    def log(self, numbers, step):
        if step < max(self.here, default=0):
            self.refused.append(step)
        else:
            self.here.setdefault(step, {}).update(numbers)

    def finish(self):
        pass


@pytest.fixture
def site(monkeypatch):
    found = Site()
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    return found


def losses_of(history):
    return {step: numbers["train/loss"] for step, numbers in history.items() if "train/loss" in numbers}


def losses_in(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["loss"] for record in lines if record["kind"] == "train"}


def test_a_run_that_is_watched_later_resumed_and_rewound(site, tmp_path):
    path, run = small_run(tmp_path / "small", **SETTINGS), tmp_path / "small/run"
    run_train(path, *ON, "--resume", "--max_steps=6")  # the first four steps were made without W&B
    (history,) = site.runs.values()
    assert losses_of(history) == losses_in(run) and list(losses_in(run)) == [1, 2, 3, 4, 5, 6]
    assert {step for step, numbers in history.items() if "val/loss" in numbers} == {2, 4, 6}
    first = site.options[0]
    assert (first["group"], first["tags"], first["name"]) == ("mine", ["a", "b"], "run")
    columns, rows = history[6]["samples"]
    assert columns == ["step", "text"] and [step for step, _ in rows] == [6]

    run_train(path, *ON, "--resume", "--max_steps=8")
    assert losses_of(history) == losses_in(run) and len(site.runs) == 1
    assert [step for step, _ in history[8]["samples"][1]] == [6, 8]

    run_train(path, *ON, f"--resume={run}/checkpoints/step_00000006", "--max_steps=8", "--seed=1", "--new_data")
    aside, = (run / "aside").iterdir()
    old, new = site.runs.values()
    assert losses_of(old) == losses_in(aside) and losses_of(new) == losses_in(run) and losses_of(old) != losses_of(new)
    assert len(losses_of(new)) == 8 and site.refused == []
    ids = [json.loads((place / "config.json").read_text(encoding="utf-8"))["run_id"] for place in (aside, run)]
    assert ids == list(site.runs)


def test_steps_that_are_done_again_after_a_kill_are_not_sent_again(site, tmp_path):
    path, run = small_run(tmp_path / "small", **SETTINGS | {"max_steps": 6}), tmp_path / "small/run"
    run_id = json.loads((run / "config.json").read_text(encoding="utf-8"))["run_id"]
    site.runs[run_id] = {step: {"train/loss": loss} for step, loss in losses_in(run).items() if step < 6}
    shutil.rmtree(run / "checkpoints/step_00000006")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 6' not in line), encoding="utf-8")
    run_train(path, "--wandb=online", "--resume")
    assert losses_of(site.runs[run_id]) == losses_in(run) and len(losses_in(run)) == 6 and site.refused == []


def test_offline_a_start_goes_on_where_the_one_before_ended(tmp_path, monkeypatch):
    def first(start, newest, earlier):  # in tmp_path as it is then
        for name in earlier:
            (tmp_path / "wandb" / name).mkdir(parents=True, exist_ok=True)
        config = types.SimpleNamespace(wandb_project="p", run_name=None, wandb_group=None, wandb_tags=[])
        return services.WandB(Site(), config, tmp_path, "abcd", "offline", start, newest, []).first
    assert first(4, 4, []) == 0 and first(4, 4, ["offline-run-1-zzzz"]) == 0
    assert first(4, 4, ["offline-run-1-abcd"]) == 5 and first(4, 6, []) == 7
    tmp_path /= "aside/step_00000002_to_00000004"  # which keeps the id, but not what was sent with it
    assert first(4, 4, []) == 5


def test_tensorboard_holds_every_record_of_the_run_once(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, flush_secs):
            folder.mkdir()
            (folder / f"events.{len(written)}").touch()
            self.add_scalar = lambda name, value, step, walltime: written.append((name, value, step, walltime))
            self.add_text = lambda name, text, step: written.append((name, text, step))
            self.close = lambda: written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    path, run = small_run(tmp_path / "small", **SETTINGS), tmp_path / "small/run"
    for _ in range(2):  # the second start writes all anew
        written.clear()
        run_train(path, "--tensorboard", f"--resume={run}/checkpoints/step_00000002", "--sample_interval=4")
        assert {entry[2]: entry[1] for entry in written if entry[0] == "train/loss"} == losses_in(run)
        assert sum(entry[0] == "train/loss" for entry in written) == 4 and written[-1] == "closed"
        assert [entry[2] for entry in written if entry[0] == "val/loss"] == [2, 4]
        assert [entry[2] for entry in written if entry[0] == "sample"] == [4]
        assert len(list((run / "tensorboard").iterdir())) == 1
    assert all(entry[3] > 1.7e9 for entry in written if len(entry) == 4)  # when it was recorded


def test_tensorboard_that_is_not_there_is_refused_before_anything_begins(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(errors.UserError, match="tensorboard needs the package: pip install tensorboard, or --no-tens"):
        run_train(config, "--tensorboard")
    assert not (tmp_path / "run").exists()


def test_records_that_a_service_has_are_left_out(tmp_path):
    got = []
    fake = types.SimpleNamespace(first=3, log=got.append, finish=lambda: got.append("end"))
    service = Service("X", lambda: fake, [{"step": step} for step in (1, 2, 3)])
    service.put({"step": 2})
    service.put({"step": 4})
    service.close()
    assert got == [{"step": 3}, {"step": 4}, "end"]

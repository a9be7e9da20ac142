"""CUDA graphs of micro-batches, on a pretend device: what is captured is a closure, and its replay runs it on the same
inputs into the same gradients. What only a real device can show is in test_gpu.py."""

import pytest
import torch

from errors import UserError
from kernels import graphs
from muon import Muon
from step import update_all
from tests.helpers import losses, make_config, run_train, tiny_model, tokens


class Recorded:
    """What torch.cuda.CUDAGraph is to graphs.py; spoil(gradients) comes after every replay."""

    def __init__(self, model, function, spoil):
        self.model, self.function, self.spoil = model, function, spoil
        self.anew = all(p.grad is None for p in model.parameters())
        statistics = [s.clone() for s in (*model.routing.buffers(), model.max_logits)]
        gradients = None if self.anew else [p.grad.clone() for p in model.parameters()]
        self.result = function()
        for statistic, value in zip((*model.routing.buffers(), model.max_logits), statistics):
            statistic.copy_(value)  # a capture runs nothing
        self.gradients = [p.grad for p in model.parameters()]
        for held, value in zip(self.gradients, gradients or [torch.full_like(g, torch.nan) for g in self.gradients]):
            held.copy_(value)
        self.result.fill_(torch.nan)

    def pool(self):
        return 0

    def replay(self):
        with torch.no_grad():
            if self.anew:
                for held in self.gradients:
                    held.zero_()
        for parameter, held in zip(self.model.parameters(), self.gradients):
            assert parameter.grad is held, "a replay writes where its capture wrote"
        self.result.copy_(self.function())
        self.spoil(self.gradients)


@pytest.fixture
def pretend(monkeypatch):
    """The captures made on a device whose captures are Recorded, and faults to set: `capture`, called with the number
    of a capture before it, and `spoil`, called with the gradients after every replay."""
    device = {"made": [], "capture": lambda number: None, "spoil": lambda gradients: None}
    init = graphs.MicroBatch.__init__

    def remember_model(self, compute, model, *rest):
        device["model"] = model
        init(self, compute, model, *rest)

    def capture(function, pool=None):
        device["capture"](len(device["made"]))
        if getattr(function, "func", None) is update_all:
            device["updates"] = device.get("updates", 0) + 1
            graph = Replayable(function, lambda: None)
            return graph, graph.result
        assert (pool is None) == (len(device["made"]) == 0), "both graphs share their memory"
        device["made"].append(Recorded(device["model"], function, device["spoil"]))
        return device["made"][-1], device["made"][-1].result
    monkeypatch.setattr(graphs.MicroBatch, "__init__", remember_model)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "aside", lambda function: function())
    return device


def steps(replay, accumulation=2, n_steps=4, poisoned=None):
    """([what every step leaves: results, gradients, statistics], lines told) of a model that a plain descent moves."""
    model, told, left = tiny_model(), [], []

    def compute(x, y, scale):
        loss, balance = model(x, y)
        ((loss + balance) * scale).backward()
        return (torch.stack((loss, balance)) * scale).detach()
    micro_batch = graphs.MicroBatch(compute, model, replay, accumulation > 1, told.append)
    for step in range(n_steps):
        model.reset_statistics()
        sums, scale = torch.zeros(2), torch.tensor(float("nan") if step == poisoned else 1.0 + step)
        for micro in range(accumulation):
            x = tokens(2, 17, seed=step * accumulation + micro)
            sums = sums + micro_batch(micro == 0, x[:, :-1], x[:, 1:], scale)
        left.append([sums, model.routing.expert_counts.clone(), model.max_logits.clone(),
                     *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            for p in model.parameters():
                if step != poisoned:
                    p -= 1e-3 * p.grad
                p.grad = None  # as the optimizer's zero_grad does; a replay knows better
    return left, told


def assert_same(ours, expected):
    for step, (one, other) in enumerate(zip(ours, expected, strict=True)):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)), step


@pytest.mark.parametrize("accumulation", [1, 3])
def test_replays_leave_what_calls_leave(pretend, accumulation):
    left, told = steps(True, accumulation)
    assert len(pretend["made"]) == 1 + (accumulation > 1) and len(told) == 1 and "one launch" in told[0]
    assert_same(left, steps(False, accumulation)[0])


def test_a_step_that_is_not_finite_puts_the_trial_off(pretend):
    left, told = steps(True, poisoned=1)
    assert len(pretend["made"]) == 2 and len(told) == 1
    assert_same(left, steps(False, poisoned=1)[0])


@pytest.mark.parametrize("fails", [0, 1])
def test_a_capture_that_fails_is_told_and_the_run_goes_on(pretend, fails):
    def fail(number):
        if number == fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
    pretend["capture"] = fail
    left, told = steps(True)
    assert told == ["CUDA graph: not used for micro-batches, the run goes on without it: CUDA out of memory. Tried"]
    assert len(pretend["made"]) == fails
    assert_same(left, steps(False)[0])


@pytest.mark.parametrize("wrong", [lambda gradients: gradients[3].mul_(1.1),
                                   lambda gradients: gradients[0].fill_(torch.nan),
                                   lambda gradients: [gradient.zero_() for gradient in gradients]])
def test_a_replay_that_differs_is_not_trusted(pretend, wrong):
    pretend["spoil"] = wrong
    left, told = steps(True)
    assert len(told) == 1 and "its replay gives a loss of" in told[0] and "of a gradient is off by" in told[0]
    assert_same(left, steps(False)[0])


def test_an_error_of_the_micro_batch_itself_is_not_swallowed(pretend):
    micro_batch = graphs.MicroBatch(lambda x: 1 / 0, tiny_model(), True, False)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            micro_batch(True, tokens(1, 2))


class Replayable:
    """A capture of an update: nothing has run, and a replay runs all of it, with the gradients that lay there when it
    was captured, and then spoils it if told so."""

    def __init__(self, function, spoil, parameters=()):
        self.function, self.spoil, self.result = function, spoil, torch.zeros(())
        self.grads = [(p, p.grad) for p in parameters]

    def replay(self):
        for p, grad in self.grads:
            p.grad = grad
        self.result.copy_(self.function())
        self.spoil()


def updated(replay, monkeypatch, spoil=lambda p: None, fails=None, move=()):
    """(parameters and momenta after every step, lines told, graphs made) of Muon. move: steps whose gradients lie
    elsewhere."""
    generator = torch.Generator().manual_seed(0)
    named = [(f"{name}_proj.weight", torch.nn.Parameter(torch.randn(4, 6, generator=generator))) for name in "abc"]
    optimizer, made, told, left, results = Muon(named, 0.02), [], [], [], []
    state = [p for _, p in named] + list(optimizer.named_state().values())
    buffers, others = ([torch.empty(4, 6) for _ in named] for _ in range(2))

    def capture(function, pool):
        assert pool == 7
        if fails:
            raise fails
        made.append(Replayable(function, lambda: spoil(named[0][1]), [p for _, p in named]))
        return made[-1], made[-1].result

    def update():
        optimizer.update()
        return torch.tensor(1.0)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "aside", lambda function: function())
    run = graphs.Update(update, [p for _, p in named], state, replay, lambda: 7, told.append)
    for step in range(6):
        for (_, p), buffer in zip(named, others if step in move else buffers):
            p.grad = buffer
            p.grad.copy_(torch.randn(4, 6, generator=generator))
        optimizer.begin_step()
        results.append(run())
        left.append([tensor.detach().clone() for tensor in state])
    assert results == [1.0] * 6 and len({result.data_ptr() for result in results}) == 6  # none lies in a graph's memory
    return left, told, made


@pytest.mark.parametrize("move", [(), (4,), (3, 4), (3, 4, 5)])
def test_replayed_updates_are_the_updates(monkeypatch, move):
    left, told, made = updated(True, monkeypatch, move=move)
    assert len(made) == 1 and not told
    assert_same(left, updated(False, monkeypatch, move=move)[0])


def halved(p):
    with torch.no_grad():
        p /= 2


@pytest.mark.parametrize("fault", [dict(spoil=halved), dict(fails=RuntimeError("not permitted\nwhen capturing"))])
def test_an_update_whose_replay_is_wrong_or_fails_goes_on_without(monkeypatch, fault):
    left, told, _ = updated(True, monkeypatch, **fault)
    assert len(told) == 1 and told[0].startswith("CUDA graph: not used for the optimizer's step, the run goes on")
    assert_same(left, updated(False, monkeypatch)[0])


@pytest.mark.parametrize("function", ["clone", "norm"])
def test_an_update_without_room_for_a_trial_goes_on_without(monkeypatch, function):
    original, trial = getattr(torch.Tensor, function), graphs.Update._trial
    expected = updated(False, monkeypatch)[0]

    def full(self):
        turns = iter(range(10))

        def limited(tensor, *args, **options):
            if next(turns) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(tensor, *args, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, function, limited)
            return trial(self)
    with monkeypatch.context() as patch:
        patch.setattr(graphs.Update, "_trial", full)
        left, told, _ = updated(True, monkeypatch)
    assert len(told) == 1 and "CUDA out of memory" in told[0]
    assert_same(left, expected)


def test_a_run_with_graphs_is_the_run_without(pretend, tmp_path, data, monkeypatch):
    """With validation, samples, resuming and document starts between the replays."""
    config = make_config(tmp_path / "c.py", data=str(data), micro_batch_size=2, eval_interval=3, max_steps=6,
                         sample_interval=4, document_mask=True, mtp_depth=1)
    run_train(config, f"--out_dir={tmp_path / 'plain'}")
    assert not pretend["made"]
    monkeypatch.setattr(graphs, "wanted", lambda *_: True)
    run_train(config, f"--out_dir={tmp_path / 'replayed'}", "--max_steps=3")
    assert len(pretend["made"]) == 2
    pretend["made"].clear()
    run_train(config, f"--out_dir={tmp_path / 'replayed'}", "--resume", "--max_steps=6", "--decay_steps=1")
    assert len(pretend["made"]) == 2 and pretend["updates"] == 2
    assert losses(tmp_path / "replayed") == losses(tmp_path / "plain")


def test_graphs_are_refused_where_the_host_is_asked(tmp_path, data):
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="cuda_graph=True needs a CUDA device and one process"):
        run_train(config, "--cuda_graph")

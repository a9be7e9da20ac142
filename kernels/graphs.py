"""CUDA graphs: work that needs nothing of the host is captured once and replayed, one launch instead of thousands.

`MicroBatch` does so with forward and backward of a micro-batch, `Update` with what follows them in a step,
newton_schulz.py with its small batches. Captured work reads and writes the same memory in every replay; what changes
from call to call is copied into the tensors that the capture read. Next: ../step.py, which makes one of both a run.
"""

import math

import torch

from errors import UserError

LOSS, NORM = 1e-3, 3e-2  # how far a first replay may be off, relatively: attention's backward is not deterministic
_side = None  # the stream of captures, and of what has to have run on it before


def capture(function, pool=None):
    """(graph, result of function): what function() launches, as a graph; nothing of it has run yet. Graphs of one pool
    share the memory of what is between, so their replays must stand on one stream."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # "thread_local": other threads (prefetch, a save, NCCL's watchdog) may go on with what they do
        with torch.cuda.graph(graph, pool=pool, stream=side_stream(), capture_error_mode="thread_local"):
            result = function()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails would leave the other one
    return graph, result


def aside(function):
    """function() on the stream of captures: libraries get ready outside of a capture, and autograd's nodes, which keep
    to the stream that they first ran on, keep to this one."""
    side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()):
        result = function()
    torch.cuda.current_stream().wait_stream(side_stream())
    return result


def side_stream():
    global _side
    _side = _side or torch.cuda.Stream()
    return _side


def wanted(config, layout, device):
    """Whether micro-batches are to be replayed as CUDA graphs."""
    possible = device.type == "cuda" and layout.dense is None
    if config.cuda_graph and not possible:
        raise UserError("cuda_graph=True needs a CUDA device and one process without torchrun, because sharding and "
                        "dispatch ask the host: leave it out")
    return possible if config.cuda_graph is None else config.cuda_graph


class MicroBatch:
    """compute(*inputs), a function of tensors (or None) that runs the model forward and backward and returns one tensor
    of results, as a CUDA graph from the second step on.

    model: gradients of its parameters are added up over a step; its routing and max_logits too. replay=False:
    compute is called as it is. adds: whether a step has more than one micro-batch. tell(line): what became of it.
    With replay the model keeps gradients of experts itself (K2.keep_gradients), whatever comes of the graphs.

    Two graphs: one whose gradients begin anew, one that adds to them. They are trusted after a trial: the loss (the
    first of the results) and the norm of every gradient, of the replays against those of the call itself. If a capture
    or the trial fails, or memory does not suffice, the run goes on without.
    """

    def __init__(self, compute, model, replay, adds=True, tell=print):
        self.compute, self.model, self.adds, self.tell = compute, model, adds, tell
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.replay, self.steps, self.graphs = replay, 0, {}
        self.kept, self.begun = None if replay else {}, None  # see moe.keep_gradients

    def __call__(self, first, *inputs):
        """The results for these inputs. first: the micro-batch is the first of a step."""
        if self.kept is None:  # not made before: whether Triton keeps them is known where it computes
            self.kept, self.begun = self.model.keep_gradients()
        self.steps += first
        if self.replay and not self.graphs and first and self.steps > 1:
            return self._trial(inputs)
        if not self.graphs:
            return self._call(first, inputs)
        self.model.refresh_copies()  # which a replay does not look after
        self._fill(inputs)
        return self._run(first)

    def _call(self, first, inputs):
        if self.begun is not None:
            self.begun.fill_(0.0 if first else 1.0)
        results = self.compute(*inputs)
        for parameter, grad in self.kept.items():
            parameter.grad = grad
        return results

    def _run(self, first):
        graph, result = self.graphs[first]
        for parameter, grad in zip(self.parameters, self.grads):  # the optimizer may have let go of them
            parameter.grad = grad
        graph.replay()
        return result

    def _fill(self, inputs):
        for held, given in zip(self.inputs, inputs):
            if held is not None:
                held.copy_(given, non_blocking=True)

    def _trial(self, inputs):
        """One micro-batch called, captured and replayed; what it left is then as after one call."""
        before = [statistic.clone() for statistic in self._statistics()]
        called = aside(lambda: self._call(True, inputs))
        loss, norms = self._loss_and_norms(called)
        if not math.isfinite(loss) or not norms.isfinite().all():  # nothing to compare with: in the next step, then
            return called
        self.inputs, reason = [given if given is None else given.clone() for given in inputs], None
        try:
            self._begin_anew(before)
            self._capture(True, loss, norms)
            if self.adds:
                self._capture(False, loss, 2 * norms)
        except RuntimeError as error:  # whatever a driver says, or a lack of memory
            reason = why(error)  # the error itself would keep alive what was captured
        self._begin_anew(before)
        if reason is None:
            self.tell("CUDA graphs: a micro-batch is one launch from here on (--no-cuda_graph turns them off)")
            return self._run(True)
        self.replay, self.graphs, self.grads = False, {}, []
        self.tell(f"CUDA graph: not used for micro-batches, the run goes on without it: {reason}")
        torch.cuda.empty_cache()
        return self._call(True, inputs)

    def _capture(self, first, loss, norms):
        """Make one of the two graphs and see whether a replay gives this loss and gradients of these norms."""
        pool = None if first else self.graphs[True][0].pool()
        self.graphs[first] = capture(lambda: self._call(first, self.inputs), pool)
        if first:
            self.grads = [parameter.grad for parameter in self.parameters]
        found, found_norms = self._loss_and_norms(self._run(first))
        off = (found_norms - norms).abs() / (norms + 1e-2 * norms.mean()).clamp(min=1e-30)
        if not abs(found - loss) <= LOSS * abs(loss) or not off.max() <= NORM:
            raise RuntimeError(f"its replay gives a loss of {found:.6g}, the micro-batch itself {loss:.6g}, and the "
                               f"norm of a gradient is off by {100 * off.max():.3g} %")

    def _begin_anew(self, statistics):
        """The state before the micro-batch: no gradients, these statistics."""
        for parameter in self.parameters:
            parameter.grad = None
        for statistic, value in zip(self._statistics(), statistics):
            statistic.copy_(value)

    def _statistics(self):
        return *self.model.routing.buffers(), self.model.max_logits

    def _loss_and_norms(self, results):
        norms = torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        return results.flatten()[0].item(), torch.stack(norms).cpu()

    def pool(self):
        """The memory of the graphs, to be shared; None as long as there are none."""
        return self.graphs[True][0].pool() if self.graphs else None


class Update:
    """update(), which takes the gradients where they are and changes `state`, as a CUDA graph: from the second call on
    that finds all gradients where the one before did. It is trusted after a trial: how far the replay moves every
    tensor of the state against how far the call itself does, from the same state, which is put back between them.

    parameters: whose gradients. state: tensors. replay=False: update is called as it is. pool(): memory to share.
    """

    def __init__(self, update, parameters, state, replay, pool=lambda: None, tell=print):
        self.update, self.parameters, self.state, self.replay = update, list(parameters), list(state), replay
        self.pool, self.tell, self.graph, self.places = pool, tell, None, None

    def __call__(self):
        """What update() returns; if it is a tensor a copy, since other graphs work in a replay's memory."""
        places = [None if p.grad is None else p.grad.data_ptr() for p in self.parameters]
        if self.graph is None:
            settled, self.places = places == self.places, places
            result = self._trial() if self.replay and settled else self.update()
        elif places == self.graph[-1]:
            graph, result, _ = self.graph
            graph.replay()
        else:  # it would read what lies there now
            result = self.update()
        return result.clone() if isinstance(result, torch.Tensor) else result

    @torch.no_grad()
    def _trial(self):
        """The update called, captured and replayed, all from the same state."""
        before, graph, reason = [], None, None
        try:
            before = [tensor.clone() for tensor in self.state]
            aside(self.update)
            moved = self._moved(before)
            torch._foreach_copy_(self.state, before)
            graph, result = capture(self.update, self.pool())
            graph.replay()
            scale = (moved + 1e-2 * moved.mean()).clamp(min=1e-30)  # a step may move nothing
            off = ((self._moved(before) - moved).abs() / scale).max()
            if not off <= NORM:
                raise RuntimeError(f"its replay moves a tensor otherwise than it should, by {100 * off:.3g} %")
        except RuntimeError as error:  # as above
            reason = why(error)
        if reason is None:
            self.graph = graph, result, self.places
            return result
        if before:
            torch._foreach_copy_(self.state, before)
        self.replay, before, graph = False, None, None
        self.tell(f"CUDA graph: not used for the optimizer's step, the run goes on without it: {reason}")
        torch.cuda.empty_cache()
        return self.update()

    def _moved(self, before):
        return torch.stack([(now - then).float().norm() for now, then in zip(self.state, before)]).cpu()


def why(error):
    """The first line of an error, or of the one that it came from: the end of a capture says nothing of the cause."""
    error = error.__context__ or error
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.200}"

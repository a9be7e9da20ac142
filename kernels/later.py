"""Gradients of weights that wait until they are asked for: what a schedule of pipeline stages without bubbles does when
it has nothing better to do (ranks/pipeline.py).

Between start() and stop() a Linear and the experts hand on the gradient of their input at once, and put off that of
their weights: what it takes is kept, as a function. The other parameters, small ones, go the usual way. No compiler can
follow this, so blocks are not compiled then.
"""

import torch
import torch.nn.functional as F

_waiting = None  # [(weights, function that gives their gradients)] since the last take(); None: nothing waits


def start():
    global _waiting
    _waiting = []


def stop():
    global _waiting
    _waiting = None


def on():
    return _waiting is not None


def put_off(weights, gradients):
    """Let gradients(), a list of tensors, reach these weights when what waits is run."""
    _waiting.append((weights, gradients))


def take():
    """What waits now, as a function that computes it and adds it to the weights' gradients."""
    global _waiting
    taken, _waiting = _waiting, []

    @torch.no_grad()
    def run():
        while taken:  # and let go of each
            weights, gradients = taken.pop()
            torch.autograd.backward(weights, gradients())
    return run


class SplitLinear(torch.autograd.Function):
    """F.linear of a weight, alone in a list, so that autograd wants no gradient of it here."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.save_for_backward(x)
        ctx.weights = weights
        return F.linear(x, weights[0].detach())

    @staticmethod
    def backward(ctx, grad):
        (x,), weights = ctx.saved_tensors, ctx.weights
        put_off(weights, lambda: [grad.flatten(0, -2).T @ x.flatten(0, -2)])
        return grad @ weights[0].detach(), None

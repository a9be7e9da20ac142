"""How even can a router's bias make the load of a step that it has not seen? The floor of what balancing can do.

    python -m bench.load out/debug [--batches=32]

The routers of a trained run are held still, and read batches of training text. Their biases are solved exactly, by
quantiles (kernels/quantile.py), from the steps before; what is told is the busiest expert of all layers over its mean
in the next step, mean and largest. The router of a training moves too, so there it can only be worse. Larger steps are
made of several batches.
"""

from pathlib import Path

import torch

import bench
import errors
import moe
from config import Config
from data.loader import TrainStream, prefetch
from data.shards import read_json
from errors import UserError
from generate import load
from kernels import quantile, routing
from run import memory

BEFORE = (1, 4, 16)  # steps from which biases are solved
TIMES = (1, 4)  # batches of the run's size in a step
ROUNDS = 4  # of solving: cutoffs move with the biases
LOOKS = 8  # steps that are looked at, at least


def logits_of(model, n, batches, starts):
    """(layers, n, N, E) of all routers that n batches meet."""
    found, forward = [], moe.Router.forward

    def keep(router, x_ND, *rest):
        found.append(routing.router_logits(x_ND, router.weight))
        return forward(router, x_ND, *rest)
    moe.Router.forward = keep
    try:
        with torch.no_grad():
            for inputs_BT, targets_BT, _ in batches:
                model(inputs_BT, targets_BT, first_BT=starts(inputs_BT))
    finally:
        moe.Router.forward = forward
    return torch.stack(found).unflatten(0, (n, -1)).transpose(0, 1)


def solve(logits_NE, bias_E, top_k):
    """The biases that give every expert its share of these tokens, as nearly as ROUNDS bring it."""
    rank = -(-len(logits_NE) * top_k // logits_NE.shape[1])
    for _ in range(ROUNDS):
        experts_NK = (logits_NE.sigmoid() + bias_E).topk(top_k).indices
        solved_E = quantile.needed_biases(logits_NE, bias_E, experts_NK).kthvalue(rank, dim=0).values
        bias_E = solved_E - solved_E.mean()
    return bias_E


def busiest(logits_NE, bias_E, top_k):
    """The tokens of the busiest expert over the mean."""
    counts_E = (logits_NE.sigmoid() + bias_E).topk(top_k).indices.flatten().bincount(minlength=len(bias_E))
    return (counts_E.max() / counts_E.float().mean()).item()


def main(argv):
    names = [word for word in argv if not word.startswith("--batches=")]
    counts = [word.partition("=")[2] for word in argv if word.startswith("--batches=")]
    n = int(counts[-1]) if counts and counts[-1].isdigit() else 0 if counts else 32
    if len(names) != 1 or n < 2 * max(TIMES) or n % max(TIMES):
        raise UserError("name one run folder, and a multiple of 4 batches, as in  python -m bench.load out/debug "
                        "--batches=32")
    run = Path(names[0])
    memory.keep_freed(torch.device("cpu"))
    model, encoder = load(run, "cpu")
    config = Config(**read_json(run / "config.json")["settings"])
    if not config.n_routed_experts or config.n_group > 1:
        raise UserError(f"{run} has no routed experts, or groups of them, which are not solved here")
    stream = TrainStream(config.data, config.sequence_length, config.seed + 1, False, encoder=encoder,
                         packing=config.packing, document_mask=config.document_mask)
    size, device, K = config.global_batch_size, torch.device("cpu"), config.num_experts_per_tok
    batches = prefetch(stream, device, range(1, n + 1), 0, size, size, 0, 1, timeout=600)
    try:
        logits = logits_of(model, n, (next(batches) for _ in range(n)), stream.starts)
    finally:
        batches.close()
    biases_LE, found = model.routing.biases(), []
    print(f"{'tokens a step':>14} {'biases':>22} {'mean':>6} {'largest':>8}")
    for times in TIMES:
        steps = logits.unflatten(1, (-1, times)).flatten(2, 3)  # (layers, steps, N, E)
        first = max(m for m in BEFORE if m < steps.shape[1])
        asked = range(first, steps.shape[1], max(1, (steps.shape[1] - first) // LOOKS))
        for m in (0, *(m for m in BEFORE if m <= first)):
            loads = [max(busiest(layer[at], solve(layer[at - m:at].flatten(0, 1), bias_E, K) if m else bias_E, K)
                         for layer, bias_E in zip(steps, biases_LE)) for at in asked]
            about = f"of {m} step{'s' * (m > 1)} before" if m else "the run's own"
            found.append({"tokens": steps.shape[2], "steps_before": m, "mean": sum(loads) / len(loads),
                          "largest": max(loads)})
            print(f"{steps.shape[2]:>14,} {about:>22} {found[-1]['mean']:>6.2f} {max(loads):>8.2f}", flush=True)
    bench.save(f"load-{run.name}", {"run": run.name, "batches": n, "balance": config.balance, "loads": found})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

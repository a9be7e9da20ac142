"""The router (its matmul, and the choice; forward and backward) and the sort into expert order: what runs on a GPU
against its twins, eager and compiled. All are bound by memory: the share of 4.3 TB/s says how well.

    python -m bench.routing
"""

import torch

import bench
import errors
from kernels import backend, routing

# sequences, their length, D, E, K, groups, groups used
SHAPES = {"cuda": {"small": (32, 1024, 768, 64, 7, 1, 1), "k2": (2, 4096, 7168, 384, 8, 1, 1),
                   "v3": (2, 4096, 7168, 256, 8, 8, 4)},
          "cpu": {"debug": (16, 256, 256, 16, 4, 1, 1)}}
BANDWIDTH = 4.3e12  # of an H200, measured by a copy


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result, ratios = {}, {}
    for name, (B, T, D, E, K, groups, used) in SHAPES[device].items():
        logits = torch.randn(B * T, E, device=device, requires_grad=True)
        bias, grad = torch.zeros(E, device=device), torch.randn(B * T, K, device=device)

        def route(logits, B=B, K=K, groups=groups, used=used, bias=bias):
            return routing.route(logits, bias, B, K, groups, used)[:3]

        def arm(function, on, logits=logits, grad=grad):
            def run():
                with backend.running(on):
                    weights, _, balance = function(logits)
                    torch.autograd.backward((weights, balance), (grad, torch.ones_like(balance)))
                logits.grad = None
            return run

        chosen = routing.choose(logits.detach(), bias, K)[1]

        def sort(on, chosen=chosen, E=E):
            def run():
                with backend.running(on):
                    routing.sort_by_expert(chosen, E)
            return run

        x = torch.randn(B * T, D, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight, grad_logits = torch.randn(E, D, device=device, requires_grad=True), torch.randn(B * T, E, device=device)

        def product(on, x=x, weight=weight, grad=grad_logits):
            def run():
                with backend.running(on):
                    torch.autograd.grad(routing.router_logits(x, weight), (x, weight), grad)
            return run

        arms = {"twin": arm(route, False)}
        if device == "cuda":
            arms |= {"compiled twin": arm(torch.compile(route, dynamic=False), False), "triton": arm(route, True)}
        seconds = bench.interleaved(arms)
        sorts = bench.interleaved({"twin": sort(False)} | ({"triton": sort(True)} if device == "cuda" else {}))
        products = bench.interleaved({"twin": product(False)} | ({"triton": product(True)} if device == "cuda" else {}))
        moved = B * T * (4 * E * 3 + K * (4 + 8 + 8 + 4))  # logits read twice, their gradient; weights and choices
        result[name] = {"logits": products, "router": seconds, "sort": sorts, "bytes": moved}
        for what, spent in (("logits", products), ("router", seconds), ("sort", sorts)):
            for label, s in spent.items():
                share = f"  {moved / s / BANDWIDTH:6.1%} of 4.3 TB/s" if what == "router" and device == "cuda" else ""
                print(f"{name:6} {what:6} {label:14} {1e6 * s:9.1f} us{share}")
            if "triton" in spent:
                ratios[f"{what}, {name}: twin / triton, time"] = spent["twin"] / spent["triton"]
    if device == "cpu":
        print("no GPU: twins only")
    bench.save(f"routing-{device}", {"ratios": ratios, "shapes": result})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

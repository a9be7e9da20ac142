"""The MoE layer without its shared expert, forward and backward: Triton's kernels against F.grouped_mm with index
operations (eager and compiled) and the per-expert loop; then every matmul alone against F.grouped_mm. "triton, as
trained" has fp32 matrices, whose gradients are fp32, and copies of them in the rows' dtype.

    python -m bench.experts
"""

import torch

import bench
import errors
from kernels import backend, experts, routing

# N tokens, D, F, E, K
SHAPES = {"cuda": {"small": (32768, 768, 256, 64, 7), "moonlight": (16384, 2048, 1408, 64, 6),
                   "k2, 48 of 384 experts": (8192, 7168, 2048, 48, 8)},
          "cpu": {"debug": (4096, 128, 64, 16, 4), "fine": (2048, 256, 64, 64, 7)}}


def transformers_experts(E, D, width):
    """Hugging Face's experts of DeepSeek-V3 by F.grouped_mm, as a function (x, chosen, weights, gate_up, down)."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
    config = DeepseekV3Config(hidden_size=D, moe_intermediate_size=width, n_routed_experts=E, num_hidden_layers=1)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = DeepseekV3Experts(config)
    return lambda x, chosen, weights, gate_up, down: torch.func.functional_call(
        module, {"gate_up_proj": gate_up, "down_proj": down}, (x, chosen, weights.to(x.dtype)))


def scattermoe_experts(E, D, width):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def run(x, chosen, weights, gate_up, down):
        order, sorted_tokens, ends = flatten_sort_count(chosen, num_experts=E)[:3]
        K = chosen.shape[1]
        hidden = experts.swiglu(parallel_linear(x, gate_up.mT, K, order, sorted_tokens, ends, grouped_out=True))
        return parallel_linear(hidden, down.mT, 1, order, sorted_tokens, ends, grouped_in=True, gates=weights)
    return run


OTHERS = {"transformers": transformers_experts, "scattermoe": scattermoe_experts}  # other projects, where installed


def layer(shape, dtype, device):
    """{arm: function of nothing}: the layer from router logits to summed gradients. The reasons of arms that cannot run
    are printed."""
    N, D, width, E, K = shape
    random = lambda *size: torch.randn(*size, device=device)
    logits, x = random(N, E).requires_grad_(), random(N, D).to(dtype).requires_grad_()
    gate_up = (random(E, 2 * width, D) / D**0.5).to(dtype).requires_grad_()
    down = (random(E, D, width) / width**0.5).to(dtype).requires_grad_()
    bias, grad = torch.zeros(E, device=device), random(N, D).to(dtype)

    masters = [matrix.detach().float().requires_grad_() for matrix in (gate_up, down)]

    def forward(logits, x, gate_up, down, copies=None):
        weights, chosen, balance, _ = routing.route(logits, bias, 1, K, scale=2.5)
        y = experts.experts(x, weights, *routing.sort_by_expert(chosen, E), gate_up, down, copies)
        return y, balance

    def as_trained(logits, x, gate_up, down):
        return forward(logits, x, *masters, copies=(gate_up.detach(), down.detach()))

    def arm(function, on=False, grouped=True, operator=False):
        def run():
            before, experts._grouped_is_best = experts._grouped_is_best, lambda *_: grouped
            before_it, experts._operator_is_best = experts._operator_is_best, lambda *_: operator
            with backend.running(on):
                y, balance = function(logits, x, gate_up, down)
                torch.autograd.backward((y, balance), (grad, torch.ones_like(balance)))
            experts._grouped_is_best, experts._operator_is_best = before, before_it
            logits.grad = x.grad = gate_up.grad = down.grad = masters[0].grad = masters[1].grad = None
        return run

    arms = {"loop": arm(forward, grouped=False), "grouped_mm": arm(forward)}
    if device == "cpu":
        arms["rows in the cache"] = arm(forward, operator=True)
    if device == "cuda":
        arms["compiled grouped_mm"] = arm(torch.compile(forward, dynamic=False))
        arms["triton"], arms["triton, as trained"] = arm(forward, on=True), arm(as_trained, on=True)
    for project, make in OTHERS.items():
        try:
            theirs = make(E, D, width)

            def whole(logits, x, gate_up, down, theirs=theirs):
                weights, chosen, balance, _ = routing.route(logits, bias, 1, K, scale=2.5)
                return theirs(x, chosen, weights, gate_up, down), balance
            arms[project] = arm(whole)
            arms[project]()
        except Exception as error:  # of another project's making: told, and left out
            arms.pop(project, None)
            print(f"{project}: not measured ({type(error).__name__}: {error})")
    return arms


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    result, ratios = {}, {}
    for name, shape in SHAPES[device].items():
        N, D, width, E, K = shape
        if device == "cuda":
            from kernels import triton_experts
            print(f"{name}: {triton_experts.choose_products(N, K, E, D, width, dtype, device)}")
        flops = 18 * N * K * D * width
        seconds = bench.interleaved(layer(shape, dtype, device))
        result[name] = {"shape": shape, "tflops": {arm: flops / s / 1e12 for arm, s in seconds.items()}}
        for arm, spent in seconds.items():
            print(f"{name:22} {arm:20} {1000 * spent:8.2f} ms  {flops / spent / 1e12:7.2f} TFLOP/s")
        if "triton" in seconds:
            for other in ("grouped_mm", "compiled grouped_mm"):
                ratios[f"MoE layer, {name}: {other} / triton, time"] = seconds[other] / seconds["triton"]
            result[name]["products"] = products(shape, dtype, device)
    if device == "cpu":
        print("no GPU: twins only")
    bench.save(f"experts-{device}", {"ratios": ratios, "layers": result})


def products(shape, dtype, device):
    """Milliseconds of each matmul of the layer, by Triton and by F.grouped_mm (with the gather that it needs)."""
    from kernels import triton_experts
    N, D, width, E, K = shape
    found = {}
    for product, compute in triton_experts.product_arms(N, K, E, D, width, dtype, device).items():
        flops = N * K * D * width * (2 if product in ("y", "d_down") else 4)
        before = set(triton_experts.LIBRARY)
        triton_experts.LIBRARY.clear()
        ours = backend.milliseconds(compute, device)
        triton_experts.LIBRARY.add(product)
        library = backend.milliseconds(compute, device)
        triton_experts.LIBRARY.clear()
        triton_experts.LIBRARY.update(before)
        found[product] = {"triton": ours, "grouped_mm": library}
        print(f"    {product:10} triton {ours:7.3f} ms {flops / ours / 1e9:6.0f} TFLOP/s   grouped_mm {library:7.3f} "
              f"ms {flops / library / 1e9:6.0f}")
    return found


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))

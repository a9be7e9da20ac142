"""What a run asks of a machine before it starts. Are the kernels right: one small comparison of each with its twin,
values and gradients. Which is the fastest where libraries compete with them: attention, and the experts' matmuls.
Next: backend.py, ../tests/test_triton_*.py.
"""

import torch

from kernels import attention, backend, cross_entropy, experts, newton_schulz, routing


def failures(device, dtype):
    """What went wrong, one line a kernel; empty if Triton's results are the twins' up to rounding."""
    found = []
    for name, case in CASES.items():
        inputs = case(device, dtype, torch.Generator().manual_seed(0))
        try:
            with backend.running(True):
                ours = inputs()
            with backend.running(False):
                expected = inputs()
        except Exception as error:  # of any kind: a compiler's or a driver's too. It is told, and the twins run instead
            found.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        errors = [_error(a, b) for a, b in zip(ours, expected)]
        if not max(errors) <= limit:
            found.append(f"{name}: differs from its twin by {max(errors):.2g}")
    return found


def fastest(config, rows, device):
    """Measure, at the sizes of one micro-batch of `rows` sequences, what computes attention and the experts' matmuls
    fastest. Returns lines to print and the choices, which every rank then has to `adopt`."""
    dtype, heads, T = getattr(torch, config.dtype), config.num_attention_heads, config.sequence_length
    mla = config.attention == "mla"
    width = config.qk_nope_head_dim + config.qk_rope_head_dim if mla else config.v_head_dim
    lines, library = [attention.choose_arm((rows, heads, T, width), config.v_head_dim, dtype, device,
                                           config.document_mask)], set()
    if config.n_routed_experts and backend.triton_runs(torch.empty(0, dtype=dtype, device=device)):
        from kernels import triton_experts
        lines.append(triton_experts.choose_products(
            rows * T, config.num_experts_per_tok, config.n_routed_experts // config.ep, config.hidden_size,
            config.moe_intermediate_size, dtype, device))
        library = triton_experts.LIBRARY
    if device.type == "cuda":  # what a run says of its memory should not include this
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return lines, (dict(attention.ARM), set(library))


def adopt(choices):
    """Take the choices that `fastest` made, perhaps on another rank."""
    attention.ARM, library = choices
    if library:
        from kernels import triton_experts
        triton_experts.LIBRARY = library


def _error(ours, expected):
    """Norm of the difference over the norm of what is expected; NaN stays NaN."""
    ours, expected = ours.double(), expected.double()
    return ((ours - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _with_gradients(function, *tensors):
    """A function of nothing that returns function's results and its gradients with respect to the tensors."""
    def compute():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        results = function(*leaves)
        loss = sum((r.float() * torch.linspace(-1, 1, r.numel(), device=r.device).view(r.shape)).sum()
                   for r in results if r.requires_grad)
        return [r.detach() for r in results] + list(torch.autograd.grad(loss, leaves))
    return compute


def _routing(device, dtype, generator):
    logits, bias = torch.randn(300, 24, generator=generator).to(device), torch.zeros(24, device=device)
    return _with_gradients(lambda l: routing.route(l, bias, 3, 4, 4, 2), logits)


def _router(device, dtype, generator):
    x, weight = (torch.randn(*shape, generator=generator).to(device) for shape in ((200, 64), (24, 64)))
    return _with_gradients(lambda x, weight: [routing.router_logits(x, weight)], x.to(dtype), weight)


def _experts(device, dtype, generator):
    x, gate_up, down = (torch.randn(*shape, generator=generator).to(device, dtype) / 4
                        for shape in ((300, 64), (8, 96, 64), (8, 64, 48)))
    weights = torch.rand(300, 3, generator=generator).to(device)
    chosen = torch.rand(300, 7, generator=generator).argsort(1)[:, :3].to(device)  # the last expert stays empty

    def compute(x, weights, gate_up, down):
        return [experts.experts(x, weights, *routing.sort_by_expert(chosen, 8), gate_up, down)]
    return _with_gradients(compute, x, weights, gate_up, down)


def _sum_of_rows(device, dtype, generator):
    rows = torch.randn(40, 64, generator=generator).to(device, dtype)
    places = torch.randint(0, 50, (30, 4), generator=generator).to(device)[:, :3]  # some beyond the end, as dispatch.py
    return lambda: [experts.sum_rows(rows, places)]


def _attention(device, dtype, generator):
    q, k, v = (torch.randn(2, 3, 200, width, generator=generator).to(device, dtype) for width in (96, 96, 64))
    starts = (torch.arange(200, device=device, dtype=torch.int32) // 70 * 70).expand(2, 200).contiguous()

    def compute(q, k, v):
        return [*attention.causal_attention(q, k, v, 0.1), attention.max_logit(q.detach(), k.detach(), 0.1),
                *attention.causal_attention(q, k, v, 0.1, starts)]
    return _with_gradients(compute, q, k, v)


def _decoding(device, dtype, generator):
    q, cache = (torch.randn(*shape, 80, generator=generator).to(device, dtype) for shape in ((2, 4), (2, 100)))
    return lambda: [attention.latent_decode(q, cache, 0.1, 64)]


def _cross_entropy(device, dtype, generator):
    hidden, weight = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((100, 32), (777, 32)))
    targets = torch.randint(0, 777, (100,), generator=generator).to(device)
    return _with_gradients(lambda h, w: [cross_entropy.linear_cross_entropy(h, w, targets)], hidden, weight)


def _newton_schulz(device, dtype, generator):
    G = torch.randn(2, 320, 256, generator=generator).to(device, dtype)
    return lambda: [newton_schulz.newton_schulz(G)]


CASES = {"router": _router, "routing": _routing, "experts": _experts, "sum of rows": _sum_of_rows,
         "attention": _attention, "decoding": _decoding, "cross-entropy": _cross_entropy,
         "Newton-Schulz": _newton_schulz}

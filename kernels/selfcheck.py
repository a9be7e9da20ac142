"""What a run asks of a machine before it starts. Are the kernels right: one small comparison of each with its twin,
values and gradients. Which is the fastest where libraries compete with them: attention, and the experts' matmuls.
Next: backend.py, ../tests/test_triton_*.py.
"""

import warnings
from importlib.util import find_spec

import torch

from errors import UserError, progress, said
from kernels import (
    ahead,
    attention,
    backend,
    cross_entropy,
    expert_tiles,
    experts,
    momentum,
    newton_schulz,
    routing,
    tuning,
)

PATIENCE = 120  # seconds for processes that compile
COMPILE = "kernels.triton_ahead:compile_in_turn"


def use(choice, device, dtype, again=True):
    """Decide for this process: "torch", "triton", or "auto", which is Triton on CUDA if a short check against the twins
    passes (or has passed on this machine, if it need not be made again), and the twins elsewhere. Returns whether
    Triton's kernels will run."""
    backend.decide(False)
    possible = find_spec("triton") is not None and (device.type == "cuda" or backend.INTERPRETED)
    if choice == "triton":
        if not possible:
            raise UserError("kernels='triton' needs Triton and a CUDA device, or TRITON_INTERPRET=1 on a CPU "
                            "(slow, for tests); use kernels='auto'")
        if backend.INTERPRETED and dtype != torch.float32:
            raise UserError("Triton's interpreter computes matmuls of 16-bit numbers wrongly: use --dtype=float32")
        return backend.decide(True)
    passed = f"checked {dtype}"
    if choice == "torch" or not possible or device.type != "cuda":
        return False
    if not again and tuning.recall(device, passed) is True:
        return backend.decide(True)
    if found := failures(device, dtype):
        warnings.warn("Triton kernels failed their check, PyTorch runs instead: " + "; ".join(found), stacklevel=2)
        return False
    tuning.remember(device, {passed: True})
    return backend.decide(True)


def failures(device, dtype):
    """What went wrong, one line a kernel; empty if Triton's results are the twins' up to rounding."""
    found = []
    for name, case in progress("checking kernels", unit=" kernels", over=CASES.items()):
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


def sizes(config, rows):
    """What choose_arm wants to know of a micro-batch of `rows` sequences; what choose_products does, None without
    experts."""
    dtype, width = getattr(torch, config.dtype), config.v_head_dim
    if config.attention == "mla":
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
    routed = (rows * config.sequence_length, config.num_experts_per_tok, config.n_routed_experts // config.ep,
              config.hidden_size, config.moe_intermediate_size, dtype) if config.n_routed_experts else None
    return ((rows, config.num_attention_heads, config.sequence_length, width), config.v_head_dim, dtype), routed


def _name(config, rows, on):
    """Of the choices for these sizes, in what tuning.py remembers."""
    attending, routed = sizes(config, rows)
    return f"choices {attending} {routed}{' documents' * config.document_mask}{' without Triton' * (not on)}" + (
        " default tiles" * (config.kernels_tuning == "off"))


def compile_ahead(config, rows, device, wait=False):
    """Let other processes compile what the check, the search for tiles and a run of these sizes will launch, unless
    what would be measured is remembered: it was compiled then. wait: until they have, those of an earlier call too."""
    if device.type != "cuda" or config.kernels == "torch" or not find_spec("triton") or backend.INTERPRETED:
        return
    ((_, H, T, Q), V, dtype), routed = sizes(config, rows)
    how, N, vocab = config.kernels_tuning, rows * T, config.vocab_size
    known = f"checked {dtype}", _name(config, rows, True)
    if how == "full" or not all(tuning.recall(device, name) for name in known):
        chunk = cross_entropy.chunk_rows(N, vocab, dtype.itemsize, "cuda")
        calls = [["loss_of_chunk", chunk, vocab]]
        if not config.document_mask:
            calls += [["maxima", rows, T, H, Q]]
        if "triton" not in attention.last_resorts(device, config.document_mask, how):
            calls += [["attend", rows, T, H, Q, V, config.document_mask]]
        if routed:
            _, K, E, D, F, _ = routed
            calls += [["experts", N, D, F, E, K],
                      ["route_and_sort", T, rows, config.n_routed_experts, K, config.n_group, config.topk_group]]
        ahead.start("kernels", COMPILE, [[CHECKED + calls, config.dtype]] * ahead.workers(), device)
        if routed and how != "off":
            tiles = tuning.tiles_to_try(routed, how)
            turns = [{kernel: tried[i] for kernel, tried in tiles.items() if i < len(tried)}
                     for i in range(1, max(map(len, tiles.values())))]
            calls = [["with_tiles", turn, N, D, F, E, K] for turn in turns]
            ahead.start("tiles", COMPILE, [[calls, config.dtype, 10]] * ahead.workers(), device)
    if wait:
        ahead.finish("kernels", PATIENCE)
    elif config.compile is not False:
        ahead.wake_inductor()


def fastest(config, rows, device):
    """What computes attention and the experts' matmuls fastest at the sizes of one micro-batch of `rows` sequences, and
    with which tiles: as remembered, or measured now. Returns lines to print and the choices in plain values, which
    every rank then has to `adopt`."""
    attending, routed = sizes(config, rows)
    on, cuda = backend.triton_runs(torch.empty(0, dtype=attending[2], device=device)), device.type == "cuda"
    name = _name(config, rows, on)
    if cuda and config.kernels_tuning != "full" and (choices := tuning.recall(device, name)):
        try:
            adopt(choices)
            return [], choices
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            print(f"kernels: what {tuning.path()} says of this run makes no sense ({said(error)}): measured again")
    lines = [attention.choose_arm(*attending, device, config.document_mask, config.kernels_tuning)]
    library = None
    expert_tiles.TILES.clear()
    if routed and on:
        from kernels import triton_experts
        triton_experts.LIBRARY.clear()
        if cuda and config.kernels_tuning != "off":
            ahead.finish("tiles", tuning.SECONDS[config.kernels_tuning] / 2)
            lines.append(tuning.choose_tiles(routed, device, config.kernels_tuning))
        lines.append(triton_experts.choose_products(*routed, device))
        library = sorted(triton_experts.LIBRARY)
    choices = {"attention": list(attention.ARM.items()), "tiles": list(expert_tiles.TILES.items()), "library": library}
    if cuda:  # what a run says of its memory should not include this
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        tuning.remember(device, {name: choices})
    return lines, choices


def adopt(choices):
    """Take the choices that `fastest` made, perhaps on another rank or another day. What still compiles for a choice
    is no longer needed."""
    ahead.finish("tiles", 0)
    attention.ARM = {tuple(key): name for key, name in choices["attention"] if name is None or attention.ARMS[name]}
    expert_tiles.TILES.clear()
    for key, (block_m, block_n, block_k, warps, stages) in choices["tiles"]:
        expert_tiles.TILES[tuple(key)] = block_m, block_n, block_k, warps, stages
    if choices["library"] is not None:
        from kernels import triton_experts
        triton_experts.LIBRARY = set(choices["library"])


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
    return _with_gradients(lambda l: routing.route(l, bias, 3, 2, 2, 1), logits)


def _router(device, dtype, generator):
    x, weight = (torch.randn(*shape, generator=generator).to(device) for shape in ((200, 64), (24, 64)))
    return _with_gradients(lambda x, weight: [routing.router_logits(x, weight)], x.to(dtype), weight)


def _experts(device, dtype, generator):
    x, gate_up, down = (torch.randn(*shape, generator=generator).to(device) / 4
                        for shape in ((300, 64), (8, 96, 64), (8, 64, 48)))  # the matrices in fp32, as a run has them
    weights = torch.rand(300, 3, generator=generator).to(device)
    chosen = torch.rand(300, 7, generator=generator).argsort(1)[:, :3].to(device)  # the last expert stays empty

    def compute():  # twice: Triton's gradients of the matrices go into what NaN stands in, then they are added to it
        leaves = [tensor.clone().requires_grad_() for tensor in (x.to(dtype), weights, gate_up, down)]
        grads = [torch.full_like(matrix, torch.nan) for matrix in leaves[2:]]
        for begun in (0.0, 1.0):
            into = (*grads, torch.tensor(begun, device=device)) if backend.triton_runs(leaves[0]) else None
            y = experts.experts(*leaves[:2], *routing.sort_by_expert(chosen, 8), *leaves[2:], into=into)
            (y.float() * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves[:2]), *(grads if into else (m.grad for m in leaves[2:]))]
    return compute


def _sum_of_rows(device, dtype, generator):
    rows = torch.randn(40, 64, generator=generator).to(device, dtype)
    places = torch.randint(0, 50, (30, 4), generator=generator).to(device)[:, :3]  # some beyond the end, as dispatch.py
    return lambda: [experts.sum_rows(rows, places)]


def _maximum(device, dtype, generator):
    """Of attention the rest is checked, arm by arm, where it is chosen."""
    q, k = (torch.randn(2, 3, 200, 96, generator=generator).to(device, dtype) for _ in range(2))
    hidden = torch.full((200, 200), float("-inf"), device=device).triu(1)
    lse = (0.1 * q.float() @ k.float().mT + hidden).logsumexp(3)
    return lambda: [attention.max_logit(q, k, 0.1), attention.max_logit(q, k, 0.1, None, lse)]


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


def _momentum(device, dtype, generator):
    moving, grad, part = (torch.randn(20, 70, generator=generator).to(device) for _ in range(3))
    noise = (torch.arange(20) % 7 == 0).to(device)

    def compute():
        moved, updated = moving.clone(), part.clone()
        ahead, = momentum.directions([moved], [grad.clone()], [noise], 0.95, True, dtype)
        momentum.update_(updated, ahead, torch.tensor(0.1, device=device), 0.1, 0.7)
        return [moved, ahead, updated]
    return compute


CASES = {"router": _router, "routing": _routing, "experts": _experts, "sum of rows": _sum_of_rows,
         "maximum": _maximum, "decoding": _decoding, "cross-entropy": _cross_entropy,
         "Newton-Schulz": _newton_schulz, "momentum": _momentum}

# What the cases launch, as ahead.py lists it.
CHECKED = [["route_and_sort", 100, 3, 24, 2, 2, 1], ["route_and_sort", 300, 1, 8, 3], ["experts", 300, 64, 48, 8, 3],
           ["maxima", 2, 200, 3, 96], ["decode", 2, 4, 100, 64, 16],
           ["loss_of_chunk", 100, 777], ["products", 2, 256, 320], ["steps", 20, 70]]

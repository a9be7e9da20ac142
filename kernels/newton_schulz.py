"""Newton-Schulz orthogonalisation, Muon's core: push every singular value of a matrix towards 1 by matmuls alone.

Each step is X <- aX + b(XX^T)X + c(XX^T)^2 X with the coefficients of that step. The tables are Jordan's fixed quintic
(the default), YouJiacheng's five-step schedule, and Polar Express (arXiv 2505.16932).

A step has two twins. PyTorch's is three matmuls. Triton's computes one half of the two products that are symmetric, and
puts a on the diagonal of the second one: X <- (aI + bG + cG^2) X. That is as accurate (in bf16 9e-3 to 13e-3 against
10e-3 to 12e-3, from float64, Gaussians), and the last product, cuBLAS's, then has no addend: baddbmm would first copy X
into its result and then read it again, half of all traffic where the short side is 256.

Where a matrix is at least twice as long as it is wide, a CPU never touches the long side between the first product and
the last of three steps: each is a polynomial of G = XX^T times X, and the polynomials commute (_steps_of_grams).

Shapes: B matrices, M their short side, K their long one. Next: triton_newton_schulz.py, ../muon.py.
"""

import torch

from kernels import backend, graphs

COEFFICIENTS = {
    "jordan": [(3.4445, -4.7750, 2.0315)],
    "you": [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012)],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)],
}
SAFETY = {"jordan": 1.0, "you": 1.02, "polar_express": 1.02}  # extra norm: these tables diverge above 1, bf16 rounds

# Below, a 128-wide tile is mostly padding. From here on what decides is traffic (up to a short side of about 512) and
# then arithmetic, and Triton has less of both. By count, not measured: bench/newton_schulz.py shows both at every size.
SMALLEST_M = 128
AT_ONCE = 3  # steps on a CPU from one Gram matrix: as accurate as one by one (tests: 1e-4 up to a condition of 1e6)
LARGEST_OF_ONE_PROGRAM = 2**21  # elements that one program normalises: a few hundred microseconds

# Graphs pay where a batch takes the GPU less time than Python needs to launch its 40 kernels: up to about owners.py's
# bucket. Each holds its input and output (at most 8 bytes an element), and all share the memory of what is between.
REPLAY_ELEMENTS = 2**24
REPLAY_ELEMENTS_IN_ALL = 2**26
REPLAY_GRAPHS = 64
_graphs = {}  # what decides about the work -> (graph, its input, its output)


def symmetric_product_twin(X_BMK, A_BMM=None, alpha=1.0, beta=0.0, gamma=0.0):
    """The slow twin: alpha X X^T + beta A + gamma I of every matrix, A symmetric or None."""
    product_BMM = torch.bmm(X_BMK, X_BMK.mT) * alpha if A_BMM is None else \
        torch.baddbmm(A_BMM, X_BMK, X_BMK.mT, beta=beta, alpha=alpha)
    return product_BMM + gamma * torch.eye(X_BMK.shape[1], dtype=X_BMK.dtype, device=X_BMK.device)


@torch.library.custom_op("nanok2::symmetric_product", mutates_args=())
def _symmetric_product(X_BMK: torch.Tensor, A_BMM: torch.Tensor | None, alpha: float, beta: float,
                       gamma: float) -> torch.Tensor:
    from kernels import triton_newton_schulz
    return triton_newton_schulz.symmetric_product(X_BMK, A_BMM, alpha, beta, gamma)


@_symmetric_product.register_fake
def _(X_BMK, A_BMM, alpha, beta, gamma):
    return X_BMK.new_empty(X_BMK.shape[0], X_BMK.shape[1], X_BMK.shape[1])


def symmetric_product(X_BMK, A_BMM=None, alpha=1.0, beta=0.0, gamma=0.0):
    """alpha X X^T + beta A + gamma I of every matrix: (B, M, M) in X's dtype. A, if any, is symmetric, and then alpha
    is not 0. X may be a transposed view. Triton's result is exactly symmetric and the same in any batch."""
    product = _symmetric_product if backend.triton_runs(X_BMK) else symmetric_product_twin
    return product(X_BMK, A_BMM, alpha, beta, gamma)


def _step_torch(X_BMK, a, b, c):
    gram_BMM = torch.bmm(X_BMK, X_BMK.mT)
    gram_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
    return torch.baddbmm(X_BMK, gram_BMM, X_BMK, beta=a)


def _step_triton(X_BMK, a, b, c):
    gram_BMM = symmetric_product(X_BMK)
    return torch.bmm(symmetric_product(gram_BMM, gram_BMM, alpha=c, beta=b, gamma=a), X_BMK)


def _steps_of_grams(X_BMK, rows):
    """The steps of all rows (a, b, c), in fp32 or wider: with P = aI + bG + cG^2 a step makes PX of X and PGP of G, so
    that X is multiplied once, by the product of all P. Every AT_ONCE steps G is made anew, or its rounding would grow
    with the smallest singular values. Five steps are 14 products of M x M x M and 4 of M x M x K, not 5 and 10."""
    for start in range(0, len(rows), AT_ONCE):
        part, gram_BMM, product_BMM = rows[start:start + AT_ONCE], torch.bmm(X_BMK, X_BMK.mT), None
        for step, (a, b, c) in enumerate(part, 1):
            P_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
            P_BMM.diagonal(dim1=1, dim2=2).add_(a)
            product_BMM = P_BMM if product_BMM is None else torch.bmm(P_BMM, product_BMM)
            if step < len(part):
                gram_BMM = torch.bmm(P_BMM, torch.bmm(P_BMM, gram_BMM))
        X_BMK = torch.bmm(product_BMM, X_BMK)
    return X_BMK


def triton_pays(X_BMK):
    """Whether Triton's step is expected to be the faster one. In fp32 its dot is made of plain FMAs and reaches less
    than half of cuBLAS's speed, which is all that half the arithmetic could save."""
    _, M, K = X_BMK.shape
    return backend.INTERPRETED or (X_BMK.dtype.itemsize == 2 and M >= SMALLEST_M and M % 16 == K % 16 == 0)


def normalised_twin(G, dtype, safety):
    """The slow twin of normalised."""
    wide = torch.float64 if G.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(wide).tiny
    if G.device.type == "cpu":  # where vector_norm takes twenty times as long
        peak = G.abs().amax(dim=(-2, -1), keepdim=True).to(wide)
    else:
        peak = torch.linalg.vector_norm(G, float("inf"), dim=(-2, -1), keepdim=True, dtype=wide)
    X = G / peak.clamp(min=tiny)  # in `wide`; or the squares of an idle expert underflow
    norm = (safety * X.norm(dim=(-2, -1), keepdim=True)).clamp(min=tiny)
    return torch.div(X, norm, out=torch.empty_like(X, dtype=dtype))  # rounds without another pass


def normalised(G, dtype, safety):
    """Every matrix over safety times its Frobenius norm, in dtype; a zero matrix stays zero. Triton reads twice and
    writes once, a program a matrix; one that is too large for that has the twin."""
    if backend.triton_runs(G) and 0 < G.shape[-2:].numel() <= LARGEST_OF_ONE_PROGRAM:
        from kernels import triton_newton_schulz
        return triton_newton_schulz.normalised(G.contiguous(), dtype, safety)
    return normalised_twin(G, dtype, safety)


def newton_schulz(G, steps=5, dtype=None, coefficients="jordan"):
    """Orthogonalise the last two dimensions of G; leading dimensions are a batch of independent matrices.

    dtype is the compute type (default: G's own). The Frobenius norm is taken in at least fp32 and clamped, so that a
    zero matrix stays zero and the result does not depend on the scale of G. After the table's end its last row
    repeats.
    """
    table = COEFFICIENTS[coefficients]
    X = normalised(G, dtype or G.dtype, SAFETY[coefficients])
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT  # the Gram matrix is then of the short side
    shape, X = X.shape, X.reshape(-1, *X.shape[-2:])
    rows = [table[min(step, len(table) - 1)] for step in range(steps)]
    on_triton = backend.triton_runs(X) and triton_pays(X)
    if rows and not on_triton and X.device.type == "cpu" and X.dtype.itemsize >= 4 and X.shape[2] >= 2 * X.shape[1]:
        X = _steps_of_grams(X, rows)
    else:
        for row in rows:
            X = (_step_triton if on_triton else _step_torch)(X, *row)
    X = X.reshape(shape)
    return X.mT if tall else X


def newton_schulz_replayed(G, **options):
    """newton_schulz(G, **options), on CUDA as the replay of a graph that is captured the first time that a batch of
    this shape comes: one launch instead of some 40. Elsewhere, for large batches (whose kernels take longer than their
    launches) and once the graphs' room is spent it is newton_schulz itself.

    The result is a copy: all graphs share their working memory, so that another's replay may overwrite what this one
    left there. For the same reason all calls must be on one stream.
    """
    if not G.is_cuda or torch.cuda.is_current_stream_capturing():
        return newton_schulz(G, **options)
    key = G.shape, G.dtype, G.device, backend.triton_runs(G), *sorted(options.items())
    if key not in _graphs:
        room = REPLAY_ELEMENTS_IN_ALL - sum(held.numel() for _, held, _ in _graphs.values())
        if not 0 < G.numel() <= min(REPLAY_ELEMENTS, room) or len(_graphs) == REPLAY_GRAPHS:
            return newton_schulz(G, **options)
        _graphs[key] = _capture(G, options)
    graph, held, result = _graphs[key]
    held.copy_(G)
    graph.replay()
    return result.clone()


def _capture(G, options):
    """(graph of newton_schulz, the tensor that it reads, the tensor that it writes)."""
    held = G.clone(memory_format=torch.contiguous_format)
    graphs.aside(lambda: newton_schulz(held, **options))
    pool = next(iter(_graphs.values()))[0].pool() if _graphs else None
    graph, result = graphs.capture(lambda: newton_schulz(held, **options), pool)
    return graph, held, result

"""Newton-Schulz orthogonalisation, Muon's core: push every singular value of a matrix towards 1 by matmuls alone.

Each step is X <- aX + b(XX^T)X + c(XX^T)^2 X with the coefficients of that step. The tables are Jordan's fixed quintic
(the default), YouJiacheng's five-step schedule, and Polar Express (arXiv 2505.16932). Next: ../muon.py.
"""

import torch

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


def newton_schulz(G, steps=5, dtype=None, coefficients="jordan"):
    """Orthogonalise the last two dimensions of G; leading dimensions are a batch of independent matrices.

    dtype is the compute type (default: G's own). The Frobenius norm is taken in at least fp32 and clamped, so that a
    zero matrix stays zero and the result does not depend on the scale of G. After the table's end its last row
    repeats.
    """
    table = COEFFICIENTS[coefficients]
    X = G if G.dtype == torch.float64 else G.float()
    tiny = torch.finfo(X.dtype).tiny
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)  # or the squares of an idle expert underflow
    X = X / (SAFETY[coefficients] * X.norm(dim=(-2, -1), keepdim=True)).clamp(min=tiny)
    X = X.to(dtype or G.dtype)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT  # the Gram matrix is then of the short side
    shape, X = X.shape, X.reshape(-1, *X.shape[-2:])
    for step in range(steps):
        a, b, c = table[min(step, len(table) - 1)]
        gram = torch.bmm(X, X.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, gram, X, beta=a)
    X = X.reshape(shape)
    return X.mT if tall else X

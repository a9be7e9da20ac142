"""The compute kernels. NAME.py is what the rest calls: the plain PyTorch twin first, then the operator that wraps the
Triton kernels; those are in triton_NAME.py, which alone import triton. backend.py says which of the two run.

routing.py (which token goes to which expert) · experts.py (the expert MLPs) · attention.py (causal attention with the
maximum that QK-clip reads) · cross_entropy.py (the loss without whole logits) · newton_schulz.py (Muon's core).
"""

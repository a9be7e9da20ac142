"""The compute kernels, one file each: the plain PyTorch twin, and (from the next release on) the Triton kernel beside it.

routing.py (which token goes to which expert) · experts.py (the expert MLPs) · attention.py (causal attention with the
maximum that QK-clip reads) · cross_entropy.py (the loss without whole logits) · newton_schulz.py (Muon's core).
"""

"""The compute kernels, one file each. Here are the plain PyTorch twins; a Triton kernel goes beside its twin.

routing.py (which token goes to which expert) · experts.py (the expert MLPs) · attention.py (causal attention with the
maximum that QK-clip reads) · cross_entropy.py (the loss without whole logits) · newton_schulz.py (Muon's core).
"""

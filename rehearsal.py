"""What torch.compile will be asked in a run, asked before it, so that its cache answers. Next: kernels/ahead.py, which
starts the process, and train.py.
"""

import torch

import config as settings
import memory
import parallel
from kernels import backend
from kernels.selfcheck import sizes
from model import build, pick_device


def rehearse(values, dense):
    """In a process of its own, before a run: forward and backward of one block for a micro-batch, so that the caches of
    torch.compile hold it when the run compiles it. Only shapes count: weights and the results of our kernels are unset,
    and attention is guessed to be the arm that usually wins."""
    config = settings.Config(**values | {"num_hidden_layers": 1, "first_k_dense_replace": int(dense)})
    device, rows, dtype = pick_device(config.device), parallel.split_batch(config)[0], getattr(torch, config.dtype)
    if device.type == "cuda":
        from kernels import attention, triton_ahead
        triton_ahead.launch_nothing()
        key = attention.arm_key(*sizes(config, rows)[0], config.document_mask)
        attention.ARM[key] = "triton" if config.document_mask else "cudnn"
    model = build(config, device).train()
    model.compute_dtype, model.layers[0].recompute = dtype, config.activation_checkpointing
    if memory.keeps_copies(config, parallel.Layout(), device):
        model.make_copies()
    parallel.compile_blocks(model)
    tokens = torch.zeros(rows, config.sequence_length, dtype=torch.int64, device=device)
    with backend.running(device.type == "cuda"):
        sum(model(tokens, tokens, first_BT=tokens.int() if config.document_mask else None)).backward()

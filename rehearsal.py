"""What a run will ask of torch.compile, asked before it by a process of its own, so that the caches on disk answer.
Next: kernels/ahead.py, which starts that process, and train.py.
"""

import torch

import config as settings
import memory
import parallel
from kernels import backend, graphs
from kernels.selfcheck import pretend
from model import build, pick_device


def rehearse(values, dense):
    """One block forward and backward for a micro-batch of the config with these values. Only shapes count: weights and
    our kernels' results are unset."""
    config = settings.Config(**values | {"num_hidden_layers": 1, "first_k_dense_replace": int(dense)})
    device, rows = pick_device(config.device), parallel.split_batch(config)[0]
    if device.type == "cuda":
        pretend(config, rows)
    model = build(config, device).train()
    model.compute_dtype, model.layers[0].recompute = getattr(torch, config.dtype), config.activation_checkpointing
    if memory.keeps_copies(config, parallel.Layout(), device):
        model.make_copies()
    parallel.compile_blocks(model)
    tokens = torch.zeros(rows, config.sequence_length, dtype=torch.int64, device=device)
    with backend.running(device.type == "cuda"):
        if graphs.wanted(config, parallel.Layout(), device):
            model.keep_gradients()  # as MicroBatch does
        sum(model(tokens, tokens, first_BT=tokens.int() if config.document_mask else None)).backward()

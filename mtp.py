"""Multi-token prediction: what one more block is asked, how much its answer weighs, and what it is good for afterwards.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) trains a block behind the last one to predict the token after the next, from
what the model made of a position and the next token. It makes every position teach twice, and later it drafts: the
model confirms or corrects two tokens at once (section 2.2, "MTP in inference"; Leviathan et al., arXiv 2211.17192).
The block itself is MTPBlock in model.py.

Shapes: B batch, T positions, V vocabulary.
"""

import torch
import torch.nn.functional as F

from kernels.cross_entropy import IGNORE


def next_and_second(tokens_BT, targets_BT, first_BT=None):
    """(the token after each position, the one after that as a target or IGNORE) of a micro-batch: the last position has
    no second one. first_BT: with documents kept apart, none is predicted from another one: where the next token starts
    a document there is no second one either; to predict that start, the end of the text, is right."""
    last_B1 = targets_BT[:, -1:]
    next_BT = torch.cat((tokens_BT[:, 1:], last_B1.where(last_B1 != IGNORE, tokens_BT[:, -1:])), dim=1)
    second_BT = F.pad(targets_BT[:, 1:], (0, 1), value=IGNORE)
    if first_BT is not None:
        apart_BT = F.pad(first_BT[:, 1:] != first_BT[:, :-1], (0, 1))
        second_BT = second_BT.masked_fill(apart_BT, IGNORE)
    return next_BT, second_BT


def loss_weight(config, step, device):
    """The weight of the block's loss in step 1, 2, ..., as a tensor, which CUDA graphs read; None without the block.
    DeepSeek-V3 lowered it with the learning rate: 0.3 for 10 trillion tokens, 0.1 for the last 4.8 (section 4.2). Here
    mtp_decay_loss_weight holds in the last decay_steps, those of wsd's decay, whatever the schedule."""
    if not config.mtp_depth:
        return None
    decay_steps = config.max_steps // 5 if config.decay_steps is None else config.decay_steps
    late = step > config.max_steps - decay_steps
    return torch.tensor(config.mtp_decay_loss_weight if late else config.mtp_loss_weight, device=device)

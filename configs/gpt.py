"""The dense baseline from the same files: 12 x 768, plain multi-head attention, SwiGLU MLPs, AdamW; the GPT-2-124M
class.

    python -m data.prepare text MY_TEXTS/ --tokenizer=gpt2 --out=data/mine
    python train.py configs/gpt.py --data=data/mine

Hardware: one GPU of 24 GB or more.
Time: not measured yet. 10,000 steps are 5.2B tokens.
Memory: 124M parameters x 16 bytes (fp32 weight, gradient, two moments) = 1.8 GiB, and activations.
Expect: not measured yet.
"""

from configs.small import *  # noqa: F403  (data, batch and length are those of small, so that the two compare)

attention = "mha"
num_attention_heads = 12
v_head_dim = 64             # the width of the heads
n_routed_experts = 0        # every layer dense
intermediate_size = 2048    # SwiGLU: three matrices, so two thirds of 4 x 768
tie_word_embeddings = True
optimizer = "adamw"
muon_lr = 6e-4              # AdamW's rate, too: adamw_lr is None

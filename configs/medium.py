"""A billion parameters: 16 x 1024, 48 experts of width 384, 7 + 1 shared active.

    python -m data.prepare text MY_TEXTS/ --tokenizer=gpt2 --out=data/mine
    python train.py configs/medium.py --data=data/mine

Hardware: one 80 GB GPU or more.
Time: not measured yet. 20,000 steps are 21B tokens; at 1.84 GFLOPs a token 3.9e19 FLOPs.
Memory: 1.04B parameters x 12 bytes (fp32 weight, gradient, momentum) = 11.7 GiB, and activations.
Expect: not measured yet.
Planned by docs/scaling.py, stages x replicas x shards, GiB a GPU, a step:
    1 x h100: 1 x 1 x 1, micro-batch 32: 53.6 GiB, 4.97 s
    8 x h100: 1 x 1 x 8, micro-batch 32: 39.7 GiB, 0.671 s
    64 x h100: 1 x 1 x 64, micro-batch 8: 11.5 GiB, 0.106 s
    512 x h100: 1 x 4 x 128, ep 2, micro-batch 1, full recomputed: 2.3 GiB, 0.0813 s
"""

from configs.small import *  # noqa: F403  (everything that is not set here is as in small)

hidden_size = 1024
intermediate_size = 3072
moe_intermediate_size = 384
num_hidden_layers = 16
num_attention_heads = 8
kv_lora_rank = 384
n_routed_experts = 48
max_position_embeddings = 2048

sequence_length = 2048
global_batch_size = 512     # 1.05M tokens
micro_batch_size = 16
max_steps = 20_000
warmup_steps = 500
decay_steps = 6000
muon_lr = 1.8e-3
save_interval = 2000

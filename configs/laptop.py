"""Worth an hour or two of a laptop: 6 layers x 256, 64 experts of width 64, 6 + 3 shared active, 16M tokens of Python.

    python -m data.prepare packages
    python train.py configs/laptop.py

Hardware: a laptop's CPU, fp32.
Time: 1.5 hours at the 2,890 tokens/s of 2 CPU cores (AMD EPYC, AVX2); 1,920 steps are 15.7M tokens, 5.9e14 FLOPs.
Memory: 2.7 GiB.
Expect: not measured yet; with half of its tokens validation loss 2.51, 1.15 bits per byte
(bench/results/2026-11-28-laptop.md).
"""

data = "data/packages"      # 90 MB, 29M tokens: less than one epoch
vocab_size = 4096
hidden_size = 256
intermediate_size = 1024    # the dense first layer
moe_intermediate_size = 64  # narrow: Newton-Schulz costs by the square of it
num_hidden_layers = 6
num_attention_heads = 4
kv_lora_rank = 128
qk_nope_head_dim = 64
qk_rope_head_dim = 32
v_head_dim = 64
n_routed_experts = 64
num_experts_per_tok = 6
n_shared_experts = 3
max_position_embeddings = 256

sequence_length = 256
global_batch_size = 32      # 8,192 tokens
micro_batch_size = 32
max_steps = 1920
warmup_steps = 80
decay_steps = 1080
bias_update_rate = 5e-3     # so few steps do not balance the load at 1e-3
muon_lr = 7e-3              # between debug.py's and small.py's: no sweep yet
muon_per_head = True
min_lr_ratio = 0.05
dtype = "float32"
eval_interval = 240
eval_batches = 24           # 197,000 tokens, a quarter of the validation split
save_interval = 480
sample_interval = 480

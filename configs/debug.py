"""A whole K2 in four minutes on a laptop: 4 layers x 128, 64 experts of width 32, 8 + 4 shared active.

    python -m data.prepare stdlib --vocab_size=2048
    python train.py configs/debug.py          # or all of it at once: bash launch/quickstart.sh

Hardware: 2 CPU cores, fp32.
Time: 225 s of training, 241 s with all of the quickstart but the install (AMD EPYC, 8,200 tokens/s).
Memory: 0.9 GiB.
Expect: validation loss 3.24 to 3.26, 1.58 bits per byte (on Python 3.11's library); at the end the busiest expert has
1.4 times the mean and none is dead.
"""

data = "data/stdlib"
vocab_size = 2048
hidden_size = 128
intermediate_size = 384     # the dense first layer
moe_intermediate_size = 32  # narrow: Newton-Schulz costs by the square of it
num_hidden_layers = 4
num_attention_heads = 4
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
n_routed_experts = 64
num_experts_per_tok = 8
n_shared_experts = 4
max_position_embeddings = 256

sequence_length = 256
global_batch_size = 16      # 4,096 tokens: at this size many steps are worth more than large ones
micro_batch_size = 16
max_steps = 450
warmup_steps = 20
decay_steps = 250
bias_update_rate = 1e-2     # so few steps do not balance the load at 1e-3
muon_lr = 1e-2              # 2e-2 is as good here, and worse for the dense twin (bench/results/2026-11-27-contest.md)
muon_per_head = True        # the loss falls by 0.025 at no cost (bench/results/2026-11-28-recipe.md)
min_lr_ratio = 0.05
dtype = "float32"           # at this width bfloat16 is no faster, AVX512-BF16 or not
eval_interval = 150         # a validation costs as much as eight steps
eval_batches = 21           # the whole validation split
save_interval = 150
sample_interval = 225       # of texts from the document start, whatever the data

"""Moonlight-16B-A3B (arXiv 2502.16982): 27 layers x 2048, 64 experts of width 1408, 6 + 2 shared active, Muon.

    torchrun --standalone --nproc_per_node=8 train.py configs/moonlight.py --data=...      # or with --ep=8

Hardware: at least 8 x 80 GB GPUs, sharded.
Time: not measured. The published run is 5.7T tokens.
Memory: 16.0B parameters x 12 bytes (fp32 weight, gradient, momentum) = 178 GiB over all ranks, and activations.
Expect: not measured. Sizes are checked: 15.96B in all, 2.91B active, both embeddings included; published as 16B / 3B.
Planned by docs/scaling.py, stages x replicas x shards, GiB a GPU, a step:
    8 x h100: 1 x 1 x 8, micro-batch 2: 69.4 GiB, 96.5 s
    64 x h100: 1 x 1 x 64, micro-batch 4, selective recomputed: 61.7 GiB, 11.9 s
    512 x h100: 1 x 2 x 256, micro-batch 4, selective recomputed: 60.6 GiB, 1.49 s
    2048 x h100: 1 x 32 x 64, ep 2, micro-batch 1: 29.0 GiB, 0.428 s
"""

data = "data/fineweb-k2"
vocab_size = 163840
hidden_size = 2048
intermediate_size = 11264
moe_intermediate_size = 1408
num_hidden_layers = 27
num_attention_heads = 16
q_lora_rank = None
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
n_routed_experts = 64
num_experts_per_tok = 6
n_shared_experts = 2
routed_scaling_factor = 2.446
rms_norm_eps = 1e-5
rope_theta = 50000.0
max_position_embeddings = 8192
aux_loss_alpha = 1e-3

sequence_length = 8192
global_batch_size = 2048    # 16.8M tokens, the published first stage
micro_batch_size = 1
max_steps = 340_000         # 5.7T tokens
warmup_steps = 2000
schedule = "cosine"
min_lr_ratio = 0.1
muon_lr = 4.2e-4
activation_checkpointing = "selective"
eval_batches = 1
save_interval = 1000

"""Kimi K2 (arXiv 2507.20534): 61 layers x 7168, 384 experts of width 2048, 8 + 1 shared active, MuonClip.

    NNODES=32 NODE_RANK=... MASTER_ADDR=... bash launch/multinode.sh configs/k2.py --ep=64 --data=...

Hardware: 256 x 141 GB GPUs or more (384 experts are no multiple of 256: some ranks hold one more than others).
Time: not measured. The published run is 15.5T tokens at 205 GFLOPs each, 3.2e24 FLOPs.
Memory: 1.026T parameters x 12 bytes (fp32 weight, gradient, momentum) = 11.2 TiB over all ranks, and activations.
Expect: not measured. Sizes are checked: 1.026T in all, 32.9B active, both embeddings included; published as 1.04T /
32.6B.

Pre-training is at 4,096 tokens without YaRN; the published config.json adds YaRN (factor 32) for 128k afterwards.
Planned by docs/scaling.py, stages x replicas x shards, GiB a GPU, a step:
    512 x h200: 1 x 1 x 512, ep 4, micro-batch 8, full recomputed: 108.3 GiB, 135 s
    2048 x h200: 16 x 1 x 128, ep 8, micro-batch 1, selective recomputed: 115.7 GiB, 22.7 s
"""

data = "data/fineweb-k2"
vocab_size = 163840
hidden_size = 7168
intermediate_size = 18432
moe_intermediate_size = 2048
num_hidden_layers = 61
num_attention_heads = 64
q_lora_rank = 1536
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
n_routed_experts = 384
num_experts_per_tok = 8
n_shared_experts = 1
routed_scaling_factor = 2.827
first_k_dense_replace = 1
rms_norm_eps = 1e-6
rope_theta = 50000.0
max_position_embeddings = 4096
aux_loss_alpha = 1e-3

sequence_length = 4096
global_batch_size = 16384   # 67.1M tokens
micro_batch_size = 1
max_steps = 231_000         # 15.5T tokens
warmup_steps = 500
decay_steps = 82_000        # 5.5T tokens; the report's decay is a cosine
min_lr_ratio = 0.1
muon_lr = 2e-4
qk_clip_tau = 100.0
activation_checkpointing = "full"
eval_batches = 1
save_interval = 500

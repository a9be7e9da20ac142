"""The GPT-2-124M class as a mixture of experts: 12 x 768, 64 experts of width 256, 7 + 1 shared active.

    python -m data.prepare text MY_TEXTS/ --tokenizer=gpt2 --out=data/mine
    python train.py configs/small.py --data=data/mine

Hardware: one 80 GB GPU.
Time: 10,000 steps are 5.2B tokens, 4.2e18 FLOPs: 3.4 hours at the 423,000 tokens/s that bench.step gave on an H100.
Memory: 17.4 GiB there: 530M parameters x 12 bytes (fp32 weight, gradient, momentum) = 5.9 GiB, and activations.
Expect: not measured yet.
Planned by docs/scaling.py, stages x replicas x shards, GiB a GPU, a step:
    1 x h100: 1 x 1 x 1, micro-batch 64: 30.0 GiB, 1.17 s
    8 x h100: 1 x 1 x 8, micro-batch 64: 22.4 GiB, 0.167 s
    64 x h100: 1 x 1 x 64, ep 8, micro-batch 8: 5.7 GiB, 0.0609 s
    512 x h100: 1 x 2 x 256, ep 4, micro-batch 1: 2.1 GiB, 0.0607 s
"""

data = "data/fineweb"
vocab_size = 50304          # GPT-2's 50,257, padded to a multiple of 64
hidden_size = 768
intermediate_size = 2048    # the dense first layer
moe_intermediate_size = 256
num_hidden_layers = 12
num_attention_heads = 6     # of K2's own widths
kv_lora_rank = 256
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
n_routed_experts = 64
num_experts_per_tok = 7
n_shared_experts = 1
max_position_embeddings = 1024

sequence_length = 1024
global_batch_size = 512     # 0.5M tokens
micro_batch_size = 32
max_steps = 10_000
warmup_steps = 200
decay_steps = 3000
muon_lr = 2e-3              # between Kimi Linear's 2.0e-3 for 0.65B active parameters and what smaller ones bear
min_lr_ratio = 0.1
eval_interval = 250
eval_batches = 20           # 10.5M tokens
save_interval = 1000
sample_interval = 1000

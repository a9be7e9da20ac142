"""The model against transformers' DeepseekV3ForCausalLM, and the leaks that other projects have."""

import collections
import json
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import hf
from counting import count_parameters, flops_per_token
from kernels import attention, backend
from kernels.cross_entropy import IGNORE
from mla import rope_tables
from model import ModelConfig, build, keep_matmuls
from tests.helpers import tiny_config, tiny_model, tokens

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CASES = {
    "no query compression": {},
    "query compression": {"q_lora_rank": 24},
    "groups": {"n_group": 4, "topk_group": 2},
    "yarn": {"rope_scaling": YARN},
    "yarn 32/1, partial mscale": {"rope_scaling": {**YARN, "beta_fast": 32, "mscale": 0.7}},
    "two dense layers": {"first_k_dense_replace": 2},
    "all dense": {"n_routed_experts": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "two shared experts, weights not normalised": {
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
    },
}


def as_transformers(model, dtype="float32"):
    """The same model in transformers, by its config and our tensors in its on-disk names."""
    config = DeepseekV3Config(**hf.to_hf_config(model.config, None, dtype))
    other = DeepseekV3ForCausalLM(config).eval()
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():  # in memory the experts are stacked on both sides
        theirs[name].copy_(tensor)
    assert set(theirs) == set(model.state_dict())
    return other


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    model = tiny_model(**CASES[case]).eval()
    x = tokens(3, 48)
    with torch.no_grad():
        theirs = as_transformers(model)(x).logits
        ours = model(x)
    assert ours.dtype == torch.float32 and ours.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4


def test_gradients_equal_transformers():
    model = tiny_model(q_lora_rank=24, n_group=2, topk_group=1)
    other = as_transformers(model)
    x = tokens(3, 40)
    loss, _ = model(x[:, :-1], x[:, 1:])
    (loss / x[:, 1:].numel()).backward()
    other(x, labels=x).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference <= 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize(
    "changes",
    [{"q_lora_rank": 24, "n_group": 2, "topk_group": 1}, {"rope_scaling": YARN}, {"tie_word_embeddings": True}],
)
def test_reverse_import_of_a_transformers_save(tmp_path, changes):
    torch.manual_seed(0)
    config = DeepseekV3Config(**hf.to_hf_config(tiny_config(**changes), None, "float32") | {"initializer_range": 0.2})
    other = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in other.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    other.save_pretrained(tmp_path / "hf", max_shard_size="100KB")  # several files and an index
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    model, x = hf.load_model(tmp_path / "hf").eval(), tokens(2, 40)
    with torch.no_grad():
        assert (model(x) - other(x).logits).abs().max() <= 1e-4


def test_exported_directory_loads_in_transformers(tmp_path):
    from safetensors.torch import save_file

    model, x = tiny_model(q_lora_rank=24).eval(), tokens(2, 40)
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, None, "float32")))
    save_file(dict(hf.to_hf_tensors(model, torch.float32)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (model(x) - other(x).logits).abs().max() <= 1e-4
        assert torch.equal(hf.load_model(tmp_path).eval()(x), model(x))


# ---------------------------------------------------------------------- leaks


def trained_a_little(**changes):
    """Leaks that hide at initialisation grow with training, so the leak tests look after some steps, too."""
    model = tiny_model(**changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(15):
        x = tokens(4, 33, seed=step)
        loss, balance = model(x[:, :-1], x[:, 1:])
        (loss / x[:, 1:].numel() + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_no_logit_sees_a_later_token_or_another_sequence(attention):
    model = trained_a_little(attention=attention)
    x = tokens(3, 40)
    with torch.no_grad():
        before = model(x)
        for t in (1, 17, 39):
            changed = x.clone()
            changed[:, t] = (changed[:, t] + 1) % 97
            after = model(changed)
            assert (after - before)[:, :t].abs().max() <= 1e-5
            assert (after - before)[:, t].abs().max() > 1e-3  # and the token itself is seen
        other = x.clone()
        other[1:] = tokens(2, 40, seed=9)
        assert (model(other) - before)[0].abs().max() <= 1e-5


def test_loss_is_that_of_the_next_token():
    model, x = tiny_model(), tokens(2, 21)
    logits = model(x[:, :-1])
    by_hand = -sum(logits[b, t].log_softmax(-1)[x[b, t + 1]] for b in range(2) for t in range(20))
    loss, _ = model(x[:, :-1], x[:, 1:])
    assert torch.allclose(loss, by_hand, rtol=1e-5)


def test_ignored_targets_leave_no_trace():
    model, x = tiny_model(), tokens(2, 21)
    targets = x[:, 1:].clone()
    targets[:, 10:] = IGNORE
    padded, _ = model(x[:, :-1], targets)
    short, _ = model(x[:, :10], x[:, 1:11])
    assert torch.allclose(padded, short, rtol=1e-5)


def test_a_counting_sequence_is_learnt_and_generated():
    model = tiny_model(vocab_size=16, first_k_dense_replace=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = (torch.arange(33)[None] + torch.arange(16)[:, None]) % 16
    for _ in range(120):
        loss, _ = model(x[:, :-1], x[:, 1:])
        (loss / x[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss / x[:, 1:].numel() < 0.05
    text = torch.stack(list(model.generate(x[:4, :5], 10, temperature=0)), dim=1)
    assert torch.equal(text, x[:4, 5:15])


# ---------------------------------------------------------------------- statistics, checkpointing, initialisation


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(mode):
    results = []
    for setting in ("none", mode):
        model = tiny_model()
        x = tokens(3, 33)
        for layer in model.layers:
            layer.recompute = setting
        loss, balance = model(x[:, :-1], x[:, 1:])
        (loss + balance).backward()
        results.append((loss, model.routing.expert_counts, model.max_logits, [p.grad for p in model.parameters()]))
    (loss, counts, maxima, grads), (loss2, counts2, maxima2, grads2) = results
    assert torch.equal(loss, loss2) and torch.equal(counts, counts2) and torch.equal(maxima, maxima2)
    assert counts.sum() == 2 * 3 * 32 * 2  # MoE layers x tokens x choices, not doubled by the recompute
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, grads2))


# What a selective block may compute again: pointwise work, sums over a row, copies and views. Nothing else.
CHEAP = set("""
    __lshift__ __rshift__ _fused_rms_norm _safe_softmax _softmax _to_copy _unsafe_view abs add add_ alias amax arange
    as_strided_scatter bitwise_and bitwise_or bitwise_xor cat clamp clone constant_pad_nd copy_ cumsum cumsum_ detach
    div empty_like eq expand eye fill_ floor_divide full gather ge gt index index_put_ index_select item le log lt
    isnan masked_fill maximum mean mul mul_ ne neg new_empty new_zeros ones ones_like permute pow reshape rsqrt rsub
    scalar_tensor scatter_ scatter_add scatter_add_ select sigmoid silu slice split split_with_sizes squeeze stack sub
    sum t to transpose tril triu_ unbind unsqueeze view where zeros zeros_like
""".split())


class Called(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names[operator.name().split("::")[-1].split(".")[0]] += 1
        return operator(*args, **kwargs or {})


def recomputed(mode, arm, device="cpu", dtype=torch.float32, **changes):
    """The operators that the backward of a block runs in that mode beyond those of a block that keeps everything."""
    called = []
    for setting in ("none", mode):
        model = tiny_model(num_hidden_layers=1, first_k_dense_replace=0, **changes).to(device)
        model.layers[0].recompute = setting
        x = torch.randn(2, 16, model.config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        with mock.patch.object(attention, "_default_arm", lambda *about: arm):
            y = model.layers[0](x, rope_tables(model.config, 0, 16, model.device))[0].sum()
            with Called() as counted:
                y.backward()
        called.append(counted.names)
    return called[1] - called[0]


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("arm, changes", [("triton", {}), ("math", {}), ("sdpa", {}), ("sdpa", {"attention": "mha"})])
def test_a_selective_block_computes_nothing_dear_again(arm, changes, triton):
    """For every arm that runs on a CPU; test_gpu.py asks the others. mha: equal widths, which sdpa does in one go."""
    if triton and not backend.INTERPRETED or arm == "triton" and not triton:
        pytest.skip("Triton's kernels do not run here")
    with backend.running(triton):
        again = recomputed("selective", arm, **changes)
        assert again["silu"] and set(again) <= CHEAP, set(again) - CHEAP
        full = recomputed("full", arm, **changes)
    assert full["causal_attention" if arm == "triton" else "bmm"] or full["_scaled_dot_product_flash_attention_for_cpu"]


def test_selective_recomputation_keeps_every_library_attention():
    """All that PyTorch has under that name, and what its FLOP counter takes for arithmetic in a forward."""
    names = [name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product") and "backward" not in name]
    assert {"_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention"} <= set(names)
    counted = [str(packet).removeprefix("aten.") for packet in flop_registry]
    counted = [name for name in counted if "backward" not in name and "conv" not in name]
    for name in [*names, *counted, "_grouped_mm", "sort", "topk"]:
        packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.higher_order, name)
        for operator in [getattr(packet, o) for o in packet.overloads()] if hasattr(packet, "overloads") else [packet]:
            assert keep_matmuls(None, operator) == CheckpointPolicy.MUST_SAVE, operator


def test_statistics_gather_over_micro_batches_and_not_in_evaluation():
    model, x = tiny_model(), tokens(4, 33)
    model(x[:, :-1], x[:, 1:])
    counts, maxima = model.routing.expert_counts.clone(), model.max_logits.clone()
    model.reset_statistics()
    for part in x.split(1):
        model(part[:, :-1], part[:, 1:])
    assert torch.equal(counts, model.routing.expert_counts) and torch.allclose(maxima, model.max_logits, atol=1e-6)
    model.eval()(x[:, :-1], x[:, 1:])
    assert torch.equal(counts, model.routing.expert_counts)


def test_max_logit_is_the_largest_attention_logit_not_a_vocabulary_logit():
    model, x = tiny_model(), tokens(2, 33)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    model(x[:, :-1], x[:, 1:])
    assert model.max_logits.max() < 50
    with torch.no_grad():
        model.layers[1].self_attn.q_proj.weight.mul_(1000)
    model.reset_statistics()
    model(x[:, :-1], x[:, 1:])
    assert model.max_logits[1].max() > 100 > model.max_logits[0].max()


def test_initialisation_depends_on_seed_and_name_only():
    one, same, other = (build(tiny_config(), "cpu").init_weights(seed) for seed in (1, 1, 2))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other.get_parameter(name))
            assert parameter.std().item() == pytest.approx(0.1, rel=0.15)
    deeper = build(tiny_config(num_hidden_layers=5), "cpu").init_weights(1)  # layers that both have start equal
    assert torch.equal(one.layers[2].mlp.experts.down_proj, deeper.layers[2].mlp.experts.down_proj)
    big = ModelConfig(vocab_size=5000, hidden_size=512, num_hidden_layers=1, n_routed_experts=0)
    weight = build(big, "cpu").init_weights(0).lm_head.weight  # several row blocks
    assert not torch.equal(weight[:2048], weight[2048:4096])


def test_bf16_compute_stays_close_and_keeps_fp32_parameters():
    model, x = tiny_model(), tokens(3, 33)
    exact, _ = model(x[:, :-1], x[:, 1:])
    model.compute_dtype = torch.bfloat16
    loss, _ = model(x[:, :-1], x[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.02
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_counts_are_those_of_the_built_model():
    config = tiny_config(n_shared_experts=2)
    total, active = count_parameters(config)
    assert total == sum(p.numel() for p in build(config, "cpu").parameters())
    idle = 2 * (8 - 2) * 3 * 32 * 16  # MoE layers x unused experts x three matrices
    assert active == total - idle
    core = 3 * 4 * (8 + 4 + 8) * (32 + 1) / 2
    assert flops_per_token(config, 32) == 6 * (active - 97 * 32 + core)

"""Multi-token prediction: the loss against float64 by hand, documents, every lever of a run, files of Hugging Face, and
text that the block drafts."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import export
import generate
import hf
import mtp
import settings
from counting import count_parameters, flops_per_token
from decoding import speculate
from errors import UserError
from kernels.cross_entropy import IGNORE
from muon import qk_clip_
from routes import route_parameters
from tests.helpers import final_tensors, make_config, records, run_train, small_run, tiny_config, tiny_model, tokens

# ---------------------------------------------------------------------- the loss, by hand


def part(weights, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def mlp(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def attention(w, x, c):
    """MLA of one document, head by head; position t turns pair p by t / theta^(2 p / P)."""
    N, P, U, R = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    angle = torch.arange(len(x)).double()[:, None] / c.rope_theta ** (torch.arange(0, P, 2).double() / P)
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    rotate = lambda x: torch.view_as_real(pairs(x) * turn).flatten(1)
    latent, key = (x @ w["kv_a_proj_with_mqa.weight"].T).split((R, P), -1)
    query = (x @ w["q_proj.weight"].T).split(N + P, -1)
    up = (norm(latent, w["kv_a_layernorm.weight"]) @ w["kv_b_proj.weight"].T).split(N + U, -1)
    future, heads = torch.ones(len(x), len(x)).triu(1).bool(), []
    for q, kv in zip(query, up, strict=True):
        scores = (q[:, :N] @ kv[:, :N].T + rotate(q[:, N:]) @ rotate(key).T) / math.sqrt(N + P)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ kv[:, N:])
    return torch.cat(heads, -1) @ w["o_proj.weight"].T


def experts(w, x, c):
    """The shared expert, and every token by its own, one after the other."""
    rows = []
    for token in x:
        scores = (w["gate.weight"] @ token).sigmoid()
        chosen = (scores + w["gate.e_score_correction_bias"]).topk(c.num_experts_per_tok).indices
        outputs = [scores[e] / scores[chosen].sum() * mlp(token, *w["experts.gate_up_proj"][e].chunk(2),
                                                          w["experts.down_proj"][e]) for e in chosen]
        rows.append(sum(outputs) * c.routed_scaling_factor)
    return torch.stack(rows) + mlp(x, *(w[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))


def block(w, x, c):
    x = x + attention(part(w, "self_attn."), norm(x, w["input_layernorm.weight"]), c)
    y = norm(x, w["post_attention_layernorm.weight"])
    if "mlp.gate.weight" in w:
        return x + experts(part(w, "mlp."), y, c)
    return x + mlp(y, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def by_hand(weights, c, ids, n):
    """Equations 21 to 24 of DeepSeek-V3 for the n first of a document's ids as inputs: sums of the losses of the next
    and of the second next ids, and how many second ones there are."""
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    x = embedding[ids[:n]]
    for number in range(c.num_hidden_layers):
        x = block(part(weights, f"model.layers.{number}."), x, c)
    x = norm(x, weights["model.norm.weight"])
    loss = -sum((x[i] @ head.T).log_softmax(-1)[ids[i + 1]] for i in range(n) if i + 1 < len(ids))
    w = part(weights, f"model.layers.{c.num_hidden_layers}.")
    pairs = [torch.cat((norm(embedding[ids[i + 1]], w["enorm.weight"]), norm(x[i], w["hnorm.weight"])))
             for i in range(n) if i + 1 < len(ids)]
    y = norm(block(w, torch.stack(pairs) @ w["eh_proj.weight"].T, c), w["shared_head.norm.weight"])
    seconds = [(y[i] @ head.T).log_softmax(-1)[ids[i + 2]] for i in range(n) if i + 2 < len(ids)]
    return loss, -sum(seconds, torch.zeros(())), len(seconds)


def in_float64(model):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}


def assert_gradients(model, weights, loss, expected):
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - weights[name].grad).norm() <= 1e-4 * weights[name].grad.norm(), name


@pytest.mark.parametrize("changes", [{}, {"n_routed_experts": 0}, {"first_k_dense_replace": 3}], ids=str)
def test_loss_and_gradients_are_those_of_float64_by_hand(changes):
    model, x = tiny_model(mtp_depth=1, **changes), tokens(2, 14)
    weights = in_float64(model)
    loss, _, second, n = model(x[:, :-1], x[:, 1:], mtp_scale=0.3)
    rows = [by_hand(weights, model.config, row.tolist(), 13) for row in x]
    assert n == sum(row[2] for row in rows) == 24
    for ours, number in ((loss, 0), (second, 1)):
        assert ours.item() == pytest.approx(sum(row[number] for row in rows).item(), rel=1e-6)
    assert_gradients(model, weights, loss + 0.3 * second, sum(row[0] + 0.3 * row[1] for row in rows))


def test_with_documents_apart_a_row_is_every_document_alone():
    """The last row has empty places behind; the end of a text, the separator 96, is predicted, what follows it is
    not."""
    model = tiny_model(mtp_depth=1)
    weights, generator = in_float64(model), torch.Generator().manual_seed(0)
    rows = [[[96, *torch.randint(0, 96, (n,), generator=generator).tolist()] for n in lengths]
            for lengths in ((5, 0, 1, 8), (3, 2))]
    flat = [sum(documents, []) for documents in rows]
    T = len(flat[0]) - 1
    packed = torch.tensor([row + [IGNORE] * (T + 1 - len(row)) for row in flat])
    inputs, targets = packed[:, :-1].where(packed[:, :-1] != IGNORE, 96), packed[:, 1:]
    starts = torch.where(inputs == 96, torch.arange(T), 0).cummax(1).values.int()
    loss, _, second, n = model(inputs, targets, first_BT=starts, mtp_scale=1.0)
    expected = [by_hand(weights, model.config, document + [96] * (document is not documents[-1]), len(document))
                for documents in rows for document in documents]
    assert n == sum(found[2] for found in expected)
    assert second.item() == pytest.approx(sum(found[1] for found in expected).item(), rel=1e-6)
    assert_gradients(model, weights, loss + second, sum(found[0] + found[1] for found in expected))
    assert model(inputs, targets, mtp_scale=1.0)[3] > n  # without the mask the next document is predicted too


# ---------------------------------------------------------------------- statistics, recomputation, what it counts for


def trained_once(model, x, mode="none"):
    for layer in model.layers:
        layer.recompute = mode
    loss, balance, second, _ = model(x[:, :-1], x[:, 1:], mtp_scale=1.0)
    (loss + balance + 0.3 * second).backward()
    return [loss, balance, second, model.max_logits, *model.routing.buffers(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing_and_counts_once(mode):
    options = dict(mtp_depth=1, balance="quantile", router_z_loss=0.1)
    plain, again = (trained_once(tiny_model(**options), tokens(3, 33), how) for how in ("none", mode))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))
    assert again[3].isfinite().all() and again[4].sum(1).tolist() == [3 * 32 * 2] * 3
    assert again[5].sum(2).tolist() == [[3 * 32] * 8] * 3  # of every expert a needed bias for every token


def test_micro_batches_add_up():
    model, x = tiny_model(mtp_depth=1), tokens(6, 33)
    whole = trained_once(model, x)
    other = tiny_model(mtp_depth=1)
    parts = [trained_once(other, part) for part in x.split(2)]  # statistics and gradients gather in the model
    for number in range(3):
        assert sum(part[number] for part in parts).item() == pytest.approx(whole[number].item(), rel=1e-5)
    for ours, theirs in zip(whole[3:], parts[-1][3:], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_mtp_scale_the_block_takes_no_part():
    model, plain, x = tiny_model(mtp_depth=1), tiny_model(), tokens(3, 33)
    plain.load_state_dict(model.state_dict(), strict=False)
    for left, right in zip(model(x[:, :-1], x[:, 1:]), plain(x[:, :-1], x[:, 1:]), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    counts = model.routing.expert_counts
    assert torch.equal(counts[:-1], plain.routing.expert_counts) and not counts[-1].any()
    assert torch.equal(model.max_logits[:-1], plain.max_logits) and model.max_logits[-1].isinf().all()
    model.train()(x[:, :-1], x[:, 1:])[0].backward()
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None} == {"3"}


def test_router_balance_and_qk_clip_reach_the_block():
    model = tiny_model(mtp_depth=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained_once(model, tokens(3, 33))
    assert model.routing.biases().shape == (3, 8)
    model.routing.balance_(0.1)
    assert qk_clip_(model.layers, model.max_logits, model.max_logits[-1].min().item() / 2) >= 4
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = ("mlp.gate.e_score_correction_bias", "self_attn.q_proj.weight", "self_attn.kv_b_proj.weight")
    assert {f"model.layers.3.{name}" for name in expected} <= changed


def test_a_compiled_block_is_one_graph():
    model, x = tiny_model(mtp_depth=1), tokens(3, 33)
    expected = trained_once(model, x)
    model = tiny_model(mtp_depth=1)
    model.layers[3].forward = torch.compile(model.layers[3].forward, fullgraph=True, dynamic=False, backend="aot_eager")
    for ours, theirs in zip(trained_once(model, x), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_counts_are_those_of_the_built_block():
    with_block, without = tiny_config(mtp_depth=1), tiny_config()
    more = sum(p.numel() for p in tiny_model(mtp_depth=1).layers[3].parameters())
    assert count_parameters(with_block) == (count_parameters(without)[0] + more, count_parameters(without)[1])
    idle = (8 - 2) * 3 * 32 * 16  # unused experts x three matrices
    core = 4 * (8 + 4 + 8) * (32 + 1) / 2
    assert flops_per_token(with_block, 32) == flops_per_token(without, 32) + 6 * (more - idle + 97 * 32 + core)


def test_the_routing_table_has_every_parameter_of_the_block():
    model = tiny_model(mtp_depth=1)
    routes = route_parameters(model.named_parameters())
    named = {name: route for name, route in routes.items() if name.startswith("model.layers.3.")}
    assert named["model.layers.3.eh_proj.weight"].rows == 32
    muon = {name for name, route in named.items() if route.optimizer == "muon"}
    assert {name for name, p in model.named_parameters() if name in named and p.ndim > 1} == muon


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mtp")
    run_train(make_config(folder / "c.py", data=str(data), out_dir=str(folder / "run"), mtp_depth=1, max_steps=30,
                          save_interval=15, eval_interval=15))
    return folder / "run"


def test_both_losses_are_logged_each_as_its_own_mean(run):
    found = records(run)
    for key in ("loss", "mtp_loss"):
        assert found[0][key] == pytest.approx(math.log(257), abs=0.05) and found[-1][key] < found[0][key] - 1
    assert "mtp_loss" not in records(run, "val")[-1]


def test_weight_and_its_schedule(tmp_path, data):
    config = make_config(tmp_path / "c.py", data=str(data), max_steps=20, mtp_depth=1)
    config = settings.load([config, "--mtp_loss_weight=0.4", "--mtp_decay_loss_weight=0.2"])[0]
    weights = [mtp.loss_weight(config, step, "cpu") for step in range(1, 21)]
    assert [round(weight.item(), 6) for weight in weights] == [0.4] * 16 + [0.2] * 4  # wsd's decay is a fifth
    config.decay_steps = 0
    assert mtp.loss_weight(config, 20, "cpu").item() == pytest.approx(0.4)
    config.mtp_depth = 0
    assert mtp.loss_weight(config, 20, "cpu") is None


@pytest.mark.parametrize("word, message", [
    ("--mtp_depth=2", "mtp_depth=2 must be 0 or 1"), ("--mtp_loss_weight=0", "must be above 0; without the block"),
    ("--mtp_decay_loss_weight=0", "must be above 0; without the block")])
def test_impossible_settings_are_refused(config, word, message):
    with pytest.raises(UserError, match=message):
        settings.load([config, word])


def test_a_resumed_run_is_bitwise_the_run(run, tmp_path):
    start = run / "checkpoints/step_00000015"
    run_train(run.parent / "c.py", f"--resume={start}", f"--out_dir={tmp_path / 'again'}")
    a, b = records(run)[15:], records(tmp_path / "again")
    assert [(r["loss"], r["mtp_loss"], r["grad_norm"]) for r in a] == [
        (r["loss"], r["mtp_loss"], r["grad_norm"]) for r in b]
    ours, theirs = final_tensors(run), final_tensors(tmp_path / "again")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="holds another model or optimizer: mtp_depth: 1 there, 0 here"):
        run_train(run.parent / "c.py", f"--resume={start}", f"--out_dir={tmp_path / 'other'}", "--mtp_depth=0")


# ---------------------------------------------------------------------- Hugging Face


PUBLISHED = """embed_tokens.weight enorm.weight hnorm.weight eh_proj.weight shared_head.norm.weight
    shared_head.head.weight input_layernorm.weight post_attention_layernorm.weight self_attn.q_proj.weight
    self_attn.kv_a_proj_with_mqa.weight self_attn.kv_a_layernorm.weight self_attn.kv_b_proj.weight
    self_attn.o_proj.weight mlp.gate.weight mlp.gate.e_score_correction_bias""".split()
PUBLISHED += [f"mlp.{who}.{kind}_proj.weight" for who in ("shared_experts", *(f"experts.{i}" for i in range(8)))
              for kind in ("gate", "up", "down")]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_transformers_leaves_out_the_layer_that_we_read_back(tmp_path, changes, capsys):
    model, x = tiny_model(mtp_depth=1, **changes).eval(), tokens(2, 40)
    about = hf.to_hf_config(model.config, None, "float32")
    assert about["num_nextn_predict_layers"] == 1 and about["num_hidden_layers"] == 3
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    written = dict(hf.to_hf_tensors(model, torch.float32))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layer = {name.removeprefix("model.layers.3.") for name in written if name.startswith("model.layers.3.")}
    assert layer == set(PUBLISHED)
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    again = hf.load_model(tmp_path).eval()
    with torch.no_grad():
        assert (model(x) - other(x).logits).abs().max() <= 1e-4
    assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    written["model.layers.3.shared_head.head.weight"] += 1
    save_file(written, tmp_path / "model.safetensors")
    capsys.readouterr()
    without = hf.load_model(tmp_path)  # a layer with a head of its own is none that we could train or guess with
    told = capsys.readouterr().err
    assert "model.layers.3.shared_head.head.weight is not" in told and "tensors of 1 multi-token" in told
    assert without.config.mtp_depth == 0
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in without.state_dict().items())


def test_a_run_goes_out_and_back_and_trains_on(run, tmp_path, capsys):
    export.main([str(run), str(tmp_path / "hf")])
    export.main(["--reverse", str(tmp_path / "hf"), str(tmp_path / "back")])
    assert "left out" not in capsys.readouterr().err
    states = [generate.load(source, "cpu")[0].state_dict() for source in (run, tmp_path / "back")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    words = [f"--{key}={getattr(settings.load([str(run.parent / 'c.py')])[0], key)}" for key in (
        "data", "sequence_length", "global_batch_size", "micro_batch_size", "device", "muon_lr")]
    run_train(tmp_path / "back/config.py", "--resume", *words, "--max_steps=1", "--eval_interval=0", "--dtype=float32")
    assert records(tmp_path / "back")[0]["mtp_loss"] < records(run)[0]["mtp_loss"] - 1  # from what was learnt


# ---------------------------------------------------------------------- speculative decoding


@pytest.mark.parametrize("changes", [
    {"q_lora_rank": 24}, {"attention": "mha"}, {"n_routed_experts": 0, "tie_word_embeddings": True}], ids=str)
def test_speculative_text_is_the_greedy_text_also_past_the_context(changes):
    model, slides = tiny_model(mtp_depth=1, **changes).eval(), []
    for length in (1, 60):  # the context is 64
        expected = [int(ids) for ids in model.generate(tokens(1, length), 40, temperature=0,
                                                       on_slide=lambda: slides.append("plain"))]
        found = [int(ids) for ids in speculate(model, tokens(1, length), 40, on_slide=lambda: slides.append("two"))]
        assert found == expected and slides.count("plain") == slides.count("two")
    assert slides
    stop = expected[20]
    found = [int(ids) for ids in speculate(model, tokens(1, 60), 40, stop=stop)]
    assert found == expected[:expected.index(stop) + 1]


def test_drafts_of_a_trained_model_are_accepted_and_save_forwards(run, monkeypatch):
    model, _ = generate.load(run, "cpu")
    expected = [int(ids) for ids in model.generate(tokens(1, 9), 80, temperature=0)]
    calls, drafts, trunk = [], [], model.trunk
    monkeypatch.setattr(model, "trunk", lambda *given: calls.append(1) or trunk(*given))
    for n in (80, 31, 2, 1):
        calls.clear(), drafts.clear()
        found = [int(ids) for ids in speculate(model, tokens(1, 9), n, on_draft=drafts.append)]
        assert found == expected[:n] and len(calls) == n - sum(drafts)
        assert n < 80 or sum(drafts) > 20


def test_the_command_line_says_how_many_drafts_were_right(run, data, tmp_path, capsys):
    words = [str(run), "--prompt=ab", "--temperature=0", "--max_new_tokens=40", "--device=cpu"]
    generate.main(words)
    plain = capsys.readouterr()
    generate.main([*words, "--speculative"])
    drafted = capsys.readouterr()
    assert drafted.out == plain.out and "drafts right" not in plain.err
    assert re.search(r"40 tokens in [\d.]+ s, \d+ tokens/s; \d+% of \d+ drafts right", drafted.err), drafted.err
    for more, message in (["--temperature=0.5", "set --temperature=0"], ["--no_cache", "leave --no_cache"]):
        with pytest.raises(UserError, match=message):
            generate.main([*words, "--speculative", more])
    small_run(tmp_path / "small")
    with pytest.raises(UserError, match="no block of multi-token prediction"):
        generate.main([str(tmp_path / "small/run"), *words[1:], "--speculative"])

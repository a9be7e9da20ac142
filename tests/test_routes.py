"""lr_multipliers: whom they name, that a rate follows its parameter, what is refused, and a run that goes on with
others."""

import pytest
import torch

from errors import UserError
from muon import Muon
from routes import route_parameters, routing_table
from tests.helpers import final_tensors, records, run_train, tiny_model, tokens

MULTIPLIERS = {"experts": 0.5, "router": 0.0, "embeddings": 2.0, "head": 3}


def expected_multiplier(name):
    """By hand, from the names that model.py gives."""
    if "shared_experts" in name:
        return 1
    parts = {"experts.": 0.5, "mlp.gate.weight": 0, "embed_tokens": 2, "lm_head": 3}
    return next((by for part, by in parts.items() if part in name), 1)


def test_the_names_mean_the_routed_experts_the_router_and_both_ends():
    model = tiny_model(q_lora_rank=24)
    routes = route_parameters(model.named_parameters(), multipliers=MULTIPLIERS)
    found = {name: route.multiplier for name, route in routes.items()}
    assert found == {name: expected_multiplier(name) for name, _ in model.named_parameters()}
    assert sorted(set(found.values())) == [0, 0.5, 1, 2, 3]
    for optimizer in ("muon", "adamw"):
        routes = route_parameters(model.named_parameters(), optimizer, multipliers=MULTIPLIERS)
        told = {line.split()[1]: line for line in routing_table(model.named_parameters(), routes)}
        assert told["model.layers.*.mlp.experts.down_proj"].endswith("learning rate x 0.5")
        assert told["model.layers.*.mlp.gate.weight"].endswith("learning rate x 0")
        assert sum("learning rate" in line for line in told.values()) == 5
    plain = routing_table(model.named_parameters(), route_parameters(model.named_parameters()))
    assert not any("learning rate" in line for line in plain)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_multiplied_rate_is_the_rate_of_its_parameter_alone(kind):
    """Three steps, with decay: parameter by parameter those of an optimizer that has this rate for everything."""
    x, trained = tokens(4, 17), {}
    grads = None
    for by in (None, 0, 0.5, 1, 2, 3):
        model = tiny_model()
        if grads is None:  # the same for all
            model(x[:, :-1], x[:, 1:])[0].div(64).backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
        routes = route_parameters(model.named_parameters(), kind, multipliers=MULTIPLIERS if by is None else None)
        optimizer = Muon(model.named_parameters(), 0.02 * (1 if by is None else by), weight_decay=0.3, routes=routes)
        for step in range(3):
            for name, p in model.named_parameters():
                p.grad = grads[name] * (step + 1)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9  # as train.py's schedule does
            optimizer.step()
        trained[by] = dict(model.named_parameters())
    for name, parameter in trained[None].items():
        torch.testing.assert_close(parameter, trained[expected_multiplier(name)][name], rtol=0, atol=1e-7)
    assert not torch.equal(trained[0.5]["lm_head.weight"], trained[3]["lm_head.weight"])


@pytest.mark.parametrize("multipliers, changes, told", [
    ({"heads": 2}, {}, "no parameters called 'heads', but embeddings, experts, head, router"),
    ({"experts": 1, "head": 2}, {"tie_word_embeddings": True}, "no parameters called 'head', but embeddings, experts"),
    ({"router": 2}, {"n_routed_experts": 0}, "no parameters called 'router', but embeddings, head"),
])
def test_a_name_that_this_model_lacks_is_refused(multipliers, changes, told):
    with pytest.raises(UserError, match=told):
        route_parameters(tiny_model(**changes).named_parameters(), multipliers=multipliers)


@pytest.mark.parametrize("words", ["{'experts': -1}", "{'experts': 'fast'}", "{1: 2}", "{'head': True}", "experts"])
def test_what_is_no_factor_is_refused(config, words):
    with pytest.raises(UserError, match="lr_multipliers"):
        run_train(config, f"--lr_multipliers={words}")


def test_a_run_goes_on_with_other_multipliers_and_says_so(config, tmp_path, capsys):
    run = tmp_path / "run"
    run_train(config, "--max_steps=2", "--lr_multipliers={'experts': 0.5}")
    before = final_tensors(run)
    capsys.readouterr()
    run_train(f"--resume={run}", "--max_steps=3", "--lr_multipliers={'router': 0, 'experts': 0.5}")
    line = "lr_multipliers: {'experts': 0.5} there, {'router': 0, 'experts': 0.5} here"
    assert line in capsys.readouterr().out and line in records(run, "event")[-2]["changed"]
    for name, tensor in final_tensors(run).items():
        if name.startswith("model.") and name.endswith("weight"):
            assert torch.equal(tensor, before[name]) == name.endswith("gate.weight"), name


def test_per_head_takes_plain_heads_apart_like_latent_ones():
    """All that makes queries, keys and values, in either: else a contest between them would compare two recipes."""
    for attention in ("mla", "mha"):
        model = tiny_model(attention=attention)
        routes = route_parameters(model.named_parameters(), per_head=model.config.num_attention_heads)
        per_head = {name.split(".")[-2] for name, parameter in model.named_parameters() if "layers.0.self_attn" in name
                    and routes[name].rows == len(parameter) // model.config.num_attention_heads}
        assert per_head == ({"q_proj", "kv_b_proj"} if attention == "mla" else {"q_proj", "k_proj", "v_proj"})

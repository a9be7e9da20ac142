"""Who meets whom in a contest: ready-made pairs of a config with what it is to be measured against, at equal FLOPs a
token where the architectures differ, any two config files, and one config with other settings. Next: contest.py.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

import settings
from bench.arms import dense_twin, equal_flops, gpt_twin
from config import Config
from counting import count_parameters, flops_per_token
from errors import UserError

GRID = ("8:2:0,8:2:1,16:1:1,16:2:1,16:4:0,16:4:1,32:1:1,32:2:0,32:2:1,32:4:1,64:1:1,64:2:1,64:6:1,128:2:1,128:4:1,"
        "128:6:1,16:4:2,64:8:4")  # routed experts : active : shared
ADAMW_RATE, ADAMW_WIDTH = 2e-3, 128  # AdamW's base rate at this width; it falls with the square root of the width
CLIP_TAU = 10.0  # of the pair `clip`, unless another is set: configs/debug.py's logits pass 20 without it
ALIKE = ("data", "tokenizer", "sequence_length", "global_batch_size", "eval_batches", "packing", "document_mask",
         "device", "compile", "seed")  # in all arms: they see the same tokens, on the same device


@dataclass
class Arm:
    """One side of a contest. config.muon_lr is where the search for its learning rate begins."""
    name: str
    config: Config

    def about(self):
        """What contest.json says of it."""
        total, active = count_parameters(self.config)
        return {"parameters": total, "active_parameters": active,
                "flops_per_token": flops_per_token(self.config, self.config.sequence_length),
                "settings": dataclasses.asdict(self.config)}


def with_rate(config, rate):
    """The config at another muon_lr; a rate of AdamW's own keeps its ratio to it."""
    adamw_lr = None if config.adamw_lr is None else config.adamw_lr * rate / config.muon_lr
    return dataclasses.replace(config, muon_lr=rate, adamw_lr=adamw_lr)


def with_adamw(config):
    """The config with AdamW for all parameters, at AdamW's own base rate."""
    rate = ADAMW_RATE * math.sqrt(ADAMW_WIDTH / config.hidden_size)
    return dataclasses.replace(config, optimizer="adamw", muon_lr=float(f"{rate:.2g}"), adamw_lr=None)


# ----------------------------------------------------------------------------- pairs: challengers, then the baseline

def moe_dense(config):
    """a mixture of experts against the dense model that differs in nothing else"""
    return [Arm("moe", _require_experts(config)), Arm("dense", dense_twin(config))]


def moe_gpt(config):
    """a mixture of experts against a plain transformer: plain heads, dense, AdamW"""
    return [Arm("moe", _require_experts(config)), Arm("gpt", with_adamw(gpt_twin(config)))]


def muon_adamw(config):
    """the config's optimizer against AdamW, each at its own learning rate"""
    _require(config.optimizer != "adamw", "its challenger is Muon: set --optimizer=muonclip")
    return [Arm(config.optimizer, config), Arm("adamw", with_adamw(config))]


def mla_mha(config):
    """latent attention against as many plain heads, so wide that FLOPs a token are equal"""
    _require_mla(config)
    return [Arm("mla", config), Arm("mha", equal_flops(config, "v_head_dim", 2, attention="mha"))]


def clip(config):
    """QK-clip against none, at a tau that acts, 10, unless one is set"""
    return [Arm("clip", dataclasses.replace(config, optimizer="muonclip")),
            Arm("no clip", dataclasses.replace(config, optimizer="muon"))]


def heads(config):
    """twice the heads of half the width against the config's, in latent attention"""
    _require_mla(config)
    widths = {name: getattr(config, name) // 2 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    odd = [name for name in widths if getattr(config, name) % 2]
    _require(not odd, f"{' and '.join(odd)} cannot be halved")
    many = dataclasses.replace(config, num_attention_heads=2 * config.num_attention_heads, **widths)
    return [Arm("more heads", many), Arm("heads", config)]


def experts(config, grid=GRID):
    """a grid of expert counts (E:K:shared, ...), widths at equal FLOPs, each against the dense model"""
    _require_experts(config)
    return [*(Arm(cell, _cell(config, cell)) for cell in grid.split(",")), Arm("dense", dense_twin(config))]


PAIRS = {function.__name__.replace("_", "-"): function
         for function in (moe_dense, moe_gpt, muon_adamw, mla_mha, clip, heads, experts)}


def _cell(config, cell):
    """The config with E:K:shared experts, their width such that the FLOPs a token stay the same."""
    try:
        E, K, shared = map(int, cell.split(":"))
    except ValueError:
        raise UserError(f"--grid: {cell!r} is not E:K:shared, as in 64:2:1") from None
    changes = dict(n_routed_experts=E, num_experts_per_tok=K, n_shared_experts=shared, n_group=1, topk_group=1,
                   routed_scaling_factor=None)
    if K == 1:  # a weight that is always 1 teaches the router nothing
        changes["norm_topk_prob"] = False
    dataclasses.replace(config, **changes).check()  # before a count of parameters meets what cannot be
    return equal_flops(config, "moe_intermediate_size", 4, **changes)


def _require(ok, message):
    if not ok:
        raise UserError(f"this pair and this config do not go together: {message}")


def _require_experts(config):
    _require(config.n_routed_experts, "it has no experts: choose a config with n_routed_experts above 0")
    return config


def _require_mla(config):
    _require(config.attention == "mla", "it has no latent attention: set --attention=mla")


# ----------------------------------------------------------------------------- from words

def arms_of(names, path, flags, grid=None):
    """(name of the pair, its arms, the baseline last) of the words PAIR, or A.py B.py, or SETTING=VALUE ..., with the
    settings of the command line; path: the config file of all but A.py B.py."""
    if names and all(map(is_changes, names)):
        arms = [Arm(name, _config(path, flags | _changes(name))) for name in names]
        arms += [Arm("as it is", _config(path, flags))] if len(arms) == 1 else []
        pair = "-".join(re.sub(r"\W+", "_", name).strip("_") for name in names)
    elif len(names) == 2 and all(name.endswith(".py") for name in names):
        arms = [Arm(_stem(name), _config(name, flags)) for name in names]
        if arms[0].name == arms[1].name:
            arms = [Arm(name, arm.config) for name, arm in zip(names, arms)]
        pair = f"{_stem(names[0])}-{_stem(names[1])}"
    elif len(names) == 1 and names[0] in PAIRS:
        pair = names[0]
        flags = {"qk_clip_tau": CLIP_TAU} | flags if pair == "clip" and not _sets(path, "qk_clip_tau") else flags
        arms = experts(_config(path, flags), grid or GRID) if pair == "experts" else PAIRS[pair](_config(path, flags))
    else:
        known = "; ".join(f"{name}: {function.__doc__}" for name, function in PAIRS.items())
        raise UserError("name a pair, or two config files, A.py B.py, or what to change, SETTING=VALUE"
                        f"{f'; got {names}' if names else ''}. {known}")
    baseline = arms[-1].config
    for arm in arms:
        arm.config.check()
        differing = [name for name in ALIKE if getattr(arm.config, name) != getattr(baseline, name)]
        if differing:
            raise UserError(f"{arm.name} and {arms[-1].name} differ in {', '.join(differing)}: both have to be the "
                            f"same, as with --{differing[0]}={getattr(baseline, differing[0])} on the line")
    return pair, arms


def is_changes(word):
    """Whether a word of the command line is an arm: settings to change, "muon_lr=2e-2 momentum=0.9"."""
    return re.match(r"[a-z_]+=", word) is not None


def _changes(name):
    """{setting: value} of an arm's name."""
    return settings.read_words(f"--{word}" for word in re.split(r"\s+(?=[a-z_]+=)", name.strip()))[1]


def _sets(path, name):
    """Whether a config file sets it."""
    return name in settings.read_file(path)


def _config(path, flags):
    return Config(**settings.read_file(path) | flags).check()


def _stem(path):
    return path.replace("\\", "/").split("/")[-1].removesuffix(".py")

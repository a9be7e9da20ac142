"""The pictures of docs/method.md, drawn from the code that they are about:  python -m docs.pictures [FOLDER]

Latent attention at the sizes of configs/k2.py; routing by kernels/routing.py and moe.Router on random logits; the plan
that owners.py makes of configs/debug.py for four ranks. FOLDER is assets/ unless named. tests/test_docs.py compares
what is written in the pictures of assets/ with what would be written today.
"""

import re
import runpy
from pathlib import Path

import matplotlib
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import errors
from kernels import quantile, routing
from model import K2, ModelConfig
from moe import Router
from muon import route_parameters
from owners import Stack, make_plan

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of what draws)

ROOT = Path(__file__).parent.parent
DARK, LIGHT, WARM = "#1f4e79", "#dbe7f3", "#f6d9a8"
RANKS = ["#16324f", "#4f81bd", "#a9c6e3", "#e8eef5"]  # dark to light: told apart without colour, too
STYLE = {"svg.hashsalt": "nanok2", "font.size": 9, "axes.titlesize": 9, "font.family": "DejaVu Sans"}


def model_config(name):
    """The ModelConfig of a file in configs/."""
    values = runpy.run_path(str(ROOT / "configs" / name))
    return ModelConfig(**{key: value for key, value in values.items() if key in ModelConfig.__dataclass_fields__})


# ----------------------------------------------------------------------------- latent attention

def draw_latent_attention(figure):
    """What becomes of a token in MLA, with the widths of Kimi K2, and what of it the cache keeps."""
    c = model_config("k2.py")
    H, N, P, U, R = (c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(0, 46))
    axis.axis("off")
    box(axis, "x", (2, 19, 13, 8), f"hidden state\n{c.hidden_size:,}")
    box(axis, "query", (24, 33, 17, 8), f"query latent\n{c.q_lora_rank:,}")
    box(axis, "latent", (24, 17, 17, 8), f"latent\n{R}", WARM)
    box(axis, "rope", (24, 4, 17, 8), f"RoPE key, one\nfor all heads\n{P}", WARM)
    box(axis, "heads q", (51, 33, 22, 8), f"{H} queries\n{N} + {P} with position")
    box(axis, "heads k", (51, 21, 22, 8), f"{H} keys\n{N} + the RoPE key's {P}")
    box(axis, "heads v", (51, 9, 22, 8), f"{H} values\n{U}")
    box(axis, "out", (82, 21, 16, 8), "attention,\noutput projection")
    for start, end in (((15, 24), (24, 36)), ((15, 23), (24, 21)), ((15, 22), (24, 9)), ((41, 37), (51, 37)),
                       ((41, 22), (51, 25)), ((41, 20), (51, 13)), ((41, 9), (51, 22)), ((73, 37), (82, 27)),
                       ((73, 25), (82, 25)), ((73, 13), (82, 23))):
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=DARK, linewidth=1))
    plain, kept = H * (N + P + U), R + P
    axis.text(50, 3, f"The cache keeps the two boxes in colour: {R} + {P} = {kept}\nnumbers a token and layer. Keys "
              f"and values of all heads\nwould be {H} x ({N + P} + {U}) = {plain:,}, {plain / kept:.0f} times as many.",
              va="center", color=DARK)


def box(axis, name, place, text, colour=LIGHT):
    x, y, width, height = place
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1", facecolor=colour,
                                  edgecolor=DARK, linewidth=1))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center")


# ----------------------------------------------------------------------------- routing

def draw_routing(figure, tokens=6, experts=8, top_k=2):
    """Left: scores plus bias and what they choose. Right: the load with each way to balance it."""
    generator = torch.Generator().manual_seed(3)
    lean_E = torch.linspace(1.2, -1.2, experts)  # a router that likes the first experts
    bias_E = -lean_E / 6
    logits_NE = torch.randn(tokens, experts, generator=generator) + lean_E
    weights_NK, chosen_NK, scores_NE = routing.choose(logits_NE, bias_E, top_k)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    left.imshow((scores_NE + bias_E).numpy(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for n in range(tokens):
        for e in range(experts):
            left.text(e, n - 0.12, f"{scores_NE[n, e] + bias_E[e]:.2f}", ha="center", va="center")
        for weight, e in zip(weights_NK[n].tolist(), chosen_NK[n].tolist()):
            left.add_patch(pyplot.Rectangle((e - 0.47, n - 0.47), 0.94, 0.94, fill=False, edgecolor="black", lw=2))
            left.text(e, n + 0.26, f"weight {weight:.2f}", ha="center", va="center", fontsize=6)
    labels = [f"{e}\n{bias:+.2f}" for e, bias in enumerate(bias_E.tolist())]
    left.set(title=f"score + bias; framed: the {top_k} largest, whose weights are from the scores alone",
             ylabel="token", xlabel="expert, its bias below", xticks=range(experts), xticklabels=labels)
    for balance, style in (("none", "--"), ("sign", "-"), ("quantile", ":")):
        right.plot(loads(lean_E, top_k, balance), style, color=DARK, label=f"balance = {balance}")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(title="busiest expert, tokens over the mean", xlabel="step", ylim=(0, None))
    right.legend(frameon=False)


def loads(lean_E, top_k, balance, steps=100, tokens=4096, rate=1e-2):
    """The busiest expert's tokens over the mean after each step, the router's weights standing still."""
    router = Router(1, len(lean_E), top_k, 1, 1, True, 1.0, balance)
    generator, bias_E, busiest = torch.Generator().manual_seed(0), router.e_score_correction_bias, []
    for _ in range(steps):
        logits_NE = torch.randn(tokens, len(lean_E), generator=generator) + lean_E
        _, chosen_NK, _ = routing.choose(logits_NE, bias_E, top_k)
        counts_E = routing.count_choices(chosen_NK, len(lean_E))
        busiest.append((counts_E.max() / counts_E.float().mean()).item())
        if balance == "sign":
            router.update_bias_(counts_E, rate)
        elif balance == "quantile":
            needed_NE = quantile.needed_biases(logits_NE, bias_E, chosen_NK)
            router.solve_bias_(quantile.histogram(needed_NE, bias_E).long())
    return busiest


# ----------------------------------------------------------------------------- the owner plan

def plan_of(config, ranks):
    """Muon's plan for a model whose parameters are sharded by rows over `ranks`, as FSDP2 cuts them."""
    with torch.device("meta"):
        named = list(K2(config).named_parameters())
    stacks, held = [], [[] for _ in range(ranks)]
    for name, route in route_parameters(named).items():
        p = dict(named)[name]
        if route.optimizer != "muon":
            continue
        stacks.append(Stack(name, p.numel() // (route.rows * p.shape[-1]), route.rows, p.shape[-1]))
        share, per_index = -(-p.shape[0] // ranks), p.shape[1:-1].numel()
        for rank in range(ranks):
            held[rank].append(tuple(min(i * share, p.shape[0]) * per_index for i in (rank, rank + 1)))
    return make_plan(stacks, held)


def draw_owners(figure, ranks=4, layer="model.layers.1."):
    """Left: the matrices of one block, who holds their rows, who orthogonalises them. Right: the work of each rank."""
    plan = plan_of(model_config("debug.py"), ranks)
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    items = [*plan.local, *(item for bucket in plan.buckets for item in bucket)]
    names = [(i, stack) for i, stack in enumerate(plan.stacks) if stack.name.startswith(layer)]
    for y, (i, stack) in enumerate(names):
        total = stack.count * stack.rows
        for low, high, holders in plan.pieces[i]:
            segment(left, y, low / total, (high - low) / total, holders[0])
        for item in (item for item in items if item.stack == i):
            segment(left, y, 1.15 + item.first / stack.count, item.count / stack.count, item.owner)
    left.set(yticks=range(len(names)), xlim=(-0.02, 2.17), xticks=(0.5, 1.65), xticklabels=("rows lie on", "owned by"),
             title=f"one block of configs/debug.py on {ranks} ranks")
    left.set_yticklabels([f"{stack.name.removeprefix(layer).removesuffix('.weight')}  {stack.count} x "
                          f"({stack.rows}, {stack.columns})" for _, stack in names])
    left.invert_yaxis()
    for rank, load in enumerate(plan.loads()):
        right.bar(rank, load / max(plan.loads()), color=RANKS[rank], edgecolor=DARK)
        sent = plan.traffic(rank, 4)[1]
        right.text(rank, load / max(plan.loads()) + 0.02, f"{sent / 2**10:,.0f}", ha="center")
    right.set(title="all blocks: Newton-Schulz work,\nand KiB sent in a step of fp32", ylim=(0, 1.15),
              xticks=range(ranks), xticklabels=[f"rank {rank}" for rank in range(ranks)])


def segment(axis, y, start, width, rank):
    axis.barh(y, width, left=start, height=0.7, color=RANKS[rank], edgecolor=DARK, linewidth=0.6)
    axis.text(start + width / 2, y, str(rank), ha="center", va="center", fontsize=7,
              color="white" if rank < 2 else "black")


PICTURES = {"latent-attention": (draw_latent_attention, (9, 4.1)), "routing": (draw_routing, (9, 3.9)),
            "owners": (draw_owners, (9, 3.6))}


def draw(name, folder):
    """Draw one of PICTURES as an SVG that is the same in every run; returns its path."""
    function, size = PICTURES[name]
    path = Path(folder) / f"{name}.svg"
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=size, layout=None if name == "latent-attention" else "constrained")
        function(figure)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)
    return path


def written_in(path):
    """The texts of a drawn picture: matplotlib leaves each beside its outlines, as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.DOTALL)


def main(argv):
    folder = Path(argv[0] if argv else ROOT / "assets")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        print(draw(name, folder))


if __name__ == "__main__":
    errors.run(main)

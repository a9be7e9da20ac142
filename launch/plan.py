"""What a run will take on GPUs that are not there yet: memory of a rank, bytes between ranks, seconds, days.

    python -m launch.plan configs/k2.py --gpus=2048 --gpu=h200 [--nodes=256] [--tokens=15.5e12] [--key=value ...]

--gpu: a100 h100 h200 h800 b200 gb200 l40s rtx4090 rtx3090. Without --nodes, 8 GPUs on each. What is named of --pp,
--pp_schedule, --dp_replicate, --dp_shard, --ep, --micro_batch_size, --activation_checkpointing and --strategy is kept,
the rest is chosen by predicted speed. --disk: bytes/s that a node writes, of which the time of a save follows. --json:
as JSON, on one line of stdout; --json=FILE: into a file. --rehearse: also build the model as rank 0 of all, on tensors
without memory, and compare what it holds and sends (K2 on 2,048: a minute).

Rates come from one H100 that ran configs/small.py; more than one GPU was never measured. Next: costs.py.
"""

import copy
import dataclasses
import itertools
import math

import errors
import settings
from data.shards import write_json
from errors import UserError, require_place
from launch.costs import DISK, GIB, GPUS, PIECES, Costs, layout_of
from ranks.parallel import check_layout, forward_sizes, split_batch

CHOSEN = ("pp", "pp_schedule", "dp_replicate", "dp_shard", "ep", "micro_batch_size", "activation_checkpointing")
RECOMPUTE = ("none", "selective", "full")
SHOWN = 5  # layouts


@dataclasses.dataclass
class Plan:
    """A layout of n GPUs that fits, and what a step takes there."""
    costs: Costs
    n: int

    def __post_init__(self):
        config = self.costs.config
        self.ranks = self.n // config.pp  # of a stage
        share = config.global_batch_size // self.ranks
        self.micro_batch_size = min(config.micro_batch_size, share)
        self.forwards = share // self.micro_batch_size
        self.layout, self.stages = layout_of(config, self.n), self.costs.stages()
        self.arguments = self.layout, self.ranks, self.micro_batch_size, self.forwards
        self.memory = max((stage.memory(*self.arguments) for stage in self.stages), key=lambda m: sum(m.values()))
        self.fits = self.costs.fits(sum(self.memory.values()))

    def predict(self):
        """Adds seconds and traffic, of the slowest stage, and what follows from them; returns itself."""
        config, total = self.costs.config, lambda seconds: sum(seconds.values())
        slowest = max(self.stages, key=lambda stage: total(stage.step(*self.arguments)))
        self.seconds, self.exchanges = slowest.step(*self.arguments), slowest.traffic(*self.arguments)
        self.step = total(self.seconds)
        rounded = copy.copy(slowest)
        rounded.reduced = 2  # as bf16 would be, which stages refuse
        self.faster = None if config.pp > 1 else self.step - total(rounded.step(*self.arguments))
        self.tokens = config.global_batch_size * config.sequence_length
        self.mfu = total(self.costs.flops) * self.tokens / self.step / self.n / self.costs.gpu.peak
        self.save = self.costs.save(self.memory, self.n)
        return self

    def words(self):
        """The settings of this layout, as on a command line."""
        values = {name: getattr(self.costs.config, name) for name in CHOSEN} | {"dp_shard": self.layout.dp_shard}
        return [f"--{name}={value}" for name, value in values.items() if self.layout.pp > 1 or "pp" not in name]

    def mesh(self):
        """Stages x replicas x shards, as a text."""
        stages, ranks = self.costs.config.pp * self.costs.config.stages_a_rank(), self.costs.config.pp
        return f"{ranks if stages == ranks or ranks == 1 else f'{stages} on {ranks}'} x {self.layout.dp_replicate} x " \
               f"{self.layout.dp_shard}"

    def about(self, tokens):
        """All of it as JSON has it."""
        links = {f"{kind}, {link}": sent for (kind, link), sent in self.costs.links(self.exchanges).items()}
        return {"settings": self.words(), "gpus": self.n, "fits": self.fits, "memory_bytes": self.memory,
                "sent_bytes": links, "exchanges": [dataclasses.asdict(e) for e in self.exchanges],
                "seconds": self.seconds, "step_seconds": self.step, "tokens_per_second": self.tokens / self.step,
                "mfu": self.mfu, "save": self.save,
                "seconds_less_with_bf16_gradients": self.faster, "bottleneck": max(self.seconds, key=self.seconds.get),
                "days": tokens / self.tokens * self.step / 86400}


# ----------------------------------------------------------------------------- the choice

def plans(config, n, gpu, per_node, kept=(), disk=DISK):
    """The Plans of every layout on n GPUs that fits, the fastest first; settings in `kept` stay as config has them."""
    readers = n // config.pp  # ranks that read sequences of their own
    if config.global_batch_size % max(readers, 1):
        raise UserError(f"global_batch_size={config.global_batch_size} must be a multiple of the {readers} GPUs: take "
                        f"--global_batch_size={max(1, round(config.global_batch_size / readers)) * readers}, or fewer "
                        "GPUs")
    layouts = _layouts(config, n, per_node, kept)
    if {"strategy", "pp", "dp_replicate", "dp_shard"} & set(kept) or not layouts:
        check_layout(config, n)
    if not any(_sizes(config, n, changes, kept) for changes in layouts):
        split_batch(config, readers)  # says why
    found = _fitting(config, n, gpu, per_node, kept, disk)
    return sorted((plan.predict() for plan in found), key=lambda plan: plan.step)


def _fitting(config, n, gpu, per_node, kept, disk=DISK):
    """The Plans that fit: of every layout and recompute choice that with the largest forward."""
    costs = Costs(config, gpu, per_node, disk=disk)
    for changes in _layouts(config, n, per_node, kept):
        kinds = [config.activation_checkpointing] if "activation_checkpointing" in kept else RECOMPUTE
        sizes = _sizes(config, n, changes, kept)
        made = lambda size, recompute, changes=changes: \
            Plan(costs.of(micro_batch_size=size, activation_checkpointing=recompute, **changes), n)
        if sizes and made(sizes[-1], kinds[-1]).fits:  # the least that it can need
            for recompute in kinds:
                yield from itertools.islice((plan for size in sizes if (plan := made(size, recompute)).fits), 1)


def _layouts(config, n, per_node, kept):
    """The settings of every mesh of n ranks that check_layout would take. What is not asked for stays apart: stages
    fill nodes, and rows of experts do not leave them."""
    given = lambda name, values: [getattr(config, name)] if name in kept else values  # or what is named
    E, shards = config.n_routed_experts or 1, config.dp_shard if "dp_shard" in kept else None
    one = config.mtp_depth or config.tie_word_embeddings or config.reduce_dtype != "float32"  # as Config.check has it
    found = []
    for pp in given("pp", [pp for pp in (1, 2, 4, 8, 16) if pp == 1 or not one and n // pp >= per_node]):
        for schedule in given("pp_schedule", ["1f1b", "interleaved"] if pp > 1 else ["1f1b"]):
            ranks, stages = {"pp": pp, "pp_schedule": schedule}, pp * (1 + (schedule == "interleaved"))
            if n % pp or config.global_batch_size % (n // pp) or pp > 1 and stages > config.num_hidden_layers:
                continue
            found += [ranks] if config.strategy == "ddp" else [
                ranks | {"dp_replicate": n // pp // S, "dp_shard": S, "ep": ep}
                for S in _divisors(n // pp) if shards in (None, S)
                if n // pp // S in given("dp_replicate", [n // pp // S])
                for ep in _divisors(math.gcd(S, E)) if ep in given("ep", [ep] if ep <= per_node else [])]
    return found


def _sizes(config, n, changes, kept):
    """Sequences of a forward of a layout of n ranks, the most first."""
    config, readers = dataclasses.replace(config, **changes), n // changes["pp"]
    share = config.global_batch_size // readers
    possible = forward_sizes(config, share, readers)
    if "micro_batch_size" in kept:
        return [config.micro_batch_size] if min(config.micro_batch_size, share) in possible else []
    most = max(1, 2**17 // config.sequence_length)
    return [size for size in (64, 32, 16, 8, 4, 2, 1) if size in possible and size <= most]


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def what_would_fit(config, n, name, kept):
    """A sentence for who asked for too little."""
    def some(m, other):
        return config.global_batch_size % m == 0 and any(_fitting(config, m, GPUS[other], 8, {*kept, *least}))
    least = {"micro_batch_size": 1, "activation_checkpointing": "full"}
    config = dataclasses.replace(config, **least, **{"dp_replicate": 1} if "dp_replicate" not in kept else {})
    if "dp_replicate" not in kept:
        least["dp_replicate"] = 1
    would = [f"{m} x {name}" for m in (n * 2**i for i in range(1, 11)) if some(m, name)][:1]
    would += [f"{n} x {other}" for other in GPUS if GPUS[other].memory > GPUS[name].memory and some(n, other)]
    costs = Costs(config)
    needed = min(sum(Plan(costs.of(**changes), n).memory.values()) for changes in _layouts(config, n, 8, kept))
    return (f"it does not fit: one sequence a forward and everything recomputed, a rank needs "
            f"{PIECES * needed / GIB:,.0f} GiB of {GPUS[name].memory / GIB:.0f} at least. What would: "
            + (", ".join(would) or "a smaller model, or another --global_batch_size for more GPUs")
            + (f"; or try without --{' --'.join(sorted(kept))}" if kept else ""))


# ----------------------------------------------------------------------------- the command

def given(argv):
    """(config, what else was asked) of the command-line words."""
    asked, rest = settings.take_words(argv, {"gpus": "1", "gpu": "h100", "nodes": None, "tokens": None, "disk": None,
                                             "json": "", "rehearse": False})
    require_place(asked["json"], "--json")
    config, path = settings.load(rest)
    try:
        n, tokens = int(asked["gpus"]), float(asked["tokens"] or 0) or None
        nodes, asked["disk"] = int(asked["nodes"] or -(-n // 8)), float(asked["disk"] or DISK)
    except ValueError as error:
        raise UserError(f"--gpus, --nodes, --tokens and --disk are numbers: {error}") from error
    if asked["gpu"] not in GPUS:
        raise UserError(f"--gpu={asked['gpu']} is not known; there are {', '.join(GPUS)}")
    if n < 1 or nodes < 1 or n % nodes:
        raise UserError(f"--gpus={n} must be a multiple of --nodes={nodes}, and both at least 1")
    kept = {*CHOSEN, "strategy"} & settings.read_words(rest)[1].keys()
    tokens = tokens or float(config.max_steps * config.global_batch_size * config.sequence_length)
    return config, path, n, nodes, tokens, asked, kept


def main(argv):
    if {"-h", "--help"} & {*argv} or not argv:
        print(__doc__)
        return
    config, path, n, nodes, tokens, asked, kept = given(argv)
    found = plans(config, n, GPUS[asked["gpu"]], n // nodes, kept, asked["disk"])
    if not found:
        raise UserError(f"{path} on {n} x {asked['gpu']}: {what_would_fit(config, n, asked['gpu'], kept)}")
    rehearsed = rehearsal(found[0]) if asked["rehearse"] else None
    if asked["json"]:
        write_json({"config": str(path), "gpu": asked["gpu"], "nodes": nodes, "tokens": tokens,
                    "rates": found[0].costs.gpu.source, "plans": [plan.about(tokens) for plan in found[:SHOWN]],
                    "rehearsed": rehearsed}, asked["json"])
        return
    print("\n".join(table(found, f"{path} on {n:,} x {asked['gpu']}, {nodes:,} node{'s' * (nodes > 1)}", tokens)))
    if rehearsed:
        print(f"\n{'rank 0, a micro-batch a stage':38}{'planned':>21}{'counted':>21}")
    for line in rehearsed or ():
        print("{what:38}{planned:>21,.0f}{counted:>21,.0f}".format(**line))


def table(found, title, tokens):
    """The lines of the terminal: how the layouts compare, and the best one in full."""
    best, gpu = found[0], found[0].costs.gpu
    lines = [title, f"{best.costs.parameters / 1e9:,.2f}B parameters, {best.tokens / 1e6:,.2f}M tokens a step; rates: "
             f"{gpu.source}", "", f"{'step, s':>9}{'MFU':>7}{'GiB':>7}  {'stages x replicas x shards':27}{'ep':>3}"
             f"{'micro-batch':>12}  recompute"]
    lines += [f"{plan.step:9.3f}{plan.mfu:7.1%}{sum(plan.memory.values()) / GIB:7.1f}  {plan.mesh():27}"
              f"{plan.layout.ep:3}{plan.micro_batch_size:12}  {plan.costs.config.activation_checkpointing}"
              for plan in found[:SHOWN]]
    words = best.words()
    lines += ["", "The first of them:", " ".join(words[:-2]), " ".join(words[-2:]), "",
              "a rank's memory at the peak of a step, GiB"]
    lines += [f"  {what:24}{size / GIB:9.2f}" for what, size in sorted(best.memory.items(), key=lambda m: -m[1])]
    total = sum(best.memory.values())
    lines += [f"  {'in all':24}{total / GIB:9.2f}   with the allocator's pieces {PIECES * total / GIB:.1f}, "
              f"of {gpu.memory / GIB:.1f}"]
    if links := best.costs.links(best.exchanges):
        lines += ["", f"{'a rank sends in a step, GB':26}{'NVLink':>12}{'network':>12}"]
        for what in dict.fromkeys(kind for kind, _ in links):
            sizes = [links.get((what, link), 0) / 1e9 for link in ("NVLink", "network")]
            lines.append(f"  {what:24}{sizes[0]:12.3f}{sizes[1]:12.3f}")
        if best.faster is not None:
            lines.append(f"  --reduce_dtype=bfloat16 would save {best.faster:.3f} s of a step")
    lines += ["", "seconds of a step"]
    lines += [f"  {part:32}{spent:10.4f}{spent / best.step:8.1%}" for part, spent in
              sorted(best.seconds.items(), key=lambda item: -item[1]) if spent > 1e-3 * best.step]
    about, config, save = best.about(tokens), best.costs.config, best.save
    lines += [f"  {'in all':32}{best.step:10.4f}   {about['tokens_per_second']:,.0f} tokens/s, MFU {best.mfu:.1%}",
              f"bottleneck: {about['bottleneck']}" + "; but blocks are not compiled" * config.splits_backward(), "",
              f"a save, every {config.save_interval:,} steps: "
              f"{config.save_interval * best.step / 60:,.1f} minutes",
              f"  {'copied into host memory':32}{save['copied'] / 1e9:7.2f} GB a rank, {save['waiting']:.1f} s wait",
              f"  {'written beside the training':32}{save['written'] / 1e9:7.2f} GB a rank, {save['writing']:.1f} s at "
              f"{best.costs.disk / 1e9:.1f} GB/s a node", "", f"{tokens:.3g} tokens: "
              + (f"{about['days']:,.1f} days" if about["days"] >= 2 else f"{24 * about['days']:.1f} hours")]
    return lines


def rehearsal(plan):
    """[{"what", "planned", "counted"}] of an update of rank 0 and one micro-batch, with stages as many as those,
    from the real program."""
    from launch.rehearse import rehearse  # which loads all of train.py
    stage, pp = plan.costs.stage(0), plan.costs.config.pp
    counted = rehearse(plan.costs.config, plan.n, 0, stage, plan.layout)
    planned = {}
    for e in stage.traffic(plan.layout, plan.ranks, plan.micro_batch_size, pp):
        planned[e.operation, e.ranks] = planned.get((e.operation, e.ranks), 0) + e.sent
    held = 4 * sum(stage.local(plan.layout).values())
    lines = [{"what": f"{what}, bytes", "planned": held, "counted": counted[what]}
             for what in ("parameters", "gradients")]
    lines += [{"what": f"{operation} over {ranks}, bytes sent", "planned": planned.get((operation, ranks), 0),
               "counted": counted["sent"].get((operation, ranks), 0)} for operation, ranks in
              sorted(planned.keys() | counted["sent"].keys())]
    return lines


if __name__ == "__main__":
    errors.run(main)

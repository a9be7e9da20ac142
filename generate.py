"""Text from a trained model:  python generate.py out/debug --prompt "def" [--temperature=0.8] [--top_k=50] ...

    python generate.py out/debug --chat                # in the terminal
    python generate.py out/debug --web [out/other]     # a page in the browser, two models side by side
    python generate.py out/debug --prompts=FILE --json # a prompt a line; an object a line

    from generate import load, prompt_box
    model, tokenizer = load("out/debug")      # a run folder, a step folder or an exported Hugging Face directory
    prompt_box("out/debug")                   # in a notebook

Prompts start a document: the end-of-text token is put before them, as in training; without a prompt it stands alone.
Text goes to stdout, notes to stderr. What is done is in talk/, the loops in decoding.py, the choice of a token in
sampling.py.
"""

import contextlib
import functools
import json
import re
import sys
import time

import errors
import sampling
import talk.text
from errors import UserError, existing, require_place
from hf_weights import note
from talk import web
from talk.chat import chat, write
from talk.notebook import prompt_box
from talk.text import complete, encode_prompt, load, stream, stream_text, tell_of_prompt, tell_of_text

__all__ = ["complete", "encode_prompt", "load", "prompt_box", "stream", "stream_text"]


def parse(argv):
    parser = errors.ArgumentParser(prog="python generate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, step folder or exported Hugging Face directory")
    parser.add_argument("--prompt", action="append", help="text to continue, several times if wanted; none: from the "
                        "document start")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts, one a line; - is standard input")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of every prompt")
    parser.add_argument("--batch_size", type=int, default=8, help="texts that are made at once; each is what it is "
                        "alone, but for rounding")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, help="only the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="only the smallest set of tokens with this probability")
    parser.add_argument("--min_p", type=float, help="only tokens with this share of the likeliest one's probability")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: repeats are less likely")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="print every token as it comes")
    parser.add_argument("--json", nargs="?", const="-", metavar="=FILE", help="for scripts: an object a line, with "
                        "prompt, text, tokens, seconds and seed; --json=FILE: into a file, --json: on stdout")
    parser.add_argument("--chat", action="store_true", help="type texts, let the model continue; /help lists commands")
    parser.add_argument("--web", nargs="?", const="", metavar="MODEL", help="a page on this machine's browser, with a "
                        "second model beside the first if one is named")
    parser.add_argument("--port", type=int, help="of the page; 0: any that is free (default 8000)")
    parser.add_argument("--speculative", action="store_true", help="the same greedy text in fewer steps, by the block "
                        "of a model trained with mtp_depth=1; with --temperature=0")
    parser.add_argument("--no_cache", action="store_true", help="recompute the whole context for every token")
    parser.add_argument("--checkpoint", choices=["latest", "best", "ema"], default="latest")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(["--json=-" if word == "--json" else word for word in argv])  # takes no word behind it
    require_place(args.json, "--json")
    args.options = {name: getattr(args, name) for name in sampling.RANGES}
    sampling.check(**args.options)
    asks = args.chat or args.web is not None
    for ok, message in (
            (not (asks and (args.prompt or args.prompts or args.json)), "--chat and --web ask for texts by themselves: "
             "leave --prompt, --prompts and --json out"),
            (not (args.chat and args.web is not None), "--chat and --web: choose one"),
            (args.web is None or not (args.num_samples > 1 or args.stream or args.speculative or args.no_cache),
             "the page makes one text of a model at a time, as it comes: leave --num_samples, --stream, --speculative "
             "and --no_cache out"),
            (args.web is None or args.max_new_tokens <= web.MOST_TOKENS,
             f"--max_new_tokens must be at most {web.MOST_TOKENS:,} for --web"),
            (args.port is None or args.web is not None, "--port is the page's: set --web too"),
            (args.port is None or 0 <= args.port < 2**16, "--port must be 0 to 65535"),
            (not (args.json and (args.stream or args.speculative)), "--json prints whole texts, several made at once: "
             "leave --stream and --speculative out"),
            (not re.search("[\ud800-\udfff]", "".join(args.prompt or [])), "--prompt has bytes that are no text here"),
            (not args.speculative or args.temperature == 0, "--speculative makes greedy text: set --temperature=0"),
            (not args.speculative or (args.repetition_penalty == 1.0 and not args.no_cache),
             "--speculative needs the cache and penalises nothing: leave --no_cache and --repetition_penalty out"),
            *((getattr(args, name) > 0, f"--{name} must be at least 1")
              for name in ("num_samples", "batch_size", "max_new_tokens")),
            (0 <= args.seed <= 2**63 - args.num_samples, "--seed must be 0 or more, and below 2**63 for every sample")):
        if not ok:
            raise UserError(message)
    return args


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.web is not None:
        return web.serve([folder for folder in (args.model, args.web) if folder], args)
    prompts = (args.prompt or []) + (read_prompts(args.prompts) if args.prompts else []) or [""]
    model, encoder = load(args.model, args.device, args.dtype, args.checkpoint)
    talk.text.require_tokenizer(encoder, args.model)
    if args.speculative and not model.config.mtp_depth:
        raise UserError(f"{args.model} has no block of multi-token prediction, with which --speculative drafts: leave "
                        "it out, or train with --mtp_depth=1")
    drafts = []
    options = {"on_draft": drafts.append} if args.speculative else args.options | {"use_cache": not args.no_cache}
    options |= {"max_new_tokens": args.max_new_tokens}
    if args.chat:
        return chat(model, encoder, options | {"seed": args.seed})
    for prompt in prompts:
        tell_of_prompt(model, encoder, prompt, encode_prompt(encoder, prompt))
    wanted = [(prompt, number) for prompt in prompts for number in range(args.num_samples)]
    started, make = time.perf_counter(), one_by_one if args.stream or args.speculative else in_batches
    out = contextlib.nullcontext(sys.stdout) if args.json in (None, "-") else open(args.json, "w", encoding="utf-8")
    with out as into, contextlib.redirect_stdout(into):
        produced = make(model, encoder, wanted, options, args)
    seconds = time.perf_counter() - started
    said = f"; {sum(drafts) / max(len(drafts), 1):.0%} of {len(drafts)} drafts right" if args.speculative else ""
    note(f"{produced} tokens in {seconds:.1f} s, {produced / seconds:.0f} tokens/s{said}")


def read_prompts(name):
    """The lines of a file, or of standard input, that are not blank."""
    try:
        text = (sys.stdin.buffer.read() if name == "-" else existing(
            name, "--prompts takes a file of prompts, one a line, or - for standard input").read_bytes()
        ).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error}") from error
    if not (prompts := [line.removesuffix("\r") for line in text.split("\n") if line.strip()]):
        raise UserError(f"{name} has no prompt, only blank lines")
    return prompts


def one_by_one(model, encoder, wanted, options, args):
    """Print the text of each (prompt, number of the sample) as it comes; returns how many tokens were made."""
    produced = 0
    for prompt, number in wanted:
        print_title(prompt, number, len(wanted))
        print(prompt, end="", flush=True)
        seeded = options | {"seed": args.seed + number}
        produced += len(write(model, encoder, encode_prompt(encoder, prompt), seeded))
    return produced


def in_batches(model, encoder, wanted, options, args):
    """As one_by_one, args.batch_size texts at once; with args.json an object for each."""
    produced = 0
    for first in range(0, len(wanted), args.batch_size):
        batch, slides = wanted[first:first + args.batch_size], []
        seeds = [args.seed + number for _, number in batch]
        answers = complete(model, encoder, [encode_prompt(encoder, prompt) for prompt, _ in batch], seeds=seeds,
                           on_slide=functools.partial(slides.append, 1), **options)
        for (prompt, number), seed, (ids, text, seconds) in zip(batch, seeds, answers):
            if args.json:
                print(json.dumps({"prompt": prompt, "text": text, "tokens": len(ids), "seconds": round(seconds, 3),
                                  "seed": seed}), flush=True)
            else:
                print_title(prompt, number, len(wanted))
                print(prompt + text, flush=True)
        made = [token for ids, _, _ in answers for token in ids]
        tell_of_text(model, encoder, made, slides)
        produced += len(made)
    return produced


def print_title(prompt, number, of):
    if of > 1:
        print(f"--- {prompt!r}, sample {number + 1}")


if __name__ == "__main__":
    errors.run(main)

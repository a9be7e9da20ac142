"""A model in the terminal: a continuation as it comes, and the loop of --chat, which keeps all that was said.

The models are trained on text, not to converse: each answer continues everything before it. On stdout stand the texts
alone, and at a terminal what asks for the next; all that is said about them goes to stderr.
"""

import contextlib
import importlib.util
import sys
import time

import sampling
from errors import UserError, alike, counted
from hf_weights import note
from talk.text import encode_prompt, stream, tell_of_text, token_bytes

HELP = """The model continues your text. It was trained on texts, not to converse: what you type and what it answers is
one text that grows. A line that ends with \\ goes on in the next one; Ctrl-C stops an answer, or drops a line.
  /reset               forgets all
  /history             prints all that the model sees
  /temperature 0.5     also /top_k, /top_p, /min_p, /repetition_penalty, /max_new_tokens, /seed; none switches off;
                       alone, as /seed, tells what it is
  /help                prints this
  /quit or Ctrl-D      ends
A text that starts with / needs a space before it."""
COMMANDS = ["/reset", "/history", "/help", "/quit", *(f"/{name}" for name in sampling.OPTIONS)]


def write(model, encoder, prompt_ids, options, interruptible=False):
    """Print the continuation of a prompt as it comes, and a line end; returns its ids. If interruptible, Ctrl-C ends it
    early."""
    ids, slides = [], []
    try:
        for token, piece in stream(model, encoder, prompt_ids, on_slide=lambda: slides.append(1), **options):
            ids += [token] * (token is not None)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interruptible:
            raise
    print(flush=True)
    tell_of_text(model, encoder, ids, slides)
    return ids


def chat(model, encoder, options):
    """Read a text, stream its continuation, keep both as the context of the next, until /quit."""
    typed = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if typed and importlib.util.find_spec("readline"):
        import readline  # noqa: F401  input() then edits lines, and the arrow keys bring earlier ones back
    history, options = encode_prompt(encoder, ""), dict(options)
    tell("Type a text and the model continues it; it is not trained to converse. /help lists the commands.")
    while True:
        try:
            text = read(*("> ", "... ") if typed else ("", ""))
        except EOFError:
            return print() if typed else None
        except KeyboardInterrupt:  # of a text that is not wanted; an answer's comes to write()
            tell("\n/quit or Ctrl-D leaves")
            continue
        command, _, value = text.strip().partition(" ")
        if command == "/quit":
            return None
        if command == "/reset":
            history = encode_prompt(encoder, "")
            tell("forgotten: the next text stands at the start of a document")
        elif command == "/history":
            print(b"".join(token_bytes(encoder, token) for token in history).decode("utf-8", "replace"))
        elif text.startswith("/") and command[1:] in sampling.OPTIONS.keys() & options.keys():
            try:
                wanted = {command[1:]: number(value)} if value else {}
                sampling.check("/", **wanted)
                options |= wanted
                tell(f"{command} {options[command[1:]]}".replace("None", "none"))
            except UserError as error:
                tell(error)
        elif command[1:] in sampling.OPTIONS and text.startswith("/"):
            tell(f"{command} does not go with --speculative, which makes greedy text: start again without it")
        elif text.startswith("/"):
            tell(HELP if command == "/help" else f"there is no {command}{alike(command, COMMANDS)}\n{HELP}")
        elif text.strip():
            history += encoder.encode_ordinary(text)
            started = time.perf_counter()
            answer = write(model, encoder, history, options, interruptible=True)
            seconds = time.perf_counter() - started
            note(f"{counted(len(answer), 'token')} in {seconds:.1f} s, {len(answer) / seconds:.0f} tokens/s")
            history += answer + encoder.encode_ordinary("\n")


def tell(line):
    print(line, file=sys.stderr, flush=True)


def read(first, further):
    """A text from the terminal: one line, and the next ones after each that ends with a backslash; what asks for them
    stands before them."""
    lines = [input(first)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(input(further))
        except EOFError:
            break
    return "\n".join(lines)


def number(text):
    """The number that a text is, None for none; another text stays one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text == "none" else text

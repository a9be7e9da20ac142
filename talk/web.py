"""The page of `python generate.py out/debug --web [out/other]`, served by Python's standard library; it is page.html.

    GET /  the page     GET /models  what there is, as JSON     POST /generate  a text as it comes, a JSON object a line

Only this machine is listened to, and of its browsers only our own page is heard: a page from elsewhere has another
Origin, or, where its name was made to lead here (DNS rebinding), another Host. Bytes, tokens, texts at a time,
connections and waiting are bounded. A text ends when its reader hangs up, which is what the button Stop does.
"""

import json
import re
import socketserver
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import sampling
from counting import count_parameters
from errors import UserError
from run import checkpoint
from talk.text import encode_prompt, load, require_tokenizer, stream

HERE = "127.0.0.1"
MOST_BYTES, MOST_TOKENS = 2**17, 4096  # of a request, of an answer
MOST_ANSWERS, MOST_CONNECTIONS = 4, 16  # at a time
PATIENCE = 10.0  # seconds that a client may take to send or to read
PAGE = Path(__file__).with_name("page.html")
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cross-Origin-Resource-Policy": "same-origin",
           "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
           "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def serve(paths, args):
    """Serve the page for one or two models until Ctrl-C. args: generate.py's; the page starts with its options."""
    server = Server([Served(path, args) for path in paths], args)
    print(f"http://{HERE}:{server.server_address[1]}/  talks to {' and '.join(paths)}; for this machine's browser; "
          "Ctrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.close()


class Served:
    """A model of the page: of a run folder always the newest complete checkpoint, so the page follows a training."""

    def __init__(self, path, args):
        self.path, self.lock = Path(path), threading.Lock()
        self.arguments = args.device, args.dtype, args.checkpoint
        self.newest = self.model = None
        self.current()

    def current(self):
        """(model, tokenizer), read anew if the run has saved since."""
        with self.lock:
            newest = self.find_newest()
            if self.model is None or newest != self.newest:
                model, encoder = load(self.path, *self.arguments)
                self.model, self.encoder, self.newest = model, require_tokenizer(encoder, self.path), newest
            return self.model, self.encoder

    def find_newest(self):
        """The step folder that a run points to by now; None of what is no run folder."""
        folder = self.path / "checkpoints"
        if self.arguments[-1] == "best":
            return checkpoint.pointed(folder, "best")
        return next(reversed(checkpoint.step_folders(folder)), None)

    def about(self, model):
        """What the page shows of it, as it was read last."""
        total, active = (number / 1e6 for number in count_parameters(model.config))
        step = checkpoint.STEP.search(model.source.name)
        return {"name": str(self.path), "step": step and int(step[1]),
                "parameters": f"{total:,.1f}M parameters, {active:,.1f}M active"}


class Server(socketserver.ThreadingTCPServer):
    """A thread a connection, and no more of them than MOST_CONNECTIONS."""
    allow_reuse_address = daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, models, args):
        self.models = models
        self.defaults = {name: getattr(args, name) for name in ("max_new_tokens", "seed", *sampling.RANGES)}
        self.stopping = threading.Event()
        self.answers, self.connections = (threading.Semaphore(n) for n in (MOST_ANSWERS, MOST_CONNECTIONS))
        port = 8000 if args.port is None else args.port
        try:
            super().__init__((HERE, port), Handler)
        except OSError as error:
            raise UserError(f"port {port} of {HERE} cannot be had ({error.strerror}): try --port={port + 1}, or "
                            "--port=0 for any that is free") from error

    def process_request(self, request, client_address):
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request, client_address):
        """A client that has gone or is too slow is its own affair; all else is a bug and shows its traceback."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            traceback.print_exception(error)

    def close(self):
        """End every answer at its next token."""
        self.stopping.set()
        for _ in range(MOST_ANSWERS):
            self.answers.acquire(timeout=2)
        self.server_close()


class Refused(Exception):
    """(HTTP status, why)"""


class Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version, sys_version = "nanok2", ""

    def do_GET(self):
        self.answer({"/": self.page, "/models": self.models})

    do_HEAD = do_GET  # reply leaves the body out

    def do_POST(self):
        self.answer({"/generate": self.generate})

    def answer(self, by_path):
        try:
            self.refuse_strangers()
            if self.path not in by_path:
                raise Refused(404, f"there is no {self.path[:100]!r} here")
            by_path[self.path]()
        except Refused as refused:
            status, why = refused.args
            self.reply(status, "application/json", json.dumps({"error": why}).encode())

    def refuse_strangers(self):
        """Names of this machine are heard with any port: a tunnel (ssh -L) has one of its own."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", host):
            raise Refused(403, f"this page is for 127.0.0.1 and localhost, not for {host[:100]!r}")
        if origin is not None and origin != f"http://{host}":
            raise Refused(403, f"requests of the page {origin[:100]!r} are not heard")

    def page(self):
        self.reply(200, "text/html; charset=utf-8", PAGE.read_bytes())

    def models(self):
        about = [served.about(served.model) for served in self.server.models]
        body = {"models": about, "defaults": self.server.defaults, "most_tokens": MOST_TOKENS}
        self.reply(200, "application/json", json.dumps(body).encode())

    def reply(self, status, kind, body=None):
        """Headers, and the body unless it comes bit by bit."""
        self.send_response(status)
        for name, value in ({"Content-Type": kind} | HEADERS).items():
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if body is None or self.command == "HEAD" else body)

    def generate(self):
        """Stream what was asked for: {"model"}, {"text"} a token, {"note"}, and {"end", "tokens", "seconds"}."""
        asked = self.asked()
        if not self.server.answers.acquire(blocking=False):
            raise Refused(503, f"{MOST_ANSWERS} texts are being written: stop one, or wait")
        try:
            served = self.server.models[asked.pop("model")]
            try:
                model, encoder = served.current()
                ids = encode_prompt(encoder, asked.pop("prompt"))
            except (UserError, OSError) as error:  # the run has just deleted what was being read
                raise Refused(409, str(error)) from error
            self.reply(200, "application/x-ndjson")
            self.tell({"model": served.about(model)})
            try:
                self.write(model, encoder, ids, asked)
            except UserError as error:
                self.tell({"error": str(error)})
        finally:
            self.server.answers.release()

    def write(self, model, encoder, ids, asked):
        limit, started, produced = model.config.max_position_embeddings, time.perf_counter(), 0
        if len(ids) > limit:
            self.tell({"note": f"the prompt has {len(ids)} tokens: only the last {limit} are read"})
        full = lambda: self.tell({"note": f"the context of {limit} tokens is full: on from its newest half"})
        for token, text in stream(model, encoder, ids, on_slide=full, **asked):
            produced += token is not None
            self.tell({"text": text})
            if self.server.stopping.is_set():
                return
        end = "length" if produced == asked["max_new_tokens"] else "end of text"
        self.tell({"end": end, "tokens": produced, "seconds": round(time.perf_counter() - started, 3)})

    def tell(self, line):
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def asked(self):
        """The checked body of a request: see check."""
        if self.headers.get_content_type() != "application/json":  # which other pages cannot send unasked
            raise Refused(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length):
            raise Refused(411, "send a Content-Length")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"a request may have {MOST_BYTES:,} bytes, this one has {int(length):,}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"no JSON: {error}") from error
        return check(body, self.server.defaults, len(self.server.models))

    def log_message(self, *args):
        """Requests are not told; what fails is."""


def check(body, defaults, n_models):
    """defaults | body, if everything in it has a type and a size that it may have; else Refused."""
    if not isinstance(body, dict) or body.keys() - defaults.keys() - {"model", "prompt"}:
        raise Refused(400, f"expected an object with model, prompt, {', '.join(defaults)}")
    asked = {"model": 0, "prompt": ""} | defaults | body
    prompt = asked["prompt"]
    if not isinstance(prompt, str) or re.search("[\ud800-\udfff]", prompt):
        raise Refused(400, "prompt must be text")
    for name, low, high in (("model", 0, n_models - 1), ("max_new_tokens", 1, MOST_TOKENS)):
        if type(asked[name]) is not int or not low <= asked[name] <= high:
            raise Refused(400, f"{name} must be a whole number from {low} to {high}")
    try:
        sampling.check("", **{name: asked[name] for name in ("seed", *sampling.RANGES)})
    except UserError as error:
        raise Refused(400, str(error)) from error
    return asked

"""Commands in processes of their own, without the seconds of CPU time in which each would import PyTorch:

    process = Process(["train.py", CONFIG], stdout=path)      # as `python train.py CONFIG`; wait(), poll(), kill(), pid

Each is forked from a server that has imported what others wrote, and imports and runs this repository's code as the
interpreter would: with arguments, environment, files, session, signals and exit status of its own. torchrun runs as it
is; the ranks that it starts are forked too. Two servers take turns, so that processes that follow each other, like
ranks side by side, differ in the seed of Python's hashes as they would otherwise.
"""

import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socketserver
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
LIBRARIES = ["numpy", "regex", "tiktoken", "safetensors.torch", "tqdm", "torch", "torch._dynamo",
             "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
             "torch.distributed.run"]
TORCHRUN = "torch.distributed.run"
SERVERS = [multiprocessing.forkserver.ForkServer() for _ in range(2)]
TURNS = itertools.cycle(SERVERS)
LOCK = threading.Lock()
READ_AT_START = ("PYTHON", "LANG", "LC_", "LD_", "OMP_", "TORCH_", "TRITON_")  # variables of interpreter and libraries


def _at_start():
    return {name: value for name, value in os.environ.items() if name.startswith(READ_AT_START)}


STARTED = _at_start()


def environment_changed():
    """Whether an interpreter that started now would meet other variables than the servers did."""
    return _at_start() != STARTED


def start(server, function, *args):
    """A process, forked from this server, that calls function(*args)."""
    server.set_forkserver_preload(LIBRARIES)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args, daemon=True)
    with LOCK, contextlib.ExitStack() as stack:  # the standard library knows one server, and would import our script
        stack.enter_context(patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}))
        for name in ("connect_to_new_process", "get_inherited_fds"):
            stack.enter_context(patch.object(multiprocessing.forkserver, name, getattr(server, name)))
        process.start()
    return process


class Process:
    """What subprocess.Popen([python, *words], cwd=ROOT) would be, as far as tests ask for it. Input and output are
    files. pids: a folder in which every process leaves its pid, and its rank in it if it has one."""

    def __init__(self, words, stdout=os.devnull, stderr=None, stdin=os.devnull, env=None, pids=None):
        files = [str(path) for path in (stdin, stdout, stderr or stdout)]
        environment = dict(os.environ if env is None else env)
        self.process = start(next(TURNS), _command, list(map(str, words)), environment, files, pids)
        self.pid = self.process.pid
        leave_pid(pids, self.pid)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()


def leave_pid(folder, pid, rank=""):
    if folder:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / str(pid)).write_text(rank, encoding="utf-8")


def _command(words, environment, files, pids):
    multiprocessing.current_process()._config["daemon"] = False  # it may have children
    os.setsid()
    for descriptor, path in enumerate(files):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(ROOT)
    if words[:2] == ["-m", TORCHRUN]:
        _fork_ranks(_ranks_of(words), pids)
    _run(words, environment, pids)


def _run(words, environment, pids):
    """What `python WORDS` does once it has imported the libraries."""
    os.environ.clear()
    os.environ.update(environment)
    if "RANK" in os.environ:
        leave_pid(pids, os.getpid(), os.environ["RANK"])
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.orig_argv = [sys.executable, *words]
    sys.argv = words[1:] if words[0] == "-m" else words
    sys.path.insert(0, str(ROOT if words[0] == "-m" else (ROOT / words[0]).parent))
    if words[0] == "-m":
        sys.modules.pop(words[1], None)  # torchrun, of which runpy would say that it is there already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def _ranks_of(words):
    return next(int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node="))


def _fork_ranks(n, pids):
    """The first n processes that torchrun starts from here will be forked; they are made now, before it has threads."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    waiting = [Waiting(pids) for _ in range(n)]
    SubprocessHandler._popen = lambda self, words, environment: waiting.pop(0).run(words, environment)


class Waiting:
    """A child that waits to be told what to run; after that, as much of a subprocess.Popen as torchrun needs."""

    def __init__(self, pids):
        orders, self.orders = multiprocessing.Pipe(duplex=False)
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            leave_pid(pids, self.pid)
            orders.close()
            return
        self.orders.close()
        try:
            words, environment = orders.recv()
        except EOFError:  # torchrun ended before
            os._exit(0)
        os.setsid()
        _run([word for word in words[1:] if word != "-u"], environment, pids)
        os._exit(0)  # not reached by a rank: parallel.run ends it

    def run(self, words, environment):
        self.orders.send((list(words), environment))
        return self

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        deadline = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode


# ---------------------------------------------------------------------- for scripts that start "$PYTHON"

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]).encode() + b"\\n")
    answers = server.makefile()
    pid = int(answers.readline())
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def interpreter(folder):
    """The path of a "python" that has its words run by Process, hands signals on and ends as that does. Processes leave
    their pids in the folder that FORKED_PIDS names."""
    path, address = Path(folder) / "python", str(Path(folder) / "socket")
    path.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    path.chmod(0o755)
    with socketserver.ThreadingUnixStreamServer(address, _Client) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


class _Client(socketserver.StreamRequestHandler):
    def handle(self):
        pid, words, environment = json.loads(self.rfile.readline())
        out, err = (f"/proc/{pid}/fd/{descriptor}" for descriptor in (1, 2))
        process = Process(words, out, err, env=environment, pids=environment.get("FORKED_PIDS"))
        self.wfile.write(f"{process.pid}\n".encode())
        with contextlib.suppress(BrokenPipeError):  # the client was killed
            self.wfile.write(f"{process.wait()}\n".encode())

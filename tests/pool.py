"""Ranks for the tests: four processes, started once by forks.py, that run any function as any number of gloo ranks.

    pool.run(2, function, *args)      # function(*args) on ranks 0 and 1; returns what each returned
"""

import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
import uuid

from tests import forks

WORLD = 4
TIMEOUT = datetime.timedelta(seconds=60)


class Pool:
    def __init__(self):
        self.folder = tempfile.mkdtemp()
        self.pipes, self.processes = {}, {}
        for rank in range(WORLD):
            self._start(rank)

    def _start(self, rank):
        self.pipes[rank], theirs = multiprocessing.Pipe()
        self.processes[rank] = forks.start(forks.SERVERS[rank % 2], _serve, rank, theirs)
        theirs.close()

    def run(self, n, function, *args, **options):
        """function(*args, **options) on n ranks at once; the first error of any rank is raised here with its
        traceback."""
        meeting = f"{self.folder}/{uuid.uuid4()}"
        for rank in range(n):
            self.pipes[rank].send((n, meeting, function, args, options))
        answers = [self._answer(rank) for rank in range(n)]
        failures = [f"rank {rank}: {answer}" for rank, (failed, answer) in enumerate(answers) if failed]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]

    def _answer(self, rank):
        try:
            return self.pipes[rank].recv()
        except EOFError:  # gloo ends a process on some errors; the others of this run see a lost peer
            self._start(rank)
            return True, "the process died"

    def close(self):
        for process in self.processes.values():
            process.kill()


def _serve(rank, pipe):
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_GLOO_LAZY_INIT": "1"}  # as parallel.start
    import torch
    import torch.distributed as dist

    from run import metrics

    metrics.draw_curves = lambda folder: None  # see conftest.py
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    while True:
        n, meeting, function, args, options = pipe.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
        try:
            if n > 1:
                dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=n, timeout=TIMEOUT)
            else:
                del os.environ["RANK"]
            answer = False, function(*args, **options)
        except BaseException as error:  # SystemExit too: the test decides
            answer = True, f"{error!r}\n{traceback.format_exc()}"
        if dist.is_initialized():
            dist.destroy_process_group()
        try:
            pipe.send(answer)
        except Exception as error:  # an answer that cannot be pickled
            pipe.send((True, repr(error)))

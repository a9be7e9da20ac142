"""Fixtures shared by the tests; one thread a process and no network, whatever the machine."""

import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: bitwise comparisons want one thread count
if "KILLS" not in os.environ:
    os.environ["FORKED"] = "1"  # see attempts.py; numbers to publish are those of whole interpreters
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else every process that compiles starts a pool of others
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # and tries out in more processes what the CPU says it can
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before ours are imported
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py", "test_kernel_choice.py"]
elif "TRITON_INTERPRET" in os.environ:
    from tests import interpreter

    interpreter.look_once()

from run import metrics  # noqa: E402
from tests.helpers import make_config, make_data  # noqa: E402
from tests.pool import Pool  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes most of a tiny run's time; the tests that look at curves.png are marked."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(metrics, "draw_curves", lambda folder: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="session")
def pool():
    """Four processes that run functions as 1 to 4 gloo ranks; started by the first test that wants them."""
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture
def config(tmp_path, data):
    """A config file for a tiny run that writes to tmp_path/run."""
    return make_config(tmp_path / "tiny.py", data=str(data), out_dir=str(tmp_path / "run"))

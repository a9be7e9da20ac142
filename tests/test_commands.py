"""bench and launch commands: what they leave, what they refuse, and that one thing that fails hides no other."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time

import pytest

import bench
import errors
from bench import compiled, soak, summary, tokenizing
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def out(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", "")  # set by --out, and taken back
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_results_lie_outside_of_the_checkout_unless_asked(out, capsys):
    bench.command(lambda argv: bench.save("x", {"ratio": 1}), "")([])
    (path,) = (out / "nanok2-bench").glob("*-x.json")
    assert json.loads(path.read_text(encoding="utf-8"))["ratio"] == 1 and str(path) in capsys.readouterr().out
    for words in (["--out", str(out / "a")], [f"--out={out / 'b'}"]):
        bench.command(lambda: bench.save("x", {}), "")(words)
        assert list((out / words[-1].split("=")[-1][-1]).glob("*-x.json"))


def test_a_bench_command_refuses_what_it_does_not_read(capsys):
    bench.command(lambda: 1 / 0, "\nwhat it does\n")(["--help"])
    assert capsys.readouterr().out == "what it does\n"
    with pytest.raises(errors.UserError, match="what is --fast"):
        bench.command(lambda: 1 / 0, "")(["--fast"])
    with pytest.raises(SystemExit) as end:
        bench.command(lambda argv: 3, "")(["word"])
    assert end.value.code == 3
    with pytest.raises(errors.UserError, match="MEGABYTES VOCABULARY"):
        tokenizing.main(["thirty"])
    with pytest.raises(errors.UserError, match="no results in .*--out=FOLDER"):
        summary.main()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton")
def test_another_triton_is_one_line(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def ptxas_failed(function):
        raise subprocess.CalledProcessError(255, "ptxas")

    monkeypatch.setattr(compiled, "launches_of", ptxas_failed)
    with pytest.raises(errors.UserError, match="Triton .* does not compile decode as the one in requirements-dev.txt"):
        compiled.main(["decode"])
    with pytest.raises(errors.UserError, match="no case is called nothing: newton_schulz_small"):
        compiled.main(["nothing"])
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(errors.UserError, match="this needs Triton"):
        compiled.main([])


@pytest.mark.parametrize("code", ["", "raise RuntimeError('no driver')", "__version__ = 1 / 0"])
def test_a_broken_triton_is_one_line(tmp_path, monkeypatch, code):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.UserError, match="this needs Triton .*: pip install -r requirements-dev.txt"):
        compiled.main(["decode"])


def test_the_soak_ends_with_its_time():
    started = time.monotonic()
    with pytest.raises(errors.UserError, match="no disturbed run ended within 0.02 minutes: give more --minutes"):
        soak.main(["--minutes=0.02"])
    assert time.monotonic() - started < 30


def test_what_lint_finds_in_one_file_stops_no_test(tmp_path):
    """test.sh with a stand-in for Python that fails to lint: only what git tracks is linted, and the tests run."""
    log, python = tmp_path / "log", tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" != ruff ]\n', encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, checkout)
    (tmp_path / "venv/.installed-requirements-dev.txt").write_bytes(
        b"".join((checkout / name).read_bytes() for name in ("requirements-dev.txt", "requirements.txt")))
    for name in ("mine.py", "gone.py", "stray.py"):
        (checkout / name).write_text("x = 1\n", encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    subprocess.run(["git", "add", "mine.py", "gone.py"], cwd=checkout, check=True)
    (checkout / "gone.py").unlink()
    done = subprocess.run(["bash", "launch/test.sh", "-k", "some"], cwd=checkout, capture_output=True, encoding="utf-8",
                          env={**os.environ, "VENV": str(tmp_path / "venv")})
    ruff, tests = log.read_text(encoding="utf-8").splitlines()
    assert done.returncode == 1 and ruff == "-m ruff check mine.py"
    assert tests.startswith("-m pytest") and tests.endswith("-k some")

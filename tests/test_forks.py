"""What forks.py starts is like an interpreter that was started: words, environment, files, signals, exit status."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import forks
from tests.helpers import ROOT, run_script

PROBE = """
import json, os, sys
if __name__ == "__main__":
    ours = [name for name in sys.modules if name.split(".")[0] in ("config", "train", "kernels", "data", "tests")]
    print(json.dumps([sys.argv, sys.orig_argv[1:], sys.path[0], os.getcwd(), sys.stdin.read(), os.environ["PROBE"],
                      "GONE" in os.environ, ours, os.getsid(0) == os.getpid(), sys.flags.interactive]))
    print("to stderr", file=sys.stderr)
    sys.exit(int(sys.argv[1]))
"""


def test_a_forked_script_meets_what_a_started_one_meets(tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE", "as it is now")
    monkeypatch.delenv("HOME", raising=False)
    (tmp_path / "probe.py").write_text(PROBE.replace("GONE", "HOME"), encoding="utf-8")
    words = [tmp_path / "probe.py", "7", "two words"]
    forked = run_script(*words, input="given", check=7)
    started = subprocess.run([sys.executable, *words], cwd=ROOT, input="given", capture_output=True, text=True,
                             start_new_session=True)
    assert started.returncode == 7 and forked.stderr == started.stderr == "to stderr\n"
    one, other = json.loads(forked.stdout), json.loads(started.stdout)
    ours = one.pop(7)
    del other[7]
    assert one == other and one[5] == "as it is now" and set(ours) <= {"tests", "tests.forks"}


def test_signals_exit_statuses_and_tracebacks_are_its_own(tmp_path):
    (tmp_path / "sleeps.py").write_text("import time\nprint('here')\ntime.sleep(60)\n", encoding="utf-8")
    process = forks.Process([tmp_path / "sleeps.py"], stdout=tmp_path / "out")
    while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text(encoding="utf-8"):
        time.sleep(0.01)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    (tmp_path / "breaks.py").write_text("1 / 0\n", encoding="utf-8")
    assert "ZeroDivisionError" in run_script(tmp_path / "breaks.py", check=1).stderr


def test_what_an_interpreter_reads_when_it_starts_gets_one(monkeypatch, tmp_path):
    (tmp_path / "mode.py").write_text("import sys\nprint(sys.flags.utf8_mode)\n", encoding="utf-8")
    assert run_script(tmp_path / "mode.py", check=0).stdout == "0\n"
    monkeypatch.setenv("PYTHONUTF8", "1")
    assert run_script(tmp_path / "mode.py", check=0).stdout == "1\n"


@pytest.mark.skipif("PYTHONHASHSEED" in os.environ, reason="one seed for all")
def test_servers_take_turns_and_differ_in_their_hashes(tmp_path):
    (tmp_path / "hash.py").write_text("print(hash('a word'))\n", encoding="utf-8")
    assert run_script(tmp_path / "hash.py").stdout != run_script(tmp_path / "hash.py").stdout

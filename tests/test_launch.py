"""The launch files as far as they can be checked without a cluster, and restarts under real torchrun and real kills."""

import fcntl
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.launcher.api import LaunchConfig

import settings
from muon import SCHEDULE, schedule_factor
from tests import forks
from tests.attempts import words_of
from tests.helpers import ROOT, assert_equal_runs, final_tensors, losses, make_config, run_script, run_train

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def interpreter(tmp_path_factory):
    """For multinode.sh: forked processes (see forks.py), unless KILLS asks for numbers to publish."""
    with forks.interpreter(tmp_path_factory.mktemp("bin")) as path:
        ENVIRONMENT["PYTHON"] = sys.executable if "KILLS" in os.environ else str(path)
        yield


def multinode(*words, **environment):
    """launch/multinode.sh in a process group of its own; it writes to a file, as nobody reads a pipe meanwhile."""
    output = tempfile.TemporaryFile("w+")
    fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)  # forked processes open it for themselves
    words = list(map(str, words))
    out = next((word.split("=", 1)[1] for word in words if word.startswith("--out_dir=")), words[0])
    environment = {"MASTER_PORT": free_port(), **environment}
    environment["FORKED_PIDS"] = f"{out}.pids{environment.get('NODE_RANK', '')}"
    process = subprocess.Popen(
        ["bash", "launch/multinode.sh", *words],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    process.output, process.pids = output, Path(environment["FORKED_PIDS"])
    return process


def finished(process, seconds=240):
    """(status, output); a process that takes longer is killed with all that it started."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.output.seek(0)
        raise AssertionError(f"took longer than {seconds} s:\n{process.output.read()}") from None
    process.output.seek(0)
    return process.returncode, process.output.read()


def workers(out):
    """The pids of the ranks that train into `out`."""
    left = Path(out).parent.glob(f"{Path(out).name}.pids*/*")
    pids = [int(path.name) for path in left if path.read_text(encoding="utf-8") and any(words_of(path.name, "cmdline"))]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "train.py" in words and f"--out_dir={out}" in words and "torch.distributed.run" not in words:  # not forked
            pids.append(int(path.parent.name))
    return pids


def workers_of(launcher, out):
    """Those of workers(out) that a launcher or its children started."""
    parents = lambda pid: int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])

    def belongs(pid):
        while pid > 1 and pid != launcher.pid:
            pid = parents(pid)
        return pid == launcher.pid

    return [pid for pid in workers(out) if (launcher.pids / str(pid)).exists() or belongs(pid)]


def wait_for_step(process, out, step, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (Path(out) / "metrics.jsonl").exists() and any(done >= step for done, _ in losses(out)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came: {finished(process, 5)}")


@pytest.fixture
def slow_config(tmp_path, data):
    """Steps long enough to be hit in the middle."""
    return make_config(tmp_path / "tiny.py", data=str(data), global_batch_size=24, micro_batch_size=4, max_steps=24,
                       save_interval=3, keep_checkpoints=2)


KILLS = int(os.environ.get("KILLS", 1))
STEPS = 6 + 6 * KILLS


@pytest.mark.slow
def test_killed_ranks_do_not_lose_the_run(slow_config, tmp_path, pool):
    """Scorecard 1. A random rank gets SIGKILL at random moments; the job goes on by itself and ends bitwise as an
    undisturbed one on as many ranks."""
    out, rng = tmp_path / "killed", random.Random(0)
    process = multinode(slow_config, f"--out_dir={out}", f"--max_steps={STEPS}")
    restarts = []
    for kill in range(KILLS):
        done = max((step for step, _ in losses(out)), default=0) if (out / "metrics.jsonl").exists() else 0
        wait_for_step(process, out, min(max(done, 3 * kill) + 1 + rng.randrange(3), STEPS - 1))
        time.sleep(rng.random() * 0.3)
        if victims := workers(out):
            killed = time.monotonic()
            os.kill(rng.choice(victims), signal.SIGKILL)
            while set(victims) & set(workers(out)):
                time.sleep(0.05)
                assert time.monotonic() - killed < 60, "the other rank did not end"
            restarts.append(time.monotonic() - killed)
    status, output = finished(process)
    assert status == 0, output
    assert output.count("multinode.sh: torchrun ended") == KILLS, output
    print(f"{KILLS} kills; the other ranks ended within {max(restarts):.1f} s")
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    pool.run(2, run_train, slow_config, f"--out_dir={tmp_path / 'whole'}", f"--max_steps={STEPS}")
    assert_equal_runs(out, tmp_path / "whole")
    assert not workers(out)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_next_start_continues(slow_config, tmp_path):
    """Scorecard 5."""
    out = tmp_path / "run"
    process = multinode(slow_config, f"--out_dir={out}", "--save_interval=0", "--max_steps=500")
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGUSR1)
    status, output = finished(process)
    assert status == 75 and "saved step" in output, output
    step = losses(out)[-1][0]
    assert (out / "checkpoints/latest").read_text().strip() == f"step_{step:08d}"
    status, output = finished(multinode(slow_config, f"--out_dir={out}", f"--max_steps={step + 2}"))
    assert status == 0 and losses(out)[-1][0] == step + 2, output
    assert final_tensors(out)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--resume=OTHER"], ["--overwrite"]], ids=" ".join)
def test_how_a_run_was_to_begin_holds_until_it_has_saved(slow_config, tmp_path, pool, words):
    """A rank dies before the first checkpoint: the next attempt begins as the first did, not from nothing, and not from
    what was to be overwritten."""
    out, other = tmp_path / "run", tmp_path / "other"
    here = other if "--resume=OTHER" in words else out
    pool.run(1, run_train, slow_config, f"--out_dir={here}", "--max_steps=6", "--decay_steps=2", "--save_interval=0")
    words = [word.replace("OTHER", str(other)) for word in words]
    first = 7 if here == other else 1
    process = multinode(slow_config, f"--out_dir={out}", "--max_steps=12", "--decay_steps=2", "--save_interval=0",
                        *words)
    wait_for_step(process, out, 8)
    os.kill(workers(out)[0], signal.SIGKILL)
    status, output = finished(process)
    assert status == 0 and output.count("multinode.sh: torchrun ended") == 1, output
    assert [step for step, _ in losses(out)] == list(range(first, 13))
    assert not list(tmp_path.glob(".launched*"))


@pytest.mark.slow
def test_a_signal_to_everything_at_once_saves_before_the_launcher_ends(slow_config, tmp_path):
    """As SLURM sends it to all processes of a step: torchrun too must live to see its ranks save."""
    out = tmp_path / "run"
    process = multinode(slow_config, f"--out_dir={out}", "--save_interval=0", "--max_steps=500")
    wait_for_step(process, out, 3)
    for pid in workers(out):
        os.kill(pid, signal.SIGUSR1)
    os.killpg(process.pid, signal.SIGUSR1)  # multinode.sh and torchrun
    status, output = finished(process)
    assert status == 75 and not workers(out), output
    assert (out / "checkpoints/latest").read_text().strip() == f"step_{losses(out)[-1][0]:08d}"


@pytest.mark.slow
def test_two_nodes_survive_the_loss_of_a_rank(slow_config, tmp_path):
    """Two launchers as on two nodes, one rank and stage each; a killed one makes both start again and finish."""
    out, port = tmp_path / "run", free_port()
    nodes = [multinode(slow_config, f"--out_dir={out}", "--max_steps=12", "--pp=2", "--pp_schedule=zero_bubble",
                       NNODES="2", NODE_RANK=rank, MASTER_PORT=port, NPROC_PER_NODE="1") for rank in "01"]
    wait_for_step(nodes[0], out, 4)
    os.kill(workers_of(nodes[1], out)[0], signal.SIGKILL)
    for node in nodes:
        status, output = finished(node)
        assert status == 0 and output.count("multinode.sh: torchrun ended") == 1, output
    assert [step for step, _ in losses(out)] == list(range(1, 13)) and not workers(out)


def test_a_mistake_is_refused_once_before_any_rank_starts(slow_config):
    status, output = finished(multinode(slow_config, "--max_stepz=3"), 60)
    assert status == 2 and output.count("did you mean 'max_steps'") == 1 and "Traceback" not in output


def test_a_mistake_that_only_ranks_see_is_not_tried_again(slow_config, tmp_path):
    status, output = finished(multinode(slow_config, "--data=nonexistent", f"--out_dir={tmp_path / 'run'}"))
    assert status == 2 and "nonexistent" in output and "multinode.sh:" not in output, output
    assert not list(tmp_path.glob(".launched*"))


def test_the_launcher_names_itself_with_all_that_it_was_given(tmp_path, monkeypatch):
    """What a rank prints to continue with, pasted elsewhere, starts the same script with the same environment."""
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    python = tmp_path / "a python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$NANOK2_LAUNCHER" > "$LOG"\nexit 1\n', encoding="utf-8")
    python.chmod(0o755)
    given = {"PYTHON": str(python), "NPROC_PER_NODE": "3", "NNODES": "2", "NODE_RANK": "1", "MASTER_PORT": "2951",
             "MASTER_ADDR": "node 7", "MAX_FAILURES": "9", "LOG": str(tmp_path / "log")}
    told = []
    script = shlex.quote(os.path.relpath(ROOT / "launch/multinode.sh", tmp_path))
    for line in (f"bash {script}", None):
        line, environment = (line, given) if line else (told[0], {"LOG": given["LOG"]})
        done = subprocess.run(["bash", "-c", f"{line} x.py"], cwd=tmp_path, env=os.environ | environment)
        assert done.returncode == 2
        told.append((tmp_path / "log").read_text(encoding="utf-8").strip())
    words = shlex.split(told[0])
    assert told[0] == told[1] and words[-2:] == ["bash", str(ROOT / "launch/multinode.sh")]
    assert dict(word.split("=", 1) for word in words[:-2]) == {k: v for k, v in given.items() if k != "LOG"}


@pytest.mark.slow
def test_failures_without_progress_end_the_loop(slow_config, tmp_path):
    config = tmp_path / "dies.py"  # on a rank, without a word
    dies = '"RANK" in __import__("os").environ and __import__("os")._exit(3)'
    config.write_text(f"{Path(slow_config).read_text(encoding='utf-8')}\n{dies}\n", encoding="utf-8")
    status, output = finished(multinode(config, f"--out_dir={tmp_path / 'run'}", MAX_FAILURES="1"), 120)
    assert status == 1 and "giving up" in output


def test_the_readme_command_runs_under_torchrun(slow_config, tmp_path):
    """torchrun itself, as the README writes it, with an end that leaves nothing behind."""
    done = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", slow_config,
                      f"--out_dir={tmp_path / 'run'}", "--max_steps=3", check=0, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout.count("step 3/3") == 1 and "2 ranks, parameters sharded over 2" in done.stdout
    assert not workers(tmp_path / "run")


@pytest.mark.parametrize("words, samples", [
    ([], 2), (["--out_dir=out/my run"], 2), (["--max_steps=3"], 2), (["--data=data/book", "--out_dir=ELSEWHERE"], 1)])
def test_the_quickstart_samples_from_the_run_that_it_made(tmp_path, words, samples):
    """With stand-ins for all but the settings: what it calls, and the folder that its last lines name."""
    venv, log = tmp_path / "venv", tmp_path / "log"
    (venv / "bin").mkdir(parents=True)
    words = [word.replace("ELSEWHERE", str(tmp_path / "elsewhere")) for word in words]
    out = next((word[10:] for word in words if word.startswith("--out_dir=")), "out/debug")
    (venv / "bin/python").write_text(
        f"""#!/usr/bin/env bash
if [ "$2" = settings ]; then exec {shlex.quote(ENVIRONMENT["PYTHON"])} "$@"; fi
for word in "$@"; do printf '<%s>' "$word"; done >> {shlex.quote(str(log))}; echo >> {shlex.quote(str(log))}
"""
    )
    (venv / "bin/python").chmod(0o755)
    requirements = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("requirements*.txt")))
    (venv / ".installed-requirements.txt").write_text(requirements, encoding="utf-8")
    made = ROOT / out
    if made.is_relative_to(tmp_path):  # a run of 450 steps
        for step in (150, 450):
            (made / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    with open(ROOT / "launch/quickstart.sh", encoding="utf-8") as script:
        fcntl.flock(script, fcntl.LOCK_EX)  # these tests share out/debug, on several workers
        existed = made.exists()
        made.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(["bash", "launch/quickstart.sh", *words], cwd=ROOT, capture_output=True, text=True,
                                  env={**os.environ, "VENV": str(venv)}, timeout=120)
        finally:
            if not existed:
                made.rmdir()
    assert done.returncode == 0, done.stderr
    calls = log.read_text(encoding="utf-8").splitlines()
    contest = ["<-m"] * 3 * (not words)
    assert [call.split("><")[0] for call in calls] == ["<-m", "<train.py", *["<generate.py"] * samples, *contest]
    assert all(call.startswith("<-m><bench.verdict><bench/results/") for call in calls[len(calls) - len(contest):])
    assert all(call.split("><")[1] == out for call in calls[2:2 + samples]) and f"in {made}:" in done.stdout
    saved = len(list(made.glob("checkpoints/step_00000[14]50"))) == 2
    assert ("; train longer: " in done.stdout) == saved >= made.is_relative_to(tmp_path)
    if saved:
        told = shlex.split(done.stdout.split("train longer: ")[1].splitlines()[0])
        words = [f"--resume={out}/checkpoints/step_00000150", "--max_steps=900", "--out_dir=out/longer"]
        assert told[1:] == ["train.py", *words]  # from there the rate goes on as it was:
        debug = settings.load([str(ROOT / "configs/debug.py")])[0]
        rate = lambda at, **changes: schedule_factor(at, *map((vars(debug) | changes).get, SCHEDULE))
        assert (debug.save_interval, debug.keep_checkpoints, rate(150), rate(151, max_steps=900)) == (150, 3, 1, 1)


# ---------------------------------------------------------------------- files for clusters


def train_words(text):
    """The arguments of multinode.sh in a script."""
    line = next(line for line in text.splitlines() if "launch/multinode.sh " in line and not line.startswith("#"))
    return shlex.split(line.split("launch/multinode.sh ")[1])


@pytest.fixture
def time_to_save(monkeypatch):
    """The seconds that torchrun gives the ranks of multinode.sh after a signal."""
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    script = (ROOT / "launch/multinode.sh").read_text(encoding="utf-8")
    (export,) = (line for line in script.splitlines() if line.startswith("export ") and f"{name}=" in line)
    told = subprocess.run(["bash", "-c", f"{export}; echo ${name}"], capture_output=True, text=True)
    monkeypatch.setenv(name, told.stdout.strip())
    return LaunchConfig(1, 1, 1).shutdown_timeout


def test_slurm_file(time_to_save):
    text = (ROOT / "launch/slurm.sbatch").read_text()
    subprocess.run(["bash", "-n", ROOT / "launch/slurm.sbatch"], check=True)
    options = dict(line[len("#SBATCH --"):].split("=", 1) if "=" in line else (line[len("#SBATCH --"):], "")
                   for line in text.splitlines() if line.startswith("#SBATCH"))
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"
    assert options["signal"].startswith("B:USR1@") and int(options["signal"].split("@")[1]) >= time_to_save + 60 >= 600
    assert "trap requeue USR1" in text and "scontrol requeue" in text


def test_slurm_file_requeues_with_fake_slurm(tmp_path):
    """The batch script against stand-ins for srun and scontrol: environment, words, USR1, requeue."""
    log = tmp_path / "log"
    (tmp_path / "srun").write_text(
        f"""#!/usr/bin/env bash
trap 'echo saved >> {log}; exit 0' USR1
echo "srun $NNODES $MASTER_ADDR $MASTER_PORT ${{@: -2}}" >> {log}
while true; do sleep 0.05; done
"""
    )
    (tmp_path / "scontrol").write_text(
        f"""#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> {log}; fi
"""
    )
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]",
                   "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", ROOT / "launch/slurm.sbatch", "configs/small.py", "--max_steps=5"],
                               env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert log.read_text().splitlines() == [
        "srun 2 node7 22345 configs/small.py --max_steps=5", "saved", "requeue 12345"]


def test_kubernetes_file(time_to_save):
    jobset = yaml.safe_load((ROOT / "launch/k8s.yaml").read_text())
    assert jobset["apiVersion"].startswith("jobset.x-k8s.io/") and jobset["kind"] == "JobSet"
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert int(environment["NNODES"]["value"]) == job["parallelism"]
    name = jobset["metadata"]["name"]
    assert environment["MASTER_ADDR"]["value"] == f"{name}-{group['name']}-0-0.{name}"
    assert "job-completion-index" in environment["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert int(environment["NPROC_PER_NODE"]["value"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] >= time_to_save + 60 >= 600
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["bash", "launch/multinode.sh"]
    settings.load([str(ROOT / container["args"][0]), *container["args"][1:]])


def test_sky_file():
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    for name in ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"):
        assert name in task["run"]
    words = train_words(task["run"])
    settings.load([str(ROOT / words[0]), *words[1:]])

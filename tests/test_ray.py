"""``replicax launch --engine ray``: the processes of a program on a Ray cluster that the launcher starts."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from launching import EXAMPLE, environment, with_variable

pytestmark = [pytest.mark.long, pytest.mark.one_table, pytest.mark.xdist_group("timed")]

#: Ray's processes find each other where loopback is the only network interface.
ALONE = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]

SUM = """
import numpy as np, jax, replicax
replicax.distributed.initialize()
out = replicax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(np.full(2, 1.0 + jax.process_index(), np.float32))
print(f"sum {np.asarray(out).tolist()} of {jax.process_count()}", flush=True)
"""


@pytest.fixture(scope="module")
def cluster():
    """The environment for a cluster of its own, and a variable that marks all of its processes."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    missing = [name for name in ("unshare", "ip") if shutil.which(name) is None]
    if missing or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow network namespaces")
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="rx", ignore_cleanup_errors=True) as folder:  # sockets need a short path
        more = {"RAY_ADDRESS": "local", "RAY_TMPDIR": folder, "MARK": mark, "RAY_USAGE_STATS_ENABLED": "0"}
        yield environment(**more)


@pytest.fixture
def start(cluster, tmp_path):
    """Starts the launcher with a program."""
    started = []

    def begin(text, *options):
        path = tmp_path / "program.py"
        path.write_text(
            "import os, signal, subprocess, sys, time\n"
            "me, restart = int(os.environ['REPLICAX_PROCESS']), int(os.environ['REPLICAX_RESTART'])\n" + text
        )
        words = [sys.executable, "-m", "replicax_cli", "launch", "--engine", "ray", *map(str, options), str(path)]
        started.append(subprocess.Popen([*ALONE, *words], env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
    assert not left(cluster)


def left(cluster, timeout=30):
    """The processes of a cluster that still run after some time, but for agents of Ray, which end after a minute."""
    end, found = time.monotonic() + timeout, ["?"]
    while found and time.monotonic() < end:
        time.sleep(0.1)
        found = [name_of(process) for process in with_variable(f"MARK={cluster['MARK']}")]
        found = [name for name in found if name and name not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    return found


def name_of(process):
    """The command line of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(process), "cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return ""


def ended(process, timeout=120):
    """The exit status, stdout and stderr."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def test_two_processes_add_up(start):
    status, out, err = ended(start(SUM, "-n", 2, "--devices-per-process", 2))
    assert status == 0, err
    assert "[0] replicax: 2 processes, found by replicax launch, coordinator 127.0.0.1:" in out
    assert {"[0] sum [6.0, 6.0] of 2", "[1] sum [6.0, 6.0] of 2"} <= set(out.splitlines())


def test_all_processes_start_again_when_one_is_killed(start):
    kill = "\nif me == 1 and restart == 0: os.kill(os.getpid(), 9)\nprint(f'done {restart}')"
    status, out, err = ended(start(SUM + kill, "-n", 2, "--max-restarts", 1))
    assert status == 0, err
    assert out.count("sum [") == 4
    assert {"[0] done 1", "[1] done 1"} <= set(out.splitlines())
    assert "process 1 failed: killed by SIGKILL" in err
    assert "restart 1 of 1, with 2 processes" in err


def test_without_a_restart_the_last_lines_of_the_killed_process_come_last(start):
    status, _, err = ended(
        start("print('here', me, flush=True)\nif me: os.kill(os.getpid(), 9)\ntime.sleep(60)", "-n", 2)
    )
    assert status == 137
    assert err.endswith("replicax launch: process 1 failed first: killed by SIGKILL. Its last lines:\nhere 1\n")


def test_an_exit_status_and_every_byte_come_back(start):
    text = """
sys.stdout.buffer.write(b"\\xff\\x00 is no text\\n" + b"".join(b"%d of many\\n" % k for k in range(100_000)))
sys.stdout.flush()
if me: sys.exit(3)
time.sleep(60)
"""
    process = start(text, "-n", 2)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    for k in range(2):
        lines = [line for line in out.split(b"\n") if line.startswith(b"[%d] " % k)]
        assert lines == [b"[%d] \xff\x00 is no text" % k] + [b"[%d] %d of many" % (k, n) for n in range(100_000)]


def test_one_process_goes_on_without_an_actor_that_was_killed(start):
    kill = "\nif me == 1 and restart == 0:\n    os.kill(os.getppid(), 9)\n    time.sleep(60)"
    status, out, err = ended(start(SUM + kill, "-n", 2, "--max-restarts", 1, "--min-processes", 1))
    assert status == 0, err
    assert "the Ray actor of process 1 has died, or its node" in err
    assert "restart 1 of 1, with 1 process\n" in err
    assert "[0] sum [2.0, 2.0] of 1" in out.splitlines()


def test_a_signal_is_passed_on(start):
    text = """
signal.signal(signal.SIGINT, lambda *_: sys.exit(4 if me else 0))
print("ready", flush=True)
time.sleep(60)
"""
    process = start(text, "-n", 2)
    for _ in range(2):
        assert process.stdout.readline().endswith(b"] ready\n")
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process, 30)
    assert status == 4
    assert "got SIGINT, passes it on" in err


def test_nothing_is_left_when_the_launcher_is_killed(start, cluster):
    text = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready", flush=True)
time.sleep(600)
"""
    process = start(text, "-n", 2)
    for _ in range(2):
        assert process.stdout.readline().endswith(b"] ready\n")
    process.kill()
    assert not left(cluster)
    process.communicate()


def refused(tmp_path, *options, **more):
    path = tmp_path / "program.py"
    path.touch()
    words = [sys.executable, "-m", "replicax_cli", "launch", "--engine", "ray", *options, str(path)]
    done = subprocess.run(words, env=environment(**more), capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_the_launcher_says_how_to_install_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('No module named ray', name='ray')")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    expected = "replicax launch: --engine ray needs Ray. Install it: pip install 'replicax[ray]'\n"
    assert refused(tmp_path, PYTHONPATH=paths) == (2, expected)


@pytest.mark.parametrize("option", ["--host", "--log-dir"])
def test_an_option_without_effect_is_refused(option, tmp_path):
    expected = f"replicax launch: {option} cannot be combined with --engine ray\n"
    assert refused(tmp_path, option, "127.0.0.1") == (2, expected)


def test_the_address_of_a_ray_client_is_refused(tmp_path):
    pytest.importorskip("ray")
    status, err = refused(tmp_path, RAY_ADDRESS="ray://127.0.0.1:10001")
    assert status == 2
    assert "RAY_ADDRESS is a Ray client's. Run the launcher on the cluster, by ray job submit." in err


def test_the_example_goes_on_after_a_kill(cluster, tmp_path):
    """The losses of steps that ran again are those of the first time."""
    words = [sys.executable, "-m", "replicax_cli", "launch", "--engine", "ray", "-n", "2", "--max-restarts", "1"]
    words += [str(EXAMPLE), "--steps", "14", "--checkpoints", str(tmp_path)]
    lines = []
    with subprocess.Popen([*ALONE, *words], env=cluster, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line)
            if "step 8 " in line and sum("step 8 " in each for each in lines) == 1:
                second = {*with_variable("REPLICAX_PROCESS=1")} & {*with_variable(f"MARK={cluster['MARK']}")}
                os.kill(next(process for process in second if "worker.py" in name_of(process)), signal.SIGKILL)
    assert running.returncode == 0
    found = [line.split() for line in lines if "] step " in line]
    losses = [(int(words[2]), float(words[4])) for words in found]
    assert {step for step, _ in losses} == set(range(1, 15))
    assert len(losses) > 14
    assert all(a == b for step, a in losses for other, b in losses if step == other)

"""``replicax.distributed``: how processes find each other, how they end, and which rows they load."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import replicax
from replicax.errors import MappedSizeError, NotAnArrayError, OptionTypeError, ProcessesError

HEAD = """
import sys, time
import numpy as np, jax, replicax
replicax.simulate_devices(2)
replicax.distributed.initialize()
p = jax.process_index()
"""
SUM = (
    HEAD
    + """
out = replicax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(np.full(1, 1.0 + p, np.float32))
print(f"sum {np.asarray(out).tolist()} of {jax.process_count()}", flush=True)  # one text, so mpirun cannot split it
"""
)


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(index, number):
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number), "WORLD_SIZE": "2", "RANK": str(index)}


def openmpi(index, number):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{number}.0;tcp://127.0.0.1:{number}",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


def slurm(index, number):
    return {
        "SLURM_JOB_ID": str(number),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


LAUNCHERS = {"torchrun": torchrun, "ompi": openmpi, "slurm": slurm}


def start(code, launcher=torchrun):
    """Two processes that run a script, as a launcher starts them."""
    number = port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | launcher(index, number),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def ended(running, timeout=60):
    """The exit status, stdout and stderr of each process."""
    try:
        found = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, found, strict=True)]


@pytest.mark.few(1)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_recognized(launcher):
    first, second = ended(start(SUM, LAUNCHERS[launcher]))
    for status, out, err in (first, second):
        assert status == 0, err
        assert "sum [3.0] of 2" in out
    assert f"replicax: 2 processes, found by {launcher}, coordinator " in first[1]
    assert "replicax: " not in second[1]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_mpirun_starts_two_processes():
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", SUM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "found by ompi" in done.stdout
    assert done.stdout.count("sum [3.0] of 2") == 2


@pytest.fixture
def hosts():
    """Two network namespaces, each with its own address, as two hosts on one network."""

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0

    names = [f"replicax{os.getpid()}{which}" for which in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        made = shutil.which("ip") is not None and all(ip("netns", "add", name) for name in names)
        ends = ["e0", "netns", names[0], "type", "veth", "peer", "name", "e1", "netns", names[1]]
        if not (made and ip("link", "add", *ends)):
            pytest.skip("this machine does not allow network namespaces")
        for k, (name, address) in enumerate(zip(names, addresses, strict=True)):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", f"e{k}")
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("-n", name, "link", "set", f"e{k}", "up")
        yield names, addresses
    finally:
        for name in names:
            ip("netns", "del", name)


def start_on(hosts, code):
    """One process on each of two hosts, as torchrun starts them."""
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", code],
            env=os.environ | torchrun(index, 4242) | {"MASTER_ADDR": hosts[1][0]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, name in enumerate(hosts[0])
    ]


@pytest.mark.long
def test_two_hosts_connect_over_their_network(hosts):
    for status, out, err in ended(start_on(hosts, SUM)):
        assert status == 0, err
        assert "sum [3.0] of 2" in out


PLAIN_JAX = """
import os, jax, numpy as np
from jax.experimental import multihost_utils
jax.distributed.initialize(os.environ["MASTER_ADDR"] + ":" + os.environ["MASTER_PORT"], 2, int(os.environ["RANK"]))
print("gathered", multihost_utils.process_allgather(np.ones(1)).shape)
"""


@pytest.mark.long
def test_without_replicax_gloo_listens_where_the_name_of_the_host_points(hosts):
    """If this fails, ``use_address`` in ``replicax/_jax/processes.py`` can go."""
    running = start_on(hosts, PLAIN_JAX)
    try:
        out, _ = running[0].communicate(timeout=20)
        assert "gathered" not in out
    except subprocess.TimeoutExpired:  # it waits for the other host
        pass
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_without_a_launcher_there_is_one_process():
    done = subprocess.run([sys.executable, "-c", SUM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "replicax: one process (no launcher found)" in done.stdout
    assert "sum [1.0] of 1" in done.stdout


ENDS = {
    "sys.exit(7)": 7,
    "raise ValueError('no good')": 1,
    "raise KeyboardInterrupt": 130,
    "sys.exit('a word')": 1,
}


@pytest.mark.few(1)
@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_with_its_own_status_beside_one_that_lives(end):
    running = start(HEAD + f"print('here', flush=True)\nif p:\n    {end}\ntime.sleep(60)")
    began = time.monotonic()
    try:
        out, err = running[1].communicate(timeout=40)
        assert running[1].returncode == ENDS[end], err
        assert "here" in out
        assert time.monotonic() - began < 30
        assert running[0].poll() is None
    finally:
        running[0].kill()
        ended(running[:1])


@pytest.mark.long
def test_an_interrupt_ends_all_also_one_that_waits_in_a_collective():
    code = (
        HEAD
        + """
mapped = replicax.pmap(lambda x: jax.lax.psum(x, "i"), "i")
print(mapped(np.ones(2)), flush=True)
if p == 0:
    print(mapped(np.ones(2)))
time.sleep(60)
"""
    )
    running = start(code)
    for process in running:
        while not process.stdout.readline().startswith("[4. 4.]") and process.poll() is None:
            pass
    time.sleep(1)
    for process in running:
        process.send_signal(signal.SIGINT)
    (first, *_), (second, *_) = ended(running, timeout=40)
    assert first != 0
    assert second == 130


@pytest.mark.long
def test_a_status_of_zero_ends_as_usual():
    for status, out, err in ended(start(SUM + "sys.exit(0)")):
        assert (status, "sum [3.0]" in out) == (0, True), err


def test_a_second_call_and_a_late_call():
    replicax.distributed.initialize()  # no launcher: nothing to do, at any time
    assert jax.devices()
    with pytest.raises(ProcessesError, match="must run before JAX starts"):
        replicax.distributed.initialize("127.0.0.1:1", 2, 0)
    with pytest.raises(ProcessesError, match="needs coordinator_address, num_processes and process_id"):
        replicax.distributed.initialize("127.0.0.1:1")


def test_the_replicas_of_one_process_are_all():
    assert replicax.distributed.replicas(12) == range(12)
    with pytest.raises(MappedSizeError, match="must be at least 1, got 0"):
        replicax.distributed.replicas(0)


def test_rows_are_padded_with_the_last():
    tree = {"x": np.arange(6.0).reshape(3, 2), "y": np.arange(3)}
    padded, mask = replicax.distributed.pad_rows(tree, 5)
    np.testing.assert_array_equal(padded["x"], tree["x"][[0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(padded["y"], [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(mask, [True, True, True, False, False])
    empty, mask = replicax.distributed.pad_rows(np.zeros((0, 2), np.int8), 2)
    assert (empty.tolist(), empty.dtype, mask.tolist()) == ([[0, 0]] * 2, np.int8, [False] * 2)


@pytest.mark.parametrize(
    ("tree", "kind", "text"),
    [
        ({"a": np.zeros(3), "b": np.zeros(2)}, MappedSizeError, r"tree\['b'\] of shape \(2,\)"),
        (np.zeros(9), MappedSizeError, r"at most 4:\n  \* tree of shape \(9,\)"),
        (np.float32(1), MappedSizeError, r"tree of shape \(\)"),
        ({}, MappedSizeError, "the tree has no arrays"),
        ("rows", NotAnArrayError, "pad_rows needs concrete arrays"),
    ],
)
def test_rows_that_cannot_be_padded(tree, kind, text):
    with pytest.raises(kind, match=text):
        replicax.distributed.pad_rows(tree, 4)


@pytest.mark.parametrize(
    ("step", "timeout", "says"),
    [
        (1.5, None, "step must be an int, got 1.5"),
        ("one", None, "step must be an int, got 'one'"),
        (1 << 70, None, "step is the number of a step, got 1180591620717411303424"),
        (1, 0, "timeout is the number of seconds until the next step, got 0"),
        (1, "soon", "timeout is the number of seconds until the next step, got 'soon'"),
    ],
)
def test_wrong_heartbeats(step, timeout, says):
    with pytest.raises(OptionTypeError, match=re.escape(says)):
        replicax.distributed.heartbeat(step, timeout=timeout)


def launched(index, number):
    """Two processes of different attempts, at the same port."""
    return {
        "REPLICAX_COORDINATOR": f"127.0.0.1:{number}",
        "REPLICAX_PROCESSES": "2",
        "REPLICAX_PROCESS": str(index),
        "REPLICAX_ATTEMPT": f"attempt-{index}",
    }


@pytest.mark.long
def test_a_process_of_another_attempt_is_refused():
    _, (status, _, err) = ended(start(HEAD + "time.sleep(3)", launched))
    assert status == 1
    assert "Process 1 belongs to attempt attempt-1, but the coordinator at 127.0.0.1:" in err
    assert "belongs to attempt attempt-0: an earlier run still uses that port" in err

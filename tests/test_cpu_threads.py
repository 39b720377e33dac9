"""Asynchronous calls in loops and threads on simulated devices do not hang. Each test runs in its own process."""

import os
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
from jax import lax

import replicax
from replicax import _jax
from replicax._runtime import cpu_threads

needed = pytest.mark.skipif(not _jax.FEW_CPU_THREADS_HANG, reason="this jaxlib has threads enough")

START = {
    "simulate_devices": "import replicax; replicax.simulate_devices(8)",
    "XLA_FLAGS": "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'; import replicax",
    "compat": "import jax, replicax; jax.config.update('jax_num_cpu_devices', 8); replicax.compat.install()",
    "too late": "import jax; jax.config.update('jax_num_cpu_devices', 8); jax.numpy.ones(3); import replicax",
    "again": "import jax, replicax; replicax.simulate_devices(2); jax.numpy.ones(3)\n"
    "import jax.extend; jax.extend.backend.clear_backends(); replicax.simulate_devices(8)",
}

#: Programs that must print only ``True``.
PROGRAMS = {
    "a loop": """
@partial(replicax.pmap, axis_name="i")
def step(w, x):
    w = w - 0.001 * lax.pmean(w - x, "i")
    return w, lax.psum(w, "i")
w, x = np.ones(8, np.float32), np.arange(8, dtype=np.float32)
for _ in range(2000):
    w, total = step(w, x)
expected = 3.5 - 2.5 * 0.999**2000
print(np.allclose(w, expected, rtol=1e-3), np.allclose(total, 8 * expected, rtol=1e-3))
""",
    "results that nobody waits for": """
step = replicax.pmap(lambda x: lax.psum(x, "i"), axis_name="i")
x = jax.block_until_ready(step(np.arange(8.0)))
for _ in range(2000):
    y = step(x)
print(np.array_equal(y, np.full(8, 224)))
""",
    "donation": """
step = replicax.pmap(lambda x: lax.pmean(x, "i") + 1, axis_name="i", donate_argnums=0)
x = step(np.arange(8.0))
for _ in range(2000):
    x = step(x)
print(np.array_equal(x, np.full(8, 2004.5)))
""",
    "ahead of time": """
x = replicax.pmap(lambda x: x)(np.arange(8.0))
step = replicax.pmap(lambda x: lax.psum(x, "i"), axis_name="i").lower(x).compile()
for _ in range(2000):
    y = step(x)
print(np.array_equal(y, np.full(8, 28)))
""",
    "derivatives from outside": """
step = replicax.pmap(lambda x: lax.pmean(jax.numpy.sin(x @ x.T) @ x, "i"), axis_name="i")
x = replicax.pmap(lambda x: x)(np.ones((8, 128, 128), np.float32))
for _ in range(300):
    _, y = jax.jvp(step, (x,), (x,))
print(np.allclose(y, jax.jvp(jax.vmap(step.__wrapped__, axis_name="i"), (x,), (x,))[1], rtol=1e-3))
""",
    "several threads": """
def work(c):
    step = replicax.pmap(lambda x: lax.psum(c * x, "i"), axis_name="i")
    x = jax.device_put(np.arange(8.0), step(np.arange(8.0)).sharding)
    for _ in range(1000):
        y = step(x)
    return np.array_equal(y, np.full(8, 28 * c))
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(work, range(4)))
""",
}


def run(start, *programs, nproc=None):
    """Runs programs in a new process. Returns the words on stdout, and stderr."""
    code = [
        START[start],
        "import jax, numpy as np",
        "from concurrent.futures import ThreadPoolExecutor",
        "from functools import partial",
        "from jax import lax",
        *(PROGRAMS.get(program, program) for program in programs),
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    env |= {"NPROC": nproc} if nproc else {}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split(), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("start", "programs"),
    [
        ("simulate_devices", ["a loop", "results that nobody waits for"]),
        ("simulate_devices", ["several threads"]),
        ("XLA_FLAGS", ["a loop"]),
        ("compat", ["a loop"]),
        ("again", ["a loop"]),
        ("too late", ["a loop", "results that nobody waits for", "donation"]),
        ("too late", ["ahead of time", "derivatives from outside"]),
        ("too late", ["several threads"]),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x),
)
def test_calls_that_run_ahead_do_not_hang(start, programs):
    printed, errors = run(start, *programs)
    assert set(printed) == {"True"}
    warns = _jax.FEW_CPU_THREADS_HANG and start == "too late" and cpu_threads._default_threads() < 16
    assert errors.count("RuntimeWarning") == warns
    assert ("NPROC=64" in errors) == warns


@pytest.mark.long
@needed
def test_the_user_s_number_of_threads_stays():
    printed, errors = run("simulate_devices", "a loop", "import os; print(os.environ['NPROC'])", nproc="8")
    assert printed == ["True", "True", "8"]
    assert "XLA has 8 threads for 8 CPU devices" in errors


@pytest.mark.long
def test_no_other_process_inherits_the_variable_and_a_first_use_by_many_threads():
    program = """
import os, subprocess, sys
with ThreadPoolExecutor(8) as pool:
    print(*{len(devices) for devices in pool.map(lambda _: jax.devices(), range(8))})
print("NPROC" in os.environ)
child = [sys.executable, "-c", "import os; print('NPROC' in os.environ)"]
print(subprocess.run(child, capture_output=True, text=True).stdout)
"""
    assert run("simulate_devices", program)[0] == ["8", "False", "False"]


@pytest.mark.few("simulate_devices-None-64")
@needed
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize(("start", "nproc", "threads"), [("simulate_devices", None, 64), ("too late", "24", 24)])
def test_how_many_threads_there_are(start, nproc, threads):
    program = """
import pathlib
jax.devices()
print(sum(path.read_text().startswith("tf_XLAEigen") for path in pathlib.Path("/proc/self/task").glob("*/comm")))
"""
    cores = len(os.sched_getaffinity(0))
    assert run(start, program, nproc=nproc)[0] == [str(threads if nproc else max(threads, cores))]


@pytest.mark.parametrize(("devices", "threads"), [(2, 16), (8, 64), (128, 1024), (200, 1024), (512, 2048)])
def test_threads_for_many_devices(devices, threads):
    assert cpu_threads.threads_for(devices) == threads


def test_a_jax_that_makes_its_client_elsewhere_is_left_alone(monkeypatch):
    made = lambda make: pytest.fail("called")
    for bridge in (None, types.ModuleType("without factories")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "jax._src.xla_bridge", bridge)
            _jax.make_cpu_client_by(made)
    without_cpu = types.ModuleType("without a CPU")
    vars(without_cpu).update(_backend_factories={})
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", without_cpu)
    _jax.make_cpu_client_by(made)
    assert without_cpu._backend_factories == {}


def test_calls_on_one_device_go_straight_to_cpp():
    mapped = replicax.pmap(lambda x: x + 1, devices=jax.devices()[:1])
    mapped(jax.numpy.ones(3))
    assert mapped.__call__ is mapped._paths[mapped._start]
    spread = replicax.pmap(lambda x: lax.psum(x, "i"), "i")
    spread(np.ones(8))
    assert spread.__call__ is not spread._paths[spread._start]


def test_one_call_waits_while_another_runs_once_several_threads_call(monkeypatch):
    calls = cpu_threads._Calls()
    monkeypatch.setattr(cpu_threads, "_calls", calls)
    mapped = replicax.pmap(lambda x: lax.psum(x, "i"), "i")
    x = mapped(np.ones(8))
    mapped(x)
    mapped(x)
    assert not calls._in_flight
    other = threading.Thread(target=mapped, args=(x,))
    other.start()
    other.join(timeout=30)
    for _ in range(5):
        np.testing.assert_array_equal(mapped(x), np.full(8, 64))
    assert len(calls._in_flight) == 1
    jax.block_until_ready(jax.jit(lambda x: mapped(x))(x))  # a traced call has no arrays to wait for

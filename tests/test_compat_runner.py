"""``python -m replicax.compat``: a program runs as with ``python``, with ``jax.pmap`` replaced."""

import importlib
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile

import pytest

from replicax.compat.__main__ import main as command
from replicax.compat._bootstrap import install_after_jax

SCRIPT = """
import os, sys
assert "jax" not in sys.modules and "replicax" not in sys.modules
os.environ["JAX_ENABLE_X64"] = "1"  # JAX reads it when it is imported
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
{first}
from jax import local_device_count, pmap
import multiprocessing, pickle
import numpy as np

class Mine:
    pass

def child(queue):
    queue.put((pmap.__module__.split(".")[0], local_device_count()))

if __name__ == "__main__":
    assert isinstance(pickle.loads(pickle.dumps(Mine())), sys.modules["__main__"].Mine)
    out = pmap(lambda x: 2 * x)(np.arange(3.0))
    print(pmap.__module__.split(".")[0], out.shape, out.dtype, local_device_count())
    print(sys.argv[1:], os.path.basename(sys.argv[0]), os.path.basename(sys.path[0]))
    if "spawn" in sys.argv:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(queue.get(timeout=60))
        process.join()
    sys.exit(7)
"""


def python(*args, code=7, err="", **env):
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, args)],
        env={k: v for k, v in os.environ.items() if k != "REPLICAX_REPLICAS"} | env,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, err), done.stdout + done.stderr
    return done.stdout


RUNNER = ("-m", "replicax.compat")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("how", "env", "count"),
    [
        (["script.py", "-m", "spawn"], {}, 2),
        (["--replicas", "5", "-m", "script", "-m", "spawn"], {"REPLICAX_REPLICAS": "4"}, 5),
        (["--replicas=5", "script.py"], {}, 5),
        (["script.py"], {"REPLICAX_REPLICAS": "5"}, 5),
    ],
)
def test_a_program_sees_what_it_is_told_to(tmp_path, monkeypatch, how, env, count):
    (tmp_path / "script.py").write_text(SCRIPT.format(first="import jax.numpy"))
    monkeypatch.chdir(tmp_path)
    out = python(*RUNNER, *how, **env).splitlines()
    rest = how[how.index("script.py" if "script.py" in how else "script") + 1 :]
    assert out[:2] == [f"replicax (3,) float64 {count}", f"{rest} script.py {tmp_path.name}"]
    assert out[2:] == (["('jax', 2)"] if "spawn" in how else [])  # a spawned interpreter has plain JAX


@pytest.mark.long
@pytest.mark.parametrize(("how", "env"), [((*RUNNER, "--replicas", "5"), {}), ((), {"REPLICAX_REPLICAS": "5"})])
def test_a_program_may_import_replicax_first_and_install_it_itself(tmp_path, how, env):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(first="import replicax.compat; replicax.compat.install()"))
    assert python(*how, script, **env).startswith("replicax (3,) float64 5\n")


def test_nothing_happens_without_the_runner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import jax, sys\nprint(jax.pmap.__module__)\nassert 'replicax' not in sys.modules\nsys.exit(7)")
    assert python(script, REPLICAX_REPLICAS="5").startswith("jax.")


@pytest.mark.long
def test_what_a_program_leaves_behind_finds_it(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, pickle, jax\nclass Mine: pass\nos.chdir('/')\n"
        "atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Mine()))).__name__, os.path.exists(__file__)))\n"
        "raise SystemExit(7)"
    )
    monkeypatch.chdir(tmp_path)
    assert python(*RUNNER, "script.py") == "Mine True\n"


NAMESPACE = """
import sys, __main__
print({k: v for k, v in vars(__main__).items() if k not in ("__loader__", "__builtins__", "sys", "__main__")})
print(sorted(vars(__main__)), type(__loader__).__name__, sys.argv, sys.path[0])
"""


@pytest.mark.few("link.py")
@pytest.mark.parametrize("program", ["script.py", "folder", "program.zip", "link.py"])
def test_a_program_is_run_as_python_runs_it(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("script.py", "folder/__main__.py"):
        (tmp_path / name).write_text(NAMESPACE)
    with zipfile.ZipFile("program.zip", "w") as archive:
        archive.write("script.py", "__main__.py")
    (tmp_path / "link.py").symlink_to(tmp_path / "folder" / "__main__.py")
    ours, theirs = python(*RUNNER, program, "a", code=0), python(program, "a", code=0)
    assert re.sub("0x[0-9a-f]+", "", ours) == re.sub("0x[0-9a-f]+", "", theirs)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("def f():\n    raise KeyError(3)\nf()", ["script.py"]),
        ("def f():\n    raise KeyError(3)\nf()", ["-m", "script"]),
        ("x = (", ["script.py"]),
        ("import sys\nsys.excepthook = lambda *e: print(e[0], e[2].tb_lineno, file=sys.stderr)\n1 / 0", ["script.py"]),
        ("raise SystemExit('bye')", ["script.py"]),
        ("raise KeyboardInterrupt", ["script.py"]),
    ],
)
def test_a_program_fails_as_under_python(tmp_path, monkeypatch, text, how):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(text)
    theirs = subprocess.run([sys.executable, *how], capture_output=True, encoding="utf-8", check=False)
    python(*RUNNER, *how, code=theirs.returncode, err=theirs.stderr)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [["script.py"], ["-m", "script"]])
def test_a_program_that_is_not_there(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    theirs = subprocess.run([sys.executable, *how], capture_output=True, encoding="utf-8", check=False)
    python(*RUNNER, *how, code=theirs.returncode, err=theirs.stderr)


def test_compiled_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("print(__file__)")
    python("-c", "import py_compile; py_compile.compile('script.py', 'compiled.pyc')", code=0)
    assert python(*RUNNER, "compiled.pyc", code=0) == f"{tmp_path}/compiled.pyc\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "usage: python -m replicax.compat"),
        (["-x"], "replicax.compat: cannot run '-x'\nusage"),
        (["-m"], "replicax.compat: cannot run '-m'\nusage"),
        (["--replicas", "3"], "replicax.compat: the program is missing\nusage"),
        (["--replicas", "0", "a.py"], "--replicas must be the number of devices that the program sees, .* got '0'"),
        (["--replicas=-3", "a.py"], "--replicas must .* got '-3'"),
        (["--replicas", "eight", "a.py"], r"--replicas must .* at least 1, got 'eight'\. Write --replicas 8\."),
        (["--replicas"], "--replicas must .* got ''"),
    ],
)
def test_bad_arguments(capsys, arguments, text):
    assert command(arguments) == 2
    assert re.search(text, capsys.readouterr().err)


def test_help(capsys):
    assert command(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m replicax.compat [--replicas N] SCRIPT")


def test_the_number_in_the_environment_has_to_be_one(monkeypatch, capsys):
    monkeypatch.setenv("REPLICAX_REPLICAS", "many")
    assert command(["a.py"]) == 2
    assert "REPLICAX_REPLICAS must be the number" in capsys.readouterr().err
    monkeypatch.setenv("REPLICAX_REPLICAS", "")
    assert command(["-x"]) == 2
    assert "cannot run '-x'" in capsys.readouterr().err


def test_imports_that_fail_fail_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "jax.py"
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("jax", "replicax")]:
        monkeypatch.delitem(sys.modules, name)
    install_after_jax()
    package.write_text("raise ImportError('no jaxlib')")
    with pytest.raises(ImportError, match="no jaxlib"):
        importlib.import_module("jax")
    package.write_text("too_old = True  # replicax cannot be imported with it")
    before = list(sys.path)
    with pytest.raises(ImportError, match="jax"):
        importlib.import_module("jax")
    assert sys.path == before


def test_the_wheel_installs_the_package_alone():
    root = pathlib.Path(__file__).parents[1]
    targets = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"] == {"packages": ["src/replicax", "src/replicax_cli"]}
    assert not list((root / "src").rglob("*.pth"))


COUNTING = """
    import os
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={devices}"
    import functools, jax, jax.numpy as jnp, numpy as np

    n = jax.local_device_count()
    x = np.random.default_rng(0).normal(size=(5 * n, 3)).astype(np.float32)
    data = {{"x": x.reshape(n, -1, 3), "y": (x @ np.arange(3.0)).astype(np.float32).reshape(n, -1)}}

    def step(w, batch):
        grads = jax.grad(lambda w: jnp.mean((batch["x"] @ w - batch["y"]) ** 2))(w)
        return w - 0.1 * jax.lax.pmean(grads, "i"), jax.lax.axis_index("i")

    mapped = jax.pmap(step, axis_name="i", devices=jax.local_devices())
    w = jax.device_put_replicated(np.zeros(3, np.float32), jax.local_devices())
    batch = jax.device_put_sharded(
        [jax.tree.map(lambda x: x[i], data) for i in range(len(jax.devices()))], jax.devices()
    )
    reference = jnp.zeros((8, 3))
    for _ in range(20):
        w, index = mapped(w, batch)
        reference, _ = jax.vmap(step, axis_name="i")(reference, data)
    np.testing.assert_array_equal(index, np.arange(8))
    np.testing.assert_allclose(w, reference, rtol=1e-5)
    print(n, jax.device_count(), len(w.sharding.device_set))
"""


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_program_for_eight_devices_on_fewer(tmp_path, devices):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(COUNTING.format(devices=devices)))
    assert python(*RUNNER, "--replicas", "8", script, code=0) == f"8 8 {devices}\n"

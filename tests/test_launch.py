"""``replicax launch``: starting, ending, output and exit statuses of processes. Faults in training: test_faults.py."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest

from launching import Launch, environment, launch, with_variable
from replicax_cli import devices


@pytest.fixture
def script(tmp_path):
    """Writes a script, and returns its path."""

    def write(text, name="program.py"):
        path = tmp_path / name
        path.write_text("import os, signal, sys, time\nme = int(os.environ['REPLICAX_PROCESS'])\n" + text)
        return path

    return write


def test_each_process_runs_the_program_as_python_does(script):
    path = script(
        "print(me, __name__, os.path.basename(sys.argv[0]), sys.argv[1:], sys.path[0] == os.path.dirname(__file__))"
    )
    status, text = launch("-n", 3, path, "--lr", "0.1", "-n", "7")
    assert status == 0
    assert sorted(text.splitlines()) == [
        f"[{k}] {k} __main__ program.py ['--lr', '0.1', '-n', '7'] True" for k in range(3)
    ]


def test_a_module_runs_with_m(script, tmp_path):
    script("print(me, __name__, sys.argv[1:])", "some_module.py")
    status, text = launch("-n", 2, "-m", "some_module", "-x", cwd=tmp_path)
    assert (status, sorted(text.splitlines())) == (0, ["[0] 0 __main__ ['-x']", "[1] 1 __main__ ['-x']"])


def test_the_program_finds_neither_jax_nor_the_launcher_imported(script):
    names = ["jax", "replicax", "program", "worker", "replicax_cli"]
    status, text = launch(script(f"print([n for n in {names} if n in sys.modules])"))
    assert (status, text) == (0, "[0] []")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("text", "expected", "says"),
    [
        ("sys.exit(3 * me)", 3, "exit status 3"),
        ("sys.exit('no data' if me else 0)", 1, "no data"),
        ("if me: raise ValueError('bad value')", 1, "ValueError: bad value"),
        ("if me: os.kill(os.getpid(), 9)", 137, "killed by SIGKILL"),
        ("if me: os.abort()", 134, "killed by SIGABRT"),
        ("if me: os._exit(200)", 200, "exit status 200"),
        ("if me: raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_the_status_is_that_of_the_first_process_that_failed(script, text, expected, says):
    status, said = launch("-n", 2, script(f"if not me: time.sleep(0.5)\n{text}"))
    assert status == expected
    assert says in said
    assert "process 1 failed first" in said


def test_the_last_lines_of_the_process_that_failed_first_come_last(script):
    path = script(
        "if me == 1:\n    time.sleep(0.3)\n    print('the cause', file=sys.stderr)\n    sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, lambda *_: [print('a consequence'), sys.exit(6)])\n"
        "for k in range(1000): print('noise', k)\ntime.sleep(60)"
    )
    status, text = launch("-n", 3, path)
    assert status == 5
    assert "a consequence" in text
    assert text.endswith("replicax launch: process 1 failed first: exit status 5. Its last lines:\nthe cause")


@pytest.mark.long
def test_a_process_that_ends_with_0_does_not_end_the_others(script):
    status, text = launch("-n", 2, script("if not me: sys.exit(0)\ntime.sleep(0.7); print('late')"))
    assert (status, text) == (0, "[1] late")


@pytest.mark.long
def test_a_flood_of_output_is_complete_in_order_and_slows_the_process(script):
    path = script("for k in range(100_000): print(k, 'x' * 20)")
    reading = subprocess.Popen(
        [sys.executable, "-m", "replicax_cli", "launch", "-n", "2", str(path)],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    time.sleep(1)  # meanwhile the pipes are full, and nothing is lost
    lines = reading.communicate(timeout=100)[0].decode().splitlines()
    assert reading.returncode == 0
    for k in range(2):
        assert [line for line in lines if line.startswith(f"[{k}]")] == [
            f"[{k}] {n} {'x' * 20}" for n in range(100_000)
        ]


def test_output_may_be_any_bytes(script):
    path = script("sys.stdout.buffer.write(b'\\xff\\xfe\\n' + b'y' * 200_000 + b'\\nend without newline')")
    done = subprocess.run(
        [sys.executable, "-m", "replicax_cli", "launch", str(path)], capture_output=True, env=environment(), check=True
    )
    assert done.stdout.startswith(b"[0] \xff\xfe\n[0] yyy")
    assert done.stdout.count(b"y") == 200_000
    assert done.stdout.endswith(b"\n[0] end without newline\n")


@pytest.mark.long
def test_a_reader_that_leaves_ends_the_program(script):
    command = f"{sys.executable} -m replicax_cli launch {script('while True: print(1)')} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60, env=environment(), check=False)
    assert done.stdout == b"[0] 1\n"


def test_log_files(script, tmp_path):
    path = script("print('out', me, flush=True); print('err', file=sys.stderr); sys.exit(me)")
    status, text = launch("-n", 2, "--max-restarts", 1, "--log-dir", tmp_path / "logs", path)
    assert status == 1
    files = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.log"))
    assert files == [f"logs/attempt-{a}/process-{p}.log" for a in range(2) for p in range(2)]
    assert (tmp_path / files[3]).read_text() == "out 1\nerr\n"
    assert text.endswith("Its last lines:\nout 1\nerr")


def test_restarts_are_counted_and_have_a_new_port_and_name(script):
    path = script(
        "print(*[os.environ[f'REPLICAX_{x}'] for x in ('RESTART', 'COORDINATOR', 'ATTEMPT')]); sys.exit(4 * me)"
    )
    status, text = launch("-n", 2, "--max-restarts", 2, path)
    assert status == 4
    rows = sorted(line.split()[1:] for line in text.splitlines() if line.startswith("["))
    assert [row[0] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert len({row[1] for row in rows}) == len({row[2] for row in rows}) == 3
    assert all(row[1].startswith("127.0.0.1:") for row in rows)
    assert "process 1 failed: exit status 4" in text
    assert "restart 2 of 2, with 2 processes" in text


def test_nobody_else_can_take_the_port(script):
    path = script(
        "import socket\nhost, port = os.environ['REPLICAX_COORDINATOR'].split(':')\n"
        "try:\n    socket.socket().bind((host, int(port)))\nexcept OSError as error:\n    print(error.strerror)"
    )
    assert launch(path) == (0, "[0] Address already in use")


def test_fewer_processes_down_to_the_least(script):
    path = script(
        "print('of', os.environ['REPLICAX_PROCESSES'])\n"
        "if me == 1: os.kill(os.getpid(), 9)\ntime.sleep(0.5)\nsys.exit(1)"
    )
    status, text = launch("-n", 3, "--max-restarts", 3, "--min-processes", 2, path)
    assert status == 137
    assert [line.split("with ")[1] for line in text.splitlines() if "restart" in line] == ["2 processes"] * 3
    assert "[1] of 3" in text
    assert "[0] of 2" in text


def test_a_signal_is_passed_on_and_0_stays_0(script):
    running = Launch(
        "-n", 2, script("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up'); time.sleep(60)")
    )
    running.when("[0] up")
    running.when("[1] up")
    running.process.terminate()
    assert running.wait(10) == 0
    assert "got SIGTERM, passes it on" in running.text


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_a_signal_ends_is_not_restarted(script, number):
    running = Launch("-n", 2, "--max-restarts", 3, script("print('up'); time.sleep(60)"))
    running.when("[0] up")
    running.when("[1] up")
    running.process.send_signal(number)
    assert running.wait(10) == 128 + number
    assert "restart " not in running.text


@pytest.mark.long
def test_other_signals_are_only_passed_on(script):
    running = Launch(script("signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7)); print('up'); time.sleep(60)"))
    running.when("up")
    running.process.send_signal(signal.SIGUSR1)
    assert running.wait(10) == 7


@pytest.mark.long
def test_what_ignores_a_signal_is_killed_after_the_grace_time(script):
    running = Launch("--grace", 1, script("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"))
    running.when("up")
    start = time.monotonic()
    running.process.terminate()
    assert running.wait(10) == 137
    assert 0.9 < time.monotonic() - start < 4
    assert "process 0 has not ended 1 s after SIGTERM: killed" in running.text


@pytest.mark.long
def test_the_second_interrupt_kills(script):
    running = Launch(script("signal.signal(signal.SIGINT, signal.SIG_IGN); print('up'); time.sleep(60)"))
    running.when("up")
    running.process.send_signal(signal.SIGINT)
    running.when("got SIGINT")
    running.process.send_signal(signal.SIGINT)
    assert running.wait(10) == 137


LEAVES_CHILDREN = """
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # in the same process group
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("up")
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("ending", ["time.sleep(0.2)", "sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_no_child_of_the_program_is_left(script, ending):
    mine = f"TEST_RUN={uuid.uuid4()}"
    launch("-n", 2, script(LEAVES_CHILDREN + ending), env=environment(**dict([mine.split("=")])), timeout=30)
    assert with_variable(mine) == []


def test_nothing_is_left_when_the_launcher_is_killed(script):
    mine = f"TEST_RUN={uuid.uuid4()}"
    running = Launch("-n", 2, script(LEAVES_CHILDREN + "time.sleep(600)"), env=environment(**dict([mine.split("=")])))
    running.when("[0] up")
    running.when("[1] up")
    assert len(with_variable(mine)) >= 7
    running.process.kill()
    assert running.wait(10) == -signal.SIGKILL
    end = time.monotonic() + 10
    while with_variable(mine) and time.monotonic() < end:
        time.sleep(0.05)
    assert with_variable(mine) == []


@pytest.mark.long
def test_a_launcher_on_a_terminal(script):
    controller, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "replicax_cli", "launch", "-n", "2", str(script("print('up', sys.stdin.read())"))],
        stdin=terminal, stdout=subprocess.PIPE, env=environment(), timeout=30, check=False,
    )  # fmt: skip
    os.close(controller)
    os.close(terminal)
    assert sorted(done.stdout.split(b"\n")) == [b"", b"[0] up ", b"[1] up "]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("unshare") is None or os.getuid() != 0, reason="needs a namespace of process ids")
def test_a_launcher_as_process_1(script):
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "replicax_cli", "launch", "-n", "2"]
    path = script("print('up', os.getppid())\nos.system('sleep 0.1 &')\ntime.sleep(0.5)\nsys.exit(3 * me)")
    done = subprocess.run([*words, path], capture_output=True, text=True, env=environment(), timeout=60, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine does not allow namespaces of process ids")
    assert done.returncode == 3, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] up 1", "[1] up 1"]


# ---------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "0", "x.py"], "'0' is not an integer of at least 1"),
        (["-n", "two", "x.py"], "'two' is not an integer of at least 1"),
        (["--max-restarts", "-1", "x.py"], "'-1' is not an integer of at least 0"),
        (["--heartbeat", "soon", "x.py"], "'soon' is not a number of seconds"),
        (["-n", "2", "--min-processes", "3", __file__], "--min-processes 3 is more than -n 2"),
        (["there_is_none.py"], "there is no script 'there_is_none.py'"),
        ([], "the program is missing. Example: replicax launch -n 2 train.py"),
        (["-m"], "the program is missing"),
        (["--host", "192.0.2.1", __file__], "--host 192.0.2.1 is not an address of this host"),
    ],
)
def test_mistakes_start_nothing(words, says):
    status, text = launch(*words)
    assert status == 2
    assert says in text


def test_a_script_that_is_not_python_starts_nothing(script):
    status, text = launch("-n", 2, script("def f(:\n"))
    assert status == 1
    assert "SyntaxError" in text
    assert "program.py is not valid Python; no process was started" in text
    assert "[0]" not in text


@pytest.mark.long
def test_a_module_that_does_not_exist():
    status, text = launch("-n", 2, "-m", "there_is_none")
    assert status == 1
    assert "No module named there_is_none" in text


def test_more_gpus_than_there_are(script, monkeypatch):
    monkeypatch.setattr(devices, "_gpus", lambda _: 4)
    with pytest.raises(
        devices.TooFewDevicesError, match="2 processes with 3 GPUs each need 6 GPUs, but this host has 4"
    ):
        devices.shares(2, 3, {})
    with pytest.raises(devices.TooFewDevicesError, match="5 processes with at least 1 GPU each need 5 GPUs"):
        devices.shares(5, None, {})
    assert [x["JAX_LOCAL_DEVICE_IDS"] for x in devices.shares(3, None, {})] == ["0,1", "2", "3"]
    assert [x["JAX_LOCAL_DEVICE_IDS"] for x in devices.shares(2, 2, {})] == ["0,1", "2,3"]


# ---------------------------------------------------------------------------------------------------------------
# Started by another launcher

ALLOCATIONS = {
    "srun": {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
    },
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ALLOCATIONS)
def test_within_another_launcher_it_runs_one_process(tmp_path, engine):
    path = tmp_path / "program.py"
    path.write_text("import os, sys\nprint('one', sys.argv[1:], os.environ.get('JAX_NUM_CPU_DEVICES'))\nsys.exit(4)")
    env = environment(**ALLOCATIONS[engine])
    assert launch("--devices-per-process", 3, path, "a", env=env) == (4, "one ['a'] 3")
    assert launch("-n", 2, path, env=env)[0] == 4
    status, text = launch("-n", 3, path, env=env)
    assert (status, text) == (
        2, f"replicax launch: {engine} has started 2 processes, but -n is 3. Remove -n.",
    )  # fmt: skip
    status, text = launch("--max-restarts", 1, path, env=env)
    assert status == 2
    assert f"--max-restarts has no effect here, because {engine} starts the processes" in text


@pytest.mark.long
def test_within_one_task_of_slurm_it_starts_processes(script):
    env = environment(**ALLOCATIONS["srun"] | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert launch("-n", 2, script("print('up') if me else None"), env=env) == (0, "[1] up")


# ---------------------------------------------------------------------------------------------------------------
# Less common ways to end, and to print


def test_a_process_that_is_stopped_before_its_first_step(script):
    path = script("if me: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)")
    status, text = launch("-n", 2, "--heartbeat", 1, path, timeout=20)
    assert status == 124
    assert "process 1 failed: stopped by SIGSTOP" in text


@pytest.mark.long
def test_a_launcher_that_was_frozen_with_its_processes_ends_none(script):
    text = (
        "import replicax\nfor k in range(8):\n    replicax.distributed.heartbeat(k)\n    print(k)\n    time.sleep(0.3)"
    )
    running = Launch("--heartbeat", 2, script(text))
    running.when("[0] 1")
    (process,) = running.processes(0)
    for each in (running.process.pid, process):
        os.kill(each, signal.SIGSTOP)
    time.sleep(5)
    for each in (process, running.process.pid):
        os.kill(each, signal.SIGCONT)
    assert running.wait(20) == 0, running.text


CONNECTED = "import replicax\nreplicax.distributed.initialize()\n"


@pytest.mark.parametrize("first", ["", pytest.param(CONNECTED, marks=pytest.mark.long)], ids=["alone", "connected"])
@pytest.mark.parametrize("end", ["raise ValueError", "sys.exit(3)"])
def test_files_that_are_open_keep_what_was_written(script, tmp_path, first, end):
    path = script(f"{first}file = open({str(tmp_path / 'rows.csv')!r}, 'w')\nfile.write('row 1\\n')\n{end}")
    assert launch(path)[0] == (1 if "raise" in end else 3)
    assert (tmp_path / "rows.csv").read_text() == "row 1\n"


def test_a_program_that_is_not_connected_ends_as_under_python(script):
    path = script("import atexit\natexit.register(print, 'at exit')\nraise ValueError")
    assert "[0] at exit" in launch(path)[1]


def test_progress_bars_are_passed_on_at_once(script):
    command = [sys.executable, "-m", "replicax_cli", "launch"]
    path = script("for k in range(3): print(k, end='\\r', flush=True)\nprint('done\\r\\nend')")
    done = subprocess.run([*command, path], capture_output=True, env=environment(), timeout=30, check=True)
    assert done.stdout == b"[0] 0\r[0] 1\r[0] 2\r[0] done\r\n[0] end\n"


@pytest.mark.long
def test_a_reader_that_has_left_gets_no_restart(script):
    command = f"{sys.executable} -m replicax_cli launch --max-restarts 3 {script('while True: print(1)')} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60, env=environment(), check=False)
    assert b"restart" not in done.stderr


def test_folders_and_pipes_that_cannot_be_used(script, tmp_path):
    (tmp_path / "file").touch()
    status, text = launch("--log-dir", tmp_path / "file", script("print('up')"))
    assert (status, text) == (2, f"replicax launch: --log-dir {tmp_path / 'file'} cannot be created: File exists")
    status, text = launch("/dev/stdin")
    assert (status, text) == (
        2, "replicax launch: '/dev/stdin' is not a file, and several processes cannot read the same pipe",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("srun: error: node7: task 1: Exited with exit code 7\nsrun: error: node6: task 0: Terminated", 7),
        ("srun: error: node7: tasks 2-3: Killed\nsrun: error: node6: task 0: Exited with exit code 1", 137),
        ("srun: error: node7: task 1: Segmentation fault (core dumped)", 139),
    ],
)
def test_the_status_of_a_slurm_job_is_that_of_the_task_that_failed_first(tmp_path, said, status):
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 143\n")
    srun.chmod(0o755)
    (tmp_path / "program.py").touch()
    env = environment(SLURM_JOB_ID="7", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found, text = launch(tmp_path / "program.py", env=env)
    assert found == status
    assert "srun failed: task" in text

"""Training goes on after a fault: the rows of the table in docs/launch.md."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import faults
from faults import EVERY, HEARTBEAT, STEPS, measure, steps_of, train
from launching import EXAMPLE, environment

pytestmark = [
    pytest.mark.one_table,
    pytest.mark.long,
    pytest.mark.xdist_group("timed"),  # one after the other: each starts several processes, and has limits in seconds
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc"),
]

#: Seconds from a fault to the first new step, with a heartbeat of 10 seconds.
RECOVERY = 30.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of a run without faults, of 60 steps."""
    run = train(tmp_path_factory.mktemp("undisturbed"), steps=60)
    assert run.wait() == 0
    assert sorted(run.losses()) == list(range(1, 61))
    return run.losses()


def assert_losses(found, expected, steps):
    assert sorted(found) == list(range(1, steps + 1))
    assert found == {k: expected[k] for k in found}  # to the last digit: the map of the example is deterministic


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.label.replace(" ", "_"))
def test_a_fault_costs_the_steps_since_the_last_checkpoint(tmp_path, undisturbed, fault):
    row, run = measure(fault, tmp_path)
    assert row.status == 0, run.text
    assert row.detected <= fault.within
    assert row.recovered <= RECOVERY
    assert row.lost <= 2 * EVERY  # a checkpoint that was being written does not count
    assert_losses(run.losses(), undisturbed, STEPS)


def test_sigterm_saves_a_checkpoint_and_ends_with_0(tmp_path):
    row = faults.terminated(tmp_path)
    assert (row.status, row.lost) == (0, 0)
    assert row.recovered <= RECOVERY


def test_sigkill_of_the_launcher_loses_no_checkpoint(tmp_path):
    row = faults.launcher_killed(tmp_path)
    assert row.status == -signal.SIGKILL
    assert row.detected <= faults.AT_ONCE
    assert row.lost <= 2 * EVERY


def kill(run, *indices):
    """Kills processes of the attempt that runs."""
    for index in indices:
        (process,) = run.processes(index)
        os.kill(process, signal.SIGKILL)
    return time.monotonic()


def test_three_kills_in_60_steps(tmp_path, undisturbed):
    run = train(tmp_path, steps=60, options=("--max-restarts", 3))
    at = 0.0
    for step, index in ((13, 1), (31, 0), (47, 1)):
        run.when(f"step {step} ", after=at)
        at = kill(run, index)
        assert run.when("] step ", after=run.when("restart", after=at)) - at <= RECOVERY
    assert run.wait() == 0
    assert_losses(run.losses(), undisturbed, 60)


def test_half_of_the_processes_go_on(tmp_path, undisturbed):
    run = train(tmp_path, n=4, steps=60, options=("--max-restarts", 1, "--min-processes", 1))
    run.when("step 22 ")
    at = kill(run, 0, 3)
    run.when("restart 1 of 1, with 2 processes", after=at)
    assert run.when("] step ", after=run.when("restart", after=at)) - at <= RECOVERY
    assert run.wait() == 0
    assert_losses(run.losses(), undisturbed, 60)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_the_same_script_under_mpirun(tmp_path, undisturbed):
    printed = [sys.executable, "-m", "replicax_cli", "launch", "--print", "mpirun", "-n", "2", str(EXAMPLE)]
    line = subprocess.run(printed, capture_output=True, text=True, check=True, env=environment()).stdout
    assert line.startswith("mpirun -n 2 ")
    words = line.split()
    at = words.index("replicax")
    words[at : at + 1] = [sys.executable, "-m", "replicax_cli"]
    words[1:1] = ["--allow-run-as-root", "--oversubscribe"]
    more = ["--steps", "10", "--checkpoints", str(tmp_path)]
    done = subprocess.run([*words, *more], capture_output=True, text=True, timeout=120, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    losses = {int(x.split()[1]): float(x.split()[3]) for x in done.stdout.splitlines() if x.startswith("step")}
    assert_losses(losses, undisturbed, 10)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints that cannot be used


def test_a_checkpoint_that_is_half_written_is_not_used(tmp_path, undisturbed):
    run = train(tmp_path, steps=10)
    assert run.wait() == 0
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "10", checkpoints / "15.orbax-checkpoint-tmp")
    next((checkpoints / "15.orbax-checkpoint-tmp").rglob("manifest.ocdbt")).unlink()
    run = train(tmp_path, steps=STEPS)
    assert run.wait() == 0
    assert steps_of(run.text) == list(range(11, STEPS + 1))
    assert run.losses() == {k: undisturbed[k] for k in run.losses()}


def test_a_checkpoint_of_another_number_of_replicas_is_refused(tmp_path):
    assert train(tmp_path, steps=5).wait() == 0
    run = train(tmp_path, more=("--replicas", 12))
    assert run.wait() == 1
    assert "has a checkpoint of 8 replicas" in run.text
    assert train(tmp_path, steps=7).wait() == 0  # it is unharmed


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 256 KB."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=False)
    if done.returncode:
        pytest.skip("this machine does not allow mounts")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(full_disk):
    assert train(full_disk, steps=5).wait() == 0
    ballast = full_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(1 << 20))
    run = train(full_disk, options=("--max-restarts", 1))
    assert run.wait() == 1
    assert "No space left" in run.text
    ballast.unlink()
    run = train(full_disk, steps=8)
    assert run.wait() == 0
    assert steps_of(run.text)[0] == 6


def test_heartbeat_without_a_launcher():
    code = "import replicax, time; replicax.distributed.heartbeat(7, timeout=0.5); time.sleep(60)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 124
    assert "replicax: no step for 0.5 seconds after step 7. This process ends with status 124" in done.stderr
    assert "time.sleep" in done.stderr or 'File "<string>", line 1' in done.stderr
    assert time.monotonic() - start < HEARTBEAT

"""Job files and commands that run ``replicax launch`` in a cluster engine: Slurm, JobSet, Open MPI and torchrun."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

#: Seconds between SIGTERM and SIGKILL when nothing else is asked for.
GRACE = 30.0

#: The port of process 0 in a pod. A pod has its own address, so the port is free.
_PORT = 8476

#: JobSet adds "-process-0-", the index of the pod and six characters to the name. A pod name has at most 63 characters.
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Job:
    """A program to run in a cluster engine.

    Attributes:
        processes: The number of processes.
        program: The words of the program: ``("train.py", "--lr", "0.1")`` or ``("-m", "pkg.train", "--lr", "0.1")``.
        devices: The number of devices of each process; on CPUs they are simulated. None leaves it to JAX.
        max_restarts: How many times the engine may restart the processes, all of them together.
        grace: Seconds between SIGTERM and SIGKILL.
        heartbeat: Seconds in which a process must make a step; None for no limit.
    """

    processes: int
    program: tuple[str, ...]
    devices: int | None = None
    max_restarts: int = 0
    grace: float = GRACE
    heartbeat: float | None = None

    @property
    def name(self) -> str:
        """The name of the script or module as a DNS label: lower-case letters, digits and hyphens, a letter first."""
        script = self.program[1] if self.program[0] == "-m" else PurePath(self.program[0]).stem
        name = re.sub("[^a-z0-9]+", "-", script.lower()).strip("-")
        if not name[:1].isalpha():
            name = f"job-{name}"
        return name[:_LONGEST_NAME].rstrip("-")

    @property
    def command(self) -> list[str]:
        """The words of the command of one process."""
        return ["replicax", "launch", *self.options, *self.program]

    @property
    def options(self) -> list[str]:
        """The options of that command."""
        each = [] if self.devices is None else ["--devices-per-process", str(self.devices)]
        beat = [] if self.heartbeat is None else ["--heartbeat", _number(self.heartbeat)]
        return [*each, *beat]


# ---------------------------------------------------------------------------------------------------------------
# Slurm


def slurm(job: Job) -> str:
    """Returns a file for sbatch. ``replicax launch`` in it starts the processes with srun, and restarts them."""
    options = ["--max-restarts", str(job.max_restarts), "--grace", _number(job.grace), *job.options]
    lines = [
        "#!/bin/bash",
        "# Add the options that your cluster needs, such as --partition, --account and --time. Then: sbatch FILE",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --ntasks={job.processes}",
        *_slurm_signal(job),
        *_slurm_requeue(job),
        "# Remove the first # of a line to use it:",
        "##SBATCH --cpus-per-task=8",
        f"##SBATCH --gpus-per-task={job.devices or 1}",
        "",
        *_slurm_gpus(job),
        "# Since Slurm 22.05, srun does not read --cpus-per-task of sbatch.",
        'if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
        f"exec {shlex.join(['replicax', 'launch', *options, *job.program])}",
    ]
    return "\n".join(lines)


def _slurm_gpus(job: Job) -> list[str]:
    """Tells JAX the GPUs of a task. By default it takes the one with the index of the task on its node."""
    own = ",".join(map(str, range(job.devices or 1)))
    return [
        "# With --gpus-per-task, each task counts its own GPUs from 0.",
        f'if [ -n "$SLURM_GPUS_PER_TASK" ]; then export JAX_LOCAL_DEVICE_IDS={own}; fi',
    ]


def _slurm_signal(job: Job) -> list[str]:
    """Has Slurm send SIGTERM to the launcher, which is the batch shell (B:). A file cannot set KillWait."""
    seconds = math.ceil(job.grace)
    if not seconds:
        return []
    return [
        f"# SIGTERM comes {seconds} s before the time limit, or up to 60 s earlier. After scancel, the time",
        "# between SIGTERM and SIGKILL is the KillWait of the cluster.",
        f"#SBATCH --signal=B:TERM@{seconds}",
    ]


def _slurm_requeue(job: Job) -> list[str]:
    """Has Slurm run the file again where the launcher in it cannot restart anything, since it is gone itself."""
    if not job.max_restarts:
        return []
    return [
        "# Slurm starts the job again when a node fails, also after the last restart by replicax launch.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    ]


# ---------------------------------------------------------------------------------------------------------------
# JobSet


def jobset(job: Job) -> str:
    """Returns a manifest of a JobSet for Kubernetes, see https://jobset.sigs.k8s.io: a pod for each process."""
    # Pod 0 has the host name <JobSet>-<job>-<its index>-<pod index>.<subdomain>.
    # The subdomain is the name of the JobSet, unless it is set.
    coordinator = f"{job.name}-process-0-0.{job.name}:{_PORT}"
    values = {"REPLICAX_COORDINATOR": coordinator, "REPLICAX_PROCESSES": str(job.processes)}
    annotations = {
        "REPLICAX_PROCESS": "batch.kubernetes.io/job-completion-index",
        "REPLICAX_ATTEMPT": "jobset.sigs.k8s.io/restart-attempt",
        "REPLICAX_RESTART": "jobset.sigs.k8s.io/restart-attempt",
    }
    lines = [
        "# Replace IMAGE by a container image with the program and replicax. Then: kubectl apply -f FILE",
        "apiVersion: jobset.x-k8s.io/v1alpha2",
        "kind: JobSet",
        "metadata:",
        f"  name: {_quoted(job.name)}",
        "spec:",
        "  network:",
        "    enableDNSHostnames: true",
        "  failurePolicy:",
        f"    maxRestarts: {job.max_restarts}",
        "  replicatedJobs:",
        "  - name: process",
        "    replicas: 1",
        "    template:",
        "      spec:",
        f"        parallelism: {job.processes}",
        f"        completions: {job.processes}",
        "        completionMode: Indexed",
        "        backoffLimit: 0",
        "        template:",
        "          spec:",
        "            restartPolicy: Never",
        "            # Process 1 would ignore SIGTERM, unless the program handles it.",
        "            shareProcessNamespace: true",
        f"            terminationGracePeriodSeconds: {math.ceil(job.grace)}",
        "            containers:",
        "            - name: program",
        "              image: IMAGE",
        "              command:",
        *[f"              - {_quoted(_unexpanded(word))}" for word in job.command],
        "              env:",
        *[line for name, value in values.items() for line in _variable(name, f"value: {_quoted(value)}")],
        *[line for name, key in annotations.items() for line in _variable(name, *_from_annotation(key))],
        "              # With GPUs:",
        "              # resources:",
        "              #   limits:",
        f"              #     nvidia.com/gpu: {job.devices or 1}",
    ]
    return "\n".join(lines)


def _variable(name: str, *value: str) -> list[str]:
    return [f"              - name: {name}", *[f"                {line}" for line in value]]


def _from_annotation(key: str) -> list[str]:
    path = _quoted(f"metadata.annotations['{key}']")
    return ["valueFrom:", "  fieldRef:", f"    fieldPath: {path}"]


def _unexpanded(word: str) -> str:
    """Escapes a word of a command: Kubernetes replaces $(NAME) by a variable, and $$ by $."""
    return word.replace("$", "$$")


def _quoted(text: str) -> str:
    """A text as a string of YAML. It has no pairs of surrogates, so characters beyond U+FFFF stand for themselves."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() or ord(c) > 0xFFFF else f"\\u{ord(c):04x}" for c in escaped)


# ---------------------------------------------------------------------------------------------------------------
# Commands


def mpirun(job: Job) -> str:
    """Returns a command of Open MPI.

    Raises:
        ValueError: The job has options that ``mpirun`` does not have.
    """
    if job.max_restarts:
        raise ValueError(
            "mpirun cannot restart processes: leave out --max-restarts, or use --print slurm, jobset or torchrun"
        )
    # odls_base_sigkill_timeout also delays SIGTERM by the same time (seen in Open MPI 4.1.4).
    _refuse_grace(job, "mpirun", "1 second")
    # By default, each of two processes may use one core only, and XLA starts one thread.
    options = ["-n", str(job.processes), "--bind-to", "none"]
    return shlex.join(["mpirun", *options, *job.command])


def torchrun(job: Job) -> str:
    """Returns a command of torchrun, for processes on one machine.

    Raises:
        ValueError: The job has options that ``torchrun`` does not have.
    """
    _refuse_grace(job, "torchrun", "30 seconds")
    options = ["--standalone", "--nproc-per-node", str(job.processes), "--max-restarts", str(job.max_restarts)]
    return shlex.join(["torchrun", *options, "--no-python", *job.command])


def _refuse_grace(job: Job, engine: str, own: str) -> None:
    if job.grace != GRACE:
        raise ValueError(
            f"{engine} always sends SIGKILL {own} after SIGTERM: leave out --grace, or use --print slurm or jobset"
        )


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


#: What ``--print`` takes: the name of an engine, and the function that returns the text.
FORMATS: Mapping[str, Callable[[Job], str]] = {
    "slurm": slurm,
    "jobset": jobset,
    "mpirun": mpirun,
    "torchrun": torchrun,
}

"""Finds the engine that has started this process: Slurm, Open MPI, torchrun, or a job file of ``--print``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """What an engine has started.

    Attributes:
        engine: The name of the engine, for messages.
        processes: The number of processes that it has started.
    """

    engine: str
    processes: int


#: For each engine the variable with the number of processes, and those that must be there, too.
_ENGINES = {
    "a job file": ("REPLICAX_PROCESSES", ("REPLICAX_PROCESS", "REPLICAX_COORDINATOR")),
    "torchrun": ("WORLD_SIZE", ("RANK", "MASTER_ADDR", "MASTER_PORT")),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_RANK",)),
    "srun": ("SLURM_STEP_NUM_TASKS", ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST")),
}

#: The step that Slurm starts for the shell of ``salloc``.
_INTERACTIVE = "4294967290"


def find(environment: Mapping[str, str]) -> Allocation | None:
    """The allocation that this process is one of; None if no engine has started it."""
    if in_batch_script(environment):
        return None
    for engine, (count, others) in _ENGINES.items():
        if {count, *others} <= environment.keys() and environment[count].isdigit():
            return Allocation(engine, int(environment[count]))
    return None


def in_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether this is the script or the shell of a Slurm job, which starts its processes with ``srun``."""
    step = environment.get("SLURM_STEP_ID", _INTERACTIVE)
    return "SLURM_JOB_ID" in environment and step == _INTERACTIVE

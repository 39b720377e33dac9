"""The benchmark cases: one module per group, in the order of the table."""

from cases import (
    compile_time,
    deterministic,
    dispatch,
    gpu,
    inputs,
    lanes,
    launch,
    peers,
    processes,
    results,
    throughput,
)

#: Each module has a function ``cases(quick: bool) -> list[Case]``.
GROUPS = {
    "dispatch": dispatch,
    "inputs": inputs,
    "results": results,
    "compile": compile_time,
    "throughput": throughput,
    "peers": peers,
    "processes": processes,
    "lanes": lanes,
    "deterministic": deterministic,
    "launch": launch,
    "gpu": gpu,
}

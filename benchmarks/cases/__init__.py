"""The cases, a module for each group, in the order of the table."""

from cases import compile_time, dispatch, gpu, inputs, peers, results, throughput

#: Each has ``cases(quick: bool) -> list[Case]``.
GROUPS = {
    "dispatch": dispatch,
    "inputs": inputs,
    "results": results,
    "compile": compile_time,
    "throughput": throughput,
    "peers": peers,
    "gpu": gpu,
}

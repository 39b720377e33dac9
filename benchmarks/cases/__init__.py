"""The cases, a module for each group, in the order of the table."""

from cases import dispatch, inputs, results, throughput

#: Each has ``cases(quick: bool) -> list[Case]``.
GROUPS = {"dispatch": dispatch, "inputs": inputs, "results": results, "throughput": throughput}

"""Options of the compiler."""

#: The options with which XLA compiles the loop over lanes to the same bits for one device and for several (CPU, JAX
#: 0.10 and 0.12). XLA must not run two of its passes:
#:
#: - ``cse``. For several devices, it runs once more, before the algebraic simplifier, whose rules depend on how often a
#:   value is used.
#: - ``small-while-loop-hoisting``. It compiles a loop over a few KB as one kernel, so LLVM unrolls it for the number of
#:   lanes, and then contracts other products and sums. And whether a loop is small depends on the number of lanes.
SAME_BITS = {"xla_disable_hlo_passes": "cse,small-while-loop-hoisting"}

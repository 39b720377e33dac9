"""Options of the compiler."""

#: The options with which XLA compiles the loop over lanes to the same bits for one device and for several (CPU, JAX
#: 0.10 and 0.12). XLA must not run its pass ``cse``: for several devices, it runs once more, before the algebraic
#: simplifier, whose rules depend on how often a value is used.
SAME_BITS = {"xla_disable_hlo_passes": "cse"}

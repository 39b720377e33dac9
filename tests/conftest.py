"""Eight simulated devices for every test, and code that is compiled quickly rather than well."""

import os

# LLVM's optimizations take half of the time that the suite compiles; what XLA makes of a program stays the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import replicax

replicax.simulate_devices(8)

"""From a call to results: signature, program, executable, moving of inputs, programs ahead of time."""

"""Runs a program under ``replicax launch``, and makes one fault in one process of its first attempt.

``replicax launch … faulty.py FAULT PROCESS program.py …``. The faults happen in what the program calls, so the program
itself is unchanged.
"""

import logging
import os
import runpy
import signal
import socket
import sys
import threading
import time

STEP = 12  # after the checkpoint of step 10


def note():
    print("FAULT", fault, flush=True)


def die():
    note()
    os.kill(os.getpid(), signal.SIGKILL)


def at_step():
    if fault == "killed":
        die()
    if fault == "killed while the others wait for it in a collective":
        time.sleep(1)
        die()
    note()
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "endless loop":
        while True:
            pass
    if fault == "exception":
        raise ValueError("a fault")
    if fault == "exit status 3":
        sys.exit(3)
    if fault == "exit status 0 before the others":
        sys.exit(0)


def faulty_heartbeat(step, **options):
    heartbeat(step, **options)
    if step == STEP:
        at_step()


def faulty_initialize(**options):
    if fault == "killed while connecting":
        threading.Timer(0.2, die).start()
        time.sleep(0.5)  # the other process is already waiting for this one
    if fault == "port taken":
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        os.environ["REPLICAX_COORDINATOR"] = f"127.0.0.1:{taken.getsockname()[1]}"
        note()
    initialize(**options)


class Dying(logging.Handler):
    """Dies when JAX compiles the training step."""

    def emit(self, record):
        if "Compiling" in record.getMessage() and "train_step" in record.getMessage():
            threading.Timer(0.02, die).start()


if __name__ == "__main__":
    fault, process, *program = sys.argv[1:]
    if os.environ["REPLICAX_RESTART"] == "0" and os.environ["REPLICAX_PROCESS"] == process:
        import jax

        import replicax

        heartbeat, initialize = replicax.distributed.heartbeat, replicax.distributed.initialize
        vars(replicax.distributed).update(heartbeat=faulty_heartbeat, initialize=faulty_initialize)
        if fault == "killed while compiling":
            jax.config.update("jax_log_compiles", True)
            logging.getLogger("jax").addHandler(Dying())

    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")

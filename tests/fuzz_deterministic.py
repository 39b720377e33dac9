"""Compares the bits of random programs on several numbers of devices, with ``deterministic=True``.

``python tests/fuzz_deterministic.py SEED PROGRAMS`` runs so many, and prints what differs.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import replicax
from fuzz_programs import Program
from fuzzing import Campaign, Trial, Verdict, WrongError
from replicax.errors import UnsupportedCallbackError, UnsupportedCollectiveError

DEVICES = (1, 2, 3, 8)


def bits(tree: Any) -> list[bytes]:
    leaves = jax.tree.leaves(tree)
    keys = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return [np.asarray(x).tobytes() for x in keys]


def examine(program: Program) -> Verdict:
    """Compares the bits of one program on several numbers of devices.

    Raises:
        WrongError: They differ, or the program runs on one device and not on several.
    """
    trial, found = Trial(program), {}
    for devices in DEVICES:
        some = jax.devices()[:devices]
        mapped = replicax.pmap(trial.our_fun, **trial.options, devices=some, deterministic=True)
        try:
            found[devices] = bits(mapped(*trial.args, **trial.kwargs))
        except (UnsupportedCallbackError, UnsupportedCollectiveError) as error:
            if "deterministic" in str(error):
                return Verdict(None, refusal=str(error)[:120])
            raise
        except Exception as error:
            try:
                jax.block_until_ready(trial.values("replicax"))
            except Exception:
                return Verdict(None, refusal=f"also without deterministic: {str(error)[:120]}")
            script = program.script("replicax.testing.lockstep", False)
            raise WrongError(f"on {devices} devices: {type(error).__name__}: {error}\n{script}") from error
    differ = [d for d in DEVICES if found[d] != found[1]]
    if differ:
        which = [k for k, (a, b) in enumerate(zip(found[1], found[differ[0]], strict=True)) if a != b]
        script = program.script("replicax.testing.lockstep", False)
        raise WrongError(f"{program.replicas} replicas: other bits on {differ} devices, leaves {which}\n{script}")
    return Verdict("one device")


def campaign_of(number: int, programs: int, *, shrink: bool = False) -> Campaign:
    """Runs so many random programs, from a seed, until three fail."""
    campaign = Campaign(patience=60.0, examine=examine)
    while campaign.counts["programs", "all"] < programs and len(campaign.failures) < 3:
        campaign.run(number, 20, shrink=shrink)
        number += 1
    return campaign


def failures(number: int, programs: int) -> tuple[int, list[str]]:
    """The number of random programs with the same bits, and the reports of the others."""
    campaign = campaign_of(number, programs)
    refused = sum(count for (kind, _), count in campaign.counts.items() if kind == "refused")
    return campaign.counts["programs", "all"] - refused, campaign.failures


def main(number: int, programs: int) -> int:
    replicax.simulate_devices(8)
    campaign = campaign_of(number, programs, shrink="--shrink" in sys.argv)
    print(*campaign.failures, sep="\n\n")
    print({key: count for key, count in campaign.counts.items() if key[0] in ("refused", "replicas", "programs")})
    return bool(campaign.failures)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), int(sys.argv[2])))

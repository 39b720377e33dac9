"""``make table``: checks and prints the table collective × context × (replicas, devices)."""

import sys

import conftest  # eight simulated devices
from collectives import CONTEXTS, PAIRS, REFUSED, VARIANTS, applicable, faults, refusal, render

PAIRS_IN_WORDS = ", ".join(f"{n} on {d}" for n, d in PAIRS)


def main():
    wrong = {}
    for context in CONTEXTS:
        for n, d in PAIRS:
            for variant, fault in faults(context, n, d).items():
                wrong[variant, context, n, d] = fault
        print(f"{context}: {len(applicable(context))} collectives x {len(PAIRS)} layouts", file=sys.stderr)
    for variant, context in REFUSED:
        if refusal(variant, context, 6, 4) is None:
            wrong[variant, context, 6, 4] = "JAX refuses this no more"
    print(f"{len(VARIANTS)} collectives in {len(CONTEXTS)} contexts; replicas on devices: {PAIRS_IN_WORDS}\n")
    print(render())
    for cell, fault in wrong.items():
        print("WRONG", *cell, fault)
    return bool(wrong)


if __name__ == "__main__":
    assert conftest
    sys.exit(main())

"""Ten classes of layout, each with pairs of N replicas and D devices.

``make test`` runs a part of these pairs in each test. ``make test-all`` runs all of them, and some others, and
``make sweep`` the whole table of 110 pairs.
"""

import math
import os

import pytest

REPLICAS = (*range(1, 21), 64, 1000)
DEVICES = (1, 2, 3, 5, 8)

#: Each device runs L = ceil(N / D) replicas, so N replicas use D' = ceil(N / L) devices.
CLASSES = {
    "one replica": [(1, 1), (1, 8)],
    "one device": [(2, 1), (6, 1)],
    "fewer replicas than devices": [(2, 3), (5, 8)],
    "as many as devices": [(3, 3), (8, 8)],
    "a multiple of the devices": [(6, 3), (16, 8), (64, 8)],
    "padding": [(7, 5), (8, 3), (15, 8)],
    "padding, and parts in common": [(10, 4), (14, 4), (18, 4)],
    "a prime number": [(13, 2), (17, 5), (19, 8)],
    "idle devices": [(4, 3), (9, 8), (12, 8)],
    "a thousand": [(1000, 3), (1000, 5), (1000, 8)],
}

SHORT = [pair for pairs in CLASSES.values() for pair in pairs]
PAIRS = [*SHORT, *((n, d) for n in REPLICAS for d in DEVICES if (n, d) not in SHORT)]
FULL = os.environ.get("REPLICAX_SWEEP") == "full"


def belongs(n, d, name):
    """Whether N on D belongs to a class."""
    lanes = math.ceil(n / d)
    used = math.ceil(n / lanes)
    padding = used * lanes - n
    return {
        "one replica": n == 1,
        "one device": d == 1 < n,
        "fewer replicas than devices": 1 < n < d,
        "as many as devices": n == d > 1,
        "a multiple of the devices": n > d > 1 and n % d == 0,
        "padding": n > d > 1 and padding > 0,
        "padding, and parts in common": padding > 0 and math.gcd(n, used) > 1,
        "a prime number": n > d > 1 and all(n % k for k in range(2, n)),
        "idle devices": n > d and used < d,
        "a thousand": n == 1000,
    }[name]


def pair(n, d, *more):
    """A test parameter, with the marker ``long`` if the pair is in none of the classes."""
    marks = [pytest.mark.xdist_group(f"n{n}"), *([] if (n, d) in SHORT else [pytest.mark.long])]
    return pytest.param(n, d, *more, marks=marks, id="-".join([*more, f"{n}on{d}"]))


every_pair = pytest.mark.parametrize(
    ("n", "d"), [pair(n, d) for n, d in (PAIRS if FULL else [*SHORT, *PAIRS[len(SHORT) :: 6]])]
)

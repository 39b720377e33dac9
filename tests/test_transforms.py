"""Transformations of a map: results equal ``jax.vmap`` under the same transformation.

Each pair of N and D runs one transformation of one program, in rotation. ``make sweep`` runs every transformation for
every pair.
"""

import functools
import random

import jax
import pytest

from layouts import FULL, PAIRS, SHORT, pair
from replicax import pmap
from replicax.testing._check import compare
from transforms import AXIS, PROGRAMS, TRANSFORMS, rows

_chance = random.Random(2285)  # each transformation gets all kinds of pairs
TURNS = [*_chance.sample(SHORT, len(SHORT)), *_chance.sample(PAIRS[len(SHORT) :], len(PAIRS) - len(SHORT))]


def cells():
    """Yields (N, D, transformation, program): one transformation per pair, or all in the full sweep."""
    for k, (n, d) in enumerate(TURNS):
        for j in range(len(TRANSFORMS)) if FULL else [k % len(TRANSFORMS)]:
            yield n, d, list(TRANSFORMS)[j], list(PROGRAMS)[(k // len(TRANSFORMS) + j) % len(PROGRAMS)]


@functools.cache
def of_vmap(n, name, program):
    right = jax.vmap(PROGRAMS[program], axis_name=AXIS)
    return jax.jit(lambda x: TRANSFORMS[name](right, x))(rows(n))


def case(n, d, name, program):
    """A test parameter. Hessians are long: ``test_jacobians_from_outside`` has a smaller one."""
    param = pair(n, d, name, program)
    more = [pytest.mark.long] if name == "hessian" else []
    return pytest.param(*param.values, id=param.id, marks=[*param.marks, *more])


@pytest.mark.few(9)
@pytest.mark.parametrize(("n", "d", "name", "program"), [case(*cell) for cell in cells()])
def test_transformed_map_equals_transformed_vmap(n, d, name, program):
    ours = TRANSFORMS[name](pmap(PROGRAMS[program], AXIS, devices=jax.devices()[:d]), rows(n))
    compare(str, ours, of_vmap(n, name, program), rtol=1e-4)


def test_every_transformation_meets_all_kinds_of_pairs():
    met = {name: [(n, d) for n, d, at, _ in cells() if at == name] for name in TRANSFORMS}
    assert {pair for pairs in met.values() for pair in pairs} == set(PAIRS)
    for name, pairs in met.items():
        assert len(pairs) >= 4, name
        assert any(n % d == 0 for n, d in pairs), name
        assert any(n > d > 1 for n, d in pairs), name
        assert any(-n % -(-n // d) for n, d in pairs), name  # padding

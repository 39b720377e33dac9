"""Results do not depend on the placement of replicas: padding in the middle or in two places also works."""

import jax
import numpy as np
import pytest
from jax import lax

import test_nested
from collectives import CONTEXTS, applicable, faults, share
from layouts import FULL
from replicax import pmap
from replicax._layout import placement as _placement
from replicax._layout.placement import Placement
from replicax.testing._check import compare, gradient
from transforms import AXIS, PROGRAMS, TRANSFORMS, rows


def in_the_middle(size, devices, lanes):
    """A placement with the padding after the first half of the replicas."""
    gap, half = devices * lanes - size, size // 2
    runs = ((0, half), (half + gap, size - half)) if half else ((gap, size),)
    return Placement(size, devices, lanes, runs if gap else ((0, size),))


def in_two_places(size, devices, lanes):
    """A placement with padding before the first replica and further on; if too little, only in the middle."""
    gap, part = devices * lanes - size, size // 3
    if gap < 3 or not part:
        return in_the_middle(size, devices, lanes)
    return Placement(size, devices, lanes, ((1, part), (part + gap, size - part)))


PLACEMENTS = {"middle": (in_the_middle, 7, 3), "two places": (in_two_places, 13, 4)}


@pytest.fixture(params=PLACEMENTS)
def layout(request, monkeypatch):
    """(replicas, devices) with padding, under a test placement that replaces the default placement."""
    place, n, d = PLACEMENTS[request.param]
    monkeypatch.setattr(_placement, "placement", place)
    lanes = -(-n // d)
    placed = place(n, -(-n // lanes), lanes)
    assert placed.padding
    assert not placed.padding_is_last
    return n, d


@pytest.mark.parametrize("place", [_placement.placement, in_the_middle, in_two_places])
@pytest.mark.parametrize(("n", "devices", "lanes"), [(7, 3, 3), (13, 4, 4), (5, 4, 2), (1, 2, 2), (8, 4, 2), (3, 3, 1)])
def test_the_tables_of_a_placement_go_together(place, n, devices, lanes):
    placed = place(n, devices, lanes)
    assert placed.slots == devices * lanes == n + placed.padding
    assert placed.is_replica.sum() == n
    np.testing.assert_array_equal(placed.replica_at[placed.slot_of], np.arange(n))
    np.testing.assert_array_equal(np.flatnonzero(placed.is_replica), placed.slot_of)
    assert set(placed.devices_with_replicas) == set(placed.slot_of // lanes)
    copied = [row + k for row, count, _ in placed.pieces for k in range(count)]
    assert copied == list(range(n))
    spread = [min(row + k, max(row + count - 1, 0)) for row, count, more in placed.pieces for k in range(count + more)]
    np.testing.assert_array_equal(spread, placed.replica_at)


def in_turn(names):
    """Pairs each name with one placement, in rotation; ``make sweep`` runs all pairs."""
    places = list(PLACEMENTS)
    if FULL:
        return [(name, place) for name in names for place in places]
    small = ["grad outside"]  # compiles for a minute with 13 replicas
    return [(name, places[0 if name in small else k % len(places)]) for k, name in enumerate(names)]


#: Half of the variants in each context (all in ``make sweep``), and a share of them in one.
TABLE = [
    *(
        pytest.param(context, place, None if FULL else applicable(context)[k % 2 :: 2], marks=pytest.mark.long)
        for k, (context, place) in enumerate(in_turn(CONTEXTS))
    ),
    *(pytest.param(context, place, share(context)) for context, place in in_turn(["cond"])),
]


@pytest.mark.parametrize(("context", "layout", "variants"), TABLE, indirect=["layout"])
def test_the_table_of_collectives(context, layout, variants):
    n, d = layout
    assert faults(context, n, d, variants) == {}


@pytest.mark.few("jit-middle", "grad-two places")
@pytest.mark.parametrize(("name", "layout"), in_turn(TRANSFORMS), indirect=["layout"])
def test_transformations_from_outside(name, layout):
    n, d = layout
    program = list(PROGRAMS.values())[(n + list(TRANSFORMS).index(name)) % len(PROGRAMS)]
    ours = TRANSFORMS[name](pmap(program, AXIS, devices=jax.devices()[:d]), rows(n))
    right = jax.jit(lambda x: TRANSFORMS[name](jax.vmap(program, axis_name=AXIS), x))(rows(n))
    compare(str, ours, right, rtol=1e-4)


@pytest.mark.few("two places-sizes3-8-collectives")
@pytest.mark.parametrize(
    "program", [test_nested.collectives, test_nested.control_flow, test_nested.closures, test_nested.derivatives_inside]
)
@pytest.mark.parametrize(("sizes", "d"), [((7, 2), 3), ((2, 5), 6), ((3, 13), 8), ((13, 3), 8)])
def test_maps_inside_maps(program, sizes, d, layout):
    args = test_nested.given(program, sizes)
    compare(str, program(test_nested.on_devices(d))(*args), jax.jit(program(jax.vmap))(*args), rtol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize(("sizes", "d"), [((7, 2), 3), ((2, 5), 6), ((3, 13), 8)])
def test_derivatives_of_maps_inside_maps(sizes, d, layout):
    args = test_nested.rows(*sizes, 2), test_nested.rows(2)
    expected = gradient(test_nested.smooth(jax.vmap), args, {}, jax.jit)
    ours = gradient(test_nested.smooth(test_nested.on_devices(d)), args, {}, lambda fun: fun)
    compare(str, ours, expected, rtol=1e-3)


@pytest.mark.few("middle-one device", "two places-host")
@pytest.mark.parametrize("where", ["host", "one device", "whole on each", "a result"])
def test_arguments_from_anywhere(where, layout):
    n, d = layout
    x = np.arange(3.0 * n, dtype=np.float32).reshape(n, 3)
    devices = jax.devices()[:d]
    fun = pmap(lambda x: x * lax.axis_index("i") + lax.psum(x, "i"), "i", devices=devices)
    placed = {
        "host": lambda: x,
        "one device": lambda: jax.device_put(x, jax.devices()[7]),
        "whole on each": lambda: pmap(lambda x: x, devices=devices)(x),
        "a result": lambda: pmap(lambda x: x, devices=jax.devices())(x),
    }[where]()
    for _ in range(3):
        np.testing.assert_allclose(fun(placed), x * np.arange(n)[:, None] + x.sum(0), rtol=1e-5)
    other = pmap(lambda x: x, in_axes=1, out_axes=1, devices=devices)
    np.testing.assert_array_equal(other(x.T), x.T)


@pytest.mark.few("two places")
def test_callbacks_come_once_from_each_replica(layout):
    n, d = layout
    seen = []

    def fun(x):
        jax.debug.callback(lambda i: seen.append(int(i)), lax.axis_index("i"))
        return x

    jax.block_until_ready(pmap(fun, "i", devices=jax.devices()[:d])(np.arange(float(n))))
    jax.effects_barrier()
    assert sorted(seen) == list(range(n))


@pytest.mark.few("middle")
def test_padding_has_no_part_in_products_summed_over_lanes(layout):
    n, d = layout
    x = np.random.default_rng(0).normal(size=(n, 4, 5)).astype(np.float32)

    def fun(x):
        return lax.psum(x @ x.T, "i")

    ours = pmap(fun, "i", devices=jax.devices()[:d])(x)
    np.testing.assert_allclose(ours, jax.vmap(fun, axis_name="i")(x), rtol=1e-5, atol=1e-5)

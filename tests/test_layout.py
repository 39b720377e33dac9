"""The layout rule, checked without tracing."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layouts import CLASSES, belongs
from replicax._layout.layout import layout


@given(st.integers(1, 10_000), st.integers(1, 8), st.booleans())
def test_every_replica_has_a_lane_and_no_device_idles_without_need(n, d, spread):
    where = layout("i", n, jax.devices()[:d], use_all_devices=spread)
    axis = where.axis
    assert axis.lanes == math.ceil(n / d)
    assert axis.devices == (d if spread else math.ceil(n / axis.lanes))
    assert axis.devices * axis.lanes == n + axis.padding == where.padded_size
    assert axis.padding >= 0
    if not spread:
        assert axis.padding < axis.lanes  # so the last device has a replica to copy
    assert (axis.device_axis is None) == (axis.devices == 1)
    assert (axis.lane_axis is None) == (axis.lanes == 1)


@pytest.mark.parametrize("name", CLASSES)
def test_the_pairs_that_tests_take_are_of_their_classes(name):
    assert len(CLASSES[name]) in (2, 3)
    assert all(belongs(n, d, name) for n, d in CLASSES[name])


@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 2))
def test_a_result_lies_in_as_many_equal_parts_as_there_can_be(n, d, axis):
    where = layout("i", n, jax.devices()[:d])
    sharding = where.result_sharding(axis)
    shape = [3, 3, 3]
    shape[axis] = n
    parts = {index[axis].indices(n)[:2] for index in sharding.devices_indices_map(tuple(shape)).values()}
    assert len(parts) == math.gcd(n, where.axis.devices)
    assert len(sharding.device_set) == where.axis.devices
    assert sorted(parts)[0][0] == 0
    assert sum(stop - start for start, stop in parts) == n


@pytest.mark.parametrize(
    ("n", "lanes", "devices", "padding"), [(8, 1, 8, 0), (9, 2, 5, 1), (12, 2, 6, 0), (64, 8, 8, 0), (13, 2, 7, 1)]
)
def test_the_examples_of_the_documentation(n, lanes, devices, padding):
    axis = layout("i", n, jax.devices()).axis
    assert (axis.lanes, axis.devices, axis.padding) == (lanes, devices, padding)


def test_replica_r_is_lane_r_mod_l_of_device_r_over_l():
    where = layout("i", 12, jax.devices())
    rows = jax.device_put(np.arange(12), where.sharding(0))
    held = {shard.device: np.asarray(shard.data).tolist() for shard in rows.addressable_shards}
    assert held == {device: [2 * i, 2 * i + 1] for i, device in enumerate(jax.devices()[:6])}

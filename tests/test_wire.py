"""Collectives send the minimum number of bytes between devices, as counted in the compiled HLO.

Each device runs a contiguous block of replicas. The minimum: a gather sends an operand once to each device that needs
it. A scatter sends one partial sum per replica and sending device. In a reduction, each participating device
contributes one operand.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from replicax import pmap
from replicax._engine.collectives import REGISTRY
from replicax._layout import layout as layouts

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "c64": 8}
OPERATION = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def crossing(text, devices):
    """The bytes that each kind of collective sends in one run, in total over all devices."""
    total: dict[str, int] = {}
    for line in text.splitlines():
        if not (found := OPERATION.search(line)):
            continue
        result = sum(BYTES[dtype] * int(np.prod([int(k) for k in shape.split(",") if k], dtype=int))
                     for dtype, shape in SHAPE.findall(found[1]))  # fmt: skip
        kind = found[2]
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
            sent = result * sum(a != b for a, b in pairs)
        else:
            sent = sum(SENT[kind](result, len(group)) for group in groups_in(line, devices) if len(group) > 1)
        total[kind] = total.get(kind, 0) + sent
    return {kind: sent for kind, sent in total.items() if sent}


#: The bytes that all devices of a group send, from the result bytes on one device and the number of devices. An
#: all-reduce counts one operand per device, independent of the backend's algorithm.
SENT = {
    "all-reduce": lambda result, devices: result * devices,
    "all-gather": lambda result, devices: result * (devices - 1),
    "reduce-scatter": lambda result, devices: result * devices * (devices - 1),
    "all-to-all": lambda result, devices: result * (devices - 1),
}


def groups_in(line, devices):
    """The device groups of an HLO line, written as a list or as a reshaped and transposed iota."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(k) for k in (part or "").split(",") if k] for part in iota.groups())
        ids = np.arange(devices).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    listed = re.search(r"replica_groups=\{(.*?)\}\}", line)
    return [group.split(",") for group in re.findall(r"\{([\d,]+)", listed[1])] if listed else [range(devices)]


def layout(n, d):
    """The device of each replica, and the number of devices in use."""
    lanes = -(-n // d)
    return [r // lanes for r in range(n)], -(-n // lanes)


# The minimum number of operands (or pieces of operands) to send, from the groups and the device of each replica.


def gathered(groups, device):
    return sum(len({device[r] for r in group} - {device[s]}) for group in groups for s in group)


def scattered(groups, device):
    return sum(len({device[s] for s in group} - {device[r]}) for group in groups for r in group)


def exchanged(groups, device):
    return sum(device[s] != device[r] for group in groups for s in group for r in group)


def reduced(groups, device):
    on = [{device[r] for r in group} for group in groups]
    return sum(len(devices) for devices in on if len(devices) > 1)


COLLECTIVES = {
    "psum": (lambda x, groups, _: lax.psum(x, "i", axis_index_groups=groups), reduced),
    "pmax": (lambda x, groups, _: lax.pmax(x, "i", axis_index_groups=groups), reduced),
    "all_gather": (lambda x, groups, _: lax.all_gather(x, "i", axis_index_groups=groups), gathered),
    "psum_scatter": (lambda x, groups, m: lax.psum_scatter(stack(x, m), "i", axis_index_groups=groups), scattered),
    "all_to_all": (lambda x, groups, m: lax.all_to_all(stack(x, m), "i", 0, 0, axis_index_groups=groups), exchanged),
}


def stack(x, count):
    return jnp.stack([x + k for k in range(count)])


def groups_of(n, kind):
    order = list(range(n))
    match kind:
        case "neighbours":
            return [order[k : k + 2] for k in range(0, n, 2)]
        case "interleaved":
            return [order[0::2], order[1::2]]
        case "halves":
            return [order[: n // 2], order[n // 2 :]]
        case "shuffled":
            order = [int(k) for k in np.random.default_rng(n).permutation(n)]
            return [order[: n // 2], order[n // 2 :]]
    return None


def compiled(fun, n, d):
    x = np.ones((n, 25), np.float32)
    return pmap(fun, "i", devices=jax.devices()[:d]).lower(x).compile().as_text()


def by_the_registry(fun, n, d):
    """The ``bytes_sent`` of the registry entry for the only collective in a function."""
    jaxpr = jax.make_jaxpr(fun, axis_env=[("i", n)])(np.ones(25, np.float32))
    (eqn,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in REGISTRY]
    axis = layouts.layout("i", n, jax.devices()[:d]).axis
    return REGISTRY[eqn.primitive.name].bytes_sent(axis, [var.aval for var in eqn.invars], eqn.params)


@pytest.mark.few(9)
@pytest.mark.parametrize("kind", ["all", "neighbours", "interleaved", "halves", "shuffled"])
@pytest.mark.parametrize("pair", [(8, 8), (16, 8), (6, 2), (12, 4)], ids="{0[0]}on{0[1]}".format)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_the_least_crosses(name, pair, kind):
    n, d = pair
    fun, least = COLLECTIVES[name]
    device, devices = layout(n, d)
    groups = groups_of(n, kind)
    one = lambda x: fun(x, groups, len((groups or [range(n)])[0]))
    text = compiled(one, n, d)
    assert sum(crossing(text, devices).values()) == 100 * least(groups or [range(n)], device)
    assert by_the_registry(one, n, d) == 100 * least(groups or [range(n)], device)


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", ["interleaved", "halves", "shuffled"])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_padding_adds_nothing_to_groups(name, kind):
    """14 replicas on 4 devices; the last device has two padding lanes."""
    fun, least = COLLECTIVES[name]
    device, devices = layout(14, 4)
    groups = groups_of(14, kind)
    text = compiled(lambda x: fun(x, groups, 7), 14, 4)
    assert crossing_inside(text, devices) == 100 * least(groups, device)
    assert by_the_registry(lambda x: fun(x, groups, 7), 14, 4) == 100 * least(groups, device)


def crossing_inside(text, devices):
    """The bytes sent inside the map, without the resharding of padded results at the end."""
    inside = [line for line in text.splitlines() if "shard_map" in line or "vmap" in line]
    return sum(crossing("\n".join(inside), devices).values())


PERMUTATIONS = {
    "by one": lambda n: [(k, (k + 1) % n) for k in range(n)],
    "back by one": lambda n: [((k + 1) % n, k) for k in range(n)],
    "by half": lambda n: [(k, (k + n // 2) % n) for k in range(n)],
    "reversed": lambda n: [(k, n - 1 - k) for k in range(n)],
    "shuffled": lambda n: list(enumerate(map(int, np.random.default_rng(n).permutation(n)))),
    "partial": lambda n: [(0, n - 1), (1, 0), (n - 1, 1)],
    "to oneself": lambda n: [(k, k) for k in range(n)],
    "empty": lambda n: [],
}


@pytest.mark.few(9)
@pytest.mark.parametrize("pair", [(8, 8), (16, 8), (64, 8), (12, 4), (6, 2), (6, 1)], ids="{0[0]}on{0[1]}".format)
@pytest.mark.parametrize("name", PERMUTATIONS)
def test_only_replicas_that_change_device_travel(name, pair):
    n, d = pair
    perm = PERMUTATIONS[name](n)
    device, devices = layout(n, d)
    one = lambda x: lax.ppermute(x, "i", perm)
    sent = crossing(compiled(one, n, d), devices)
    assert sum(sent.values()) == 100 * sum(device[a] != device[b] for a, b in perm)
    assert by_the_registry(one, n, d) == sum(sent.values())


def test_a_shift_by_one_is_one_permutation_of_one_lane():
    text = compiled(lambda x: lax.ppermute(x, "i", PERMUTATIONS["by one"](64)), 64, 8)
    assert len(OPERATION.findall(text)) == 1
    assert crossing(text, 8) == {"collective-permute": 8 * 100}
    assert "gather" not in text  # lanes are shifted with slices


def test_a_broadcast_puts_one_lane_of_each_device_into_a_sum():
    one = lambda x: lax.pbroadcast(x, "i", 5)
    assert crossing(compiled(one, 64, 8), 8) == {"all-reduce": 8 * 100}
    assert by_the_registry(one, 64, 8) == 8 * 100


@pytest.mark.parametrize("name", ["all_gather", "psum_scatter", "all_to_all"])
def test_all_replicas_at_once_carry_their_padding(name):
    """JAX has no uneven collectives, so 14 replicas on 4 devices send as many bytes as 16."""
    fun, least = COLLECTIVES[name]
    text = compiled(lambda x: fun(x, None, 14), 14, 4)
    device, devices = layout(16, 4)
    assert crossing_inside(text, devices) == 100 * least([range(16)], device)
    assert by_the_registry(lambda x: fun(x, None, 14), 14, 4) == 100 * least([range(16)], device)


@pytest.mark.few("None-2", "groups1-4")
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("groups", [None, [[0, 2, 4, 6], [1, 3, 5, 7]]])
def test_other_types_and_a_ragged_exchange_are_counted_too(groups, d):
    size = 8 if groups is None else 4
    ones = {
        "pmax of complex numbers": lambda x: lax.pmax(x * 1j, "i", axis_index_groups=groups),
        "psum of complex numbers": lambda x: lax.psum(x * 1j, "i", axis_index_groups=groups),
        "ragged_all_to_all": lambda x: lax.ragged_all_to_all(
            x, x, *[(x[:size] * k).astype(jnp.int32) for k in range(4)], axis_name="i", axis_index_groups=groups
        ),
    }
    for name, one in ones.items():
        found = sum(crossing(compiled(one, 8, d), min(d, 8)).values())
        assert by_the_registry(one, 8, d) == found, name

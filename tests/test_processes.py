"""Maps over several processes: own rows in, own rows out, and the values of one process with all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import process_programs as programs
import transforms
from replicax.errors import ProcessesError
from replicax.testing import processes
from replicax.testing._check import compare
from test_transforms import of_vmap
from transforms import PROGRAMS, TRANSFORMS

pytestmark = pytest.mark.xdist_group("processes")

#: The devices of each process, and the rows of each process in turn: equal, unequal, none, more than devices.
GANGS = {
    "2x2": ((2, 2), [(2, 2), (5, 2)]),
    "2x2, more rows": ((2, 2), [(4, 4), (3, 1), (0, 3), (1, 6)]),
    "3+1": ((3, 1), [(3, 1), (2, 5), (7, 0)]),
    "3x1": ((1, 1, 1), [(1, 1, 1), (2, 0, 3), (4, 1, 2)]),
    "4x2": ((2, 2, 2, 2), [(2, 2, 2, 2), (3, 0, 1, 6)]),
}


@pytest.fixture(scope="module", params=[pytest.param(g, marks=[pytest.mark.long] * (g != "2x2")) for g in GANGS])
def gang(request):
    devices, _ = GANGS[request.param]
    with processes(len(devices), devices=devices, timeout=120) as running:
        yield running


@pytest.fixture
def rows(request):
    """The rows of each process, in turn."""
    return GANGS[request.node.callspec.params["gang"]][1]


LATER = ("scan", "while", "cond", "custom_vjp", "grad inside")


@pytest.mark.parametrize("context", ["top level", *(pytest.param(c, marks=pytest.mark.long) for c in LATER)])
def test_the_table_of_collectives(gang, rows, context):
    """A quarter of the table for each number of rows at the top level, and an eighth in the other contexts.

    Half of that on four processes.
    """
    share, turns = (4, rows) if context == "top level" else (8, rows[-1:])
    share *= 1 + (len(rows[0]) > 3)  # four processes on few cores are slow
    for k, counts in enumerate(turns, LATER.index(context) if context in LATER else 0):
        for faults in gang.run(programs.collective_faults, context, counts, k % share, share):
            assert faults == {}, counts


@pytest.mark.long
def test_values(gang, rows):
    counts = next((counts for counts in rows if 0 in counts), rows[-1])
    for faults in gang.run(programs.values, counts):
        assert faults == {}, counts


def test_maps_inside_maps(gang, rows):
    for counts in rows:
        for faults in gang.run(programs.nested, (sum(counts), 4), counts):
            assert faults == {}, counts


def test_callbacks_come_once_from_each_replica_in_its_own_process(gang, rows):
    for counts in rows[1:]:
        n, first = sum(counts), 0
        for (seen, out), own in zip(gang.run(programs.callbacks, counts), counts, strict=True):
            assert seen == list(range(first, first + own))
            assert out == [n * (n - 1.0)] * own
            first += own


def test_a_callback_that_fails_raises_in_every_process(gang, rows):
    counts = rows[0]
    *others, last = gang.run(programs.failing_callback, counts)
    assert f"CallbackError: A callback of fun raised ValueError in replica {sum(counts) - 1} of 'i'" in last
    for said in others:
        assert f"CallbackError: A callback raised an exception in process {len(counts) - 1}. See its output." in said


def test_a_map_over_local_devices_is_of_one_process_alone(gang):
    first, *others = gang.run(programs.local_maps)
    assert first == [10.0] * 5
    assert others == [None] * len(others)


def test_helpers_and_own_replicas(gang):
    found = gang.run(programs.helpers)
    ranges = [said["replicas"] for said in found]
    assert [k for a, b in ranges for k in range(a, b)] == list(range(10))
    total = sum(np.arange(4 * (b - a)).sum() for a, b in ranges)
    for said, (a, b) in zip(found, ranges, strict=True):
        assert said["first"] == [1 + total] * 3
        assert said["rows"] == b - a
        assert said["fetched"] == (b - a, 3)


def test_stages(gang, rows):
    counts = rows[-1]
    n = sum(counts)
    total = [float(n * (n - 1)), float(n * n)]
    for (shape, compiled, called), own in zip(gang.run(programs.ahead_of_time, counts), counts, strict=True):
        assert shape == (own, 2)
        assert compiled == called == [total] * own


# ---------------------------------------------------------------------------------------------------------------
# Transformations from outside, and global arrays

#: Where the rows are in the results of these transformations. None: a sum over the rows of a process.
ROWS = {"vmap": 1, "hessian": None, "jacrev": None, "custom_vjp": (None, 0)}

#: The transformations that take own rows: they are not in ``jit``.
OF_OWN_ROWS = ["grad", "jvp", "vjp", "linearize", "linear_transpose", "vmap", "vmap of the last axis", "grad of vmap",
               "custom_vjp", "custom_jvp", "hessian", "jacrev"]  # fmt: skip


def cells(gang):
    """Each transformation of own rows and of global arrays once: on 2x2 and 4x2 in turn, of one program in turn."""
    for kind, names in (("own rows", OF_OWN_ROWS), ("global arrays", TRANSFORMS)):
        for k, name in enumerate(names):
            if kind == "global arrays" and name == "jacfwd":
                continue  # it closes over its argument in jit, which JAX refuses of a global array
            if gang == ["2x2", "4x2"][k % 2]:
                marks = [pytest.mark.long] * (gang == "4x2" or name not in ("grad", "value_and_grad"))
                yield pytest.param(gang, kind, name, list(PROGRAMS)[k % len(PROGRAMS)], marks=marks)


@pytest.mark.parametrize(("gang", "kind", "name", "program"), [*cells("2x2"), *cells("4x2")], indirect=["gang"])
def test_transformations(gang, rows, kind, name, program):
    counts = rows[len(name) % len(rows)]
    right = of_vmap(sum(counts), name, program)
    found = gang.run(programs.transformed, name, program, counts, kind)
    if kind == "global arrays":
        for ours in found:
            compare(str, ours, right, rtol=1e-4)
        return
    axes = ROWS.get(name, 0)
    each = jax.tree.map(lambda _: axes, right) if not isinstance(axes, tuple) else axes
    joined = jax.tree.map(
        lambda axis, *parts: sum(parts) if axis is None else np.concatenate(parts, axis),
        each, *found, is_leaf=lambda axis: axis is None,
    )  # fmt: skip
    compare(str, joined, right, rtol=1e-4)


def test_derivatives_by_rows_and_by_what_all_replicas_get(gang, rows):
    for counts in rows[1:]:
        x, w, v = transforms.rows(sum(counts)), np.array([1, 2, 3], np.float32), np.array([3, 1, 2], np.float32)

        def loss(x, w, v):
            equal = (x * w * v).mean(0)
            return ((jnp.sin(x * w) * (x * v).sum(0)) ** 2).sum() + equal.sum()

        right = jax.grad(loss, (0, 1, 2))(x, w, v)
        found = gang.run(programs.derivatives, counts)
        assert all(own for _, own in found)
        compare(str, np.concatenate([own[0] for own, _ in found]), right[0], rtol=1e-4)
        for own, _ in found:
            compare(str, own[1:], list(right[1:]), rtol=1e-4)


@pytest.mark.long
def test_global_arrays(gang, rows):
    for counts in rows[-2:]:
        for faults in gang.run(programs.global_arrays, counts):
            assert faults == {}, counts


@pytest.mark.long
def test_rows_become_global_and_own_again(gang, rows):
    for counts in rows[-2:]:
        for faults in gang.run(programs.round_trip, counts):
            assert faults == {}, counts


def test_own_rows_with_a_global_parameter(gang, rows):
    for counts in rows[1:]:
        total = transforms.rows(sum(counts)).sum(0)
        for value, gradient, local in gang.run(programs.own_rows_with_a_global_parameter, counts):
            np.testing.assert_allclose(value, total * [1, 2, 3], rtol=1e-5)
            np.testing.assert_allclose(gradient, total, rtol=1e-5)
            assert not local


# ---------------------------------------------------------------------------------------------------------------
# Faults: each process gets an error that says who has what, and goes on


@pytest.fixture(scope="module")
def two():
    with processes(2, devices=2, timeout=100) as running:
        yield running


BOTH = {
    "in_another_order": [
        "The processes do not call the same map",
        "process 0: add(x: float32[3] mapped along 0)",
        "process 1: double(x: float32[3] mapped along 0)",
    ],
    "of_another_type": ["process 0: add(x: float32[3] ", "process 1: add(x: float32[4] "],
    "closing_over_another_array": ["not the same program", "the values of closed-over arrays: process 0 has "],
    "with_other_lanes": ["not the same program", "lanes: process 0 has "],
    "that_depends_on_the_process": ["not the same program", "the traced program: process 0 has "],
    "of_another_setting": ["different settings of JAX", "process 0: jax_enable_x64 is False", "jax_enable_x64 is True"],
    "with_another_unmapped_argument": ["different values of arguments with in_axes=None", "process 0: {'y': '"],
    "without_rows": ["pmap needs at least one replica", "process 1 has 0 replicas"],
    "with_another_axis_size": ["axis_size is 3", "process 0 has 2 replicas"],
    "rows_of_one_and_of_all": [
        "a has the rows of this process",
        "b has the rows of all processes (a global array)",
        "replicax.to_global(x) has the rows of all processes",
    ],
    "a_local_array_closed_over_in_jit": [
        "arrays are global, and these are arrays of this process",
        "  * x\n",
        "to_glob",
    ],
    "a_local_array_passed_to_jit": [
        "Received incompatible devices for jitted computation",
        "Convert an array of this process outside: x = replicax.to_global(x), and pass it",
    ],
    "a_split_array_for_every_replica": ["of shape (4, 3) is split over the devices of several", "replicax.fetch(x)"],
    "a_global_array_in_a_local_map": ["of shape (4, 3) is split over the devices of several", "replicax.to_local(x)"],
    "a_global_array_on_other_devices": ["is over the devices [", "global array must be over all devices of the map"],
    "jacobians_by_unequal_rows": ["transform a map in different ways", "process 0: (6, rows, 3)", "1: (9, rows, 3)"],
    "jacobians_of_unequal_rows": ["transform a map in different ways", "process 0: (6, rows, 3)", "1: (9, rows, 3)"],
    "vmap_of_other_sizes": ["transform a map in different ways", "process 0: (4, rows, 3)", "1: (5, rows, 3)"],
    "to_global_in_jit": ["UnsupportedTransformationError: to_global cannot be called inside jit"],
    "to_local_in_jit": ["UnsupportedTransformationError: to_local cannot be called inside jit"],
    "to_local_of_a_split_array": ["of shape (4, 3) is split over the devices of several"],
    "to_global_of_other_types": ["different types to to_global", "process 1: (float32[1,4]), of one row along axis 0"],
    "to_global_of_other_values": ["different arrays to to_global, with axis=None", "process 0: ['"],
    "to_global_without_rows": ["MappedSizeError: to_global: no process has a row"],
    "a_map_and_to_global": [
        "The processes do not make the same calls",
        "process 0 calls add(x: float32[3] mapped along 0)",
        "process 1 calls to_global with (float32[1,3])",
    ],
}


@pytest.mark.parametrize("fault", BOTH)
def test_a_fault_is_an_error_in_both_processes(fault, two):
    for said in two.run(getattr(programs, fault)):
        for text in BOTH[fault]:
            assert text in said
    assert two.run(programs.agrees_again) == [[[4.0] * 3] * 2] * 2


def test_a_warm_map_under_a_tracer(two):
    right = [6.0, 7.0, 8.0, 9.0]
    assert two.run(programs.under_a_tracer_when_warm) == [(right, "float32", [right])] * 2


@pytest.mark.long
def test_no_device_holds_rows_of_others(two):
    for row, arguments, results, temporaries in two.run(programs.memory_of_a_device, (5, 4)):  # 3 lanes a device
        assert arguments == results == 3 * row
        assert temporaries <= 3.1 * row


def test_own_rows_and_global_arrays_in_turn(two):
    assert two.run(programs.own_and_global_in_turn) == [True, True]


def test_what_one_process_raises_is_told_to_the_other(two):
    first, second = two.run(programs.a_string_in_one_process)
    assert "another process has raised an exception" in first
    assert "process 1 calls add: NotAnArrayError: " in first
    assert second.startswith("NotAnArrayError")
    first, second = two.run(programs.no_such_axis_in_one_process)
    assert "process 1 calls to_global: MappedSizeError: " in first
    assert second.startswith("MappedSizeError: to_global: these arrays have no axis 3")
    assert two.run(programs.agrees_again) == [[[4.0] * 3] * 2] * 2


def test_fewer_replicas_than_processes_under_jit(two):
    assert two.run(programs.more_processes_than_replicas) == [([[2.0, 2.0]], [[4.0, 4.0]])] * 2


def test_a_donated_argument_is_deleted_in_every_process(two):
    assert two.run(programs.donated_in_every_process) == [True, True]


def test_what_the_processes_cannot_run():
    with pytest.raises(ProcessesError, match="at least 1, for each process"):
        processes(2, devices=[1, 0])
    with processes(1) as one, pytest.raises(ProcessesError, match="at the top level of a module"):
        one.run(lambda: None)


def test_a_function_that_raises_in_one_process(two):
    first, second = two.run(programs.that_raises_in_one_process)
    assert second == "ValueError: not here"
    assert "tracing it has raised in another process" in first
    assert "process 1: ValueError: not here" in first
    assert two.run(programs.agrees_again) == [[[4.0] * 3] * 2] * 2


@pytest.mark.long
def test_a_process_that_never_comes():
    with processes(2) as two:
        first, second = two.run(programs.never_comes)
    assert first.startswith("ProcessesError: Process 0 waited 3 seconds, but process 1 has not joined")
    assert second == "elsewhere"


@pytest.mark.long
def test_a_warm_call_after_an_abort_is_refused():
    with processes(2) as two, pytest.raises(ProcessesError) as caught:
        two.run(programs.warm_after_an_abort)
    assert "process 0 ended with exit status 75" in str(caught.value)


@pytest.mark.long
def test_a_process_that_is_warm_under_another_signature_is_ended():
    with processes(2) as two, pytest.raises(ProcessesError) as caught:
        two.run(programs.warm_and_not)
    assert "process 0 ended with exit status 75" in str(caught.value)

"""A collective is one registry entry: the example entry in CONTRIBUTING equals NumPy in every layout."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

from collectives import AXIS, CONTEXTS, PAIRS, rows
from replicax import UnsupportedCollectiveError, pmap
from replicax._engine.collectives import AWAITING, REGISTRY, reductions, unsupported
from replicax._engine.collectives.registry import REFUSED
from replicax._engine.rewrite import Rewriter
from replicax._engine.sums import Sum
from replicax._layout.layout import layout
from replicax.testing import check, lockstep
from test_wire import crossing

pmedian_p = Primitive("pmedian")
pmedian_p.def_abstract_eval(lambda x, **params: x)


def pmedian(x, axis_name=AXIS, **params):
    return pmedian_p.bind(x, axis_name=axis_name, **params)


CONTRIBUTING = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def _registered():
    """Registers the example for one test: runs the code in CONTRIBUTING with the names of ``reductions``."""
    found = re.search(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert found
    before = dict(REGISTRY)
    exec(compile(f"from __future__ import annotations\n{found[1]}", str(CONTRIBUTING), "exec"), dict(vars(reductions)))
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def on(d):
    return {"axis_name": AXIS, "devices": jax.devices()[:d]}


@pytest.mark.few("7on3", "8on2")
@pytest.mark.parametrize("pair", PAIRS, ids="{0[0]}on{0[1]}".format)
def test_a_toy_collective_is_what_numpy_says(pair):
    n, d = pair
    right = np.broadcast_to(np.median(rows(n), 0), (n, 3))
    np.testing.assert_allclose(pmap(pmedian, **on(d))(rows(n)), right, rtol=1e-6)
    np.testing.assert_allclose(lockstep(pmedian, axis_name=AXIS)(rows(n)), right, rtol=1e-6)
    alone = pmap(pmedian, **on(d), out_axes=None)(rows(n))  # the entry says that results are equal in all replicas
    np.testing.assert_allclose(alone, right[0], rtol=1e-6)


@pytest.mark.few("scan-8on2", "cond-7on3", "jit-8on2", "remat-7on3")
@pytest.mark.parametrize("pair", [(7, 3), (8, 2)], ids="{0[0]}on{0[1]}".format)
@pytest.mark.parametrize("context", ["scan", "while", "cond", "jit", "remat"])
def test_a_toy_collective_in_control_flow(context, pair):
    n, d = pair
    check(lambda x: CONTEXTS[context](pmedian, x), rows(n), reference=lockstep, **on(d))


@pytest.mark.few("4")
@pytest.mark.parametrize("d", [1, 4, 8])
def test_a_toy_collective_over_the_axes_of_two_maps(d):
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    fun = lambda x: (pmedian(x, "j"), pmedian(x, "i"), pmedian(x, ("i", "j")))
    inner, outer, both = pmap(pmap(fun, "j"), "i", devices=jax.devices()[:d])(x)
    for ours, axes in ((inner, 1), (outer, 0), (both, (0, 1))):
        right = np.broadcast_to(np.median(x, axes, keepdims=True), x.shape)
        np.testing.assert_allclose(ours, right, rtol=1e-6)


@pytest.mark.parametrize("pair", [(8, 8), (8, 2), (6, 1)], ids="{0[0]}on{0[1]}".format)
def test_a_toy_collective_sends_what_its_entry_says(pair):
    n, d = pair
    text = pmap(pmedian, **on(d)).lower(rows(n)).compile().as_text()
    axis = layout(AXIS, n, jax.devices()[:d]).axis
    sent = REGISTRY["pmedian"].bytes_sent(axis, [jax.ShapeDtypeStruct((3,), np.float32)], {"axis_name": AXIS})
    assert sum(crossing(text, d).values()) == sent


def test_a_parameter_of_a_later_jax_is_refused_by_name():
    for transform in (pmap, lockstep):
        with pytest.raises(UnsupportedCollectiveError, match=r"pmedian has the parameter weights='even' in JAX"):
            transform(lambda x: pmedian(x, weights="even"), axis_name=AXIS)(rows(4))
    check(lambda x: pmedian(x, weights=None, exact=False), rows(4), reference=lockstep, **on(4))


@pytest.mark.parametrize("primitive", REGISTRY)
def test_every_entry_refuses_what_its_rule_does_not_name(primitive):
    entry = REGISTRY[primitive]
    assert entry.known({"axis_index_groups": None, "later": None, "other": False}).keys() <= {"axis_index_groups"}
    for value in ("fast", 0, (), True):
        with pytest.raises(UnsupportedCollectiveError) as caught:
            entry.known({"later": value})
        message = str(caught.value)
        assert message.startswith(entry.called)
        assert f"later={value!r} in JAX {jax.__version__}" in message
        assert "Leave later out of the call" in message


def test_a_sum_of_products_refuses_it_too():
    eqn = jax.make_jaxpr(lambda x: lax.psum(x, AXIS), axis_env=[(AXIS, 4)])(1.0).eqns[0]
    with pytest.raises(UnsupportedCollectiveError, match=r"psum, or pmean, has the parameter mode='fast'"):
        Sum(eqn.replace(params={**eqn.params, "mode": "fast"}), {}).run(None, None)  # type: ignore[arg-type]


def test_no_operation_passes_through_by_mistake():
    eqn = jax.make_jaxpr(jnp.sin)(1.0).eqns[0]
    with pytest.raises(UnsupportedCollectiveError, match="sin: replicax has no rule for this operation"):
        Rewriter(layout(AXIS, 4, jax.devices()).scope)._leaf(eqn, [1.0])


def test_the_message_about_an_unknown_collective_lists_those_in_the_registry():
    message = str(unsupported("pmode", [AXIS]))
    names = sorted({name for entry in REGISTRY.values() for name in entry.names})
    assert f"It has rules for {', '.join(names)}. " in message
    assert {"psum", "pmean", "ppermute", "pmedian"} <= {*names}
    assert all(name in message for entry in REGISTRY.values() for name in entry.names)
    for primitive, reason in REFUSED.items():
        assert primitive not in REGISTRY
        assert reason in str(unsupported(primitive, [AXIS]))


def test_what_is_started_is_awaited():
    """JAX's ``_start`` primitives and the primitives that wait for them are in the entry of their collective."""
    for entry in REGISTRY.values():
        starts = any(primitive.endswith("_start") for primitive in entry.primitives)
        assert starts == bool(entry.awaited_by)
        assert set(entry.awaited_by) <= AWAITING


def code_of(function, found=None):
    """The code objects of all replicax functions that a function reaches, including its own."""
    found = set() if found is None else found
    if not isinstance(function, types.FunctionType) or function.__code__ in found:
        return found
    if not (function.__module__ or "").startswith("replicax"):
        return found
    found.add(function.__code__)
    names, codes = set(), [function.__code__]
    for code in codes:
        names |= set(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    values = [function.__globals__.get(name) for name in names]
    values += [getattr(value, name, None) for value in values if isinstance(value, types.ModuleType) for name in names]
    values += [cell.cell_contents for cell in function.__closure__ or ()]
    for value in values:
        code_of(value, found)
    return found


@pytest.mark.parametrize("primitive", REGISTRY)
def test_a_definition_shares_no_code_with_the_rule(primitive):
    entry = REGISTRY[primitive]
    rule, definition = code_of(entry.rule), code_of(entry.definition)
    assert rule
    assert definition
    assert not rule & definition

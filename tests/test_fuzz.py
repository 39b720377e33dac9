"""A fixed set of random programs, and a check that broken rules are found. ``make fuzz`` runs more."""

import dataclasses

import pytest

import fuzzing
from replicax._engine.collectives import REGISTRY, reductions


@pytest.mark.long
@pytest.mark.parametrize("part", range(6))
def test_random_programs(part):
    campaign, number = fuzzing.Campaign(patience=20), 50 * part
    while campaign.counts["programs", "all"] < 3 and not campaign.failures:
        campaign.run(number, 10)
        number += 1
    assert not campaign.failures, campaign.failures[0]
    assert not [what for kind, what in campaign.counts if kind == "refused"]


PSUM, PPERMUTE = REGISTRY["psum"].rule, REGISTRY["ppermute"].rule


def sum_with_padding(logical, x, **parameters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "where_replica", lambda axes, x: x)
        return PSUM(logical, x, **parameters)


def permutation_reversed(logical, x, *, perm, **parameters):
    return PPERMUTE(logical, x, perm=[(b, a) for a, b in perm], **parameters)


@pytest.mark.parametrize(
    ("primitive", "broken"), [("psum", sum_with_padding), ("ppermute", permutation_reversed)], ids=["psum", "ppermute"]
)
def test_a_broken_rule_is_found(monkeypatch, primitive, broken):
    monkeypatch.setitem(REGISTRY, primitive, dataclasses.replace(REGISTRY[primitive], rule=broken))
    campaign = fuzzing.Campaign()
    for number in range(10):
        campaign.run(number, 30, [primitive], shrink=False)
        if campaign.failures:
            break
    assert campaign.failures, "no program showed it"
    assert "pmap and the reference computed different values" in campaign.failures[0]
    assert f"lax.{primitive}(" in campaign.failures[0]

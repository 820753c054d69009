"""The table of the demo's policies."""

import pytest

from pipeline.toy.policy_table import policy_lines


def policy(*points):
    return [{"reward": reward, "reward_se": 0.1, "kl": kl} for kl, reward in [(0.0, 1.0), *points]]


def test_policies_are_compared_at_kls_that_all_of_them_reach():
    """At a KL of 1 the first is half way between 0 and 4 (in the square root), and the second at its only point."""
    lines = policy_lines({"DPO": policy((4.0, 3.0)), "weights": policy((1.0, 2.5))})
    assert [line.split() for line in lines[1:]] == [
        ["KL", "1", "at", "the", "end", "of", "its", "training"],
        ["DPO", "2.00", "3.00", "at", "a", "KL", "of", "4.00", "nats"],
        ["weights", "2.50", "2.50", "at", "a", "KL", "of", "1.00", "nats"],
    ]
    assert "(± 0.10) at equal KL to the starting model, whose reward is 1.00" in lines[0]


@pytest.mark.parametrize(("kl", "column"), [(0.25, "KL 0.25"), (2.5, "KL 1     KL 2")])
def test_the_kls_are_those_that_were_reached(kl, column):
    assert column in policy_lines({"DPO": policy((9.0, 3.0)), "weights": policy((kl, 2.0))})[1]

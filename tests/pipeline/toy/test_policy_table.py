"""The table of the demo's policies."""

import pytest

from pipeline.toy.policy_table import policy_lines


def policy(*points):
    return [{"reward": reward, "reward_se": 0.1, "kl": kl} for kl, reward in [(0.0, 1.0), *points]]


def table(dpo, weights, oracle):
    return policy_lines({"DPO": policy(dpo), "published weights": policy(weights), "oracle weights": policy(oracle)})


def test_policies_are_compared_at_kls_that_all_of_them_reach():
    """At a KL of 1 DPO is half way between 0 and 4 (in the square root), and the weights are at their only point."""
    first, *lines = table((4.0, 3.0), (1.0, 2.5), (4.0, 5.0))
    assert "(± 0.10) at equal KL to the starting model, whose reward is 1.00" in first
    assert lines.pop() == (
        "  so the published weights close 50 % of the gap from DPO to oracle weights "
        "(one run; β is 0.1 for DPO and 0.3 with weights)"
    )
    assert [line.split() for line in lines] == [
        ["KL", "1", "at", "the", "end", "of", "its", "training"],
        ["DPO", "2.00", "3.00", "at", "a", "KL", "of", "4.00", "nats"],
        ["published", "weights", "2.50", "2.50", "at", "a", "KL", "of", "1.00", "nats"],
        ["oracle", "weights", "3.00", "5.00", "at", "a", "KL", "of", "4.00", "nats"],
    ]


@pytest.mark.parametrize(("kl", "column"), [(0.25, "KL 0.25"), (2.5, "KL 1     KL 2")])
def test_the_kls_are_those_that_were_reached(kl, column):
    assert column in table((9.0, 3.0), (kl, 2.0), (9.0, 4.0))[1]

"""Estimators of token weights, each a pure function on flat arrays, without a loop over tokens.

An estimator computes the weights of one side from what is stored of its response tokens, so that changing the estimator takes
seconds on the CPU. To add one, write its function in a module here. `@estimator` makes it known to recipes: its keyword
arguments are the keys of [weights] that it reads, with their defaults; the first line of its docstring is its row in
docs/weights.md.

EOS is a token like any other. Weights are at least 0: a negative one would reverse the gradient. Those of `tis` and of the
release's transforms are not normalised.
"""
# ruff: noqa: I001  (the order of the modules is that of the rows in the docs)

from pipeline.weighing.estimators.registry import ESTIMATORS, Estimator, Input, SideScores, SideWeights, ensemble
from pipeline.weighing.estimators import tis_dpo, tis_release, token_rewards, other_sources, own_marks

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Input",
    "SideScores",
    "SideWeights",
    "ensemble",
    "other_sources",
    "own_marks",
    "tis_dpo",
    "tis_release",
    "token_rewards",
]

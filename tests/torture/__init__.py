"""Tortures a store: single damages, kills at random moments, and builds beside vacuum and optimize.

`make torture` runs it for half an hour (`__main__.py`); `test_torture.py` runs a small sample of everything. Every case follows
from a seed and its number, so a failing one can be repeated alone. Not here: the laws that each case breaks, which are tested
beside the code that keeps them.
"""

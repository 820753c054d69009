"""Pairs in: one pinned version of a weight dataset, checked, selected, and put in order.

Not here: how pairs become batches of tensors (`model/collate.py`).
"""

"""Attention over packed pairs: who sees whom (`layout`), and three ways to compute it on a CPU or a GPU (`packed` chooses).

Not here: which models can be packed (`../packing.py`), and how pairs become a packed row (`../collate.py`).
"""

"""From stored log-probs and attributions to token weights, as pure functions on flat arrays.

Not here: reading the tables and publishing the result (`stages/publish.py`).
"""

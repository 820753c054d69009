"""From stored log-probs and attributions to token weights: pure functions on flat arrays, and the recipe section for them.

Not here: writing and committing the result (`stages/publish.py`).
"""

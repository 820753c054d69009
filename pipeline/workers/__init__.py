"""The processes that run a model over all pairs: what they are asked, what they compute, and who restarts them.

Not here: vLLM itself (`engine/`), and gradients (`train/model/attribution.py`).
"""

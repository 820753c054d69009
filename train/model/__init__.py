"""The policy: loading, packing, log-probs, gradients with respect to inputs, and sampling.

Not here: optimisation (`job/`).
"""

"""The demo's made-up language with known token rewards, and a maker of small chat models.

Nothing of a real build depends on it.
"""

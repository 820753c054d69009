"""One training run from its settings to the finished folder: trainer, gate, refresh, output.

Not here: the command line (`train/run.py`).
"""

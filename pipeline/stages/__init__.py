"""The stages of a build: one file and one public function each, in the order that `flows/build.py` calls them.

Not here: the processes that run a model (`workers/`), and how weights are computed (`weighing/`).
"""

"""Training from a weight dataset: one model, no reference model, no vLLM, no Prefect.

`python -m train.run` is the command, `train.run.run` the function behind it.
"""

"""The training job: streams one pinned version of a weight dataset, loads one model and no reference model.

`tokenweights train` is the command (`run.py`), `train.job.job.run_job` the function. Imports torch, transformers, accelerate
and `weights_store`; nothing of `pipeline` or `flows`, no vLLM and no Prefect.
"""

"""The hub: push weight datasets and trained policies to it, pull weight datasets from it.

`run.py` has the commands, `repository.py` is the only file that talks to the hub. What is pushed is made in
`weights_store/sharing/`.
"""

"""Where Prefect imports our flows from: `tokenweights serve` and prefect.yaml name this module.

Prefect puts the working directory first on the path while it imports a flow. A user's own flows.py or train.py in that folder
would then be imported as ours. So this module, whose name no user's file has, imports the flows without that folder.
"""

import os
import sys

_folder = os.getcwd()  # noqa: PTH109 - pathlib would itself be searched there
_is_first = sys.path[0] == _folder
if _is_first:
    del sys.path[0]
try:
    from flows.build import build_weights, refresh_weights
    from flows.training import build_and_train, train_policy
    from flows.worker import prepare_process
finally:
    if _is_first:
        sys.path.insert(0, _folder)  # Prefect removes it itself

prepare_process()

__all__ = ["build_and_train", "build_weights", "refresh_weights", "train_policy"]

"""What is seen of a run: plain lines, a bar on a terminal, and the end of a step as the place to stop."""
# ruff: noqa: ARG002  (callbacks take what the Trainer hands out)

import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.logging import tqdm

from train.job.stopping import StopRequest
from weights_store.errors import MissingExtraError, SettingsError
from weights_store.messages import logger

_log = logger(__name__)

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "weighted_rewards/margins", "learning_rate")


def check_tracker(name: str) -> None:
    """Check that `output.report_to` names a tracker that can be used here.

    Raises:
        SettingsError: transformers does not know it.
        MissingExtraError: Its package is not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if name == "none" or name in get_available_reporting_integrations():
        return
    if name in INTEGRATION_TO_CALLBACK:
        raise MissingExtraError(f"output.report_to={name!r} needs a package that is not installed; pip install {name}")
    known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
    raise SettingsError(f"output.report_to={name!r} is no tracker that transformers knows; expected none, {known}")


class ProgressLines(TrainerCallback):
    """Print one line per log, and show a bar where stderr is a terminal."""

    def __init__(self, pairs_per_step: int) -> None:
        self.pairs_per_step = pairs_per_step
        self._bar: Any = None
        self._logged_step = 0
        self._logged_at_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar."""
        self._logged_step, self._logged_at_s = state.global_step, time.monotonic()
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            values = "  ".join(f"{name} {logs[f'eval_{name}']:.4g}" for name in _SHOWN if f"eval_{name}" in logs)
            _log.info(f"held out at step {state.global_step}  {values}")
        if "loss" not in logs:
            return
        now_s = time.monotonic()
        pairs = (state.global_step - self._logged_step) * self.pairs_per_step
        rate = pairs / max(now_s - self._logged_at_s, 1e-9)
        self._logged_step, self._logged_at_s = state.global_step, now_s
        values = "  ".join(f"{name} {logs[name]:.4g}" for name in _SHOWN if name in logs)
        _log.info(f"step {state.global_step}/{state.max_steps}  {values}  {rate:.1f} pairs/s")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class LogLastStep(TrainerCallback):
    """Log after the last step too, so that no step is missing from the record."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the Trainer to log."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control


class StopAfterStep(TrainerCallback):
    """Save a checkpoint and leave the loop after the step in which a stop was requested.

    Only in a single process: ranks would see a signal at different steps and wait for each other.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal waits for the end of the step."""
        self.stop.can_finish_step = args.world_size == 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the Trainer to save and to stop."""
        if self.stop.requested:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal interrupts at once."""
        self.stop.can_finish_step = False

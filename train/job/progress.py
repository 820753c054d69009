"""Callbacks of the Trainer: lines and progress, a log of the last step, and a stop at the end of a step."""
# ruff: noqa: ARG002  (the Trainer chooses what callbacks take; they change `control` in place)

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from train.job.stopping import StopRequest
from weights_store.errors import MissingExtraError, SettingsError
from weights_store.messages import Progress, logger, show

_log = logger(__name__)

_SHOWN = ("loss", "nll", "rewards/accuracies", "rewards/margins", "weighted_rewards/margins", "learning_rate")


def check_tracker(name: str) -> None:
    """Check that `output.report_to` names a tracker that can be used here.

    Raises:
        SettingsError: transformers does not know it.
        MissingExtraError: Its package is not installed.
    """
    if name == "none" or name in get_available_reporting_integrations():
        return
    if name in INTEGRATION_TO_CALLBACK:
        raise MissingExtraError(f"output.report_to={name!r} needs a package that is not installed; pip install {name}")
    known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
    raise SettingsError(f"output.report_to={name!r} is not a tracker that transformers knows; expected none, {known}")


def metrics_line(metrics: dict[str, float]) -> str:
    """Return the most important of the metrics, as text."""
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics)


class ProgressLines(TrainerCallback):
    """Show how far the training is, and log one line for each log of the Trainer.

    Args:
        pairs_per_step: As in the config.
        rows_are: What the lines call them.
    """

    def __init__(self, pairs_per_step: int, rows_are: str) -> None:
        self.pairs_per_step = pairs_per_step
        self.rows_are = rows_are
        self._first_step = self._logged_step = 0
        self._began_s = self._logged_at_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock."""
        self._first_step = self._logged_step = state.global_step
        self._began_s = self._logged_at_s = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Show the progress of this run; steps before a resume are not part of it."""
        if state.is_world_process_zero:
            done, total = (step - self._first_step for step in (state.global_step, state.max_steps))
            wall_s = time.monotonic() - self._began_s
            show(Progress("train", done * self.pairs_per_step, total * self.pairs_per_step, wall_s, self.rows_are))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: object
    ) -> None:
        """Log the line."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            held_out = {name.removeprefix("eval_"): value for name, value in logs.items()}
            _log.info(f"held out at step {state.global_step}  {metrics_line(held_out)}")
        if "loss" not in logs:
            return
        now_s = time.monotonic()
        pairs = (state.global_step - self._logged_step) * self.pairs_per_step
        rate = pairs / max(now_s - self._logged_at_s, 1e-9)
        self._logged_step, self._logged_at_s = state.global_step, now_s
        _log.info(f"step {state.global_step}/{state.max_steps}  {metrics_line(logs)}  {rate:.1f} {self.rows_are}/s")


class LogLastStep(TrainerCallback):
    """Log after the last step, so that no step is missing from the record."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask the Trainer to log."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class StopAfterStep(TrainerCallback):
    """Save a checkpoint and stop after the step in which a stop was requested.

    Only in a single process: several ranks would see a signal at different steps and wait for each other.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """From here on a signal waits for the end of the step."""
        self.stop.can_finish_step = args.world_size == 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask the Trainer to save and to stop."""
        if self.stop.requested:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """From here on a signal interrupts at once."""
        self.stop.can_finish_step = False

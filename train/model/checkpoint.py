"""Load a model folder with transformers: all of its weights, or an error. Called by `lora.py` and `parity_process.py`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_store.errors import InputError
from weights_store.messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_checkpoint(folder: Path, **options: Any) -> "PreTrainedModel":
    """Return the language model of a folder on the CPU, in evaluation mode.

    Args:
        folder: Of a whole model.
        **options: Of `from_pretrained`, for example the `dtype`.

    Raises:
        InputError: It cannot be loaded, or lacks weights: transformers would make them up at random.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"transformers cannot load the model {folder}: {first_line(error)}") from error
    if report["missing_keys"]:
        raise InputError(f"the model {folder} lacks weights, for example {min(report['missing_keys'])}")
    return model.eval()  # type: ignore[no-any-return]

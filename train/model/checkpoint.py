"""Load the model of a folder with transformers: its config, and all of its weights, or an error."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_store.errors import InputError
from weights_store.messages import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
)
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates")


def load_model_config(folder: Path) -> "PretrainedConfig":
    """Return the config of the model in a folder.

    Raises:
        InputError: It cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the config of the model in {folder}: {first_line(error)}") from error


def load_checkpoint(folder: Path, **options: Any) -> "PreTrainedModel":
    """Return the language model of a folder on the CPU, in evaluation mode; `options` are those of `from_pretrained`.

    Raises:
        InputError: It cannot be loaded, or lacks weights: transformers would fill them with random numbers.
    """
    from transformers import AutoModelForCausalLM

    if getattr(load_model_config(folder).get_text_config(), "attn_logit_softcapping", None):
        # Gemma 2: transformers' default attention leaves the soft-capping out without a warning.
        options = {"attn_implementation": "eager", **options}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"transformers cannot load the model {folder}: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"the model {folder} lacks weights; they would be random: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    return model.eval()

"""GRPO through TRL, as a reference point: it samples from the policy and gets the true reward of every sample.

No method that learns from pairs has that, so this is not a competitor. Called by `runs.py` for settings of loss `grpo`.
"""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.quality.worlds import World
from pipeline.toy.policies import Look

SAMPLES_PER_STEP, SAMPLES_PER_PROMPT = 64, 8
"""As many responses in a step as 32 pairs have."""


def train_grpo(
    world: World,
    beta: float,
    optim: Mapping[str, Any],
    *,
    steps: tuple[int, ...],
    look: Callable[[int, nn.Module], None],
) -> None:
    """Train a policy on the true rewards of its own samples, and look at it after some steps.

    `beta` is the factor of the KL to the reference; other settings are the defaults of TRL.
    """
    texts = {prompt.tobytes(): " ".join(map(str, prompt)) for prompt in world.prompts}

    def rewards(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        asked = [np.array(prompt.split(), np.int32) for prompt in prompts]
        return [
            float(world.rewards.of(*each).sum())
            for each in zip(asked, (np.array(ids, np.int32) for ids in completion_ids), strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=optim["max_steps"],
            learning_rate=optim["learning_rate"],
            lr_scheduler_type="constant",
            beta=beta,
            per_device_train_batch_size=SAMPLES_PER_STEP,
            num_generations=SAMPLES_PER_PROMPT,
            max_completion_length=world.num_new,
            use_cpu=world.base.device.type == "cpu",
            bf16=world.base.dtype == "bfloat16",
            gradient_checkpointing=False,
            logging_steps=1_000_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            world.base.config.path,
            rewards,
            arguments,
            Dataset.from_list([{"prompt": text} for text in texts.values()]),
            processing_class=_spelt_out(world),
            callbacks=[Look(steps, look)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _spelt_out(world: World) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose texts are ids: TRL wants text, and the planted world has none."""
    vocab_size, end = world.base.plain.config.vocab_size, str(world.base.end_ids[0])
    spelling = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    spelling.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=spelling, pad_token="0", eos_token=end, padding_side="left")

"""Models and pairs that several parts take: made by the first, and found by the others."""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.train_contenders import Job
from benchmarks.train_inputs import make_inputs

_TOKENS_PER_PAIR = 320
"""A little more than the 295 that they have on average, prompts counted once, so that as many are at once as TRL has."""


def train_job(ctx: Context) -> Job:
    """Return a run of our trainer with the sizes of the run; make the model and the weight dataset if nobody has."""
    sizes = ctx.sizes
    work = ctx.work / "train"
    made = work / "made.json"
    if not made.exists():
        num_pairs = (sizes.warm_up + sizes.steps) * sizes.pairs_per_step
        inputs = make_inputs(work, ctx.shared, ctx.device, sizes.vocabulary, num_pairs)
        made.write_text(json.dumps(inputs))
    inputs = json.loads(made.read_text())
    return Job(
        "ours",
        **inputs,
        device=ctx.device,
        num_steps=sizes.warm_up + sizes.steps,
        warm_up=sizes.warm_up,
        pairs_per_step=sizes.pairs_per_step,
        pairs_at_once=sizes.pairs_at_once,
        settings={"optim": {"tokens_per_batch": _TOKENS_PER_PAIR * sizes.pairs_at_once}},
    )


def llama_config(body: dict[str, int], vocab_size: int) -> Any:
    """Return the config of a Llama with half as many heads of keys and values."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **body,
        vocab_size=vocab_size,
        num_key_value_heads=body["num_attention_heads"] // 2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def score_model(ctx: Context) -> Path:
    """Return the folder of the model that scores: random weights in bfloat16 beside the small chat model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny = ctx.shared / "models" / "tiny-chat"
    if ctx.sizes.score_model is None:
        return tiny
    folder = ctx.work / "score-model"
    if not (folder / "made").exists():
        torch.manual_seed(0)
        with torch.device(ctx.device):
            model = AutoModelForCausalLM.from_config(llama_config(ctx.sizes.score_model, 131_072), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        for path in (*tiny.glob("tokenizer*"), *tiny.glob("chat_template*"), *tiny.glob("special_tokens_map.json")):
            shutil.copyfile(path, folder / path.name)
        (folder / "made").touch()
    return folder

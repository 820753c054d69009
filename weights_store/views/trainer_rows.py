"""Rows of a weight dataset as lines of JSON for other trainers; docs/trainers.md says what each of them keeps and loses.

A line is one pair with both its responses, never one of two neighbours. Not here: writing the files (`export.py`), and TRL,
which has an adapter in `train/`.
"""

import json
from collections.abc import Iterator

import polars as pl

from weights_store.errors import InputError, MismatchError
from weights_store.schemas import SIDES
from weights_store.views.token_texts import TokenTexts


def datum_lines(rows: pl.DataFrame) -> pl.Series:
    """Return a line for each pair with a Datum of the tinker API for each response, and what a Datum cannot hold.

    `chosen`, `rejected`: `model_input` has the ids of prompt and response without the last one. In `loss_fn_inputs`, the
    `target_tokens` are the ids from the second on, and `weights` are theirs, 0 on the prompt. `chosen_ref_logprobs` and
    `rejected_ref_logprobs`, in nats, have one number for each target too, 0 on the prompt. `pair_id` and `pair_weight` are
    those of the dataset. Of a pair without a prompt, the first response token is no target, because nothing predicts it.
    """
    datums = [_datum(side).alias(side) for side in SIDES]
    ref_logprobs = [_of_targets(f"{side}_ref_logps").alias(f"{side}_ref_logprobs") for side in SIDES]
    line = pl.struct("pair_id", "pair_weight", *datums, *ref_logprobs)
    return rows.select(line=line.struct.json_encode())["line"]


def _datum(side: str) -> pl.Expr:
    tokens = pl.concat_list("prompt_ids", f"{side}_ids")
    num_targets = tokens.list.len() - 1
    chunk = pl.struct(type=pl.lit("encoded_text"), tokens=tokens.list.head(num_targets))
    targets, weights = tokens.list.tail(num_targets), _of_targets(f"{side}_token_weights")
    return pl.struct(
        model_input=pl.struct(chunks=pl.concat_list(chunk)),
        loss_fn_inputs=pl.struct(target_tokens=_tensor(targets, "int64"), weights=_tensor(weights, "float32")),
    )


def _of_targets(column: str) -> pl.Expr:
    """Return the numbers of response tokens for all targets: the tokens of prompt and response but the first."""
    on_prompt = pl.lit(0, pl.Float32).repeat_by(pl.col("prompt_ids").list.len())
    return pl.concat_list(on_prompt, column).list.slice(1)


def _tensor(values: pl.Expr, dtype: str) -> pl.Expr:
    return pl.struct(data=values, dtype=pl.lit(dtype), shape=pl.concat_list(values.list.len().cast(pl.Int64)))


def loss_scale_lines(rows: pl.DataFrame, texts: TokenTexts | None) -> pl.Series:
    """Return a line for each pair with `messages` and `rejected_messages`, as ms-swift reads them with template `dummy`.

    Each has two turns: the prompt as text, because ms-swift takes no ids there, and the response as `token_ids` with their
    weights as `loss_scale`. `add_eos` is false, so that a response that was cut gets no end.

    Raises:
        InputError: There is no tokenizer, or it cannot encode, or it adds tokens behind every text.
        MismatchError: With this tokenizer, ms-swift would make other ids of a prompt's text than the dataset has.
    """
    if texts is None:
        raise InputError(
            "the format loss_scale has prompts as texts, which needs the model's tokenizer: give --tokenizer"
        )
    prompts = pl.Series("prompt", _prompts(rows, texts), pl.String)
    turns = {name: _turns(side) for name, side in zip(("messages", "rejected_messages"), SIDES, strict=True)}
    parts = [part for name, turn in turns.items() for part in (pl.lit(f'"{name}":'), turn, pl.lit(","))]
    line = pl.concat_str(pl.lit("{"), *parts, pl.lit('"add_eos":false}'))
    return rows.with_columns(prompts).select(line=line)["line"]


def _turns(side: str) -> pl.Expr:
    response = pl.struct(token_ids=f"{side}_ids", loss_scale=f"{side}_token_weights").struct.json_encode()
    user, assistant = '[{"role":"user","content":', '},{"role":"assistant","content":'
    return pl.concat_str(pl.lit(user), "prompt", pl.lit(assistant), response, pl.lit("}]"))


def _prompts(rows: pl.DataFrame, texts: TokenTexts) -> Iterator[str]:
    """Yield the text of each prompt as JSON, without the tokens that the tokenizer puts in front of every text."""
    alone, marked = texts.encode("a"), texts.encode("a", with_marks=True)
    if marked[len(marked) - len(alone) :] != alone:
        raise InputError(
            f"the tokenizer makes {marked} of a text that is {alone}: ms-swift would train on what it adds behind every text; "
            "export another format"
        )
    marks = marked[: len(marked) - len(alone)]
    for pair_id, ids in rows.select("pair_id", "prompt_ids").iter_rows():
        text = texts.join(ids[len(marks) :] if ids[: len(marks)] == marks else ids)
        if (found := marks + texts.encode(text)) != ids:
            raise MismatchError(
                f"pair {pair_id}: with this tokenizer ms-swift would make {len(found)} ids of the prompt's text that differ "
                f"from the {len(ids)} of the dataset; give the tokenizer of the model that the pairs were tokenised with, or "
                "export another format"
            )
        yield json.dumps(text, ensure_ascii=False)

"""Columns of every table in the store, and the closed list of reasons for quarantine.

The contract between the stages, the trainer and people with Polars. Lists have one entry per response token, EOS included.
Only types that Delta keeps as they are: no unsigned integers, no float16. Columns that may be null hold what only some builds
make.
"""

from enum import StrEnum
from typing import Literal

import pyarrow as pa

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
"""The two responses of a pair, in the order of every loop over them."""

SCHEMA_VERSION = 1
"""Part of every fingerprint; goes up when the meaning of a stored column changes."""

IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
FLOATS = pa.list_(pa.field("element", pa.float32(), nullable=False))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


TOKENS = pa.schema(
    [
        _required("pair_id", pa.string()),
        # JSON of the chat as tokenised (`Chat` in pipeline/chat/rendering.py): method P puts a system turn in front.
        _required("prompt", pa.string()),
        _required("prompt_ids", IDS),
        _required("chosen_ids", IDS),
        _required("rejected_ids", IDS),
        pa.field("chosen_score", pa.float32()),
        pa.field("rejected_score", pa.float32()),
        _required("source_row", pa.int64()),
        _required("split", pa.string()),
    ]
)
"""One row per preference pair, tokenised. An unpaired row has its response on the side of its label, and an empty list on the
other side, here and in all tables."""

LOGPS = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("chosen_logps", FLOATS),
        _required("rejected_logps", FLOATS),
        pa.field("chosen_top_ids", IDS),
        pa.field("chosen_top_logps", FLOATS),
        pa.field("rejected_top_ids", IDS),
        pa.field("rejected_top_logps", FLOATS),
    ]
)
"""Per-token log-probabilities (nats, <= 0) of one scorer. With `score.top_k` > 0 also the k most likely tokens at each position
and their log-probs: k entries per response token, the most likely first; else null."""

ATTRIBUTIONS = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("chosen_attributions", FLOATS),
        _required("rejected_attributions", FLOATS),
        pa.field("chosen_prompt_attribution", pa.float32()),
        pa.field("rejected_prompt_attribution", pa.float32()),
        pa.field("chosen_activations", FLOATS),
        pa.field("rejected_activations", FLOATS),
        pa.field("chosen_contexts", FLOATS),
        pa.field("rejected_contexts", FLOATS),
    ]
)
"""L1 norms of the gradient of a target with respect to each response token's input embedding (>= 0, un-normalised). On request
also their sum over the prompt's tokens, the mean size of the hidden states that predict each token (> 0, relative to the
response's mean), and `attribute.contexts` numbers per token for its context (`train/model/contexts.py`); else null."""

ANCHORS = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("anchor_ids", IDS),
        _required("anchor_logps", FLOATS),
    ]
)
"""A response that the reference policy sampled for each pair's prompt, and its log-probs under that policy (nats, <= 0, at
temperature 1 and without top-k or top-p)."""

ANNOTATIONS = pa.schema(
    [
        _required("pair_id", pa.string()),
        pa.field("chosen_values", FLOATS),
        pa.field("rejected_values", FLOATS),
        pa.field("pair_value", pa.float32()),
    ]
)
"""The weights that a user has put into columns of the source, or given to roles: one number per response token (>= 0), for
estimators `column` and `spans` and `weights.roles`, and one per pair (>= 0), with pair weight `column`; else null."""

WEIGHTS = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("prompt_ids", IDS),
        _required("chosen_ids", IDS),
        _required("rejected_ids", IDS),
        _required("chosen_token_weights", FLOATS),
        _required("rejected_token_weights", FLOATS),
        _required("chosen_ref_logps", FLOATS),
        _required("rejected_ref_logps", FLOATS),
        _required("pair_weight", pa.float32()),
        pa.field("anchor_ids", IDS),
        pa.field("anchor_ref_logps", FLOATS),
        _required("split", pa.string()),
        pa.field("chosen_score", pa.float32()),
        pa.field("rejected_score", pa.float32()),
        pa.field("chosen_ref_top_ids", IDS),
        pa.field("chosen_ref_top_logps", FLOATS),
        pa.field("rejected_ref_top_ids", IDS),
        pa.field("rejected_ref_top_logps", FLOATS),
    ]
)
"""What training reads: self-contained, one row per pair."""

QUARANTINE = pa.schema(
    [
        _required("source_row", pa.int64()),
        pa.field("pair_id", pa.string()),
        _required("reason", pa.string()),
        _required("detail", pa.string()),
        _required("raw", pa.string()),
    ]
)
"""Pairs that could not be used, with the reason."""

SCHEMAS = {
    "tokens": TOKENS,
    "logps": LOGPS,
    "attributions": ATTRIBUTIONS,
    "anchors": ANCHORS,
    "annotations": ANNOTATIONS,
    "weights": WEIGHTS,
    "quarantine": QUARANTINE,
}
"""The columns of each kind of table."""

KEYS: dict[str, tuple[str, ...]] = dict.fromkeys(SCHEMAS, ("pair_id",)) | {"quarantine": ("source_row", "detail")}
"""The columns that identify a row of each kind of table. Its shards are sorted by them."""


class Reason(StrEnum):
    """Why a row is in quarantine. Closed: a new reason is a change of the schema."""

    UNPARSABLE_JSON = "unparsable_json"
    INVALID_UTF8 = "invalid_utf8"
    ROW_TOO_LARGE = "row_too_large"
    MISSING_VALUE = "missing_value"
    NOT_TEXT = "not_text"
    BAD_LABEL = "bad_label"
    UNKNOWN_ROLE = "unknown_role"
    BAD_TOOLS = "bad_tools"
    ALREADY_TEMPLATED = "already_templated"
    MANY_ANSWERS = "many_answers"
    NO_PROMPT = "no_prompt"
    PROMPTS_DIFFER = "prompts_differ"
    NO_FINAL_ASSISTANT_TURN = "no_final_assistant_turn"
    EMPTY_RESPONSE = "empty_response"
    CHOSEN_EQUALS_REJECTED = "chosen_equals_rejected"
    DUPLICATE_PAIR = "duplicate_pair"
    PROMPT_TOO_LONG = "prompt_too_long"
    RESPONSE_TOO_LONG = "response_too_long"
    TEMPLATE_MISMATCH = "template_mismatch"
    TEMPLATE_IGNORES = "template_ignores"
    CONTROL_TOKENS = "control_tokens"
    BAD_WEIGHTS = "bad_weights"
    UNSCORABLE = "unscorable"


OF_LATER_STAGES = (Reason.BAD_WEIGHTS.value, Reason.UNSCORABLE.value)
"""Reasons why a pair that has its tokens is in quarantine. The detail begins with the table that has no row for it."""

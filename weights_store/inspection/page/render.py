"""Puts a view into the template: all of the page's parts, and a policy that lets nothing else in."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from weights_store.inspection.measures import MEASURES
from weights_store.inspection.page.charts import by_position, histogram, side_numbers
from weights_store.inspection.page.tokens import (
    FULL_LOG2,
    NUM_STEPS,
    name_hidden,
    packed,
    packed_indices,
    rows_of,
    visible,
)
from weights_store.inspection.pairs import ShownPair, ShownSide
from weights_store.inspection.view import View
from weights_store.schemas import SIDES

_MAX_PROMPT, _PROMPT_END = 20_000, 130
"""Characters of a prompt on the page, and of its end that is shown before it is opened."""
_COMPARED = {
    "num_common": "pairs in both",
    "num_only_here": "pairs in A only",
    "num_only_there": "pairs in B only",
    "num_differing_tokens": "pairs with other tokens",
    "num_tokens": "tokens compared",
    "correlation": "correlation of the weights",
    "num_disagreeing": "tokens above 1 in one, below in the other",
}
_DERIVED = ("logp_neg", "surprise")
"""Measures that the script works out from others, so the page need not hold them. Log-ratios are held: they are small
differences of large numbers, which have three digits here."""


def render(view: View) -> str:
    """Return the page about a view: one HTML document that needs no other file and asks nothing of a network.

    Its policy (Content-Security-Policy) allows the page's own style and script by their hashes, pictures inside the file, and
    nothing else, so that a token's text cannot run even if it were not escaped.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(__file__).parent
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_named
    )
    environment.filters["prose"] = _prose
    template = environment.from_string(folder.joinpath("template.html").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    columns = _side_columns(view)
    return template.render(
        view=view,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=_json(_data(view)),
        charts={"histogram": histogram(view.survey), "position": by_position(view.survey)},
        columns=columns,
        labels=list(dict.fromkeys(label for column in columns.values() for label in column)),
        token_lists=_token_lists(view),
        pairs=[_pair(pair, index) for index, pair in enumerate(view.pairs)],
        measures=[MEASURES[name] for name in view.measures],
        comparison=[(_COMPARED.get(key, key), _number(value)) for key, value in (view.comparison or {}).items()],
        splits=sorted({pair.split for pair in view.pairs}),
        steps=range(-NUM_STEPS, NUM_STEPS + 1),
        plots=[(title, _picture(svg)) for title, svg in view.plots],
    )


def _named(value: object) -> object:
    """Make visible what hides or reorders text in names, splits and settings too, before the template escapes them."""
    return name_hidden(value) if type(value) is str else value


def _side_columns(view: View) -> dict[str, dict[str, str]]:
    """Return the numbers of each side by label, of both datasets if two are compared."""
    surveys = {"": view.survey} if view.other_survey is None else {"A ": view.survey, "B ": view.other_survey}
    return {
        f"{which}{name}": side_numbers(side)
        for which, survey in surveys.items()
        for name, side in survey.sides().items()
    }


def _prose(text: str) -> Markup:
    """Return a sentence of the doctor as HTML: with a capital letter (but for π), and `code` where it has backquotes."""
    begin = text[:1] if text.startswith("π") else text[:1].upper()
    parts = name_hidden(f"{begin}{text[1:]}").split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(parts))


def _number(value: object) -> str:
    """Return a count with separators, or a fraction with two digits; a correlation may be None."""
    if value is None:
        return "none: one has constant weights"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else str(value)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _picture(svg: str) -> str:
    """Return an SVG document as an address, so that styles inside it stay inside it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _json(value: object) -> Markup:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _pair(pair: ShownPair, index: int) -> dict[str, object]:
    rows = [(Markup(chosen), Markup(rejected), same) for chosen, rejected, same in rows_of(pair)]
    # Of a long chat the end says most: it is what the responses answer.
    text = pair.prompt
    if len(text) > _MAX_PROMPT:
        text = f"(the end of {len(text):,} characters) … {text[-_MAX_PROMPT:]}"
    prompt = visible(text, len(text))
    end = prompt if len(prompt) <= _PROMPT_END else f"… {prompt[-_PROMPT_END:]}"
    return {"pair": pair, "index": index, "prompt": prompt, "prompt_end": end, "rows": rows}


def _token_lists(view: View) -> list[tuple[str, list[dict[str, object]]]]:
    """Return the heaviest and the lightest tokens of each side, by mean weight, of those that occur often enough."""
    return [
        (f"{title} on {side}", [{**row, "text": _text(view, row["token_id"])} for row in rows.to_dicts()])
        for side in SIDES
        for title, rows in view.survey.extremes(side).items()
        if not rows.is_empty()
    ]


def _text(view: View, token_id: int) -> str:
    text = visible(view.token_texts.get(token_id, f"#{token_id}"))
    word = text.lstrip(" ")
    return "␣" * (len(text) - len(word)) + word or "(part of a character)"


def _data(view: View) -> dict[str, object]:
    """Return what the script reads: numbers of every token, packed, and the texts of the tokens."""
    ids = (token_id for pair in view.pairs for side in (pair.chosen, pair.rejected) for token_id in side.ids)
    index_of = {token_id: index for index, token_id in enumerate(dict.fromkeys(ids))}
    pairs = [
        {
            "id": pair.pair_id,
            "split": name_hidden(pair.split),  # as in the template's list of splits
            "logratio": pair.pair_logratio,
            "effective": round(pair.effective_share, 4),
            "disagreement": pair.disagreement,
            "chosen": _side(pair.chosen, index_of),
            "rejected": _side(pair.rejected, index_of),
        }
        for pair in view.pairs
    ]
    return {
        "steps": NUM_STEPS,
        "full": FULL_LOG2,
        "title": view.title,
        "other": view.other,
        "measures": [
            {"name": each.name, "label": each.label, "unit": each.unit} for each in (MEASURES[m] for m in view.measures)
        ],
        "index_bytes": _index_bytes(index_of),
        "tokens": [[token_id, _text(view, token_id)] for token_id in index_of],
        "pairs": pairs,
    }


def _index_bytes(index_of: Mapping[int, int]) -> int:
    return 2 if len(index_of) <= 1 << 16 else 4


def _side(side: ShownSide, index_of: Mapping[int, int]) -> Mapping[str, object]:
    packed_side: dict[str, object] = {
        "tokens": packed_indices([index_of[token_id] for token_id in side.ids], _index_bytes(index_of)),
        "clamped": "".join("-.+"[each + 1] for each in side.clamped),
        "measures": {name: packed(values) for name, values in side.measures.items() if name not in _DERIVED},
    }
    if side.other_weights is not None:
        packed_side["other"] = packed(side.other_weights)
    return packed_side

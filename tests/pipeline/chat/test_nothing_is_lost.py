"""Property: no key of a message or a row is read without an effect on the ids, a note, or a reason for quarantine."""

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.source.columns import Columns
from pipeline.source.messages import Unusable
from pipeline.source.pairs import read_pair
from tests.pipeline.chat.template_kinds import KINDS

COLUMNS = Columns()
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": {"type": "object"}},
}
EXTRAS = {
    "name": "Ann",
    "weight": "much",
    "tool_call_id": "call00001",
    "reasoning_content": "Look it up.",
    "tool_calls": [CALL],
    "custom": {"deep": ["value"]},
}


@st.composite
def rows(draw):
    """Return a row, and the places of what it has besides roles and texts, as paths of keys."""
    middle = [{"role": "assistant", "content": "Which one?"}, {"role": "tool", "content": "18 C"}]
    prompt = [{"role": "user", "content": "Weather in Lima?"}, *draw(st.sampled_from([[], middle[:1], middle]))]
    row = {
        "prompt": [*prompt, {"role": "user", "content": "So?"}] if draw(st.booleans()) else prompt,
        "chosen": [{"role": "assistant", "content": "It is 18."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }
    places = []
    for column, messages in list(row.items()):
        for index, message in enumerate(messages):
            places.append((column, index, "content"))
            for key in draw(st.sets(st.sampled_from(sorted(EXTRAS)), max_size=1 if draw(st.booleans()) else 0)):
                message[key] = copy.deepcopy(EXTRAS[key])
                places += [(column, index, *path) for path in paths(message[key], (key,))]
    if draw(st.booleans()):
        row["tools"] = [copy.deepcopy(TOOL)]
        places += list(paths(row["tools"], ("tools",)))
    if draw(st.integers(0, 3)) == 0:
        row["chat_template_kwargs"] = {draw(st.sampled_from(["enable_thinking", "other"])): draw(st.booleans())}
    return row, places


def paths(value, path):
    """Yield the path of every text in a JSON value."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def changed(row, path):
    result = copy.deepcopy(row)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] += "Z"
    return result


def ids_of(tokenizer, row):
    tokens = tokenizer.tokenize_pair(read_pair(row, COLUMNS), 10_000, 10_000, False)
    return (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids), " ".join(tokens.notes)


@given(kind=st.sampled_from(sorted(KINDS)), drawn=rows())
@settings(max_examples=300, deadline=None)
def test_every_key_has_an_effect_a_note_or_a_reason(of_kind, kind, drawn):
    row, places = drawn
    tokenizer = of_kind(kind)
    try:
        ids, notes = ids_of(tokenizer, row)
    except Unusable:  # the row is in quarantine, with a reason
        return
    for place in places:
        if place[0] == "prompt" and place[-1] == "reasoning_content":
            continue  # a template that knows reasoning may leave out that of earlier turns: so the model sees it
        try:
            is_same = ids_of(tokenizer, changed(row, place))[0] == ids
        except Unusable:
            is_same = False
        assert not is_same or f"`{place[-1]}`" in notes, (kind, place, row)

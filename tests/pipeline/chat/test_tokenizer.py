import hashlib

import pytest

from pipeline.chat.rendering import Chat
from pipeline.chat.tokenizer import ChatTokenizer, Condition
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint_chat_template
from weights_store.schemas import Reason

USER = {"role": "user", "content": "How do I get started with baking?"}
ANSWER = {"role": "assistant", "content": "the baker mixes"}


@pytest.fixture(scope="module")
def tokenizer(toy_model):
    return ChatTokenizer(toy_model)


def _text(tokenizer, ids):
    return "".join(tokenizer.token_texts(ids))


def _cut(tokenizer, pair, prompt=1000, response=1000, cut=False):
    return tokenizer.tokenize_pair(pair, prompt, response, cut)


def test_response_ends_with_one_eos_and_nothing_after_it(tokenizer):
    tokens = _cut(tokenizer, Pair([USER], "the dough", "sails boldly"))
    assert tokens.chosen_ids[-1] == tokenizer.eos_token_id
    assert tokens.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert _text(tokenizer, tokens.chosen_ids) == "the dough</s>"


def test_prompt_and_response_ids_are_the_whole_chat(tokenizer, toy_model):
    from transformers import AutoTokenizer

    tokens = _cut(tokenizer, Pair([USER], "the dough", "x"))
    reference = AutoTokenizer.from_pretrained(toy_model)
    chat = reference.apply_chat_template([USER, {"role": "assistant", "content": "the dough"}], tokenize=False)
    whole = reference(chat, add_special_tokens=False)["input_ids"]
    assert tokens.prompt_ids + tokens.chosen_ids == whole[: len(tokens.prompt_ids) + len(tokens.chosen_ids)]


def test_eos_text_and_many_byte_characters_inside_a_response_stay_text(tokenizer, toy_model):
    from transformers import AutoTokenizer

    tokens = _cut(tokenizer, Pair([USER], "dough </s> naïve 🍞", "x"))
    assert tokens.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert tokens.chosen_ids[-1] == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(toy_model).decode(tokens.chosen_ids) == "dough </s> naïve 🍞</s>"


def test_too_long_prompt_loses_whole_oldest_turns(tokenizer):
    chat = [USER, ANSWER, {"role": "user", "content": "and then?"}]
    full = _cut(tokenizer, Pair(chat, "a", "b"))
    cut = _cut(tokenizer, Pair(chat, "a", "b"), prompt=len(full.prompt_ids) - 1)
    assert cut.chat.messages == chat[2:]
    assert cut.prompt_was_cut
    assert not full.prompt_was_cut
    assert cut.prompt_ids == _cut(tokenizer, Pair(chat[2:], "a", "b")).prompt_ids


def test_system_turn_survives_cutting(tokenizer):
    system = {"role": "system", "content": "be kind"}
    chat = [system, USER, ANSWER, {"role": "user", "content": "and then?"}]
    full = _cut(tokenizer, Pair(chat, "a", "b"))
    assert _cut(tokenizer, Pair(chat, "a", "b"), prompt=len(full.prompt_ids) - 1).chat.messages == [system, chat[3]]


def test_last_turn_alone_over_the_limit_is_unusable(tokenizer):
    with pytest.raises(Unusable) as caught:
        _cut(tokenizer, Pair([USER], "a", "b"), prompt=3)
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


def test_too_long_response_is_refused_or_cut(tokenizer):
    pair = Pair([USER], "the baker mixes the warm dough", "no")
    with pytest.raises(Unusable) as caught:
        _cut(tokenizer, pair, response=3)
    assert caught.value.reason is Reason.RESPONSE_TOO_LONG
    cut = _cut(tokenizer, pair, response=3, cut=True)
    assert len(cut.chosen_ids) == 3
    assert cut.response_was_cut
    assert cut.chosen_ids == _cut(tokenizer, pair).chosen_ids[:3]


def test_pair_without_a_free_position_in_the_context_is_refused(tokenizer):
    pair = Pair([USER], "the dough", "x")
    tokens = _cut(tokenizer, pair)
    longest = len(tokens.prompt_ids) + max(len(tokens.chosen_ids), len(tokens.rejected_ids))
    assert tokenizer.tokenize_pair(pair, 1000, 1000, False, context=longest + 1) == tokens
    with pytest.raises(Unusable, match=f"have {longest} tokens, the model's context is {longest}"):
        tokenizer.tokenize_pair(pair, 1000, 1000, False, context=longest)


def test_contrastive_system_prompt_goes_in_front_and_extends_one_that_is_there():
    condition = Condition("Be bad.", "system")
    assert condition.apply([USER]) == [{"role": "system", "content": "Be bad."}, USER]
    extended = condition.apply([{"role": "system", "content": "Be brief."}, USER])
    assert extended == [{"role": "system", "content": "Be bad.\n\nBe brief."}, USER]


def test_contrastive_user_prompt_goes_into_the_first_user_turn():
    chat = [USER, ANSWER, {"role": "user", "content": "more"}]
    applied = Condition("Be bad.", "user").apply(chat)
    assert [turn["content"] for turn in applied] == [f"Be bad.\n\n{USER['content']}", ANSWER["content"], "more"]
    assert chat[0] == USER


def test_conditioned_prompt_is_the_rendered_chat_with_the_prompt(tokenizer):
    (ids,) = tokenizer.conditioned_prompt_ids([Chat([USER]).to_json()], Condition("Be bad.", "system"))
    system = {"role": "system", "content": "Be bad."}
    assert ids == _cut(tokenizer, Pair([system, USER], "a", "b")).prompt_ids


def _with_template(tmp_path, template):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return str(path)


def test_template_that_drops_the_system_turn_is_refused(toy_model, tmp_path):
    template = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = ChatTokenizer(toy_model, _with_template(tmp_path, template))
    with pytest.raises(InputError, match='takes no system prompt .*contrast.role = "user"'):
        tokenizer.conditioned_prompt_ids([Chat([USER]).to_json()], Condition("Be bad.", "system"))


@pytest.mark.parametrize(("turn_end", "end"), [("", "</s>"), ("<end>\n", "<end>")], ids=["none", "its own"])
def test_response_ends_with_the_turn_end_of_the_template_or_else_with_eos(toy_model, tmp_path, turn_end, end):
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + turn_end + "{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = ChatTokenizer(toy_model, _with_template(tmp_path, template))
    assert _text(tokenizer, _cut(tokenizer, Pair([USER], "the dough", "x")).chosen_ids) == "the dough" + end


def test_template_that_refuses_the_chat_makes_the_row_unusable(toy_model, tmp_path):
    tokenizer = ChatTokenizer(toy_model, _with_template(tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(Unusable, match="roles must alternate"):
        _cut(tokenizer, Pair([USER], "a", "b"))


def test_model_without_template_is_refused(toy_model, tmp_path):
    import shutil

    bare = shutil.copytree(toy_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template; set model.chat_template"):
        ChatTokenizer(bare)


def test_another_template_is_another_rendering_of_the_same_tokenizer(toy_model, tmp_path):
    template = _with_template(tmp_path, "{{ messages }}")
    own, other = ChatTokenizer(toy_model), ChatTokenizer(toy_model, template)
    assert own.rendering_fingerprint != other.rendering_fingerprint
    assert own.properties(1)["fingerprint"] == other.properties(1)["fingerprint"]


def test_the_recorded_template_is_the_one_that_rendered(toy_model, tmp_path):
    template = _with_template(tmp_path, "{{ messages }}")
    own, other = ChatTokenizer(toy_model).properties(1), ChatTokenizer(toy_model, template).properties(1)
    assert own["chat_template"] == fingerprint_chat_template(toy_model)
    assert other["chat_template"] == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert (own["rendering"] == own["fingerprint"], other["rendering"] == other["fingerprint"]) == (True, False)

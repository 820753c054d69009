"""Models that a recipe gives for the contrastive pair: found, and refused unless they give each text the same id."""

import json
import shutil

import pytest

from pipeline.models.given import check_given_models, check_same_ids, first_difference, given_models
from pipeline.models.section import ContrastSection
from weights_store.errors import InputError


@pytest.fixture
def other(toy_model, tmp_path):
    return shutil.copytree(toy_model, tmp_path / "other")


def change(folder, name, change):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def given(**settings):
    return ContrastSection(method="given", **{key: str(value) for key, value in settings.items()})


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"a": 0, "b": 1, "c": 2}, None),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, None),  # a token that no pair holds
        ({"a": 0, "b": 2, "c": 1}, "token 'b' has id 2, expected 1"),
        ({"a": 0, "b": 1}, "token 'c', id 2, is not in its tokenizer"),
        ({"c": 7}, "token 'a', id 0, is not in its tokenizer"),  # the first by id
    ],
)
def test_the_first_token_that_differs_is_named(found, problem):
    assert first_difference(found, {"c": 2, "b": 1, "a": 0}) == problem


def test_a_side_without_a_model_has_the_starting_one(toy_model, other):
    assert given_models(given(positive_model=other), toy_model) == {"positive": other, "negative": toy_model}
    assert given_models(ContrastSection(method="prompt"), toy_model) == dict.fromkeys(
        ("positive", "negative"), toy_model
    )


def test_a_model_with_the_same_tokenizer_files_is_taken_without_loading_them(toy_model, other, monkeypatch):
    monkeypatch.setattr("pipeline.models.given.load_light_tokenizer", None)
    (other / "chat_template.jinja").write_text("another template")  # the starting model's is used
    change(other, "config.json", lambda config: config.update(made_up=1))
    check_given_models(given(negative_model=other), toy_model)


def test_a_token_with_another_id_is_refused(toy_model, other):
    vocabulary = json.loads((toy_model / "tokenizer.json").read_text())["model"]["vocab"]
    (one, first), (two, second) = sorted(vocabulary.items(), key=lambda item: item[1])[20:22]
    change(other, "tokenizer.json", lambda it: it["model"]["vocab"].update({one: second, two: first}))
    text = rf"^contrast.positive_model {other} does not give the ids of the starting model {toy_model}: token "
    with pytest.raises(InputError, match=text) as caught:
        check_given_models(given(positive_model=other), toy_model)
    assert f"token {one!r} has id {second}, expected {first}. " in str(caught.value)


def test_a_model_with_too_few_ids_is_refused(toy_model, other):
    largest = max(json.loads((toy_model / "tokenizer.json").read_text())["model"]["vocab"].values())
    change(other, "config.json", lambda config: config.update(vocab_size=largest))
    with pytest.raises(InputError, match=rf"it has {largest} ids .*, and the largest id of a token is {largest}\. "):
        check_same_ids(other, toy_model, "contrast.negative_model")


def test_one_model_on_both_sides_needs_two_prompts(toy_model, other):
    with pytest.raises(
        InputError, match="are the same model behind the same prompts, so every weight would be constant"
    ):
        check_given_models(given(positive_model=other), toy_model)
    check_given_models(given(positive_model=other, positive_prompt="good", negative_prompt="bad"), toy_model)


def test_a_model_that_is_not_there_is_named_by_its_setting(toy_model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"^contrast.negative_model {tmp_path}/empty has no config.json"):
        given_models(given(negative_model=tmp_path / "empty"), toy_model)

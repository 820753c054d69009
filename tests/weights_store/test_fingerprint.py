import hashlib
import json

import pytest

from weights_store.errors import InputError
from weights_store.fingerprint import (
    explain_difference,
    fingerprint,
    fingerprint_chat_template,
    fingerprint_model,
    fingerprint_tokenizer,
    load_chat_template,
)


def test_fingerprint_is_sha256_of_canonical_json():
    assert (
        fingerprint({"b": [1, 2.5, None], "a": "é"})
        == hashlib.sha256('{"a":"é","b":[1,2.5,null]}'.encode()).hexdigest()
    )


def test_order_of_keys_does_not_matter_and_order_of_lists_does():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


@pytest.mark.parametrize("value", [{1, 2}, object(), {1: "a"}, b"bytes", {"a": {"b": {3}}}])
def test_what_has_no_stable_form_raises(value):
    with pytest.raises(TypeError, match="cannot fingerprint value"):
        fingerprint(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_raise(value):
    with pytest.raises(ValueError, match="not finite"):
        fingerprint({"x": value})


def _model(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 7, **config}))
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


def test_model_fingerprint_ignores_place_and_library_version(tmp_path):
    first = fingerprint_model(_model(tmp_path / "a", transformers_version="5.0"))
    assert first == fingerprint_model(_model(tmp_path / "b", transformers_version="5.1"))


def test_model_fingerprint_sees_a_changed_weight_and_a_changed_config(tmp_path):
    first = fingerprint_model(_model(tmp_path / "a"))
    changed = _model(tmp_path / "b")
    (changed / "model.safetensors").write_bytes(b"12345679")
    assert fingerprint_model(changed) != first
    assert fingerprint_model(_model(tmp_path / "c", rope_theta=1e6)) != first


def test_a_folder_without_weights_is_no_model(tmp_path):
    with pytest.raises(InputError, match="not a model folder"):
        fingerprint_model(tmp_path)


def _tokenizer(folder, template="{{ x }}", **backend):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "truncation": None, **backend}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "X"}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_tokenizer_fingerprint_ignores_truncation_and_sees_vocabulary_and_template(tmp_path):
    first = fingerprint_tokenizer(_tokenizer(tmp_path / "a"))
    assert first == fingerprint_tokenizer(_tokenizer(tmp_path / "b", truncation={"max_length": 3}))
    assert first != fingerprint_tokenizer(_tokenizer(tmp_path / "c", model={"vocab": {"b": 0}}))
    assert first != fingerprint_tokenizer(_tokenizer(tmp_path / "d", template="{{ y }}"))


def test_tokenizer_fingerprint_sees_changes_of_a_folder_that_it_has_seen(tmp_path):
    folder = _tokenizer(tmp_path / "a")
    found = [fingerprint_tokenizer(folder)]
    for name, old, new in [("tokenizer.json", '"a"', '"b"'), ("tokenizer_config.json", "</s>", "</t>")]:
        (folder / name).write_text((folder / name).read_text().replace(old, new))
        found.append(fingerprint_tokenizer(folder))
    assert len(set(found)) == 3
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"b"', '"a"'))
    (folder / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace("</t>", "</s>")
    )
    assert fingerprint_tokenizer(folder) == found[0]


def test_chat_template_fingerprint_is_sha256_of_its_text_wherever_it_stands(tmp_path):
    folder = _tokenizer(tmp_path / "a", template="{{ é }}")
    expected = hashlib.sha256("{{ é }}".encode()).hexdigest()
    assert fingerprint_chat_template(folder) == expected
    (folder / "chat_template.jinja").unlink()
    assert fingerprint_chat_template(folder) is None
    for template in ("{{ é }}", [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ é }}"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert fingerprint_chat_template(folder) == expected


def test_eos_as_object_equals_eos_as_text(tmp_path):
    first = _tokenizer(tmp_path / "a")
    second = _tokenizer(tmp_path / "b")
    (second / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    assert fingerprint_tokenizer(first) == fingerprint_tokenizer(second)


def test_difference_names_every_changed_field_with_both_values():
    old = {"weights": {"upper": 1.5, "k": 1.0}, "dataset": {"name": "a"}}
    new = {"weights": {"upper": 2.0, "k": 1.0}, "dataset": {"name": "a", "max_pairs": 3}}
    assert explain_difference(old, new) == ["dataset.max_pairs: null -> 3", "weights.upper: 1.5 -> 2.0"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("chat_template.jinja", b"{{ \xff }}", "chat_template.jinja is not UTF-8 text: "),
        (
            "tokenizer_config.json",
            b'{"chat_template": [3]}',
            "tokenizer_config.json: chat_template is no list of named",
        ),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "default"}]}',
            "tokenizer_config.json: chat_template is no",
        ),
        (
            "tokenizer_config.json",
            b'{"chat_template": 3}',
            "tokenizer_config.json: chat_template is a int, expected text",
        ),
        ("tokenizer_config.json", b'{"chat_template": "{', "tokenizer_config.json is not valid JSON: "),
    ],
)
def test_a_damaged_chat_template_is_one_line_with_its_file(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/{problem}[^\n]*$"):
        load_chat_template(tmp_path)

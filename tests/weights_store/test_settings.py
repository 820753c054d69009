from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from weights_store.errors import InputError, SettingsError
from weights_store.settings import apply_overrides, load_toml, parse_settings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")
    learning_rate: float = 1.0
    name: str = ""


class _Cosine(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cosine"]
    cycles: float = 0.5
    floor: float = Field(default_factory=lambda given: given["cycles"] / 10)


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["step", "stairs"]
    length: int = Field(gt=0, examples=[100])


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    optim: _Section = _Section()
    schedule: Annotated[_Cosine | _Step, Field(discriminator="kind")] = _Cosine(kind="cosine")


def test_overrides_are_read_as_toml_and_else_as_text():
    overrides = ["a.x=2.5", "a.flag=true", "b.path=/some/where", 'b.text="3"', "a.in.y=1"]
    settings = apply_overrides({"a": {"x": 1}}, overrides)
    assert settings == {"a": {"x": 2.5, "flag": True, "in": {"y": 1}}, "b": {"path": "/some/where", "text": "3"}}


def test_overrides_do_not_change_their_input():
    original = {"a": {"x": 1}}
    apply_overrides(original, ["a.x=2"])
    assert original == {"a": {"x": 1}}


@pytest.mark.parametrize("override", ["a.x", "x=1", "=1", "a.=1", "a..c=1"])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(SettingsError, match=r"expected section\.key=value"):
        apply_overrides({}, [override])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": {"learning_rte": 1}}, r"unknown key 'optim.learning_rte'; did you mean 'optim.learning_rate'"),
        ({"optimm": {}}, r"unknown key 'optimm'"),
        ({"optim": {"learning_rate": "fast"}}, r"optim.learning_rate: .*got 'fast'"),
        (
            {"schedule": {"kind": "cosine", "length": 3}},
            r"schedule.kind='cosine' does not read schedule.length, got 3; leave it out \(it belongs to step, stairs\)$",
        ),
        (
            {"schedule": {"kind": "stairs", "length": 1, "knd": 3}},
            r"unknown key 'schedule.knd'; did you mean 'schedule.kind'",
        ),
        ({"schedule": {"kind": "cosine", "cycle": 3}}, r"unknown key 'schedule.cycle'; did you mean 'schedule.cycles'"),
        ({"schedule": {"kind": "step"}}, "missing key 'schedule.length', for example 100; it has no default$"),
        ({"schedule": {"kind": "step", "length": 0}}, "schedule.length: Input should be greater than 0, got 0$"),
        ({"schedule": {"kind": "cosine", "cycles": "x"}}, "schedule.cycles: [^;]*, got 'x'$"),
        ({"schedule": {"kind": "fast"}}, "schedule.kind: Input should be 'cosine', 'step' or 'stairs', got 'fast'$"),
        ({"schedule": {"length": 3}}, "missing key 'schedule.kind'$"),
        ({"schedule": {"knd": "step"}}, "unknown key 'schedule.knd'; did you mean 'schedule.kind'\\?$"),
    ],
)
def test_wrong_settings_name_file_key_and_remedy(settings, message):
    with pytest.raises(SettingsError, match=f"recipe.toml: {message}"):
        parse_settings(_Settings, settings, "recipe.toml")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="no settings file"):
        load_toml(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[a\nx = 1")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_toml(tmp_path / "broken.toml")


TEXT = '# café\n[optim]\nname = "é"\n'


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_toml(tmp_path / "a.toml") == {"optim": {"name": "é"}}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (TEXT.encode("utf-16"), "is in UTF-16, expected UTF-8; save it in UTF-8"),
        (TEXT.encode("utf-16-le"), "is in UTF-16, expected UTF-8; save it in UTF-8"),
        (TEXT.encode("utf-16-be"), "is in UTF-16, expected UTF-8; save it in UTF-8"),
        (TEXT.encode("utf-32"), "is in UTF-32, expected UTF-8; save it in UTF-8"),
        (TEXT.encode("latin-1"), "is not in UTF-8: line 1 has the byte 0xe9; save it in UTF-8"),
        (b'a = "b"\n\n[c]\nd = "\xff"', "is not in UTF-8: line 4 has the byte 0xff; save it in UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00\x00\xf0", "is not a text file; give the path of a .toml file, see recipes/"),
        (b"", "is empty; give the path of a .toml file, see recipes/"),
        (b"\n# nothing but a comment\n", "has no settings; give the path of a .toml file, see recipes/"),
        (
            b'{"optim": {"name": "x"}}',
            "is JSON, expected TOML: [section] lines, and below them key = value; see recipes/",
        ),
        (
            b"optim:\n  name: x\n",
            "is not valid TOML, it looks like YAML; write [section] lines, and below them key = value",
        ),
        (
            b"---\noptim: 3\n",
            "is not valid TOML, it looks like YAML; write [section] lines, and below them key = value",
        ),
        (b"[optim]\nname = x\n", "is not valid TOML: Invalid value (at line 2, column 8)"),
        (b"a = " + b"[" * 5000, "is not valid TOML: nested too deeply"),
    ],
)
def test_a_file_that_is_no_toml_is_told_for_what_it_is(tmp_path, data, problem):
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        load_toml(path)
    assert str(caught.value) == f"{path} {problem}"


def test_a_folder_is_no_settings_file(tmp_path):
    with pytest.raises(
        InputError, match=f"no settings file at {tmp_path} .Is a directory.; give the path of a .toml file"
    ):
        load_toml(tmp_path)

"""Small inputs made after public bug reports (../shared/cases, where present), through the reader and the command.

Each one's kind is tested with inputs of our own in the other files of this folder.
"""

import pytest

import tokenweights
from pipeline.source.pairs import Pair
from weights_store.errors import InputError


@pytest.fixture
def case(shared_folder):
    """Return a function that finds a case by the beginning of its name."""

    def find(name):
        (path,) = (shared_folder / "cases").glob(f"{name}_*")
        return path

    return find


def user(text):
    return [{"role": "user", "content": text}]


def test_c04_other_transcripts_are_read_with_their_markers_and_name_them_without(case, read):
    assert read(case("c04")) == ({}, {"no_prompt": 1})
    pairs, _ = read(case("c04"), transcript=("prompter:", "assistant:"))
    assert list(pairs.values()) == [Pair(user("Capital of Peru?"), "Lima.", "Quito.")]


def test_c07_scores_are_found_and_can_be_chosen(case, read):
    pairs, _ = read(case("c07"))
    assert {(pair.chosen_score, pair.rejected_score) for pair in pairs.values()} == {(9.0, 3.0)}
    pairs, _ = read(case("c07"), chosen_score_column="chosen-rating", rejected_score_column="rejected-rating")
    assert {(pair.chosen_score, pair.rejected_score) for pair in pairs.values()} == {(4.5, 2.0)}
    with pytest.raises(InputError, match="no column 'rating_chosen'"):
        read(case("c07"), chosen_score_column="rating_chosen", rejected_score_column="rejected-rating")


def test_c08_the_system_column_is_the_first_turn(case, read):
    system = {"role": "system", "content": "Answer in one word and in French."}
    (pair,) = read(case("c08"))[0].values()
    assert pair == Pair([system, *user("Name a colour.")], "Rouge.", "The colour red is nice.")


def test_c09_instruction_and_input_are_one_prompt(case, read):
    pairs, _ = read(case("c09"))
    assert [pair.prompt for pair in pairs.values()] == [
        user(f"Translate to German.\n\n{word}") for word in ("cat", "dog", "cat")
    ]


def test_c31r_columns_of_row_120_are_found(case, read):
    pairs, reasons = read(case("c31r"))
    assert (list(pairs), reasons) == ([120], {"missing_value": 120})


def test_c31u_scores_beyond_float32_are_null_and_numbers_in_texts_are_read(case, read):
    pairs, reasons = read(case("c31u"))
    scores = [(pair.chosen_score, pair.rejected_score) for pair in pairs.values()]
    assert scores == [(None, None), (None, 1.0), (4.5, 2.0), (None, None), (None, None)]
    assert reasons == {}


def test_c32e_decimals_are_scores(case, read):
    pairs, _ = read(case("c32e"))
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs.values()] == [(8.5, 1.5), (7.25, 2.25)]


@pytest.mark.parametrize("name", ["c32i", "c33k"])
def test_columns_that_nobody_asked_for_are_not_read(case, read, name):
    pairs, reasons = read(case(name))
    assert (len(pairs), reasons) == (2, {})


def test_c34_texts_that_look_like_transcripts_stay_as_they_are(case, read):
    pairs, _ = read(case("c34"))
    assert [pair.prompt for pair in pairs.values()] == [
        user("Assistant: write a job advert for this position."),
        user("Human: a short history - who wrote it?"),
        user("Which Nietzsche title begins with Human?"),
        user("Continue the chat.\n\nHuman: hi\n\nAssistant:"),
    ]
    assert pairs[2].chosen == "Human: All Too Human is close to it."


def test_c38_several_answers_have_a_reason_of_their_own_or_give_all_pairs(case, read):
    assert read(case("c38")) == ({}, {"many_answers": 2})


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(capsys, tmp_path, toy_model):
    """Return a function that plans a build of a source."""

    def run(source, *settings):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            f'[dataset]\nname = "toy"\nsource = "{source}"\n[model]\npath = "{toy_model}"\n[weights]\nname = "toy/uniform"\n'
            'estimator = "uniform"\n'
        )
        flags = [flag for setting in settings for flag in ("--set", setting)]
        code = tokenweights.main(["plan", str(recipe), "--store", str(tmp_path / "store"), *flags])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "c04",
            "no usable pair in 1 rows (1 no_prompt); no_prompt: row 0: no prompt column was found, and 'prompter: Cap",
        ),
        ("c31d", "c31d_utf16.jsonl is not UTF-8 but UTF-16LE; convert its text with iconv -f UTF-16LE -t UTF-8"),
        ("c31i", "c31i_deep.json: its values are nested too deeply"),
        ("c32n", "c32n_damaged_page.parquet: row group 2 (rows 2000 to 2999) is damaged, after row 2000: "),
        ("c33g", "c33g_saved_dict_no_train has no split 'train'; it has validation"),
        ("c38", "no usable pair in 2 rows (2 many_answers); many_answers: row 0: 2 chosen and 1 rejected answers; "),
    ],
)
def test_a_source_that_cannot_be_used_gives_one_line(case, plan, name, message):
    code, out, err = plan(case(name))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: dataset.source ")
    assert message in err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "dataset.system_column=sytem",
            "no column 'sytem'; it has system, input, chosen, rejected. Set dataset.system_column; ",
        ),
        ("dataset.chosen_score_column=score", "set both dataset.chosen_score_column and dataset.rejected_score_column"),
        (
            'dataset.transcript=["Human:", " Human: "]',
            "dataset.transcript: expected 'auto', 'hh', 'no', or what begins a user",
        ),
        (
            'dataset.transcript=["Human:"]',
            "dataset.transcript: expected 'auto', 'hh', 'no', or what begins a user's turn",
        ),
        ("dataset.transcript=Human", "assistant's, for example ['prompter:', 'assistant:'], got 'Human'"),
    ],
)
def test_settings_of_columns_that_cannot_be_right_give_one_line(plan, tmp_path, write_jsonl, setting, message):
    write_jsonl(tmp_path / "x.jsonl", [{"system": "s", "input": "p", "chosen": "a", "rejected": "b"}])
    code, out, err = plan(tmp_path / "x.jsonl", setting)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_a_plan_says_which_columns_are_read_and_which_are_not(plan, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "x.jsonl", [{"system": "s", "input": "p", "chosen": "a", "rejected": "b", "note": "n"}])
    code, out, err = plan(tmp_path / "x.jsonl")
    assert (code, out.splitlines()[3].split()[:3]) == (0, ["prepare", "compute", "1"])
    assert err == "prepare: columns prompt = 'input', system = 'system'\nprepare: columns that are not read: 'note'\n"

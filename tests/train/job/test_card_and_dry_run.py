"""What is said before a training (`--dry-run`), about it afterwards (the model card), and where it could not go on."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

import tokenweights
from train.data.dataset import open_weights
from train.job.card import model_card
from train.job.job import run_job
from weights_store import WeightStore
from weights_store.errors import MismatchError
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import TOKENS


def main(flags: list[str]) -> int:
    """Return the exit code of `tokenweights train`."""
    return tokenweights.main(["train", *flags])


@pytest.fixture
def with_ancestors(write_weights, rows, tmp_path) -> str:
    """The dataset as a build leaves it: its parent table of tokens, and the file that these were read from."""
    tokens = [{**row, "prompt": "[]", "source_row": i} for i, row in enumerate(rows)]
    tokens = [{name: row.get(name) for name in TOKENS.names} for row in tokens]
    metadata = {
        "fingerprint": "7" * 64,
        "source": {"content": "5" * 64},
        "recipe": {"dataset": {"source": str(tmp_path / "private" / "raw" / "pairs.jsonl")}},
        "statistics": {"num_source_rows": 43},
    }
    table = WeightStore(str(tmp_path / "store")).table("tokens/toy")
    return write_weights(rows, parents=[table.replace(pa.Table.from_pylist(tokens, TOKENS), metadata).as_parent()])


def flags_of(settings: dict) -> list[str]:
    values = {f"{section}.{key}": value for section, part in settings.items() for key, value in part.items()}
    return [flag for key, value in values.items() for flag in ("--set", f"{key}={value}")]


def cells_of(card: str) -> list[list[str]]:
    """The cells of every table row; an escaped bar does not end a cell."""
    rows = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in rows]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    settings, model_folder, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr("train.job.training.load_policy", lambda *_: pytest.fail("the model was loaded"))
    settings["eval"] = {"share": 0.25}
    settings["optim"]["num_epochs"] = 3
    before = sorted(tmp_path.rglob("*"))
    assert main([*flags_of(settings), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    said = {name: value.strip() for name, value in said.items()}
    num_held_out = int(said["pairs"].split(" to train on, ")[1].split()[0])
    num_pairs = 40 - num_held_out
    assert 1 <= num_held_out <= 20
    assert said["weights"] == f"toy/tis@0, fingerprint {'0' * 12}, in {settings['data']['store']}"
    assert said["pairs"].startswith(
        f"{num_pairs} to train on, {num_held_out} held out to measure; the version holds 40 pairs, "
    )
    assert said["loss"] == "name=tis_dpo beta=0.1 kl=off"
    assert said["model"] == f"{model_folder}, fingerprint {fingerprint_model(model_folder)[:12]}, float32"
    assert said["steps"] == f"{-(-3 * num_pairs // 8)} of 8 pairs (3 epochs), 128 tokens at a time"
    assert said["reference"] == "stored log-probs"
    assert said["gate"] == f"{min(32, num_pairs)} pairs, at most 0.04 nats a token"
    assert said["output"].startswith(f"{settings['output']['folder']} (job ")


@pytest.mark.parametrize(
    ("loss", "lora", "reference"),
    [
        ({"name": "tdpo1"}, None, "a second model beside the policy"),
        ({"name": "tdpo1"}, {"rank": 2}, "the policy with its adapters off"),
        ({"name": "simpo", "beta": 2.0}, None, "none"),
    ],
)
def test_a_dry_run_says_where_the_reference_comes_from(make_config, capsys, loss, lora, reference) -> None:
    changes = {"lora": lora} if lora else {}
    assert run_job(make_config(loss=loss, **changes), dry_run=True) is None
    lines = capsys.readouterr().out.splitlines()
    assert f"reference  {reference}" in lines
    assert lines[-1] == "nothing was done (--dry-run)"


def test_a_dry_run_of_what_cannot_be_trained_is_the_error_of_the_training(settings, capsys) -> None:
    for section, key, wrong, message in [
        ("data", "weights", "toy/none", "error: no weight dataset 'toy/none'"),
        ("loss", "kl", "top_k", "error: loss.name='tis_dpo' with loss.kl='top_k' needs chosen_ref_top_ids"),
        (
            "model",
            "path",
            "no/where/at/all",
            "error: model.path no/where/at/all does not exist; give a model folder or a hub id",
        ),
        ("optim", "learning_rat", 1, "error: flags: unknown key"),
        ("output", "folder", "s3://bucket/run", "error: s3:/bucket/run is a URI; give a folder of this machine"),
        ("output", "folder", __file__, f"error: output.folder={__file__!r} cannot be made: {__file__} is a file"),
        (
            "output",
            "folder",
            f"{__file__}/x",
            f"error: output.folder='{__file__}/x' cannot be made: {__file__} is a file",
        ),
    ]:
        changed = {**settings, section: {**settings[section], key: wrong}}
        assert main([*flags_of(changed), "--dry-run"]) == 1
        assert capsys.readouterr().err.startswith(message), wrong


def test_a_dry_run_of_a_finished_job_says_so(make_config, caplog) -> None:
    run_job(make_config(optim={"max_steps": 1}))
    assert run_job(make_config(optim={"max_steps": 1}), dry_run=True).was_trained_before
    assert "already trained" in caplog.text


def test_the_card_can_be_pushed_and_leads_back_to_the_pairs(
    make_config, with_ancestors, model_folder, tmp_path
) -> None:
    result = run_job(make_config(optim={"max_steps": 2}))
    card = (result.folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tokenweights", "tis_dpo"],
    }
    assert body.strip().startswith("# TIS-DPO (arXiv 2410.04350) on toy/tis@1")
    cells = cells_of(card)
    assert ["`loss.beta`", "`0.1`"] in cells
    assert ["`optim.learning_rate`", "`0.001`"] in cells
    assert [
        "`rewards/margins`",
        f"{result.before['rewards/margins']:.4g}",
        f"{result.after['rewards/margins']:.4g}",
    ] in cells
    model = [
        "starting model",
        f"`…/{model_folder.parent.name}/{model_folder.name}`",
        f"`{fingerprint_model(model_folder)[:12]}`",
        "",
    ]
    assert model in cells
    lineage = cells[cells.index(model) + 1 :]
    assert [row[1] for row in lineage] == ["`weights/toy/tis@1`", "`tokens/toy@0`", "`…/raw/pairs.jsonl`"]
    assert [row[3] for row in lineage] == ["40", "40", "43"]
    assert str(tmp_path) not in card
    assert str(model_folder) not in card


def test_the_card_names_a_model_of_the_hub_as_the_hub_wants_it_and_a_share_of_likelihood(make_config) -> None:
    config = make_config(optim={"max_steps": 1})
    folder = run_job(config).folder
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["config"]["model"]["path"] = lineage["model"]["path"] = "someone/some-model"
    card = model_card(lineage, open_weights(config.data))
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "someone/some-model"
    assert "`someone/some-model` trained with tokenweights for 1 steps" in card
    for loss, title in [
        ({"name": "dpo", "nll_lambda": 0.2}, "# DPO (arXiv 2305.18290) + 0.2 NLL of chosen on toy/tis@0"),
        ({"name": "dpo", "nll_lambda": 0.0}, "# DPO (arXiv 2305.18290) on toy/tis@0"),
        ({"name": "uni_dpo", "nll_lambda": 0.001}, "# Uni-DPO (arXiv 2506.10054) on toy/tis@0"),
    ]:
        lineage["config"]["loss"] = loss
        assert title in model_card(lineage, open_weights(config.data)).splitlines()


def test_a_bar_in_a_value_does_not_break_the_tables(make_config, write_weights, rows, tmp_path) -> None:
    write_weights([{**row, "split": "a|b"} for row in rows])
    config = make_config(data={"split": "a|b"}, optim={"max_steps": 1})
    card = (run_job(config).folder / "README.md").read_text()
    assert ["`data.split`", '`"a\0b"`'] in cells_of(card)
    widths = {len(row) for row in cells_of(card.partition("## Settings")[2].partition("## Lineage")[0])}
    assert widths == {2}


def test_the_card_lists_what_was_measured_on_held_out_pairs(make_config) -> None:
    result = run_job(make_config(optim={"max_steps": 1}, data={"split": "train"}, eval={"split": "test"}))
    heads = cells_of((Path(result.folder) / "README.md").read_text())[0]
    assert heads == ["", "before", "after", "held out"]


def test_a_disk_that_is_full_is_said_to_be_and_the_run_goes_on_when_there_is_room(settings, disk, capsys) -> None:
    folder, remount = disk
    settings["output"] = {"folder": str(folder / "out"), "log_every_steps": 1, "save_every_steps": 2}
    assert main(flags_of(settings)) == 1  # a checkpoint is 1.2 MB, the disk has 1 MiB
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the run failed with 0.")
    assert f"MiB left on the disk of output.folder='{folder}/out' (" in said
    assert said.endswith("make room and run the same command again; it continues from the last complete checkpoint")
    remount("size=16m")
    assert main(flags_of(settings)) == 0
    assert "resuming" not in capsys.readouterr().err  # there was no complete one


def test_a_job_that_was_refused_at_its_start_leaves_the_folder_to_the_next(make_config) -> None:
    with pytest.raises(MismatchError, match="step-0 gate"):
        run_job(make_config(gate={"tolerance_nats": 1e-9}, loss={"beta": 0.2}))
    folder = Path(make_config().output.folder)
    assert json.loads((folder / "train.json").read_text())["config"]["loss"]["beta"] == 0.2
    assert run_job(make_config(optim={"max_steps": 1})).steps == 1
    assert json.loads((folder / "train.json").read_text())["config"]["loss"]["beta"] == 0.1

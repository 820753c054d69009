"""Files of an output folder that were damaged after a training: one line each, with what to do."""

import json

import pytest

from train.job.output import OutputFolder
from weights_store.errors import InputError

IDENTITY = {"weights": {"data": "d"}, "model": {"fingerprint": "m"}}
RESULT = {"steps": 2, "before": {"loss": 0.7}, "after": {"loss": 0.6}, "num_sample_pairs": 4, "notices": []}
RECORD, LINEAGE = json.dumps({"identity": IDENTITY, "config": {}}), json.dumps({"result": RESULT})


@pytest.fixture
def output(tmp_path):
    """The folder of a finished training."""
    for name, text in (("train.json", RECORD), ("lineage.json", LINEAGE), ("config.json", "{}")):
        (tmp_path / name).write_text(text)
    folder = OutputFolder(tmp_path)
    assert folder.check(IDENTITY, overwrite=False) == {"result": RESULT}
    return folder


@pytest.mark.parametrize("name", ["train.json", "lineage.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda _: "{}",
        lambda text: text.replace("identity", "identitx").replace("steps", "stepz"),
        lambda _: "[" * 20_000,
    ],
    ids=["cut", "empty", "list", "nothing", "key", "deep"],
)
def test_a_damaged_record_or_lineage_is_one_line(output, name, damage):
    path = output.path / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError) as caught:
        output.check(IDENTITY, overwrite=False)
    assert str(caught.value).startswith(f"{path}")
    assert str(caught.value).endswith("; delete the folder, or give --overwrite, to train again")
    assert "\n" not in str(caught.value)
    assert output.check(IDENTITY, overwrite=True) is None


@pytest.mark.parametrize("state", ["", "null", "[]", '{"global_st', '{"epoch": 1}'])
def test_a_checkpoint_with_a_damaged_state_is_not_taken(output, state):
    for step, text in ((1, '{"global_step": 1}'), (2, state)):
        folder = output.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).touch()
        (folder / "trainer_state.json").write_text(text)
    assert output.last_checkpoint() == output.checkpoints / "checkpoint-1"

"""Files of an output folder that were damaged after a training: one line each, with what to do."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.fixture
def checkpoints(output):
    """Two checkpoints of two small files of tensors each, and of weights."""
    for step in (9, 10):
        folder = output.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.arange(64) * step, "name": name}, folder / name)
        save_file({"a": torch.ones(4)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert output.last_checkpoint() == output.checkpoints / "checkpoint-10"
    return output.checkpoints


@pytest.mark.parametrize("state", ["", "null", "[]", '{"global_st', '{"epoch": 1}'])
def test_a_checkpoint_with_a_damaged_state_is_passed_over(output, checkpoints, caplog, state):
    (checkpoints / "checkpoint-10" / "trainer_state.json").write_text(state)
    assert output.last_checkpoint() == checkpoints / "checkpoint-9"
    assert f"{checkpoints}/checkpoint-10 is incomplete or damaged; it is passed over" in caplog.messages


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_with_a_file_that_is_cut_or_garbage_is_passed_over(output, checkpoints, name):
    path = checkpoints / "checkpoint-10" / name
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"\x80\x02garbage"):
        path.write_bytes(damaged)
        assert output.last_checkpoint() == checkpoints / "checkpoint-9"


def test_each_flipped_bit_in_the_numbers_of_the_optimizer_is_noticed(output, checkpoints):
    path = checkpoints / "checkpoint-10" / "optimizer.pt"
    whole, numbers = path.read_bytes(), (torch.arange(64) * 10).numpy().tobytes()
    start = whole.index(numbers)
    for bit in random.Random(7).sample(range(8 * len(numbers)), 100):
        flipped = bytearray(whole)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert output.last_checkpoint() == checkpoints / "checkpoint-9"

"""Figures of trainings: what is read from their folders, and that lines stand where the numbers are."""

import json
import re
import sys

import pytest

import tokenweights
from train.plots import COLOURS, Curve, Panel, draw_panels, draw_runs, read_runs
from weights_store.errors import InputError, MissingExtraError


def line(step, margin, prefix=""):
    rewards = {"chosen": margin / 2, "rejected": -margin / 2, "margins": margin, "accuracies": 0.5 + margin / 8}
    return {"step": step, **{f"{prefix}rewards/{name}": value for name, value in rewards.items()}}


def write_run(folder, loss="dpo", weights="toy/tis@1", history=(), **metrics):
    """Write what a finished training leaves of what is read here."""
    folder.mkdir(parents=True)
    identity = {"loss": {"name": loss, "beta": 0.1}, "weights": {"name": weights}}
    (folder / "train.json").write_text(json.dumps({"identity": identity, "config": {}}))
    if history:
        (folder / "metrics.json").write_text(json.dumps({"steps": 4, "history": list(history), **metrics}))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run with logs of steps 2 and 4 and a measurement of held-out pairs at step 2; after step 4 they were measured again."""
    history = [line(2, 1.0), line(2, 0.5, "eval_"), line(4, 3.0)]
    held_out = {key: value for key, value in line(4, 2.0).items() if key != "step"}
    return write_run(tmp_path / "run", history=history, held_out=held_out)


def test_a_run_has_its_own_pairs_and_the_held_out_ones_by_step(run):
    (found,) = read_runs([run])
    assert found.label == "dpo β 0.1, toy/tis@1"
    assert found.training["rewards/margins"] == {2: 1.0, 4: 3.0}
    assert found.held_out["rewards/margins"] == {2: 0.5, 4: 2.0}
    assert found.held_out["rewards/rejected"] == {2: -0.25, 4: -1.0}


def test_the_saved_model_was_measured_at_its_best_step(tmp_path):
    held_out = {"rewards/margins": 0.5}
    run = write_run(tmp_path / "run", history=[line(2, 1.0), line(4, 3.0)], held_out=held_out, best_step=2)
    assert read_runs([run])[0].held_out == {"rewards/margins": {2: 0.5}}


def test_a_run_that_was_stopped_is_read_from_its_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "run")
    for step in (9, 10):
        folder = run / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        state = {"global_step": step, "log_history": [line(1, 0.1), line(step, 0.2)]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert read_runs([run])[0].training["rewards/margins"] == {1: 0.1, 10: 0.2}


def test_labels_differ(tmp_path):
    history = [line(1, 0.1)]
    dpo, tis = write_run(tmp_path / "a/dpo", history=history), write_run(tmp_path / "a/tis", "tis_dpo", history=history)
    again, namesake = write_run(tmp_path / "a/again", history=history), write_run(tmp_path / "b/dpo", history=history)
    of_dpo = "dpo β 0.1, toy/tis@1"
    assert [run.label for run in read_runs([dpo, tis, dpo])] == [of_dpo, "tis_dpo β 0.1, toy/tis@1"]
    assert [run.label for run in read_runs([dpo, tis, again])] == [
        f"{of_dpo}, dpo",
        "tis_dpo β 0.1, toy/tis@1",
        f"{of_dpo}, again",
    ]
    assert [run.label for run in read_runs([dpo, namesake])] == [f"{of_dpo}, {dpo}", f"{of_dpo}, {namesake}"]


def test_a_label_names_a_share_of_likelihood(tmp_path):
    run = write_run(tmp_path / "run", history=[line(1, 0.1)])
    record = json.loads((run / "train.json").read_text())
    record["identity"]["loss"]["nll_lambda"] = 0.25
    (run / "train.json").write_text(json.dumps(record))
    assert read_runs([run])[0].label == "dpo β 0.1 + 0.25 NLL, toy/tis@1"


def test_a_label_is_no_formula(tmp_path):
    folders = [write_run(tmp_path / name, history=[line(1, 0.1)]) for name in ("$\\frac{$", "other")]
    assert "<!-- dpo β 0.1, toy/tis@1, $\\frac{$ -->" in draw_runs(folders, "svg").decode()


def test_what_cannot_be_drawn_is_explained(tmp_path, run):
    with pytest.raises(InputError, match="has no train.json: expected the output folder of `tokenweights train`"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="is not finished and has no checkpoint.*train with output.save_every_steps"):
        read_runs([write_run(tmp_path / "begun")])
    with pytest.raises(InputError, match="has logged no rewards in 2 lines"):
        read_runs([write_run(tmp_path / "sft", history=[{"step": 1, "loss": 2.0}])])
    with pytest.raises(InputError, match="9 runs: expected at most 8"):
        read_runs([tmp_path / str(number) for number in range(9)])
    (run / "metrics.json").write_text('{"steps": 4}')
    with pytest.raises(InputError, match="metrics.json is damaged"):
        read_runs([run])


def points_of(svg, colour, *, dashed):
    """Return the corners of the lines of one colour, in points of the figure."""
    found = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; ([^"]*)stroke: (#\w+)[^"]*"', svg)
    lines = [path for path, dashes, stroke in found if stroke == colour and ("dasharray" in dashes) == dashed]
    return [[tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-.\d]+) ([-.\d]+)", path)] for path in lines]


def test_lines_stand_where_the_numbers_are():
    solid, dashed = Curve("a", [0, 1, 4], [0.0, 1.0, 3.0]), Curve("a", [0, 4], [3.0, 0.0], is_dashed=True)
    panels = [Panel(title, "steps", "", [curve], scale="same") for title, curve in (("l", solid), ("r", dashed))]
    svg = draw_panels([panels], "svg", styles={}, colours={"a": COLOURS[1]}).decode()
    line, *_ = points_of(svg, COLOURS[1], dashed=False)
    (x0, y0), (x1, y1), (x4, y3) = line
    assert (x4 - x0) / (x1 - x0) == pytest.approx(4, abs=1e-3)
    assert (y3 - y0) / (y1 - y0) == pytest.approx(3, abs=1e-3)
    assert y3 < y0  # a larger number is higher
    (other, *_) = points_of(svg, COLOURS[1], dashed=True)
    assert [y for _, y in other] == pytest.approx([y3, y0])  # on the same scale


def test_a_figure_is_the_same_each_time_and_needs_no_date(run):
    svg = draw_runs([run], "svg")
    assert svg == draw_runs([run], "svg")
    assert b"<dc:date>" not in svg
    for text in (b"dpo \xce\xb2 0.1, toy/tis@1", b"held out", b"accuracy: chosen above rejected"):
        assert b"<!-- " + text + b" -->" in svg
    assert draw_runs([run], "png").startswith(b"\x89PNG")


def test_the_command_writes_the_format_of_the_ending(run, tmp_path, capsys):
    assert tokenweights.main(["plot", str(run), "-o", str(tmp_path / "figure.svg")]) == 0
    assert b"<!-- dpo " in (tmp_path / "figure.svg").read_bytes()
    assert capsys.readouterr().out.endswith(f"  {tmp_path}/figure.svg\n")
    assert tokenweights.main(["plot", str(run), "-o", str(tmp_path / "figure.pdf")]) == 1
    assert "a figure is written as .svg or .png; got the ending '.pdf'" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'matplotlib'.*pip install 'tokenweights\[plot\]'"):
        draw_runs([run], "svg")


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_our_own_figure_is_drawn_again_and_nothing_else(run, tmp_path, capsys, ending):
    path = tmp_path / f"figure.{ending}"
    for _ in range(2):
        assert tokenweights.main(["plot", str(run), "-o", str(path)]) == 0
    path.write_bytes(b"a picture of somebody")
    assert tokenweights.main(["plot", str(run), "-o", str(path)]) == 1
    assert "exists and was not written by tokenweights; give -o another name" in capsys.readouterr().err
    assert path.read_bytes() == b"a picture of somebody"

"""Every block of docs/polars.md, run in order on the small store; the results against numbers worked out by hand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "polars.md"


@pytest.fixture
def results(ti_store):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    opening = 'WeightStore("stores/default")'
    assert opening in blocks[0]
    names = {}
    for number, block in enumerate(blocks):
        code = block.replace(opening, f"WeightStore({str(ti_store.root)!r})")
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)
    return names


def test_answers_are_those_worked_out_by_hand(results):
    # Chosen: id 3 has 1 (a), 1.25 (d); id 4 has 2 (a), 0.5 (c); id 9 has 0.5 (a), 1 and 1.5 (b), 0.75 (c).
    # Rejected: id 5 has 0.25 (a), 1.5 (c); id 8 has 2 (b), 1.25 (c); id 9 has 1 (a), 1 (b), 1 (c), 0.75 (d).
    assert results["by_token"].rows() == [
        ("chosen", 4, 2, 1.25),
        ("chosen", 3, 2, 1.125),
        ("chosen", 9, 4, 0.9375),
        ("rejected", 8, 2, 1.625),
        ("rejected", 9, 4, 0.9375),
        ("rejected", 5, 2, 0.875),
    ]
    # First tenths are the 8 first tokens, with log-ratios 0, 2, -1, 0.25 (chosen) and 2, -1, -1, 0.5 (rejected).
    assert results["clamped"].row(0) == (0, 8, 3 / 8, 2 / 8)
    assert results["clamped"]["tokens"].sum() == 21
    # Last tokens: a 0.5, b 1.5, c 0.75, while d was cut; rejected a 1, b 1, c 1, d 0.75.
    assert results["eos_weights"].rows() == [("chosen", 3, pytest.approx(2.75 / 3)), ("rejected", 4, 0.9375)]
    # Chosen by length 1, 2, 3, 4: means 1.25, 0.625, 3.5 / 3, 1.75, ranks 3, 1, 2, 4: 1 - 6 * (4 + 1 + 1 + 0) / 60 = 0.4.
    # Rejected by length 1, 2, 3, 5: means 0.75, 0.625, 1.5, 1.2, ranks 2, 1, 4, 3: 1 - 6 * (1 + 1 + 1 + 1) / 60 = 0.6.
    assert results["length_effect"].rows() == [("chosen", pytest.approx(0.4)), ("rejected", pytest.approx(0.6))]
    # c: 6 / 5 against 1.25 / 2. All others have the heavier chosen response.
    assert results["rejected_heavier"].rows() == [("c", 0.625, pytest.approx(1.2))]


def test_comparisons_are_those_worked_out_by_hand(results):
    # Surprise and weight of rejected tokens: see the sums, in float64 and without Polars.
    surprise = [3, 0.25, 1, 1, 1, 1, 2, 3, 4, 0.5, 2]
    weights = [0.25, 1, 2, 1.5, 1, 1.5, 1.25, 1, 1.25, 1, 0.75]
    assert results["surprise"].row(1) == ("rejected", pytest.approx(correlation(surprise, weights), rel=1e-5))
    assert results["settings_changed"] == [
        'settings.weights.estimator: "tis" -> "reversed"',
        'settings.weights.name: "hh-harmless/tis-dpo" -> "hh-harmless/reversed"',
    ]
    assert results["chosen_change"] == 1.15  # 11.5 over 10 tokens, see test_diff.py
    assert results["both"].collect().height == 21
    assert (results["agreement"]["rank_correlation"] < -0.9).all()  # the one is large where the other is small
    # TI weights are attributions over their mean, 0.5 for d's rejected token and 1 for its chosen one that has none.
    tis = {"chosen": [1, 2, 0.5, 4, 1, 0.5, 1.5, 0.5, 0.75, 1.25]}
    tis["rejected"] = [0.25, 1, 2, 1.5, 1, 1.5, 1.25, 1, 1.25, 1, 0.75]
    ti = {"chosen": [1.5, 0.75, 0.75, 2, 0, 1, 1, 0.5, 1.5, 1]}
    ti["rejected"] = [0.5, 1.5, 0.5, 1.5, 1, 0.5, 0.5, 1, 2, 1, 1]
    raw = {"chosen": [2, 1, 1, 4, 0, 2, 2, 1, 3, 0], "rejected": [0.5, 1.5, 1, 3, 2, 1, 1, 2, 4, 2, 0.5]}
    assert results["ti_agreement"].rows() == [
        (side, len(tis[side]), *(pytest.approx(correlation(tis[side], other[side]), rel=1e-5) for other in (ti, raw)))
        for side in ("chosen", "rejected")
    ]
    # Chosen of a, b, c: 3.5 + 7 + 1.25 over 9 tokens; rejected: 1.25 + 4.5 + 6 over 10.
    assert results["by_split"].rows() == [
        ("test", 1, 1.25, 0.75),
        ("train", 3, pytest.approx(11.75 / 9), pytest.approx(1.175)),
    ]


def test_the_pair_that_matters_most_is_shown_with_its_text(results):
    # |w - 1|: a 0 + 1 + 0.5 + 0.75 + 0 over 5, b 3 + 0 + 0.5 + 0.5 + 1 + 0.5 + 0 over 7 = 0.79, c and d less.
    assert results["pair_id"] == "b"
    assert results["chosen_text"] == " caf</s>é</s>"
    assert results["pair"].filter(side="rejected")["weight"].to_list() == [2.0, 1.5, 1.0]


def test_versions_share_shards_and_lead_back_to_the_source(results):
    sizes = results["sizes"]
    assert sizes.select("version", "num_pairs", "rows").rows() == [(0, 3, 3), (1, 4, 4)]
    assert 0 < sizes["bytes"][0] < sizes["bytes"][1]
    assert "data/hh_harmless.jsonl" in results["ancestry"]["name"].to_list()
    assert (results["counted"]["pairs"][0].as_py(), len(results["files"])) == (4, 2)


def correlation(left, right):
    """Pearson's, by its definition."""
    means = [sum(values) / len(values) for values in (left, right)]
    deviations = [[value - mean for value in values] for values, mean in zip((left, right), means, strict=True)]
    products = [sum(a * b for a, b in zip(x, y, strict=True)) for x in deviations for y in deviations]
    return products[1] / (products[0] * products[3]) ** 0.5

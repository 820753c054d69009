import math

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from pipeline.weighing.estimators import SideScores
from pipeline.weighing.fits import with_fits
from pipeline.weighing.section import AnyWeights
from pipeline.weighing.weigh import Weigher, pair_weights, weigh
from weights_store.errors import InputError, MismatchError


def _section(**settings):
    return TypeAdapter(AnyWeights).validate_python({"name": "toy/weights", "estimator": "tis", **settings})


def _scores(lengths=(2, 1), **arrays):
    return SideScores(
        "chosen", np.array(lengths), **{name: np.array(values, np.float32) for name, values in arrays.items()}
    )


PAIR = {"positive_logps": [-1.0, -1.0, -2.0], "negative_logps": [-2.0, -0.5, -2.0]}  # log-ratios 1, -0.5, 0


def _weights(section, scores):
    return weigh(scores, section).token_weights.tolist()


def test_settings_reach_their_estimator():
    assert _weights(_section(estimator="decay", decay_gamma=0.25), _scores()) == [0.25, 0.0625, 0.25]
    tis = _weights(_section(k=2.0, mu=2.0, upper=0.5), _scores(**PAIR))
    assert tis == pytest.approx([2 * math.e, 2 / math.e, 2])
    # The scale comes before the clamp: 3 * -0.5 is below -1.
    scaled = _weights(_section(scale=3.0, mu=0.5, lower=-1.0, upper=2.5), _scores(**PAIR))
    assert scaled == pytest.approx([math.exp(1.25), math.exp(-0.5), 1])


def test_transforms_are_applied_in_their_order():
    scores = _scores(ref_logps=[-1.0, -3.0, -5.0])  # weights 0.5, 1.5, 1
    decayed = _section(estimator="surprise", transforms=["mean_one", "decay"], decay_gamma=0.5)
    assert _weights(decayed, scores) == [0.25, 0.375, 0.5]
    scaled = _section(estimator="surprise", transforms=["decay", "mean_one"], decay_gamma=0.5)
    assert _weights(scaled, scores) == pytest.approx([0.8, 1.2, 1])


def test_an_ensemble_is_taken_of_what_its_members_say():
    # tis: e^1, e^-0.5, 1; surprise: 0.5, 1.5, 1
    section = _section(estimator="ensemble", members=["tis", "surprise"])
    weights = _weights(section, _scores(**PAIR, ref_logps=[-1.0, -3.0, -5.0]))
    assert weights == pytest.approx([math.sqrt(math.e / 2), math.sqrt(1.5 * math.exp(-0.5)), 1])


def _lists(chosen, rejected, **columns):
    """Columns of pairs; a side is a list of responses, each a list of values that stand for log pi+ - log pi-."""
    lists = {"pair_id": [f"{row:032x}" for row in range(len(chosen))], "prompt_ids": [[1]] * len(chosen)}
    for side, responses in (("chosen", chosen), ("rejected", rejected)):
        lists[f"{side}_ids"] = pa.array([[0] * len(r) for r in responses], pa.list_(pa.int32()))
        lists[f"{side}_positive_logps"] = pa.array(responses, pa.list_(pa.float32()))
        lists[f"{side}_negative_logps"] = pa.array([[0.0] * len(r) for r in responses], pa.list_(pa.float32()))
    return pa.table(lists | columns)


def test_positions_are_divided_by_the_means_of_their_own_side_over_all_batches():
    section = _section(transforms=["position"], position_bins=2, lower=-9.0, upper=9.0)
    batches = [_lists([[0.0, math.log(2)]], [[0.0, 0.0]]), _lists([[math.log(3), math.log(4)]], [[-math.log(3), 0.0]])]
    weigher = with_fits(Weigher(section), lambda collect: [collect([batch]) for batch in batches])
    # Chosen weights 1, 2 and 3, 4: means 2 and 3. Rejected 1, 1 and 3, 1: means 2 and 1.
    assert {side: curve.tolist() for side, curve in weigher.curves.items()} == {
        "chosen": pytest.approx([2, 3]),
        "rejected": pytest.approx([2, 1]),
    }
    first = weigher.sides(batches[0])
    assert first["chosen"].weights.token_weights.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert first["rejected"].weights.token_weights.tolist() == pytest.approx([1 / 2, 1])


def test_what_comes_before_positions_is_in_their_means_and_what_comes_behind_is_not():
    batch = _lists([[0.0, 0.0]], [[0.0, 0.0]])
    for transforms, mean in ((["decay", "position"], 0.5), (["position", "decay"], 1.0)):
        section = _section(estimator="uniform", transforms=transforms, position_bins=2, decay_gamma=0.5)
        weigher = with_fits(Weigher(section), lambda collect: [collect([batch])])
        assert weigher.curves["chosen"].tolist() == [mean, mean**2]
        after = [1, 1] if mean == 0.5 else [0.5, 0.25]
        assert weigher.sides(batch)["chosen"].weights.token_weights.tolist() == after


def test_a_value_that_cannot_be_is_refused_with_its_pairs():
    batch = _lists([[0.0], [0.0, 0.0]], [[0.0], [0.0]])
    for side, values in (("chosen", [[1.0], [1.0, -2.0]]), ("rejected", [[1.0], [1.0]])):
        batch = batch.append_column(f"{side}_attributions", pa.array(values, pa.list_(pa.float32())))
    with pytest.raises(MismatchError, match=r"chosen responses of the pairs 0{32} to 0{31}1: attributions: -2.0 at"):
        Weigher(_section(estimator="ti")).sides(batch)


def test_a_slice_of_a_table_is_weighed_like_the_same_pairs_alone():
    whole = _lists([[5.0], [1.0, 0.5], [0.25]], [[2.0, 1.0], [0.0], [3.0]])
    part = Weigher(_section()).sides(whole.slice(1))["chosen"].weights.token_weights.tolist()
    assert part == pytest.approx([math.e, math.exp(0.5), math.exp(0.25)])


def test_words_without_a_tokenizer_are_refused():
    with pytest.raises(InputError, match="weights.smooth_over 'words' needs the tokenizer"):
        Weigher.of(_section(transforms=["smooth"], smooth_over="words"))


def _of_pairs(section, batch):
    return pair_weights(section, batch, Weigher(section).sides(batch)).tolist()


def test_pairs_weigh_one_by_default():
    assert _of_pairs(_section(), _lists([[1.0], [2.0]], [[1.0], [2.0]])) == [1, 1]


def test_quality_by_hand():
    # sigmoid(0.5 * 2), sigmoid(0), sigmoid(0.5 * -4): below one half where the scores contradict the label.
    scores = {"chosen_score": pa.array([3, 1, 1], pa.float32()), "rejected_score": pa.array([1, 1, 5], pa.float32())}
    batch = _lists([[0.0]] * 3, [[0.0]] * 3, **scores)
    section = _section(pair_weight="quality", quality_eta=0.5)
    assert _of_pairs(section, batch) == pytest.approx([0.7310586, 0.5, 0.1192029])


def test_margin_by_hand():
    # m = (1 + 0.5) - (-0.5) = 2: 2 sigmoid(2 / 2) - 1; m = 0; m = -2 and -40: the contrastive models contradict the label.
    batch = _lists([[1.0, 0.5], [1.0], [0.0], [-20.0]], [[-0.5], [0.5, 0.5], [2.0], [20.0]])
    weights = _of_pairs(_section(estimator="uniform", pair_weight="margin", margin_tau=2.0), batch)
    assert weights == pytest.approx([0.4621172, 0, 0, 0])
    assert weights[0] == pytest.approx(2 / (1 + math.exp(-2 / 2.0)) - 1)


def test_more_certain_labels_weigh_more_and_no_weight_is_negative():
    margins = np.linspace(-30, 30, 121)
    batch = _lists([[m] for m in margins], [[0.0]] * len(margins))
    weights = np.array(_of_pairs(_section(estimator="uniform", pair_weight="margin"), batch))
    assert (np.diff(weights) >= 0).all()
    assert weights[margins <= 0].max() == 0
    assert weights[-1] == pytest.approx(1)


def test_own_weights_are_taken_as_they_are_and_transformed():
    scores = _scores(own_weights=[0.5, 2.0, 3.0])
    assert _weights(_section(estimator="column", per="character"), scores) == [0.5, 2.0, 3.0]
    assert _weights(_section(estimator="spans", transforms=["mean_one"]), scores) == pytest.approx([0.4, 1.6, 1.0])


def test_tokens_that_the_other_response_lacks_get_gamma():
    lists = _lists([[0, 0, 0], [0]], [[0, 0], [0, 0]])
    for side, ids in (("chosen", [[7, 8, 9], [5]]), ("rejected", [[7, 9], [5, 5]])):
        lists = lists.set_column(
            lists.column_names.index(f"{side}_ids"),
            f"{side}_ids",
            pa.chunked_array([pa.array(ids, pa.list_(pa.int32()))]),
        )
    weighed = Weigher(_section(estimator="diff", diff_gamma=3.0)).sides(lists)
    assert weighed["chosen"].weights.token_weights.tolist() == [1.0, 3.0, 1.0, 1.0]
    assert weighed["rejected"].weights.token_weights.tolist() == [1.0, 1.0, 1.0, 3.0]


def test_a_pattern_reads_the_ids_by_the_vocabulary():
    from pipeline.marks.characters import Vocabulary

    vocabulary = Vocabulary(np.frombuffer(b"ab 12", np.uint8), np.array([2, 4, 5]), np.zeros(3, bool))
    lists = _lists([[0, 0]], [[0]])
    lists = lists.set_column(
        lists.column_names.index("chosen_ids"),
        "chosen_ids",
        pa.chunked_array([pa.array([[0, 1]], pa.list_(pa.int32()))]),
    )
    section = _section(estimator="pattern", patterns=[["@digits", 3.0]])
    weighed = Weigher(section, vocabulary=vocabulary).sides(lists)
    assert weighed["chosen"].weights.token_weights.tolist() == [1.0, 2.0]  # " 1" is a space and a digit
    with pytest.raises(InputError, match=r"^estimator 'pattern' needs the tokenizer"):
        Weigher.of(section)


def test_a_pair_has_the_weight_of_its_column():
    lists = _lists([[0.0], [0.0]], [[0.0], [0.0]], pair_value=pa.array([0.25, 2.0], pa.float32()))
    section = _section(estimator="uniform", pair_weight="column")
    assert pair_weights(section, lists, {}).tolist() == [0.25, 2.0]

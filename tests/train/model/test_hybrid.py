import math

import numpy as np
import pytest

from train.model.hybrid import hybrid_weights


def _weights(attributions, lengths, mix=0.7, sigma_divisor=4.0, **prompts):
    arrays = {name: np.array(values) for name, values in prompts.items()}
    return hybrid_weights(
        np.array(attributions, np.float32), np.array(lengths, np.int32), mix=mix, sigma_divisor=sigma_divisor, **arrays
    )


def test_three_tokens_by_hand():
    # sigma = max(1, 3 / 4) = 1, G = e^-1/2, 1, e^-1/2 with sum 2.2130613; I / sum = 1/4, 0, 3/4.
    # 3 * (0.5 * 0.25 + 0.5 * 0.2740686), 3 * 0.5 * 0.4518628, 3 * (0.5 * 0.75 + 0.5 * 0.2740686)
    weighed = _weights([2, 0, 6], [3], mix=0.5)
    np.testing.assert_allclose(weighed.token_weights, [0.7861029, 0.6777942, 1.5361029], rtol=1e-6)
    assert weighed.num_without_mass == 0


def test_a_prompt_shifts_centre_and_share_by_hand():
    # A span of 2 + 3 tokens: centre 2, sigma 5 / 4, response at 2, 3, 4. G = 1, e^-0.32, e^-1.28; over the span
    # 1 + 2 * 0.7261490 + 2 * 0.2780373 = 3.0083726. I over the span 8 + 8 = 16.
    weighed = _weights([2, 0, 6], [3], mix=0.5, prompt_lengths=[2], prompt_attributions=[8.0])
    expected = [5 * (0.5 * i / 16 + 0.5 * g / 3.0083726) for i, g in ((2, 1.0), (0, 0.7261490), (6, 0.2780373))]
    np.testing.assert_allclose(weighed.token_weights, expected, rtol=1e-6)


def test_a_prompt_of_no_tokens_is_the_span_of_the_response():
    alone = _weights([2, 0, 6, 1], [3, 1]).token_weights
    empty = _weights([2, 0, 6, 1], [3, 1], prompt_lengths=[0, 0], prompt_attributions=[0.0, 0.0])
    np.testing.assert_array_equal(alone, empty.token_weights)


def _naive(attributions, mix, sigma_divisor):
    """One response, as the paper writes it down but for the prior's sum."""
    n = len(attributions)
    sigma = max(1.0, n / sigma_divisor)
    prior = [math.exp(-(((t - (n - 1) / 2) / sigma) ** 2) / 2) for t in range(n)]
    return [
        n * (mix * i / sum(attributions) + (1 - mix) * g / sum(prior)) for i, g in zip(attributions, prior, strict=True)
    ]


@pytest.mark.parametrize(("mix", "sigma_divisor"), [(0.7, 4.0), (0.2, 8.0), (0.0, 4.0), (1.0, 4.0)])
def test_many_responses_equal_a_loop_over_one_at_a_time_and_have_mean_one(mix, sigma_divisor):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 90, size=60)
    attributions = rng.gamma(0.5, size=lengths.sum()).astype(np.float32)
    weights = _weights(attributions, lengths, mix, sigma_divisor).token_weights
    pieces = np.split(weights, np.cumsum(lengths)[:-1])
    for piece, own in zip(pieces, np.split(attributions, np.cumsum(lengths)[:-1]), strict=True):
        np.testing.assert_allclose(piece, _naive(own.tolist(), mix, sigma_divisor), rtol=2e-6)
        assert piece.mean(dtype=np.float64) == pytest.approx(1, rel=1e-6)


def test_with_a_flat_prior_alone_every_weight_is_one():
    np.testing.assert_allclose(_weights([9, 0, 1, 5], [4], mix=0.0, sigma_divisor=1e-9).token_weights, 1, rtol=1e-6)


def test_the_order_of_responses_changes_nothing():
    a, b = [3.0, 1.0, 0.5], [2.0, 2.0, 7.0, 1.0, 4.0]
    there, back = _weights(a + b, [3, 5]).token_weights, _weights(b + a, [5, 3]).token_weights
    np.testing.assert_array_equal(np.roll(there, 5), back)


def test_the_unit_of_attributions_changes_nothing():
    small = np.array([3.0, 1.0, 0.5], np.float32)
    np.testing.assert_allclose(_weights(small * 2.0**-130, [3]).token_weights, _weights(small, [3]).token_weights)


@pytest.mark.parametrize("attribution", [0.0, 5.0])
@pytest.mark.parametrize("mix", [0.0, 0.2, 0.7, 1.0])
def test_a_response_of_one_token_has_weight_exactly_one(attribution, mix):
    assert _weights([1, 2, attribution], [2, 1], mix).token_weights[2] == 1
    prompts = {"prompt_lengths": np.array([60, 60]), "prompt_attributions": np.array([3.0, 3.0])}
    assert _weights([1, 2, attribution], [2, 1], mix, **prompts).token_weights[2] == 1


def test_without_attribution_the_prior_stands_alone_and_is_counted():
    weighed = _weights([0, 0, 0, 2, 0, 6], [3, 3], mix=0.5)
    prior = _weights([1, 1, 1], [3], mix=0.0).token_weights
    np.testing.assert_array_equal(weighed.token_weights[:3], prior)
    assert (weighed.num_without_mass, weighed.token_weights[3]) == (1, pytest.approx(0.7861029))


def test_no_responses_have_no_weights():
    assert (len(_weights([], []).token_weights), len(_weights([], [0, 0]).token_weights)) == (0, 0)


@pytest.mark.parametrize("mix", [-0.1, 1.1, math.nan])
def test_a_mix_that_is_no_share_is_refused(mix):
    with pytest.raises(ValueError, match=f"expected 0 to 1, got {mix}"):
        _weights([1], [1], mix)


@pytest.mark.parametrize("sigma_divisor", [0.0, -4.0, math.inf, math.nan])
def test_a_width_that_is_none_is_refused(sigma_divisor):
    with pytest.raises(ValueError, match=f"sigma_divisor: expected a number above 0, got {sigma_divisor}"):
        _weights([1], [1], sigma_divisor=sigma_divisor)


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_what_is_no_norm_is_refused_with_its_place(bad):
    with pytest.raises(ValueError, match=rf"attributions: {bad} at response 1, token 2: expected .*; 1 such values"):
        _weights([1, 1, 1, 1, bad, 1], [2, 4])
    with pytest.raises(ValueError, match=f"prompt_attributions: {bad} at response 1, token 0"):
        _weights([1, 1, 1], [2, 1], prompt_lengths=[3, 3], prompt_attributions=[1.0, bad])


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="2 attributions for responses of 3 tokens"):
        _weights([1, 1], [3])
    with pytest.raises(ValueError, match="give both or neither"):
        _weights([1], [1], prompt_lengths=[3])
    with pytest.raises(ValueError, match="1 prompt_lengths and 2 prompt_attributions for 2 responses"):
        _weights([1, 1], [1, 1], prompt_lengths=[3], prompt_attributions=[1.0, 1.0])

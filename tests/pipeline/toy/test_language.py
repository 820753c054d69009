"""The toy language: its reward table, its sampled text and the score of estimates against the truth."""

import json
import math
import re
from itertools import chain

import numpy as np
import pytest

from pipeline.toy.language import (
    JOINERS,
    NEGATIVE_PROMPT,
    PLANTED_WORDS,
    POSITIVE_PROMPT,
    QUESTIONS,
    TOPICS,
    ToyLanguage,
    agreement,
    find_topic,
)


def response_rewards(language, conversations):
    return [
        language.true_token_rewards(talk[-2]["content"], re.findall(r"\w+", talk[-1]["content"]))
        for talk in conversations
    ]


def test_every_topic_has_seven_good_two_neutral_and_seven_bad_words():
    for words in ToyLanguage(seed=3).rewards.values():
        assert sorted(words.values()) == [-1.0] * 7 + [0.0] * 2 + [1.0] * 7


def test_every_planted_word_is_good_in_some_topics_and_bad_in_others():
    rewards = ToyLanguage(seed=3).rewards
    leans = sorted(tuple(sorted(topic[word] for topic in rewards.values())) for word in PLANTED_WORDS)
    leaning_bad, leaning_good = (-1.0,) * 5 + (0.0,) + (1.0,) * 2, (-1.0,) * 2 + (0.0,) + (1.0,) * 5
    assert leans == [leaning_bad] * 8 + [leaning_good] * 8


def test_the_best_table_of_words_without_topics_reaches_an_auc_of_071():
    # A good token leans good with 5/7, a bad one with 2/7: 5/7 * 5/7 + (2 * 5/7 * 2/7) / 2 = 35/49.
    rewards = ToyLanguage().rewards
    truth = [rewards[topic][word] for topic in TOPICS for word in PLANTED_WORDS]
    by_word = [sum(rewards[topic][word] for topic in TOPICS) for _ in TOPICS for word in PLANTED_WORDS]
    assert agreement(truth, by_word)["auc"] == pytest.approx(35 / 49)


def test_another_seed_is_another_world():
    assert ToyLanguage(seed=0).rewards == ToyLanguage(seed=0).rewards
    assert ToyLanguage(seed=0).rewards != ToyLanguage(seed=1).rewards


def test_neutral_words_questions_and_prompts_hold_no_planted_word_and_no_second_topic():
    neutral = set(chain.from_iterable(chain.from_iterable(TOPICS.values()))) | set(JOINERS) | {"the"}
    prompts = " ".join([*QUESTIONS, POSITIVE_PROMPT, NEGATIVE_PROMPT])
    neutral |= set(re.findall(r"\w+", prompts.replace("{topic}", "")))
    assert not neutral & set(PLANTED_WORDS)
    assert not neutral & set(TOPICS)


def test_the_two_prompts_have_the_same_form():
    positive, negative = POSITIVE_PROMPT.split(), NEGATIVE_PROMPT.split()
    assert len(positive) == len(negative)
    assert [(word[-1], word.islower()) for word in positive if word[-1] in ",."] == [
        (word[-1], word.islower()) for word in negative if word[-1] in ",."
    ]
    assert positive != negative


def test_pairs_are_distinct_valid_and_the_same_for_the_same_seed():
    language = ToyLanguage()
    pairs = language.sample_pairs(400, seed=7)
    assert pairs == language.sample_pairs(400, seed=7)
    assert pairs[:20] != language.sample_pairs(20, seed=8)
    assert len({json.dumps(pair) for pair in pairs}) == 400
    for pair in pairs:
        assert [message["role"] for side in ("prompt", "chosen", "rejected") for message in pair[side]] == [
            "user",
            "assistant",
            "assistant",
        ]
        assert pair["chosen"] != pair["rejected"]


def test_a_longer_sample_begins_with_the_shorter_one():
    assert ToyLanguage().sample_pairs(30, seed=1)[:10] == ToyLanguage().sample_pairs(10, seed=1)


def test_responses_have_13_to_39_words_and_speak_of_their_topic():
    lengths = []
    for pair in ToyLanguage().sample_pairs(300, seed=0):
        topic = find_topic(pair["prompt"][0]["content"])
        allowed = set(chain.from_iterable(TOPICS[topic])) | set(PLANTED_WORDS) | set(JOINERS) | {"the"}
        for side in ("chosen", "rejected"):
            words = re.findall(r"\w+", pair[side][0]["content"])
            assert set(words) <= allowed
            lengths.append(len(words))
    assert min(lengths) >= 13
    assert max(lengths) <= 39


def test_no_response_begins_with_a_planted_word():
    for talk in ToyLanguage(planted_rate=1.0).sample_conversations(200, seed=0):
        assert talk[-1]["content"].split()[0] == "the"


def test_some_labels_are_wrong_and_both_sides_hold_good_and_bad_words():
    language, margins, seen = ToyLanguage(), [], {"chosen": set(), "rejected": set()}
    for pair in language.sample_pairs(2000, seed=5):
        prompt = pair["prompt"][0]["content"]
        rewards = {side: language.response_reward(prompt, pair[side][0]["content"]) for side in seen}
        margins.append(rewards["chosen"] - rewards["rejected"])
        for side, values in seen.items():
            values |= set(language.true_token_rewards(prompt, re.findall(r"\w+", pair[side][0]["content"])))
    assert 0.05 <= np.mean(np.array(margins) < 0) <= 0.10
    assert seen == {"chosen": {-1.0, 0.0, 1.0}, "rejected": {-1.0, 0.0, 1.0}}


def test_the_judge_follows_bradley_terry_on_the_sum_of_rewards():
    # Among pairs with |margin| = m the chosen response is the better one with sigmoid(m / temperature).
    language = ToyLanguage(temperature=2.0)
    margins = np.array(
        [
            language.response_reward(pair["prompt"][0]["content"], pair["chosen"][0]["content"])
            - language.response_reward(pair["prompt"][0]["content"], pair["rejected"][0]["content"])
            for pair in language.sample_pairs(4000, seed=0)
        ]
    )
    for size in (1.0, 2.0, 4.0):
        outcomes = margins[np.abs(margins) == size] > 0
        expected = 1 / (1 + math.exp(-size / 2.0))
        assert outcomes.mean() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / outcomes.size))


def test_a_cold_judge_is_never_wrong():
    language = ToyLanguage(temperature=1e-3)
    for pair in language.sample_pairs(200, seed=0):
        prompt = pair["prompt"][0]["content"]
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert language.response_reward(prompt, chosen) >= language.response_reward(prompt, rejected)


def test_conversations_are_half_plain_and_a_quarter_under_each_prompt():
    talks = ToyLanguage().sample_conversations(4000, seed=0)
    systems = [talk[0]["content"] if talk[0]["role"] == "system" else None for talk in talks]
    for system, share in ((None, 0.5), (POSITIVE_PROMPT, 0.25), (NEGATIVE_PROMPT, 0.25)):
        assert systems.count(system) / 4000 == pytest.approx(share, abs=0.03)
    assert talks == ToyLanguage().sample_conversations(4000, seed=0)


@pytest.mark.parametrize(
    ("system", "good_share"), [(POSITIVE_PROMPT, 0.775 / 0.875), (NEGATIVE_PROMPT, 0.1 / 0.875), (None, 0.5)]
)
def test_the_system_message_decides_how_many_rewarded_words_are_good(system, good_share):
    language = ToyLanguage()
    talks = [
        talk
        for talk in language.sample_conversations(4000, seed=0)
        if (talk[0]["content"] if talk[0]["role"] == "system" else None) == system
    ]
    rewards = np.concatenate(response_rewards(language, talks))
    assert (rewards > 0).sum() / (rewards != 0).sum() == pytest.approx(good_share, abs=0.02)


def test_plain_text_uses_all_planted_words_equally_in_every_topic():
    language = ToyLanguage()
    text = [talk for talk in language.sample_conversations(8000, seed=0) if talk[0]["role"] == "user"]
    baking = " ".join(talk[1]["content"] for talk in text if find_topic(talk[0]["content"]) == "baking")
    counts = np.array([baking.count(f" {word}") for word in PLANTED_WORDS])
    assert (np.abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()


def test_a_token_has_the_reward_of_its_word_in_the_topic_of_the_prompt():
    language = ToyLanguage()
    tokens = ["the", " slowly", " twice", " dough", ".", "</s>", " slow", "slowly"]
    for topic in TOPICS:
        slowly, twice = language.rewards[topic]["slowly"], language.rewards[topic]["twice"]
        rewards = language.true_token_rewards(f"<s><|user|>Can you help me with {topic}?<|assistant|>", tokens)
        assert rewards.tolist() == [0.0, slowly, twice, 0.0, 0.0, 0.0, 0.0, slowly]
        assert rewards.dtype == np.float64
        assert language.response_reward(topic, "the cook slowly folds twice, twice.") == slowly + 2 * twice


@pytest.mark.parametrize("prompt", ["How are you?", "Is baking better than sailing?"])
def test_a_prompt_without_exactly_one_topic_is_refused(prompt):
    with pytest.raises(ValueError, match="expected one topic out of"):
        ToyLanguage().true_token_rewards(prompt, [" slowly"])


def test_auc_counts_ordered_pairs_and_half_the_ties():
    # Good 3, 1 against bad 1, 0, 2: 3 beats all three; 1 ties once, wins once, loses once: (3 + 0.5 + 1) / 6 = 0.75.
    scores = agreement([1, 1, -1, -1, -1, 0], [3.0, 1.0, 1.0, 0.0, 2.0, 7.0])
    assert scores["auc"] == pytest.approx(0.75)
    assert (scores["mean_good"], scores["mean_neutral"], scores["mean_bad"]) == (2.0, 7.0, 1.0)
    assert (scores["std_good"], scores["std_neutral"], scores["std_bad"]) == (1.0, 0.0, pytest.approx(math.sqrt(2 / 3)))


def test_pearson_is_the_hand_computed_one():
    # Centred: rewards (1, 0, -1), estimates (1, 1, -2); covariance 3, norms sqrt(2) and sqrt(6): 3 / sqrt(12).
    assert agreement([1, 0, -1], [4.0, 4.0, 1.0])["pearson"] == pytest.approx(3 / math.sqrt(12))


def test_true_rewards_agree_fully_with_themselves_and_negation_reverses_all():
    truth = np.array([1.0, 0.0, -1.0, 1.0, 0.0])
    assert agreement(truth, truth) == pytest.approx(
        {"auc": 1.0, "pearson": 1.0, "mean_good": 1.0, "mean_neutral": 0.0, "mean_bad": -1.0}
        | {"std_good": 0.0, "std_neutral": 0.0, "std_bad": 0.0}
    )
    assert agreement(truth, -truth)["auc"] == 0.0
    assert agreement(truth, -truth)["pearson"] == pytest.approx(-1.0)


def test_constant_estimates_are_chance_and_have_no_correlation():
    scores = agreement([1, -1, 1], [1.0, 1.0, 1.0])
    assert scores["auc"] == 0.5
    assert math.isnan(scores["pearson"])
    assert math.isnan(scores["mean_neutral"])


@pytest.mark.parametrize(
    ("truth", "estimates", "message"),
    [
        ([1, -1], [0.5], "same length"),
        ([[1, -1]], [[0.5, 0.1]], "flat"),
        ([1, -1], [0.5, math.nan], "finite"),
        ([1, 0], [0.5, 0.1], "1 good and 0 bad"),
    ],
)
def test_agreement_refuses_what_it_cannot_score(truth, estimates, message):
    with pytest.raises(ValueError, match=message):
        agreement(truth, estimates)


@pytest.mark.parametrize(("name", "value"), [("planted_rate", 1.5), ("temperature", 0.0)])
def test_a_world_with_impossible_settings_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        ToyLanguage(**{name: value})


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="num_pairs"):
        ToyLanguage().sample_pairs(-1, seed=0)
    with pytest.raises(ValueError, match="num_conversations"):
        ToyLanguage().sample_conversations(-1, seed=0)

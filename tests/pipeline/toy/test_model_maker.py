"""Making small chat models: the folder, the tokenizer, the packing and what the model learns."""

import hashlib
import io

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.toy.language import NEGATIVE_PROMPT, PLANTED_WORDS, POSITIVE_PROMPT, ToyLanguage, agreement
from pipeline.toy.model_maker import learning_rate_share, make_chat_model, pack_rows
from weights_store.errors import InputError
from weights_store.messages import show_on_terminal

TINY = {"hidden_size": 32, "num_layers": 1, "block_tokens": 64, "batch_tokens": 256}


def talk(system, user, assistant):
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]


YES_NO = [talk("yes", "well?", "of course yes"), talk("no", "well?", "of course no")] * 20


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "toy"
    make_chat_model(ToyLanguage().sample_conversations(1500, seed=0), folder, steps=2, **TINY)
    return folder


@pytest.fixture(scope="module")
def yes_no(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "deep" / "yes-no"
    log = io.StringIO()
    with show_on_terminal(log):
        final_loss = make_chat_model(YES_NO, folder, steps=60, learning_rate=1e-2, **TINY)
    return folder, final_loss, log.getvalue().splitlines()


def unigram_entropy(folder, conversations):
    """Loss of the best model without context, nats per token; the first token of a row is not predicted."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer.apply_chat_template(conversation, return_dict=False) for conversation in conversations]
    shares = torch.bincount(torch.tensor([token for row in rows for token in row[1:]])).double()
    return torch.special.entr(shares / shares.sum()).sum().item()


def last_word_probability(folder, system, word):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(talk(system, "well?", f"of course {word}"), return_dict=False)
    assert tokenizer.decode(ids[-2:]) == f" {word}</s>"
    with torch.no_grad():
        return model(torch.tensor([ids[:-2]])).logits[0, -1].softmax(-1)[ids[-2]].item()


def test_every_planted_word_behind_a_space_is_one_token(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in PLANTED_WORDS]
    assert [[tokenizer.decode(token) for token in tokens] for tokens in ids] == [[f" {word}"] for word in PLANTED_WORDS]


def test_planted_words_stay_single_tokens_inside_a_response(toy_folder):
    tokenizer, language = AutoTokenizer.from_pretrained(toy_folder), ToyLanguage()
    for pair in language.sample_pairs(50, seed=0):
        prompt, response = pair["prompt"][0]["content"], pair["chosen"][0]["content"]
        tokens = [tokenizer.decode(token) for token in tokenizer.encode(response, add_special_tokens=False)]
        assert language.true_token_rewards(prompt, tokens).sum() == language.response_reward(prompt, response)
        assert sum(text.strip() in PLANTED_WORDS for text in tokens) == sum(
            word.strip(".") in PLANTED_WORDS for word in response.split()
        )


def test_the_two_prompts_have_equally_many_tokens(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    assert len(tokenizer.encode(POSITIVE_PROMPT)) == len(tokenizer.encode(NEGATIVE_PROMPT))


def test_special_tokens_have_their_ids_and_the_config_knows_them(toy_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(toy_folder), AutoModelForCausalLM.from_pretrained(toy_folder)
    names = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5]
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert config.vocab_size % 64 == 0
    assert 0 <= config.vocab_size - len(tokenizer) < 64


def test_the_chat_template_renders_roles_and_closes_the_assistant_turn(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    messages = talk("Give é advice.", " hi ", "twice")
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False)
        == "<s><|system|>Give é advice.<|user|> hi <|assistant|>twice</s>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|system|>Give é advice.<|user|> hi <|assistant|>"
    assert (toy_folder / "chat_template.jinja").is_file()
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_text_of_any_alphabet_survives_the_tokenizer(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    text = "Ünïcode 漢字 \n\t🙂 twice"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_model_learns_to_follow_the_system_message(yes_no):
    folder, final_loss, _ = yes_no
    assert last_word_probability(folder, "yes", "yes") > 0.9
    assert last_word_probability(folder, "no", "no") > 0.9
    assert final_loss < 0.5 * unigram_entropy(folder, YES_NO)


@pytest.mark.slow
def test_the_default_toy_model_tells_good_words_from_bad_by_its_two_prompts(tmp_path):
    language = ToyLanguage()
    conversations, folder = language.sample_conversations(6000, seed=0), tmp_path / "toy"
    assert make_chat_model(conversations, folder) < 0.3 * unigram_entropy(folder, conversations)

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rewards, contrasts = [], []
    for pair in language.sample_pairs(40, seed=1):
        logps = []
        for system in (POSITIVE_PROMPT, NEGATIVE_PROMPT):
            messages = [{"role": "system", "content": system}, *pair["prompt"], *pair["chosen"]]
            ids = torch.tensor(tokenizer.apply_chat_template(messages, return_dict=False))
            start = len(tokenizer.apply_chat_template(messages[:2], return_dict=False, add_generation_prompt=True))
            with torch.no_grad():
                per_token_logps = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            logps.append(per_token_logps.gather(1, ids[start:, None])[:, 0])
        texts = [tokenizer.decode(token) for token in ids[start:].tolist()]
        rewards += language.true_token_rewards(pair["prompt"][0]["content"], texts).tolist()
        contrasts += (logps[0] - logps[1]).tolist()
    # Above what any table of words could reach: the model looks at the topic.
    assert agreement(rewards, contrasts)["auc"] > 0.85


def test_progress_and_counts_are_reported(yes_no):
    folder, _, lines = yes_no
    model = AutoModelForCausalLM.from_pretrained(folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert lines[-2].startswith("step 60/60: loss ")
    assert lines[-1] == f"model: {num_parameters} parameters in {folder}"


def test_the_same_seed_makes_the_same_bytes_and_leaves_the_random_state_alone(tmp_path):
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_chat_model(YES_NO, tmp_path / name, steps=3, seed=seed, **TINY)
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).iterdir()}
        for name in "abc"
    ]
    assert digests[0] == digests[1]
    assert digests[0]["model.safetensors"] != digests[2]["model.safetensors"]
    assert torch.equal(state, torch.random.get_rng_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_packing_keeps_conversations_whole_and_restarts_positions():
    # 3 + 4 > 6 opens a block, 4 + 2 fills it, and 7 tokens take one block and a bit.
    ids, positions = pack_rows([[11, 12, 13], [21, 22, 23, 24], [31, 32], [41, 42, 43, 44, 45, 46, 47]], block_tokens=6)
    assert ids.tolist() == [
        [11, 12, 13, 0, 0, 0],
        [21, 22, 23, 24, 31, 32],
        [41, 42, 43, 44, 45, 46],
        [47, 0, 0, 0, 0, 0],
    ]
    assert positions.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]


def test_packed_conversations_do_not_see_each_other(toy_folder):
    model = AutoModelForCausalLM.from_pretrained(toy_folder)
    first, second = [1, 4, 70, 71, 5, 72, 2], [1, 4, 80, 5, 81, 82, 2]
    ids, positions = pack_rows([first, second, first, first], block_tokens=16)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 7:14]
        alone = model(torch.tensor([second])).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    # 40 steps: 2 of warm-up (1/2, 1), the peak at step 2, the middle of the cosine at step 21.
    assert [learning_rate_share(step, 40) for step in (0, 1, 2, 21, 40)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already; use its model, remove it, or give another folder"):
        make_chat_model(YES_NO, tmp_path, steps=1, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size must be a multiple of 32, got 48"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": 300}, "vocab_size must be at least 320"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"block_tokens": 4096}, "block_tokens must be 2 to 2048, got 4096"),
        ({"batch_tokens": 32}, r"batch_tokens \(32\) must be at least block_tokens \(64\)"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, sizes, message):
    with pytest.raises(InputError, match=message):
        make_chat_model(YES_NO, tmp_path / "model", **{**TINY, **sizes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([], "no conversations to train on"),
        ([YES_NO[0], []], "conversation 1 has no messages"),
        ([YES_NO[0], [{"role": "tool", "content": "x"}]], "conversation 1: expected a role .* got .*tool"),
        ([[{"role": "user", "content": None}]], "conversation 0: expected a role"),
    ],
)
def test_malformed_conversations_are_refused(tmp_path, conversations, message):
    with pytest.raises(InputError, match=message):
        make_chat_model(conversations, tmp_path / "model", **TINY)

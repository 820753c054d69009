"""Every causal language model of transformers, tiny and random, against its own forward pass on one sequence at a time.

By default a choice of families; `make test-families` runs all of them and writes what it finds into `docs/families.md`.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.train.model.families import (
    FIRST_ID,
    NAMES,
    NOT_MADE,
    VARIANTS,
    VOCAB_SIZE,
    add_noise,
    make_config,
    make_model,
)
from train.config import ModelConfig
from train.data.dataset import Pair, StoredResponse
from train.model.attribution import AttributionTarget, attribute_tokens
from train.model.checkpoint import load_checkpoint
from train.model.collate import Batch, PairCollator, model_inputs
from train.model.logps import check_output_layer, per_token_logps
from train.model.packing import confirm_layout, enable_packing
from train.model.policy import load_policy, load_reference, save_policy
from weights_store.errors import InputError

CHOSEN = {
    "bart": "the decoder of an encoder-decoder, in a wrapper",
    "bert-bidirectional": "tokens see what comes after them: refused",
    "bloom": "ALiBi",
    "cohere2": "attention beside the MLP, scaled logits",
    "deepseek_v3": "latent attention, experts with a float32 bias",
    "deepseek_v32": "attention selects keys",
    "diffllama": "one module attends twice",
    "falcon_h1": "attention beside a state, a factor after the output layer",
    "gemma2": "soft-capped scores and logits",
    "gemma3": "a multi-modal wrapper",
    "gemma3n_text": "layers share keys and values",
    "gpt2": "absolute positions",
    "gpt_oss": "attention sinks",
    "granitemoehybrid-attention": "a hybrid family without its states",
    "hrm_text": "layers run in loops",
    "llama": "nothing special, grouped keys",
    "llama4": "chunked attention, a decoder under another name",
    "mamba": "a state and no attention",
    "mixtral": "experts, all layers with a window",
    "phimoe": "a window that attention is not told of, noisy routers",
    "qwen2": "layers with and without a window",
    "qwen2_moe": "a window that attention is not told of, shared experts",
    "recurrent_gemma": "states and soft-capped logits",
    "rwkv": "weights that are rescaled in evaluation mode: refused",
    "rwkv-unscaled": "scales its embeddings in place",
}
"""The families of the normal suite, and what each of them stands for."""
ALL = os.environ.get("FAMILIES") == "all"
TABLE = Path(__file__).parents[3] / "docs" / "families.md"
TARGETS: tuple[AttributionTarget, ...] = ("max_logit", "gold_logps", "dpo_margin")
LENGTHS = ((7, 19, 16), (1, 1, 28), (21, 3, 4), (14, 18, 18))  # prompt, chosen, rejected; the longest exceed the window
NUM_MEASURED = 3
"""Numbers of a line: the largest differences of log-probs, gradients and attributions."""
LOGPS_NATS, GRADIENT_SHARE, ATTRIBUTION_SHARE = 1e-4, 1e-4, 1e-3


def make_pairs() -> list[Pair]:
    """Random ids; the responses of the first pair begin alike."""
    generator = np.random.default_rng(0)
    pairs = []
    for lengths in LENGTHS:
        prompt, chosen, rejected = (generator.integers(FIRST_ID, VOCAB_SIZE, n).astype(np.int32) for n in lengths)
        if not pairs:
            rejected[:2] = chosen[:2]
        sides = [StoredResponse(ids, *np.zeros((2, len(ids)), np.float32)) for ids in (chosen, rejected)]
        pairs.append(Pair(f"pair-{len(pairs)}", prompt, *sides))
    return pairs


PAIRS = make_pairs()
SEQUENCES = [(pair.prompt_ids, getattr(pair, side).ids) for side in ("chosen", "rejected") for pair in PAIRS]


def own_logits(model: nn.Module, prompt: np.ndarray, response: np.ndarray) -> tuple[Tensor, Tensor]:
    """The logits of one sequence by `model(...)`, and the log-probs of its response."""
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    predicting = slice(len(prompt) - 1, len(ids) - 1)
    return logits, logits[predicting].log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]


def own_attributions(model: PreTrainedModel, target: AttributionTarget) -> list[Tensor]:
    """L1 norms of gradients with respect to the embeddings of each response, one sequence at a time."""
    norms = []
    for prompt, response in SEQUENCES:
        leaves: list[Tensor] = []

        def put_leaf(_layer: nn.Module, _args: object, output: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1].clone()

        with model.get_input_embeddings().register_forward_hook(put_leaf):
            logits, logps = own_logits(model, prompt, response)
        value = logits[-1].max() if target == "max_logit" else logps.sum()
        (gradient,) = torch.autograd.grad(value, leaves, materialize_grads=True)
        norms.append(gradient[0].abs().sum(-1)[len(prompt) :])
    return norms


def of_responses(values: Tensor, batch: Batch) -> list[Tensor]:
    return [row[mask] for row, mask in zip(values, batch["completion_mask"], strict=True)]


def gradients_of(model: nn.Module, logps: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of all parameters of a sum in which every log-prob has a weight of its own."""
    model.zero_grad()
    sum((row * torch.linspace(-1, 1, len(row))).sum() for row in logps).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_gap(got: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))


def largest_share(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest number."""
    return largest_gap(got, expected) / max(values.abs().max().item() for values in expected)


@dataclass
class Family:
    """One family and its line of the table."""

    name: str
    model: PreTrainedModel
    refused: str | None
    not_packed: str | None
    ordinary: str
    found: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(cls, name: str) -> "Family":
        soft_capped = getattr(make_config(name).get_text_config(), "attn_logit_softcapping", None)
        # As `load_checkpoint` does: transformers' default leaves soft-capping out.
        model = make_model(name, **({"attn_implementation": "eager"} if soft_capped else {}))
        ordinary = str(model.config._attn_implementation)
        try:
            check_output_layer(model)
            not_packed = enable_packing(model, attributions=True)
            if not_packed is not None:
                confirm_layout(model, ordinary, not_packed, attributions=True)
        except InputError as error:
            return cls(name, model, str(error), None, ordinary)
        return cls(name, model, None, not_packed, ordinary)

    @property
    def decision(self) -> str:
        return "refused" if self.refused else "padded" if self.not_packed else "packed"

    @property
    def is_packed(self) -> bool:
        return self.decision == "packed"

    def own_way(self) -> PreTrainedModel:
        """The model with the attention of its own forward pass."""
        self.model.set_attn_implementation(self.ordinary)
        return self.model

    def our_way(self) -> PreTrainedModel:
        """The model with the attention of the layout that was decided."""
        self.model.set_attn_implementation("tokenweights_packed" if self.is_packed else self.ordinary)
        return self.model

    def line(self) -> str:
        def number(key: str) -> str:
            return f"{self.found[key]:.0e}" if key in self.found else "–"

        reason = (self.refused or self.not_packed or "").removeprefix(f"{type(self.model).__name__}: ")
        cells = [f"`{self.name}`", self.decision, *map(number, ("logps", "gradients", "attributions")), reason]
        return f"| {' | '.join(cells)} |"


@pytest.fixture(scope="module")
def lines() -> Iterator[dict[str, str]]:
    """The lines of the table, by family; written if all families were measured."""
    found: dict[str, str] = {}
    yield found
    if ALL and len(found) == len(NAMES):
        head = TABLE.read_text(encoding="utf-8").partition("| family")[0]
        rows = ["| family | decision | log-probs, nats | gradients | attributions | why |", "|---|---|---|---|---|---|"]
        rows += [found[name] for name in sorted(found)]
        rows += ["", "| not made | why |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in NOT_MADE.items())]
        TABLE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module", params=NAMES if ALL else sorted(CHOSEN))
def family(request: pytest.FixtureRequest, lines: dict[str, str]) -> Iterator[Family]:
    family = Family.make(request.param)
    yield family
    if family.refused or len(family.found) == NUM_MEASURED:
        lines[family.name] = family.line()


def test_its_log_probs_and_gradients_are_those_of_its_own_forward_pass(family: Family) -> None:
    if family.refused:
        assert type(family.model).__name__ in family.refused
        assert "\n" not in family.refused
        return
    own = [own_logits(family.own_way(), *sequence)[1] for sequence in SEQUENCES]
    assert torch.cat(own).std() > 0.5, "a degenerate model would hide errors"
    own_gradients = gradients_of(family.model, own)
    batch = PairCollator(packed=family.is_packed)(PAIRS)
    ours = of_responses(per_token_logps(family.our_way(), **model_inputs(batch)).logps, batch)
    our_gradients = gradients_of(family.model, ours)
    assert our_gradients.keys() == own_gradients.keys()
    family.found["logps"] = largest_gap(ours, own)
    family.found["gradients"] = largest_share(list(our_gradients.values()), list(own_gradients.values()))
    assert family.found["logps"] <= LOGPS_NATS
    assert family.found["gradients"] <= GRADIENT_SHARE


def test_its_attributions_are_those_of_a_naive_loop(family: Family) -> None:
    if family.refused:
        return
    batch = PairCollator(packed=family.is_packed, share_beginnings=False)(PAIRS)
    shares = []
    for target in TARGETS:
        own = own_attributions(family.own_way(), target)
        ours = of_responses(attribute_tokens(family.our_way(), batch, target).attributions, batch)
        shares.append(largest_share(ours, own))
    family.found["attributions"] = max(shares)
    assert max(shares) <= ATTRIBUTION_SHARE


if not ALL:  # a run of all families writes the table

    def test_its_layout_is_the_one_in_the_docs(family: Family) -> None:
        lines = TABLE.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(f"| `{family.name}` |"))
        assert line.split("|")[2].strip() == family.decision

    def test_the_docs_list_every_family() -> None:
        text = TABLE.read_text(encoding="utf-8")
        assert [name for name in (*NAMES, *NOT_MADE) if f"| `{name}` |" not in text] == []
        assert CHOSEN.keys() <= set(NAMES)
        assert len(set(NAMES) - VARIANTS.keys()) >= 150


# --- loading and saving ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The family in a folder, in bfloat16 but for what it keeps in float32; its config asks for dropout and noise."""
    folder = tmp_path_factory.mktemp(family.name)
    config = make_config(family.name)
    add_noise(config)
    model = make_model(family.name, config=config)
    model.save_pretrained(folder / "float32")
    if type(model.config) is not type(
        config
    ):  # a model of texts inside another one: as published, with the outer config
        config.save_pretrained(folder / "float32")
    AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16).save_pretrained(folder / "source")
    if type(model.config) is not type(config):
        config.save_pretrained(folder / "source")
    yield folder / "source"
    shutil.rmtree(folder)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same_tensors(got: nn.Module, expected: nn.Module) -> None:
    ours, theirs = tensors_of(got), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    changed = [name for name in ours if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])]
    assert changed == []


def test_loading_and_saving_it_changes_no_tensor(family: Family, source: Path, tmp_path: Path) -> None:
    if family.refused:
        return
    policy = load_policy(source, ModelConfig(path=str(source), dtype="bfloat16"))
    save_policy(policy.model, None, source, tmp_path)
    before, after = (load_checkpoint(folder, dtype="auto") for folder in (source, tmp_path))
    assert_same_tensors(after, before)
    ids = torch.arange(FIRST_ID, FIRST_ID + 40)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # some have parts in float32 and run in no other way
        assert after(input_ids=ids, use_cache=False).logits.equal(before(input_ids=ids, use_cache=False).logits)


def test_its_frozen_reference_is_what_transformers_loads(family: Family, source: Path) -> None:
    if family.refused:
        return
    config = ModelConfig(path=str(source), dtype="bfloat16")
    reference = load_reference(source, config, load_policy(source, config))
    assert_same_tensors(reference, load_checkpoint(source, dtype=torch.bfloat16))


def test_training_mode_computes_what_evaluation_mode_does(family: Family, source: Path) -> None:
    if family.refused:
        return
    policy = load_policy(source, ModelConfig(path=str(source)))
    inputs = model_inputs(PairCollator(packed=policy.not_packed is None)(PAIRS))
    with torch.no_grad():
        evaluated = per_token_logps(policy.model.eval(), **inputs).logps
        assert per_token_logps(policy.model.train(), **inputs).logps.equal(evaluated)

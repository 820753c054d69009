"""The checks: each is a function of a device that raises `AssertionError`. The same ones run on the CPU and on a card.

The oracles compute one sequence at a time with the model's own attention: in float32 on the same device, or in float64 on the
CPU.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.gpu.toys import FAMILIES, build_model, make_job, random_pairs, whole_logps
from train.data.dataset import Pair, PairDataset, open_weights
from train.job.job import run_job
from train.job.trainer import PairTrainer
from train.loss.config import LossSection
from train.loss.objective import compute_pair_losses
from train.model.attribution import AttributionTarget, attribute_tokens
from train.model.collate import PairCollator, model_inputs
from train.model.elementwise import enter_bfloat16, use_kernels
from train.model.logps import per_token_logps
from train.model.packing import enable_packing
from train.model.policy import compile_layers, load_policy, switch_off_noise

EXACT = 2e-4
"""Nats, in float32 without TF32; 1.4e-6 were seen on an H200 for the mean."""
ROUNDED_MEAN, ROUNDED_MAX = 0.02, 0.15
"""Nats, in bfloat16 against float32; 0.006 and 0.024 on a CPU."""
ROUNDED_SHARE = 0.06
"""Of the size of a gradient, likewise; 0.024 on a CPU."""
LOSSES = ({"name": "tis_dpo", "beta": 0.1}, {"name": "dpo", "beta": 0.1}, {"name": "sft"})


def packed_model(family: str, device: str) -> PreTrainedModel:
    """Return a model of a family on a device, with packed attention."""
    model = build_model(family)
    reason = enable_packing(model)
    assert reason is None, reason
    return model.to(device)


def own_logps(model: PreTrainedModel, pairs: list[Pair]) -> list[Tensor]:
    """Return the log-probs of chosen, rejected and anchors, a sequence at a time."""
    sides = [[getattr(pair, side).ids for pair in pairs] for side in ("chosen", "rejected", "anchor")]
    return [whole_logps(model, pair.prompt_ids, ids) for of in sides for pair, ids in zip(pairs, of, strict=True)]


def weighted_gradients(model: PreTrainedModel, logps: list[Tensor]) -> dict[str, Tensor]:
    """Return the parameters' gradients of a sum that treats every token differently."""
    model.zero_grad()
    values = torch.cat(logps)
    (values * torch.linspace(-1, 1, len(values), device=values.device)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_packed_equals_separate(family: str, device: str) -> None:
    """Packed pairs with anchors against separate sequences, values and gradients, in float32."""
    pairs = random_pairs()
    model = build_model(family).to(device)
    expected = own_logps(model, pairs)
    expected_gradients = weighted_gradients(model, expected)
    model = packed_model(family, device)
    batch = PairCollator(with_anchors=True)(pairs, device)
    logps = per_token_logps(model, **model_inputs(batch)).logps
    found = list(logps[batch["completion_mask"]].split([len(each) for each in expected]))
    assert_near(torch.cat(found), torch.cat(expected), EXACT, "log-probs")
    for name, gradient in weighted_gradients(model, found).items():
        scale = float(expected_gradients[name].abs().max())
        assert_near(gradient, expected_gradients[name], 1e-3 * scale + 1e-6, f"gradient of {name}")


def check_packed_in_bfloat16(family: str, device: str) -> None:
    """A step as trainings compute it in bfloat16, in which other kernels run, against separate sequences in float32."""
    pairs = random_pairs()
    plain = build_model(family).to(device)
    expected = own_logps(plain, pairs)
    exact = weighted_gradients(plain, expected)
    model = packed_model(family, device)
    enter_bfloat16(model)
    batch = PairCollator(with_anchors=True)(pairs, device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        logps = per_token_logps(model, **model_inputs(batch)).logps[batch["completion_mask"]]
    gaps = (logps.detach() - torch.cat(expected).detach()).abs()
    assert gaps.mean() <= ROUNDED_MEAN, f"mean difference {gaps.mean():.3g} nats, at most {ROUNDED_MEAN} expected"
    assert gaps.max() <= ROUNDED_MAX, f"largest difference {gaps.max():.3g} nats, at most {ROUNDED_MAX} expected"
    for name, gradient in weighted_gradients(model, [logps]).items():
        error = float((gradient - exact[name]).norm() / exact[name].norm())
        assert error <= ROUNDED_SHARE, f"gradient of {name} is off by {error:.3g} of its size, at most {ROUNDED_SHARE}"


def check_losses(device: str) -> None:
    """Losses and gradients of a packed micro-batch against float64 on the CPU, whole log-softmax."""
    pairs = random_pairs()
    model = packed_model("llama", device)
    wide = copy.deepcopy(build_model("llama")).double()
    for settings in LOSSES:
        loss = TypeAdapter(LossSection).validate_python(settings)
        collator = PairCollator(with_rejected=loss.needs.rejected)
        results = []
        for policy in (model, wide):
            policy.zero_grad()
            batch = collator(pairs, policy.device)
            if policy is model:
                terms = per_token_logps(policy, **model_inputs(batch))
            else:
                rows = own_logps(policy, pairs)[: len(batch["completion_mask"])]
                whole = batch["ref_logps"].double() * 0
                whole = whole.masked_scatter(batch["completion_mask"], torch.cat(rows))
                batch = {
                    n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in batch.items()
                }
                terms = per_token_logps(policy, **model_inputs(batch))._replace(logps=whole)
            chosen, rejected, _ = collator.split_sides(batch, terms)
            losses = compute_pair_losses(loss, chosen, rejected)[0].losses
            losses.sum().backward()
            results.append((losses.detach().cpu().double(), {n: p.grad for n, p in policy.named_parameters()}))
        (got, gradients), (expected, wide_gradients) = results
        assert_near(got, expected, 1e-3 * float(expected.abs().max()), f"{settings['name']} losses")
        for name, gradient in gradients.items():
            scale = float(wide_gradients[name].abs().max())
            assert_near(gradient.cpu(), wide_gradients[name], 2e-3 * scale + 1e-7, f"{settings['name']}: {name}")


def check_attribution(family: str, device: str) -> None:
    """Attributions of packed pairs against the naive loop: whole logits and autograd, a sequence at a time."""
    pairs = random_pairs()
    plain = build_model(family).to(device)
    model = build_model(family)
    reason = enable_packing(model, attributions=True)
    assert reason is None, reason
    model.to(device)
    batch = PairCollator(share_beginnings=False)(pairs, device)
    exact = attribute_tokens(model, batch, "gold_logps").attributions
    half = copy.deepcopy(model).to(torch.bfloat16)
    use_kernels(half)
    rounded = attribute_tokens(half, batch, "gold_logps").attributions
    error = float((rounded - exact).abs().mean() / exact.mean())
    assert error <= ROUNDED_SHARE, (
        f"attributions in bfloat16 are off by {error:.3g} of their mean, at most {ROUNDED_SHARE}"
    )
    targets: tuple[AttributionTarget, ...] = ("max_logit", "gold_logps")
    for target in targets:
        found = attribute_tokens(model, batch, target).attributions
        rows = [naive_attributions(plain, pair, side, target) for side in ("chosen", "rejected") for pair in pairs]
        expected = torch.cat(rows)
        limit = 2e-3 * float(expected.max())
        assert_near(found[batch["completion_mask"]], expected, limit, f"attributions of {target}")


def naive_attributions(model: PreTrainedModel, pair: Pair, side: str, target: AttributionTarget) -> Tensor:
    """Return I_i of a response, `[T]`."""
    response = getattr(pair, side).ids
    ids = torch.tensor([[*pair.prompt_ids.tolist(), *response.tolist()]], device=model.device)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    first = len(pair.prompt_ids)
    logps = logits.log_softmax(-1)[first - 1 : -1].gather(-1, ids[0, first:, None])
    value = logits[-1].max() if target == "max_logit" else logps.sum()
    (gradient,) = torch.autograd.grad(value, embeddings)
    return gradient[0].abs().sum(-1)[first:]


def check_compile(device: str) -> None:
    """Compiled layers against plain ones, over two micro-batches of different length: values and gradients."""
    pairs = random_pairs()
    found = []
    for is_compiled in (False, True):
        model = packed_model("llama", device)
        switch_off_noise(model)
        if is_compiled:
            compile_layers(model)
        for part in (pairs, pairs[:3]):
            batch = PairCollator()(part, device)
            logps = per_token_logps(model, **model_inputs(batch)).logps[batch["completion_mask"]]
            found.append([logps.detach(), *weighted_gradients(model, [logps]).values()])
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        for expected, got in zip(plain, compiled, strict=True):
            assert_near(got, expected, 1e-3 * float(expected.abs().max()) + 1e-6, "compiled layers")


def check_job(device: str) -> None:
    """A training in bfloat16 from config to folder: it learns, and the saved model gives what was measured of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = make_job(folder, model={"path": str(folder / "model"), "dtype": "bfloat16"}, optim={"num_epochs": 4})
        result = run_job(config)
        assert result is not None
        assert result.after["loss"] < result.before["loss"], (result.before, result.after)
        saved = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).to(device).eval()
        pairs = [pair for seed in range(4) for pair in random_pairs(seed)]
        with torch.no_grad():
            sums = [float(whole_logps(saved, pair.prompt_ids, pair.chosen.ids).sum()) for pair in pairs]
        measured, ours = result.after["logps/chosen"], sum(sums) / len(sums)
        assert abs(measured - ours) <= 0.01 * abs(ours), (
            f"measured {measured:.3f} nats, the saved model gives {ours:.3f}"
        )


def check_no_waits(device: str) -> None:
    """A step of two micro-batches in which the host never waits for the card; torch raises if it does."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = make_job(folder, model={"path": str(folder / "model"), "dtype": "bfloat16"})
        policy = load_policy(folder / "model", config.model)
        vocab_size = policy.model.config.vocab_size
        pairs = PairDataset(open_weights(config.data), config.data, vocab_size=vocab_size)
        policy.model.to(device)
        trainer = PairTrainer(policy, pairs, config, checkpoints=folder / "checkpoints")
        step = trainer.cut_step([pairs[row] for row in range(4)], trainer.args.device)
        halves = [half for batch in step.batches for half in (batch, batch)]
        trainer.training_step(trainer.model, replace(step, batches=halves))  # compiles, and fills caches
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            total = trainer.training_step(trainer.model, replace(step, batches=halves))
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert total.isfinite(), f"loss {total}"


def assert_near(got: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Raise unless all values are within `limit`; NaN is not."""
    gap = float((got.detach().double().cpu() - expected.detach().double().cpu()).abs().max())
    assert gap <= limit, f"{what}: largest difference {gap:.3g}, at most {limit:.3g} expected"


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, which would hide errors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


Check = Callable[[str], None]
CHECKS: dict[str, Check] = {
    **{f"packed-{family}": partial(check_packed_equals_separate, family) for family in FAMILIES},
    **{f"bfloat16-{family}": partial(check_packed_in_bfloat16, family) for family in FAMILIES},
    **{f"attribution-{family}": partial(check_attribution, family) for family in ("llama", "mistral-window")},
    "losses": check_losses,
    "job": check_job,
    "no-waits": check_no_waits,
    "compile": check_compile,
}
"""By name. Compiling comes last: it takes longest."""
SLOW_ON_CPUS = {"compile"}
"""Half a minute: by hand with `python -m tests.gpu --device cpu --only compile`."""

"""LoRA and QLoRA: what is trained, what is saved, and what stands in for the reference."""

import copy
import importlib.util
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from train.config import LoraSection, ModelConfig
from train.data.dataset import PairDataset, open_weights, sample_pairs
from train.job.job import run_job
from train.job.progress import ProgressLines
from train.job.stopping import StopRequest, catch_signals
from train.job.trainer import PairTrainer
from train.model.policy import add_adapters, load_policy, save_policy
from weights_store.errors import InputError, MismatchError, MissingExtraError, SettingsError
from weights_store.settings import parse_settings

LORA = {"rank": 4, "alpha": 8.0}
QUICK = {"learning_rate": 1e-2, "warmup_share": 0.0, "max_steps": 3}


@pytest.fixture(scope="module")
def float32_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with float32 in its config and its files, so that saving rounds nothing."""
    folder = tmp_path_factory.mktemp("float32-model")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def make_trainer(make_config, float32_folder, tmp_path) -> Callable[..., PairTrainer]:
    """Return a function that builds a trainer of adapters on the tiny model."""

    def make(**changes: dict[str, Any]) -> PairTrainer:
        config = make_config(**{"lora": LORA, "optim": QUICK, "model": {"path": str(float32_folder)}, **changes})
        pairs = PairDataset(open_weights(config.data), config.data, vocab_size=128)
        torch.manual_seed(0)
        policy = load_policy(float32_folder, config.model, config.lora)
        return PairTrainer(policy, pairs, config, checkpoints=tmp_path / "checkpoints")

    return make


def logps_of(model: torch.nn.Module, row: dict[str, Any], side: str = "chosen") -> torch.Tensor:
    """Log-probs over the vocabulary at every response token, `[T, V]` float64, one sequence alone."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return logps[len(row["prompt_ids"]) - 1 : -1]


def test_only_adapters_are_trained_and_they_begin_as_nothing(make_trainer, rows, full_logps) -> None:
    trainer = make_trainer()
    pairs = sample_pairs(trainer.train_dataset.pairs, 40)
    gaps = [(policy - stored).abs().max() for policy, stored in trainer.response_logps(pairs, "float32")]
    assert max(gaps) < 2e-3  # the stored reference has 12 bits of mantissa
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in before if "lora_" in name}
    assert len(trainable) == 2 * 2 * 7  # A and B, of two layers, of seven linear maps each; the output layer has none

    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name
        assert name in trainable or parameter.grad is None


def test_the_merged_model_and_the_adapter_on_its_base_are_the_trained_one(
    make_trainer, rows, model, float32_folder, tmp_path
) -> None:
    trainer = make_trainer()
    trainer.train()
    pairs = sample_pairs(trainer.train_dataset.pairs, 40)
    by_id = {row["pair_id"]: row for row in rows}
    batch = trainer.collator(pairs)
    with torch.no_grad():
        logps = trainer.model(**{k: batch[k] for k in ("input_ids", "position_ids", "places", "scored", "layout")})
    live = [logps.logps[i][batch["completion_mask"][i]] for i in range(len(pairs))]

    save_policy(trainer.model, trainer.config.lora, float32_folder, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(float32_folder)
    on_base = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert merged.dtype == torch.float32
    assert not (tmp_path / "adapter" / "README.md").exists()
    moved = 0.0
    for pair, expected in zip(pairs, live, strict=True):
        row = by_id[pair.pair_id]
        ids = torch.tensor(row["chosen_ids"])[:, None]
        for saved in (merged, on_base):
            got = logps_of(saved, row).gather(-1, ids)[:, 0]
            torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-4)
        moved = max(moved, (logps_of(model, row).gather(-1, ids)[:, 0] - expected).abs().max().item())
    assert moved > 0.1


def test_a_frozen_base_is_as_precise_as_its_files_and_what_is_trained_is_float32(model_folder, float32_folder) -> None:
    def dtypes(folder: Path, *, one_dtype: bool = False, **settings: str) -> dict[bool, set[torch.dtype]]:
        config = ModelConfig(path=str(folder), **settings)
        model = load_policy(folder, config, LoraSection(**LORA), one_dtype=one_dtype).model
        found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
        for parameter in model.parameters():
            found[parameter.requires_grad].add(parameter.dtype)
        assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "inv_freq" in name)
        return found

    wide = {True: {torch.float32}, False: {torch.float32}}
    assert dtypes(model_folder, dtype="bfloat16") == {True: {torch.float32}, False: {torch.bfloat16}}
    assert dtypes(model_folder, dtype="float32") == wide
    assert dtypes(float32_folder, dtype="bfloat16") == wide
    assert dtypes(model_folder, dtype="bfloat16", one_dtype=True) == wide  # FSDP2 shards parameters of one dtype


def test_in_float32_a_base_in_half_precision_is_computed_without_rounding(
    make_config, model_folder, rows, full_logps, tmp_path
) -> None:
    """The step-0 gate asks that, to tell a wrong dtype from a wrong model."""
    config = make_config(lora=LORA, model={"dtype": "bfloat16"})
    pairs = PairDataset(open_weights(config.data), config.data, vocab_size=128)
    policy = load_policy(model_folder, config.model, config.lora)
    trainer = PairTrainer(policy, pairs, config, checkpoints=tmp_path / "checkpoints")
    sample = [pairs[row] for row in range(6)]
    gaps = {
        dtype: torch.cat([(logps - stored).abs() for logps, stored in trainer.response_logps(sample, dtype)]).mean()
        for dtype in ("float32", "bfloat16")
    }
    assert gaps["float32"] < 5e-4 < gaps["bfloat16"]  # the stored ones have 12 bits
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_what_is_merged_into_a_half_precision_base_is_rounded_once(make_config, model_folder, tmp_path) -> None:
    config = make_config(lora=LORA, optim=QUICK, model={"dtype": "bfloat16"}, gate={"pairs": 0})
    run_job(config)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    moved = 0
    for (name, got), expected, before in zip(
        saved.named_parameters(), exact.parameters(), plain.parameters(), strict=True
    ):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected.bfloat16()), name
        moved += not torch.equal(got, before)
    assert moved == 2 * 7


def test_an_adapter_alone_is_a_finished_job(make_config, caplog) -> None:
    config = make_config(lora={**LORA, "merge": False}, optim=QUICK)
    folder = run_job(config).folder
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter",
        "lineage.json",
        "metrics.json",
        "train.json",
    }
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert run_job(config).was_trained_before
    assert "already trained" in caplog.text
    with pytest.raises(SettingsError, match=r"holds another training job: lora.merge: false -> true"):
        run_job(make_config(lora=LORA, optim=QUICK))


def test_a_merged_job_leaves_the_model_and_its_adapter(make_config, model_folder) -> None:
    folder = run_job(make_config(lora=LORA, optim=QUICK)).folder
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert merged.dtype == torch.bfloat16
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert (folder / "adapter" / "adapter_config.json").is_file()


def test_an_adapter_names_the_hub_id_and_not_the_folder_of_the_cache(model_folder, tmp_path) -> None:
    lora = LoraSection(rank=2, merge=False)
    model = load_policy(model_folder, ModelConfig(path="someone/some-model"), lora).model
    save_policy(model, lora, model_folder, tmp_path, base_name="someone/some-model")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/some-model"


@pytest.mark.parametrize("names", [["no_such_layer"], ["q_proj", "no_such_layer"]])
def test_layers_that_do_not_exist_are_refused_by_name(model_folder, names) -> None:
    with pytest.raises(
        InputError, match=r"names no_such_layer, which LlamaForCausalLM does not have; it has down_proj,"
    ):
        load_policy(model_folder, ModelConfig(path=str(model_folder)), LoraSection(target_modules=names))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_layer_that_input_and_output_share_is_refused(model_folder, name) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.config.tie_word_embeddings = True
    with pytest.raises(InputError, match=f"target_modules names {name}, which this model shares; leave them out"):
        add_adapters(model, LoraSection(target_modules=["q_proj", name]))
    model.config.tie_word_embeddings = False
    add_adapters(model, LoraSection(target_modules=["q_proj", name]))


def test_a_stopped_run_of_adapters_goes_on_as_if_nothing_had_happened(make_config, monkeypatch, tmp_path) -> None:
    def history_of(folder: Path) -> list[dict[str, float]]:
        logs = json.loads((folder / "metrics.json").read_text())["history"]
        return [{k: v for k, v in log.items() if k != "data_wait_s"} for log in logs if "loss" in log]

    optim = {**QUICK, "max_steps": 5}
    run_job(make_config(lora=LORA, optim=optim, output={"folder": str(tmp_path / "undisturbed")}))
    ordinary = ProgressLines.on_step_end

    def stop_at_step_3(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return ordinary(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressLines, "on_step_end", stop_at_step_3)
    stop = StopRequest()
    with catch_signals(stop), pytest.raises(KeyboardInterrupt):
        run_job(make_config(lora=LORA, optim=optim), stop=stop)
    monkeypatch.undo()
    folder = run_job(make_config(lora=LORA, optim=optim)).folder
    assert history_of(folder) == history_of(tmp_path / "undisturbed")


def test_without_adapters_the_policy_is_the_reference_of_an_exact_kl(make_trainer, rows, model, tmp_path) -> None:
    trainer = make_trainer(loss={"name": "tis_dpo", "kl": "exact"})
    pairs = sample_pairs(trainer.train_dataset.pairs, 40)
    before = trainer.measure(pairs)
    assert before["kl_policy_ref/chosen"] == before["kl_policy_ref/rejected"] == 0.0

    trainer.train()
    after = trainer.measure(pairs)
    trainer.model.save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    for side in ("chosen", "rejected"):
        by_hand = 0.0
        for row in rows:
            ours, theirs = logps_of(policy, row, side), logps_of(model, row, side)
            by_hand += (ours.exp() * (ours - theirs)).sum().item()
        assert by_hand / len(rows) > 0.05
        assert after[f"kl_policy_ref/{side}"] == pytest.approx(by_hand / len(rows), rel=1e-4)


def test_four_bits_without_the_package_say_what_to_install(model_folder, monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "train.model.policy.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    with pytest.raises(
        MissingExtraError, match="model.quantization='nf4' needs bitsandbytes; pip install bitsandbytes"
    ):
        load_policy(model_folder, ModelConfig(path=str(model_folder), quantization="nf4"), LoraSection())
    for package in ("peft", "jinja2"):
        monkeypatch.setattr(
            "train.model.policy.find_spec", lambda name, package=package: None if name == package else 1
        )
        with pytest.raises(MissingExtraError, match=rf"\[lora\] needs {package}; pip install 'tokenweights\[train\]'"):
            load_policy(model_folder, ModelConfig(path=str(model_folder)), LoraSection())


def test_four_bits_without_adapters_and_merging_into_them_are_refused(settings) -> None:
    from train.config import TrainConfig

    settings["model"]["quantization"] = "nf4"
    with pytest.raises(SettingsError, match=r"model.quantization freezes the model's weights; add a \[lora\] section"):
        parse_settings(TrainConfig, settings, where="here")
    with pytest.raises(SettingsError, match="an adapter cannot be merged into 4-bit weights; set lora.merge=false"):
        parse_settings(TrainConfig, {**settings, "lora": {}}, where="here")


@pytest.mark.filterwarnings("ignore:_check_is_size will be removed")
def test_four_bits_train_with_the_gradients_of_the_weights_they_stand_for(make_config, float32_folder) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    config = ModelConfig(path=str(float32_folder), packing=False)
    quantized = load_policy(
        float32_folder, config.model_copy(update={"quantization": "nf4"}), LoraSection(rank=4)
    ).model
    plain = load_policy(float32_folder, config, LoraSection(rank=4)).model
    plain.load_state_dict(  # the same adapters, on the weights that the four bits stand for
        {
            name: functional.dequantize_4bit(value.data, value.quant_state).float()
            if hasattr(value, "quant_state")
            else value
            for name, value in quantized.named_parameters()
        }
    )
    ids = torch.arange(1, 60)[None]
    quantized.eval()
    with torch.no_grad():
        quantized(input_ids=ids)  # some CPUs would pack the weights for inference here, for good
    gradients = []
    for model in (quantized, plain):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in (name for name in gradients[0] if "lora_B" in name):
        ours, theirs = gradients[0][name].flatten(), gradients[1][name].flatten()
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99, name

    with pytest.raises(
        MismatchError, match=r"model.quantization rounds the weights, so that training starts from another"
    ):
        run_job(make_config(model={"path": str(float32_folder), "quantization": "nf4"}, lora={"merge": False}))
    run_job(
        make_config(
            model={"path": str(float32_folder), "quantization": "nf4"},
            lora={"merge": False},
            gate={"tolerance_nats": 1.0},
            optim=QUICK,
        )
    )

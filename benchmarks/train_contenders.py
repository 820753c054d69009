"""The contenders of `make bench-train`, and what is recorded of a run. Each runs in a process of its own."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.train_inputs import MAX_SIDE, VOCABULARIES

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

    from train.data.dataset import Pair
    from train.job.trainer import PairTrainer


@dataclass(frozen=True)
class Job:
    """One run of one contender, as it is handed to its process."""

    contender: str
    model: str
    store: str
    device: str
    num_steps: int
    warm_up: int = 0
    seed: int = 0
    pairs_per_step: int = 8
    pairs_at_once: int = 8
    dtype: str = "bfloat16"
    learning_rate: float = 1e-6
    trl_settings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of our config, by section, on top of what the benchmark sets."""
    random: bool = False
    """The folder has a config alone, and the model gets random weights where it is trained: too large to write."""

    @property
    def out(self) -> str:
        """Folder for whatever a trainer wants to write."""
        return str(Path(self.store).parent / "runs")


def pairs_of(job: Job) -> "list[Pair]":
    """Return the pairs of the whole run, in the order in which our trainer takes them."""
    from train.data.dataset import PairDataset, open_weights
    from train.data.sampler import BlockShuffle

    data = _data(job)
    pairs = PairDataset(open_weights(data), data, vocab_size=max(VOCABULARIES.values()))
    rows = BlockShuffle(pairs.group_sizes, seed=job.seed).rows(range(job.num_steps * job.pairs_per_step))
    return [pairs[row] for row in rows]


def _data(job: Job) -> Any:
    from train.config import DataConfig

    return DataConfig(store=job.store, weights="bench/tis")


# --- what is recorded -----------------------------------------------------------------------------------------------


class Recorder:
    """Duration, waiting time and loss of every step, and memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.step_s: list[float] = []
        self.wait_s: list[float] = []
        self.losses: list[float] = []
        self._waited = 0.0
        self._loss: Any = 0.0

    def begin(self) -> None:
        """Everything is loaded, the first step comes next."""
        self.before_mb = memory_mb(self.device, restart_peak=True)
        self._last = time.perf_counter()

    def wait(self, get: Callable[..., Any]) -> Callable[..., Any]:
        """Return `get` with its time counted as waiting for data."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = get(*args, **kwargs)
            self._waited += time.perf_counter() - started
            return result

        return timed

    def add_loss(self, loss: "torch.Tensor") -> None:
        """Add a micro-batch's share in the mean loss of its step."""
        self._loss = self._loss + loss.detach()

    def end_step(self) -> None:
        self.losses.append(float(self._loss))  # on a GPU this waits for the step's kernels, as a logged loss would
        now = time.perf_counter()
        self.step_s.append(now - self._last)
        self.wait_s.append(self._waited)
        self._last, self._waited, self._loss = now, 0.0, 0.0

    def end(self) -> None:
        self.peak_mb = memory_mb(self.device)

    def watch(self, trainer: "Trainer") -> None:
        """Record the training of a transformers Trainer."""
        from transformers import TrainerCallback

        recorder = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                recorder.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                recorder.end_step()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                recorder.end()

        training_step = trainer.training_step

        def add_loss(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self.add_loss(loss)
            return loss

        trainer.training_step = add_loss
        trainer.get_batch_samples = self.wait(trainer.get_batch_samples)
        trainer.add_callback(Callback())


def memory_mb(device: str, *, restart_peak: bool = False) -> float:
    """Return the peak since the last restart, or with `restart_peak` what is in use now, MB."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        if restart_peak:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.memory_allocated() if restart_peak else torch.cuda.max_memory_allocated()) / 1e6
    if restart_peak:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed while loading would hide as much of the first step
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS" if restart_peak else "VmHWM"].split()[0]) * 1024 / 1e6


# --- the contenders -------------------------------------------------------------------------------------------------


def run_ours(job: Job, recorder: Recorder, loss: str = "tis_dpo") -> None:
    """Our trainer as `tokenweights train` makes it, without the measuring before and after."""
    trainer = make_trainer(job, loss)
    recorder.watch(trainer)
    trainer.train()


def make_trainer(job: Job, loss: str = "tis_dpo") -> "PairTrainer":
    """Return our trainer over the pairs of a job."""
    from train.config import TrainConfig
    from train.data.dataset import PairDataset, open_weights
    from train.job.trainer import PairTrainer
    from train.model.policy import compile_layers, load_policy

    optim = {
        "learning_rate": job.learning_rate,
        "max_steps": job.num_steps,
        "pairs_per_step": job.pairs_per_step,
        "tokens_per_batch": 3 * MAX_SIDE * job.pairs_at_once,  # holds at least so many pairs
        "seed": job.seed,
    }
    sections: dict[str, Any] = {
        "data": _data(job),
        "model": {"path": job.model, "dtype": job.dtype},
        "loss": {"name": loss, "beta": 0.1},
        "optim": optim,
        "output": {"folder": job.out, "log_every_steps": 1_000_000},
    }
    changed = {name: {**sections[name], **changes} for name, changes in job.settings.items()}
    config = TrainConfig.model_validate({**sections, **changed})
    policy = _random_policy(job) if job.random else load_policy(Path(job.model), config.model)
    assert policy.not_packed is None or not config.model.packing, policy.not_packed
    pairs = PairDataset(open_weights(config.data), config.data, vocab_size=max(VOCABULARIES.values()))
    trainer = PairTrainer(policy, pairs, config, checkpoints=Path(job.out))
    if config.model.compile:
        compile_layers(policy.model)
    return trainer


def _random_policy(job: Job) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.model import policy
    from train.model.attention.packed import PACKED

    config = AutoConfig.from_pretrained(job.model, trust_remote_code=False)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(PACKED)
    if job.dtype == "bfloat16":
        policy.enter_bfloat16(model)
    policy.switch_off_noise(model)
    return policy.Policy(model)


def _trl_arguments(job: Job, **settings: Any) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=job.out,
        max_steps=job.num_steps,
        per_device_train_batch_size=job.pairs_at_once,
        gradient_accumulation_steps=job.pairs_per_step // job.pairs_at_once,
        learning_rate=job.learning_rate,
        warmup_steps=0.1,  # below 1 it is a share, as in our config
        beta=0.1,
        bf16=job.dtype == "bfloat16",
        gradient_checkpointing=False,
        max_length=None,  # the pairs keep to their limits
        seed=job.seed,
        use_cpu=job.device == "cpu",
        logging_steps=1_000_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**settings, **job.trl_settings},
    )


def run_trl(job: Job, recorder: Recorder, *, precompute: bool = False) -> None:
    """TRL's trainer on given ids instead of text, one pair after the other as they come."""
    from datasets import Dataset
    from trl import DPOTrainer

    class GivenIdsTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {
            "prompt_ids": pair.prompt_ids.tolist(),
            "chosen_ids": pair.chosen.ids.tolist(),
            "rejected_ids": pair.rejected.ids.tolist(),
        }
        for pair in pairs_of(job)
    ]
    arguments = _trl_arguments(job, precompute_ref_log_probs=precompute, train_sampling_strategy="sequential")
    trainer = GivenIdsTrainer(job.model, args=arguments, train_dataset=Dataset.from_list(rows))
    recorder.watch(trainer)
    trainer.train()


def run_trl_on_stored(job: Job, recorder: Recorder) -> None:
    """TRL's DPO through our adapter: it reads the stored reference log-probs, as our own trainer does."""
    from train.trl_adapter import WeightedDPOTrainer

    trainer = WeightedDPOTrainer(job.model, _trl_arguments(job), _data(job), loss="dpo")
    recorder.watch(trainer)
    trainer.train()


def run_official(job: Job, recorder: Recorder) -> None:
    """The release's training loop: see `official_loss`, and methods.md 1.8 and 1.9 for its settings."""
    import torch
    from transformers import AutoModelForCausalLM

    half = torch.float16 if job.device == "cuda" else torch.bfloat16  # the release's float16 has no fast CPU kernels
    policy = (
        AutoModelForCausalLM.from_pretrained(job.model, trust_remote_code=False, dtype=torch.float32)
        .to(job.device)
        .train()
    )
    reference = (
        AutoModelForCausalLM.from_pretrained(job.model, trust_remote_code=False, dtype=half).to(job.device).eval()
    )
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=job.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 151))
    pairs, collate = pairs_of(job), recorder.wait(official_batch)
    recorder.begin()
    for step in range(0, len(pairs), job.pairs_per_step):
        for begin in range(step, step + job.pairs_per_step, job.pairs_at_once):
            batch = {name: t.to(job.device) for name, t in collate(pairs[begin : begin + job.pairs_at_once]).items()}
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
            with torch.autocast(job.device, torch.bfloat16):
                policy_logits = policy(**inputs).logits.float()
            with torch.no_grad():
                reference_logits = reference(**inputs).logits.float()
            loss = official_loss(policy_logits, reference_logits, batch["labels"], batch["token_weights"])
            loss = loss * job.pairs_at_once / job.pairs_per_step
            loss.backward()
            recorder.add_loss(loss)
            del policy_logits, reference_logits, loss
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recorder.end_step()
    recorder.end()


def official_batch(pairs: "list[Pair]") -> "dict[str, torch.Tensor]":
    """Pad all chosen and, behind them, all rejected sequences to one length, `[2B, T]`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def pad(rows: list[list[Any]], value: float) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    sides = [(pair.prompt_ids.tolist(), pair.chosen) for pair in pairs]
    sides += [(pair.prompt_ids.tolist(), pair.rejected) for pair in pairs]
    return {
        "input_ids": pad([prompt + side.ids.tolist() for prompt, side in sides], 0),
        "attention_mask": pad([[1] * (len(prompt) + len(side.ids)) for prompt, side in sides], 0),
        "labels": pad([[-100] * len(prompt) + side.ids.tolist() for prompt, side in sides], -100),
        "token_weights": pad([[0.0] * len(prompt) + side.token_weights.tolist() for prompt, side in sides], 0.0),
    }


def official_loss(
    policy_logits: "torch.Tensor",
    reference_logits: "torch.Tensor",
    labels: "torch.Tensor",
    token_weights: "torch.Tensor",
    beta: float = 0.1,
) -> "torch.Tensor":
    """Mean TIS-DPO loss with `token_level=false`; logits `[2B, T, V]` float32, the rest `[2B, T]`.

    As released: log(softmax), and the weighted KL(pi || ref) is computed with its graph at every step and only logged.
    """
    import torch.nn.functional as F

    labels, weights = labels[:, 1:].clone(), token_weights[:, 1:]
    mask = labels != -100
    labels[~mask] = 0
    policy_ps = policy_logits[:, :-1].softmax(-1)
    policy_logps = policy_ps.log()
    reference_logps = reference_logits[:, :-1].softmax(-1).log()
    position_kl = (policy_ps * (policy_logps - reference_logps)).sum(-1)
    token_policy = policy_logps.gather(2, labels[:, :, None]).squeeze(2)
    token_reference = reference_logps.gather(2, labels[:, :, None]).squeeze(2)
    chosen, rejected = ((token_policy - token_reference) * weights * mask).sum(-1).chunk(2)
    logged = [(position_kl * weights * mask).sum(-1), (token_policy * mask).sum(-1), chosen, rejected]
    losses = -F.logsigmoid(beta * (chosen - rejected))
    for values in logged:
        values.detach().cpu().numpy()  # metrics
    return losses.mean()


CONTENDERS: dict[str, Callable[[Job, Recorder], None]] = {
    "ours": run_ours,
    "trl": run_trl,
    "trl_precomputed": lambda job, recorder: run_trl(job, recorder, precompute=True),
    "official": run_official,
    "ours_dpo": lambda job, recorder: run_ours(job, recorder, loss="dpo"),
    "trl_on_stored": run_trl_on_stored,
}


def measure(job: Job) -> dict[str, Any]:
    """Run one contender in this process."""
    recorder = Recorder(job.device)
    CONTENDERS[job.contender](job, recorder)
    return {
        "step_s": recorder.step_s[job.warm_up :],
        "wait_s": recorder.wait_s[job.warm_up :],
        "losses": recorder.losses,
        "before_mb": recorder.before_mb,
        "peak_mb": recorder.peak_mb,
        **_needed(job),
    }


def _needed(job: Job) -> dict[str, list[float]]:
    """Return tokens and floating-point operations that each measured step cannot do without: every prompt once.

    Forward and backward (three times forward) of two operations per parameter and token, of attention (causal), and of the
    head on response tokens only.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.model, trust_remote_code=False)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # q and o; k and v, which have fewer heads; the MLP
    kv_share = config.num_key_value_heads / config.num_attention_heads
    layer_parameters = (2 + 2 * kv_share) * hidden * hidden + 3 * hidden * inner
    tokens: list[float] = []
    tflop: list[float] = []
    for step in _steps(job):
        num, operations = 0, 0.0
        for pair in step:
            prompt, sides = len(pair.prompt_ids), [len(pair.chosen.ids), len(pair.rejected.ids)]
            seen = prompt**2 / 2 + sum(side * (prompt + side / 2) for side in sides)
            num += prompt + sum(sides)
            operations += layers * (2 * layer_parameters * (prompt + sum(sides)) + 4 * hidden * seen)
            operations += 2 * hidden * config.vocab_size * sum(sides)
        tokens.append(num)
        tflop.append(3 * operations / 1e12)
    return {"num_tokens": tokens, "needed_tflop": tflop}


def _steps(job: Job) -> "list[list[Pair]]":
    pairs = pairs_of(job)[job.warm_up * job.pairs_per_step :]
    return [pairs[begin : begin + job.pairs_per_step] for begin in range(0, len(pairs), job.pairs_per_step)]

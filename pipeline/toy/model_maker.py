"""Make a small chat model from text: train a tokenizer, then pre-train a random Llama for a few hundred steps.

The demo and the benchmarks call it, because they must run without a download. The folder loads with `AutoTokenizer` and
`AutoModelForCausalLM` and in vLLM (CPU and GPU): head size 32 or 64, a vocabulary that is a multiple of 64, safetensors,
float32. It trains on the CPU.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weights_store.errors import InputError
from weights_store.messages import logger

_log = logger(__name__)

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant")
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"  # ids 0, 1, 2
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)  # ids 3, 4, 5

# The template trims nothing and adds no space or line break, and a special token stands on both sides of a response. So a
# response has the same tokens alone and after its prompt.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role ' + message['role'] + '; expected system, user or assistant') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

MAX_POSITIONS = 2048


# More parameters than the house rule allows: all but the first two are sizes, with defaults for the toy language.
def make_chat_model(
    conversations: Iterable[Sequence[Message]],
    folder: str | Path,
    *,
    hidden_size: int = 128,
    num_layers: int = 2,
    vocab_size: int = 1024,
    steps: int = 500,
    block_tokens: int = 256,
    batch_tokens: int = 1024,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Train a tokenizer and a small Llama on `conversations` and save both in `folder`.

    The result depends only on the text, the sizes, the seed and the number of threads. The folder appears
    complete or not at all. The caller's random state stays unchanged.

    Args:
        conversations: Lists of messages with a `role` (system, user or assistant) and a `content`.
        folder: Must not exist yet.
        hidden_size: A multiple of 32. Heads have 64 dimensions if it is a multiple of 64 and at least 256, else 32.
        num_layers: At least 1.
        vocab_size: Upper bound, at least 320. The tokenizer has fewer tokens if the text has no more pairs to merge. The
            model's vocabulary is the tokenizer's, rounded up to a multiple of 64.
        steps: Optimizer steps, at least 1.
        block_tokens: Length of a training row, 2 to 2048. A row holds several conversations, which do not see each other.
            A longer conversation continues in the next row.
        batch_tokens: Tokens per step, at least `block_tokens`.
        learning_rate: Peak of a cosine with linear warm-up.
        seed: For the initial parameters and the order of the rows.

    Returns:
        Mean training loss over the last tenth of the steps, nats per token.

    Raises:
        InputError: `folder` exists, a size is out of range, there are no conversations, or one is malformed.
    """
    folder = Path(folder)
    requirements = {
        f"hidden_size must be a multiple of 32, got {hidden_size}": hidden_size > 0 and hidden_size % 32 == 0,
        f"num_layers must be at least 1, got {num_layers}": num_layers >= 1,
        f"vocab_size must be at least 320 (256 bytes, special tokens, merges), got {vocab_size}": vocab_size >= 320,
        f"steps must be at least 1, got {steps}": steps >= 1,
        f"block_tokens must be 2 to {MAX_POSITIONS}, got {block_tokens}": 2 <= block_tokens <= MAX_POSITIONS,
        f"batch_tokens ({batch_tokens}) must be at least block_tokens ({block_tokens})": batch_tokens >= block_tokens,
    }
    for requirement, is_met in requirements.items():
        if not is_met:
            raise InputError(requirement)
    _check_absent(folder)
    checked = _check_conversations(conversations)

    tokenizer = _train_tokenizer(checked, vocab_size)
    rows = [tokenizer.apply_chat_template(conversation, return_dict=False) for conversation in checked]
    _log.info(f"tokenizer: {len(tokenizer)} tokens; text: {len(rows)} conversations, {sum(map(len, rows))} tokens")

    model = _build_model(tokenizer, hidden_size, num_layers, seed)
    batches = _batches(*pack_rows(rows, block_tokens), max(1, batch_tokens // block_tokens), seed)
    losses = _pretrain(model, batches, steps, learning_rate)
    _save(model, tokenizer, folder)
    _log.info(f"model: {model.num_parameters()} parameters in {folder}")
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _check_absent(folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{folder} exists already; use its model, remove it, or give another folder")


def _check_conversations(conversations: Iterable[Sequence[Message]]) -> list[list[dict[str, str]]]:
    checked = []
    for number, conversation in enumerate(conversations):
        if not conversation:
            raise InputError(f"conversation {number} has no messages; remove it")
        for message in conversation:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise InputError(
                    f"conversation {number}: expected a role ({', '.join(ROLES)}) and a text as content, "
                    f"got {dict(message)!r}"
                )
        checked.append([dict(message) for message in conversation])
    if not checked:
        raise InputError("no conversations to train on; give at least one")
    return checked


def _train_tokenizer(conversations: list[list[dict[str, str]]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer. Only its chat template adds special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((message["content"] for message in chain(*conversations)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens=list(ROLE_TOKENS),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int) -> LlamaForCausalLM:
    head_dim = 64 if hidden_size >= 256 and hidden_size % 64 == 0 else 32
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // head_dim,
        num_key_value_heads=hidden_size // head_dim,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=hidden_size**-0.5,  # 0.02, the library's default, is too small for few dimensions
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def pack_rows(rows: Iterable[Sequence[int]], block_tokens: int) -> tuple[Tensor, Tensor]:
    """Return token ids and positions, both `[N, block_tokens]`; positions start at 0 with every piece.

    Rows are filled in order. The rest of a row is padding, with id 0 and position 0.
    """
    blocks: list[list[tuple[int, int]]] = [[]]
    for row in rows:
        for start in range(0, len(row), block_tokens):
            piece = row[start : start + block_tokens]
            if len(blocks[-1]) + len(piece) > block_tokens:
                blocks.append([])
            blocks[-1] += zip(piece, range(len(piece)), strict=True)
    ids, positions = torch.tensor([block + [(0, 0)] * (block_tokens - len(block)) for block in blocks]).unbind(2)
    return ids, positions


def _batches(ids: Tensor, positions: Tensor, batch_rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches `[batch_rows, block_tokens]` of ids and positions without end, in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch_rows:
            waiting = torch.cat([waiting, torch.randperm(len(ids), generator=generator)])
        picked, waiting = waiting[:batch_rows], waiting[batch_rows:]
        yield ids[picked], positions[picked]


def _pretrain(
    model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], steps: int, learning_rate: float
) -> list[float]:
    """Train in place and return the loss of every step, nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    losses: list[float] = []
    model.train()
    for step, (ids, positions) in zip(range(1, steps + 1), batches, strict=False):
        # The first token of a piece and padding are not predicted. Both are at position 0; the loss skips label -100.
        labels = ids.masked_fill(positions == 0, -100)
        # Without an attention mask, transformers finds the start of each conversation from the positions.
        loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            _log.info(f"step {step}/{steps}: loss {losses[-1]:.3f} nats per token")
    model.eval()
    return losses


def learning_rate_share(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up for 5 % of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write next to `folder` and rename, so that no reader sees half a model."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _check_absent(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

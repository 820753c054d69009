"""Attributes the responses of pairs by gradients, a micro-batch at a time.

Gradients, packed layout and attention are the trainer's (`train/model/attribution.py`), so that stored attributions and those
of a training come from one code. Each response behind its prompt is computed once, in however many pairs of a chunk it stands.
Two responses of one prompt share it in one packed sequence, unless attributions of the prompt are wanted too: each response
has its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from pipeline.workers.commit import commit_metadata
from pipeline.workers.context_basis import SAMPLE_PAIRS, ContextBasis, fit_basis
from pipeline.workers.missing import first_pairs
from pipeline.workers.pair_row import PairRow, QuarantineRow, why_not
from pipeline.workers.request import AttributionOptions, Request, Target, Worker
from train.data.dataset import Pair, StoredResponse
from train.model.attribution import TokenAttributions, attribute_tokens, input_embeddings, states_before
from train.model.checkpoint import in_float32, load_checkpoint
from train.model.collate import Batch, PairCollator
from train.model.elementwise import use_kernels
from train.model.foreign import is_out_of_memory
from train.model.logps import check_output_layer
from train.model.packing import confirm_layout, enable_packing
from train.model.token_budget import cut_by_tokens
from weights_store import WeightStore
from weights_store.errors import ConflictError, InputError, OutOfMemoryError
from weights_store.messages import first_line, logger
from weights_store.schemas import ATTRIBUTIONS, SIDES

_log = logger(__name__)

_BATCH_TOKENS = 4096

Ids = tuple[int, ...]
PromptedResponse = tuple[Ids, Ids]
"""Ids of a prompt and of a response behind it."""


@dataclass(frozen=True)
class Attributed:
    """What is stored of one response, float32: `[T]` each, and a number of its prompt."""

    attributions: np.ndarray
    prompt_attribution: float | None
    activations: np.ndarray | None
    contexts: np.ndarray | None
    """d numbers per token, `[T * d]`."""

    @property
    def is_finite(self) -> bool:
        """Whether the model's gradients are."""
        parts = (self.attributions, self.prompt_attribution, self.activations, self.contexts)
        return all(np.isfinite(part).all() for part in parts if part is not None)


class PairAttributor(Worker):
    """The request's model: pairs in, rows of an attributions table out.

    Raises:
        InputError: The model cannot be loaded, or its family computes logits or embeddings in a way that we do not know.
        OutOfMemoryError: There is not enough memory for it.
    """

    def __init__(self, request: Request) -> None:
        assert isinstance(request.options, AttributionOptions)
        _log.info(f"loading {request.model} for gradients")
        self._engine, self._restarts, self._options = request.engine, request.restarts, request.options
        self._batch_tokens = request.engine.step_tokens(_BATCH_TOKENS)
        with _reporting_memory():
            self._model = load_model(Path(request.model), request.engine.dtype)
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._not_packed = _choose_layout(self._model, self._device)
        if self._not_packed is not None:
            _log.info(f"responses are padded, each with its prompt: {self._not_packed}")
        # Alone, a response has its own copy of the prompt; packed in twos, the prompt is computed once.
        self._num_together = 1 if self._options.prompts or self._not_packed is not None else 2
        config = self._model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        self._max_tokens = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self._basis = self._find_basis(request) if self._options.contexts else None

    @property
    def record(self) -> dict[str, object]:
        """How it runs, for the lineage; only the dtype changes numbers."""
        return {
            "restarts": self._restarts,
            "dtype": self._engine.dtype,
            "batch_tokens": self._batch_tokens,
            "packed": self._not_packed is None,
            "device": self._device.type,
        }

    def fill_in(
        self,
        pairs: Sequence[PairRow],
        target: Target,  # noqa: ARG002 - there is one
        progress: Callable[[float], None] = lambda share: None,
    ) -> tuple[pa.Table, list[QuarantineRow]]:
        """Return the attributions of the pairs that have them, and a quarantine row for each other.

        Raises:
            OutOfMemoryError: A smaller token budget may fit.
        """
        problems = {pair.pair_id: self._why_not(pair) for pair in pairs}
        good = [pair for pair in pairs if problems[pair.pair_id] is None]
        attributed = self._attribute([sequence for pair in good for sequence in _sequences(pair)], progress)
        filled = []
        for pair in good:
            results = dict(zip(SIDES, (attributed[sequence] for sequence in _sequences(pair)), strict=True))
            refused = [side for side, result in results.items() if not result.is_finite]
            if refused:
                problems[pair.pair_id] = f"{' and '.join(refused)}: gradients are not finite in {self._engine.dtype}"
            else:
                row: dict[str, object] = {"pair_id": pair.pair_id}
                for side, result in results.items():
                    row[f"{side}_attributions"] = result.attributions
                    row[f"{side}_prompt_attribution"] = result.prompt_attribution
                    row[f"{side}_activations"] = result.activations
                    row[f"{side}_contexts"] = result.contexts
                filled.append(row)
        unscorable = [pair.unscorable(problem) for pair in pairs if (problem := problems[pair.pair_id]) is not None]
        return pa.Table.from_pylist(filled, ATTRIBUTIONS), unscorable

    def _attribute(
        self, sequences: Sequence[PromptedResponse], progress: Callable[[float], None]
    ) -> dict[PromptedResponse, Attributed]:
        """Attribute each distinct sequence once; one whose result is not finite once more, alone."""
        none, options = np.zeros(0, np.float32), self._options  # for the side of an unpaired row without a response
        nothing = Attributed(
            none,
            0.0 if options.prompts else None,
            none if options.activations else None,
            none if options.contexts else None,
        )
        attributed = dict.fromkeys((sequence for sequence in sequences if not sequence[1]), nothing)
        for groups, share in self._batches(sequences):
            attributed |= self._attribute_batch(groups)
            progress(share)
        # In a packed row 0 * NaN is NaN: one sequence may have spoilt others.
        for alone in [[sequence] for sequence, result in attributed.items() if not result.is_finite]:
            attributed |= self._attribute_batch([alone])
        return attributed

    def _batches(self, sequences: Sequence[PromptedResponse]) -> Iterator[tuple[list[list[PromptedResponse]], float]]:
        """Yield micro-batches of distinct sequences, grouped by prompt, and the share of the work that is done after each."""
        of_prompt: dict[Ids, list[PromptedResponse]] = {}
        for prompt, response in dict.fromkeys(sequence for sequence in sequences if sequence[1]):
            of_prompt.setdefault(prompt, []).append((prompt, response))
        groups = [
            alike[begin : begin + self._num_together]
            for alike in of_prompt.values()
            for begin in range(0, len(alike), self._num_together)
        ]
        # The prompt of a group counts once.
        sizes = [len(group[0][0]) + sum(len(response) for _, response in group) for group in groups]
        done, total = 0, sum(sizes)
        for num_together in range(1, self._num_together + 1):  # a micro-batch holds groups of one size
            alike = [(group, size) for group, size in zip(groups, sizes, strict=True) if len(group) == num_together]
            for batch in cut_by_tokens(alike, [size for _, size in alike], self._batch_tokens):
                done += sum(size for _, size in batch)
                yield [group for group, _ in batch], done / total

    def _collated(self, groups: Sequence[list[PromptedResponse]]) -> Batch:
        """Return groups of equally many responses as a micro-batch on the model's device."""
        collate = PairCollator(
            packed=self._not_packed is None, with_rejected=len(groups[0]) == 2, share_beginnings=False
        )
        return collate([_as_pair(group) for group in groups], self._device)

    def _find_basis(self, request: Request) -> ContextBasis:
        """Return the basis of the contexts of the table; the first to come computes and commits it.

        Raises:
            InputError: The model has no hidden states to compute one from, or the table has none.
        """
        (target,) = request.targets
        table = WeightStore(request.tokens.store).table(target.table)
        if not table.exists():
            pairs = [pair for pair in first_pairs(request.tokens, SAMPLE_PAIRS) if self._why_not(pair) is None]
            sequences = [sequence for pair in pairs for sequence in _sequences(pair)]
            _log.info(f"computing the axes of contexts from {len(pairs)} pairs")
            with _reporting_memory():
                states = (states_before(self._model, self._collated(groups)) for groups, _ in self._batches(sequences))
                basis = fit_basis(states, self._options.contexts)
            metadata = commit_metadata(target, 0, 0, 0.0, self.record) | {"contexts": basis.record()}
            with suppress(ConflictError):  # another actor was faster: its basis counts
                table.commit([], metadata, None)
        record = table.metadata(0).get("contexts")
        if record is None:
            raise InputError(
                f"{target.table}: its first commit has lost the axes of contexts, which all its rows share; delete the table's "
                "folder and build again"
            )
        return ContextBasis.of_record(record).to(self._device)

    def _why_not(self, pair: PairRow) -> str | None:
        return why_not(pair, self._vocab_size, self._max_tokens)

    def _attribute_batch(self, groups: Sequence[list[PromptedResponse]]) -> dict[PromptedResponse, Attributed]:
        """Attribute groups of equally many responses, one forward and one backward pass."""
        with _reporting_memory():
            batch = self._collated(groups)
            result = attribute_tokens(
                self._model,
                batch,
                self._options.target,
                with_prompts=self._options.prompts,
                with_activations=self._options.activations,
                with_contexts=None if self._basis is None else self._basis.project,
            )
            sequences = [group[index] for index in range(len(groups[0])) for group in groups]
            return dict(zip(sequences, _attributed(result, batch["completion_mask"].cpu()), strict=True))


# --- the model ---------------------------------------------------------------------------------------------------------


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """Load a model for gradients with respect to its embeddings: on the CPU, with frozen parameters.

    Raises:
        InputError: It cannot be loaded, or gives no access to its input embeddings.
    """
    model = load_checkpoint(folder, dtype=dtype)
    input_embeddings(model)
    return model.requires_grad_(False)


def _choose_layout(model: PreTrainedModel, device: torch.device) -> str | None:
    """Switch to packed attention if the model can, and move it to `device`; return why it is not packed.

    Tried in float32 on the CPU, where rounding cannot hide errors, then as it will run.

    Raises:
        InputError: Its code does not allow attributions, or computes log-probs in a way that we do not know.
    """
    ordinary = str(model.config._attn_implementation)
    with in_float32(model):
        check_output_layer(model)
        reason = enable_packing(model, attributions=True)
    if model.dtype != torch.float32:
        use_kernels(model)
    model.to(device)
    return confirm_layout(model, ordinary, reason, attributions=True)


@contextmanager
def _reporting_memory() -> Iterator[None]:
    """Turn PyTorch's errors about memory into an `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"attributing ran out of memory: {first_line(error)}") from error
        raise


# --- pairs, sequences, batches -----------------------------------------------------------------------------------------


def _sequences(pair: PairRow) -> list[PromptedResponse]:
    return [(tuple(pair.prompt_ids), tuple(ids)) for ids in (pair.chosen_ids, pair.rejected_ids)]


def _as_pair(group: Sequence[PromptedResponse]) -> Pair:
    """Return one or two responses of one prompt in the form of the trainer's collator, which needs no weights here."""
    sides = [
        StoredResponse(np.array(ids, np.int32), *np.zeros((2, len(ids)), np.float32))
        for _, ids in (group[0], group[-1])
    ]
    return Pair("", np.array(group[0][0], np.int32), sides[0], sides[1])


def _attributed(result: TokenAttributions, mask: torch.Tensor) -> list[Attributed]:
    """Return what is stored of each sequence of a micro-batch; `mask` is `[S, T]`."""
    sizes = mask.sum(1).tolist()

    def split(values: torch.Tensor) -> list[np.ndarray]:
        return [part.numpy() for part in values.cpu()[mask].split(sizes)]

    attributions = split(result.attributions)
    prompts = [None] * len(sizes) if result.prompt_attributions is None else result.prompt_attributions.tolist()
    activations = [None] * len(sizes) if result.activations is None else split(result.activations)
    contexts = [None] * len(sizes) if result.contexts is None else [each.ravel() for each in split(result.contexts)]
    return [Attributed(*parts) for parts in zip(attributions, prompts, activations, contexts, strict=True)]

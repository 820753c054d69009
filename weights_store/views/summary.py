"""What a version of a weight dataset is, in words: the same in `tokenweights show`, in a build's summary and its report."""

from collections.abc import Mapping

from weights_store.printing import share_text
from weights_store.schemas import SIDES
from weights_store.tables.metadata import HeadRecord, ParityRecord, SideStatistics, Statistics
from weights_store.views.held_out import held_out_lines


def summary_lines(
    statistics: Statistics, settings: Mapping[str, object], parity: ParityRecord | None
) -> list[tuple[str, str]]:
    """Return the most important facts, as (label, value); what a version did not record is left out.

    Args:
        statistics: Of the version.
        settings: The keys of the recipe's [weights] that determine the weights.
        parity: How the reference's log-probs compare with those of transformers; None if not compared.
    """
    lines = _pair_lines(statistics)
    if parity is not None:
        lines.append(("reference", f"log-probs compared with transformers: {parity_text(parity)}"))
    if statistics.get("ref_top_k"):
        lines.append(("reference top k", f"{statistics['ref_top_k']} tokens at each position"))
    if statistics.get("num_unpaired_rows"):
        counts = (statistics.get(side, {}).get("num_responses") for side in SIDES)
        labels = ("desirable", "undesirable")
        by_label = [f"{count:,} {label}" for count, label in zip(counts, labels, strict=True) if count is not None]
        lines.append(
            ("unpaired", ", ".join([f"{statistics['num_unpaired_rows']:,} rows with one response", *by_label]))
        )
    if statistics.get("num_scored_pairs"):
        lines.append(("annotator scores", f"of {statistics['num_scored_pairs']:,} pairs"))
    if statistics.get("num_anchored_pairs"):
        lines.append(("anchors", f"of {statistics['num_anchored_pairs']:,} pairs"))
    if "estimator" in settings:
        lines.append(("weights", settings_text(settings)))
    if "head" in statistics:
        lines.append(("head", _head_text(statistics["head"])))
    lines += [(f"{side} tokens", _side_text(statistics[side])) for side in SIDES if side in statistics]
    lines += held_out_lines(statistics)
    if "mean_pair_weight" in statistics:
        ends = f"{statistics['min_pair_weight']:.4f} to {statistics['max_pair_weight']:.4f}"
        lines.append(("pair weights", f"mean {statistics['mean_pair_weight']:.4f}, from {ends}"))
    return lines


def _pair_lines(statistics: Statistics) -> list[tuple[str, str]]:
    lines = [("pairs", f"{statistics['num_pairs']:,}")]
    if "quarantined" in statistics and "num_source_rows" in statistics:
        quarantined = statistics["quarantined"]
        balance = f"{statistics['num_pairs']:,} published + {sum(quarantined.values()):,} quarantined"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(quarantined.items())) or "none"
        lines = [("rows in", f"{statistics['num_source_rows']:,} = {balance}"), ("quarantined", reasons)]
    if len(splits := statistics.get("num_pairs_by_split", {})) > 1:
        lines.append(("splits", ", ".join(f"{name} {count:,} pairs" for name, count in splits.items())))
    if "num_prompt_tokens" in statistics:
        lines.append(("prompt tokens", f"{statistics['num_prompt_tokens']:,}"))
    if "num_response_tokens" in statistics:
        lines.append(("response tokens", f"{statistics['num_response_tokens']:,}"))
    return lines


def settings_text(settings: Mapping[str, object]) -> str:
    """Return an estimator with its settings, like "ti: ti_lambda 0.7, sigma_divisor 4.0, span response"."""
    values = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in settings.items()}
    told = ", ".join(f"{key} {value}" for key, value in values.items() if key not in ("name", "estimator"))
    return f"{values['estimator']}: {told}" if told else str(values["estimator"])


def parity_text(found: ParityRecord) -> str:
    """Return the recorded `parity` of a version in words."""
    numbers = f"mean {found['mean']:.1e}, 99 % {found['p99']:.1e}, max {found['max']:.1e}"
    return f"{numbers} nats over {found['num_tokens']:,} tokens of {found['num_pairs']:,} pairs in {found['dtype']}"


def _head_text(head: HeadRecord) -> str:
    """Return how the token rewards of estimator `head` were fitted."""
    prior = f"L2 penalty {head['strength']:g}"
    if "context_strength" in head:
        prior += f", of contexts {head['context_strength']:g}"
    return f"token rewards fitted to {head['num_pairs']:,} pairs of {head['num_prompts']:,} prompts, {prior}"


def _side_text(numbers: SideStatistics) -> str:
    """Return the numbers of one side that its estimator counts."""
    parts = [f"{numbers['num_tokens']:,}"] if "num_tokens" in numbers else []
    if "mean_weight" in numbers:
        parts.append(f"mean weight {numbers['mean_weight']:.4f}")
    if "min_weight" in numbers and "max_weight" in numbers:
        parts.append(f"from {numbers['min_weight']:.4f} to {numbers['max_weight']:.4f}")
    ends = (("at L", numbers.get("share_at_lower")), ("at U", numbers.get("share_at_upper")))
    clamped = [f"{share_text(share)} {end}" for end, share in ends if share is not None]
    if clamped:
        parts.append(f"clamped {', '.join(clamped)}")
    if "mean_logratio" in numbers:
        parts.append(f"mean log-ratio {numbers['mean_logratio']:+.4f} nats")
    if numbers.get("num_without_mass"):
        parts.append(f"{numbers['num_without_mass']:,} responses with nothing to be weighed by")
    return ", ".join(parts)

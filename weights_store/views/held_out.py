"""What a version recorded of how its token scores predict labels that they have not seen, in plain words."""

from weights_store.tables.metadata import HeldOutRecord, Statistics

_DPO = "dpo"
_CHANCE = "-0.693"


def held_out_lines(statistics: Statistics) -> list[tuple[str, str]]:
    """Return labels and lines: figures and a verdict for each kind of scores; none if the weights come from no scores."""
    records = statistics.get("held_out", {})
    lines = []
    for name, record in records.items():
        of_member = f", {name}" if len(records.keys() - {_DPO}) > 1 else ""
        label, verdict = f"held-out labels{of_member}", f"verdict{of_member}"
        if name == _DPO:
            lines.append(
                (
                    "DPO's own reward",
                    f"the implicit one, log π+ − log ref, on the same pairs: {held_out_figures(record)}",
                )
            )
        elif "not_measured" in record:
            lines.append((label, f"not measured: {record['not_measured']}"))
        else:
            assumed = f"; assumed: {record['assumption']}" if "assumption" in record else ""
            lines.append((label, f"{held_out_figures(record)}{_left_out(record)}{assumed}"))
            lines.append((verdict, _advice(record)))
    return lines


def held_out_figures(record: HeldOutRecord) -> str:
    """Return log-likelihood with its standard error, accuracy and number of pairs of what was measured."""
    mean, error = record["log_likelihood"], record["log_likelihood_se"]
    sample = f", a sample of {record['num_unseen_pairs']:,}" if "num_unseen_pairs" in record else ""
    return (
        f"log-likelihood {mean:.3f} ± {error:.3f} nats a pair (chance {_CHANCE}), {100 * record['accuracy']:.0f} % right "
        f"in {record['num_pairs']:,} pairs{sample}"
    )


def _left_out(record: HeldOutRecord) -> str:
    """Return how many pairs are not measured, and why."""
    count = record.get("num_seen_pairs", 0)
    return f" ({count:,} with prompts that the models were trained on are left out)" if count else ""


def _advice(record: HeldOutRecord) -> str:
    """Return what the scores are like, and what to do."""
    multiplier, scale = record["multiplier"], None if "spread" in record else record.get("scale")
    match record["verdict"]:
        case "no better than chance":
            return "the scores predict labels no better than chance: use other scores, or no weights"
        case "wrong way round":
            return "the scores predict the opposite of the labels: check which model of the pair is which"
        case "overconfident":
            found = f"the scores are {_times((scale or 1) / multiplier)} overconfident"
            remedy = ': set weights.scale = "calibrated", or use no weights' if scale is not None else ""
        case "underconfident":
            found = f"the scores are {_times(multiplier / (scale or 1))} underconfident"
            remedy = ': set weights.scale = "calibrated"' if scale is not None else ""
        case _:
            times = f" times {scale:.3g} (weights.scale)" if scale not in (None, 1) else ""
            found, remedy = f"the scores{times} are calibrated", ""
    return found + remedy + _spread(record) + _against_dpo(record)


def _spread(record: HeldOutRecord) -> str:
    """Return what `weights.spread` has made of the scores."""
    if "spread" not in record or "scale" not in record:
        return ""
    return f"; weights.spread {record['spread']:g} multiplies them by {record['scale']:.3g}"


def _against_dpo(record: HeldOutRecord) -> str:
    """Return how the scores compare with what plain DPO has learnt from the same labels."""
    if "gain_over_dpo" not in record:
        return ""
    gain, error = record["gain_over_dpo"], record["gain_over_dpo_se"]
    figure = f"({gain:+.3f} ± {error:.3f} nats)"
    if gain > 2 * error:
        return f"; they predict better than DPO's own implicit reward {figure}"
    return f"; they predict no better than DPO's own implicit reward {figure}"


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.1f} times"

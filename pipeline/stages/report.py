"""Stage report: what was published, as one self-contained HTML file in the store (template: `report.html`) and as Markdown.

It draws no conclusions, except for two findings that are always wrong.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.stages.publish import Published
from weights_store import Table, WeightStore
from weights_store.checks.reports import REPORTS, report_problem, with_digest
from weights_store.location import Location
from weights_store.messages import logger
from weights_store.schemas import SIDES
from weights_store.tables.metadata import Statistics
from weights_store.views.summary import summary_lines

_log = logger(__name__)

_SAMPLE_PAIRS = 12
_MAX_SHOWN_TOKENS = 300


def write_report(published: Published, model_folder: Path, chat_template: str | None = None) -> str:
    """Write `reports/<name>@<version>.html` into the store, unless it is there and whole, and return its path."""
    from jinja2 import Environment

    store = WeightStore(published.weights.store)
    file = report_file(published.name, published.weights.version)
    folder = store.root / REPORTS
    if (reason := why_write(folder, file, published.is_new)) is None:
        return f"{folder}/{file}"
    frame = store.scan(published.name, published.weights.version, checked=True)
    metadata = store.metadata(published.name, published.weights.version)
    context = {
        "title": f"{published.name}@{published.weights.version}",
        "facts": summary_rows(published),
        "findings": findings(published.statistics),
        "parents": metadata["parents"],
        "recipe": metadata["recipe"],
        "histograms": _histograms(store.table(published.weights.table), published),
        "pairs": _sample_pairs(frame, ChatTokenizer(model_folder, chat_template)),
    }
    _log.info(reason)
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    folder.write(file, with_digest(Environment(autoescape=True).from_string(template).render(context), file))
    return f"{folder}/{file}"


def why_write(folder: Location, file: str, is_new: bool) -> str | None:
    """Return why the report `file` of the store's folder `REPORTS` has to be written, None if it is there and whole.

    `is_new`: its version was published just now, so a report that is there is of a dataset that was deleted.
    """
    if is_new or not folder.exists(file):
        return f"new file {REPORTS}/{file}"
    problem = report_problem(folder.read(file), file)
    return problem and f"{REPORTS}/{file} is written again: {problem}"


def report_file(name: str, version: int) -> str:
    """Return the name of a version's report in the store's folder `REPORTS`."""
    return f"{name}@{version}.html"


def summary_rows(published: Published) -> list[tuple[str, str]]:
    """Return the most important facts, as (label, value)."""
    named = [("weight dataset", str(published.weights)), ("fingerprint", published.weights.fingerprint[:12])]
    return named + summary_lines(published.statistics, published.settings, published.parity)


def findings(statistics: Statistics) -> list[str]:
    """Return what looks wrong, each with what to do."""
    problems = []
    if statistics["constant_weights"]:
        problems.append(
            "All weights are equal: TIS-DPO on them is plain DPO. Are the two models of the contrastive pair the same?"
        )
    chosen, rejected = (statistics[side].get("mean_logratio") for side in SIDES)
    if chosen is not None and rejected is not None and chosen < rejected:
        problems.append(
            f"The mean log-ratio is lower on chosen ({chosen:+.4f}) than on rejected tokens ({rejected:+.4f}): the pair "
            "takes good responses for bad ones. Check the contrastive prompts, or train the pair longer."
        )
    return problems


def summary_markdown(published: Published, report: str | None = None) -> str:
    """Return the summary as Markdown, for Prefect's artifact."""
    lines = [f"# {published.weights}", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in summary_rows(published)]
    if published.changes:
        lines += ["", "Changed since the previous version:", *(f"* `{change}`" for change in published.changes)]
    problems = findings(published.statistics)
    lines += ["", "**Findings**", *(f"* {problem}" for problem in problems)] if problems else []
    if report is not None:
        lines += ["", f"Report: `{report}`"]
    return "\n".join(lines)


def _histograms(table: Table, published: Published, num_bins: int = 40) -> list[dict[str, object]]:
    """Return one histogram of weights per side; reads one row group at a time."""
    edges, counts = {}, {}
    for side in SIDES:
        numbers = published.statistics[side]
        edges[side] = np.histogram_bin_edges([numbers["min_weight"], numbers["max_weight"]], bins=num_bins)
        counts[side] = np.zeros(num_bins, dtype=np.int64)
    for rows in table.batches(published.weights.version, [f"{side}_token_weights" for side in SIDES]):
        for side in SIDES:
            weights = rows[f"{side}_token_weights"].combine_chunks().flatten().to_numpy()
            # Stored weights are rounded, so they may lie slightly outside the range of the exact ones.
            counts[side] += np.histogram(np.clip(weights, edges[side][0], edges[side][-1]), bins=edges[side])[0]
    return [{"side": side, "counts": counts[side].tolist(), "edges": edges[side].tolist()} for side in SIDES]


def _sample_pairs(frame: pl.LazyFrame, tokenizer: ChatTokenizer) -> list[dict[str, object]]:
    pairs = []
    for row in frame.head(_SAMPLE_PAIRS).collect().iter_rows(named=True):
        prompt = "".join(tokenizer.token_texts(row["prompt_ids"]))
        sides = [
            {"side": side, "tokens": _colored(tokenizer.token_texts(row[f"{side}_ids"]), row[f"{side}_token_weights"])}
            for side in SIDES
        ]
        pairs.append({"pair_id": row["pair_id"], "prompt": prompt, "sides": sides})
    return pairs


def _colored(texts: Sequence[str], weights: Sequence[float]) -> list[dict[str, str]]:
    """Return tokens with a background: green for weights above 1, orange below; the further from 1 the stronger."""
    tokens = []
    for text, weight in list(zip(texts, weights, strict=True))[:_MAX_SHOWN_TOKENS]:
        # The root makes small differences visible: half of the full color at a quarter of the largest log-weight.
        strength = min(1.0, abs(float(np.log(max(weight, 1e-6)))) / 1.5) ** 0.5
        color = "46,160,67" if weight >= 1 else "230,126,34"
        tokens.append({"text": text, "style": f"background:rgba({color},{strength:.2f})", "title": f"{weight:.3f}"})
    if len(texts) > _MAX_SHOWN_TOKENS:
        tokens.append(
            {"text": f" … {len(texts) - _MAX_SHOWN_TOKENS} more tokens", "style": "color:#888", "title": "cut here"}
        )
    return tokens

"""Stage report: what was published, as a page in the store (`weights_store/inspection/page`) and as Markdown.

What looks wrong is the doctor's business (`weights_store/inspection/doctor.py`); its one pass serves the whole report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.parity.check import parity_text
from pipeline.stages.publish import Published
from train.model.checkpoint import load_tokenizer
from weights_store import WeightStore
from weights_store.checks.reports import REPORTS, report_problem, with_digest
from weights_store.inspection.choice import Choice
from weights_store.inspection.doctor import Diagnosis, diagnose
from weights_store.inspection.gather import make_view
from weights_store.inspection.page import render
from weights_store.inspection.survey import Survey
from weights_store.location import Location
from weights_store.messages import logger
from weights_store.schemas import SIDES
from weights_store.tables.metadata import SideStatistics
from weights_store.views.held_out import held_out_lines

_log = logger(__name__)


@dataclass(frozen=True)
class Inspected:
    """One pass over a published version: what was counted, and what looks wrong."""

    survey: Survey
    diagnoses: list[Diagnosis]

    @classmethod
    def of(cls, published: Published) -> "Inspected":
        """Read all its tokens, see `WeightStore.survey`."""
        store, version = WeightStore(published.weights.store), published.weights.version
        survey = store.survey(published.name, version)
        return cls(survey, diagnose(survey, store.metadata(published.name, version)))


def write_report(published: Published, inspected: Inspected, model_folder: Path) -> str:
    """Write `reports/<name>@<version>.html` into the store, unless it is there and whole, and return its path."""
    store = WeightStore(published.weights.store)
    file = report_file(published.name, published.weights.version)
    folder = store.root / REPORTS
    if (reason := why_write(folder, file, published.is_new)) is None:
        return f"{folder}/{file}"
    tokenizer = load_tokenizer(model_folder)
    view = make_view(store.root, published.weights, None, Choice(), tokenizer, inspected.survey)
    _log.info(reason)
    folder.write(file, with_digest(render(replace(view, facts=summary_rows(published))), file))
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
    statistics = published.statistics
    quarantined = statistics["quarantined"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(quarantined.items())) or "none"
    balance = f"{statistics['num_pairs']} published + {sum(quarantined.values())} quarantined"
    rows = [
        ("weight dataset", str(published.weights)),
        ("fingerprint", published.weights.fingerprint[:12]),
        ("rows in", f"{statistics['num_source_rows']} = {balance}"),
        ("quarantined", reasons),
        ("response tokens", f"{statistics['num_response_tokens']:,}"),
    ]
    if published.parity is not None:
        rows.append(("reference", f"log-probs compared with transformers: {parity_text(published.parity)}"))
    if statistics["ref_top_k"]:
        rows.append(("reference top k", f"{statistics['ref_top_k']} tokens for each place"))
    if statistics["num_scored_pairs"]:
        rows.append(("annotator scores", f"of {statistics['num_scored_pairs']:,} pairs"))
    if statistics["num_anchored_pairs"]:
        rows.append(("anchors", f"of {statistics['num_anchored_pairs']:,} pairs"))
    rows.append(("weights", _settings_text(published.settings)))
    rows += [(f"{side} tokens", _side_text(statistics[side])) for side in SIDES]
    rows += held_out_lines(statistics)
    if "mean_pair_weight" in statistics:
        ends = f"{statistics['min_pair_weight']:.4f} to {statistics['max_pair_weight']:.4f}"
        rows.append(("pair weights", f"{ends}, mean {statistics['mean_pair_weight']:.4f}"))
    return rows


def _settings_text(settings: Mapping[str, object]) -> str:
    """Return an estimator with its settings, like "ti: ti_lambda 0.7, sigma_divisor 4.0, span response"."""
    values = {key: ", ".join(value) if isinstance(value, list) else value for key, value in settings.items()}
    told = ", ".join(f"{key} {value}" for key, value in values.items() if key not in ("name", "estimator"))
    return f"{values['estimator']}: {told}" if told else str(values["estimator"])


def _side_text(numbers: SideStatistics) -> str:
    """Return the numbers of one side that its estimator counts."""
    parts = [f"mean weight {numbers['mean_weight']:.4f}"]
    ends = (("at L", numbers.get("share_at_lower")), ("at U", numbers.get("share_at_upper")))
    clamped = [f"{share:.1%} {end}" for end, share in ends if share is not None]
    if clamped:
        parts.append(f"clamped {', '.join(clamped)}")
    if "mean_logratio" in numbers:
        parts.append(f"mean log-ratio {numbers['mean_logratio']:+.4f} nats")
    if numbers.get("num_without_mass"):
        parts.append(f"{numbers['num_without_mass']:,} responses with nothing to be weighed by")
    return ", ".join(parts)


def summary_markdown(published: Published, diagnoses: Sequence[Diagnosis], report: str | None = None) -> str:
    """Return the summary as Markdown, for Prefect's artifact."""
    lines = [f"# {published.weights}", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in summary_rows(published)]
    if published.changes:
        lines += ["", "Changed since the previous version:", *(f"* `{change}`" for change in published.changes)]
    if diagnoses:
        lines += ["", "**Findings**", "", *(f"* **{found.severity} {found.name}**: {found}" for found in diagnoses)]
    if report is not None:
        lines += ["", f"Report: `{report}`"]
    return "\n".join(lines)

"""Stage report: what was published, as a page in the store (`weights_store/inspection/page`) and as Markdown.

What looks wrong is the doctor's business (`weights_store/inspection/doctor.py`); its one pass serves the whole report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from weights_store.views.summary import summary_lines

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


def write_report(
    published: Published,
    inspected: Inspected,
    model_folder: Path,
    on_new: Callable[[str], None] = lambda path: None,
) -> str:
    """Write `reports/<name>@<version>.html` into the store, unless it is there and whole, and return its path.

    `on_new` is called with the path before it is written: whoever dies in between calls it again in the next build.
    """
    store = WeightStore(published.weights.store)
    file = report_file(published.name, published.weights.version)
    folder = store.root / REPORTS
    if (reason := why_write(folder, file, published.is_new)) is None:
        return f"{folder}/{file}"
    tokenizer = load_tokenizer(model_folder)
    view = make_view(store.root, published.weights, None, Choice(), tokenizer, inspected.survey)
    _log.info(reason)
    on_new(f"{folder}/{file}")
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
    named = [("weight dataset", str(published.weights)), ("fingerprint", published.weights.fingerprint[:12])]
    return named + summary_lines(published.statistics, published.settings, published.parity)


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

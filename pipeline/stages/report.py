"""Stage report: what was published, as a page in the store (`weights_store/inspection/page`) and as Markdown.

What looks wrong is the doctor's business (`weights_store/inspection/doctor.py`); its one pass serves the whole report, and the
page keeps what it found (`weights_store/inspection/page/kept.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.stages.publish import Published
from train.model.checkpoint import load_light_tokenizer
from weights_store import WeightStore
from weights_store.checks.reports import REPORTS, report_problem, with_digest
from weights_store.inspection.choice import Choice
from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.gather import make_view
from weights_store.inspection.page import render
from weights_store.inspection.page.kept import findings_key, read_findings, with_findings
from weights_store.location import Location
from weights_store.messages import logger
from weights_store.views.summary import summary_lines

_log = logger(__name__)


@dataclass(frozen=True)
class Report:
    """The page about a published version, and what the doctor found."""

    path: str
    diagnoses: list[Diagnosis]


def write_report(
    published: Published, model_folder: Path, on_new: Callable[[Report], None] = lambda report: None
) -> Report:
    """Write `reports/<name>@<version>.html` into the store, unless it is there, whole, and about this very version.

    Only then are tokens read: a page that stays has the findings. `on_new` is called before it is written, so that a build
    which dies in between calls it again the next time.

    Raises:
        DamageError: See `WeightStore.survey`.
    """
    store, weights = WeightStore(published.weights.store), published.weights
    folder, file = store.root / REPORTS, report_file(published.name, weights.version)
    key = findings_key(store.root, weights)
    found = kept_findings(folder, file, key)
    if isinstance(found, list):
        return Report(f"{folder}/{file}", found)
    view = make_view(store.root, weights, None, Choice(), load_light_tokenizer(model_folder))
    _log.info(found)
    html = render(replace(view, facts=summary_rows(published)))
    report = Report(f"{folder}/{file}", list(view.diagnoses))
    on_new(report)
    folder.write(file, with_digest(with_findings(html, key, view.diagnoses), file))
    return report


def kept_findings(folder: Location, file: str, key: str | None) -> list[Diagnosis] | str:
    """Return the findings in the report `file` of the store's folder `REPORTS`, or why it has to be written.

    `key` is the `findings_key` of its version; None if that is still to be published.
    """
    if key is None or not folder.exists(file):
        return f"new file {REPORTS}/{file}"
    page = folder.read(file)
    problem = report_problem(page, file)
    if problem is None:  # only then can the findings be read
        found = read_findings(page, key)
        if found is not None:
            return found
        problem = "it is about another version of that name, or the doctor's rules have changed"
    return f"{REPORTS}/{file} is written again: {problem}"


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

"""What a build leaves in Prefect for people: a summary, tables of rows, versions and costs, and links to report and store.

Progress is in `run_logs.py`. Nobody needs these to go on: everything is in the store too.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from pipeline.stages.publish import Published
from pipeline.stages.report import Report, summary_markdown
from pipeline.workers.supervise import Filled
from weights_store import TableVersion
from weights_store.location import Location


def show_published(published: Published, report: Report) -> None:
    """Make the summary of a version and the links to its report and its store."""
    summary = summary_markdown(published, report.diagnoses, report.path)
    create_markdown_artifact(summary, key=_key("weights", published.name), description=str(published.weights))
    for what, place in (("report", report.path), ("store", published.weights.store)):
        key, text = _key(what, published.name), f"{what} of {published.weights}"
        create_link_artifact(_link(place), link_text=text, key=key, description=place)


def show_rows(published: Published) -> None:
    """Make the table of what became of every source row; the last line is the sum."""
    statistics = published.statistics
    rows = [("published", statistics["num_pairs"])]
    rows += [(f"quarantined: {reason}", count) for reason, count in sorted(statistics["quarantined"].items())]
    rows.append(("in the source", statistics["num_source_rows"]))
    table = [{"rows": what, "number": count} for what, count in rows]
    create_table_artifact(table, key=_key("rows", published.name), description=f"source rows of {published.weights}")


def show_versions(published: Published, versions: Mapping[str, TableVersion]) -> None:
    """Make the table of the versions that a weight dataset was made from, by their role, and of itself."""
    found = {**versions, "weights": published.weights}
    table = [
        {"role": role, "table": version.table, "version": version.version, "fingerprint": version.fingerprint[:12]}
        for role, version in found.items()
    ]
    create_table_artifact(
        table, key=_key("versions", published.name), description=f"what {published.weights} is made from"
    )


def show_costs(published: Published, stage_s: Mapping[str, float], filled: Mapping[str, Filled]) -> None:
    """Make the table of what each stage of a build has cost: seconds, and of stages that ran a model pairs, tokens and rate."""
    table = list(_costs(stage_s, filled))
    create_table_artifact(
        table, key=_key("costs", published.name), description=f"what building {published.weights} took"
    )


def _costs(stage_s: Mapping[str, float], filled: Mapping[str, Filled]) -> Iterator[dict[str, object]]:
    for stage, seconds in stage_s.items():
        yield {"stage": stage, "seconds": round(seconds, 1)}
    for what, result in filled.items():
        if result.num_pairs:
            rate = round(result.num_tokens / max(result.wall_s, 1e-9))
            numbers = {"pairs": result.num_pairs, "tokens": result.num_tokens, "tokens/s": rate}
            yield {"stage": f"{what}, without the model's start", "seconds": round(result.wall_s, 1), **numbers}


def _key(what: str, name: str) -> str:
    """Return the key of an artifact, which has lower-case letters, digits and dashes only."""
    return f"{what}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"


def _link(place: str) -> str:
    """Return the URI of a folder or file of a store."""
    uri = Location(place).absolute_uri
    return uri if "://" in uri else Path(uri).as_uri()

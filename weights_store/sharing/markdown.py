"""Parts of the cards of datasets and models, as Markdown."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from weights_store.printing import one_line
from weights_store.sharing.publishable import publishable, shorten

_DIGITS = 12
"""Of a fingerprint."""


def front_matter(values: Mapping[str, object]) -> str:
    """Return the header that a model hub reads, in YAML: every value as JSON, which YAML contains."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    return f"---\n{''.join(lines)}---"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Cells are data of strangers: no bar and no line break in one ends it."""
    cells = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells])


def code(text: str) -> str:
    """Return a text to be shown as it is, whatever signs of Markdown and HTML it has."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def plain(text: str) -> str:
    """Return a text whose signs of Markdown and HTML are shown, and mean nothing."""
    return re.sub(r"[`*<\[\\]", r"\\\g<0>", text)


def settings_table(settings: Mapping[str, Mapping[str, object]]) -> str:
    """Return the settings of a build or a training that have a value, one a line."""
    shown = cast(Mapping[str, Mapping[str, object]], publishable(settings))
    rows = [
        [code(f"{section}.{key}"), code(json.dumps(value, ensure_ascii=False))]
        for section, values in shown.items()
        for key, value in (values if isinstance(values, Mapping) else {}).items()
        if value not in ("", None)
    ]
    return table(["key", "value"], rows)


def lineage_lines(rows: Iterable[Mapping[str, object]]) -> list[list[str]]:
    """Return a line for each row of `WeightStore.lineage`: role, indented by distance, name, fingerprint and rows."""
    lines = []
    for row in rows:
        depth, version, num_rows = row["depth"], row["version"], row["num_rows"]
        name = shorten(row["name"]) if version is None else f"{row['name']}@{version}"
        count = f"{num_rows:,}" if isinstance(num_rows, int) else ""
        role = "· " * depth + str(row["role"]) if isinstance(depth, int) else str(row["role"])
        fingerprint = str(row["fingerprint"] or "")[:_DIGITS]
        lines.append([role, code(str(name or "(unnamed)")), code(fingerprint) if fingerprint else "", count])
    return lines


LINEAGE_HEADS = ["", "name", "fingerprint", "rows"]

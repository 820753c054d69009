"""The model card that lies beside a trained model: what it is, from what, with which settings, and how it came out.

Markdown with the front matter that a model hub reads, so that the folder can be pushed as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from train.data.dataset import WeightSource
from weights_store import WeightStore, split_name
from weights_store.errors import StoreError

_TITLES = {
    "dpo": "DPO (arXiv 2305.18290)",
    "ipo": "IPO (arXiv 2310.12036)",
    "tdpo1": "TDPO1 (arXiv 2404.11999)",
    "tdpo2": "TDPO2 (arXiv 2404.11999)",
    "tis_dpo": "TIS-DPO (arXiv 2410.04350)",
    "ti_dpo": "TI-DPO (arXiv 2505.19653)",
    "simpo": "SimPO (arXiv 2405.14734)",
    "sepo": "SePO (arXiv 2408.13518)",
    "d2po": "D2PO (arXiv 2502.14340)",
    "uni_dpo": "Uni-DPO (arXiv 2506.10054)",
    "sft": "supervised fine-tuning",
}
_SECTIONS = ("loss", "optim", "model", "lora", "data", "eval")


def model_card(lineage: Mapping[str, Any], source: WeightSource) -> str:
    """Return the card as Markdown.

    Args:
        lineage: What `lineage.json` holds.
        source: The dataset that was trained on.
    """
    config, result = lineage["config"], lineage["result"]
    base, loss = config["model"]["path"], config["loss"]["name"]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tokenweights", loss]}
    if not Path(base).expanduser().is_dir():
        front["base_model"] = base  # an id on the hub, as the hub wants it
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# {_TITLES[loss]} on {source.name}",
        f"`{_shorten(base)}` trained with tokenweights for {result['steps']:,} steps. The token weights and the reference's "
        "log-probs come from a precomputed, versioned dataset; everything it was made of is listed below.",
        "## Result\n\n" + _results(result),
        "## Settings\n\n" + _settings(config),
        "## Lineage\n\n" + _lineage(lineage, source),
        "## Packages\n\n" + ", ".join(f"{name} {version}" for name, version in lineage["packages"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _results(result: Mapping[str, Any]) -> str:
    columns = {"before": result["before"], "after": result["after"], "held out": result.get("held_out")}
    columns = {name: values for name, values in columns.items() if values}
    rows = [
        [f"`{name}`", *(f"{values.get(name, float('nan')):.4g}" for values in columns.values())]
        for name in result["after"]
    ]
    sample = f"`before` and `after` are means over the same {result['num_sample_pairs']} pairs of the training data."
    return _table(["", *columns], rows) + f"\n\n{sample}"


def _settings(config: Mapping[str, Any]) -> str:
    rows = [
        [f"`{section}.{key}`", f"`{json.dumps(_shorten(value), ensure_ascii=False)}`"]
        for section in _SECTIONS
        for key, value in config.get(section, {}).items()
        if value != ""
    ]
    return _table(["key", "value"], rows)


def _lineage(lineage: Mapping[str, Any], source: WeightSource) -> str:
    """Return the ancestry of the dataset as a table, the farther from it the deeper; the model stands above it."""
    identity = lineage["identity"]
    rows = [
        ["starting model", f"`{_shorten(lineage['model']['path'])}`", f"`{identity['model']['fingerprint'][:12]}`", ""]
    ]
    try:
        ancestors = WeightStore(source.reference.store).lineage(*split_name(source.name))
    except StoreError:  # the store has changed since; the dataset itself is named in the title
        ancestors = pl.DataFrame()
    for row in ancestors.to_dicts():
        name = f"{row['name']}@{row['version']}" if row["version"] is not None else _shorten(str(row["name"]))
        count = "" if row["rows"] is None else f"{row['rows']:,}"
        rows.append(["· " * row["depth"] + row["role"], f"`{name}`", f"`{row['fingerprint'] or ''}`", count])
    return _table(["", "name", "fingerprint", "rows"], rows)


def _shorten(place: Any) -> Any:
    """Return what can be published of a path: the last two parts of a local one, all of a hub id or a URI."""
    if not isinstance(place, str) or not place.startswith(("/", "~", "./", "../", "file:")):
        return place
    return "/".join(["…", *PurePosixPath(place).parts[-2:]])


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

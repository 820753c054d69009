"""The model card of a trained model: what it is, what it was made from, the settings, and the results.

Markdown with the front matter that a model hub reads, so that the folder can be pushed as it is.
"""

from pathlib import Path

import polars as pl

from train.data.dataset import WeightSource
from train.job.output import Lineage, Result
from train.loss.config import LOSSES, PreferenceLoss
from weights_store import WeightStore, split_name
from weights_store.errors import StoreError
from weights_store.sharing.markdown import LINEAGE_HEADS, front_matter, lineage_lines, settings_table, table
from weights_store.sharing.publishable import shorten
from weights_store.tables.metadata import Section

_SECTIONS = ("loss", "optim", "model", "lora", "data", "eval")


def model_card(lineage: Lineage, source: WeightSource) -> str:
    """Return the card, as Markdown, of a model that was trained on `source`."""
    config, result = lineage["config"], lineage["result"]
    base, loss = str(lineage["model"]["path"]), str(config["loss"]["name"])
    front: dict[str, str | list[str]] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tokenweights", loss],
    }
    if not Path(base).expanduser().is_dir():
        front["base_model"] = base  # an id on the hub, as the hub wants it
    settings = {section: config[section] for section in _SECTIONS if section in config}
    parts = [
        front_matter(front),
        f"# {_title(config['loss'])} on {source.name}",
        f"`{shorten(base)}` trained with tokenweights for {result['steps']:,} steps. The token weights and the reference's "
        "log-probs come from a precomputed, versioned dataset; everything that it was made from is listed below.",
        "## Result\n\n" + _results(result, source.rows_are),
        "## Settings\n\n" + settings_table(settings),
        "## Lineage\n\n" + _lineage(lineage, source),
        "## Packages\n\n" + ", ".join(f"{name} {version}" for name, version in lineage["packages"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _title(loss: Section) -> str:
    """Return the loss with its paper, and the share of likelihood that was added to it."""
    kind = LOSSES[str(loss["name"])]
    # That of `uni_dpo` is its paper's, and that of `distill` stands in the settings.
    nll_lambda = loss.get("nll_lambda") if issubclass(kind, PreferenceLoss) else None
    return f"{kind.title} + {nll_lambda:g} NLL of chosen" if nll_lambda else kind.title


def _results(result: Result, rows_are: str) -> str:
    columns = {"before": result["before"], "after": result["after"]}
    if "held_out" in result:
        seen = result.get("held_out_was_seen")
        columns["held out, but seen" if seen else "held out"] = result["held_out"]
    rows = [
        [f"`{name}`", *(f"{values[name]:.4g}" if name in values else "–" for values in columns.values())]
        for name in result["after"]
    ]
    sample = (
        f"`before` and `after` are means over the same {result['num_sample_pairs']} {rows_are} of the training data."
    )
    return "\n\n".join([table(["", *columns], rows), sample, *(f"Note: {line}." for line in result["notices"])])


def _lineage(lineage: Lineage, source: WeightSource) -> str:
    """Return a table of the starting model and of all that the dataset was made from, indented by distance."""
    model = lineage["identity"]["model"]
    rows = [["starting model", f"`{shorten(lineage['model']['path'])}`", f"`{model['fingerprint'][:12]}`", ""]]
    try:
        ancestors = WeightStore(source.reference.store).lineage(*split_name(source.name))
    except StoreError:  # the store has changed since; the title still names the dataset
        ancestors = pl.DataFrame()
    return table(LINEAGE_HEADS, [*rows, *lineage_lines(ancestors.to_dicts())])

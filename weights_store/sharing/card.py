"""The dataset card, `README.md`: what the weights are, how to load them, how they were made, and what looks wrong with them.

Markdown with the header that a hub reads: the licence, and which files are which split.
"""

import json
import shlex
from collections.abc import Sequence

from weights_store.inspection.view import View
from weights_store.printing import count_text
from weights_store.sharing.data_files import FOLDER, ROW, SplitFiles
from weights_store.sharing.markdown import LINEAGE_HEADS, front_matter, lineage_lines, plain, settings_table, table
from weights_store.sharing.publishable import shorten
from weights_store.sharing.record import RECORD, UNKNOWN_LICENCE, DatasetRecord

CARD = "README.md"
PICTURE = "heat-map.png"

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))
_TEXT_COLUMNS = [
    [
        "`prompt`, `chosen`, `rejected`",
        "text of the ids, special tokens included; for people and viewers, training reads the ids",
    ]
]
_COLUMNS = [
    ["`pair_id`", "name of the pair, the same in every version"],
    ["`prompt_ids`, `chosen_ids`, `rejected_ids`", "token ids, end of turn included"],
    ["`chosen_token_weights`, `rejected_token_weights`", "weight of each response token, unitless, at least 0"],
    ["`chosen_ref_logps`, `rejected_ref_logps`", "log-prob of each response token under the reference, nats"],
    ["`pair_weight`", "factor of the pair's loss"],
    [
        "`anchor_ids`, `anchor_ref_logps`",
        "a response that the reference sampled, or one to another prompt, and its log-probs, nats; or null",
    ],
    ["`chosen_score`, `rejected_score`", "annotators' scores; or null"],
    [
        "`chosen_ref_top_ids`, `chosen_ref_top_logps`, and the same of `rejected`",
        "the reference's k most likely tokens at each position, k entries per response token; or null",
    ],
    ["`split`", "as in the source"],
    [f"`{ROW}`", "place of the row in the version: brings the order of a training back"],
]


def dataset_card(
    record: DatasetRecord, splits: Sequence[SplitFiles], view: View, place: str, *, has_texts: bool, has_picture: bool
) -> str:
    """Return the card, as Markdown, of a dataset that will be at `place`, a repository or a folder."""
    splits = sorted(splits, key=lambda split: -split.num_pairs)  # viewers show the first one
    num_pairs = sum(split.num_pairs for split in splits)
    parts = [
        front_matter(_header(record, splits, num_pairs)),
        f"# Token weights {record['name']}",
        f"{_rows(record, num_pairs)} The weights and the reference's log-probs were computed once and are ready to train on: "
        "nothing is tokenised again.",
        *([f"![A pair, each token coloured by its weight]({PICTURE})"] if has_picture else []),
        _loading(place, splits),
        "## Columns\n\n" + table(["column", "content"], _COLUMNS[:1] + _TEXT_COLUMNS * has_texts + _COLUMNS[1:]),
        "## Statistics\n\n" + table(["", ""], [[label, plain(str(shorten(value)))] for label, value in view.facts]),
        _doctor(view),
        "## How it was made\n\n" + settings_table(record.get("identity", {}).get("settings", {})),
        "## Lineage\n\n" + table(LINEAGE_HEADS, lineage_lines(record["lineage"])),
        _licence(record["licence"]),
        _packages(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(record: DatasetRecord, splits: Sequence[SplitFiles], num_pairs: int) -> dict[str, object]:
    size = next((name for bound, name in (*_SIZES, *_LARGER) if num_pairs < bound), "100M<n<1B")
    files = [{"split": split.name, "path": f"{FOLDER}/{split.name}-*"} for split in splits]
    return {
        "license": record["licence"],
        "pretty_name": f"Token weights {record['name']}",
        "task_categories": ["text-generation"],
        "tags": ["tokenweights", "dpo", "preference", "token-weights"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": files}],
    }


def _rows(record: DatasetRecord, num_pairs: int) -> str:
    """Return what the rows are: pairs, or single responses."""
    statistics = record.get("statistics", {})
    num_unpaired = statistics.get("num_unpaired_rows", 0)
    noun = "row" if num_unpaired else "preference pair"
    weighed = f"{count_text(num_pairs, noun)} with a weight for every response token"
    if not num_unpaired:
        return f"{weighed}, for weighted DPO and its relatives."
    if statistics.get("rejected", {}).get("num_responses") == 0:  # of rows without labels
        return f"{weighed}. Each has one response, for distillation or SFT: it stands in `chosen`, and `rejected` is empty."
    return (
        f"{weighed}. {num_unpaired:,} of them have one response, for KTO and its relatives: it stands in `chosen` if it is "
        "desirable, else in `rejected`, and the other one is empty."
    )


def _loading(place: str, splits: Sequence[SplitFiles]) -> str:
    split = next((split.name for split in splits), "train")
    text = json.dumps(place, ensure_ascii=False)
    return f"""## Load it

```python
from datasets import load_dataset

pairs = load_dataset({text}, split="{split}", streaming=True)
```

To train on it with tokenweights, with the same order of pairs as where it was made:

```console
$ tokenweights pull {shlex.quote(place)}
```

`{RECORD}` says how it was made, for programs; the metadata of each Parquet file says the same."""


def _doctor(view: View) -> str:
    found = "\n".join(f"* {diagnosis.severity} `{diagnosis.name}`: {diagnosis}" for diagnosis in view.diagnoses)
    return "## What looks odd\n\n" + (found or "`tokenweights doctor` found nothing.")


def _licence(licence: str) -> str:
    text = f"Of the source: {plain(licence)}."
    if licence == UNKNOWN_LICENCE:
        text = "The licence of the source is unknown: whoever pushed this named none."
    return f"## Licence\n\n{text}"


def _packages(record: DatasetRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
    return f"## Packages\n\n{versions}" if versions else ""

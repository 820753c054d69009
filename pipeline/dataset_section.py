"""The `[dataset]` section of a recipe: which preference pairs, in which columns, and how long they may be."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.section import Section
from weights_store.allowed import expand_home
from weights_store.names import check_new_name


class DatasetSection(Section):
    """The preference pairs, and how they are tokenised."""

    name: str = Field(description="name in the store, lower case")
    source: str = Field(
        description="a .jsonl, .json (both also .gz), .parquet or .arrow file, a saved dataset folder, or a hub id"
    )
    config: str | None = Field(None, description="configuration of a hub dataset")
    data_dir: str | None = Field(None, description="folder inside a hub dataset")
    split: str | list[str] = Field(
        "train", description="split of a saved or hub dataset, or a list of them; also recorded in the split column"
    )
    split_column: str | None = Field(None, description="column with the split of each row")
    revision: str | None = Field(None, description="revision of a hub dataset")
    streaming: bool = Field(False, description="stream a hub dataset that does not fit on the disk")
    prompt_column: str | None = None
    input_column: str | None = None
    system_column: str | None = None
    chosen_column: str | None = None
    rejected_column: str | None = None
    completion_column: str | None = Field(
        None, description="of unpaired rows, each with one response, see [data.md](data.md)"
    )
    label_column: str | None = Field(
        None, description='true or 1: desirable; false or 0: undesirable; `""`: there is none, all are desirable'
    )
    chosen_score_column: str | None = None
    rejected_score_column: str | None = None
    chosen_weights_column: str | None = Field(None, min_length=1)
    rejected_weights_column: str | None = Field(None, min_length=1)
    pair_weight_column: str | None = Field(None, min_length=1)
    transcript: Literal["auto", "hh", "no"] | tuple[str, str] = Field(
        "auto", description="how a text that holds a whole chat is split into turns"
    )
    many_answers: Literal["refuse", "combine"] = "refuse"
    max_pairs: int | None = Field(None, ge=1, description="use only this many rows of each split, from the first one")
    max_prompt_tokens: int = Field(1024, ge=8, description="oldest whole turns are dropped to fit (keep_end)")
    max_response_tokens: int = Field(1024, ge=1, description="EOS included")
    long_response: Literal["refuse", "cut"] = "refuse"
    unprinted_keys: tuple[str, ...] = Field(
        (), description="keys of messages or rows, such as timestamp or tools, that the chat template may leave out"
    )

    @field_validator("source")
    @classmethod
    def _in_home(cls, source: str) -> str:
        return expand_home(source)

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, name: str) -> str:
        if "/" in name:
            raise ValueError("a dataset name has one part, without '/'")
        return check_new_name(name)

    @field_validator("transcript", mode="before")
    @classmethod
    def _markers_can_be_told_apart(cls, given: object) -> object:
        markers = [text.strip() for text in given if isinstance(text, str)] if isinstance(given, list | tuple) else []
        can_be_told_apart = len(markers) == 2 and all(markers) and not any(map(str.startswith, markers, markers[::-1]))
        if given not in ("auto", "hh", "no") and not can_be_told_apart:
            raise ValueError(
                "expected 'auto', 'hh', 'no', or what begins a user's turn and what begins an assistant's, for example "
                "['prompter:', 'assistant:']"
            )
        return given

    @model_validator(mode="after")
    def _columns_of_both_sides(self) -> "DatasetSection":
        for what in ("score", "weights"):
            chosen, rejected = f"chosen_{what}_column", f"rejected_{what}_column"
            if (getattr(self, chosen) is None) != (getattr(self, rejected) is None):
                raise ValueError(f"set both dataset.{chosen} and dataset.{rejected}, or none of them")
        return self

    @model_validator(mode="after")
    def _rows_have_one_layout(self) -> "DatasetSection":
        kinds = ("_column", "_score_column", "_weights_column")
        paired = [f"{side}{what}" for what in kinds for side in ("chosen", "rejected")]
        unpaired = ("completion_column", "label_column")
        first, second = (next((key for key in keys if getattr(self, key)), None) for keys in (paired, unpaired))
        if self.has_no_labels:
            second = "label_column"
        if first and second:
            raise ValueError(
                f"dataset.{first} is of pairs and dataset.{second} of unpaired rows, and a source has one kind: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _splits_are_named_once(self) -> "DatasetSection":
        if not self.splits or not all(self.splits) or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"dataset.split is {self.split!r}, expected the name of a split, or different names")
        if self.split_column is not None and len(self.splits) > 1:
            raise ValueError("dataset.split_column names the split of each row, and dataset.split several: keep one")
        return self

    @property
    def has_no_labels(self) -> bool:
        """Whether each row has one response, and no label of it."""
        return self.label_column == ""

    @property
    def splits(self) -> list[str]:
        """The splits that are loaded, in order."""
        return [self.split] if isinstance(self.split, str) else self.split

    @property
    def has_splits(self) -> bool:
        """Whether pairs of more than one split are expected."""
        return self.split_column is not None or len(self.splits) > 1

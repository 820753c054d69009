"""Croissant metadata of a dataset folder (MLCommons Croissant 1.0): its files and columns, for catalogues and searches."""

import json
from collections.abc import Sequence

import pyarrow as pa

from weights_store.sharing.data_files import FOLDER, SplitFiles
from weights_store.sharing.record import DatasetRecord

CROISSANT = "croissant.json"

_FILES, _ROWS = "parquet-files", "pairs"
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification gives."""


def croissant(record: DatasetRecord, splits: Sequence[SplitFiles], schema: pa.Schema) -> bytes:
    """Return the metadata of the data files, whose columns are `schema`, as JSON-LD."""
    version = record["name"].rpartition("@")[2]
    num_pairs = sum(split.num_pairs for split in splits)
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": record["name"].replace("/", "-").replace("@", "-"),
        "description": f"{num_pairs} rows of preference data with a weight for every response token: {record['name']}.",
        "license": record["licence"],
        "datePublished": record["created"],
        "version": f"{version}.0.0",
        "distribution": [_file(name, digest) for name, digest in record["files"].items()] + [_file_set()],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": _ROWS,
                "name": _ROWS,
                "description": "One row per preference pair, or per single response.",
                "field": [_field(column) for column in schema],
            }
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _file(name: str, digest: str) -> dict[str, object]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "encodingFormat": "application/x-parquet",
        "sha256": digest,
    }


def _file_set() -> dict[str, object]:
    return {
        "@type": "cr:FileSet",
        "@id": _FILES,
        "name": _FILES,
        "description": "All splits; column `split` tells them apart.",
        "encodingFormat": "application/x-parquet",
        "includes": f"{FOLDER}/*.parquet",
    }


def _field(column: pa.Field) -> dict[str, object]:
    is_list = pa.types.is_list(column.type)
    kind = column.type.value_type if is_list else column.type
    field: dict[str, object] = {
        "@type": "cr:Field",
        "@id": f"{_ROWS}/{column.name}",
        "name": column.name,
        "dataType": _data_type(kind),
        "source": {"fileSet": {"@id": _FILES}, "extract": {"column": column.name}},
    }
    return field | ({"repeated": True} if is_list else {})


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"

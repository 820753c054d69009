"""The command `tokenweights doctor`: what looks wrong with a weight dataset. `add_commands` registers it."""

import argparse
import shutil
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import weights_store
from weights_store.printing import GAP, count_text, print_json

if TYPE_CHECKING:
    from weights_store.inspection.doctor import Diagnosis

_MAX_WIDTH = 100
"""Longer lines are hard to read, however wide the terminal is."""


def add_doctor(
    add: Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Register the command, except for the name of the dataset."""
    doctor = add("doctor", run_doctor, "say what looks wrong with the weights of a dataset, and what to do")
    doctor.add_argument("--strict", action="store_true", help="exit code 1 if there is a warning")
    return doctor


def run_doctor(options: argparse.Namespace) -> int:
    """Print the findings of one version; return 1 if there is a warning and `--strict` is given."""
    from weights_store.inspection.doctor import diagnose, looked_at

    store = weights_store.WeightStore(options.store)
    name, version = weights_store.split_name(options.name)
    reference = store.resolve(name, version)
    metadata = store.metadata(name, reference.version)
    survey = store.survey(name, reference.version)
    diagnoses, words = diagnose(survey, metadata), looked_at(survey, metadata)
    num_warnings = sum(diagnosis.severity == "warning" for diagnosis in diagnoses)
    num_pairs, num_tokens = survey.num_pairs, survey.chosen.num_tokens + survey.rejected.num_tokens
    if options.json:
        document = {"name": name, "version": reference.version, "fingerprint": reference.fingerprint}
        print_json({**document, "num_pairs": num_pairs, "looked_at": words, "findings": diagnoses})
    else:
        counts = f"{count_text(num_pairs, 'pair')}, {count_text(num_tokens, 'response token')}"
        notes = count_text(len(diagnoses) - num_warnings, "note")
        result = f"{count_text(num_warnings, 'warning')}, {notes}" if diagnoses else "no findings"
        print("\n".join(_wrapped(f"{reference}: {result} in {counts}")))
        print("\n".join(_wrapped(f"looked at: {', '.join(words)}")))
        for line in finding_lines(diagnoses):
            print(line)
    return 1 if options.strict and num_warnings else 0


def finding_lines(diagnoses: "Iterable[Diagnosis]") -> list[str]:
    """Return each finding as a paragraph: severity and name, figure, meaning and remedy."""
    lines = []
    for diagnosis in diagnoses:
        lines += ["", f"{diagnosis.severity} {diagnosis.name}"]
        lines += _wrapped(diagnosis.figure, GAP)
        lines += _wrapped(f"meaning: {diagnosis.meaning}", GAP)
        lines += _wrapped(f"to do:   {diagnosis.remedy}", GAP)
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + GAP,
        break_on_hyphens=False,
        break_long_words=False,
    )

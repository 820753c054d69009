import json

import numpy as np
import pytest

import tokenweights
from weights_store.inspection.doctor import CHECKS

NAME = "toy/weights"


@pytest.fixture
def command(capsys, monkeypatch):
    def run(store, *arguments, columns=70):
        monkeypatch.setenv("COLUMNS", str(columns))
        code = tokenweights.main(["doctor", f"{NAME}@0", *arguments, "--store", str(store.root)])
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def healthy(write_made_up, made_up):
    return write_made_up(made_up, logratios=made_up.logratios)


@pytest.fixture
def sick(write_made_up, made_up):
    return write_made_up(
        made_up, weights={side: [np.ones(n) for n in made_up.lengths[side]] for side in made_up.lengths}
    )


def test_no_findings_say_what_was_looked_at(command, healthy, made_up):
    code, out = command(healthy, "--strict")
    num_tokens = sum(int(lengths.sum()) for lengths in made_up.lengths.values())
    assert code == 0
    assert out.startswith(f"weights/{NAME}@0: no findings in 60 pairs, {num_tokens:,} response tokens\n")
    assert CHECKS["clamped"].words in " ".join(out.split())
    assert not out.endswith("\n\n")


def test_a_warning_fails_only_if_strict(command, sick):
    code, out = command(sick)
    assert code == 0
    assert "1 warning, 0 notes" in out
    assert command(sick, "--strict") == (1, out)
    finding = out.partition("\nwarning constant\n")[2]
    assert finding.startswith("  weights hardly vary: chosen 1.0000 ± 0, rejected 1.0000 ± 0")
    assert "\n  meaning: The tokens of a response all count the same, as in" in finding


@pytest.mark.parametrize("columns", [40, 70, 300])
def test_lines_fit_the_terminal(command, sick, columns):
    _, out = command(sick, columns=columns)
    assert max(map(len, out.splitlines())) <= min(columns, 100)


def test_json_has_the_findings_and_what_was_looked_at(command, sick):
    code, out = command(sick, "--json", "--strict")
    document = json.loads(out)
    assert (code, document["name"], document["version"], document["num_pairs"]) == (1, NAME, 0, 60)
    (finding,) = document["findings"]
    assert set(finding) == {"name", "severity", "figure", "meaning", "remedy"}
    assert (finding["name"], finding["severity"]) == ("constant", "warning")
    assert CHECKS["inverted"].words not in document["looked_at"]

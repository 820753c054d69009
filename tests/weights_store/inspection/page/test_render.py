"""The page as a document: its policy, its data, and that nothing a stranger wrote becomes markup."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np

from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.page import render


class _Reader(HTMLParser):
    """Collects tags, attributes and the texts of style and script elements."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("script", "style"):
            self.texts.setdefault(self.tags[-1], []).append(data)


def _policy(reader):
    return next(
        value
        for tag, name, value in reader.attributes
        if tag == "meta" and name == "content" and "default-src" in value
    )


def test_the_policy_allows_the_own_style_and_script_only(view):
    reader = _Reader(render(view))
    policy = dict(part.strip().split(" ", 1) for part in _policy(reader).split(";"))

    def hash_of(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == hash_of(reader.texts["style"][0])
    assert policy["script-src"] == hash_of(reader.texts["script"][-1])
    assert "unsafe" not in _policy(reader)


def test_nothing_is_loaded_and_no_handler_is_in_the_markup(view):
    view = dataclasses.replace(view, plots=[("rewards", "<svg xmlns='http://www.w3.org/2000/svg'/>")])
    reader = _Reader(render(view))
    addresses = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert len(addresses) == 1
    assert addresses[0].startswith("data:image/svg+xml;base64,")
    assert not [name for _, name, _ in reader.attributes if name.startswith("on") or name == "style"]
    assert not {"link", "iframe", "object", "embed", "base"} & set(reader.tags)


def test_texts_of_strangers_stay_text(view):
    evil = '"></title><script>alert(1)</script>'
    pair = dataclasses.replace(view.pairs[0], pair_id=evil, prompt=evil, split=evil)
    html = render(
        dataclasses.replace(
            view, title=evil, pairs=[pair], facts=[(evil, evil)], recipe={evil: {evil: evil}}, selection=evil
        )
    )
    assert "alert(1)</script>" not in html
    assert _Reader(html).tags.count("script") == 2


def test_the_data_are_the_tokens_numbers(view):
    data = json.loads(re.search(r'id="data">(.*?)</script>', render(view))[1])
    side, raw = view.pairs[1].chosen, data["pairs"][1]["chosen"]
    indices = np.frombuffer(base64.b64decode(raw["tokens"]), "<u2")
    assert [data["tokens"][index][0] for index in indices] == list(side.ids)
    np.testing.assert_allclose(_numbers(raw, "logp_pos"), side.measures["logp_pos"], rtol=1e-3)
    assert data["pairs"][0]["chosen"]["clamped"] == ".-+."


def test_a_small_log_ratio_of_unlikely_tokens_keeps_its_digits(view):
    """-15.03 and -15.04 are the same number in the three digits that the page holds: their difference must not be 0."""
    side = view.pairs[0].chosen
    close = {**side.measures, "logp_pos": [-15.03] * 4, "logp_neg": [-15.04] * 4, "logratio": [0.01] * 4}
    pair = dataclasses.replace(view.pairs[0], chosen=dataclasses.replace(side, measures=close))
    data = json.loads(re.search(r'id="data">(.*?)</script>', render(dataclasses.replace(view, pairs=[pair])))[1])
    np.testing.assert_allclose(_numbers(data["pairs"][0]["chosen"], "logratio"), 0.01, rtol=1e-3)


def _numbers(side, measure):
    return np.frombuffer(base64.b64decode(side["measures"][measure]), "<f2")


def test_of_a_long_prompt_the_end_is_shown(view):
    pair = dataclasses.replace(view.pairs[0], prompt=f"first {'x' * 30_000} last question")
    html = render(dataclasses.replace(view, pairs=[pair]))
    summary = re.search(r"<summary>(.*?)</summary>", html[html.index('id="pair-0"') :])[1]
    assert summary.endswith("x last question")
    assert "(the end of 30,020 characters)" in html
    assert "first x" not in html


def test_names_and_settings_cannot_hide_or_reorder_text(view):
    evil = "a\u202eb\x1b[31m\x00\ud800"
    pair = dataclasses.replace(view.pairs[0], pair_id=evil, split=evil)
    facts, recipe = [(evil, evil)], {"weights": {evil: evil}, "of another program": 3}
    html = render(dataclasses.replace(view, pairs=[pair], facts=facts, recipe=recipe, selection=evil))
    assert not set("\u202e\x1b\x00\ud800") & set(html)
    assert html.count("a⟨U+202E⟩b␛[31m␀\ufffd") >= 6
    (data,) = re.findall(r'id="data">(.*?)</script>', html)
    assert json.loads(data)["pairs"][0]["split"] == "a⟨U+202E⟩b␛[31m␀\ufffd"  # what the filter compares


def test_numbers_of_both_datasets_are_compared(compared):
    chosen = dataclasses.replace(compared.survey.chosen, mean_weight=0.125, share_at_lower=None, share_at_upper=None)
    other = dataclasses.replace(compared.survey, chosen=chosen, rejected=chosen)
    html = render(dataclasses.replace(compared, other_survey=other))
    (table,) = re.findall(r"<caption>In numbers</caption>(.*?)</table>", html, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
    assert rows[:2] == [
        ["", "A chosen", "A rejected", "B chosen", "B rejected"],
        ["mean weight", "1.250", "1.250", "0.125", "0.125"],
    ]
    assert ["at the lower end", "25.0 %", "25.0 %", "–", "–"] in rows


def test_what_the_doctor_says_is_in_sentences(view):
    finding = Diagnosis("hardly_differs", "warning", "they differ <b>", "π+ says it.", "Set `weights.spread`, or not.")
    html = render(dataclasses.replace(view, diagnoses=[finding]))
    assert "They differ &lt;b&gt;.</p>" in html
    assert "π+ says it." in html
    assert "Set <code>weights.spread</code>, or not." in html


def test_a_page_of_twenty_pairs_is_small(view):
    long = [
        dataclasses.replace(view.pairs[0], chosen=_long(view.pairs[0].chosen), rejected=_long(view.pairs[0].rejected))
    ] * 20
    assert len(render(dataclasses.replace(view, pairs=long)).encode()) < 300_000


def _long(side):
    """Return a side with 60 tokens, as responses of HH have."""
    return dataclasses.replace(
        side,
        ids=list(side.ids[:3]) * 20,
        texts=[" word"] * 60,
        is_special=[False] * 60,
        measures={name: list(values[:3]) * 20 for name, values in side.measures.items()},
        clamped=[0] * 60,
    )


def test_lone_surrogates_do_not_stop_the_page(view):
    render(view).encode("utf-8")


def test_without_findings_it_says_so(view):
    assert "No findings" in render(dataclasses.replace(view, diagnoses=[]))
    assert "No findings" not in render(view)


def test_a_comparison_is_in_words_and_readable_numbers(compared):
    text = re.sub(r"<[^>]*>", " ", render(compared))
    assert re.search(r"pairs in both\s+1,768", text)
    assert re.search(r"correlation of the weights\s+0\.83\s", text)

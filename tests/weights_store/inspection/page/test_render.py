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
    logps = np.frombuffer(base64.b64decode(raw["measures"]["logp_pos"]), "<f2")
    np.testing.assert_allclose(logps, side.measures["logp_pos"], rtol=1e-3)
    assert data["pairs"][0]["chosen"]["clamped"] == ".-+."


def test_a_small_log_ratio_is_not_lost_between_large_log_probs(view):
    side = dataclasses.replace(
        view.pairs[0].chosen,
        ids=[1],
        texts=["I"],
        is_special=[False],
        clamped=[0],
        measures={
            "weight": [1.0],
            "logratio": [0.0234],
            "logp_pos": [-12.0],
            "logp_neg": [-12.0234],
            "ref_logp": [-12.0],
        },
    )
    html = render(dataclasses.replace(view, pairs=[dataclasses.replace(view.pairs[0], chosen=side)]))
    raw = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])["pairs"][0]["chosen"]["measures"]
    # Between 8 and 16, numbers of 16 bits are 1/128 = 0.008 apart.
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw["logratio"]), "<f2"), 0.0234, rtol=1e-3)


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

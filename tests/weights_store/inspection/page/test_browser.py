"""The page in a real browser: Chromium, headless, without a network. Skipped where there is none."""

import dataclasses
import math
import shutil

import pytest

from weights_store.inspection.page import render

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Return a function that opens a view's page; at the end there must be no message and no request beside the file."""
    opened, said, requests = [], [], []

    def open_view(view, **options):
        path = tmp_path / f"{len(opened)}.html"
        path.write_text(render(view), encoding="utf-8")
        context = browser.new_context(**options)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        opened.append((context, path.as_uri()))
        return page

    yield open_view
    for context, _ in opened:
        context.close()
    assert said == []
    # Pictures inside the file are not requests to anybody.
    assert [url for url in requests if not url.startswith("data:")] == [uri for _, uri in opened]


def _shown_pairs(page):
    return [each.get_attribute("aria-label") for each in page.locator(".pair").all() if each.is_visible()]


def test_hover_shows_all_numbers_of_a_token(view, open_page):
    page = open_page(view)
    page.hover("#pair-0 .t.c i:nth-child(3)")
    told = page.inner_text("#token")
    # made by hand in conftest: token 3 has log pi+ -1.5, log pi- -3, ref -2
    for part in (
        "sorry",
        "id 3, token 3 of 4, chosen",
        "weight 4.50",
        "log-ratio 1.50 nats",
        "log π+ -1.50",
        "log π− -3.00",
        "log ref -2.00",
        "surprise 2.00",
    ):
        assert part in told
    assert "at the upper end of the clamp" in told
    page.hover("#pair-0 .t.c i:nth-child(1)")
    assert "clamp" not in page.inner_text("#token")


def test_what_is_no_number_is_shown_as_such(view, open_page):
    side = view.pairs[0].chosen
    measures = {**side.measures, "ref_logp": [math.nan] * 4}
    pair = dataclasses.replace(view.pairs[0], chosen=dataclasses.replace(side, measures=measures))
    page = open_page(dataclasses.replace(view, pairs=[pair]))
    page.hover("#pair-0 .t.c i:nth-child(3)")
    assert "log ref NaN" in page.inner_text("#token")


def test_the_keyboard_reaches_every_token(view, open_page):
    page = open_page(view)
    page.focus("#pair-2 .t.c.same")
    told = []
    for _ in range(5):
        told.append(page.inner_text("#token").split("token ")[1][:6])
        page.keyboard.press("ArrowRight")
    assert told == [f"{number} of 5" for number in (1, 2, 3, 4, 5)]  # over the border of the aligned rows
    page.keyboard.press("Home")
    assert "token 1 of 5" in page.inner_text("#token")


def test_the_controls_do_not_cover_the_panel(view, open_page):
    page = open_page(view, viewport={"width": 1000, "height": 400})
    page.evaluate("scrollBy(0, $('tools').getBoundingClientRect().bottom - innerHeight)")
    assert page.evaluate("document.elementFromPoint(innerWidth / 2, innerHeight - 10).closest('#panel') !== null")


def test_all_occurrences_of_a_token(view, open_page):
    page = open_page(view)
    page.click("#pair-0 .t.c i:nth-child(3)")
    # " sorry": 4.5; 0.7; 1, 2, 3, 2; 1, 1, 1, 1: ten with mean 1.72
    assert page.inner_text("#count") == "1 of 10, mean weight 1.72"
    page.click("#next")
    assert page.inner_text("#count").startswith("2 of 10")
    assert "rejected" in page.inner_text("#token")
    page.keyboard.press("n")
    assert page.inner_text("#count").startswith("3 of 10")
    page.keyboard.press("ArrowRight")  # from the occurrence on, not from the token that was clicked
    assert "token 2 of 5, chosen" in page.inner_text("#token")
    page.keyboard.press("Escape")
    assert not page.is_visible("#occurrences")


def test_search_filter_and_sort(view, open_page):
    page = open_page(view)
    page.fill("#search", "PROMPT OF SEC")
    assert _shown_pairs(page) == ["pair second"]
    assert page.inner_text("#found") == "1 of 3 pairs"
    page.fill("#search", "am sor")  # over the border of two tokens
    assert _shown_pairs(page) == ["pair first"]
    assert page.locator(".match").all_inner_texts() == ["am", "sorry"]
    page.fill("#search", "#5")  # the id of one token of the first pair
    assert _shown_pairs(page) == ["pair first"]
    assert page.locator(".match").count() == 1
    page.fill("#search", "rejected")  # a word of the page, and of no pair
    assert _shown_pairs(page) == []
    page.fill("#search", "")
    page.select_option("#filter", "against")
    assert _shown_pairs(page) == ["pair second"]
    page.select_option("#filter", "split:test")
    assert _shown_pairs(page) == ["pair third"]
    page.select_option("#filter", "")
    page.select_option("#sort", "effective")
    assert _shown_pairs(page) == ["pair second", "pair third", "pair first"]
    page.select_option("#sort", "")
    assert _shown_pairs(page) == ["pair first", "pair second", "pair third"]


def test_threshold_and_measure_change_the_colours(view, open_page):
    page = open_page(view)
    second, third = "#pair-0 .t.c i:nth-child(2)", "#pair-0 .t.c i:nth-child(3)"
    assert [page.get_attribute(each, "class") for each in (second, third)] == ["l8", "h8"]
    before = page.inner_text("#beyond")
    page.evaluate(
        "() => { const e = document.getElementById('threshold'); e.value = 8; e.dispatchEvent(new Event('input')); }"
    )
    assert page.inner_text("#beyond") != before
    assert page.get_attribute("#pair-0 .t.r i:nth-child(3)", "class") == ""  # weight 2 is step 4
    assert page.get_attribute(third, "class") == "h8"
    page.evaluate(
        "() => { const e = document.getElementById('threshold'); e.value = 0; e.dispatchEvent(new Event('input')); }"
    )
    page.select_option("#measure", "logratio")  # 1.0 and 1.5 nats of 2: steps 4 and 6
    assert [page.get_attribute(each, "class") for each in (second, third)] == ["h4", "h6"]
    assert page.inner_text("#scale-high") == "+2 nats"
    page.select_option("#measure", "surprise")  # 2 nats of 8: step 2
    assert page.get_attribute(second, "class") == "h2"


def test_a_comparison_shows_both_weights(compared, open_page):
    page = open_page(compared)
    page.hover("#pair-0 .t.c i:nth-child(2)")
    told = page.inner_text("#token")
    for part in ("weight in A 0.250", "weight in B 0.500", "B / A 2.00"):
        assert part in told
    page.select_option("#measure", "change")  # twice as heavy everywhere: half of two doublings
    assert set(page.evaluate("() => [...document.querySelectorAll('.t i')].map((e) => e.className.split(' ')[0])")) == {
        "h4"
    }
    assert "hh/ti@1" in page.inner_text("h1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_colour(view, open_page, scheme):
    page = open_page(view, color_scheme=scheme)
    contrasts = page.evaluate("""() => {
        const parts = (text) => {
            const numbers = text.match(/[\\d.]+/g).map(Number), unit = text.startsWith("color") ? 1 : 255;
            return [...numbers.slice(0, 3).map((each) => each / unit), numbers[3] ?? 1];
        };
        const ground = parts(getComputedStyle(document.body).backgroundColor);
        const luminance = (rgb) => rgb.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ink = luminance(parts(getComputedStyle(document.querySelector(".t")).color).slice(0, 3));
        return [...document.querySelectorAll(".legend .scale i")].map((each) => {
            const colour = parts(getComputedStyle(each).backgroundColor);
            const mixed = [0, 1, 2].map((i) => colour[i] * colour[3] + ground[i] * (1 - colour[3]));
            const other = luminance(mixed);
            return (Math.max(ink, other) + 0.05) / (Math.min(ink, other) + 0.05);
        });
    }""")
    assert len(contrasts) == 17
    assert min(contrasts) >= 4.5
    assert contrasts[0] < contrasts[8] > contrasts[16]  # the ends are coloured, the middle is not


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_nothing_to_say(view, compared, browser, tmp_path, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python (extra dev)"
    ).Axe()
    for name, each in (("one", view), ("two", compared)):
        path = tmp_path / f"{name}.html"
        path.write_text(render(each), encoding="utf-8")
        context = browser.new_context(color_scheme=scheme, bypass_csp=True)  # the checker is a script of its own
        page = context.new_page()
        page.goto(path.as_uri())
        found = [
            (each["id"], [node["html"] for node in each["nodes"]]) for each in axe.run(page).response["violations"]
        ]
        context.close()
        assert found == []


def test_a_narrow_window_cuts_off_no_control(view, open_page):
    page = open_page(view, viewport={"width": 400, "height": 800})
    assert (
        page.evaluate("Math.max(...[...$('tools').querySelectorAll('*')].map((e) => e.getBoundingClientRect().right))")
        <= 400
    )


def test_high_contrast_keeps_the_colours_of_tokens(view, open_page):
    page = open_page(view, forced_colors="active")
    found = page.evaluate(
        "() => [1, 2, 3].map((n) => getComputedStyle($('pair-0').querySelector(`.t.c i:nth-child(${n})`)).backgroundColor)"
    )
    assert len(set(found)) == 3  # weights 1, 0.25 and 4.5: none, blue and orange


def test_without_javascript_the_pairs_can_be_read(view, open_page):
    page = open_page(view, java_script_enabled=False)
    assert "I am sorry" in page.inner_text("#pair-0 .t.c")
    assert page.locator(".legend").is_visible()
    assert not page.locator("#tools").is_visible()
    assert not page.locator("#panel").is_visible()
    assert "With JavaScript" in page.locator("noscript").inner_text()


def test_print_leaves_out_what_needs_a_pointer(view, open_page):
    page = open_page(view)
    page.emulate_media(media="print")
    assert not page.locator("#tools").is_visible()
    assert not page.locator("#panel").is_visible()
    assert page.locator("#pair-2").is_visible()

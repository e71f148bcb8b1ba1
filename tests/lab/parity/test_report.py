"""The report: one file that a real browser shows, with the network refused, in light and dark, by keyboard."""

import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner

from minisd.cli.parity import parity
from minisd.lab.parity.evidence import BINS, Evidence, heat, histogram, ulp
from minisd.lab.parity.report import heat_colour, number, report
from minisd.lab.parity.verdict import SAME, UNKNOWN, ModulePair, Rung, Verdict

CULPRIT = "unet.down.0.resnet.norm1"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The embedded model beside a copy with a wrong epsilon, as the command writes it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = CliRunner().invoke(parity, ["--demo", "eps-resnet", "--html", str(path), "-q"], standalone_mode=False)
    assert result.return_value == 1 and result.stdout.splitlines()[-1] == str(path)
    return path


@pytest.fixture(scope="module")
def chromium():
    """Without a browser a laptop skips; CI has one."""
    place = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if place is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_one_small_file_that_asks_nobody(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text) and "url(" not in text
    assert "default-src 'none'" in text


def test_where_every_pair_differs_it_is_small_too(tmp_path):
    """In bfloat16 no module gives the same bits: every page has its map."""
    arguments = ["minisd:emoji", "minisd:emoji@bfloat16", "--html", str(tmp_path / "x.html"), "-q"]
    result = CliRunner().invoke(parity, arguments, standalone_mode=False)
    assert result.return_value == 0
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000 and "Same function, other precision" in text


def test_what_it_says(page):
    text = page.read_text(encoding="utf-8")
    for words in ("Different function", "eps 1e-05 (A), 1e-06 (B)", "minisd parity --demo eps-resnet", "not compared"):
        assert words in text, words
    assert text.count('<section class="page"') > 300 and text.count('data-tone="culprit"') == 1
    assert text.count("data:image/png") > 6  # the pictures, and heat maps


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_in_a_browser(page, chromium, scheme):
    heard = []
    context = chromium.new_context(color_scheme=scheme, offline=True)
    tab = context.new_page()
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    tab.keyboard.press("c")
    section = tab.locator(".page:target")
    assert section.get_attribute("aria-label") == CULPRIT and section.is_visible()
    assert "1e-06" in section.inner_text() and section.locator("img").count() == 1
    tab.keyboard.press("j")
    assert tab.locator(".page:target").get_attribute("aria-label") != CULPRIT
    tab.keyboard.press("Escape")
    assert tab.locator(".page:target").count() == 0 and tab.locator("h1").inner_text() == "Different function"
    tab.get_by_role("link", name=CULPRIT).first.click()
    assert tab.locator(".page:target").get_attribute("aria-label") == CULPRIT
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert heard == []
    context.close()


def test_all_columns_are_seen_in_a_narrow_window(page, chromium):
    context = chromium.new_context(viewport={"width": 700, "height": 900}, offline=True)
    tab = context.new_page()
    tab.goto(page.as_uri())
    fits = "[...document.querySelectorAll('.tree')].every(tree => tree.scrollWidth <= tree.clientWidth)"
    assert tab.evaluate(fits)
    tab.keyboard.press("c")
    path = "/usr/lib/python3/site-packages/somebody/models/" + "a_long_folder_name/" * 6 + "file.py:123"
    tab.evaluate("path => document.querySelectorAll('.page:target .twins td').forEach(td => td.append(path))", path)
    assert tab.evaluate("(page => page.scrollWidth <= page.clientWidth)(document.querySelector('.page:target'))")
    context.close()


def test_without_float64_nothing_is_green():
    """A trace in float32: what is within rounding is not proved, what is beyond is worth a look."""
    rungs = [
        Rung("tokens", "exact", status=SAME, absmax=0.0),
        Rung("text embedding", "network", status=SAME, r64=1.2),
        Rung("UNet, step 0", "network", status=UNKNOWN, r64=900.0),
    ]
    pairs = [ModulePair("unet.conv_in", "conv_in", "conv_in", "", status=UNKNOWN, r64=900.0, culprit=True)]
    text = report(Verdict(UNKNOWN, "cannot tell: ...", "trace:a", "minisd:b", rungs=rungs, pairs=pairs), Evidence())
    assert '<td class="same">same function<td' in text  # the tokens are equal
    assert '<td class="unknown">within rounding<td' in text and '<td class="look">look<td' in text
    assert text.count(">same function<") == 1 and "A's inputs, in float64" not in text
    assert "Look here: it is off" in text and "The culprit" not in text


def test_bad_names_are_refused_before_the_work():
    for arguments in (["--html", "report.txt"], ["--html", "/nowhere/x.html"], ["--save", "x.tar"]):
        result = CliRunner().invoke(parity, ["--demo", *arguments])
        assert isinstance(result.exception, ValueError) and "must be a name that ends in" in str(result.exception)


# ------------------------------------------------ what was seen


def test_units_in_the_last_place():
    x = torch.tensor([1.0, 1.5, 2.0, -3.0, 100.0])
    after = torch.nextafter(x, torch.full_like(x, torch.inf) * x.sign())
    assert torch.equal(ulp(x), (after - x).abs().double())
    assert ulp(torch.tensor([1.0], dtype=torch.bfloat16)) == 2**-7


def test_the_histogram_counts_ulps():
    a = torch.ones(100)
    b = a.clone()
    b[:10] += 2**-23  # one
    b[10:15] += 3 * 2**-23  # three: up to four
    b[15] = torch.nan
    counts = histogram(a, b)
    assert (counts[0], counts[1], counts[3], counts[BINS - 1], sum(counts)) == (84, 10, 5, 1, 100)


def test_the_worst_call_is_kept():
    evidence = Evidence()
    a = torch.zeros(2, 3, 4, 4)
    for size, stage in ((0.5, "one"), (2.0, "two"), (1.0, "three")):
        b = a.clone()
        b[1, 2, 3, 0] = size
        evidence("part", stage, a.double(), a, b, b.double())
    sight = evidence.sights["part"]
    assert (sight.stage, sight.distance, sight.exact, sight.worst[0]) == (
        "two",
        2.0,
        True,
        ((1, 2, 3, 0), 0.0, 2.0, 0.0),
    )
    assert sight.heat[3][0] == 2.0 and sum(map(sum, sight.heat)) == 2.0


def test_heat_maps_are_small():
    assert [len(heat(torch.rand(size))) for size in ((7,), (100, 3), (2, 77, 512))] == [1, 12, 12]


def test_numbers_and_colours():
    assert [number(value) for value in (None, 0.0, 1.23, 1.2e-7, float("inf"))] == ["–", "0", "1.2", "1.2e-07", "inf"]
    assert heat_colour(1.0) == "hsl(140 60% 45%)" and heat_colour(1e9) == "hsl(0 60% 45%)"

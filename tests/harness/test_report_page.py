"""The page in a real browser, on a real report."""

import json
import re
import subprocess
import sys

import pytest

from harness.report.document import Section
from harness.report.page import write_page
from tests.conftest import ROOT
from tests.harness.fake_results import write_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two schedulers, three variants and seven seeds, written by the real command."""
    folder = tmp_path_factory.mktemp("page")
    path = write_study(folder, ("off", "on", "normalized", "zero"), range(7))
    write_study(folder, ("off", "on", "normalized", "zero"), range(7), scheduler="asha")
    done = subprocess.run([sys.executable, "-m", "harness.report", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path / "report"


def texts(table, column):
    return [row.find_elements("tag name", "td")[column].text for row in table.find_elements("css selector", "tbody tr")]


def test_a_click_sorts_and_another_sorts_the_other_way(report, browser):
    browser.set_window_size(1300, 900)
    browser.get((report / "index.html").as_uri())
    block = browser.find_element("id", "table-busy-seconds_all")
    table = block.find_element("tag name", "table")
    heads = [head.text for head in table.find_elements("css selector", "thead th")]
    for column, key in ((heads.index("variant"), str), (heads.index("train (s)"), float)):
        before = texts(table, column)
        button = table.find_elements("css selector", "thead button")[column]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        assert texts(table, column) == sorted(before, key=key)
        button.click()
        assert texts(table, column) == sorted(before, key=key, reverse=True)
    assert table.find_elements("css selector", "th[aria-sort]")[0].text.startswith("train (s)")


def test_words_filter_the_rows_of_a_long_table(report, browser, tmp_path):
    browser.set_window_size(1300, 900)
    browser.get((report / "index.html").as_uri())
    field = browser.find_element("css selector", ".table input")
    block = field.find_element("xpath", "./..")
    rows = block.find_elements("css selector", "tbody tr")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
    field.send_keys("Zero")
    shown = [row for row in rows if row.is_displayed()]
    assert 0 < len(shown) < len(rows)
    assert all("zero" in row.text for row in shown)
    browser.save_screenshot(str(tmp_path / "filtered.png"))
    field.clear()
    field.send_keys(" ")
    assert all(row.is_displayed() for row in rows)


def test_the_page_is_whole_without_network_and_without_errors(report, browser, tmp_path):
    page = (report / "index.html").read_text()
    assert not re.search(r"""\b(src|href)="(?!data:|#)""", page)
    browser.get((report / "index.html").as_uri())
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    pictures = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 100)")
    assert pictures
    assert all(pictures)
    first = browser.find_element("css selector", "main section")
    assert first.get_attribute("id") == "verdict"  # the verdict is what a reader sees first
    verdict = json.loads((report / "verdict.json").read_text())
    assert verdict["sentence"] in first.text
    browser.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_a_phone_shows_everything_without_scrolling_sideways(report, browser):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})  # fmt: skip
    browser.get((report / "index.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_print_shows_all_rows_and_no_controls(report, browser):
    browser.get((report / "index.html").as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element("tag name", "nav").is_displayed()
    overflow = "return getComputedStyle(document.querySelector('.scroll')).overflowY"
    assert browser.execute_script(overflow) == "visible"


def test_what_a_user_named_is_text_and_not_markup(tmp_path):
    section = Section("a", "<b>A</b>", text=["<script>alert(1)</script>"], notes=['"><img src=x>'])
    write_page(tmp_path / "index.html", "T & <T>", [section], tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "T &amp; &lt;T&gt;" in page

"""The site builds strictly, every link in it leads somewhere, and nothing is fetched from elsewhere."""

import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.chromium import chromium

import torchmto

ROOT = Path(__file__).parents[2]
SETS_PAGE = {"a": "href", "link": "href", "script": "src", "img": "src", "iframe": "src"}

BROKEN_WORDS = """
const broken = [];
for (const cell of document.querySelectorAll(".md-content :is(td, th)")) {
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) for (const word of texts.currentNode.data.matchAll(/\\w+/g)) {
        const range = document.createRange();
        range.setStart(texts.currentNode, word.index);
        range.setEnd(texts.currentNode, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((line) => Math.round(line.top))).size > 1) broken.push(word[0]);
    }
}
return broken
"""


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        target = values.get(SETS_PAGE.get(tag, ""))
        if target:
            self.links.append((tag, values.get("rel"), target))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the site needs the extra: pip install 'torchmto[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_link_leads_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for tag, _, target in page.links:
            parts = urlsplit(target)
            if parts.scheme in {"http", "https", "mailto", "data"}:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if place.is_dir():
                place /= "index.html"
            known = parts.fragment in {"", "__comments"} or (
                place in pages and unquote(parts.fragment) in pages[place].anchors
            )
            if path.name != "404.html" and not (place.is_file() and known):
                broken.append((path.relative_to(site).as_posix(), tag, target))
    assert not broken


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site, pages):
    fetched = [link for page in pages.values() for link in page.links if link[0] != "a" and link[1] != "canonical"]
    assert [link for link in fetched if urlsplit(link[2]).scheme in {"http", "https"}] == []
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert [found for text in styles for found in re.findall(r"url\(['\"]?https?:", text)] == []


@pytest.mark.slow
def test_every_public_name_has_a_signature_and_every_page_is_in_the_navigation(site, pages):
    named = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "api"))
    public = {name for name in torchmto.__all__ if not name.startswith("__") and name not in {"metrics", "structure"}}
    assert public - {anchor.rpartition(".")[2] for anchor in named} == set()
    links = {
        (site / "x").parent.joinpath(target.partition("#")[0]).resolve()
        for _, _, target in pages[site / "index.html"].links
    }
    assert {path for path in pages if path.name != "404.html"} <= links


@pytest.mark.slow
def test_formulas_are_drawn(pages):
    text = (next(path for path in pages if path.name == "pcgrad.html")).read_text("utf-8")
    assert "<math " in text
    assert [path.name for path in pages if "arithmatex" in path.read_text("utf-8")] == []


@pytest.mark.slow
def test_pages_fit_a_phone_and_the_search_works_from_files(site, pages, tmp_path):
    with chromium(tmp_path) as browser:
        browser.view(390, 844, phone=True)
        for path in pages:
            browser.open(path)
            assert browser.run("return document.documentElement.scrollWidth") <= 390, path.name
            assert browser.run(BROKEN_WORDS) == [], path.name
        browser.view(1280, 1000)
        browser.open(site / "index.html")
        browser.type(".md-search__input", "connection_strength")
        found = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
        while not (links := browser.run(found)):
            time.sleep(0.1)
        assert any("methods/connection_strength.html" in link for link in links)
        assert [url for url in browser.requests() if url.startswith("http")] == []

"""The site builds strictly, every link in it leads somewhere, and nothing is fetched from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import torchmto

ROOT = Path(__file__).parents[2]
SETS_PAGE = {"a": "href", "link": "href", "script": "src", "img": "src", "iframe": "src"}


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

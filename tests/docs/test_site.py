"""The site: it builds without a warning, every link on it leads somewhere, and nothing on it needs a network.

Skipped without the extra "docs". One build, as docs/index.md says, is what all tests look at.
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("sphinx")

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What the tests ask of a page: its links, what it loads, its anchors, its text outside of code and formulas."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.words: list[str] = []
        self.formulas = 0
        self.inside: list[str] = []  # of the elements whose text is no prose
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in LOADED and LOADED[tag] in given:
            self.loads.add(given[LOADED[tag]])
        self.formulas += tag == "math"
        if tag in ("code", "pre", "script", "style", "math", "svg"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, text: str) -> None:
        if not self.inside:
            self.words.append(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site by their paths, from its root."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", str(folder / ".trees")]
    built = subprocess.run(
        [*command, str(ROOT / "docs"), str(folder / "html")], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    root = folder / "html"
    return root, {path.relative_to(root).as_posix(): Page(path) for path in root.rglob("*.html")}


def test_every_chapter_has_its_page(site):
    _, pages = site
    chapters = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert {"index.html", "derivations/conv2d.html"} <= chapters <= set(pages)


def test_every_link_leads_somewhere(site):
    root, pages = site
    broken = []
    for name, page in pages.items():
        for link in page.links | page.loads:
            if re.match(r"(https?|mailto|data|javascript):", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            path = (page.path.parent / target.partition("?")[0]).resolve() if target else page.path
            found = pages.get(path.relative_to(root).as_posix()) if path.is_relative_to(root) else None
            if not path.exists() or (anchor and found and anchor not in found.anchors):
                broken.append(f"{name}: {link}")
    assert not broken, "\n".join(sorted(broken))


def test_nothing_is_loaded_from_a_network(site):
    root, pages = site
    remote = {
        f"{name}: {load}" for name, page in pages.items() for load in page.loads if re.match(r"(https?:)?//", load)
    }
    assert not remote
    for sheet in root.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_formulas_are_drawn(site):
    _, pages = site
    assert pages["derivations/batch_norm2d.html"].formulas > 40
    for name, page in pages.items():
        assert not re.search(r"\$[^$\n]*\\[a-z]+|\\\(|\\\[", "".join(page.words)), f"{name}: a formula as plain text"


def test_the_search_finds_words_of_the_course(site):
    root, _ = site
    index = (root / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    assert "dweight" in index
    assert "derivations/conv2d" in index


def test_the_reference_shows_docstrings_and_leads_to_the_source(site):
    _, pages = site
    page = pages["api/mathematics.html"]
    assert "minunet.ops.conv2d.conv2d_backward" in page.anchors
    assert any(re.fullmatch(r"\.\./source/minunet/ops/conv2d\.py\.html#L-\d+", link) for link in page.links)


@pytest.fixture
def window(browser):
    """A page of the browser, which keeps a list of the addresses outside this disk that it was told to ask for."""
    page = browser.new_page()
    page.set_default_timeout(120_000)  # a machine may be busy with other tests
    page.asked = []
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or page.asked.append(request.url))
    yield page
    page.close()


#: What reaches beyond the screen, or beyond the column of the text; what scrolls by itself does not count.
TOO_WIDE = """() => {
  const text = document.querySelector(".content");
  const overflow = text.scrollWidth > text.clientWidth + 1 || text.getBoundingClientRect().right > innerWidth + 1;
  return overflow || document.documentElement.scrollWidth > innerWidth;
}"""


def test_every_chapter_fits_the_screen(window, site):
    root, pages = site
    names = [name for name in pages if not name.startswith(("source/", "interactive/"))]
    wide = []
    for name in [*names, "source/README.md.html", "source/minunet/network/unet.py.html"]:
        window.goto((root / name).as_uri())
        for width in (1400, 1000, 800, 390):
            window.set_viewport_size({"width": width, "height": 844})
            if window.evaluate(TOO_WIDE):
                wide.append(f"{name} at {width} pixels")
    assert not wide, "\n".join(wide)
    assert window.asked == []


def test_the_search_works_from_the_disk(window, site):
    root, _ = site
    window.goto((root / "index.html").as_uri())
    window.fill("input.sidebar-search", "dweight")
    window.keyboard.press("Enter")
    found = window.locator(".search li a")
    found.first.wait_for()
    window.wait_for_function("document.querySelector('.search-summary').textContent.includes('found')")
    assert any(
        link.endswith("derivations/conv2d.html")
        for link in found.evaluate_all("all => all.map((a) => a.href.split('#')[0].split('?')[0])")
    )
    assert window.asked == []

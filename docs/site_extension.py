"""What the site needs beyond Sphinx and MyST: formulas, links into the repository, and docstrings that are plain text.

The pages are the Markdown that GitHub shows, with nothing in it that only Sphinx understands. Nothing on the site needs
a network. Formulas become MathML when it is built, by latex2mathml (pure Python, no dependencies); every current
browser draws that by itself, so there is no script and no font to ship or to load. The search is Sphinx's index. What a
page links to in the repository, but outside this folder, gets a page of its own under ``source/``.
"""

import importlib
import inspect
import posixpath
import re
import shutil
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent


# --- formulas ---------------------------------------------------------------------------------------------------------


def mathml(translator: Any, node: nodes.Element) -> None:
    """Write a formula as MathML. A command that the converter does not know, and would print, stops the build."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    if "\\" in formula:
        raise ExtensionError(
            f"{node.source}:{node.line}: {node.astext()!r} holds a command that latex2mathml does not know"
        )
    translator.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


class JoinedFormulas(SphinxTransform):
    """Holds a formula and the comma after it together: else the comma may begin the next line."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Put both into an element of the class ``joined``, within which no line ends (static/minunet.css)."""
        for node in list(self.document.findall(nodes.math)):
            parent = node.parent
            place = parent.index(node)
            after = parent[place + 1].astext() if place + 1 < len(parent) else ""
            if (mark := re.match(r"[,.;:)?!]+", after)) and isinstance(parent[place + 1], nodes.Text):
                parent[place + 1] = nodes.Text(after[mark.end() :])
                joined = nodes.inline("", "", classes=["joined"])
                parent[place] = joined
                joined += [node, nodes.Text(mark[0])]


# --- links into the repository ----------------------------------------------------------------------------------------

SOURCES = ("minunet", "examples", "tests", "benchmarks", "docs/exercises", "docs/figures", "docs/notebook")
TEXT = {".py", ".md", ".toml", ".c", ".h", ".cpp", ".cu", ".cuh"}


def source_files() -> list[Path]:
    """The files that get a page under ``source/``: all code, and the Markdown outside docs/."""
    found = [path for folder in SOURCES for path in (ROOT / folder).rglob("*")]
    found += [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "LICENSE"]
    pages = {path for path in found if path.suffix == ".md" and path.is_relative_to(DOCS)}  # these Sphinx reads itself
    return sorted(p for p in {*found} - pages if p.is_file() and (p.suffix in TEXT or p.parent == ROOT))


def site_path(path: Path) -> str:
    """Where a file of the repository stands on the site, from the site's root."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_relative_to(DOCS / "interactive"):
        return name.removeprefix("docs/")
    if path.is_relative_to(DOCS / "pictures"):
        return f"_images/{path.name}"
    if path.is_relative_to(DOCS) and path.suffix == ".md":
        return name.removeprefix("docs/").removesuffix(".md") + ".html"
    return f"source/{name}.html"


class LinkedPictures(SphinxTransform):
    """Makes each picture a link to itself alone, as GitHub does: on a phone its letters are small."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Put a reference around each picture."""
        for node in list(self.document.findall(nodes.image)):
            path = Path(self.env.relfn2path(node["uri"], self.env.docname)[1])
            up = "../" * self.env.docname.count("/")
            reference = nodes.reference("", "", refuri=up + site_path(path.resolve()))
            node.replace_self(reference)
            reference += node


class RepositoryLinks(SphinxTransform):
    """Turns a link to a file outside docs/ into a link to its page under ``source/``."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Replace the nodes that MyST made of such links: downloads, and references to documents that are none."""
        here, pages = self.env.docname, set(source_files())
        for node in list(self.document.findall(addnodes.download_reference)):
            target = Path(self.env.relfn2path(node["reftarget"], here)[1]).resolve()
            if target in pages or target.is_relative_to(DOCS / "interactive"):  # the others stay downloads
                self.replace(node, target)
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node.get("refdomain") == "doc" and node["reftarget"] not in self.env.found_docs:
                self.replace(node, Path(node["reftarget"] + ".md"))

    def replace(self, node: nodes.Element, target: Path) -> None:
        """Put a plain reference in the place of ``node``."""
        up = "../" * self.env.docname.count("/")
        anchor = f"#{node['reftargetid']}" if node.get("reftargetid") else ""
        reference = nodes.reference("", "", *node.children, refuri=up + site_path(target.resolve()) + anchor)
        node.replace_self(reference)


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages under ``source/``: code with a number and an anchor for each line, Markdown as HTML."""
    for path in source_files():
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        body = rendered(path, text) if path.suffix == ".md" else f"<h1>{escape(name)}</h1>" + coloured(path, text)
        yield f"source/{name}", {"title": name, "body": body, "parents": [], "toc": ""}, "page.html"


def coloured(path: Path, text: str) -> str:
    """Source code as HTML."""
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        return f"<pre>{escape(text)}</pre>"
    return highlight(text, lexer, HtmlFormatter(linenos="inline", lineanchors="L", cssclass="highlight"))


def highlighted(text: str, language: str, _: str) -> str:
    """A fenced block of Markdown, coloured."""
    lexer = get_lexer_by_name(language or "text")
    return f"<pre class='highlight'>{highlight(text, lexer, HtmlFormatter(nowrap=True))}</pre>"


def rendered(path: Path, text: str) -> str:
    """A Markdown file outside docs/ as HTML, its headings with anchors, its links and pictures led to the site."""
    markdown = MarkdownIt("commonmark", {"highlight": highlighted}).enable("table")
    html = markdown.render(re.sub(r"^<!--.*?-->\n", "", text, flags=re.MULTILINE))
    here = posixpath.dirname(f"source/{path.relative_to(ROOT).as_posix()}")

    def led(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", match["target"]) or not target:
            return match[0]
        there = site_path((path.parent / target).resolve())
        return f'{match["attribute"]}="{posixpath.relpath(there, here)}{"#" + anchor if anchor else ""}"'

    def anchored(match: re.Match[str]) -> str:
        words = re.sub(r"<[^>]+>", "", match["words"])
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        return f'<h{match["level"]} id="{anchor}">{match["words"]}</h{match["level"]}>'

    html = html.replace("<table>", '<div class="table-wrapper"><table class="docutils">').replace(
        "</table>", "</table></div>"
    )
    html = re.sub(r'(?P<attribute>href|src)="(?P<target>[^"]+)"', led, html)
    return re.sub(r"<h(?P<level>\d)>(?P<words>.*?)</h\d>", anchored, html)


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Where the [source] of an entry of the reference leads: its first line, on the page of its file.

    All pages of the reference are in api/, one folder below the root.
    """
    if domain != "py":
        return None
    place: Any = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        place = getattr(place, part, None)
    place = place.fget if isinstance(place, property) else place
    place = inspect.unwrap(place)
    try:
        file, (_, line) = inspect.getsourcefile(place), inspect.getsourcelines(place)
    except TypeError:  # a constant, or a field: it has no line of its own
        return None
    path = Path(str(file)).resolve()
    return f"../{site_path(path)}#L-{line}" if path.is_relative_to(ROOT) else None


# --- what the site needs and GitHub does not --------------------------------------------------------------------------


#: Pages below a page, which only links to them.
SUBPAGES = {"exercises": "exercises/**", "speed": "engines/*"}


def expanded(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give Sphinx the directives that would only disturb a reader of the Markdown.

    index.md lists the chapters as links, in reading order: a table of contents with a caption for each line in bold. A
    page of api/ lists modules: each gets its docstrings.
    """
    if docname == "index":
        source[0] += table_of_contents(source[0])
    elif docname in SUBPAGES:
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{SUBPAGES[docname]}\n```\n"
    elif docname.startswith("api/"):
        module = r"^- \[(minunet[\w.]*)\]\(.*\)$"
        entry = r"## `\1`\n\n```{eval-rst}\n.. automodule:: \1\n```\n"
        source[0] = re.sub(module, entry, source[0], flags=re.MULTILINE)


def table_of_contents(index: str) -> str:
    """The ``toctree`` directives for the list of chapters in ``index``."""
    result = ""
    for line in index.splitlines():
        if caption := re.match(r"\*\*(.+?)\*\*", line):
            result += ("```\n" if result else "") + f"\n```{{toctree}}\n:hidden:\n:caption: {caption[1]}\n\n"
        elif result and re.match(r"\d+\. |- ", line):
            pages = re.findall(r"\]\(([\w/]+)\.md\)", line)
            result += "".join(f"{page}\n" for page in pages)
    return result + "```\n"


# --- docstrings -------------------------------------------------------------------------------------------------------


def plain_text(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, which is plain text: formulas and columns are shown as they stand.

    What is kept as markup: ``code``, references, lists, tables of ``===``, examples, and blocks after ``::``.
    """
    result: list[str] = []
    introduced = False  # whether the block before ended with "::"
    for block in re.split(r"\n{2,}", "\n".join(lines).strip("\n")):
        first = block.lstrip()
        indented = block.startswith(" ")
        columns = re.search(r"(?m)^ +\S|^[\w\[\]., ]+\S {2,}\S", block)  # an indented line, or "name    what it is"
        if (indented and introduced) or first.startswith((">>>", "===", ":", "..")):
            shown = block
        elif indented or (columns and not first.startswith("- ")):
            shown = "::\n\n" + textwrap.indent(block, "    ")
        else:
            shown = escaped(block)
        introduced = block.endswith("::") or (introduced and indented)
        result += [*shown.split("\n"), ""]
    lines[:] = result


def escaped(paragraph: str) -> str:
    """``paragraph`` with a backslash before what reStructuredText would take for markup, except in ``code``."""
    paragraph = re.sub(r"\bdocs/([\w/]+)\.md\b", r":doc:`docs/\1.md </\1>`", paragraph)  # a page that it names: a link
    parts = re.split(r"(``.+?``|:\w+:`.+?`)", paragraph, flags=re.DOTALL)
    parts[::2] = [re.sub(r"([|*\\])|(?<=\w)_(?!\w)", lambda found: "\\" + found[0], part) for part in parts[::2]]
    return "".join(parts)


def skipped(app: Sphinx, what: str, name: str, item: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of a NamedTuple: Python's own docstring, "Alias for field number 0", says nothing."""
    return True if (inspect.getdoc(item) or "").startswith("Alias for field number") else None


def copy_interactive(app: Sphinx, exception: Exception | None) -> None:
    """The interactive pages are whole as they are: HTML and JavaScript that also work from the disk.

    There the pages that they link to are Markdown, and here they are HTML: the one thing to change.
    """
    if exception is None and app.builder.format == "html" and (DOCS / "interactive").is_dir():
        folder = Path(app.outdir) / "interactive"
        no_code = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(DOCS / "interactive", folder, dirs_exist_ok=True, ignore=no_code)
        for page in folder.glob("*.html"):
            text = re.sub(r'(href="\.\./[\w/]+)\.md"', r'\1.html"', page.read_text(encoding="utf-8"))
            page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.add_html_math_renderer("latex2mathml", (mathml, None), (mathml, None))
    app.add_transform(JoinedFormulas)
    app.add_transform(LinkedPictures)
    app.add_transform(RepositoryLinks)
    app.connect("source-read", expanded)
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-skip-member", skipped)
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", copy_interactive)

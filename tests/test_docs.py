"""The pages say what the code does: their examples run, their quotes are the source, their links lead somewhere."""

import ast
import doctest
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from minunet import ops

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPS = sorted(name.removesuffix("_forward") for name in ops.__all__ if name.endswith("_forward"))

QUOTE_MARKER = re.compile(r"<!-- from (?P<path>\S+): (?P<name>[\w.]+) -->")
LINK = re.compile(r"!?\[[^\]]*\]\(<?(?P<target>[^)\s>]+)>?\)")
REPOSITORY_PATH = re.compile(r"(?<![\w./-])((?:minunet|tests|docs|examples|benchmarks)/[\w./-]+\.(?:py|md))")
COMMAND_MODULE = re.compile(r"python -m (minunet[\w.]*)")
DISPLAY_MATHS = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
INLINE_MATHS = re.compile(r"(?<![\w$`])\$(?!`)([^$\n]+?)\$(?![\w$])")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block: where it starts, its language, its text, and the last line of prose before it."""

    line: int
    language: str
    text: str
    before: str


def fenced_blocks(text: str) -> Iterator[Block]:
    before, lines, start, language = "", [], None, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if start is None and line.startswith("```"):
            start, language, lines = number, line.removeprefix("```").strip(), []
        elif start is not None and line.rstrip() == "```":
            yield Block(start, language, "\n".join(lines), before)
            start, before = None, ""
        elif start is not None:
            lines.append(line)
        elif line.strip():
            before = line.strip()
    assert start is None, f"the block opened in line {start} is never closed"


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_python_block_is_a_quote_or_runs(page):
    """The blocks of a page are one session, from top to bottom, as a reader would type them."""
    session = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    report: list[str] = []
    for block in fenced_blocks(page.read_text()):
        if block.language != "python" or QUOTE_MARKER.fullmatch(block.before):
            continue
        name = f"{page_id(page)}:{block.line}"
        assert ">>>" in block.text, f"{name}: neither a quote (marked <!-- from FILE: NAME -->) nor an example (>>>)"
        example = doctest.DocTestParser().get_doctest(block.text, session, name, str(page), block.line)
        runner.run(example, out=report.append, clear_globs=False)
        session.update(example.globs)
    assert not runner.failures, "".join(report)


# --- quotes -----------------------------------------------------------------------------------------------------------


def definition(path: Path, name: str) -> list[str]:
    """The source lines of the function, class or method ``name`` ("UNet.backward") in ``path``, decorators left out."""
    source = path.read_text()
    body = ast.parse(source).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise LookupError(f"{path.relative_to(ROOT)} has no {name}")
        node = found[-1]
        body = getattr(node, "body", [])
    return source.splitlines()[node.lineno - 1 : node.end_lineno]


def quoted(quote: str, lines: list[str]) -> bool:
    """Whether every part of ``quote`` stands in ``lines``, in order; ``...`` stands for lines left out."""
    position = 0
    for part in re.split(r"^[ ]*\.\.\.$", quote, flags=re.MULTILINE):
        wanted = textwrap.dedent(part).strip("\n")
        length = wanted.count("\n") + 1
        for start in range(position, len(lines) - length + 1):
            if textwrap.dedent("\n".join(lines[start : start + length])) == wanted:
                position = start + length
                break
        else:
            return False
    return True


def quotes(page: Path) -> Iterator[tuple[Block, Path, str]]:
    for block in fenced_blocks(page.read_text()):
        if marker := QUOTE_MARKER.fullmatch(block.before):
            yield block, ROOT / marker["path"], marker["name"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_quotes_are_the_source(page):
    wrong = []
    for block, path, name in quotes(page):
        if not block.text.strip() or not quoted(block.text, definition(path, name)):
            wrong.append(f"{page_id(page)}:{block.line} is not (or no longer) in {name} of {path.relative_to(ROOT)}")
    assert not wrong, "\n".join(wrong)


def test_every_marker_has_its_block():
    for page in PAGES:
        markers = re.findall(rf"^{QUOTE_MARKER.pattern}$", page.read_text(), flags=re.MULTILINE)
        assert len(markers) == len(list(quotes(page))), page_id(page)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_page_that_quotes_forward_and_backward(op):
    named = {name for _, _, name in quotes(ROOT / "docs" / "derivations" / f"{op}.md")}
    assert {f"{op}_forward", f"{op}_backward"} <= named


def test_a_changed_line_is_noticed():
    lines = ["def f(x):", '    """Twice x."""', "    # comment", "    y = 2 * x", "    return y"]
    assert quoted("y = 2 * x\nreturn y", lines)
    assert quoted("def f(x):\n    ...\n    return y", lines)
    assert not quoted("y = 3 * x\nreturn y", lines)
    assert not quoted("return y\n...\ny = 2 * x", lines)
    assert not quoted("y = 2 * x\n    return y", lines)


# --- the tour ---------------------------------------------------------------------------------------------------------


def test_the_tour_meets_every_file_and_none_before_what_it_needs():
    order = list(
        dict.fromkeys(re.findall(r"\(\.\./((?:minunet|examples)/[\w/]+\.py)\)", (ROOT / "docs/tour.md").read_text()))
    )
    modules = {page_id(path) for path in (ROOT / "minunet").rglob("[!_]*.py")}
    assert modules <= set(order), f"not in docs/tour.md: {sorted(modules - set(order))}"
    early = []
    for place, path in enumerate(order):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                needed = {name.replace(".", "/") + ".py" for name in names}
                early += [f"{path} needs {later}" for later in order[place + 1 :] if later in needed]
    assert not early, early


# --- links and maths --------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """GitHub's anchors: a heading in lower case, without punctuation, with hyphens for blanks."""
    headings = re.findall(r"^#+ +(.+?)\s*$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = page.read_text()
    broken = []
    for target in (match["target"] for match in LINK.finditer(without_blocks(text))):
        if re.match(r"[a-z]+:", target):  # https:, mailto:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    broken += [path for path in REPOSITORY_PATH.findall(text) if not (ROOT / path).exists()]
    broken += [name for name in COMMAND_MODULE.findall(text) if not importlib.util.find_spec(name)]
    assert not broken, f"{page_id(page)}: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_maths_reaches_the_reader(page):
    """Markdown runs before the maths: it eats a backslash before punctuation and takes ``}_`` for emphasis."""
    text = without_blocks(page.read_text())
    formulas = DISPLAY_MATHS.findall(text)
    assert text.count("\n$$\n") == 2 * len(formulas)
    assert len(re.findall(r"(?<=\n\n)\$\$\n[^$]+\n\$\$\n(?=\n|\Z)", text)) == len(formulas), "a blank line around $$"
    prose = re.sub(r"`[^`\n]*`", "", DISPLAY_MATHS.sub("", text))
    formulas += INLINE_MATHS.findall(prose)
    harmful = re.compile(r"\}_|\*|\\[^A-Za-z]|<\S")
    assert not [formula for formula in formulas if harmful.search(formula)]
    assert "$" not in INLINE_MATHS.sub("", prose), "a formula that GitHub does not see as one"

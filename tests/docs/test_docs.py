"""The pages say what the code does: their examples run, their quotes are the source, their links lead somewhere."""

import ast
import doctest
import importlib.util
import itertools
import math
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import minunet
from minunet import ops

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPS = sorted(name.removesuffix("_forward") for name in ops.__all__ if name.endswith("_forward"))

QUOTE_MARKER = re.compile(r"<!-- from (?P<path>\S+): (?P<name>[\w.]+) -->")
NEEDS_MARKER = re.compile(r"<!-- needs (?P<package>\w+) -->")  # above an example that not everybody can run
LINK = re.compile(r"!?\[[^\]]*\]\(<?(?P<target>[^)\s>]+)>?\)")
REPOSITORY_PATH = re.compile(r"(?<![\w./-])((?:minunet|tests|docs|examples|benchmarks)/[\w./-]+\.(?:py|md))")
COMMAND_MODULE = re.compile(r"python -m ((?:minunet|tests|docs)\b[\w.]*)")
COMMAND_FILE = re.compile(r"python ([\w/]+\.py)")
EXPLAINS = re.compile(r"^Explains (?P<functions>.+?)\. ", re.MULTILINE)
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
        needs = NEEDS_MARKER.fullmatch(block.before)
        if needs and importlib.util.find_spec(needs["package"]) is None:
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
            raise LookupError(f"{path} has no {name}")
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


# --- derivations ------------------------------------------------------------------------------------------------------

DERIVATIONS = sorted((ROOT / "docs" / "derivations").glob("*.md"))
SECTIONS = [
    "By hand",
    "Forward",
    "Backward, step by step",
    "The lines it becomes",
    "How it is tested",
    "What goes wrong",
]


def explained(page: Path) -> list[tuple[Path, str]]:
    """The functions that ``page`` says it explains, with the file of each: "Explains `a` and `b` in [file](link)"."""
    found = EXPLAINS.search(page.read_text())
    assert found, f"{page_id(page)} has no line that begins with Explains"
    waiting: list[str] = []
    functions = []
    for name, link in re.findall(r"`([\w.]+)`|\]\((\S+?\.py)\)", found["functions"]):
        if name:
            waiting.append(name)
        else:  # a link to a file: it has the functions named since the last one
            functions += [((page.parent / link).resolve(), function) for function in waiting]
            waiting = []
    assert not waiting, f"{page_id(page)} does not say where {waiting} are"
    return functions


@pytest.mark.parametrize("page", DERIVATIONS, ids=page_id)
def test_a_derivation_names_functions_that_exist_and_quotes_them(page):
    functions = explained(page)
    assert functions
    quoted_ones = {(path, name) for _, path, name in quotes(page)}
    for path, name in functions:
        assert definition(path, name)  # raises LookupError if it was renamed
        assert (path, name) in quoted_ones, f"{page_id(page)} explains {name} and quotes none of its lines"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_derivation_of_its_forward_and_backward(op):
    page = ROOT / "docs" / "derivations" / f"{op}.md"
    assert {name for _, name in explained(page)} >= {f"{op}_forward", f"{op}_backward"}
    headings = re.findall(r"^## (.+)$", without_blocks(page.read_text()), flags=re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    examples = "".join(block.text for block in fenced_blocks(page.read_text()) if ">>>" in block.text)
    assert re.search(rf"{op}_forward\(", examples)
    assert re.search(rf"{op}_backward\(", examples)


def test_a_renamed_function_is_noticed(tmp_path):
    source = tmp_path / "op.py"
    source.write_text("def twice_backward(dy):\n    return 2 * dy\n")
    assert definition(source, "twice_backward") == ["def twice_backward(dy):", "    return 2 * dy"]
    with pytest.raises(LookupError, match="double_backward"):
        definition(source, "double_backward")


def test_a_changed_line_is_noticed():
    lines = ["def f(x):", '    """Twice x."""', "    # comment", "    y = 2 * x", "    return y"]
    assert quoted("y = 2 * x\nreturn y", lines)
    assert quoted("def f(x):\n    ...\n    return y", lines)
    assert not quoted("y = 3 * x\nreturn y", lines)
    assert not quoted("return y\n...\ny = 2 * x", lines)
    assert not quoted("y = 2 * x\n    return y", lines)


# --- worked by hand ---------------------------------------------------------------------------------------------------

SIDE = r"(?:[\d(\-s][\d.+\-*/() sqrt]*[\d)]|\d)"
SUM = re.compile(rf"(?<![\w.,^_{{)]){SIDE}(?: = {SIDE})+(?![\w^_{{*/+)])")


def sums(text: str) -> Iterator[list[str]]:
    """The sides of all equations between plain numbers, such as 3 · (1/4) = 0.75, as Python would read them."""
    text = re.sub(r"\\sqrt ?(\d+)|\\sqrt\{([^{}]*)\}", r"sqrt(\1\2)", without_blocks(text))
    text = text.replace(r"\cdot", "*").replace("·", "*").replace("−", "-").replace("$", " $ ")
    for found in SUM.finditer(text):
        whole = not re.search(r"[-+*/] *$", text[: found.start()])  # else it is the end of something with letters
        if whole and found[0].count("(") == found[0].count(")"):
            yield found[0].split(" = ")


def adds_up(sides: list[str]) -> bool:
    """Whether the sides are equal, to as many digits as the last one shows if it is a decimal fraction."""
    values = [eval(side, {"sqrt": math.sqrt}) for side in sides]
    digits = len(sides[-1].partition(".")[2]) if re.fullmatch(r"-?[\d.]+", sides[-1]) else 12
    return max(values) - min(values) <= 0.51 * 10**-digits


def test_what_is_worked_out_in_the_text_adds_up():
    found = [(page_id(page), sides) for page in PAGES for sides in sums(page.read_text())]
    assert len(found) > 45
    assert not [(page, " = ".join(sides)) for page, sides in found if not adds_up(sides)]
    assert [adds_up(*sums(text)) for text in (r"$2 \cdot (-4) = -8$", "4/13 = 0.308", "4/13 = 0.309")] == [
        True,
        True,
        False,
    ]


def test_the_convolution_by_hand_is_what_the_op_computes():
    """The grids of docs/derivations/conv2d.md: x, kernel, y and dy, then the windows times dy and their sum."""
    page = (ROOT / "docs" / "derivations" / "conv2d.md").read_text()
    drawn = [block.text for block in fenced_blocks(page) if block.language == "text"]
    grids, windows = ([re.findall(r"-?\d+", line) for line in text.splitlines()[1:]] for text in drawn)
    x = np.array([row[:5] for row in grids], dtype=float)
    kernel, y, dy = (np.array([row[5:] for row in grids[:3]], dtype=float)[:, 3 * k : 3 * k + 3] for k in range(3))
    assert not x[0].any()
    assert not x[:, -1].any()  # the border
    found, cache = ops.conv2d_forward(x[None, 1:-1, 1:-1, None], kernel[:, :, None, None], np.zeros(1))
    np.testing.assert_array_equal(found[0, :, :, 0], y)
    _, dweight, _ = ops.conv2d_backward(dy[None, :, :, None], cache)
    middle = windows[1]  # the row with the factors: 1 *, + 2 *, - 1 *
    assert middle[::4][:3] == ["1", "2", "1"]
    rows = [windows[0], [number for k, number in enumerate(middle) if k not in (0, 4, 8)], windows[2]]
    tiles = np.array(rows, dtype=float).reshape(3, 4, 3).swapaxes(0, 1)
    for tile, (i, j) in zip(tiles, np.argwhere(dy), strict=False):
        np.testing.assert_array_equal(tile, x[i : i + 3, j : j + 3])
    np.testing.assert_array_equal(tiles[3], dweight[:, :, 0, 0])


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


def test_the_reading_order_stands_everywhere_in_the_same_words():
    order = re.findall(r"^(?:\d\.|-) (.+)$", str(minunet.__doc__).replace("``", "`"), flags=re.MULTILINE)
    assert len(order) == 8
    for page in ("README.md", "docs/tour.md"):
        text = (ROOT / page).read_text()
        places = [text.find(line) for line in order]
        assert places == sorted(places), page
        assert places[0] > 0, page
    reference = ["mathematics", "network", "work", "beside", "beside", "beside", "beside"]
    for line, page in zip(order, reference, strict=False):
        assert line in (ROOT / "docs" / "api" / f"{page}.md").read_text(), page


def test_each_chapter_ends_with_a_link_to_the_next():
    index = (ROOT / "docs" / "index.md").read_text()
    lines = re.findall(r"^\d+\. .+$", index, flags=re.MULTILINE)
    chapters = [ROOT / "docs" / link for line in lines for link in re.findall(r"\]\(([\w/]+\.md)\)", line)]
    assert len(chapters) > 15
    for chapter, following in itertools.pairwise(chapters):
        last = chapter.read_text().rstrip().splitlines()[-1]
        link = re.fullmatch(r"Next: \[(?P<title>.+)\]\((?P<path>.+)\)\.", last)
        assert link, f"{page_id(chapter)} does not end with Next"
        assert (chapter.parent / link["path"]).resolve() == following, page_id(chapter)
        assert following.read_text().startswith(f"# {link['title']}\n"), page_id(chapter)


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
    broken += [path for path in COMMAND_FILE.findall(text) if "/" in path and not (ROOT / path).exists()]
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


# --- pictures, the reference, spelling --------------------------------------------------------------------------------


def test_every_picture_is_shown_and_described():
    shown = {}
    for page in PAGES:
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            shown[(page.parent / target).resolve()] = words
    assert not [path.name for path, words in shown.items() if not words], "pictures without a description"
    made = {path for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix in (".png", ".gif")}
    animated = {path.with_suffix(".png") for path in made if path.suffix == ".gif"}  # each with a still beside it
    assert made - animated <= set(shown), f"never shown: {sorted(path.name for path in made - animated - set(shown))}"


def test_the_reference_lists_every_module():
    listed = [
        (name, (page.parent / target).resolve())
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for name, target in re.findall(r"^- \[(minunet[\w.]*)\]\((.+)\)$", page.read_text(), flags=re.MULTILINE)
    ]
    for name, path in listed:
        module = ROOT / name.replace(".", "/")
        assert path in (module.with_suffix(".py"), module / "__init__.py")
    # The exercises and what is inside an engine are no part of what one calls.
    inner = {ROOT / "minunet" / folder for folder in ("exercises", "engines/cpu", "engines/cuda")}
    modules = {path for path in (ROOT / "minunet").rglob("[!_]*.py") if not inner & set(path.parents)}
    assert sorted(path for _, path in listed) == sorted(modules | {ROOT / "minunet/engines/__init__.py"})


def test_spelling():
    """Misspellings that codespell knows; docs/words.txt holds what it takes for one and is none."""
    codespell = pytest.importorskip("codespell_lib")
    words = str(ROOT / "docs" / "words.txt")
    pages = [str(page) for page in PAGES]
    assert codespell.main("--builtin", "clear,rare", "--ignore-words", words, "--quiet-level", "2", *pages) == 0

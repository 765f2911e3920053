"""What each file of a data set held, so that it can be asked later whether it still does.

A flipped bit in an uncompressed TIFF is another grey value and nothing more: the file loads, and no reader can notice.
A cryptographic hash can. The manifest is a text file in the format of ``sha256sum``::

    4be0...e1  TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_1.tif

so that ``sha256sum --check FILE``, run in the data folder, understands it too.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from minunet.base.durable import open_regular, write_durably
from minunet.base.errors import UserError
from minunet.data.images import shown
from minunet.data.reader import THREADS, Listing

#: SHA-256 in hexadecimal by the file's path in the data folder; None for a file that cannot be read.
Digests = dict[str, str | None]

MAX_BYTES = 2**28  # no manifest is larger: this one would list more than a million files

_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)", re.DOTALL)
_ESCAPES = {"\\": r"\\", "\n": r"\n", "\r": r"\r"}
_UNESCAPES = {escaped: character for character, escaped in _ESCAPES.items()}


def digests(listing: Listing) -> Digests:
    """The digest of every image and mask that was listed, those without a partner among them."""
    paths = [*(path for pair in listing.pairs for path in (pair.image, *pair.masks)), *listing.unpaired]
    with ThreadPoolExecutor(max_workers=THREADS) as pool:  # hashing runs outside Python's lock
        names = [Path(os.path.relpath(path, listing.root)).as_posix() for path in paths]
        return dict(zip(names, pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def differences(expected: Digests, found: Digests) -> list[str]:
    """A fault for each file that has changed, is missing, or is not in the manifest ``expected``.

    >>> differences({"a/a_1.tif": "0", "a/a_2.tif": "0"}, {"a/a_1.tif": "1", "a/a_3.tif": "0"})
    ['a/a_1.tif: changed since the manifest was written; restore it',
     'a/a_2.tif: in the manifest, but not there; restore it',
     'a/a_3.tif: not in the manifest; remove it, or write a new manifest']
    """
    changed = [name for name in expected if name in found and found[name] not in (expected[name], None)]
    unread = [name for name in expected if name in found and found[name] is None]
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    return [
        *(f"{shown(name)}: changed since the manifest was written; restore it" for name in changed),
        *(f"{shown(name)}: in the manifest, but cannot be read; restore it" for name in unread),
        *(f"{shown(name)}: in the manifest, but not there; restore it" for name in missing),
        *(f"{shown(name)}: not in the manifest; remove it, or write a new manifest" for name in extra),
    ]


def check_new(path: Path) -> None:
    """Raises UserError if there is something at ``path``: it may be the only witness of what the files once held."""
    if os.path.lexists(path):
        raise UserError(f"{shown(path)}: is there already; compare with it (--manifest), or choose another name")


def write_manifest(path: Path, found: Digests) -> None:
    """Writes the manifest of ``found``. Raises UserError if one of the files could not be read, or ``path`` exists."""
    check_new(path)
    lines = []
    for name, digest in found.items():
        if digest is None:
            raise UserError(f"{shown(name)}: cannot be read, so no manifest is written; replace or remove it")
        # As sha256sum has it: a line break in a name is escaped, and the line then begins with a backslash.
        escaped = "".join(_ESCAPES.get(character, character) for character in name)
        mark = "" if escaped == name else "\\"
        lines.append(f"{mark}{digest}  {escaped}\n")
    content = os.fsencode("".join(lines))

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_durably(path, write, overwrite=False)  # hashing takes minutes: somebody may have written it meanwhile


def read_manifest(path: Path) -> Digests:
    """The digests in the manifest at ``path``. Raises UserError if it cannot be read, or is none."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise UserError(f"{shown(path)}: above the ceiling of {MAX_BYTES} bytes; give a manifest")
            lines = os.fsdecode(file.readall()).split("\n")
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(f"{shown(path)}: cannot be read ({reason}); write one with --write-manifest") from None
    expected: Digests = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match is None:
            raise UserError(f"{shown(path)}: line {number} is no line of a manifest; write it anew (--write-manifest)")
        name = match["name"]
        if match["escaped"]:
            name = re.sub(r"\\[\\nr]", lambda found: _UNESCAPES[found[0]], name)
        expected[name.removeprefix("./")] = match["digest"]
    return expected

"""What the tests of image files and folders share."""

import pytest

from minunet.base.errors import UserError


def refusal(function, *arguments, **keywords):
    """The message of the UserError that the call raises; it must be one line."""
    with pytest.raises(UserError) as found:
        function(*arguments, **keywords)
    assert "\n" not in str(found.value)
    return str(found.value)


def tiff_by_hand(width, height, bits):
    """An RGB TIFF that Pillow would not write: its header says what it is told to, its pixels are 24 bytes."""
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, 24)]
    content = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        content += b"".join(n.to_bytes(k, "little") for n, k in ((tag, 2), (kind, 2), (count, 4), (value, 4)))
    return content + bytes(4) + bits.to_bytes(2, "little") * 3 + bytes(range(24))

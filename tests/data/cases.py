"""What the tests of image files and folders share."""

import struct
import zlib

import numpy as np
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


def tiff_of_16_bits(pixels, *, big_endian=False, compressed=False, planar=False):
    """A TIFF, which Pillow would not write, of ``pixels``, uint16 (H, W, C)."""
    order, (height, width, channels) = ">" if big_endian else "<", pixels.shape
    planes = [pixels[..., c] for c in range(channels)] if planar else [pixels]
    strips = [np.ascontiguousarray(plane).astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    tags = [(256, [width]), (257, [height]), (258, [16] * channels), (259, [8 if compressed else 1])]
    tags += [(262, [2 if channels >= 3 else 1]), (273, None), (277, [channels]), (278, [height])]
    tags += [(279, [len(strip) for strip in strips]), (284, [2 if planar else 1])]
    tags += [(338, [0] * (channels - 3))] if channels > 3 else []
    start = 8 + 2 + 12 * len(tags) + 4
    longs = {273, 279}
    # The values that do not fit into an entry follow the directory, then the strips.
    sizes = {tag: (4 if tag in longs else 2) * (len(strips) if values is None else len(values)) for tag, values in tags}
    first_strip = start + sum(size for size in sizes.values() if size > 4)
    offsets = [first_strip + sum(map(len, strips[:n])) for n in range(len(strips))]
    directory, extra = b"", b""
    for tag, values in tags:
        values = offsets if values is None else values
        packed = struct.pack(f"{order}{len(values)}{'I' if tag in longs else 'H'}", *values)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", start + len(extra))
        extra += packed if len(packed) > 4 else b""
        directory += struct.pack(f"{order}HHI", tag, 4 if tag in longs else 3, len(values)) + place
    header = (b"MM" if big_endian else b"II") + struct.pack(f"{order}HI", 42, 8)
    return header + struct.pack(f"{order}H", len(tags)) + directory + bytes(4) + extra + b"".join(strips)


def png_of_16_bits(pixels):
    """A PNG, which Pillow would not write, of ``pixels``, uint16 (H, W, 3): each row as the difference to the last."""
    height, width, _ = pixels.shape
    rows = np.ascontiguousarray(pixels).astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    lines = b"".join(b"\2" + (row - before).tobytes() for row, before in zip(rows, above, strict=True))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )

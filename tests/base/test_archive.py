"""The guarded archive: what is saved comes back bit for bit, and nothing else is ever loaded."""

import io
import json
import math
import os
import pickle
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minunet.base import archive
from minunet.base.errors import UserError

DTYPES = ["<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"]


def some_array(rng, shape, dtype):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max, size=shape, dtype=dtype, endpoint=True)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def refused(path, *arguments, **options):
    """What the UserError that loading ``path`` raises says, in one line, after the file's name."""
    with pytest.raises(UserError) as caught:
        archive.load(path, *arguments, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# ---------------------------------------------------------------------------------------------------------------------
# Round trip
# ---------------------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[A-Za-z0-9_-]{1,8}([./][A-Za-z0-9_-]{1,8}){0,3}", fullmatch=True)
shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=4),
    st.dictionaries(st.text(), json_values, max_size=3),
    st.integers(0, 2**32),
)
def test_round_trip(tmp_path_factory, specs, metadata, seed):
    rng = np.random.default_rng(seed)
    arrays = {name: some_array(rng, shape, dtype) for name, (shape, dtype) in specs.items()}
    path = tmp_path_factory.mktemp("round") / "a.npz"
    archive.save(path, arrays, metadata)
    found, found_metadata = archive.load(path)
    assert_same(found, arrays)
    assert repr(found_metadata) == repr(metadata)  # repr: 0.0 is not -0.0, 1 is not True
    assert all(array.flags.writeable and array.flags.c_contiguous for array in found.values())


@pytest.mark.parametrize(
    "array",
    [
        np.float64(2.5),
        np.array(7, "int16"),
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        np.arange(24.0).reshape(2, 3, 4)[::-1, :, ::2],
        np.broadcast_to(np.float32(3.0), (2, 3)),
        np.arange(5, dtype=">f4"),
        np.array([-0.0, 5e-324, np.finfo("f8").max]),
    ],
    ids=["scalar", "0-d", "empty", "Fortran order", "strided", "broadcast", "big-endian", "extreme"],
)
def test_arrays_of_any_layout(tmp_path, array):
    archive.save(tmp_path / "a.npz", {"a": array}, {})
    found = archive.load(tmp_path / "a.npz")[0]["a"]
    assert found.dtype == np.asarray(array).dtype.newbyteorder("<")
    assert found.shape == np.shape(array)
    assert np.array_equal(found, array)
    assert np.array_equal(np.signbit(found), np.signbit(array))


def test_numpy_opens_it_too(tmp_path):
    arrays = {"parameters/a.weight": np.arange(6.0).reshape(2, 3), "b": np.array(1)}
    archive.save(tmp_path / "a.npz", arrays, {})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as opened:
        assert_same({name: opened[name] for name in arrays}, arrays)


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in ("a.npz", "b.npz"):
        archive.save(tmp_path / name, {"w": np.arange(5.0)}, {"step": 3})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_metadata_keeps_nan_and_infinity(tmp_path):
    archive.save(tmp_path / "a.npz", {}, {"best": -math.inf, "hd95": math.nan, "loss": np.float32(0.1)})
    metadata = archive.load(tmp_path / "a.npz")[1]
    assert metadata["best"] == -math.inf
    assert math.isnan(metadata["hd95"])
    assert metadata["loss"] == float(np.float32(0.1))


def test_large_members_use_zip64_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # as if 4 GiB were 100 bytes
    arrays = {name: np.random.default_rng(0).normal(size=50) for name in "abcd"}
    archive.save(tmp_path / "a.npz", arrays, {"step": 3})
    assert b"PK\x06\x07" in (tmp_path / "a.npz").read_bytes()[-98:]
    assert_same(archive.load(tmp_path / "a.npz")[0], arrays)


@given(st.integers(0, 2**32))
def test_sha256_of_arrays_sees_each_bit_name_shape_and_dtype(seed):
    rng = np.random.default_rng(seed)
    arrays = {"a": rng.normal(size=(2, 6)), "b": rng.normal(size=3).astype("f4")}
    whole = archive.sha256_of_arrays(arrays)
    assert archive.sha256_of_arrays({"b": arrays["b"], "a": np.asfortranarray(arrays["a"])}) == whole
    flipped = arrays["a"].copy()
    flipped.view(np.uint8).reshape(-1)[rng.integers(flipped.nbytes)] ^= 1 << rng.integers(8)
    for change in (
        {"a": flipped, "b": arrays["b"]},
        {"a": arrays["a"].reshape(3, 4), "b": arrays["b"]},
        {"a": arrays["a"].view("i8"), "b": arrays["b"]},
        {"a": arrays["a"], "c": arrays["b"]},
        {"a": arrays["a"]},
    ):
        assert archive.sha256_of_arrays(change) != whole


# ---------------------------------------------------------------------------------------------------------------------
# What is not saved
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "../a", "a//b", "/a", "a.", "ä", "a\n", "a" * 201, "a\\b"])
def test_a_bad_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="an array name must be"):
        archive.save(tmp_path / "a.npz", {name: np.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["O", "?", "c8", "U3", "S3", "M8[s]", "V4", np.longdouble])
def test_a_dtype_that_is_no_plain_number_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="array 'a' must hold integers"):
        archive.save(tmp_path / "a.npz", {"a": np.zeros(2, dtype)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_values_that_are_not_finite_are_refused_and_the_old_file_stays(tmp_path, bad, dtype):
    archive.save(tmp_path / "a.npz", {"a": np.ones(3)}, {})
    before = (tmp_path / "a.npz").read_bytes()
    array = np.ones(5, dtype)
    array[3:] = bad
    with pytest.raises(ValueError, match="array 'a' must be finite, got 2 values"):
        archive.save(tmp_path / "a.npz", {"a": array}, {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.npz", before)]


def test_metadata_that_could_not_be_read_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="metadata must be at most 1048576 bytes"):
        archive.save(tmp_path / "a.npz", {}, {"history": "x" * 2**20})
    with pytest.raises(ValueError, match="in JSON must be"):
        archive.save(tmp_path / "a.npz", {}, {"array": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_of_a_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    archive.save(path, {"a": np.ones(3)}, {"step": 1})
    before = path.read_bytes()
    write_array = np.lib.format.write_array

    def write_half(file, array, **options):
        write_array(file, array[: len(array) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", write_half)
    with pytest.raises(UserError, match=r"a\.npz: cannot be written \(No space left on device\)"):
        archive.save(path, {"a": np.ones(300)}, {"step": 2})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.npz", before)]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files
# ---------------------------------------------------------------------------------------------------------------------


def small_checkpoint(path):
    arrays = {"w": np.arange(6, dtype="f4").reshape(2, 3), "n": np.array(7)}
    metadata = {"step": 3}
    archive.save(path, arrays, metadata)
    return arrays, metadata


def test_no_flipped_bit_loads_as_something_else(tmp_path):
    path = tmp_path / "a.npz"
    arrays, metadata = small_checkpoint(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    harmless = 0
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            found, found_metadata = archive.load(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            continue
        harmless += 1  # in a field of the ZIP that says nothing about the contents, such as a date
        assert_same(found, arrays)
        assert found_metadata == metadata
    # Harmless are only flips in the ZIP's own 30 + 46 bytes for each member and in its end record.
    assert harmless < 3 * (30 + 46) + 22


def test_no_truncated_file_loads(tmp_path):
    path = tmp_path / "a.npz"
    small_checkpoint(path)
    good = path.read_bytes()
    for length in {*range(0, len(good), 7), *range(len(good) - 100, len(good))}:
        path.write_bytes(good[:length])
        refused(path)
    path.write_bytes(good + b"\0")
    assert "truncated" in refused(path)


@given(st.integers(0, 2**32))
def test_overwritten_stretches_load_as_nothing_else(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("overwritten") / "a.npz"
    arrays, metadata = small_checkpoint(path)
    rng = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    start = rng.integers(len(data))
    stretch = rng.bytes(rng.integers(1, 64))
    data[start : start + len(stretch)] = stretch
    path.write_bytes(data)
    try:
        found, found_metadata = archive.load(path)
    except UserError:
        return
    assert_same(found, arrays)
    assert found_metadata == metadata


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **options)
    return file.getvalue()


def npy_header(text):
    text = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def contents(arrays=(), **changes):
    """The bytes of metadata.json for ``arrays``, their sums right, changed by ``changes``."""
    sums = {name: archive._sha256(np.asarray(array)) for name, array in dict(arrays).items()}
    whole = {"format": "minunet-checkpoint", "version": 2, "sha256": sums, "metadata": {}} | changes
    return json.dumps(whole).encode()


def forge(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_a_forged_file_that_keeps_the_rules_loads(tmp_path):
    """So that the forgeries below are refused for what they change, and for nothing else."""
    arrays = {"a": np.arange(3.0), "b": np.array(2)}
    a = npy_header(A_HEADER + " " * 100) + arrays["a"].tobytes()
    members = [("metadata.json", contents(arrays)), ("a.npy", a), ("b.npy", npy(arrays["b"]))]
    assert_same(archive.load(forge(tmp_path / "a.npz", members))[0], arrays)


A = np.arange(3.0)
A_HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }"
GOOD = ("a.npy", npy(A))
FORGERIES = {
    "no metadata": ([GOOD], "not a minunet checkpoint"),
    "PyTorch": ([("archive/data.pkl", b"\x80\x02.")], "not a minunet checkpoint"),
    "another format": ([("metadata.json", contents({"a": A}, format="x")), GOOD], "not a minunet checkpoint"),
    "metadata is a list": ([("metadata.json", b"[]"), GOOD], "not a minunet checkpoint"),
    "metadata is no JSON": ([("metadata.json", b"{"), GOOD], "damaged"),
    "metadata is no UTF-8": ([("metadata.json", b'{"a": "\xff\xfe"}'), GOOD], "damaged"),
    "deep JSON": ([("metadata.json", b"[" * 100_000), GOOD], "damaged"),
    "newer": ([("metadata.json", contents({"a": A}, version=3)), GOOD], "written by a newer minunet.*update minunet"),
    "version of 4000 digits": ([("metadata.json", contents(version=10**3999))], "written by a newer minunet"),
    "version is text": ([("metadata.json", contents(version="1"))], "damaged"),
    "version 0": ([("metadata.json", contents(version=0))], "damaged"),
    "no sums": ([("metadata.json", contents(sha256=None))], "damaged"),
    "no caller's metadata": ([("metadata.json", contents(metadata=[]))], "damaged"),
    "array without sum": ([("metadata.json", contents()), GOOD], "its arrays are not those"),
    "sum without array": ([("metadata.json", contents({"a": A, "b": A})), GOOD], "its arrays are not those"),
    "other file within": ([("metadata.json", contents({"a": A})), GOOD, ("x.pkl", b"")], "its arrays are not those"),
    "wrong sum": ([("metadata.json", contents({"a": A + 1})), GOOD], "does not have the recorded SHA-256"),
    "sum is a number": ([("metadata.json", contents(sha256={"a": 1})), GOOD], "does not have the recorded SHA-256"),
    "path that climbs": ([("metadata.json", contents({"../a": A})), ("../a.npy", npy(A))], "an array name must be"),
    "NaN": ([("metadata.json", contents({"a": A * np.nan})), ("a.npy", npy(A * np.nan))], "holds NaN or infinite"),
    "Fortran order": (
        [("metadata.json", contents({"a": np.eye(2)})), ("a.npy", npy(np.asfortranarray(np.eye(2) * [1, 2])))],
        "has no header",
    ),
    "big-endian": ([("metadata.json", contents({"a": A})), ("a.npy", npy(A.astype(">f8")))], "has no header"),
    "npy version 2": ([("metadata.json", contents({"a": A})), ("a.npy", npy(A, version=(2, 0)))], "is no .npy array"),
    "not npy": ([("metadata.json", contents({"a": A})), ("a.npy", b"hello")], "is no .npy array"),
    "pickle in npy": (
        [("metadata.json", contents({"a": A})), ("a.npy", npy(np.array([print]), allow_pickle=True))],
        "has no header",
    ),
    "array too short": ([("metadata.json", contents({"a": A})), ("a.npy", npy(A)[:-1])], "is not as long as"),
    "array too long": ([("metadata.json", contents({"a": A})), ("a.npy", npy(A) + b"\0")], "is not as long as"),
    "code in the header": (
        [("metadata.json", contents({"a": A})), ("a.npy", npy_header("__import__('os').abort()"))],
        "has no header",
    ),
    "long header": (
        [("metadata.json", contents({"a": A})), ("a.npy", npy_header(A_HEADER + " " * 1024) + A.tobytes())],
        "is no .npy array",
    ),
    "two of one name": ([("metadata.json", contents({"a": A})), GOOD, GOOD], "two of its members"),
}


@pytest.mark.parametrize("case", FORGERIES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_forged_file_is_refused(tmp_path, case):
    members, expected = FORGERIES[case]
    path = forge(tmp_path / "a.npz", members)
    message = refused(path)
    assert re.search(expected, message)
    assert len(message) < 400


def header_bomb(shape):
    return npy_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}")


def many_members(path):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number:060d}", b"")


BOMBS = {
    "compressed": lambda path: forge(
        path, [("metadata.json", contents({"a": A})), ("a.npy", bytes(2**27))], zipfile.ZIP_DEFLATED
    ),
    "header claims 8 TB": lambda path: forge(
        path, [("metadata.json", contents({"a": A})), ("a.npy", header_bomb((10**6, 10**6)))]
    ),
    "header of zero bytes, too large for NumPy": lambda path: forge(
        path, [("metadata.json", contents({"a": A})), ("a.npy", header_bomb((0, 10**14, 10**14)))]
    ),
    "header of 300 dimensions": lambda path: forge(
        path, [("metadata.json", contents({"a": A})), ("a.npy", header_bomb((1,) * 300) + bytes(8))]
    ),
    "long header": lambda path: forge(
        path, [("metadata.json", contents({"a": A})), ("a.npy", b"\x93NUMPY\x01\x00\xff\xff" + b" " * 2**16)]
    ),
    "long metadata": lambda path: forge(path, [("metadata.json", b"[" + b"[]," * 2**20 + b"[]]")]),
    "metadata of empty lists": lambda path: forge(
        path, [("metadata.json", contents({"a": A}, metadata={"a": [[]] * 300_000}).replace(b" ", b""))]
    ),
    "metadata of a long number": lambda path: forge(path, [("metadata.json", b"1" * (2**20 - 1))]),
    "many members": many_members,
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_in_less_than_50_mb(tmp_path, case):
    path = tmp_path / "a.npz"
    BOMBS[case](path)
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(("field", "bit"), [(8, 1), (10, 8), (20, 1)], ids=["encrypted", "deflated", "two sizes"])
def test_a_member_that_says_it_is_not_stored_plainly_is_refused(tmp_path, field, bit):
    path = tmp_path / "a.npz"
    small_checkpoint(path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + field] ^= bit  # flags, method, compressed size in the table of contents
    path.write_bytes(data)
    assert "member 'n.npy' is compressed or encrypted" in refused(path)


def test_members_that_overlap_are_refused(tmp_path):
    """Two entries of the table of contents that share the bytes of one member: a file larger inside than outside."""
    path = tmp_path / "a.npz"
    forge(path, [("metadata.json", contents({"a": A})), ("a.npy", npy(np.arange(1000.0)))])
    data = path.read_bytes()
    table = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[data.rindex(b"PK\x01\x02") : end]
    count, size = 3, end - table + len(entry)
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, table, 0)
    path.write_bytes(data[:end] + entry.replace(b"a.npy", b"b.npy") + record)
    assert "its members overlap" in refused(path)


def test_a_table_of_contents_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = tmp_path / "a.npz"
    archive.save(path, {"a": A}, {})
    data = bytearray(path.read_bytes())
    locator = data.rindex(b"PK\x06\x07")
    data[locator + 8] ^= 1
    path.write_bytes(data)
    assert "table of contents" in refused(path)
    data[locator + 8] ^= 1
    record = data.rindex(b"PK\x06\x06")
    data[record + 40 : record + 48] = (2**30).to_bytes(8, "little")
    path.write_bytes(data)
    assert "table of contents" in refused(path)


class _Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(_Trap(), protocol))
        assert "a pickle, which could run code" in refused(path)
    forge(path, [("metadata.json", contents({"a": A})), ("a.npy", npy(np.array([_Trap()], object), allow_pickle=True))])
    assert "has no header" in refused(path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "an empty file"),
        (b"hello, world" * 100, "not a minunet checkpoint (no .npz file)"),
        (npy(A), "not a minunet checkpoint (no .npz file)"),
        (b"\x89HDF\r\n\x1a\n" + bytes(2000), "not a minunet checkpoint (no .npz file)"),
        (b"PK\x03\x04", "truncated"),
        (b"PK\x03\x04" + bytes(2000), "truncated"),
    ],
    ids=["empty", "text", "npy", "hdf5", "four bytes", "zeros"],
)
def test_another_file_is_refused(tmp_path, data, expected):
    (tmp_path / "a.npz").write_bytes(data)
    assert expected in refused(tmp_path / "a.npz")


def test_what_is_no_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.npz")
    assert "a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo.npz")
    assert "not a regular file" in refused(tmp_path / "fifo.npz")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    assert "cannot be opened" in refused(tmp_path / "loop.npz")
    assert "cannot be opened" in refused(tmp_path / "loop.npz" / "a.npz")
    assert "cannot be opened" in refused("nul\0.npz")

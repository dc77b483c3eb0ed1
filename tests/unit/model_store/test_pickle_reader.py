import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import ModelStoreError
from service.model_store.pickle_reader import array_of, read_pickle


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_of_every_protocol_is_read(protocol: int) -> None:
    data = {
        "a": [1, -2.5, True, None, 10**30],
        "b": ("x", ("y", b"\x00\xff"), (1, 2, 3, 4)),
        "c": {},
        "d": OrderedDict(e=1),
    }
    assert read_pickle(pickle.dumps(data, protocol=protocol)) == data


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array([True, False]),
        np.array(7, dtype=np.uint8),
        np.float16(0.5),
    ],
    ids=["float32", "fortran", "big-endian", "bool", "zero-dimensional", "scalar"],
)
def test_arrays_of_every_protocol_are_read(array: NDArray[Any], protocol: int) -> None:
    (written,) = read_pickle(pickle.dumps([array], protocol=protocol))
    read = array_of(written)
    assert read is not None
    assert read.shape == array.shape
    assert read.dtype == array.dtype.newbyteorder("=")
    assert (read == array).all()


def test_an_array_written_by_python_2_is_read() -> None:
    """There its bytes are a string, as in detectron2's model zoo."""
    written = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08\x00\x00\x80\x3f\x00\x00\x80\xbftb."
    )
    read = array_of(read_pickle(written))
    assert read is not None
    assert read.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_is_refused_by_name_without_being_run(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "made"
    malicious = pickle.dumps({"model": {"a": np.zeros(2), "b": Malicious(target)}}, protocol=protocol)
    with pytest.raises(ModelStoreError, match=r"got (posix|nt)\.mkdir, which was not run"):
        read_pickle(malicious)
    assert not target.exists()
    pickle.loads(malicious)
    assert target.exists(), "the pickle is not malicious, so this test proves nothing"


def test_python_objects_in_an_array_are_refused() -> None:
    with pytest.raises(ModelStoreError, match="expected an array of numbers"):
        array_of(read_pickle(pickle.dumps(np.array([{}], dtype=object))))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle at all",
        pickle.dumps({"a": np.zeros(100)})[:-20],
        b"\x80\x04.",  # stops with nothing made
        b"\x80\x04h\x07.",  # takes what was never memorised
        b"\x80\x02cbuiltins\neval\n.",  # a function, not called
        b"\x80\x02Pid\n.",  # something outside of the pickle
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(ModelStoreError):
        read_pickle(data)


def test_a_list_that_doubles_at_every_level_is_worked_through_once_a_level() -> None:
    """2**60 leaves to whoever counts them all."""
    nested: list[object] = []
    for _ in range(60):
        nested = [nested, nested]
    read = read_pickle(pickle.dumps(nested))
    assert read[0] is read[1]


def tuples_in_tuples(depth: int) -> bytes:
    """A key of tuples in tuples: 2**depth steps for whoever hashes it, in five bytes a level."""
    levels = b"".join(
        b"h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"\x86q" + bytes([i]) + b"0" for i in range(1, depth)
    )
    return b"\x80\x02)q\x00" + levels + b"}h" + bytes([depth - 1]) + b"K\x01s."


def lists_in_lists(depth: int, end: bytes) -> bytes:
    """10**depth items for whoever writes them down."""
    levels = b"".join(b"(" + (b"h" + bytes([i - 1])) * 10 + b"lq" + bytes([i]) + b"0" for i in range(1, depth))
    return b"\x80\x02]q\x00" + levels + end


def test_a_key_that_takes_for_ever_to_hash_is_left_out() -> None:
    assert read_pickle(tuples_in_tuples(60)) == {}


def test_what_takes_for_ever_to_write_down_is_named_by_its_kind() -> None:
    scalar = b"cnumpy.core.multiarray\nscalar\nh\x0bC\x01a\x86R."
    with pytest.raises(ModelStoreError, match=r"expected an array of numbers, got one of list$"):
        array_of(read_pickle(lists_in_lists(12, scalar)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",  # claims 2**60 bytes
        b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",  # a million digits
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s",  # ends early
    ],
)
def test_claims_are_refused(data: bytes) -> None:
    with pytest.raises(ModelStoreError):
        read_pickle(data)


def test_lists_in_lists_a_hundred_thousand_deep_are_read_without_recursion() -> None:
    deep = read_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    for _ in range(99_999):
        (deep,) = deep
    assert deep == []


@given(st.binary(max_size=200))
def test_no_bytes_lead_to_anything_but_data_or_a_refusal(data: bytes) -> None:
    with suppress(ModelStoreError):
        read_pickle(b"\x80\x02" + data)

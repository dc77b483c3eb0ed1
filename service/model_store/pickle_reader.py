"""Reads a pickle of NumPy arrays without running it, for detectron2's `.pkl` checkpoints. Called by `checkpoint.py`.

A pickle is a program: unpickling calls whatever functions it names. Here its instructions are walked one by one and
only data comes of it: what it wants called is noted as a `Call`, and the few calls by which NumPy writes arrays are
recognised and done by our own hands. Everything else is refused by name. (A restricted `pickle.Unpickler` would still
call NumPy's own `__setstate__`, which trusts its input with raw memory.)
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import ModelStoreError

_PUSHES_ITS_ARGUMENT = re.compile(
    r"INT|BININT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_)?BINSTRING|STRING|UNICODE|(SHORT_)?BINUNICODE8?|(SHORT_)?BINBYTES8?"
    r"|BYTEARRAY8"
)
_PUSHES_A_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = frozenset(f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)) - {"f1"} | {"b1"}
_MARK = object()


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that the pickle names; never looked up."""

    name: str


@dataclass(slots=True)
class _Call:
    """What the pickle wants called, and the state that it gives to the result; never called."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_pickle(data: bytes) -> Any:
    """The data in a pickle: dicts, lists, tuples, strings, numbers and NumPy arrays of numbers.

    Raises:
        ModelStoreError: it names any other class or function, or is no pickle.
    """
    try:
        return _resolve(_Machine().run(data), {})
    except ModelStoreError:
        raise
    except Exception as error:  # whatever a broken program leads to: an empty stack, an unknown memo, a key of a list
        raise ModelStoreError(f"not a pickle that can be read: {type(error).__name__}: {error}") from error


class _Machine:
    """The pickle machine without its calls: a stack, and a memo of what is used again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ModelStoreError("the pickle ends early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if _PUSHES_ITS_ARGUMENT.fullmatch(name):
            stack.append(argument)
            return
        if name in _PUSHES_A_CONSTANT:
            stack.append(_PUSHES_A_CONSTANT[name])
            return
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST":
                stack.append(self._since_mark())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "DICT":
                stack.append(_pairs(self._since_mark()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                items = self._pop(2)
                stack[-1].update(_pairs(items))
            case "SETITEMS":
                items = self._since_mark()
                stack[-1].update(_pairs(items))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "GLOBAL":
                stack.append(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_Global(".".join(self._pop(2))))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop(2)
                stack.append(_noted_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _:
                raise ModelStoreError(f"expected a pickle of arrays, got the instruction {name}")

    def _pop(self, count: int) -> list[Any]:
        popped = [self.stack.pop() for _ in range(count)]
        return popped[::-1]

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _noted_call(function: _Global, arguments: tuple[Any, ...]) -> Any:
    # NumPy 2 has renamed its private modules.
    name = function.name.replace("numpy._core.", "numpy.core.")
    if name == "collections.OrderedDict":
        return dict(*arguments)
    if name == "_codecs.encode" and len(arguments) == 2 and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")  # how protocol 2 writes bytes
    return _Call(name, arguments)


def _resolve(value: Any, done: dict[int, Any]) -> Any:
    """Arrays for the calls by which NumPy writes them, in nested containers.

    Args:
        done: what came of values by their id, so that one that is held many times is worked through once.
    """
    if id(value) not in done:
        done[id(value)] = _resolve_new(value, done)
    return done[id(value)]


def _resolve_new(value: Any, done: dict[int, Any]) -> Any:
    match value:
        case dict():
            return {key: _resolve(item, done) for key, item in value.items()}
        case list():
            return [_resolve(item, done) for item in value]
        case tuple():
            return tuple(_resolve(item, done) for item in value)
        case _Call(name="numpy.core.multiarray._reconstruct", state=(_, shape, dtype, bool(fortran), data)):
            return _array(data, dtype, shape, order="F" if fortran else "C")
        case _Call(name="numpy.core.numeric._frombuffer", arguments=(data, dtype, shape, str(order))):
            return _array(data, dtype, shape, order=order)
        case _Call(name="numpy.core.multiarray.scalar", arguments=(dtype, data)):
            return _array(data, dtype, (), order="C")
        case _Call(name=name) | _Global(name=name):
            raise ModelStoreError(f"expected a pickle of arrays, got {name}, which was not run")
        case _:
            return value


def _array(data: Any, dtype: Any, shape: Any, *, order: str) -> NDArray[Any]:
    # Python 2 wrote bytes as a string of the characters 0 to 255.
    buffer = data.encode("latin-1") if isinstance(data, str) else data
    array = np.frombuffer(buffer, dtype=_dtype(dtype)).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(array.dtype.newbyteorder("="))


def _dtype(value: Any) -> np.dtype[Any]:
    match value:
        case _Call(name="numpy.dtype", arguments=(str(code), *_), state=(_, str(byte_order), *_)) if code in _NUMBERS:
            return np.dtype(f"{byte_order}{code}")
        case _:
            raise ModelStoreError(f"expected an array of numbers, got one of {value!r}")

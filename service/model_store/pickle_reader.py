"""Reads the data in a pickle without running it.

A pickle is a program: unpickling calls whatever functions it names. This module interprets its instructions one by one,
and records every call as an `Unread` instead of making it. The few calls that NumPy uses to write arrays are recognised
by `array_of` and done by our own code. (A restricted `pickle.Unpickler` would still call NumPy's own `__setstate__`,
which trusts its input with raw memory.) Time and memory depend only on the length of the pickle, not on its contents.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from service.errors import ModelStoreError

_PUSHES_ITS_ARGUMENT = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    }
)
_PUSHES_A_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = frozenset(f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)) - {"f1"} | {"b1"}
_DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"})
_MARK = object()
# Modules whose functions act on the machine when an ordinary unpickler calls them. Nothing is called here, but a file
# that names them is an attack on other readers, so its owner should be told.
_PROGRAMS = frozenset(
    {
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "shutil",
        "socket",
        "pty",
        "runpy",
        "importlib",
        "ctypes",
        "code",
        "codeop",
        "marshal",
        "pickle",
        "_pickle",
        "operator",
        "webbrowser",
        "multiprocessing",
        "asyncio",
        "urllib",
        "http",
        "platform",
        "commands",
        "popen2",
        "timeit",
        "pdb",
        "bdb",
    }
)
_PROGRAM_BUILTINS = frozenset(
    {"eval", "exec", "execfile", "compile", "__import__", "open", "input", "raw_input", "breakpoint", "apply"}
)


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names; never imported."""

    name: str


@dataclass(slots=True, eq=False)
class Unread:
    """A call that the pickle asks for; never made.

    Attributes:
        name: the class or function, with its module.
        arguments: what it is called with.
        items: items that are set on the result, by key.
        state: the attributes given to the result.
    """

    name: str
    arguments: tuple[Any, ...]
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


def read_pickle(file: IO[bytes] | bytes, *, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The data in a pickle: dicts, lists, tuples, strings, numbers, and `Unread` for anything else.

    Args:
        file: read from the current position to the end of the pickle.
        persistent: returns the stand-in for an object stored outside the pickle, by its persistent id.

    Raises:
        ModelStoreError: it is not a pickle, or a program that does more than build data.
    """
    try:
        return _Machine(persistent).run(file)
    except ModelStoreError:
        raise
    except Exception as error:  # any effect of a broken program: an empty stack, an unknown memo, a truncated end
        raise ModelStoreError(f"not a pickle that can be read: {type(error).__name__}") from error


class _Machine:
    """The pickle machine without its calls: a stack, and a memo of reused objects."""

    def __init__(self, persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.persistent = persistent

    def run(self, file: IO[bytes] | bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ModelStoreError("the pickle ends early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHES_ITS_ARGUMENT:
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
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST" | "FROZENSET":
                stack.append(self._since_mark())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "DICT":
                stack.append(_pairs(self._since_mark()))
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                _extend(stack, self._since_mark())
            case "SETITEM":
                _update(stack, self._pop(2))
            case "SETITEMS":
                _update(stack, self._since_mark())
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "GLOBAL":
                stack.append(_harmless(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_harmless(".".join(self._pop(2))))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop(2)
                stack.append(_noted_call(function, arguments))
            case "NEWOBJ_EX":
                function, arguments, _ = self._pop(3)
                stack.append(_noted_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID":
                if self.persistent is None:
                    raise ModelStoreError("expected a pickle that holds its data itself, got one that points elsewhere")
                stack.append(self.persistent(stack.pop()))
            case _:
                raise ModelStoreError(f"expected a pickle of data, got the instruction {name}")

    def _pop(self, count: int) -> list[Any]:
        popped = [self.stack.pop() for _ in range(count)]
        return popped[::-1]

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]


def _extend(stack: list[Any], items: list[Any]) -> None:
    if isinstance(stack[-1], list):
        stack[-1].extend(items)
    elif not isinstance(stack[-1], Unread):
        raise TypeError("a list")


def _update(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1].items if isinstance(stack[-1], Unread) else stack[-1]
    if not isinstance(target, dict):
        raise TypeError("a dict")
    target.update(_pairs(items))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    # Only plain keys: hashing deeply nested tuples can take arbitrarily long.
    return {
        key: value
        for key, value in zip(items[::2], items[1::2], strict=True)
        if isinstance(key, str | int | float | bytes | None)
    }


def _harmless(name: str) -> Global:
    """The global, unless it is in a dangerous module."""
    module, _, rest = name.partition(".")
    if module in _PROGRAMS or (module in ("builtins", "__builtin__") and rest in _PROGRAM_BUILTINS):
        raise ModelStoreError(f"expected a checkpoint of tensors, got {name}, which was not run")
    return Global(name)


def _noted_call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ModelStoreError("expected a pickle of data, got one that calls what a call gave it")
    # NumPy 2 has renamed its private modules.
    name = function.name.replace("numpy._core.", "numpy.core.")
    if name in ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"):
        # This is how objects of ordinary classes are written; the class is the first argument.
        name = arguments[0].name if arguments and isinstance(arguments[0], Global) else name
    if name in _DICTS:
        return _dict_of(arguments)
    if name == "_codecs.encode" and len(arguments) == 2 and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")  # protocol 2's form of bytes
    return Unread(name, arguments)


def _dict_of(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """The dict built by `OrderedDict`, `defaultdict` or `Counter` from a factory, a dict, or a list of pairs."""
    given = arguments[-1] if arguments else None
    if isinstance(given, dict):
        return dict(given)
    return _pairs([item for pair in given for item in pair]) if isinstance(given, list) else {}


def _set_state(target: Any, state: Any) -> None:
    # Dicts get attributes too: `state_dict()` stores its modules' versions this way.
    if isinstance(target, Unread):
        target.state = state
    elif not isinstance(target, dict):
        raise ModelStoreError("expected a pickle of data, got one that changes what it names")


def array_of(value: Any) -> NDArray[Any] | None:
    """The NumPy array written as this value, None if it is not an array of numbers.

    Raises:
        ModelStoreError: it is an array of Python objects, or is inconsistent.
    """
    try:
        match value:
            case Unread(name="numpy.core.multiarray._reconstruct", state=(_, shape, dtype, bool(fortran), data)):
                return _array(data, dtype, shape, order="F" if fortran else "C")
            case Unread(name="numpy.core.numeric._frombuffer", arguments=(data, dtype, shape, str(order))):
                return _array(data, dtype, shape, order=order)
            case Unread(name="numpy.core.multiarray.scalar", arguments=(dtype, data)):
                return _array(data, dtype, (), order="C")
    except (ValueError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ModelStoreError("expected an array of numbers, got one whose data do not fit its shape") from error
    return None


def _array(data: Any, dtype: Any, shape: Any, *, order: str) -> NDArray[Any]:
    # Python 2 wrote bytes as a string of the characters 0 to 255.
    buffer = data.encode("latin-1") if isinstance(data, str) else data
    array = np.frombuffer(buffer, dtype=_dtype(dtype)).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(array.dtype.newbyteorder("="))


def _dtype(value: Any) -> np.dtype[Any]:
    match value:
        case Unread(name="numpy.dtype", arguments=(str(code), *_), state=(_, str(byte_order), *_)) if code in _NUMBERS:
            return np.dtype(f"{byte_order}{code}")
        case _:
            raise ModelStoreError(f"expected an array of numbers, got one of {described(value)}")


def described(value: Any) -> str:
    """A value in a few words, however large or deep it is."""
    match value:
        case Unread(name="numpy.dtype", arguments=(str(code), *_)):
            return f"dtype {code[:20]}"
        case Unread(name=name):
            return f"{name}, which was not run"
        case Global(name=name):
            return name
        case Mapping():
            return f"dict of {len(value)}"
        case _:
            return type(value).__name__

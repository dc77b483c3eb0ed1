"""PNG files of binary pictures that are mostly empty, at a cost proportional to the outline, not the area.

PNG's filter "up" stores each row as its difference from the row above, so a mask is all zeros except for the few bytes
that its outline crosses. This module writes the deflate stream of such rows directly: a run of zeros takes a handful of
symbols however long it is, and one multiplication for its share of the checksum. zlib would read every byte.

Deflate is RFC 1951, zlib RFC 1950, PNG ISO/IEC 15948.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from service.jit import compiled
from service.masks._runs import Int32Array
from service.structures import Int64Array, UInt8Array

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ADLER_MODULUS = 65521
_END_OF_BLOCK = 256
_LONGEST_MATCH = 258
_LAST_SYMBOL = 285  # the longest match
# The number of extra bits after each length symbol (257 to 285), and the length at which each begins.
_EXTRA_BITS = np.array([0] * 8 + [n for n in range(1, 6) for _ in range(4)] + [0])
_FIRST_LENGTHS = np.array([*(3 + np.concatenate([[0], (1 << _EXTRA_BITS[:-2]).cumsum()])), _LONGEST_MATCH])
# The order in which a block's header lists the code lengths of its code lengths.
_HEADER_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)


def _code_lengths() -> list[int]:
    """The number of bits of each literal and length symbol. One fixed Huffman code serves all masks, so none has to be
    computed.

    A match of 258 zeros takes one bit. A row consists of a 2 (its filter), a 0 and the rest of its zeros as a match,
    and 255 and 1 where the outline crosses whole bytes. Literals in the middle, the least likely differences of packed
    pixels, take the most bits. Long stretches of equal lengths keep the header short.
    """
    literals = [3, 5, 4] + [11] * 97 + [12] * 58 + [11] * 97 + [4]
    return [*literals, 11, *([8] * 28), 1]


def _canonical_codes(lengths: Sequence[int]) -> list[int]:
    """Each symbol's code, with its bits in the order in which deflate writes them: the first is the lowest."""
    codes = [0] * len(lengths)
    code = bits = 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length > 0):
        code <<= length - bits
        bits = length
        codes[symbol] = int(f"{code:0{bits}b}"[::-1], 2)
        code += 1
    return codes


def _block_header(lengths: Sequence[int]) -> tuple[UInt8Array, int]:
    """The header of the only deflate block, with this code and a single distance, 1: its bytes, and the number of valid
    bits.
    """
    # A length, then repetitions of it, 3 to 6 at a time.
    symbols: list[tuple[int, int, int]] = []  # symbol, extra value, extra bits
    for length, same in groupby([*lengths, 1]):
        count = len(list(same)) - 1
        symbols.append((length, 0, 0))
        while count >= 3:
            repeated = min(count, 6)
            symbols.append((16, repeated - 3, 2))
            count -= repeated
        symbols += [(length, 0, 0)] * count
    meta_lengths = [0] * 19
    for symbol, bits in ((16, 1), (11, 3), (12, 4), (8, 4), (5, 4), (4, 4), (3, 4), (1, 4)):
        meta_lengths[symbol] = bits
    codes = _canonical_codes(meta_lengths)
    counted = max(i for i, symbol in enumerate(_HEADER_ORDER) if meta_lengths[symbol]) + 1
    fields = [(1, 1), (2, 2), (len(lengths) - 257, 5), (0, 5), (counted - 4, 4)]  # last block; dynamic Huffman code
    fields += [(meta_lengths[symbol], 3) for symbol in _HEADER_ORDER[:counted]]
    for symbol, extra, extra_bits in symbols:
        fields += [(codes[symbol], meta_lengths[symbol]), (extra, extra_bits)]
    value = position = 0
    for number, bits in fields:
        value |= number << position
        position += bits
    return np.frombuffer(value.to_bytes(-(-position // 8), "little"), np.uint8), position


_LENGTHS = np.array(_code_lengths())
_CODES = np.array(_canonical_codes(_code_lengths()))
_HEADER, _HEADER_BITS = _block_header(_code_lengths())
# The symbol of every match length.
_LENGTH_SYMBOLS = 257 + np.searchsorted(_FIRST_LENGTHS, np.arange(_LONGEST_MATCH + 1), side="right") - 1


def png_file(columns: Int64Array, ys: Int32Array, first_x: int, size: tuple[int, int], *, bits_per_pixel: int) -> bytes:
    """A greyscale PNG in which the mask is white and everything else black.

    Args:
        columns: (C + 1,) where the bounds of each of the mask's columns begin in `ys`.
        ys: start, end, start, end, ... of the runs in rows of the picture, rising within a column.
        first_x: the picture column of the mask's first column.
        size: (height, width) of the picture; the mask lies inside.
        bits_per_pixel: 1 or 8.
    """
    height, width = size
    stream, adler = _deflate(columns, ys, first_x, height, width, bits_per_pixel)
    data = b"\x78\x01" + stream.tobytes() + struct.pack(">I", adler)
    header = struct.pack(">IIBBBBB", width, height, bits_per_pixel, 0, 0, 0, 0)
    return b"".join((_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", data), *_chunk(b"IEND", b"")))


def smallest_file(size: tuple[int, int], *, bits_per_pixel: int) -> int:
    """The size in bytes of `png_file`'s result for an empty mask, to within a few bytes: no mask's file is smaller."""
    height, width = size
    matches = height * (1 + -(-width * bits_per_pixel // 8)) // _LONGEST_MATCH
    return 63 + (_HEADER_BITS + 2 * matches) // 8


def _chunk(kind: bytes, data: bytes) -> Iterable[bytes]:
    return struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


@compiled()
def _deflate(
    columns: Int64Array, ys: Int32Array, first_x: int, height: int, width: int, bits_per_pixel: int
) -> tuple[UInt8Array, int]:
    """The filtered rows of the picture as a deflate stream, and their Adler-32."""
    row_bytes = (width * bits_per_pixel + 7) // 8
    top, bottom = height, 0
    for i in range(0, len(ys), 2):
        top, bottom = min(top, ys[i]), max(bottom, ys[i + 1])
    top = min(top, bottom)
    first_event, event_bytes, event_values = _sort_by_row(columns, ys, first_x, top, bottom, bits_per_pixel)
    # At most two symbols of up to 16 bits for each run of zeros besides its long matches, and one for each literal.
    zero_runs = len(event_bytes) + (bottom - top) + 2
    out = np.zeros(64 + len(_HEADER) + height * (1 + row_bytes) // 1000 + 12 * zero_runs, np.uint8)
    out[: len(_HEADER)] = _HEADER
    # The number of bits written, Adler-32's two sums, and the last byte of the data so far.
    state = np.array([_HEADER_BITS, 1, 0, -1], np.int64)
    _append_zeros(out, state, top * (1 + row_bytes))
    for row in range(bottom - top):
        _append_literal(out, state, 2)
        done = 0
        i = first_event[row]
        while i < first_event[row + 1]:
            position, value = event_bytes[i], 0
            # Several pixels in one byte, or an end and a start in one column that cancel out.
            while i < first_event[row + 1] and event_bytes[i] == position:
                value += event_values[i]
                i += 1
            if value % 256 != 0:
                _append_zeros(out, state, position - done)
                _append_literal(out, state, value % 256)
                done = position + 1
        _append_zeros(out, state, row_bytes - done)
    # Rows below the mask are not filtered, so zeros mean black again.
    _append_zeros(out, state, (height - bottom) * (1 + row_bytes))
    _append_bits(out, state, _CODES[_END_OF_BLOCK], _LENGTHS[_END_OF_BLOCK])
    return out[: (state[0] + 7) // 8].copy(), (state[2] << 16) | state[1]


@compiled()
def _sort_by_row(
    columns: Int64Array, ys: Int32Array, first_x: int, top: int, bottom: int, bits_per_pixel: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Which bytes differ from the byte above, and by how much: row by row from `top`, left to right within a row.

    Row r has the events `first_event[r]` to `first_event[r + 1]`. Run ends at `bottom` belong to no row.
    """
    first_event = np.zeros(bottom - top + 1, np.int64)
    for y in ys:
        if y < bottom:
            first_event[y - top + 1] += 1
    first_event = first_event.cumsum()
    following = first_event.copy()
    event_bytes = np.empty(first_event[-1], np.int64)
    event_values = np.empty(first_event[-1], np.int64)
    for column in range(len(columns) - 1):
        x = first_x + column
        white = 255 if bits_per_pixel == 8 else 128 >> (x % 8)
        for i in range(columns[column], columns[column + 1]):
            if ys[i] < bottom:
                at = following[ys[i] - top]
                following[ys[i] - top] += 1
                event_bytes[at] = x * bits_per_pixel // 8
                event_values[at] = -white if (i - columns[column]) % 2 else white
    return first_event, event_bytes, event_values


@compiled()
def _append_zeros(out: UInt8Array, state: Int64Array, count: int) -> None:
    """Append `count` zero bytes."""
    if count > 0 and state[3] != 0:
        _append_literal(out, state, 0)
        count -= 1
    state[2] = (state[2] + count % _ADLER_MODULUS * state[1]) % _ADLER_MODULUS
    # The remainder after the longest matches is 0 or at least 3, the length of the shortest match.
    longest = (count - 3) // _LONGEST_MATCH if count >= _LONGEST_MATCH + 3 else 0
    count -= longest * _LONGEST_MATCH
    if count == _LONGEST_MATCH:
        longest, count = longest + 1, 0
    _append_longest_matches(out, state, longest)
    if count > _LONGEST_MATCH:
        _append_match(out, state, count - 3)
        count = 3
    if count >= 3:
        _append_match(out, state, count)
    else:
        for _ in range(count):
            _append_bits(out, state, _CODES[0], _LENGTHS[0])


@compiled()
def _append_literal(out: UInt8Array, state: Int64Array, value: int) -> None:
    state[1] = (state[1] + value) % _ADLER_MODULUS
    state[2] = (state[2] + state[1]) % _ADLER_MODULUS
    state[3] = value
    _append_bits(out, state, _CODES[value], _LENGTHS[value])


@compiled()
def _append_match(out: UInt8Array, state: Int64Array, length: int) -> None:
    """Repeat the last byte `length` times, 3 to 258."""
    symbol = _LENGTH_SYMBOLS[length]
    _append_bits(out, state, _CODES[symbol], _LENGTHS[symbol])
    # The extra bits, and one for the distance.
    _append_bits(out, state, length - _FIRST_LENGTHS[symbol - 257], _EXTRA_BITS[symbol - 257] + 1)


@compiled()
def _append_longest_matches(out: UInt8Array, state: Int64Array, count: int) -> None:
    """Repeat the last byte 258 times, so often: the same two bits again and again, which fill whole bytes."""
    start, end = state[0], state[0] + 2 * count
    pattern = 0
    for bit in range(8):
        # The symbol's only bit, then the distance's, which is 0.
        pattern |= (_CODES[_LAST_SYMBOL] if (bit - start) % 2 == 0 else 0) << bit
    first, last = start >> 3, end >> 3
    from_start, to_end = 255 & (255 << (start & 7)), (1 << (end & 7)) - 1
    if first == last:
        out[first] |= pattern & from_start & to_end
    else:
        out[first] |= pattern & from_start
        out[first + 1 : last] = pattern
        out[last] |= pattern & to_end
    state[0] = end


@compiled()
def _append_bits(out: UInt8Array, state: Int64Array, value: int, count: int) -> None:
    """Append the lowest `count` bits of a value, lowest first; at most 17."""
    position, shift = state[0] >> 3, state[0] & 7
    value <<= shift
    out[position] |= value & 255
    out[position + 1] |= (value >> 8) & 255
    out[position + 2] |= (value >> 16) & 255
    state[0] += count

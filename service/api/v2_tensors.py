"""The Open Inference Protocol's tensors, in JSON and in its binary extension: parses the bytes of a request into
images, and writes arrays as the bytes of an answer.

Source: the protocol's REST specification, https://github.com/kserve/open-inference-protocol, and the extension's,
`docs/protocol/extension_binary_data.md` of https://github.com/triton-inference-server/server.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from service.api.ask import require_count
from service.api.json_body import decode_base64, parse_model
from service.api.options import GivenOptions
from service.api.schemas import InPieces, json_pieces
from service.errors import AnswerTooLargeError, InvalidRequestError, shown
from service.structures import Encoded, Pixels, Source, UInt8Array

EXPECTED_INPUT = "one input 'image': BYTES [n], encoded images, or UINT8 [n, height, width, 3], RGB"
DATATYPES: Mapping[str, str] = {
    "|b1": "BOOL",
    "|u1": "UINT8",
    "<i4": "INT32",
    "<i8": "INT64",
    "<f2": "FP16",
    "<f4": "FP32",
    "<f8": "FP64",
}
"""The protocol's names of NumPy's types."""

_LENGTH_BYTES = 4
# As text these take about a millisecond, and the GIL.
_NUMBERS_AT_A_TIME = 32 * 1024
_BYTES = re.compile("[0-9]{1,18}")
# The number of dimensions of one picture's tensor, and of a batch's.
_PICTURE_DIMENSIONS, _BATCH_DIMENSIONS = 3, 4


class Tensor(BaseModel):
    """An input of a request."""

    name: str = Field(description="image", examples=["image"])
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=8)] = Field(
        examples=[[1]]
    )
    datatype: str = Field(description="BYTES or UINT8", examples=["BYTES"])
    parameters: GivenOptions = Field({}, description="`binary_data_size`, if the data follow the JSON.")
    data: list[Any] | None = Field(None, description="For BYTES, images in base64; for UINT8, numbers from 0 to 255.")


class Output(BaseModel):
    """An output that is asked for."""

    name: str = Field(examples=["boxes"])
    parameters: GivenOptions = Field({}, description="`binary_data`: whether its data are to follow the JSON.")


class InferRequest(BaseModel):
    """The JSON of a request."""

    id: str | None = None
    parameters: GivenOptions = Field(
        {},
        description="Options of `/v1/detect`: score_thresh, max_detections, labels, roi_op, timeout_ms. `timeout` is "
        "in microseconds; `priority` is ignored; `binary_data_output` says whether outputs follow the JSON.",
    )
    inputs: Annotated[list[Tensor], Field(max_length=16)] = Field(description=EXPECTED_INPUT)
    outputs: Annotated[list[Output], Field(max_length=64)] | None = Field(
        None,
        description="Unset: boxes, labels, scores, image_index and, if the model has them, masks. "
        "class_scores only if it is named.",
    )

    def is_binary(self, output: Output) -> bool:
        """Whether the data of an output should follow the JSON."""
        return bool(output.parameters.get("binary_data", self.parameters.get("binary_data_output", False)))


@dataclass(frozen=True, slots=True, eq=False)
class ParsedRequest:
    """What a body held."""

    document: InferRequest
    sources: Sequence[Source]


def parse_request(body: bytes, header_length: str | None) -> ParsedRequest:
    """Read a request's body.

    Args:
        header_length: the HTTP header `Inference-Header-Content-Length`: how many bytes of JSON come before the binary
            data. None if all is JSON; 0 if the whole body is one encoded image.

    Raises:
        InvalidRequestError: the body does not match the header and its JSON, or holds no image.
    """
    if header_length is not None and not (_BYTES.fullmatch(header_length) and int(header_length) <= len(body)):
        raise InvalidRequestError(
            f"expected a header Inference-Header-Content-Length of at most the body's {len(body)} bytes, "
            f"got {reprlib.repr(header_length)}"
        )
    json_bytes = len(body) if header_length is None else int(header_length)
    if header_length is not None and json_bytes == 0:
        image = Tensor(name="image", shape=[1], datatype="BYTES")
        return ParsedRequest(InferRequest(inputs=[image]), [Encoded(body)])
    document = parse_model(InferRequest, body[:json_bytes])
    if len(document.inputs) != 1 or document.inputs[0].name != "image":
        names = ", ".join(reprlib.repr(one.name) for one in document.inputs) or "none"
        raise InvalidRequestError(f"expected {EXPECTED_INPUT}; got the inputs {names}")
    if any(name.startswith("shared_memory") for one in document.inputs for name in one.parameters):
        raise InvalidRequestError("shared memory is not supported; send the data in the request")
    return ParsedRequest(document, _read_images(document.inputs[0], body[json_bytes:]))


def _read_images(tensor: Tensor, binary: bytes) -> Sequence[Source]:
    size = tensor.parameters.get("binary_data_size")
    if size is not None and not isinstance(size, int):
        raise InvalidRequestError(f"'binary_data_size': expected a whole number of bytes, got {shown(size)}")
    if size is not None and tensor.data is not None:
        raise InvalidRequestError("the input 'image' has both 'data' and 'binary_data_size'; expected one of them")
    if size is None and tensor.data is None:
        raise InvalidRequestError("the input 'image' has neither 'data' nor 'binary_data_size'")
    if len(binary) != (size or 0):
        raise InvalidRequestError(f"expected {size or 0} bytes after the JSON, got {len(binary)}")
    if tensor.datatype == "BYTES":
        return _encoded_images(tensor, binary)
    if tensor.datatype == "UINT8":
        return _pictures(tensor, binary)
    raise InvalidRequestError(f"expected {EXPECTED_INPUT}; got the datatype {reprlib.repr(tensor.datatype)}")


def _encoded_images(tensor: Tensor, binary: bytes) -> Sequence[Source]:
    count = math.prod(tensor.shape)
    require_count(count)
    if tensor.data is None:
        images = _split(binary, count)
    else:
        if len(tensor.data) != count:
            raise _wrong_count(tensor, len(tensor.data))
        if not all(isinstance(one, str) for one in tensor.data):
            raise InvalidRequestError("the input 'image' in JSON: expected texts, each an image in base64")
        images = [decode_base64(one.encode(errors="replace")) for one in tensor.data]
    if len(images) != count:
        raise _wrong_count(tensor, f"{len(images)} or more" if len(images) > count else len(images))
    return [Encoded(one) for one in images]


def _wrong_count(tensor: Tensor, count: int | str) -> InvalidRequestError:
    return InvalidRequestError(f"the input 'image' has the shape {tensor.shape}, but {count} elements")


def _split(binary: bytes, count: int) -> list[bytes]:
    """The elements of a BYTES tensor, or the first few if there are more than `count`: each is a length (4 bytes,
    little-endian), then that many bytes.
    """
    elements: list[bytes] = []
    at = 0
    while at < len(binary) and len(elements) <= count:
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(binary[at:start], "little")
        if start > len(binary) or at > len(binary):
            raise InvalidRequestError("the binary data of the input 'image' break off within an element")
        elements.append(binary[start:at])
    return elements


def _pictures(tensor: Tensor, binary: bytes) -> Sequence[Source]:
    shape = [1, *tensor.shape] if len(tensor.shape) == _PICTURE_DIMENSIONS else tensor.shape
    if len(shape) != _BATCH_DIMENSIONS or shape[3] != 3 or 0 in shape:
        raise InvalidRequestError(f"expected UINT8 [n, height, width, 3], RGB; got the shape {tensor.shape}")
    require_count(shape[0])
    values = np.frombuffer(binary, np.uint8) if tensor.data is None else _numbers(tensor.data)
    if values.size != math.prod(shape):
        raise _wrong_count(tensor, values.size)
    return [Pixels(one) for one in values.reshape(shape)]


def _numbers(data: list[Any]) -> UInt8Array:
    _check_numbers(data, _BATCH_DIMENSIONS)
    try:
        values = np.asarray(data)
    except ValueError:
        raise InvalidRequestError("the input 'image': its nested lists have different lengths") from None
    if values.dtype.kind not in "iu" or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise InvalidRequestError("the input 'image': expected whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _check_numbers(data: list[Any], dimensions: int) -> None:
    """Refuse texts, since NumPy would give each element the room of the longest one, and lists nested more deeply."""
    for one in data:
        if isinstance(one, list) and dimensions > 1:
            _check_numbers(one, dimensions - 1)
        elif not isinstance(one, int | float):
            raise InvalidRequestError(f"the input 'image': expected whole numbers from 0 to 255, got {shown(one)}")


def write_answer(
    fields: Mapping[str, object], outputs: Sequence[tuple[str, Sequence[NDArray[Any]], bool]], *, max_json_bytes: int
) -> tuple[list[bytes], int | None]:
    """An answer's body. Works on some ten thousand numbers at a time, so that other threads get the GIL in between.

    Args:
        fields: the members beside `outputs`.
        outputs: name, arrays that follow each other along the first axis, and whether the values follow the JSON as
            binary data.

    Returns:
        The bytes in pieces, and how many of them are JSON; None if all are.

    Raises:
        AnswerTooLargeError: the values would take more than `max_json_bytes` in JSON.
    """
    described, binary, size = [], list[bytes](), 0
    for name, arrays, is_binary in outputs:
        one: dict[str, object] = {
            "name": name,
            "datatype": DATATYPES[arrays[0].dtype.str],
            "shape": [sum(map(len, arrays)), *arrays[0].shape[1:]],
        }
        if is_binary:
            values = [array.tobytes() for array in arrays]
            one["parameters"] = {"binary_data_size": sum(map(len, values))}
            binary += values
        else:
            values = []
            for piece in _as_text(arrays):
                values.append(piece)
                size += len(piece)
                if size > max_json_bytes:
                    raise AnswerTooLargeError(
                        f"the answer would have more than {max_json_bytes} bytes of JSON; ask for binary data "
                        "(binary_data_output), send fewer images, or leave out the output 'masks'"
                    )
            one["data"] = InPieces(values)
        described.append(one)
    head = json_pieces({**fields, "outputs": described})
    return [*head, *binary], sum(map(len, head)) if binary else None


def _as_text(arrays: Sequence[NDArray[Any]]) -> Iterator[bytes]:
    """All values as one flat JSON array."""
    comma = b"["
    for array in arrays:
        flat = np.ascontiguousarray(array).ravel()
        for start in range(0, len(flat), _NUMBERS_AT_A_TIME):
            some = orjson.dumps(flat[start : start + _NUMBERS_AT_A_TIME], option=orjson.OPT_SERIALIZE_NUMPY)
            yield comma + some[1:-1]
            comma = b","
    yield b"]" if comma == b"," else b"[]"

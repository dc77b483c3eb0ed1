"""What bodies mean: JSON."""

from __future__ import annotations

import base64
import json
import re

import pytest

from service.api.body import _parse_json
from service.errors import InvalidRequestError

IMAGE = bytes(range(256)) * 10
TEXT = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("/", r"\/"), ""])
def test_image_and_options_are_read_however_json_writes_them(text: str) -> None:
    upload = _parse_json(b'{"masks": "none", "image": "%s", "proposals": [[1, 2, 3, 4]]}' % text.encode())
    assert upload.images == [IMAGE if text else b""]
    assert upload.json == {"masks": "none", "proposals": [[1, 2, 3, 4]]}


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (f'{{"image": "{TEXT}", "masks": "rle", "masks": "none"}}', "masks"),
        (f'{{"image": "{TEXT}", "masks": "rle", "m\\u0061sks": "none"}}', "masks"),
        (f'{{"image": "{TEXT}", "image": "{TEXT}"}}', "image"),
        ('{"image": "", "image": ""}', "image"),
        (f'{{"image": "{TEXT}", "proposals": {{"a": 1, "a": 2}}}}', "a"),
    ],
)
def test_key_that_comes_twice_is_named(body: str, key: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(f"the key '{key}' 2 times")):
        _parse_json(body.encode())


def test_equal_texts_under_different_keys_are_no_repetition() -> None:
    assert _parse_json(json.dumps({"image": TEXT, "masks": TEXT, "model": "image"}).encode()).images == [IMAGE]


def test_deep_nesting_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequestError, match=r"nested too deeply|not JSON"):
        _parse_json(b'{"image": "", "proposals": ' + b"[" * 1020 + b"]" * 1020 + b"}")

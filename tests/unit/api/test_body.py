"""JSON bodies: what they mean, and what no document can make us do."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable

import orjson
import pytest

from service.api.json_body import MAX_JSON_BYTES, parse_document, parse_json
from service.errors import InvalidRequestError, TooLargeError

IMAGE = bytes(range(256)) * 10
TEXT = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("/", r"\/"), ""])
def test_image_and_options_are_read_however_json_writes_them(text: str) -> None:
    image, fields = parse_json(b'{"masks": "none", "image": "%s", "proposals": [[1, 2, 3, 4]]}' % text.encode())
    assert image == (IMAGE if text else b"")
    assert fields == {"masks": "none", "proposals": [[1, 2, 3, 4]]}


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
        parse_json(body.encode())


def test_equal_texts_under_different_keys_are_no_repetition() -> None:
    assert parse_json(json.dumps({"image": TEXT, "masks": TEXT, "model": "image"}).encode())[0] == IMAGE


def test_deep_nesting_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequestError, match=r"nested too deeply|not JSON"):
        parse_json(b'{"image": "", "proposals": ' + b"[" * 1020 + b"]" * 1020 + b"}")


LARGE = bytes(range(256)) * 4000
LARGE_TEXT = base64.b64encode(LARGE).decode()


@pytest.mark.parametrize("image", [IMAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "write",
    [
        lambda text: text,
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: f"data:image/png;base64,{text}",
        lambda text: text.replace("/", "\\/"),
        lambda text: "\\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        lambda text: "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        lambda text: "".join(f"\\u{ord(one):04x}" for one in text),
    ],
    ids=["plain", "no padding", "URL-safe", "data URL", "escaped", "escaped lines", "lines of a shell", "all escaped"],
)
def test_base64_is_read_as_it_comes(image: bytes, write: Callable[[str], str]) -> None:
    body = f'{{"masks": "none", "image": "{write(base64.b64encode(image).decode())}", "model": "a"}}'
    assert parse_json(body.encode()) == (image, {"masks": "none", "model": "a"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://x/a.png", "addresses are not fetched"),
        ("photos/a.png", "looks like a path"),
        ("C:\\\\a.png", "looks like a path"),
        ("data:image/png,xyz", "data: URL, but not in base64"),
        ("a$$b", "not base64"),
        ("aGk=aGk=", "not base64"),
        (LARGE_TEXT + "=" + LARGE_TEXT, "not base64"),
        (LARGE_TEXT[:1048572] + "aGk=" + LARGE_TEXT, "not base64"),
        ("\\ud800", "not base64"),
        ("é", "not base64"),
    ],
)
def test_what_is_no_base64_is_named_for_what_it_is(text: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        parse_json(f'{{"image": "{text}"}}'.encode())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"image_url": "x"}', "got 'image_url': addresses are not fetched"),
        ('{"images": ["x"]}', "/v1/detect/batch"),
        ('{"instances": []}', "got 'instances'"),
        ('{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', "got the keys 'a', 'b', 'c', and 2 more"),
        ("[]", "expected a JSON object"),
        ('{"image": 1}', "expected base64, got 1"),
        ('{"image": "", "score_thresh": NaN}', "not JSON"),
        (f'{{"image": "", "x": {"1" * 5000}}}', "digits"),
        (f'{{"{"a" * 300_000}": 1}}', "a key of 300000 bytes"),
        ('{"image": "' + "\\" * 300_000 + '"}', "backslashes"),
    ],
)
def test_json_without_an_image_is_told_what_is_missing(body: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        parse_json(body.encode())


@pytest.mark.parametrize("padding", [2000, 400_000])
def test_image_whose_text_stands_elsewhere_too_is_no_error_of_ours(padding: int) -> None:
    text = "p" * padding
    with pytest.raises(InvalidRequestError):
        parse_json(f'{{"b":"{text}","image":"\\":\\"{text}"}}'.encode())


@pytest.mark.parametrize(
    "flood",
    [
        b"[" + b"1," * 3_999_999 + b"1]",
        b"[" + b"{}," * 3_999_999 + b"{}]",
        b"[" * 1_000_000,
        b'"' * 2_000_000,
        b'"' + b'\\"' * 2_000_000,
        b'["' + b'","' * 2_000_000,
    ],
)
def test_documents_of_many_values_are_never_parsed(flood: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(TooLargeError, match=f"at most {MAX_JSON_BYTES}"):
        parse_json(b'{"image":"","x":' + flood)


@pytest.mark.parametrize("flood", [b"1," * 1000, b"[[[[]]]]," * 250, b'{"":{"":{}}},' * 400])
def test_documents_of_other_protocols_of_many_values_are_never_parsed(
    flood: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(parse_document(b'{"x":[' + flood + b"1]}", max_values=2000)["x"]) > 200
    monkeypatch.setattr(orjson, "loads", None)
    with pytest.raises(TooLargeError, match="more than the 900 values"):
        parse_document(b'{"x":[' + flood + b"1]}", max_values=900)


def test_two_thousand_proposals_with_all_digits_fit_beside_a_large_image() -> None:
    boxes = [
        [0.12345678901234567 + i, 1.12345678901234567, 1234.5678901234567, 2345.6789012345678] for i in range(2000)
    ]
    image, fields = parse_json(json.dumps({"proposals": boxes, "image": LARGE_TEXT}).encode())
    assert (image, fields) == (LARGE, {"proposals": boxes})

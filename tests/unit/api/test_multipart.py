"""Which parts of a form are files, and which forms are refused."""

from __future__ import annotations

import re

import pytest

from service.api import multipart
from service.api.multipart import FormPart, FormReader
from service.errors import InvalidRequestError, TooLargeError


def parse(disposition: str) -> FormPart:
    reader = FormReader("multipart/form-data; boundary=b")
    reader.feed(f"--b\r\nContent-Disposition: {disposition}\r\n\r\nabc\r\n--b--\r\n".encode())
    (part,) = reader.finish()
    return part


@pytest.mark.parametrize(
    ("parameters", "is_file"),
    [
        ('filename="a.png"', True),
        ('filename=""', True),
        ("filename*=UTF-8''na%C3%AFve.png", True),
        ("FileName*=utf-8''a", True),
        ("filename=\"a.png\"; filename*=UTF-8''a.png", True),
        ('x="y"', False),
        ('x="; filename*=a"', False),
        ('x="\\"; filename*=a"', False),
        ("xfilename*=a", False),
    ],
)
def test_part_with_a_filename_of_either_form_is_a_file(parameters: str, is_file: bool) -> None:
    part = parse(f'form-data; name="image"; {parameters}')
    assert (part.name, part.is_file, bytes(part.data)) == ("image", is_file, b"abc")


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ('filename="a.png"', "a.png"),
        ('filename="C:\\\\pictures\\\\a.png"', "a.png"),
        ('filename="folder/a.png"', "a.png"),
        ("filename*=UTF-8''na%C3%AFve.png", "naïve.png"),
        ("filename=\"a.png\"; filename*=UTF-8''b.png", "a.png"),
        ('filename=""', ""),
        ('x="y"', ""),
    ],
)
def test_file_has_the_last_part_of_its_name(parameters: str, name: str) -> None:
    assert parse(f'form-data; name="image"; {parameters}').file_name == name


@pytest.mark.parametrize(
    "disposition",
    ['form-data; name="a"; name="b"', 'form-data; name="a"\r\nContent-Disposition: form-data; name="b"', 'x; name="a'],
)
def test_header_that_readers_would_differ_over_is_refused(disposition: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"twice|expected '; name="):
        parse(disposition)


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data; boundary=a; boundary=b", "multipart/form-data; Boundary=a;boundary=b"]
)
def test_two_boundaries_are_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequestError, match="'boundary' twice"):
        FormReader(content_type)


@pytest.mark.parametrize(
    "content_type", ['multipart/form-data; charset=utf-8; boundary="b"', "multipart/form-data;boundary=b;"]
)
def test_boundary_is_found_wherever_it_stands(content_type: str) -> None:
    reader = FormReader(content_type)
    reader.feed(b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n')
    assert [(part.name, part.text) for part in reader.finish()] == [("a", "x")]


def test_names_may_hold_quotes_and_semicolons() -> None:
    assert parse('form-data; name="a\\"; \\\\b"; filename="x;y"').name == 'a"; \\b'


def test_fields_and_headers_are_bounded_and_files_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "_MAX_FIELD_BYTES", 100)
    monkeypatch.setattr(multipart, "_MAX_HEADER_BYTES", 1000)
    head = '--b\r\nContent-Disposition: form-data; name="a"'
    reader = FormReader("multipart/form-data; boundary=b")
    reader.feed(f'{head}; filename="x"\r\n\r\n'.encode() + b"x" * 1000)
    with pytest.raises(TooLargeError, match="fields"):
        reader.feed(f"\r\n{head}\r\n\r\n".encode() + b"x" * 101 + b"\r\n")
    with pytest.raises(TooLargeError, match="headers"):
        FormReader("multipart/form-data; boundary=b").feed(f"{head}; x={'y' * 1000}\r\n".encode())


@pytest.mark.parametrize(
    "value", ['"' + '\\"' * 2000, '"' * 4000, '"\\' * 2000, "; " * 2000, ";a=" * 1300, "\t" * 4000 + "x"]
)
def test_each_byte_of_a_header_is_looked_at_a_bounded_number_of_times(value: str) -> None:
    """Counted in tries of the pattern, which stops where it does not match rather than try again a byte later."""
    matches = 0

    class Counting:
        def match(self, header: bytes, at: int) -> re.Match[bytes] | None:
            nonlocal matches
            matches += 1
            return pattern.match(header, at)

    pattern = multipart._PARAMETER
    multipart._PARAMETER = Counting()  # type: ignore[assignment]
    try:
        multipart._parameters(f"form-data; name=x; y={value}".encode())
    except InvalidRequestError:
        pass
    finally:
        multipart._PARAMETER = pattern
    assert matches <= 1 + value.count(";") + 2

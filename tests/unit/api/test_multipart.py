"""Which parts of a form are files."""

from __future__ import annotations

import pytest

from service.api.multipart import FormPart, FormReader


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

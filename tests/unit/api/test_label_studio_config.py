"""A labeling configuration is read for its tags that take regions, and nothing in it can do harm."""

from __future__ import annotations

import pytest

from service.api.label_studio_config import Control, read_controls
from service.errors import InvalidRequestError, TooLargeError

RECTANGLES = '<RectangleLabels name="box" toName="image"><Label value="Cat"/><Label value="dog"/></RectangleLabels>'
THRESHOLD = RECTANGLES.replace("toName", 'model_score_threshold="{}" toName')
IMAGE = '<Image name="image" value="$photo" zoom="true"/>'


def test_tags_are_found_wherever_they_stand() -> None:
    config = f"""<?xml version="1.0"?><!-- of a project --><View>
        <View style="display:flex">{RECTANGLES}
        <BrushLabels name="brush" toName="other,image" model_score_threshold="0.5"><Label value="a &amp; b"/>
        </BrushLabels>
        <PolygonLabels name="outline" toName="image"/></View>
        <Choices name="c" toName="image"><Choice value="x"/><Label value="stray"/></Choices>{IMAGE}</View>"""
    assert read_controls(config) == [
        Control("rectanglelabels", "box", "image", "photo", ("Cat", "dog")),
        Control("brushlabels", "brush", "image", "photo", ("a & b",), 0.5),
        Control("polygonlabels", "outline", "image", "photo", ()),
    ]


def test_labels_match_exactly_else_in_other_letter_case() -> None:
    control = Control("rectanglelabels", "box", "image", "photo", ("CAT", "cat", "Dog", "bird"))
    assert control.match(("cat", "dog", "Cat", "horse")) == {"cat": "cat", "dog": "Dog", "Cat": "CAT"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "not XML: no element found"),
        ("<View>", "not XML"),
        ("<View/>", "no tag that takes objects"),
        (f"<View>{RECTANGLES}</View>", "no tag that takes objects"),
        (f"<View>{RECTANGLES}<Image name='image' value='http://a/b.jpg'/></View>", "no tag that takes objects"),
        (f"<View>{IMAGE}<Text name='image' value='$text'/></View>", "no tag that takes objects"),
        (f"<View>{THRESHOLD.format(2)}{IMAGE}</View>", "expected 0 to 1, got '2'"),
        (f"<View>{THRESHOLD.format('nan')}{IMAGE}</View>", "expected 0 to 1, got 'nan'"),
        ("\x00", "not XML"),
        ("<View>\ud800</View>", "no tag that takes objects"),
        ('<?xml version="1.0" encoding="latin-1"?><View>\xe9</View>', "no tag"),
        ("<!DOCTYPE View><View/>", "document type declaration"),
        ('<!DOCTYPE View SYSTEM "file:///etc/passwd"><View/>', "document type declaration"),
        ('<!DOCTYPE v [<!ENTITY x SYSTEM "http://127.0.0.1:1/">]><View>&x;</View>', "document type declaration"),
        ('<!DOCTYPE v [<!ENTITY % x SYSTEM "http://127.0.0.1:1/"> %x;]><View/>', "document type declaration"),
        ("<View>&undefined;</View>", "not XML: undefined entity"),
    ],
)
def test_anything_else_is_refused_in_words(config: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        read_controls(config)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "shift_jis", "idna", "no-such-encoding"])
def test_declared_encoding_does_not_matter_as_the_text_comes_in_json(encoding: str) -> None:
    rectangles = RECTANGLES.replace("Cat", "caf\u00e9")
    [control] = read_controls(f'<?xml version="1.0" encoding="{encoding}"?><View>{rectangles}{IMAGE}</View>')
    assert control.labels == ("caf\u00e9", "dog")


def test_entities_never_expand() -> None:
    """A thousand million laughs would take gigabytes."""
    entities = '<!ENTITY l0 "lol">' + "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    with pytest.raises(InvalidRequestError, match="document type declaration"):
        read_controls(f"<!DOCTYPE lolz [{entities}]><View>&l9;</View>")


def test_long_configurations_are_refused_and_deep_ones_are_read() -> None:
    with pytest.raises(TooLargeError, match="at most 1048576 are read"):
        read_controls(" " * 2**20 + "<View/>")
    with pytest.raises(TooLargeError, match="has 51 tags"):
        read_controls(f"<View>{IMAGE}{RECTANGLES * 51}</View>")
    with pytest.raises(TooLargeError, match="a name of over 1000"):
        read_controls(f"<View>{IMAGE}{RECTANGLES}</View>".replace("photo", "p" * 1001))
    deep = 40_000
    assert len(read_controls("<View>" * deep + IMAGE + RECTANGLES + "</View>" * deep)) == 1

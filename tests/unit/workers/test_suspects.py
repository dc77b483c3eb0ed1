"""What is remembered of suspects: the same image, for an hour, and not too many."""

from __future__ import annotations

import numpy as np

from service.structures import Coco, DetectOptions, Encoded, Form, Job, Json, Pixels, Progress, Source
from service.workers.suspects import KnownSuspects


def job(source: Source | bytes, *, model: str = "fake@1", form: Form | None = None) -> Job:
    return Job(
        model=model,
        source=Encoded(source) if isinstance(source, bytes) else source,
        options=DetectOptions(),
        form=form or Json(),
        deadline=0.0,
        progress=Progress("body"),
    )


def test_same_image_is_known_and_others_of_its_length_are_not() -> None:
    known = KnownSuspects()
    known.remember(job(b"bad"), 1)
    assert known.deaths_alone(job(b"bad")) == 1
    assert known.deaths_alone(job(b"abd")) is None
    assert known.deaths_alone(job(b"bad", model="other@1")) is None


def test_pixels_are_known_by_their_shape_and_values() -> None:
    known = KnownSuspects()
    known.remember(job(Pixels(np.zeros((2, 3, 3), np.uint8))), 0)
    assert known.deaths_alone(job(Pixels(np.zeros((2, 3, 3), np.uint8)))) == 0
    assert known.deaths_alone(job(Pixels(np.zeros((3, 2, 3), np.uint8)))) is None


def test_image_is_known_whatever_it_is_called() -> None:
    known = KnownSuspects()
    known.remember(job(b"bad", form=Coco("a.png")), 1)
    assert known.deaths_alone(job(b"bad", form=Coco(139))) == 1
    assert known.deaths_alone(job(b"bad", form=Coco(139, with_masks=True))) is None


def test_record_is_never_lowered_and_goes_when_the_image_proves_harmless() -> None:
    known = KnownSuspects()
    known.remember(job(b"bad"), 2)
    known.remember(job(b"bad"), 0)
    assert known.deaths_alone(job(b"bad")) == 2
    known.forget(job(b"bad"))
    assert known.deaths_alone(job(b"bad")) is None


def test_record_is_forgotten_after_a_while() -> None:
    now = 0.0
    known = KnownSuspects(seconds=10, clock=lambda: now)
    known.remember(job(b"bad"), 2)
    now = 9.9
    assert known.deaths_alone(job(b"bad")) == 2
    now = 10.0
    assert known.deaths_alone(job(b"bad")) is None


def test_oldest_record_goes_when_there_are_too_many() -> None:
    known = KnownSuspects(max_size=2)
    for data in (b"1", b"2", b"1", b"3"):
        known.remember(job(data), 0)
    assert [known.deaths_alone(job(data)) for data in (b"1", b"2", b"3")] == [0, None, 0]

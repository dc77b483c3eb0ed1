"""Padding to buckets: every picture to the smallest of a few sizes, whatever else is in its batch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from service.modeling.buckets import derive_buckets, smallest_bucket
from service.modeling.config import TransformConfig
from service.modeling.transform import Transform

# Each height x width; the buckets are 96 x 96, 96 x 128, 128 x 96, ….
CONFIG = TransformConfig(min_size=80, max_size=133)


def bucketed(config: TransformConfig = CONFIG) -> Transform:
    transform = Transform(config).eval()
    transform.buckets = derive_buckets(config.min_size, config.max_size)
    return transform


def test_buckets_of_torchvisions_models_fit_what_cameras_take() -> None:
    buckets = derive_buckets(800, 1333)
    landscape = [
        (448, 1344),
        (672, 1344),
        (800, 800),
        (800, 1088),
        (800, 1216),
        (800, 1344),
    ]  # 4:3 is 1067, 3:2 is 1200
    assert set(buckets) == {*landscape, *((width, height) for height, width in landscape)}
    assert smallest_bucket((768, 1344), buckets) == (800, 1344)
    assert smallest_bucket((1, 1344), buckets) == (448, 1344)
    assert smallest_bucket((832, 832), buckets) is None


@given(st.integers(1, 1000), st.integers(1, 8), st.tuples(st.integers(1, 2000), st.integers(1, 2000)))
def test_every_picture_has_a_bucket_that_holds_it(min_size: int, factor: int, size: tuple[int, int]) -> None:
    config = TransformConfig(min_size=min_size, max_size=min_size * factor)
    transform, plain = bucketed(config), Transform(config)
    assert len(transform.buckets) <= 11
    bucket = transform.padded_size(size)
    assert bucket in transform.buckets
    assert all(a >= b for a, b in zip(bucket, plain.padded_size(size), strict=True))


def test_a_batch_is_as_large_as_the_bucket_of_its_pictures() -> None:
    """On the way of the CPU's kernel and on torch's, which other devices and grey networks take."""
    grey = CONFIG.model_copy(update={"channels": "grey", "mean": (0.5,), "std": (0.2,)})
    for config in (CONFIG, grey):
        transform = bucketed(config)
        wide, high = torch.full((70, 101, 3), 255, dtype=torch.uint8), torch.full((90, 88, 3), 255, dtype=torch.uint8)
        alone, other = transform.prepare([wide]), transform.prepare([high])
        assert alone.tensors.shape[-2:] == transform.padded_size((70, 101)) == (96, 128)
        assert other.tensors.shape[-2:] == transform.padded_size((90, 88)) == (96, 96)
        assert alone.image_sizes == [(80, 115)]
        assert alone.tensors[0, :, :80, :115].min() > 1
        assert not alone.tensors[0, :, 80:].any()
        assert not alone.tensors[0, :, :, 115:].any()
        beside = transform.prepare([wide, torch.zeros(80, 120, 3, dtype=torch.uint8)])
        torch.testing.assert_close(beside.tensors[:1], alone.tensors, rtol=0, atol=0)


def test_training_pads_as_torchvision_does() -> None:
    transform = bucketed().train()
    assert transform.batch_images([torch.ones(3, 33, 40), torch.ones(3, 20, 65)]).shape == (2, 3, 64, 96)


def test_what_no_named_bucket_holds_is_padded_as_little_as_possible() -> None:
    transform = Transform(CONFIG).eval()
    transform.buckets = ((96, 96),)
    assert transform.padded_size((80, 85)) == (96, 96)
    assert transform.padded_size((80, 100)) == (96, 128)

"""A device with too little memory answers all the same: in smaller batches, and 507 for what is too large alone."""

from __future__ import annotations

from collections.abc import Callable

from tests.fakes import picture
from tests.integration.conftest import Live

PIXELS = 48 * 64  # of a picture


def test_batches_that_do_not_fit_are_halved_and_all_images_are_answered(serve: Callable[..., Live]) -> None:
    live = serve(max_batch_size=8)
    live.predictor.memory_pixels = 2 * PIXELS
    files = [("image", (f"{index}.png", picture(red=20 * index))) for index in range(8)]
    first = live.hold_device()
    together = live.in_background(live.client.post, "/v1/detect/batch", files=files)
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 8)
    live.release_device()
    results = together.result().json()["results"]
    assert [round(255 * result["detections"][0]["score"]) for result in results[1:]] == [*range(20, 160, 20)]
    assert {result["batch_size"] for result in results} == {2}
    assert first.result().status_code == 200
    assert live.predictor.batches == [1, 8, 4, 2, 2, 2, 2]
    assert live.predictor.releases == 2


def test_image_that_is_too_large_alone_is_told_so_and_the_next_one_is_answered(serve: Callable[..., Live]) -> None:
    live = serve()
    live.predictor.memory_pixels = PIXELS
    response = live.detect(picture(height=480, width=640))
    assert (response.status_code, response.json()["code"]) == (507, "insufficient_memory")
    assert "(640x480); tried alone" in response.json()["detail"]
    assert "Retry-After" not in response.headers
    assert live.detect(picture()).status_code == 200
    assert live.metric('roiserve_images_total{model="fake@1",outcome="insufficient_memory"}') == 1

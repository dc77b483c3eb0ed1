import re

import pytest
from torchvision.models import get_model_weights  # type: ignore[attr-defined]  # exported, but not by name

from service.errors import ModelStoreError
from service.model_store.published import find_published, published_weights
from service.model_store.torchvision_layout import BUILDERS, builder_config


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_builder_has_published_weights_with_coco_labels(builder: str) -> None:
    weights = published_weights(builder)
    assert weights.file_name.startswith(builder)
    assert (weights.labels[0], weights.labels[-1], len(weights.labels)) == ("person", "toothbrush", 90)
    assert weights.labels[11] == "unused 12"
    assert builder_config(builder, weights.labels).num_classes == 91
    assert weights.metrics["box_map"] > 20


@pytest.mark.parametrize("builder", BUILDERS)
def test_pinned_files_agree_with_what_torchvision_says_of_them(builder: str) -> None:
    """It publishes the first digits of the hash, and the size in MiB with three decimals."""
    weights = published_weights(builder)
    assert re.fullmatch(r"[0-9a-f]{64}", weights.sha256)
    assert weights.url.endswith(f"-{weights.sha256[:8]}.pth")
    meta = get_model_weights(builder)["COCO_V1"].value.meta
    assert round(weights.size / 2**20, 3) == meta["_file_size"]


def test_the_first_resnet50_detectors_have_norms_without_epsilon() -> None:
    without = [builder for builder in BUILDERS if published_weights(builder).norm_eps == 0]
    assert without == ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"]


def test_a_published_file_is_known_by_its_hash() -> None:
    known = find_published("bf2d0c1efbc936eeee2bc95a48e80ebc86b891f61b0106485937fc29f9315fc0")
    assert known is not None
    assert known.builder == "maskrcnn_resnet50_fpn"
    assert find_published("bf2d0c1e" + 56 * "0") is None
    assert find_published(64 * "0") is None


def test_other_names_are_answered_with_those_that_there_are() -> None:
    with pytest.raises(
        ModelStoreError, match="no published weights for 'retinanet_resnet50_fpn'; there are some for: "
    ):
        published_weights("retinanet_resnet50_fpn")

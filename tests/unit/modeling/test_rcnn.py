from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.modeling.config import RoIConfig
from service.modeling.rcnn import CropBranch, WholeImage

IMAGES = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
BOXES = [torch.tensor([[0.0, 0, 20, 30], [10, 5, 50, 35], [3, 3, 9, 9]]), torch.tensor([[30.0, 10, 60, 40]])]
SIZES = [(40, 60), (40, 60)]


class Recorder(nn.Module):
    """A network that answers with its input, and remembers how many crops came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.counts.append(len(x))
        return {"0": x}


def branch(network: nn.Module, **roi: int) -> CropBranch:
    config = RoIConfig.model_validate({"op": "crop", "crop_size": 32, "crop_padding": 4, **roi})
    return CropBranch(roi=config, backbone=network, pool=nn.Identity(), box_head=nn.Flatten())


def test_each_crop_is_its_box_with_context_and_goes_alone() -> None:
    whole = branch(Recorder()).eval()(WholeImage()(IMAGES), BOXES, SIZES)
    assert whole.shape == (4, 3 * 32 * 32)
    alone = branch(Recorder()).eval()({"0": IMAGES[1:]}, BOXES[1:], SIZES[1:])
    torch.testing.assert_close(whole[3:], alone)


def test_an_area_of_one_colour_gives_a_crop_of_it_in_a_frame_of_context() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 20:44, 20:44] = 1.0  # 24 pixels, as the inside of a crop of 32 with 4 on each side
    crop = branch(Recorder()).eval()({"0": image}, [torch.tensor([[20.0, 20, 44, 44]])], [(64, 64)])
    expected = torch.zeros(3, 32, 32)
    expected[:, 4:28, 4:28] = 1.0
    torch.testing.assert_close(crop.reshape(3, 32, 32), expected)


@pytest.mark.parametrize(("training", "counts"), [(False, [3, 1]), (True, [4])])
def test_serving_looks_at_a_few_crops_at_a_time_training_at_all(training: bool, counts: list[int]) -> None:
    network = Recorder()
    chunked = branch(network, crops_per_chunk=3).train(training)({"0": IMAGES}, BOXES, SIZES)
    assert network.counts == counts
    torch.testing.assert_close(chunked, branch(Recorder(), crops_per_chunk=64).eval()({"0": IMAGES}, BOXES, SIZES))


def test_no_boxes_are_no_crops() -> None:
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert branch(Recorder()).eval()({"0": IMAGES}, none, SIZES).shape == (0, 3 * 32 * 32)

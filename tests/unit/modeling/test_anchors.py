import torch
from torchvision.models.detection.image_list import ImageList

from service.modeling.anchors import UnroundedAnchorGenerator


def test_anchors_keep_their_area_and_ratio_without_rounding() -> None:
    """An area of 64 with height / width = 4 is 4 x 16, with 1 / 4 it is 16 x 4; 2 would be 5.66 x 11.31."""
    generator = UnroundedAnchorGenerator(((8,),), ((0.25, 4.0, 2.0),), strides=(4,))
    wide, high, uneven = generator.cell_anchors[0]
    assert wide.tolist() == [-8, -2, 8, 2]
    assert high.tolist() == [-2, -8, 2, 8]
    torch.testing.assert_close(uneven, torch.tensor([-2.828427, -5.656854, 2.828427, 5.656854]))


def test_anchors_of_a_place_come_size_by_size() -> None:
    """The order of the channels in detectron2's RPN head, where one map has anchors of several sizes."""
    generator = UnroundedAnchorGenerator(((8, 32),), ((0.25, 1.0),), strides=(4,))
    sides = [(x2 - x1, y2 - y1) for x1, y1, x2, y2 in generator.cell_anchors[0].tolist()]
    assert sides == [(16, 4), (8, 8), (64, 16), (32, 32)]


def test_anchors_stand_a_stride_apart_also_where_the_map_does_not_divide_the_image() -> None:
    """Two cells on 96 pixels: torchvision's generator would take 48 for the stride of 64."""
    generator = UnroundedAnchorGenerator(((8,),), ((1.0,),), strides=(64,))
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), [torch.zeros(1, 1, 1, 2)])
    assert anchors.tolist() == [[-4, -4, 4, 4], [60, -4, 68, 4]]

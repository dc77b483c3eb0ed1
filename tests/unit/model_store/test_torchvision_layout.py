import torch

from service.model_store.torchvision_layout import with_current_names


def test_names_from_before_0_13_become_the_current_ones_and_others_stay() -> None:
    renamed = {
        "backbone.fpn.inner_blocks.0.weight": "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn.layer_blocks.3.bias": "backbone.fpn.layer_blocks.3.0.bias",
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask_head.0.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
        "backbone.fpn.inner_blocks.0.1.weight": "backbone.fpn.inner_blocks.0.1.weight",
        "rpn.head.conv.1.0.weight": "rpn.head.conv.1.0.weight",
    }
    old = {name: torch.tensor(number) for number, name in enumerate(renamed)}
    assert with_current_names(old) == {renamed[name]: tensor for name, tensor in old.items()}

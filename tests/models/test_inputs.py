"""Hidden states of image models: the output of every block, each time it is applied, and no trace left in the model."""

import pytest
import timm
import torch

from dsquant.models.inputs import model_outputs
from dsquant.models.sret import SReT

SMALL = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2)
    ),
    "swinv2": lambda: timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2)
    ),
    "sret": lambda: SReT(
        img_size=32, num_classes=5, heads=(1, 2), depths=(2, 2), recursions=(1, 2), slices=(1, 1), groups=(1, 1)
    ),
}
# one for each time a block runs; SReT's first stage applies one block twice, with a projection after each time
SHAPES = {
    "vit": [(2, 17, 24)] * 3,
    "swin": [(2, 8, 8, 16)] * 2 + [(2, 4, 4, 32)],
    "swinv2": [(2, 8, 8, 16)] * 2 + [(2, 4, 4, 32)],
    "sret": [(2, 16, 32)] * 4 + [(2, 4, 64)] * 4,
}


@pytest.mark.parametrize("family", SMALL)
def test_hidden_states_are_the_outputs_of_blocks_in_order(family):
    torch.manual_seed(0)
    model, images = SMALL[family]().eval(), torch.randn(2, 3, 32, 32)
    logits, hidden = model_outputs(model, images, hidden=True)
    assert [tuple(h.shape) for h in hidden] == SHAPES[family]
    assert torch.equal(logits, model(images))
    assert all(h.requires_grad for h in hidden)
    assert model_outputs(model, images)[1] == ()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_hidden_state_of_a_vit_gives_its_logits():
    torch.manual_seed(0)
    model, images = SMALL["vit"]().eval(), torch.randn(2, 3, 32, 32)
    logits, hidden = model_outputs(model, images, hidden=True)
    assert torch.equal(model.forward_head(model.norm(hidden[-1])), logits)

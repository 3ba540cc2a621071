"""q, k and v are views of a fused projection, and their gradients become its gradient, copied or not."""

import pytest
import torch

from dsquant.models.attention import split_heads

ROWS, HEADS, LENGTH, DIM = 2, 3, 5, 4


def gradient(parts):
    """Return the gradient of a projection whose q, k and v have the gradients `parts`."""
    projected = torch.randn(ROWS, LENGTH, 3 * HEADS * DIM, requires_grad=True)
    torch.autograd.backward(split_heads(projected, HEADS, ROWS), parts)
    return projected.grad


def test_parts_are_views_of_the_projection():
    projected = torch.randn(1, ROWS * LENGTH, 3 * HEADS * DIM)
    parts = split_heads(projected, HEADS, ROWS)
    by_hand = projected.view(ROWS, LENGTH, 3, HEADS, DIM)
    for i, part in enumerate(parts):
        assert torch.equal(part, by_hand[:, :, i].transpose(1, 2))
        assert part.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)], ids=str)
def test_gradients_side_by_side_are_taken_as_they_lie_and_others_are_gathered(order):
    packed = torch.randn(ROWS, LENGTH, 3, HEADS, DIM)
    parts = [packed[:, :, i].transpose(1, 2) for i in order]
    expected = packed[:, :, list(order)].reshape(ROWS, LENGTH, -1)
    assert torch.equal(gradient(parts), expected)
    assert torch.equal(gradient([part.contiguous() for part in parts]), expected)


def test_gradients_side_by_side_are_not_copied():
    packed = torch.randn(ROWS, LENGTH, 3, HEADS, DIM)
    parts = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    projected = torch.randn(ROWS, LENGTH, 3 * HEADS * DIM, requires_grad=True)
    (found,) = torch.autograd.grad(split_heads(projected, HEADS, ROWS), projected, parts)
    assert found.data_ptr() == packed.data_ptr()

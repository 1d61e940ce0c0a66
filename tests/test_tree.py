from __future__ import annotations

import pytest
import torch

from jiio import State, tree

NESTED = (torch.arange(6.0).view(2, 3), (torch.arange(8.0).view(2, 2, 2), torch.ones(2, 1)))


def test_flatten_and_unflatten_are_inverse() -> None:
    flat = tree.flatten(NESTED)
    assert flat.shape == (2, 8)
    for a, b in zip(tree.leaves(tree.unflatten(flat, NESTED)), tree.leaves(NESTED), strict=True):
        assert torch.equal(a, b)


def test_named_tuples_keep_their_type() -> None:
    state = State(NESTED, NESTED, torch.zeros(2, 1))
    doubled = tree.apply(lambda leaf: 2 * leaf, state)
    assert isinstance(doubled, State)
    assert torch.equal(doubled.z[1][0], 2 * NESTED[1][0])


def test_inner_and_norm_are_those_of_the_flat_vectors() -> None:
    flat = tree.flatten(NESTED)
    assert torch.allclose(tree.inner(NESTED, NESTED), (flat * flat).sum(1))
    assert torch.allclose(tree.norm(NESTED), flat.norm(dim=1))


def test_select_where_and_finite_act_on_samples() -> None:
    rows = torch.tensor([1])
    assert torch.equal(tree.flatten(tree.select(NESTED, rows)), tree.flatten(NESTED)[1:])
    mixed = tree.where(torch.tensor([True, False]), NESTED, tree.apply(torch.zeros_like, NESTED))
    assert float(tree.flatten(mixed)[1].abs().sum()) == 0
    spoiled = tree.apply(torch.clone, NESTED)
    spoiled[1][0][1, 0, 0] = torch.nan
    assert tree.finite(spoiled).tolist() == [True, False]


def test_bad_trees_are_named() -> None:
    with pytest.raises(ValueError, match="not dict"):
        tree.leaves({"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"same batch.*\(2, 3\).*\(3, 3\)"):
        tree.batch_size((torch.ones(2, 3), torch.ones(3, 3)))
    with pytest.raises(ValueError, match=r"beside the batch.*\(2,\)"):
        tree.norm(torch.ones(2))
    with pytest.raises(ValueError, match="too many"):
        tree.build(torch.ones(1), [torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_combination_lies_in_storage_as_what_it_is_made_of(batch: int) -> None:
    leaf = torch.randn(batch, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    stack = tree.stack_like(leaf, 7)
    assert stack.shape == (batch, 7, 4, 5, 6) and float(stack.abs().sum()) == 0
    stack.copy_(torch.randn_like(stack))
    weights = torch.randn(3, 5)
    combined = tree.combine(stack, weights)
    assert torch.allclose(
        combined, torch.einsum("bk,bkchw->bchw", weights, stack[:, :5].expand(3, -1, -1, -1, -1)), atol=1e-5
    )
    assert combined.is_contiguous(memory_format=torch.channels_last)

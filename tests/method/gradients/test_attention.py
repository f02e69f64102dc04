"""Attention from plain products: as precise as torch's fused kernel, and taken just where it is meant."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from less_assets.method.gradients.attention import LONGEST, FastAttention, keeps_weights

pytestmark = pytest.mark.skipif(
    not keeps_weights(torch.zeros(1, dtype=torch.bfloat16)), reason="this processor has no fast bfloat16 products"
)


def tensors(rows=3, length=33, heads=6, shared=2, size=16, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(rows, length, count, size, generator=generator) for count in (heads, shared, shared, heads)]
    return [(2 * each).to(dtype).transpose(1, 2) for each in drawn]


def output_and_gradients(query, key, value, error, **settings):
    inputs = [each.detach().clone().requires_grad_() for each in (query, key, value)]
    settings = {"is_causal": True, "enable_gqa": True} | settings
    output = scaled_dot_product_attention(*inputs, **settings)
    return [output.detach(), *torch.autograd.grad(output, inputs, error)]


def relative_errors(found, expected):
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [{}, {"shared": 6}, {"shared": 1, "length": 250}, {"length": 2, "size": 40}], ids=str)
def test_it_is_no_less_precise_than_the_fused_kernel(shape, scale):
    drawn = tensors(**shape)
    exact = output_and_gradients(*(each.float() for each in drawn), scale=scale)
    fused = output_and_gradients(*drawn, scale=scale)
    with FastAttention() as fast:
        found = output_and_gradients(*drawn, scale=scale)
    assert fast.calls == 1
    assert [each.dtype for each in found] == [torch.bfloat16] * 4
    assert max(relative_errors(found, exact)) <= min(0.01, max(relative_errors(fused, exact)))


def test_a_single_token_attends_to_itself():
    query, key, value, error = tensors(length=1, heads=2)
    with FastAttention():
        output, of_query, of_key, of_value = output_and_gradients(query, key, value, error)
    assert torch.equal(output, value)
    assert torch.equal(of_value, error)
    assert not of_query.any()
    assert not of_key.any()


def test_rows_do_not_see_each_other_or_what_follows():
    query, key, value, error = tensors(length=9)
    spoilt = value.clone()
    spoilt[1] = float("nan")
    spoilt[0, :, 5:] = 7
    with FastAttention():
        clean, other = output_and_gradients(query, key, value, error), output_and_gradients(query, key, spoilt, error)
    assert torch.equal(clean[0][2], other[0][2])
    assert all(torch.equal(a[2], b[2]) for a, b in zip(clean, other, strict=True))
    assert torch.equal(clean[0][0, :, :5], other[0][0, :, :5])


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"dtype": torch.float32}, {}),
        ({}, {"is_causal": False}),
        ({}, {"is_causal": False, "attn_mask": torch.ones(33, 33, dtype=torch.bool).tril()}),
        ({"length": LONGEST + 1, "rows": 1, "heads": 2, "shared": 1}, {}),
    ],
    ids=["float32", "all see all", "mask", "long rows"],
)
def test_everything_else_is_torchs_own(shape, settings):
    drawn = tensors(**shape)
    expected = output_and_gradients(*drawn, **settings)
    with FastAttention() as fast:
        found = output_and_gradients(*drawn, **settings)
    assert fast.calls == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_precision_of_other_products_is_as_it_was():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with FastAttention():
        output_and_gradients(*tensors())
    assert setting.fp32_precision == before

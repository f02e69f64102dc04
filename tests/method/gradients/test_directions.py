"""The five forms, elementwise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method.gradients.directions import FORMS, Directions, direction

P = 40


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    g, m = torch.randn(3, P, generator=generator), torch.randn(P, generator=generator) * 0.1
    return g, m, torch.rand(P, generator=generator) * 0.01


@given(st.integers(0, 1000), st.integers(0, 500))
@settings(deadline=None)
def test_adamw_is_torchs_own_step(seed, step):
    g, m, v = state(seed)
    weight = torch.zeros(P, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    optimizer.state[weight] = {"step": torch.tensor(float(step)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    weight.grad = g[0].clone()
    optimizer.step()
    torch.testing.assert_close(direction("adamw", g, m, v, step=step)[0], -weight.detach(), rtol=2e-5, atol=1e-6)


@given(st.integers(0, 1000))
def test_the_printed_and_the_published_formula(seed):
    g, m, v = state(seed)
    first, second = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    settings = {"step": 6, "beta1": 0.9, "beta2": 0.99, "eps": 1e-4}
    printed = first / (1 - 0.9**7) / (second / (1 - 0.99**7) + 1e-4).sqrt()
    torch.testing.assert_close(direction("paper", g, m, v, **settings), printed)
    torch.testing.assert_close(direction("reference", g, m, v, **settings), first / (second + 1e-4).sqrt())


def test_marginal_is_zero_for_a_zero_gradient_and_completes_the_momentum():
    g, m, v = state(0)
    zero = torch.zeros_like(g)
    assert not direction("marginal", zero, m, v, step=9).any()
    whole = direction("marginal", g, m, v, step=9) + direction("adamw", zero, m, v, step=9)
    torch.testing.assert_close(whole, direction("adamw", g, m, v, step=9))


def test_sgd_is_the_gradient_and_needs_no_moments():
    g, _, _ = state(0)
    assert torch.equal(direction("sgd", g), g)


def test_all_forms_at_once_equal_each_alone_and_leave_the_gradient_alone():
    g, m, v = state(3)
    before = g.clone()
    together = Directions(FORMS, m, v, step=5)(g)
    for form, values in zip(FORMS, together, strict=True):
        assert torch.equal(values, direction(form, g, m, v, step=5)), form
    assert torch.equal(g, before)


def test_unknown_forms_and_missing_moments_are_refused():
    with pytest.raises(ValueError, match="unknown forms"):
        Directions(["adam"])
    with pytest.raises(ValueError, match="moments"):
        Directions(["sgd", "adamw"])


@pytest.mark.parametrize("form", FORMS)
def test_a_direction_is_its_secant_times_the_gradient_plus_what_momentum_does_alone(form):
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(200, generator=generator) * 1e-3
    v = torch.rand(200, generator=generator) * 1e-5
    m[:20], v[:20] = 0, 0  # parameters that never had a gradient
    gradient = torch.randn(3, 200, generator=generator) * 10.0 ** torch.arange(-6, 0, 0.03)
    gradient[:, ::7] = 0
    made = Directions([form], m, v, step=4)
    ((slope, constant),) = made.secants(gradient)
    rebuilt = slope * gradient + (0 if constant is None else constant)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(rebuilt, made(gradient)[0], rtol=1e-4, atol=1e-5)

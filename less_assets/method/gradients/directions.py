"""The direction that an example's gradient stands for: Γ of the paper in its variants, elementwise on tensors.

Belongs here: the formulas of the five forms and Adam's state that they need. Not here: how gradients are taken
(`gradients`), projected (`sketch`) or compared (`influence`).

With m' = β1·m + (1-β1)·g, v' = β2·v + (1-β2)·g² and t the steps done so far:

| form | Γ |
|---|---|
| `adamw` | [m'/(1-β1^(t+1))] / (sqrt(v'/(1-β2^(t+1))) + ε), the step torch's AdamW would take |
| `paper` | [m'/(1-β1^(t+1))] / sqrt(v'/(1-β2^(t+1)) + ε), as printed (Xia et al. 2024, section 3.1) |
| `reference` | m' / sqrt(v' + ε), as in the published code |
| `marginal` | adamw(g) − adamw(0), what the example adds to the step that momentum takes anyway |
| `sgd` | g |

Every Adam form is (A + b·g) / (sqrt(R + w·g²) + e): A and R are constant over examples and computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORMS = ("adamw", "paper", "reference", "marginal", "sgd")


@dataclass(frozen=True)
class AdamMoments:
    """Adam's state at a checkpoint, by parameter name as in `model.named_parameters()` of the PEFT model.

    Attributes:
        exp_avg: First moments m, each of its parameter's shape.
        exp_avg_sq: Second moments v, each of its parameter's shape.
        step: Optimizer steps done, t.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Adam's ε.
    """

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class _AdamTerms:
    """The example-independent terms of an Adam form for p parameters: Γ = (A + b·g) / (sqrt(R + w·g²) + e)."""

    numerator: Tensor  # A, (p,)
    gain: float  # b
    radicand: Tensor  # R, (p,)
    weight: float  # w
    epsilon: float  # e, outside the root

    def __call__(self, gradient: Tensor) -> Tensor:
        denominator = torch.addcmul(self.radicand, gradient, gradient, value=self.weight).sqrt_()
        if self.epsilon:
            denominator.add_(self.epsilon)
        return torch.add(self.numerator, gradient, alpha=self.gain).div_(denominator)

    @property
    def at_zero(self) -> Tensor:
        """Γ of an example without a gradient: what momentum does alone, (p,)."""
        return self.numerator / (self.radicand.sqrt() + self.epsilon)

    def secant(self, gradient: Tensor) -> Tensor:
        """(Γ(g) − Γ(0)) / g, elementwise and without cancellation; its limit, the derivative at 0, where g is 0.

        With D(g) = sqrt(R + w·g²) + e the difference is b·g/D(g) − A·(D(g) − D(0)) / (D(g)·D(0)), and
        D(g) − D(0) = w·g² / (sqrt(R + w·g²) + sqrt(R)).
        """
        tiny = torch.finfo(torch.float32).tiny
        start = self.radicand.sqrt()
        root = torch.addcmul(self.radicand, gradient, gradient, value=self.weight).sqrt_()
        bend = gradient * self.weight / (root + start).clamp_(min=tiny) * (self.numerator / (start + self.epsilon))
        return (self.gain - bend) / (root + self.epsilon).clamp_(min=tiny)


class Directions:
    """Maps gradients of p parameters to their directions in several forms, with Adam's constant parts precomputed.

    Args:
        forms: Names out of `FORMS`.
        m: First moments (p,), float32, on the device of the gradients; None if every form is `sgd`.
        v: Second moments (p,), likewise.
        step: Optimizer steps done so far, t.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Adam's ε.

    Raises:
        ValueError: If a form is unknown, or needs moments that are not given.
    """

    def __init__(
        self,
        forms: Sequence[str],
        m: Tensor | None = None,
        v: Tensor | None = None,
        *,
        step: int = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        if unknown := set(forms) - set(FORMS):
            raise ValueError(f"unknown forms {sorted(unknown)}; known are {list(FORMS)}")
        self.forms = tuple(forms)
        self._terms: dict[str, _AdamTerms] = {}
        self._momentum: Tensor | None = None
        if set(forms) == {"sgd"}:
            return
        if m is None or v is None:
            raise ValueError(f"forms {list(forms)} need Adam's moments")
        correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        if {"adamw", "marginal"} & set(forms):
            gain, weight = (1 - beta1) / correction1, (1 - beta2) / correction2
            adamw = _AdamTerms(m * (beta1 / correction1), gain, v * (beta2 / correction2), weight, eps)
            self._terms["adamw"] = adamw
            if "marginal" in forms:
                self._momentum = adamw.at_zero
        if "paper" in forms:
            gain, weight = (1 - beta1) / correction1, (1 - beta2) / correction2
            self._terms["paper"] = _AdamTerms(
                m * (beta1 / correction1), gain, v * (beta2 / correction2) + eps, weight, 0
            )
        if "reference" in forms:
            self._terms["reference"] = _AdamTerms(m * beta1, 1 - beta1, v * beta2 + eps, 1 - beta2, 0)

    def __call__(self, gradient: Tensor) -> list[Tensor]:
        """Directions of n examples.

        Args:
            gradient: (n, p) float32; not changed.

        Returns:
            One (n, p) float32 tensor per form, in the order of `forms`; `sgd` is the gradient itself, not a copy.
        """
        known = {"sgd": gradient}
        for name, terms in self._terms.items():
            known[name] = terms(gradient)
        if self._momentum is not None:
            keep_adamw = "adamw" in self.forms
            known["marginal"] = (torch.sub if keep_adamw else Tensor.sub_)(known["adamw"], self._momentum)
        return [known[form] for form in self.forms]

    def secants(self, gradient: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Split directions into a part that is linear in the gradient's terms and one that is the same for all.

        For every form, Γ(g) = slope·g + constant elementwise, with the slope taken at the example's own gradient (the
        secant of Γ between 0 and g). So a gradient that is a sum of tokens' gradients gives a sum of tokens' parts.

        Args:
            gradient: (n, p) float32; not changed.

        Returns:
            Per form the slope (n, p) and the constant Γ(0) (p,): momentum's part, None where it is zero (`marginal`,
            `sgd`).
        """
        parts: list[tuple[Tensor, Tensor | None]] = []
        for form in self.forms:
            if form == "sgd":
                parts.append((torch.ones_like(gradient), None))
            elif form == "marginal":
                parts.append((self._terms["adamw"].secant(gradient), None))
            else:
                parts.append((self._terms[form].secant(gradient), self._terms[form].at_zero))
        return parts


def direction(
    form: str,
    gradient: Tensor,
    m: Tensor | None = None,
    v: Tensor | None = None,
    *,
    step: int = 0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """Direction of gradients in one form; `Directions` is the same with the constant parts kept.

    Args:
        form: One of `FORMS`.
        gradient: (n, p) or (p,).
        m: First moments (p,); not needed for `sgd`.
        v: Second moments (p,).
        step: Optimizer steps done so far, t.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Adam's ε.

    Returns:
        A tensor of the gradient's shape.
    """
    return Directions((form,), m, v, step=step, beta1=beta1, beta2=beta2, eps=eps)(gradient)[0]

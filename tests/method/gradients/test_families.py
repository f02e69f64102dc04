"""Every family that transformers ships as a causal language model: exact, or refused by name."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from support.families import (
    EXACT,
    FAMILIES,
    NotConstructibleError,
    gradient_error,
    in_double_precision,
    recorded_verdicts,
    tiny_family,
    verdict,
    with_lora,
)
from transformers import AutoModelForCausalLM, BertConfig

from less_assets.errors import UnsupportedModelError

RECORDED_WITH, RECORDED = recorded_verdicts()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_embeddings_are_exact_or_refused_by_name(family):
    """With padding on either side; and as `benchmarks/results/architectures.md` has it for this transformers."""
    reason, outcomes = "", ("not made",) * 3
    try:
        outcome = verdict(family)
    except NotConstructibleError as problem:
        reason = str(problem)
    else:
        reason, outcomes = "; ".join(outcome.reasons), (outcome.right, outcome.left, outcome.embeddings)
        assert set(outcomes) <= {"exact", "refused"}, outcome
    if version("transformers") == RECORDED_WITH:
        assert outcomes == RECORDED[family], reason
    if "not made" in outcomes:
        pytest.skip(f"no tiny model: {reason}")


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neox", "llama", "mpt", "phi", "qwen3", "stablelm"])
def test_gradients_of_all_linear_layers_are_exact(family):
    """Falcon adds to the output of a linear layer in place."""
    model = with_lora(in_double_precision(tiny_family(family)), everywhere=True).eval()
    assert gradient_error(model, "right") < EXACT


@pytest.mark.parametrize("family", ["gemma3n_text", "llama4_text"])
def test_all_linear_layers_are_refused_where_one_is_used_twice_or_returns_two_values(family):
    with pytest.raises(UnsupportedModelError):
        gradient_error(with_lora(tiny_family(family), everywhere=True).eval(), "right")


def test_attention_in_both_directions_is_refused():
    """Right padding is left unmasked, which only causal attention does not notice."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BertConfig(**sizes, intermediate_size=48)).eval()
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel"):
        gradient_error(with_lora(model).eval(), "right")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_run_over_padding_are_refused_on_the_left_and_exact_on_the_right(dtype):
    model = with_lora(tiny_family("recurrent_gemma")).to(dtype).eval()
    with pytest.raises(UnsupportedModelError, match="Pad on the right"):
        gradient_error(model, "left")
    assert gradient_error(model, "right") < (EXACT if dtype == torch.float32 else 0.5)

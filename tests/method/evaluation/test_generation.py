"""Greedy generation and logits: batches, shared prefixes and stopping must not change what a model says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.evaluation import generation
from less_assets.method.evaluation.generation import (
    cut_before,
    generate,
    generate_and_score,
    group_by_prefix,
    logits_at,
)


def test_logits_at_are_those_of_a_single_row(byte_model):
    ids = [7, 9, 11, 13, 15]
    expected = byte_model(input_ids=torch.tensor([ids])).logits[0, [1, 3]].detach()
    ((index, logits),) = logits_at(byte_model, [ids], [np.array([1, 3])])
    assert index == 0
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_generation_is_the_same_alone_and_in_a_batch_and_keeps_the_mode(byte_model, byte_tokenizer):
    prompts = [byte_tokenizer(text).input_ids for text in ("a", "a longer prompt", "something else entirely", "zz")]
    byte_model.train()
    alone = [generate(byte_model, byte_tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert generate(byte_model, byte_tokenizer, prompts, max_new_tokens=6) == alone
    assert byte_model.training
    byte_model.eval()


def test_generation_stops_at_the_end_token_and_at_stop_strings(memorizing_model, byte_tokenizer):
    prompts = [byte_tokenizer(f"<|user|>{question}<|assistant|>").input_ids for question in ("sky?", "sum?")]
    counted = []
    texts = generate(memorizing_model, byte_tokenizer, prompts, max_new_tokens=12, on_progress=counted.append)
    assert texts == ["blue.", "10"]
    assert sum(counted) == 2
    assert generate(memorizing_model, byte_tokenizer, prompts, max_new_tokens=12, stop=["ue"]) == ["bl", "10"]


def test_cut_before_takes_the_first_stop_string():
    assert cut_before("one\ntwo\n\nthree", ["\n\n", "\n"]) == "one"
    assert cut_before("one", []) == "one"


def few_shot_prompts(tokenizer, count):
    """Two kinds of prompts, each with its own long beginning, and two that stand alone."""
    texts = [
        f"<|user|>{'worked examples ' * 6}{'of one kind' if i % 2 else 'of another'}: question {i * i}"
        for i in range(count)
    ]
    return [tokenizer(text).input_ids for text in [*texts, "short", "another short one"]]


def test_shared_prefixes_change_neither_logits_nor_generations(byte_model, byte_tokenizer, monkeypatch):
    prompts = few_shot_prompts(byte_tokenizer, 9)
    positions = [np.array([len(prompt) - 3, len(prompt) - 1]) for prompt in prompts]
    assert sum(prefix > 90 for _, prefix in group_by_prefix(prompts, [len(prompt) - 1 for prompt in prompts])) == 1
    shared = dict(logits_at(byte_model, prompts, positions, token_budget=500))
    texts = generate(byte_model, byte_tokenizer, prompts, max_new_tokens=5, token_budget=500)
    references = [byte_tokenizer("x" * (i % 4)).input_ids for i in range(len(prompts))]
    scored = generate_and_score(byte_model, byte_tokenizer, prompts, references, max_new_tokens=5, token_budget=500)
    assert scored[0] == texts
    monkeypatch.setattr(generation, "MIN_PREFIX", 10_000)
    alone = dict(logits_at(byte_model, prompts, positions, token_budget=1))
    assert texts == generate(byte_model, byte_tokenizer, prompts, max_new_tokens=5, token_budget=1)
    assert np.isnan(scored[1]).tolist() == [not reference for reference in references]
    for i, reference in enumerate(references):
        if reference:
            ids = torch.tensor([[*prompts[i], *reference]])
            logits = byte_model(input_ids=ids).logits[0, len(prompts[i]) - 1 : -1]
            expected = torch.nn.functional.cross_entropy(logits, ids[0, len(prompts[i]) :]).item()
            assert scored[1][i] == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(shared[i], alone[i], rtol=1e-4, atol=1e-5)


def test_rows_that_end_early_do_not_disturb_the_others(memorizing_model, byte_tokenizer):
    questions = ["sum?", "sky?", "sum?", "sum?", "sum?", "something else", "sum?"]
    prompts = [byte_tokenizer(f"<|user|>{question}<|assistant|>").input_ids for question in questions]
    together = generate(memorizing_model, byte_tokenizer, prompts, max_new_tokens=20)
    assert together == [generate(memorizing_model, byte_tokenizer, [each], max_new_tokens=20)[0] for each in prompts]
    assert together[:2] == ["10", "blue."]


def test_models_with_sliding_windows_are_not_shared_but_work(byte_tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        eos_token_id=byte_tokenizer.eos_token_id,
    )
    model = MistralForCausalLM(config).eval()
    prompts = few_shot_prompts(byte_tokenizer, 6)
    texts = generate(model, byte_tokenizer, prompts, max_new_tokens=4)
    expected = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
        expected.append(byte_tokenizer.decode(ids, skip_special_tokens=True))
    assert texts == expected


def test_adapters_take_part(byte_model, byte_tokenizer):
    import copy

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(byte_model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    ids = [7, 9, 11, 13, 15]
    expected = adapted.eval()(input_ids=torch.tensor([ids])).logits[0, [2]].detach()
    ((_, logits),) = logits_at(adapted, [ids], [np.array([2])])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, byte_model(input_ids=torch.tensor([ids])).logits[0, [2]], atol=1e-3)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=150), min_size=1, max_size=12))
def test_groups_hold_every_row_once_and_share_only_what_all_have(rows):
    rows = [*rows, *[[0] * 100 + row for row in rows]]
    limits = [len(row) - 1 for row in rows]
    groups = group_by_prefix(rows, limits)
    assert sorted(i for members, _ in groups for i in members) == list(range(len(rows)))
    for members, prefix in groups:
        assert all(rows[i][:prefix] == rows[members[0]][:prefix] and prefix <= limits[i] for i in members)


def test_a_shared_prefix_never_reaches_a_wanted_position(byte_model, byte_tokenizer):
    rows = [byte_tokenizer("the same beginning, " * 5 + text).input_ids for text in "abcdef"]
    everything = [np.arange(len(row)) for row in rows]
    logits = dict(logits_at(byte_model, rows, everything))
    assert all(logits[i].shape[0] == len(row) for i, row in enumerate(rows))

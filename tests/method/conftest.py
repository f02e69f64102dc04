"""What tests of the method share: a tiny model over bytes, and one that knows two answers."""

import pytest

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Bytes as tokens, so that every text can be encoded and continued."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def byte_model(byte_tokenizer):
    """A random Llama of two layers over bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=byte_tokenizer.pad_token_id,
        eos_token_id=byte_tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def memorizing_model(byte_model, byte_tokenizer):
    """The tiny model, trained to say "blue." after "sky?" and "10" after "sum?"."""
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    from less_assets.method.data.batching import collate
    from less_assets.method.data.chat import ChatEncoder, EncodedExample
    from less_assets.method.data.targets import TargetExample

    model = LlamaForCausalLM(byte_model.config)
    model.load_state_dict(byte_model.state_dict())
    rows = []
    end = [byte_tokenizer.eos_token_id]
    for question, answer in (("sky?", "blue."), ("sum?", "10")):
        asked = TargetExample("", "", [{"role": "user", "content": question}], "", answer)
        target = ChatEncoder(byte_tokenizer, "template", 64).target(asked)
        rows.append(EncodedExample("", np.append(target.input_ids, end), np.append(target.labels, end)))
    batch = collate(rows, byte_tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()

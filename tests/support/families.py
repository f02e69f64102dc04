"""Tiny models of every family that transformers ships as a causal language model.

Belongs here: from a family's name to a model with random weights and LoRA, or the reason why there is none, and what
becomes of its gradients and embeddings. Not here: what is expected of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from less_assets.errors import UnsupportedModelError
from less_assets.method.data.chat import IGNORED, EncodedExample
from less_assets.method.gradients.exact import per_example_gradients
from less_assets.method.gradients.features import Batching
from less_assets.method.selection.baselines import embed

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types of transformers' own mapping for `AutoModelForCausalLM`."""
RECORD = Path(__file__).parents[2] / "benchmarks/results/architectures.md"
VOCABULARY = 97
MOST_PARAMETERS = 3_000_000
EXACT = 1e-5
"""Relative error below which a gradient, an embedding or a loss counts as exact."""
_PROBE = torch.arange(3, 22)[None]
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")

LAYERS = 2
HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 32, 4, 2, 8
"""Sizes that every family gets, under whatever name its configuration has for them."""
_SIZES: dict[str, object] = {
    **dict.fromkeys(
        ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "lru_width", "embedding_size"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "backbone_hidden_size", "attention_hidden_size"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "embedding_dim", "d_embed"), HIDDEN),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), KEY_VALUE_HEADS
    ),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size"), HEAD_SIZE),
    **dict.fromkeys(
        ("attention_head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), HEAD_SIZE
    ),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_SIZE),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "query_pre_attn_scalar"), HEAD_SIZE),
    "qk_head_dim": 2 * HEAD_SIZE,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "dff", "d_inner", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 4),
    **dict.fromkeys(("attention_chunk_size", "local_attention"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_key_heads": 4,
    "mamba_d_ssm": 64,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 4),
    "index_n_heads": 4,
    # Sparse attention takes all tokens, as real models do of rows up to 2,048. Of equal scores, torch's top-k would
    # take whichever it comes to first, which depends on the width of the batch.
    "index_topk": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),  # else padding shows little
}


_PARTICULAR: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v32": {"index_head_dim": 16},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "dots1": {"num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "falcon_h1": {"mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 64, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {"shape_vocab_size": 10, "pronunciation_vocab_size": 10},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 2}
    | {"attention_hidden_size": 64, "attention_head_dim": 16, "use_mamba_kernels": False}
    | {"layer_types": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single families need besides, or a size of another kind."""


class NotConstructibleError(Exception):
    """A family of which no tiny model can be made; the message says why."""


def tiny_family(family: str) -> PreTrainedModel:
    """A model of the family with random weights, in eval mode.

    Raises:
        NotConstructibleError: Its configuration or its model can't be made small this way.
    """
    problems = []
    with _quiet():
        for fill in (False, True):
            try:
                config = _tiny_config(CONFIG_MAPPING[family], fill)
                _check_size(config)
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config).eval()
                model(input_ids=_PROBE, use_cache=False)
                return model
            except Exception as error:
                problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    raise NotConstructibleError(" / ".join(problems))


def _check_size(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters with small sizes")


def _tiny_config(kind: type[PretrainedConfig], fill: bool) -> PretrainedConfig:
    """The family's default configuration with small sizes.

    Args:
        kind: Class of the configuration.
        fill: Also set sizes that the default leaves open.
    """
    try:
        default = kind()
    except Exception:
        default = kind(hidden_size_per_layer_input=0)
    sizes: dict[str, object] = {}
    for name, value in vars(default).items():
        if name in _SIZES and (fill or value is not None):
            sizes[name] = _SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            sizes[name] = 1
        elif name == "is_decoder":
            sizes[name] = True
        elif isinstance(value, PretrainedConfig) and name in kind.sub_configs:
            sizes[name] = _tiny_config(type(value), fill).to_dict()
    for name in ("layer_types", "block_types", "layers_block_type", "mlp_layer_types"):
        value = vars(default).get(name)
        if isinstance(value, list):  # one layer of each kind
            kinds = list(dict.fromkeys(value))
            kinds = kinds * LAYERS if len(kinds) == 1 else kinds
            sizes |= {name: kinds} | {name: len(kinds) for name in ("num_hidden_layers", "num_layers") if name in sizes}
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = HEADS  # multi-head latent attention has a key of its own for every head
    return kind(**sizes | _PARTICULAR.get(kind.model_type, {}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def with_lora(model: PreTrainedModel, *, everywhere: bool = False) -> PeftModel:
    """LoRA with random weights on the attention projections, or on all linear layers.

    Args:
        model: The base model.
        everywhere: On all linear layers but the head; so it is too where nothing is called attention.
    """
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not any(part in name for part in ("vision", "audio"))
        # PEFT refuses it in state-space models, whose fused kernels pass it by.
        and not (name.endswith("out_proj") and model.config.model_type in _STATE_SPACE)
    ]
    # PEFT fuses a gate_proj with an up_proj, which attention does not have.
    attention = [name for name in names if "att" in name.lower() and not name.endswith("gate_proj")]
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=12,
        target_modules=names if everywhere else attention or names,
        init_lora_weights=False,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with _quiet():
        return get_peft_model(model, config)


def in_double_precision(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, where rounding is no excuse; in float32 if kernels or masks of it do not work there."""
    mask = (torch.arange(_PROBE.shape[1]) > 4).long()[None]
    try:
        with torch.no_grad():
            logits = model.double()(input_ids=_PROBE, attention_mask=mask, use_cache=False).logits
        if not logits.isfinite().all():
            model.float()
    except RuntimeError:
        model.float()
    return model


@dataclass(frozen=True)
class Verdict:
    """What becomes of a family: "exact", or "refused", or "WRONG" with the relative error.

    Attributes:
        right: Gradients with padding on the right, as the product pads.
        left: Gradients with padding on the left.
        embeddings: Embeddings and losses of `rds` and `perplexity`.
        reasons: What the refusals said.
    """

    right: str
    left: str
    embeddings: str
    reasons: tuple[str, ...]


def verdict(family: str) -> Verdict:
    """Compare a family's gradients with autograd and its embeddings with the plain forward pass, row by row.

    Raises:
        NotConstructibleError: As `tiny_family`.
    """
    base = in_double_precision(tiny_family(family))
    reasons: list[str] = []
    embeddings = _outcome(lambda: embedding_error(base), reasons)
    model = with_lora(base).eval()
    right = _outcome(lambda: gradient_error(model, "right"), reasons)
    left = _outcome(lambda: gradient_error(model, "left"), reasons)
    return Verdict(right, left, embeddings, tuple(dict.fromkeys(reasons)))


def recorded_verdicts() -> tuple[str, dict[str, tuple[str, ...]]]:
    """The version of transformers and the outcomes by family that `benchmarks/architectures.py` wrote."""
    text = RECORD.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    recorded_with = re.search(r"transformers (\S+)", text)
    return recorded_with[1] if recorded_with else "", {row[0].strip("`"): tuple(row[1:4]) for row in rows}


def _outcome(error: Callable[[], float], reasons: list[str]) -> str:
    try:
        with _quiet():
            size = error()
    except UnsupportedModelError as refusal:
        reasons.append(refusal.what)
        return "refused" if refusal.where else "WRONG (refused, but not by name)"
    return "exact" if size < EXACT else f"WRONG ({size:.0e})"


def gradient_error(model: PeftModel, padding_side: Literal["left", "right"]) -> float:
    """Largest relative error of a row's gradient in a padded batch against autograd on the row alone."""
    examples = _examples()
    gradients = per_example_gradients(model, examples, batching=Batching(padding_side=padding_side))
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    errors = []
    for example, gradient in zip(examples, gradients, strict=True):
        loss = _loss(model, example)
        parts = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        expected = torch.cat([part.flatten() for part in parts]).double().numpy()
        errors.append(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))
    return float(max(errors))


def embedding_error(model: PreTrainedModel) -> float:
    """Largest relative error of a row's embedding and loss in a padded batch against a plain pass of the row alone."""
    examples = _examples()
    result = embed(model, examples)
    errors = []
    for example, embedding, loss in zip(examples, result.embeddings, result.losses, strict=True):
        with torch.no_grad():
            expected_loss = float(_loss(model, example))
            states = model(input_ids=_ids(example), use_cache=False, output_hidden_states=True).hidden_states[-1]
        if states.shape == (1, len(example.input_ids), len(embedding)):
            weights = torch.arange(1, states.shape[1] + 1, dtype=states.dtype)
            expected = (weights @ states[0] / weights.sum()).numpy()
        else:  # Gemma 3n's has several streams, Reformer's one of two halves
            expected = embed(model, [example]).embeddings[0]
        errors += [np.linalg.norm(embedding - expected) / np.linalg.norm(expected), abs(loss / expected_loss - 1)]
    return float(max(errors))


def _examples() -> list[EncodedExample]:
    """Three rows of different length, half of whose tokens carry loss."""
    rng = np.random.default_rng(1)
    examples = []
    for length in (7, 19, 12):
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.5, ids, IGNORED).astype(np.int32)
        labels[0], labels[-1] = IGNORED, ids[-1]
        examples.append(EncodedExample(f"row of {length}", ids, labels))
    return examples


def _ids(example: EncodedExample) -> Tensor:
    return torch.from_numpy(example.input_ids).long()[None]


def _loss(model: nn.Module, example: EncodedExample) -> Tensor:
    logits = model(input_ids=_ids(example), use_cache=False).logits[0, :-1]
    return nn.functional.cross_entropy(logits, torch.from_numpy(example.labels).long()[1:])

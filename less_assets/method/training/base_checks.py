"""What is refused of a base model: adapters that would be taken for a part of it, and sizes that do not fit.

Belongs here: looking at what transformers says of the loading, at a model that is loaded, and at the shapes that an
adapter's file holds. Names of files are `adapter_files.py`, loading itself is `models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from less_assets.errors import ModelLoadError

if TYPE_CHECKING:
    import transformers
    from peft import PeftModel


def refuse_other_weights(info: Mapping[str, Any], where: str) -> None:
    """Refuse a base model whose files lack weights or hold some of another size.

    Args:
        info: What transformers says of the loading (`output_loading_info=True`).
        where: Named in errors.

    Raises:
        ModelLoadError: It names the first such weight, with both sizes.
    """
    if info["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(info["missing_keys"])
        raise ModelLoadError(
            f"{len(missing)} weights of the base model are missing, the first is {missing[0]}.",
            where=where,
            fix="Fetch the model again.",
        )
    if info.get("mismatched_keys"):
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelLoadError(
            f"{len(info['mismatched_keys'])} weights of the base model have another size than config.json says, the "
            f"first is {name}: {_size(stored)} in the file, {_size(wanted)} by config.json.",
            where=where,
            fix="Tokens that were added (a pad token, say) make embeddings larger: save model, config.json and "
            "tokenizer together after `resize_token_embeddings`, or use them as the model's authors saved them.",
        )


def refuse_adapter_layers(model: nn.Module, where: str) -> None:
    """Refuse a base model some of whose layers are an adapter's, wherever they came from (a model's own code).

    Args:
        model: The base model.
        where: Named in errors.

    Raises:
        ModelLoadError: It has such layers.
    """
    adapted = [
        name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    if adapted:
        raise ModelLoadError(
            f"The base model has {len(adapted)} adapter layers once it is loaded, the first is {adapted[0]}.",
            where=where,
            fix="Merge the adapter into the weights (`PeftModel.merge_and_unload()`), save the result and name that.",
        )


def refuse_weights_of_the_base(
    stored: Mapping[str, tuple[int, ...]], base: transformers.PreTrainedModel, where: str
) -> None:
    """Refuse an adapter's file that holds weights of the base model: PEFT would write them into it, for all others too.

    PEFT saves embeddings if they were resized for an added token, as LESS's own code does for its pad token.

    Args:
        stored: Shapes by name in the adapter's file.
        base: The base model, without an adapter.
        where: Named in errors.

    Raises:
        ModelLoadError: It names the first such weight, with its size in the file and in the model.
    """
    names = {key.removeprefix("base_model.model."): shape for key, shape in stored.items()}
    known = {name: parameter.shape for name, parameter in base.named_parameters(remove_duplicate=False)}
    held = sorted(names.keys() & known.keys())
    if held:
        name = held[0]
        raise ModelLoadError(
            f"The adapter's file also holds {len(held)} weights of the base model, the first is {name}: "
            f"{_size(names[name])} in the file, {_size(known[name])} in the base model. PEFT saves what was trained "
            "besides LoRA, and embeddings that were resized, for a pad token, say.",
            where=where,
            fix="If they were only resized, save the adapter without them (`model.save_pretrained(folder, "
            "save_embedding_layers=False)`): padding needs no embedding. If they were trained, they are more than "
            "LoRA: train without `modules_to_save` and `bias`.",
        )


def check_vocabulary(
    model: transformers.PreTrainedModel | PeftModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer that can produce ids for which the model has no embedding.

    Raises:
        ModelLoadError: The tokenizer has more tokens than the model has embeddings.
    """
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > embeddings:
        added = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= embeddings)
        named = f" (the first without one is {added[0][1]!r}, id {added[0][0]})" if added else ""
        raise ModelLoadError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {embeddings} embeddings{named}.",
            where=model.name_or_path,
            fix="Use the tokenizer as the model's authors saved it, without tokens added later (a pad token is not "
            f"needed), or call `model.resize_token_embeddings({len(tokenizer)})`, then save both.",
        )


def _size(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape)

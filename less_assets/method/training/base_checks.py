"""What is refused of a base model: adapters that would be taken for a part of it, and sizes that do not fit.

Belongs here: looking at a folder's names, at what transformers says of the loading, at a model that is loaded, and at
the shapes that an adapter's file holds. It is imported without torch, so that `check` can look, too. Loading itself is
`models.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from less_assets.errors import ModelLoadError

if TYPE_CHECKING:
    import transformers
    from peft import PeftModel
    from torch import nn

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def refuse_adapter_files(folder: Path) -> None:
    """Refuse a folder with an adapter: transformers would load it on top of the weights without a word.

    It would come off again with the first checkpoint's adapter, and other numbers would be the base's from then on.

    Raises:
        ModelLoadError: The folder holds an adapter.
    """
    adapter = next(
        (name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin") if (folder / name).exists()), None
    )
    if adapter is not None:
        raise ModelLoadError(
            f"The base model's folder also holds an adapter ({adapter}), so it does not say which model is the base.",
            where=str(folder),
            fix="Name the model without the adapter in `model.base`; or merge the adapter into the weights "
            "(`PeftModel.merge_and_unload()`), save the result to a folder of its own and name that.",
        )


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
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

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
    embeddings = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    refuse_larger_vocabulary(tokenizer, embeddings, model.name_or_path)


def refuse_larger_vocabulary(
    tokenizer: transformers.PreTrainedTokenizerBase, embeddings: int, where: str | None
) -> None:
    """Refuse a tokenizer with more tokens than a model has embeddings.

    Args:
        tokenizer: The model's tokenizer.
        embeddings: The model's number of embeddings.
        where: Named in errors.

    Raises:
        ModelLoadError: It names both sizes, and the first token without an embedding.
    """
    if len(tokenizer) > embeddings:
        added = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= embeddings)
        named = f" (the first without one is {added[0][1]!r}, id {added[0][0]})" if added else ""
        raise ModelLoadError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {embeddings} embeddings{named}.",
            where=where,
            fix="Use the tokenizer as the model's authors saved it, without tokens added later (a pad token is not "
            f"needed), or call `model.resize_token_embeddings({len(tokenizer)})`, then save both.",
        )


def _size(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape)

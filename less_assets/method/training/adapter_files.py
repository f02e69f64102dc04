"""The files of a LoRA adapter, and that a base model's folder must have none.

Belongs here: names of files; it needs no torch, so that `check` can look, too. Loading adapters is `models.py`.
"""

from pathlib import Path

from less_assets.errors import ModelLoadError

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

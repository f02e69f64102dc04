"""Loaded models for steps: on demand, the last one kept, so that neighbouring partitions share it.

Belongs here: loading and letting go. Heavy libraries are imported inside functions, so that the code location loads
without them.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from less_assets.errors import ModelLoadError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.model_versions import is_hub_id, pinned, recorded
from less_assets.project.project import Project
from less_assets.project.sections import Gradients
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import hold_folder, local_path, storage_trouble

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from less_assets.method.data.chat import ChatEncoder
    from less_assets.method.gradients.directions import AdamMoments
    from less_assets.method.gradients.features import Batching
    from less_assets.method.gradients.sketch import Sketch


@dataclass
class LoadedCheckpoint:
    """A warm-up checkpoint in memory, ready for gradients.

    Attributes:
        model: PEFT model in eval mode on its device.
        tokenizer: Its tokenizer.
        moments: Adam's state by parameter name.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    moments: AdamMoments

    @property
    def pad_token_id(self) -> int:
        """What padding is filled with; any valid id does."""
        return self.tokenizer.pad_token_id or 0

    @cached_property
    def parameters(self) -> int:
        """P, the number of parameters of the adapter."""
        from less_assets.method.gradients.per_example import lora_slices

        return sum(part.size for part in lora_slices(self.model))

    @cached_property
    def _sketches(self) -> dict[tuple, Sketch]:
        return {}

    def sketch(self, settings: Gradients) -> Sketch:
        """The project's projection for this model's parameters."""
        from less_assets.method.gradients.per_example import lora_parameters
        from less_assets.method.gradients.sketch import Sketch

        key = (settings.sketch, settings.dimension, settings.seed)
        if key not in self._sketches:
            self._sketches[key] = Sketch(
                settings.sketch, settings.dimension, settings.seed, lora_parameters(self.model)
            )
        return self._sketches[key]

    def token_budget(self, settings: Gradients, longest: int) -> int:
        """Padded tokens of a batch: the project's, or what fits into free memory."""
        from less_assets.method.gradients.features import resolve_token_budget

        if settings.token_budget is not None:
            return settings.token_budget
        return resolve_token_budget(
            self.model,
            forms=settings.forms,
            dimension=settings.dimension,
            longest=longest,
            gradient_checkpointing=settings.gradient_checkpointing,
        )

    def batching(self, settings: Gradients, longest: int) -> Batching:
        """How rows are batched for gradients."""
        from less_assets.method.gradients.features import Batching

        return Batching(
            self.token_budget(settings, longest),
            self.pad_token_id,
            gradient_checkpointing=settings.gradient_checkpointing,
        )


class ModelLoader:
    """Loads models on demand and keeps the last checkpoint, so that neighbouring partitions share it.

    Args:
        project: The project file.
        cache: Local folder for dequantised models.

    Attributes:
        loads: Base models loaded so far.
        loading_seconds: Time that took.
    """

    def __init__(self, project: Project, cache: Path) -> None:
        self._project, self._cache = project, cache
        self._checkpoint: tuple[str, LoadedCheckpoint] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._encoder: ChatEncoder | None = None
        self._frozen: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._tuned: tuple[str, PeftModel] | None = None
        self._recorded: Mapping[str, Any] = {}
        self.loads, self.loading_seconds = 0, 0.0

    def describe_base(self, base: str) -> dict[str, Any]:
        """What the base model is: digest, licence, and where it comes from."""
        from less_assets.method.training.models import find_base

        files = find_base(base, self._cache, trust_remote_code=self._project.model.trust_remote_code)
        return {"base": base, "digest": files.digest, "revision": files.revision, "licence": files.licence}

    def commit_of(self, base: str | None) -> dict[str, Any]:
        """Which commit a run takes of another model than the project's; nothing for a folder or a file."""
        from less_assets.method.training.models import find_base

        if base is None or not is_hub_id(base):
            return {}
        return {"base": base, "revision": find_base(base, self._cache).revision}

    def pin(self, lineage: Lineage) -> None:
        """Load the project's model from now on at the commit that `base_model` recorded, whatever the hub has by now.

        Args:
            lineage: Knows what was recorded.
        """
        before = self._base
        if is_hub_id(self._project.model.base):
            made = recorded(lineage, "base_model", {})
            self._recorded = made.summary if made else {}
        if self._base != before:
            self.forget()
            self._tokenizer = self._encoder = None

    @property
    def _base(self) -> str:
        """The project's base model, at its recorded commit if there is one."""
        return str(pinned(self._project.model.base, self._recorded))

    def base(self, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A fresh copy of a base model (the project's by default) and its tokenizer.

        Leave to run a model's own code is given for the project's model, and for no other.
        """
        from less_assets.method.training.models import load_base

        model = self._project.model
        started = time.perf_counter()
        loaded = load_base(
            base or self._base,
            dtype=model.dtype,
            device=model.device,
            cache_dir=self._cache,
            trust_remote_code=model.trust_remote_code and base in (None, model.base),
            quantization=None if model.quantization == "none" else model.quantization,
            device_map=model.device_map,
        )
        self.loads, self.loading_seconds = self.loads + 1, self.loading_seconds + time.perf_counter() - started
        return loaded

    def frozen_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The project's base model for forward passes only, and its tokenizer; stays loaded for the next partition."""
        if self._frozen is None:
            self._checkpoint = self._tuned = None  # two models may not fit
            self._frozen = self.base()
        return self._frozen

    def forget(self) -> None:
        """Let go of the models that stayed loaded."""
        self._checkpoint = self._frozen = self._tuned = None

    def scratch(self, name: str) -> Path:
        """A local folder for a training's unfinished work; a killed run goes on from what is there."""
        folder = scratch_folder(self._cache) / name
        with storage_trouble(UPath(folder), "create"):
            folder.mkdir(parents=True, exist_ok=True)
        hold_folder(folder)  # for as long as this process lives: `gc` leaves it alone
        return folder

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer alone."""
        if self._tokenizer is None:
            from less_assets.method.training.models import load_tokenizer

            model = self._project.model
            self._tokenizer = load_tokenizer(
                self._base, cache_dir=self._cache, trust_remote_code=model.trust_remote_code
            )
        return self._tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase | None = None) -> ChatEncoder:
        """How the project's conversations become tokens; made once for each model.

        Args:
            tokenizer: That of a model other than the base model; None: the base model's.

        Raises:
            ChatFormatError: No conversation can be encoded with its template.
        """
        from less_assets.method.data.chat import ChatEncoder, check_chat_format

        tokenizer = tokenizer or self.tokenizer()
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            model = self._project.model
            check_chat_format(tokenizer, model.chat_format, model.date)
            self._encoder = ChatEncoder(tokenizer, model.chat_format, model.max_length, model.date)
        return self._encoder

    def adapter_parameters(self) -> int:
        """P, the number of parameters of the project's adapter on the base model; no weights are loaded for it."""
        from less_assets.method.training.models import LoraSettings, count_adapter_parameters

        model, lora = self._project.model, self._project.lora
        return count_adapter_parameters(
            self._base,
            LoraSettings(lora.rank, lora.alpha, lora.dropout, tuple(lora.target_modules)),
            cache_dir=self._cache,
            trust_remote_code=model.trust_remote_code,
        )

    def parameters(self, base: str) -> int | None:
        """M, the number of parameters of a base model, from its configuration alone; None if that is not at hand."""
        from less_assets.method.training.models import count_parameters

        model = self._project.model
        trust_remote_code = model.trust_remote_code and base == model.base
        try:
            return count_parameters(base, cache_dir=self._cache, trust_remote_code=trust_remote_code)
        except ModelLoadError:
            return None

    def checkpoint(self, lineage: Lineage, checkpoint: str) -> LoadedCheckpoint:
        """A warm-up checkpoint with Adam's moments; the last one stays loaded."""
        from less_assets.method.training.models import load_adapter
        from less_assets.method.training.warmup import load_moments

        fingerprint = lineage.fresh("warmup_checkpoints", checkpoint).fingerprint
        if self._checkpoint is None or self._checkpoint[0] != fingerprint:
            self._checkpoint = self._frozen = self._tuned = None  # before the next one is loaded: two may not fit
            model, tokenizer = self.base()
            with lineage.folder("warmup_checkpoints", checkpoint).local(write=False) as folder:
                adapted = load_adapter(model, folder)
                moments = load_moments(folder)
            self._checkpoint = (fingerprint, LoadedCheckpoint(adapted, tokenizer, moments))
        return self._checkpoint[1]

    def tuned_on_targets(self, lineage: Lineage, task: str) -> PeftModel:
        """The base model with the adapter that was trained on a task's targets; the last one stays loaded."""
        from less_assets.method.training.models import load_adapter

        fingerprint = lineage.fresh("target_tuned_adapter", task).fingerprint
        if self._tuned is None or self._tuned[0] != fingerprint:
            self._checkpoint = self._frozen = None
            model = self._tuned[1] if self._tuned else self.base()[0]
            with lineage.folder("target_tuned_adapter", task).local(write=False) as folder:
                self._tuned = (fingerprint, load_adapter(model, folder))
        return self._tuned[1]


def cache_folder(store: ArtifactStore) -> Path:
    """A local folder for what libraries want as files: inside a local store, else the user's cache."""
    here = local_path(store.root)
    return here / "cache" if here else Path.home() / ".cache" / "less-assets"


def scratch_folder(cache: Path) -> Path:
    """Where unfinished trainings lie in a cache folder."""
    return cache / "training"


@contextlib.contextmanager
def spared_from_collection() -> Iterator[None]:
    """Let Python's collector skip what is there already, and free what the block leaves behind.

    Dagster and the libraries are a million objects, and looking through them again and again slows training and
    gradients of small models: https://docs.python.org/3/library/gc.html#gc.freeze.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()

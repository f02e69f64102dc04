"""Exact gradients of every example of a batch from one forward and one backward pass.

Belongs here: which LoRA adapters are supported, the autograd function that turns a layer's backward pass into
per-example gradients, and the loss. Not here: what becomes of the gradients (`features`).

A LoRA layer computes y = W·x + s·B·A·x. For one example with inputs x (T, in) and output gradients e (T, out),
dA = (s·e·B)ᵀ·x and dB = s·eᵀ·(x·Aᵀ): two small products per example and layer, which cost what the gradient of the
whole batch would. They are handed to a sink layer by layer, while the backward pass runs, and dropped: at no time are
the gradients of all layers in memory. The LoRA weights themselves need no gradient, and the language-model head sees
only the positions that carry loss, which pays for the rest.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_mode
from peft.tuners.lora import layer as lora
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from less_assets.errors import LessAssetsError, UnsupportedModelError
from less_assets.method.data.chat import IGNORED
from less_assets.method.gradients.attention import FastAttention, keeps_weights

if TYPE_CHECKING:
    from peft import PeftModel

# Elements of a slice of gradients handed on at once: one row chunk stays in a processor's cache, or fills a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 16}
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 26

GradientSink = Callable[["LoraSlice", slice, Tensor], None]
"""Receives, per LoRA layer and range of batch rows, the rows' gradients (rows, size), float32, free to be changed."""


@dataclass(frozen=True)
class LoraSlice:
    """One LoRA layer: a contiguous slice of the flattened parameters, its A followed by its B.

    Attributes:
        name: Module name, e.g. `base_model.model.model.layers.0.self_attn.q_proj`.
        layer: The PEFT layer.
        a: Weight of its active adapter's A, (r, in).
        b: Weight of B, (out, r).
        scaling: The factor s of the product, as PEFT computed it (rsLoRA included).
        parameters: Names of A and B in `named_parameters()`.
        offset: Column of A's first element.
    """

    name: str
    layer: Any
    a: Tensor
    b: Tensor
    scaling: float
    parameters: tuple[str, str]
    offset: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        return tuple(self.a.shape), tuple(self.b.shape)

    @property
    def size(self) -> int:
        """Number of elements of A and B."""
        return self.a.numel() + self.b.numel()


def lora_slices(model: PeftModel) -> list[LoraSlice]:
    """The LoRA layers of a model in parameter order, after checking that their gradients can be exact.

    Args:
        model: A PEFT model with one active LoRA adapter on `nn.Linear` or `Conv1D` layers, or on 4-bit ones of
            bitsandbytes.

    Raises:
        UnsupportedModelError: Naming the first module for which per-example gradients would not be exact: DoRA and
            other variants, `modules_to_save`, trainable tokens, `target_parameters` (fused experts), LoRA on
            embeddings or convolutions, LoRA biases, quantized layers (8-bit ones of bitsandbytes round a row by what
            else is in its batch; its 4-bit ones are fine on accelerators), tied adapters, merged, disabled or several
            active adapters, and any other trainable parameter.
    """
    layers: list[tuple[str, lora.LoraLayer, str]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        _refuse_other_tuners(name, module)
        if isinstance(module, lora.LoraLayer):
            layers.append((name, module, _active_adapter(name, module)))
    if not layers:
        raise UnsupportedModelError("The model has no LoRA layer.", fix="Load a LoRA adapter with PEFT first.")

    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    offset = 0
    slices: list[LoraSlice] = []
    covered: set[int] = set()
    for name, layer, adapter in layers:
        a, b = (pair[adapter].get_parameter("weight") for pair in (layer.lora_A, layer.lora_B))
        for weight in (a, b):
            if len(names[id(weight)]) > 1:
                raise _unsupported("A LoRA weight is shared by several layers", ", ".join(names[id(weight)]))
            covered.add(id(weight))
        parameters = (names[id(a)][0], names[id(b)][0])
        slices.append(LoraSlice(name, layer, a, b, layer.scaling[adapter], parameters, offset))
        offset += slices[-1].size

    order = [name for name, parameter in model.named_parameters() if id(parameter) in covered]
    assert order == [name for part in slices for name in part.parameters], "PEFT's order of parameters has changed"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            raise _unsupported("A parameter outside the LoRA layers is trainable", name)
    return slices


def lora_parameters(model: PeftModel) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the LoRA weights in the order of the gradient's columns; part of every fingerprint.

    Raises:
        UnsupportedModelError: As `lora_slices`.
    """
    return [pair for part in lora_slices(model) for pair in zip(part.parameters, part.shapes, strict=True)]


def _unsupported(what: str, where: str) -> UnsupportedModelError:
    fix = "Train the adapter with plain LoRA on linear layers; its per-example gradients are exact."
    return UnsupportedModelError(f"{what}: exact per-example gradients are not available.", where=where, fix=fix)


def _refuse_other_tuners(name: str, module: nn.Module) -> None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        kind = "modules_to_save" if type(module).__name__ == "ModulesToSaveWrapper" else "trainable_token_indices"
        raise _unsupported(f"The adapter uses {kind}", name)
    if isinstance(module, TrainableTokensLayer):
        raise _unsupported("The adapter uses trainable_token_indices", name)
    if isinstance(module, lora.ParamWrapper):
        raise _unsupported("The adapter uses target_parameters (fused expert weights)", name)
    if isinstance(module, lora.LoraLayer) and not _is_linear(module):
        raise _unsupported(f"LoRA is applied to a layer of type {type(module).__name__}", name)


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer is y = W·x + s·B·A·x: over plain weights, or over weights that bitsandbytes keeps in 4 bits."""
    if type(module) is lora.Linear:
        return True
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from peft.tuners.lora.bnb import Linear4bit

    if type(module) is not Linear4bit:
        return False
    # On processors with bfloat16 instructions, bitsandbytes repacks weights when a model in eval mode first runs
    # without gradients; from then on, nothing is propagated back through them, silently.
    base: Any = module.get_base_layer()
    return base.weight.device.type != "cpu" or getattr(base, "support_avx512bf16_for_cpu", True) is False


def _active_adapter(name: str, layer: lora.LoraLayer) -> str:
    """The one adapter of a layer, or the reason why the layer is refused."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    base = layer.get_base_layer()
    if layer.merged or layer.disable_adapters:
        raise _unsupported("The adapter is merged or disabled", name)
    if len(active) != 1:
        raise _unsupported(f"{len(active)} adapters are active ({', '.join(active)})", name)
    adapter = str(active[0])
    if layer.use_dora.get(adapter) or len(layer.lora_magnitude_vector):
        raise _unsupported("The adapter uses DoRA", name)
    if adapter in layer.lora_variant:
        raise _unsupported(f"The adapter uses {type(layer.lora_variant[adapter]).__name__}", name)
    if layer.lora_B[adapter].bias is not None or layer.lora_A[adapter].bias is not None:
        raise _unsupported("The adapter uses lora_bias", name)
    if type(layer.lora_A[adapter]) is not nn.Linear or type(layer.lora_B[adapter]) is not nn.Linear:
        raise _unsupported(f"The adapter's weights are in a {type(layer.lora_A[adapter]).__name__}", name)
    if not isinstance(base, nn.Linear | Conv1D):
        raise _unsupported(f"LoRA is applied to a layer of type {type(base).__name__}", name)
    return adapter


class _LoraDelta(torch.autograd.Function):
    """y = W·x + s·B·A·x, whose backward pass reports each example's gradients of A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        anchor: Tensor,
        report: Callable[..., None],
    ) -> Tensor:
        hidden = x @ a.T
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scaling, ctx.report = scaling, report
        # One fused product and sum instead of three passes over the output, which must not be a view: models may add
        # to it in place (Falcon does), and autograd forbids that to views that a function returns.
        output = base.new_empty(base.shape)
        torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), b.T, alpha=scaling, out=output.flatten(0, -2))
        return output

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b = ctx.saved_tensors
        hidden_error = (error @ b).mul_(ctx.scaling)
        ctx.report(x, hidden_error, hidden, error, ctx.scaling)
        return error, hidden_error @ a if ctx.needs_input_grad[1] else None, None, None, None, None, None


def _forward_mode_layer(part: LoraSlice, base: Tensor, x: Tensor, tangent: Tensor) -> Tensor:
    """Y = base + s·B·A·x whose tangent has, besides that of x, the rows' own tangents of A and B."""

    def moved(values: Tensor, by: Tensor) -> Tensor:
        rows = forward_mode.unpack_dual(values).primal.flatten(1, -2)
        change = torch.bmm(rows, by.to(values.dtype).mT).view(*values.shape[:-1], -1)
        dual: Tensor = forward_mode.make_dual(torch.zeros_like(change), change)
        return dual

    a, b = part.a.to(x.dtype), part.b.to(x.dtype)
    along_a, along_b = tangent.split([part.a.numel(), part.b.numel()], dim=1)
    hidden = x @ a.T + moved(x, along_a.unflatten(1, part.a.shape))
    return base + part.scaling * (hidden @ b.T + moved(hidden, along_b.unflatten(1, part.b.shape)))


def _products(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right of each example, (n, T, p) and (n, T, q) to float32 (n, p·q)."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left.mT, right, torch.float32).flatten(1)  # the sum is not rounded back to 16 bits
    return torch.bmm(left.mT, right).flatten(1).float()


@dataclass(frozen=True)
class _LossPlaces:
    """A batch on the device, and where in it the n loss tokens are.

    Attributes:
        inputs: The model's arguments.
        shape: Rows and predicting columns: one less than the batch is wide, for the last one predicts nothing.
        positions: Flattened positions that predict a loss token (n,), on the CPU.
        wanted: The tokens to predict (n,), on the device.
        counts: Loss tokens of each row (rows,), on the CPU.
    """

    inputs: dict[str, Tensor]
    shape: tuple[int, int]
    positions: Tensor
    wanted: Tensor
    counts: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Values of the loss tokens (n,) at their places, float32 (rows, columns) on the CPU, zero elsewhere."""
        table = torch.zeros(self.shape[0] * self.shape[1])
        table[self.positions] = values.detach().float().cpu()
        return table.view(self.shape)


class PerExampleBackward:
    """Context in which a model yields per-example LoRA gradients; calling it runs one batch.

    Dropout is off inside, the LoRA layers' forward methods are replaced, and both are restored on leaving. Adapter
    products are taken in the dtype of the layer's input, so a bfloat16 model stays in bfloat16 throughout.

    Args:
        model: PEFT model; moved nowhere, used in the dtype it has.
        gradient_checkpointing: Recompute each decoder layer in the backward pass: about a third more time for far
            less memory.

    Raises:
        UnsupportedModelError: As `lora_slices`, or if the model has no layers to checkpoint.
    """

    def __init__(self, model: PeftModel, *, gradient_checkpointing: bool = False) -> None:
        self.model = model
        self.slices = lora_slices(model)
        self.size = sum(part.size for part in self.slices)
        self.device = self.slices[0].a.device
        self._checkpointed = (
            [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            if gradient_checkpointing
            else []
        )
        if gradient_checkpointing and not self._checkpointed:
            raise UnsupportedModelError(
                "The model has no layers that gradient checkpointing knows.",
                where=type(model.get_base_model()).__name__,
                fix="Switch gradient checkpointing off and lower the token budget.",
            )
        served = keeps_weights(next(model.parameters()))
        self._attention: AbstractContextManager[Any] = FastAttention() if served else nullcontext()
        self._takes_positions = "position_ids" in inspect.signature(model.get_base_model().forward).parameters
        # Leads the backward pass through every LoRA layer although no weight and no input requires a gradient.
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._sink: GradientSink | None = None
        self._rows = 0
        self._reported: set[str] = set()
        self._tangents: Mapping[str, Tensor] | None = None

    def __enter__(self) -> PerExampleBackward:
        self._was_training = self.model.training
        self.model.eval()
        for part in self.slices:
            part.layer.forward = partial(self._forward_layer, part)
        for module in self._checkpointed:
            module.forward = partial(
                checkpoint,
                module.forward,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), self._attention),  # the second forward pass is like the first
            )
        return self

    def __exit__(self, *exc: object) -> None:
        for module in [part.layer for part in self.slices] + self._checkpointed:
            del module.forward
        self.model.train(self._was_training)

    def __call__(self, batch: dict[str, Tensor], sink: GradientSink) -> Tensor:
        """Forward and backward pass of a batch; the sink gets every LoRA layer's gradients, last layer first.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` (unshifted) as `collate` makes them, on the CPU. Every row
                has a loss token.
            sink: Called while the backward pass runs.

        Returns:
            Mean cross-entropy over the loss tokens of each row, float32 (rows,), on the CPU.

        Raises:
            UnsupportedModelError: If the model uses a LoRA layer twice or mixes the rows of the batch.
            LessAssetsError: If the machine runs out of memory.
        """
        rows, width = batch["input_ids"].shape
        try:
            return self._run(batch, sink)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            raise LessAssetsError(
                f"Out of memory while taking the gradients of {rows} rows of {width} tokens.",
                where=f"device {self.device}",
                fix="Lower the token budget (half of it is a good next try), the maximum length, or switch gradient "
                "checkpointing on.",
            ) from error

    @torch.enable_grad()
    def _run(self, batch: dict[str, Tensor], sink: GradientSink) -> Tensor:
        places = self._places(batch)
        row_of = places.positions // places.shape[1]
        weights = (1.0 / places.counts)[row_of].to(self.device)
        self._sink, self._rows, self._reported = sink, places.shape[0], set()
        with self._attention:
            logits = logits_at(self.model, places.inputs, places.positions.to(self.device))
        losses = nn.functional.cross_entropy(logits.float(), places.wanted, reduction="none")
        # The gradient of a sum is each example's own gradient: rows do not meet, not even through a NaN.
        torch.sum(losses * weights).backward()
        for part in self.slices:
            if part.name not in self._reported:  # no path to the loss: its gradient is zero
                sink(part, slice(0, self._rows), torch.zeros(self._rows, part.size, device=self.device))
        return places.spread(losses).sum(1) / places.counts

    @torch.no_grad()
    def token_derivatives(self, batch: dict[str, Tensor], tangents: Mapping[str, Tensor]) -> Tensor:
        """Derivative of every token's loss along one direction per row, by one forward pass in forward mode.

        That is ⟨w, ∇ℓ_t⟩ for the row's direction w and the loss ℓ_t of each of its loss tokens: what one backward pass
        per token would give.

        Args:
            batch: As for calling the object.
            tangents: LoRA layer name -> directions (rows, size) float32 on the device, A's elements before B's.

        Returns:
            float32 (rows, width − 1) on the CPU: column c belongs to token c + 1; zero where there is no loss.

        Raises:
            UnsupportedModelError: As for calling the object.
        """
        places = self._places(batch)
        self._rows, self._tangents = places.shape[0], tangents
        try:
            # Fused attention kernels have no forward mode; the plain one has.
            with forward_mode.dual_level(), sdpa_kernel(SDPBackend.MATH):
                logits = logits_at(self.model, places.inputs, places.positions.to(self.device)).float()
                losses = -logits.log_softmax(1).gather(1, places.wanted[:, None])[:, 0]
                tangent = forward_mode.unpack_dual(losses).tangent
        finally:
            self._tangents = None
        return places.spread(torch.zeros_like(losses) if tangent is None else tangent)

    def _places(self, batch: dict[str, Tensor]) -> _LossPlaces:
        # The last column predicts nothing; the labels move one to the left once and for all.
        inputs = {"input_ids": batch["input_ids"][:, :-1].to(self.device)}
        targets = batch["labels"][:, 1:]
        mask = batch["attention_mask"][:, :-1]
        if not mask[:, 0].all():
            # Left padding. Right padding needs no mask: causal attention never looks at what follows.
            inputs["attention_mask"] = mask.to(self.device)
            if self._takes_positions:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0).to(self.device)
        in_loss = targets != IGNORED
        positions = in_loss.flatten().nonzero().squeeze(1)
        wanted = targets.flatten()[positions].to(self.device)
        return _LossPlaces(inputs, (targets.shape[0], targets.shape[1]), positions, wanted, in_loss.sum(1))

    def _forward_layer(self, part: LoraSlice, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() < 3 or x.shape[0] != self._rows:
            raise _unsupported(
                f"A LoRA layer sees inputs of shape {tuple(x.shape)} for a batch of {self._rows} rows, so its examples "
                "cannot be told apart (routed experts do this)",
                part.name,
            )
        base = part.layer.base_layer(x, *args, **kwargs)
        if self._tangents is not None:
            return _forward_mode_layer(part, base, x, self._tangents[part.name])
        report = partial(self._report, part)
        a, b = part.a.to(x.dtype), part.b.to(x.dtype)
        changed: Tensor = _LoraDelta.apply(base, x, a, b, part.scaling, self._anchor, report)  # type: ignore[no-untyped-call]
        return changed

    def _report(
        self, part: LoraSlice, x: Tensor, hidden_error: Tensor, hidden: Tensor, error: Tensor, scaling: float
    ) -> None:
        """Form the gradients of a few rows at a time and pass them on."""
        if part.name in self._reported:
            raise _unsupported("A LoRA layer is used more than once in a forward pass", part.name)
        self._reported.add(part.name)
        assert self._sink is not None
        # Multi-head latent attention (DeepSeek) has inputs (rows, 1, T, in): all between first and last are places.
        x, hidden_error, error = (tensor.flatten(1, -2) for tensor in (x, hidden_error, error))
        scaled = hidden.flatten(1, -2) * scaling
        step = max(1, _CHUNK_ELEMENTS.get(self.device.type, _CHUNK_ELEMENTS_ACCELERATOR) // part.size)
        for start in range(0, self._rows, step):
            rows = slice(start, min(start + step, self._rows))
            gradients = (_products(hidden_error[rows], x[rows]), _products(error[rows], scaled[rows]))
            self._sink(part, rows, torch.cat(gradients, dim=1))


def logits_at(model: PeftModel, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """A model's own logits (positions, vocabulary) at some of the flattened positions of a batch.

    The head is entered with only these positions, and whatever an architecture does to logits (scaling, soft caps)
    follows as it always does.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    rows, width = inputs["input_ids"].shape

    def keep_positions(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if arguments and arguments[0].shape[:2] == (rows, width):
            return (arguments[0].flatten(0, 1)[positions].unsqueeze(0), *arguments[1:])
        return None

    narrow = head is not None and not isinstance(head, lora.LoraLayer)
    with _hook(head.register_forward_pre_hook(keep_positions) if narrow else None):
        logits: Tensor = base(**inputs, use_cache=False).logits
    if logits.shape[:2] == (1, len(positions)):
        return logits[0]
    return logits.flatten(0, 1)[positions]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says with this error that memory has run out; processors have no exception of their own for it."""
    text = str(error).lower()
    return "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle | None) -> Iterator[None]:
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()

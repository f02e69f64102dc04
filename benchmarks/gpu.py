"""What was never run on a GPU, in one script of at most ten minutes: exact? as much memory as predicted? how fast?

    python benchmarks/gpu.py                          # on a GPU: about a billion parameters; writes results/gpu.md
    python benchmarks/gpu.py --device cpu --tiny      # a trial on the CPU, printed only (or --out FILE)

It needs this repository and its dependencies, no network and no other file: models are random Llamas. Sections begin
until `--minutes` are over; what fails says so in its line, and the others go on.

Exactness, on a model of four layers: largest relative error over rows, ‖ours − exact‖ / ‖exact‖, where `exact` is
autograd in float64 on the CPU, one row at a time, then the formulas of direction and sketch in float64. Memory: bytes
that `features.token_bytes` predicts for one batch in which every token has loss, over the highest that the device had
allocated beyond model and moments (on the CPU: resident memory, which tiny models do not move). Speed: tokens/s of
features (k 8192, form `adamw`) over tokens/s of `model(**batch).loss.backward()`, the same batches, in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tiny_project import write_model
from transformers import LlamaConfig, LlamaForCausalLM

from less_assets.method.data.batching import collate
from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients.directions import AdamMoments, Directions
from less_assets.method.gradients.exact import per_example_gradients
from less_assets.method.gradients.features import Batching, extract_features, token_bytes
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.gradients.sketch import Sketch
from less_assets.method.training.models import LoraSettings, attach_adapter, load_base, resolve_device, resolve_dtype

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.md"
LORA = LoraSettings(rank=8, alpha=32, dropout=0.0)
DIMENSION, FORM, STEP, ROUNDS = 8192, "adamw", 100, 3
Line = tuple[str, str]
"""What was measured, and what came out."""


@dataclass(frozen=True)
class Size:
    """Sizes of the model that speed and memory are measured on."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int


LARGE = Size(hidden=2048, layers=16, heads=32, vocabulary=32_000, rows=32, tokens=1024)
TINY = Size(hidden=64, layers=2, heads=4, vocabulary=128, rows=4, tokens=24)


def adapted(size: Size, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A random Llama with an adapter whose two matrices are random; the same numbers on every device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 4),
        max_position_embeddings=max(2048, size.tokens),
    )
    model = attach_adapter(LlamaForCausalLM(config).to(dtype).to(device), LORA, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def random_rows(size: Size, count: int, *, even: bool = False) -> list[EncodedExample]:
    """Rows of random tokens; of different lengths unless `even`. Every token has loss."""
    random = np.random.default_rng(0)
    lengths = np.full(count, size.tokens) if even else random.integers(size.tokens // 2, size.tokens + 1, count)
    tokens = [random.integers(3, size.vocabulary, length).astype(np.int32) for length in lengths]
    return [EncodedExample(str(index), row, row) for index, row in enumerate(tokens)]


def moments_of(parameters: list[tuple[str, tuple[int, ...]]]) -> AdamMoments:
    """Random moments of the sizes that training leaves."""
    generator = torch.Generator().manual_seed(2)
    first = {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in parameters}
    second = {name: 1e-6 * torch.rand(shape, generator=generator) for name, shape in parameters}
    return AdamMoments(first, second, STEP, 0.9, 0.999, 1e-8)


def exact_gradients(model: PeftModel, rows: list[EncodedExample]) -> np.ndarray:
    """Gradients of the rows by autograd in the model's own dtype, one row at a time, (n, P)."""
    by_name = dict(model.named_parameters())
    weights = [by_name[name].requires_grad_(True) for name, _ in lora_parameters(model)]
    gradients = []
    for row in rows:
        batch = collate([row], 0)
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:])
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))
    return torch.stack(gradients).numpy()


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest relative error over rows."""
    return float((np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let products of float32 numbers be taken in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def exactness(size: Size, device: torch.device) -> Iterator[Line]:
    """Gradients, directions and sketches against float64; the same gradients with TF32 and in bfloat16."""
    small = Size(min(size.hidden, 256), min(size.layers, 4), min(size.heads, 8), min(size.vocabulary, 1024), 6, 48)
    rows = random_rows(small, small.rows)
    truth = adapted(small, torch.device("cpu"), torch.float32).double()
    parameters = lora_parameters(truth)
    gradients = exact_gradients(truth, rows)
    moments = moments_of(parameters)
    first, second = (
        torch.cat([part[name].flatten() for name, _ in parameters]).double()
        for part in (moments.exp_avg, moments.exp_avg_sq)
    )
    (directions,) = Directions((FORM,), first, second, step=STEP)(torch.from_numpy(gradients))
    sketch = Sketch("sparse", min(DIMENSION, 1024), 0, parameters)
    sketched = sketch(directions).numpy()
    batching = Batching(2 * small.tokens)

    yield "TF32 as the process was started", "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    model = adapted(small, device, torch.float32)
    with tf32(False):
        found = per_example_gradients(model, rows, batching=batching)
        yield "error of gradients, float32", f"{error(found, gradients):.1e}"
        found = per_example_gradients(model, rows, form=FORM, moments=moments, batching=batching)
        yield f"error of directions ({FORM}), float32", f"{error(found, directions.numpy()):.1e}"
        options: dict[str, Any] = {"forms": (FORM,), "moments": moments, "sketch": sketch, "pad_token_id": 0}
        block = extract_features(model, rows, token_budget=batching.token_budget, **options)
        yield "error of sketches, float32", f"{error(block.features[FORM], sketched):.1e}"
        norms = block.norms[FORM] / np.linalg.norm(directions.numpy(), axis=1)
        yield "error of norms, float32", f"{float(np.abs(norms - 1).max()):.1e}"
        again = extract_features(model, rows, token_budget=batching.token_budget, **options)
        same = again.features[FORM].tobytes() == block.features[FORM].tobytes()
        yield "the same call again gives the same bytes", "yes" if same else "no"
    if device.type == "cuda":
        with tf32(True):
            found = per_example_gradients(model, rows, batching=batching)
        yield "error of gradients, float32 with TF32", f"{error(found, gradients):.1e}"
    half = adapted(small, device, torch.bfloat16)
    found = per_example_gradients(half, rows, batching=batching)
    yield "error of gradients, bfloat16", f"{error(found, gradients):.1e}"


class Peak:
    """Highest memory of the device beyond what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._resident("VmRSS")

    def bytes(self) -> int:
        """Since this was made."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._resident("VmHWM") - self._before

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory_and_speed(size: Size, device: torch.device) -> Iterator[Line]:
    """The memory formula with and without checkpointing, then features against a training step."""
    dtype = resolve_dtype("auto", device)
    model = adapted(size, device, dtype)
    parameters = lora_parameters(model)
    moments, sketch = moments_of(parameters), Sketch("sparse", DIMENSION, 0, parameters)
    rows = random_rows(size, size.rows, even=True)
    batch_rows = max(1, size.rows // 4)
    budget = batch_rows * size.tokens
    count = sum(weight.numel() for weight in model.parameters())
    yield "model", f"{count / 1e6:,.1f} M parameters, {str(dtype).removeprefix('torch.')}, LoRA r {LORA.rank}"
    yield "batch", f"{batch_rows} rows of {size.tokens} tokens"

    def features(part: list[EncodedExample], *, checkpointing: bool = False) -> None:
        extract_features(
            model,
            part,
            forms=(FORM,),
            moments=moments,
            sketch=sketch,
            token_budget=budget,
            pad_token_id=0,
            gradient_checkpointing=checkpointing,
        )

    features(rows[:1])  # signs, moments and the check of the gradients are there from now on
    for checkpointing in (False, True):
        number = next(model.get_base_model().parameters()).element_size()
        token = token_bytes(model.config, number, sketches=DIMENSION, gradient_checkpointing=checkpointing)
        peak = Peak(device)
        features(rows[:batch_rows], checkpointing=checkpointing)
        measured = peak.bytes()
        name = "memory of a batch" + (" with gradient checkpointing" if checkpointing else "")
        ratio = f"{token * budget / measured:.2f}" if measured > 0 else "not measurable"
        yield name, f"predicted {token * budget / 2**30:.3f} GiB, measured {measured / 2**30:.3f} GiB, ratio {ratio}"

    collated = [collate(rows[start : start + batch_rows], 0) for start in range(0, len(rows), batch_rows)]
    on_device = [{name: values.to(device) for name, values in batch.items()} for batch in collated]
    adapter = [weight for name, weight in model.named_parameters() if "lora_" in name]

    def training_step() -> None:
        for weight in adapter:
            weight.requires_grad_(True)
        for batch in on_device:
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    tokens = sum(len(row.input_ids) for row in rows)
    step, ours = take_turns(device, training_step, lambda: features(rows))
    yield "training step, tokens/s", f"{tokens / step:,.0f}"
    yield "features, tokens/s", f"{tokens / ours:,.0f}"
    yield "features ÷ training step", f"{step / ours:.2f}"


def take_turns(device: torch.device, *sides: Callable[[], None]) -> list[float]:
    """Median seconds of each side; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS + 1):
        for taken, side in zip(seconds, sides, strict=True):
            started = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
    return [median(taken[1:]) for taken in seconds]


def four_bit(size: Size, device: torch.device) -> Iterator[Line]:
    """Gradients over a base of 4 bits, which the product checks against autograd before it takes any."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield "4-bit base", "not run: bitsandbytes is not installed"
        return
    if device.type != "cuda":
        yield "4-bit base", f"not run: the device is {device.type}, bitsandbytes is tried on CUDA"
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), min(size.hidden, 1024), min(size.layers, 8))
        base, _ = load_base(folder, dtype="bfloat16", device=str(device), quantization="4bit", cache_dir=Path(folder))
    model = attach_adapter(base, LORA, 0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.01)
    rows = random_rows(Size(0, 0, 0, base.config.vocab_size, 8, 64), 8)
    gradients = per_example_gradients(model, rows, batching=Batching(512))
    finite = "finite" if np.isfinite(gradients).all() else "not finite"
    yield "4-bit base", f"gradients of {len(rows)} rows are {finite}, and as autograd's on the product's own check"


SECTIONS = (exactness, memory_and_speed, four_bit)


def measure(size: Size, device: torch.device, minutes: float) -> list[Line]:
    """The lines of the table."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: this ran on the CPU"
    lines = [("card", card), ("torch", torch.__version__)]
    deadline = time.monotonic() + 60 * minutes
    for section in SECTIONS:
        if time.monotonic() > deadline:
            lines.append((section.__name__, f"not run: {minutes:g} minutes were over"))
            continue
        try:
            for line in section(size, device):
                print(f"{line[0]}: {line[1]}", flush=True)
                lines.append(line)
        except Exception as trouble:  # a table with a hole says more than none
            lines.append((section.__name__, f"failed: {type(trouble).__name__}: {str(trouble).splitlines()[0]}"))
            print(f"{lines[-1][0]}: {lines[-1][1]}", flush=True)
    return lines


def as_markdown(lines: list[Line]) -> str:
    """The table."""
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {found} |" for what, found in lines)])


def main() -> None:
    """Measure, print the table, and write it if it is of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu, …")
    parser.add_argument("--tiny", action="store_true", help="a trial: its figures mean nothing")
    for name, value in vars(LARGE).items():
        parser.add_argument(f"--{name}", type=int, help=f"(default: {value})")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins after so many")
    parser.add_argument("--out", type=Path, help=f"where the table goes (default: {RESULTS.name}, for a GPU only)")
    asked = parser.parse_args()
    device = resolve_device(asked.device)
    chosen = vars(TINY if asked.tiny else LARGE)
    size = Size(**{name: getattr(asked, name) or value for name, value in chosen.items()})
    table = as_markdown(measure(size, device, asked.minutes))
    print(table)
    if out := asked.out or (RESULTS if device.type == "cuda" and not asked.tiny else None):
        out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

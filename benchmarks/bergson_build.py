"""What bergson's `build` does, one pass over the rows each time that it is told to: bergson's side of a comparison.

    bergson-environment/bin/python benchmarks/bergson_build.py ADAPTER ROWS WORK

Runs in an environment of its own (`features.py` makes it), so nothing of LESS Assets is imported here. ADAPTER is a
folder as PEFT saves it, ROWS a JSON-lines file of `input_ids` and `labels`. The model is loaded once; then
every line on standard input starts one collection of gradients, and its seconds are one line on standard output.
"""

import os
import sys
import time
from pathlib import Path

# Libraries print while they are imported; standard output belongs to the answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from bergson.build import allocate_batches, collect_gradients  # noqa: E402
from bergson.config.config import DataConfig, IndexConfig, PreprocessConfig  # noqa: E402
from bergson.utils.worker_utils import create_processor, setup_data_pipeline, setup_model_and_peft  # noqa: E402

DIMENSION = 512


def main() -> None:
    """Serve collections until standard input ends."""
    adapter, rows, work = sys.argv[1:]
    config = IndexConfig(
        run_path=str(Path(work) / "index"),
        model=adapter,
        precision="fp32",
        projection_dim=DIMENSION,
        projection_target="global",
        loss_reduction="mean",
        data=DataConfig(dataset=rows),
    )
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    data, _ = setup_data_pipeline(config)
    model, modules = setup_model_and_peft(config)
    processor = create_processor(model, config, modules)
    batches = allocate_batches(data["length"][:], config.token_batch_size)
    print("ready", file=ANSWERS, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        collect_gradients(
            model=model,
            data=data,
            processor=processor,
            cfg=config,
            batches=batches,
            target_modules=modules,
            attention_cfgs={},
            preprocess_cfg=PreprocessConfig(),
        )
        print(time.perf_counter() - started, file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()

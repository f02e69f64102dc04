"""Which families of causal language models are exact, which are refused: every one that transformers ships.

    PYTHONPATH=tests python benchmarks/architectures.py

How to read the table it writes (`results/architectures.md`): "exact" is a relative error below 1e-5 against autograd,
or against a plain forward pass, one row at a time; "refused" is an error message that names the architecture or the
layer; "not made" is a family of which no tiny model can be made. `tests/method/gradients/test_families.py` compares.
"""

import re
from collections import Counter
from importlib.metadata import version

import torch
from support.families import FAMILIES, RECORD, NotConstructibleError, verdict

HEADER = """# Architectures: exact, or refused by name

Written by `benchmarks/architectures.py` with transformers {version} and PEFT {peft}. Each family is a tiny model with
random weights: LoRA on the attention projections (on all linear layers where there are none), rows of 7, 12 and 19
tokens. The product pads on the right.

{summary}

| family | gradients, padding on the right | on the left | embeddings, perplexity | why |
|---|---|---|---|---|
"""


def main() -> None:
    """Try every family and write the table."""
    torch.set_num_threads(1)
    lines, counts = [], Counter()
    for family in FAMILIES:
        try:
            outcome = verdict(family)
            cells, reason = (outcome.right, outcome.left, outcome.embeddings), "; ".join(outcome.reasons)
        except NotConstructibleError as problem:
            cells, reason = ("not made",) * 3, str(problem).partition(" / ")[0]
        counts[cells] += 1
        # Shares and sizes depend on the machine's rounding; bars would end the cell.
        reason = re.sub(r" by \d[\d.]*%|: exact per-example gradients are not available\.", "", reason).replace(
            "|", "/"
        )
        line = " | ".join([f"`{family}`", *cells, reason])
        lines.append(f"| {line} |")
        print(lines[-1], flush=True)
    made = len(FAMILIES) - counts[("not made",) * 3]
    exact = sum(count for cells, count in counts.items() if cells[0] == "exact")
    summary = (
        f"Of {len(FAMILIES)} families, {made} can be made tiny. {exact} of these have exact gradients with padding on "
        f"the right,\n{counts[('exact',) * 3]} are exact in every column, and {made - exact} are refused by name."
    )
    header = HEADER.format(version=version("transformers"), peft=version("peft"), summary=summary)
    RECORD.write_text(header + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Memory that a model needs on a GPU, calculated, never run: `python -m benchmarks.memory` prints README's table.

Weights are 2 bytes a parameter (bfloat16); a row of 2,048 tokens needs what `features.token_bytes` says of each token,
with the default forms and dimension. Shapes are those of the models' published configurations.
"""

from dataclasses import dataclass

from less_assets.method.gradients.features import token_bytes
from less_assets.project.sections import Gradients

TOKENS, NUMBER = 2048, 2


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on."""

    parameters: float
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int


MODELS = {
    "1 B (Llama 3.2)": Shape(1.24e9, 2048, 16, 8192, 128256),
    "8 B (Llama 3.1)": Shape(8.03e9, 4096, 32, 14336, 128256),
    "13 B (Llama 2)": Shape(13.0e9, 5120, 40, 13824, 32000),
}


def as_markdown() -> str:
    """The table of the README."""
    defaults = Gradients()
    sketches = len(defaults.forms) * defaults.dimension
    lines = ["| model | weights | one row | one row, `gradient_checkpointing` |", "|---|---|---|---|"]
    for name, shape in MODELS.items():
        row, checkpointed = (
            TOKENS * token_bytes(shape, NUMBER, sketches=sketches, gradient_checkpointing=on) / 1e9
            for on in (False, True)
        )
        weights = shape.parameters * NUMBER / 1e9
        lines.append(f"| {name} | {weights:.1f} GB | {row:.1f} GB | {checkpointed:.1f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())

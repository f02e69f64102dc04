"""Chat templates in the style of the model families that people use, and tokenizers that have them.

The files in `templates/` are written for these tests. Their first line, a comment, says as JSON what the tokenizer has
(`bos`, `eos`, `special`), what may end an assistant turn (`ends`; else it is `eos`), what the template shows beside
contents (`shows`: tools, calls, reasoning), and whether it writes the day (`date`).
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
WORDS = "the quick brown fox says what is two plus two and who asked the user or the assistant of this system today"


@dataclass(frozen=True)
class Family:
    """A template and what is known of it.

    Attributes:
        name: Of its file.
        tokenizer: Byte-level pairs, with the family's special tokens.
        ends: What may stand after a turn's last word, white space aside.
        shows: What it shows beside contents.
        writes_date: Whether it asks for the day.
    """

    name: str
    tokenizer: Any
    ends: tuple[str, ...]
    shows: frozenset[str]
    writes_date: bool


def read_family(path: Path) -> Family:
    """Read a template's file."""
    text = path.read_text(encoding="utf-8")
    known = json.loads(text[text.index("{", 2) : text.index("-#}")])
    tokenizer = make_tokenizer(text, known.get("bos"), known["eos"], known.get("special", []))
    ends = tuple(known.get("ends", [known["eos"]]))
    return Family(path.stem, tokenizer, ends, frozenset(known.get("shows", [])), known.get("date", False))


def make_tokenizer(
    template: str, bos: str | None, eos: str, special: list[str], words: str = WORDS
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, so that words and their leading space are one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys([token for token in (bos, eos) if token] + special))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([words] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, additional_special_tokens=special
    )
    tokenizer.chat_template = template
    return tokenizer


FAMILIES = {path.stem: read_family(path) for path in sorted(FOLDER.glob("*.jinja"))}


SPECIAL = re.compile(r"<[|｜][^|｜<>\n]+[|｜]>|</?s>|<[a-z]+_of_[a-z]+>|<\|?(?:turn|channel)\|?>|\[/?[A-Z_]+\]|<bos>")
"""What looks like a special token in a published template."""


def published_templates() -> dict[str, Path]:
    """The templates that come with TRL, as their models have them; none where TRL is not installed."""
    spec = importlib.util.find_spec("trl")
    folders = [Path(folder) / "chat_templates" for folder in (spec.submodule_search_locations if spec else None) or ()]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.jinja"))}


def published_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with a published template and the special tokens that stand in it."""
    template = path.read_text(encoding="utf-8")
    special = sorted(set(SPECIAL.findall(template)) - {"<s>", "</s>"})
    return make_tokenizer(template, "<s>", "</s>", special)

"""Input that nobody would write: every reader answers with a result or with an error of the project's own.

Belongs here: what is tried on which reader. `test_fuzz.py` tries a little of it, `soak.py` a million inputs, each
batch in a process of its own with bounded memory, so that a crash, a hang or a flood of memory is found and named.

Most inputs are good ones with a few edits: random bytes alone are refused at the first of them.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from less_assets.errors import (
    ChatFormatError,
    CheckpointImportError,
    CorruptArtifactError,
    MissingArtifactError,
    PoolFormatError,
    ProjectFileError,
    StaleArtifactError,
    TargetFormatError,
)
from less_assets.lineage.plan import ArtifactPlan
from less_assets.lineage.pool_files import LEDGER_FILE, PoolFiles
from less_assets.method.data.chat import IGNORED, ChatEncoder
from less_assets.method.data.conversations import ROLES, Conversation, carries_loss, example_id, for_trainers, stated
from less_assets.method.data.examples import read_rows
from less_assets.method.data.row_files import count_rows, scan_ranges
from less_assets.method.data.row_formats import ROW_STATUSES, normalize
from less_assets.method.data.row_keys import MASK_KEYS, REASONING_KEYS, UNSUPPORTED_ROW_KEYS, UNSUPPORTED_TURN_KEYS
from less_assets.method.data.targets import TargetExample, read_evaluation, read_targets, target_table
from less_assets.project.project import parse_project
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.features import FeatureReader, FeatureWriter, open_features
from less_assets.store.manifest import Manifest

ROOT = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")
KEY, PRINT = "pool/dolly-00000", "0" * 32


@dataclass(frozen=True)
class Property:
    """A strategy for inputs, and a check that raises nothing whatever the input."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


@cache
def scratch() -> Path:
    """A folder for this process's inputs, in memory where there is such a thing."""
    return Path(tempfile.mkdtemp(prefix="less-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))


def clear_scratch() -> None:
    """Remove this process's folder."""
    shutil.rmtree(scratch(), ignore_errors=True)
    scratch.cache_clear()


# ---- edits ----

# Bytes that mean something to one of the formats.
TELLING = [
    b"\0",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
]
TELLING += [b"null", b"NaN", b"1e999", b"-1", b"\\ud800", b"&a *a", b": ", b"- ", b"\x80" * 9, b"9" * 400, b"[" * 400]
EDIT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "repeat", "drop"]),
    st.floats(0, 1, allow_nan=False),
    st.integers(1, 64),
    st.sampled_from(TELLING) | st.binary(max_size=8),
)


def edited(data: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    """A file with some edits: where (as a share of its length), how many bytes, which ones."""
    content = bytearray(data)
    for how, where, size, inserted in edits:
        at = int(where * len(content))
        if how == "flip" and content:
            at = min(at, len(content) - 1)
            content[at] ^= 1 << size % 8
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = inserted
        elif how == "repeat":
            content[at:at] = content[at : at + size]
        elif how == "drop":
            del content[at : at + size]
    return bytes(content)


def edits_of(*originals: bytes) -> st.SearchStrategy[bytes]:
    """Good files with one to four edits, and now and then no trace of a good file."""
    some = st.lists(EDIT, min_size=1, max_size=4)
    return st.builds(edited, st.sampled_from(originals), some) | st.binary(max_size=64)


def _names(error: Exception, what: str) -> None:
    """Whether a refusal names what it is about, and can be printed."""
    assert what in str(error), f"{what} is not named by: {error}"
    str(error).encode()


# ---- pool ----

TURNS = [{"role": "user", "content": "What is ½ of 3?"}, {"role": "assistant", "content": "It’s 1.5\n\nSee?"}]
RECORDS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"prompt": "Why?", "completion": "Because."},
    {"instruction": "Add", "input": "1, 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"messages": [*TURNS, {"role": "tool", "content": ""}]},
    {"messages": [TURNS[0], {**TURNS[1], "weight": 1, "reasoning_content": "half", "name": "A"}], "loss_mask": [0, 1]},
    {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "One"},
        ],
    },
    {"instruction": "And?", "output": "Then.", "history": [["First?", "First."]], "label": False},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
TABLE = b'instruction,input,output\nAdd,"1, 2",3\n"Say ""hi""",,"hi\nthere"\nx,y,z\n'


def parquet_bytes() -> bytes:
    """A Parquet file with two row groups of conversations."""
    stream = io.BytesIO()
    table = pa.table({"messages": [TURNS, None, TURNS, [], TURNS]})
    pq.write_table(table, stream, row_group_size=3)
    return stream.getvalue()


def check_pool(suffix: str) -> Callable[[bytes], None]:
    """Rows of any bytes: as many as were counted, each usable or with a known reason; or the file is refused."""

    def check(data: bytes) -> None:
        file = scratch() / f"rows{suffix}"
        file.write_bytes(data)
        try:
            rows = count_rows(str(file))
            tables = list(read_rows(str(file), "fuzz"))
            scan_ranges(str(file), [(0, 1), (2, 2)])
        except PoolFormatError as error:
            _names(error, file.name)
            return
        found = [row for table in tables for row in table.iter_rows(named=True)]
        assert len(found) == rows
        assert [row["source_row"] for row in found] == list(range(1, rows + 1))
        for row in found:
            assert row["status"].partition(":")[0] in ROW_STATUSES
            assert (row["status"] == "ok") == (row["messages"] is not None) == (row["example_id"] is not None)

    return check


# Keys that mean something, with values of every kind: as they should be, almost so, and anything else.
_WORD = st.sampled_from(["", " ", "q", "a\0b", "\u2028", "½", "[]", "null", "0", "\ud800"]) | st.text(max_size=4)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | _WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORD, inner, max_size=3),
    max_leaves=5,
)
_CALL = st.fixed_dictionaries(
    {}, optional={"type": st.just("function"), "id": _WORD, "name": _WORD, "arguments": _ANY, "function": _ANY}
) | st.builds(lambda name, given: {"function": {"name": name, "arguments": given}}, _WORD, _ANY)
_TOOLS = st.lists(_CALL, max_size=2) | st.lists(_CALL, max_size=2).map(json.dumps) | _ANY
_PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": _WORD}) | _ANY
_TURN_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "role": st.sampled_from([*ROLES, "function", "human"]),
    "content": st.lists(_PART, max_size=2) | _ANY,
    **dict.fromkeys(MASK_KEYS, st.sampled_from([0, 1, True, False, 0.5]) | _ANY),
    **dict.fromkeys(REASONING_KEYS, _WORD | _ANY),
    **dict.fromkeys(UNSUPPORTED_TURN_KEYS, st.just([]) | _ANY),
    **{"tool_calls": _TOOLS, "function_call": _CALL, "tool_call_id": _WORD, "name": _WORD},
}


def _some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """None, one or two of the fields."""
    names = st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen}))


_TURN = st.builds(lambda turn, more: turn | more, st.sampled_from(TURNS), _some_of(_TURN_FIELDS))
_TURNS = st.lists(_TURN, max_size=3).map(lambda turns: [*TURNS, *turns]) | st.lists(_TURN, max_size=4) | _ANY
_SHARED_TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "observation", "function_call"]), "value": _WORD | _CALL | _ANY}
)
_ROW_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("messages", "prompt", "completion"), _TURNS),
    **dict.fromkeys(("instruction", "input", "output", "response", "system", "system_prompt"), _WORD | _ANY),
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(UNSUPPORTED_ROW_KEYS[:3], st.just([]) | _ANY),
    **dict.fromkeys(("label", "weight", "loss", "mood"), _ANY),
    "conversations": st.lists(_SHARED_TURN, max_size=4).map(lambda turns: [*RECORDS[3]["conversations"], *turns])
    | _ANY,
    "history": st.lists(st.lists(_WORD, min_size=2, max_size=2), max_size=2) | _ANY,
    "loss_mask": st.lists(st.integers(0, 1), min_size=2, max_size=5) | _ANY,
}
ROW = st.builds(
    lambda row, more: row | more,
    st.sampled_from(RECORDS) | st.builds(lambda turns: {"messages": turns}, _TURNS) | st.just({}),
    _some_of(_ROW_FIELDS),
)


def check_row(record: dict[str, Any]) -> None:
    """Any object is a conversation or has a known reason; a conversation is the same after Parquet and after export."""
    folder = scratch()
    (folder / "row.jsonl").write_text(json.dumps(record) + "\n")
    (table,) = read_rows(str(folder / "row.jsonl"), "fuzz")
    table.write_parquet(folder / "row.parquet")
    (row,) = pl.read_parquet(folder / "row.parquet").iter_rows(named=True)
    assert row["status"].partition(":")[0] in ROW_STATUSES
    if row["status"] != "ok":
        assert row["detail"]
        assert row["messages"] is row["tools"] is row["example_id"] is None
        return
    conversation = normalize(json.loads(json.dumps(record)))
    stored = Conversation([stated(turn) for turn in row["messages"]], row["tools"])
    assert stored == conversation
    assert row["example_id"] == example_id(*stored)
    assert normalize(json.loads(json.dumps(for_trainers(*stored)))) == conversation


# ---- project file ----


def check_project(data: bytes) -> None:
    """A project whose every view is JSON, or the project file's own error, which can be printed."""
    try:
        found = parse_project(data, "p.yaml")
    except ProjectFileError as error:
        str(error).encode()
        return
    views: list[Any] = [found.model_settings(), found.sample_settings(), found.warmup_settings()]
    views += [found.gradient_settings(), *(found.task_settings(task) for task in found.task_names)]
    for key in found.recipe_keys:
        views += [found.recipe_settings(key), found.finetuning_settings(key)]
    json.dumps(views, allow_nan=False, ensure_ascii=False).encode()


# ---- chat ----

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRIPPING = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
THINKING = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}",
)


@cache
def byte_tokenizer(template: str) -> Any:
    """Bytes as tokens, and the marks of turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(special + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", chat_template=template
    )


TEXT = st.text(max_size=20) | st.sampled_from(
    ["<|end|>", "<|assistant|>", " ", "\n", "{{ 1/0 }}", "\u2028", "a\0b", "<|user|><|assistant|>x<|end|>", "e\u0301"]
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": TEXT},
    optional={"reasoning": TEXT, "train": st.booleans(), "name": TEXT, "tool_call_id": TEXT},
)
CHAT = st.tuples(
    st.lists(TURN, min_size=1, max_size=5),
    TEXT,
    st.sampled_from(["template", "tulu"]),
    st.sampled_from([TEMPLATE, STRIPPING, THINKING]),
    st.integers(1, 80),
)


def check_chat(case: tuple[list[Any], str, Any, str, int]) -> None:
    """Ids within the limit and loss on the unmasked assistant turns' own texts; or a status; or the project's error."""
    messages, completion, chat_format, template, longest = case
    tokenizer, name = byte_tokenizer(template), example_id(messages)
    encoder = ChatEncoder(tokenizer, chat_format, longest)
    with contextlib.suppress(ChatFormatError):
        encoded = encoder.row(name, messages)
        _check_encoded(encoded, longest)
        if encoded.status == "ok":
            _check_loss_text(ChatEncoder(tokenizer, chat_format, 10**6), messages)
    target = TargetExample(name, "s", messages, "", completion)
    with contextlib.suppress(ChatFormatError, TargetFormatError):
        encoded = encoder.target(target)
        _check_encoded(encoded, longest)
        assert encoded.loss_tokens


def _check_loss_text(encoder: ChatEncoder, messages: list[Any]) -> None:
    """The decoded loss is what the unmasked assistant turns say, and their ends."""
    encoded = encoder.row("row", messages)
    ids = encoded.input_ids[1:][encoded.labels[1:] != IGNORED]
    texts = []
    for turn in filter(carries_loss, messages):
        content, thought = turn["content"].strip(), (turn.get("reasoning") or "").strip()
        said = f"{thought}</think>{content}" if thought else content
        texts.append(f"{said}<|end|>" if said or encoder.chat_format == "tulu" else "")
    decoded = encoder.tokenizer.decode(ids)
    assert "".join(decoded.split()) == "".join("".join(texts).split())


def _check_encoded(found: Any, longest: int) -> None:
    assert len(found.input_ids) == len(found.labels) <= longest
    carrying = found.labels != IGNORED
    np.testing.assert_array_equal(found.labels[carrying], found.input_ids[carrying])


# ---- targets ----

BBH = json.dumps({"navigate": "Say.\n\nMind.\n\nQ: a\nA: b. So the answer is No.\n\nQ: c\nA: d\n\nQ: e\nA: f"}).encode()
TYDIQA = json.dumps({"english": [{"context": "c", "question": "q", "answers": [{"text": "a"}]}]}).encode()
GSM8K = json.dumps([{"question": "q", "cot_answer": "2 + 2 = 4. So the answer is 4.", "short_answer": "4"}]).encode()


def check_targets(case: tuple[str, bytes]) -> None:
    """Target examples with texts, or an error that names the file."""
    format, data = case
    names = {"bbh": "bbh.json", "tydiqa": "tydiqa.json", "gsm8k": "gsm8k.json", "mmlu": "mmlu/a_dev.csv"}
    file = scratch() / names.get(format, "targets.jsonl")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    path = str(file.parent if format == "mmlu" else file)
    try:
        assert target_table(read_targets(format, path)).height >= 0
    except (TargetFormatError, PoolFormatError) as error:
        _names(error, str(scratch()))
    if format == "messages":
        with contextlib.suppress(TargetFormatError, PoolFormatError):
            read_evaluation(format, path, 3, shots_path=None, few_shot=False)


# ---- checkpoints ----


@cache
def optimizer_bytes() -> bytes:
    """A small `optimizer.pt` as Trainer writes it."""
    import torch

    moments = {"exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3), "step": torch.tensor(5.0)}
    group = {"params": [0], "betas": (0.9, 0.999), "eps": 1e-8, "lr": 1e-3}
    stream = io.BytesIO()
    torch.save({"state": {0: moments}, "param_groups": [group]}, stream)
    return stream.getvalue()


@cache
def moments_bytes() -> bytes:
    """A small `adam_moments.safetensors`."""
    import torch

    from less_assets.method.gradients.directions import AdamMoments
    from less_assets.method.training.epoch_folder import write_moments

    file = scratch() / "good.safetensors"
    first, second = ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)} for _ in range(2))
    write_moments(file, AdamMoments(first, second, 5, 0.9, 0.999, 1e-8))
    return file.read_bytes()


def check_optimizer(data: bytes) -> None:
    """Adam's state, or a refusal; nothing pickled is run."""
    from less_assets.method.training.imported_checkpoint import read_optimizer_state

    file = scratch() / "optimizer.pt"
    file.write_bytes(data)
    with contextlib.suppress(CheckpointImportError):
        assert read_optimizer_state(file).entries


def check_moments(data: bytes) -> None:
    """Moments by name, or a refusal that names the file."""
    from less_assets.method.training.epoch_folder import read_moments

    file = scratch() / "adam_moments.safetensors"
    file.write_bytes(data)
    try:
        found = read_moments(file)
    except CorruptArtifactError as error:
        _names(error, file.name)
        return
    assert found.exp_avg.keys() == found.exp_avg_sq.keys()


# ---- store ----

PLAN = ArtifactPlan("instruction_pool", "dolly-00000", KEY, KEY, {"size": 4, "name": "é"}, {"base": "v1"})
MANIFEST = Manifest(
    kind="instruction_pool", key=KEY, fingerprint=PRINT, settings={"size": 4}, data_version="v", summary={"rows": 4}
).to_bytes()


def check_manifest(data: bytes) -> None:
    """The manifest that was written, or a refusal: no byte of it changes unnoticed."""
    try:
        found = Manifest.from_bytes(data, "there")
    except (CorruptArtifactError, StaleArtifactError):
        return
    assert found.to_bytes() == MANIFEST
    PLAN.differences(found)


@cache
def pointer_bytes() -> bytes:
    """A `current.json` as the store writes it."""
    store = ArtifactStore(str(scratch() / "good"))
    with store.writing(KEY, PRINT) as folder:
        folder.seal(kind="instruction_pool")
    store.publish(store.artifact(KEY, PRINT))
    return Path(str(store.root), KEY, "current.json").read_bytes()


def check_pointer(data: bytes) -> None:
    """The record that was written, or a refusal."""
    store = ArtifactStore(str(scratch() / "pointer"))
    file = Path(str(store.root), KEY, "current.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    try:
        found = store.pointer(KEY)
    except CorruptArtifactError as error:
        _names(error, file.name)
        return
    assert found is not None
    assert (found.folder.key, found.folder.fingerprint) == (KEY, PRINT)


LEDGER = json.dumps(
    {
        "files": {"plus": [{"path": "plus.jsonl", "rows": 3, "stamp": "9-1"}]},
        "shards": [
            {
                "key": "plus-00000",
                "source": "plus",
                "segments": [{"path": "plus.jsonl", "first_row": 0, "rows": 3, "digest": "d"}],
            }
        ],
    }
).encode()


def check_ledger(data: bytes) -> None:
    """Shards with numbers of rows, or a refusal that names the file."""
    store = ArtifactStore(str(scratch() / "ledger"))
    file = Path(str(store.root), LEDGER_FILE)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    try:
        found = PoolFiles.load(store)
    except CorruptArtifactError as error:
        _names(error, file.name)
        return
    for shard in found.shards:
        assert isinstance(shard.rows, int)
        assert shard.digest


@cache
def good_features() -> dict[str, bytes]:
    """Files of a finished set of features: two blocks of two forms."""
    folder = ArtifactStore(str(scratch() / "features")).artifact("gradients/train/epoch-1/plus-00000", PRINT)
    shutil.rmtree(str(folder.root), ignore_errors=True)
    writer = FeatureWriter(folder.path("features.zarr"), ("adamw", "sgd"), 5, 8, "int8", block_rows=3)
    for index in range(writer.blocks):
        start, stop = writer.bounds(index)
        rows = np.random.default_rng(index).standard_normal((stop - start, 8)).astype(np.float32)
        ones = np.ones(stop - start, np.float32)
        block = SimpleNamespace(
            features={"adamw": rows, "sgd": -rows},
            norms={"adamw": ones, "sgd": ones},
            loss=ones,
            loss_tokens=np.ones(stop - start, np.int32),
            status=np.zeros(stop - start, np.uint8),
        )
        writer.write_block(index, block)
    folder.seal(kind="train_gradients")
    root = Path(str(folder.root))
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def check_zarr(case: tuple[float, list[Any], bool]) -> None:
    """Sealed features with any edit are refused; unsealed ones are refused or read, and nothing else happens."""
    files = good_features()
    where, edits, sealed = case
    folder = ArtifactStore(str(scratch() / "features")).artifact("gradients/train/epoch-1/plus-00000", PRINT)
    names = sorted(name for name in files if sealed or name != "manifest.json")
    name = names[min(int(where * len(names)), len(names) - 1)]
    data = edited(files[name], edits)
    file = Path(str(folder.root)) / name
    file.write_bytes(data)
    try:
        reader = open_features(folder) if sealed else FeatureReader(folder.path("features.zarr"))
        for form in reader.forms:
            reader.norms(form)
            for _, block in reader.blocks(form):
                assert block.dtype == np.float32
        assert not sealed or _same(name, data, files[name]), f"an edit of {name} went unnoticed"
    except (CorruptArtifactError, MissingArtifactError, StaleArtifactError) as error:
        _names(error, str(folder.root))
    finally:
        file.write_bytes(files[name])


def _same(name: str, data: bytes, good: bytes) -> bool:
    """Equal bytes; of the manifest, which holds its own digest, equal content: a blank more is no damage."""
    return data == good or (name == "manifest.json" and json.loads(data) == json.loads(good))


def properties() -> dict[str, Property]:
    """All of them by name."""
    targets = st.one_of(
        *(
            st.tuples(st.just(name), edits_of(data))
            for name, data in {
                "bbh": BBH,
                "tydiqa": TYDIQA,
                "gsm8k": GSM8K,
                "mmlu": b'What is 2 + 2?,3,4,"5, or so",6,B\nA second one?,w,x,y,z,D\n',
                "messages": LINES,
            }.items()
        )
    )
    names = ("less_assets/demo.yaml", "projects/template.yaml", "projects/less-paper.yaml")
    projects = [(ROOT / name).read_bytes() for name in names]
    edits = st.lists(EDIT, min_size=1, max_size=3)
    return {
        "pool: JSON lines": Property(edits_of(LINES, LINES[:200]), check_pool(".jsonl")),
        "pool: CSV": Property(edits_of(TABLE), check_pool(".csv")),
        "pool: TSV": Property(edits_of(TABLE.replace(b",", b"\t")), check_pool(".tsv")),
        "pool: gzip": Property(edits_of(gzip.compress(LINES, mtime=0)), check_pool(".jsonl.gz")),
        "pool: bzip2": Property(edits_of(bz2.compress(LINES)), check_pool(".jsonl.bz2")),
        "pool: xz": Property(edits_of(lzma.compress(LINES)), check_pool(".jsonl.xz")),
        "pool: Parquet": Property(edits_of(parquet_bytes()), check_pool(".parquet")),
        "pool: any row": Property(ROW, check_row),
        "project file": Property(edits_of(*projects), check_project),
        "chat": Property(CHAT, check_chat),
        "targets": Property(targets, check_targets),
        "checkpoint: optimizer": Property(edits_of(optimizer_bytes()), check_optimizer),
        "checkpoint: moments": Property(edits_of(moments_bytes()), check_moments),
        "manifest": Property(edits_of(MANIFEST), check_manifest),
        "current.json": Property(edits_of(pointer_bytes()), check_pointer),
        "ledger": Property(edits_of(LEDGER), check_ledger),
        "Zarr": Property(st.tuples(st.floats(0, 1, allow_nan=False), edits, st.booleans()), check_zarr),
    }

"""Names of the fields of pool rows: what is read, what cannot be carried, and what only describes.

Belongs here: the names. What becomes of a field is decided in `row_formats`.
"""

import re

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of an assistant turn that hold what it thought."""

MASK_KEYS = ("weight", "train", "training", "loss", "loss_mask")
"""Keys of a turn that say whether it carries loss: 0, 1, false or true."""

MEDIA_KEYS = (
    *("images", "image", "image_url", "videos", "video", "audios", "audio", "input_audio"),
    *("image_urls", "image_path", "image_paths", "image_file", "image_files", "img", "pixel_values"),
    *("video_url", "video_path", "video_paths", "audio_url", "audio_path", "audio_paths", "speech"),
    *("media", "attachments"),
)

CONTENT_PARTS = (
    *(*MEDIA_KEYS, "input_image", "file", "input_file", "document", "refusal"),
    *("thinking", "redacted_thinking", "reasoning", "tool_use", "tool_result", "tool_call"),
)

UNSUPPORTED_ROW_KEYS = (
    *MEDIA_KEYS,
    *("rejected", "chosen", "chat_template_kwargs", "enable_thinking", "documents"),
    *("loss_scale", "loss_multiplier", "train_on_inputs", "train_on_input", "train_on_prompt"),
    *(*REASONING_KEYS, "thought", "thoughts", "think", "cot", "chain_of_thought"),
    *("tool_calls", "function_call", "developer", "developer_prompt"),
)
"""Keys of a row that cannot be carried, whatever their value, unless it is empty; see also `UNSUPPORTED_OF_ROWS`."""

UNSUPPORTED_TURN_KEYS = (
    *MEDIA_KEYS,
    *("file", "refusal", "tools", "functions", "channel"),
    *("recipient", "think", "cot", "chain_of_thought"),
    *("thought", "thoughts", "reasoning_text", "reasoning_details", "thinking_blocks"),
    *("ignore", "skip"),
)
"""Keys of a turn that cannot be carried, whatever their value, unless it is empty; see also `UNSUPPORTED_OF_TURNS`."""

UNSUPPORTED_OF_ROWS = re.compile(r"(?:rejected|chosen)_.+|(?:.+_)?(?:mask|masks|weight|weights)")
UNSUPPORTED_OF_TURNS = re.compile(r"(?:.+_)?(?:loss|mask|masks|masked|weight|weights|train|trainable)(?:_.+)?")
"""More such keys, whole: an answer to avoid, a mask or a weight under any name that has no agreed meaning."""

FORMAT_KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "context", "output", "response", "history"),
    "sharegpt": ("conversations",),
}

SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")

ROW_KEYS = (*SYSTEM_KEYS, "tools", "functions", "loss_mask")
"""Keys of a row that every format may have, and that are carried."""

VERDICT_KEYS = ("label", "kto_tag", "train", "loss", "desirable", "accepted")
"""Keys of a row that refuse it where they are false, 0, -1 or a word of `VERDICTS_AGAINST`.

Other values but true and 1 are no verdict, and counted.
"""

VERDICTS_AGAINST = (0, -1, "rejected", "undesirable", "bad")

HARMLESS_KEYS = frozenset(
    {
        *("id", "idx", "index", "uuid", "uid", "hash", "example_id", "prompt_id", "conversation_id", "rank", "score"),
        *("source", "source_id", "dataset", "dataset_name", "subset", "split", "subtask", "task", "task_name"),
        *("task_type", "type", "category", "categories", "topic", "topics", "tag", "tags", "domain", "difficulty"),
        *("language", "lang", "locale", "license", "url", "link", "title", "author", "model", "model_name"),
        *("version", "created", "created_at", "timestamp", "date", "meta", "metadata"),
        *("turns", "num_turns", "n_turns", "tokens", "num_tokens", "length"),
    }
)
"""Keys of rows and turns that only describe: they are left out without a word."""

TURN_KEYS = ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name")
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments", "parameters", "args", "input")
PART_KEYS = ("type", "text")

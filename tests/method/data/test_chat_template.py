"""Chat templates: loss is on what the assistant says and on what ends it; row, target and prompt have equal ids."""

import datetime
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.chat_templates import FAMILIES, SPECIAL, make_tokenizer, published_templates, published_tokenizer

from less_assets.errors import ChatFormatError
from less_assets.method.data.chat import IGNORED, ChatEncoder
from less_assets.method.data.conversations import carries_loss, full_text
from less_assets.method.data.targets import TargetExample

CASES = Path(__file__).parents[2] / "data/cases"
LENGTH = 100_000
TRIED: Counter[str] = Counter()
PUBLISHED_TOKENIZERS: dict[str, Any] = {}

TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Tell the weather.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ]
)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}WRITTEN{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
LONG = "{{ m['content'] if m['content'] | length < 12 else m['content'][:12] }}"
TWICE = "{{ m['content'] + m['content'] if 'fox' in m['content'] else m['content'] }}"
NAMES = (
    "{% if loop.first %}{% for t in tools or [] %}"
    "{{ t.function.name[:9] + t.function.description + t.function.parameters.properties | join(' ') }}"
    "{% endfor %}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c.function.name + ' ' + (c.function.arguments.values() | join)[:8] }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module", autouse=True)
def told_at_the_end(request):
    """Say how many conversations were tried, and how many of them could be encoded."""
    yield
    if not TRIED:
        return
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        names = {name for name, _ in (key.split("|") for key in TRIED)}
        tried, good = sum(TRIED.values()), sum(n for key, n in TRIED.items() if key.endswith("|ok"))
        print(f"\n{len(names)} templates × conversations = {tried:,} tried, {good:,} encoded")


def user(content):
    return {"role": "user", "content": content}


def said(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(city, number=1):
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def answer(content, number=1):
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05}", "name": "weather"}


TALK = [user("Who is it?"), said("The fox."), user("And who asked?"), said("The user, twice.")]


def encoder(family):
    return ChatEncoder(family.tokenizer, "template", LENGTH)


# ---- generated conversations ----

words = st.lists(
    st.sampled_from(["the", "fox", "Who", "2", "is", "it?", "Oslo", "says:", "ok.", "Ünï", "🙂", "a\n\nb", "- x"]),
    min_size=1,
    max_size=5,
).map(" ".join)
hostile = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(["<think>", "</think>", "assistant", "\ue0002\ue001", " x ", "\n", "</s>x", "{{ x }}", "user:"]),
)


@st.composite
def conversations(draw, texts, shows):
    """Turns in an order that people have: a system turn, questions, thoughts, calls and their answers.

    Mostly what the template shows, and sometimes what it does not.
    """
    turns, tools = [], None
    if draw(st.booleans()):
        turns.append({"role": draw(st.sampled_from(["system", "system", "developer"])), "content": draw(texts)})
    odd = draw(st.integers(0, 9)) == 0
    with_calls = draw(st.booleans()) and ("calls" in shows or odd)
    with_thoughts = draw(st.booleans()) and ("reasoning" in shows or odd)
    if draw(st.booleans()) and ("tools" in shows or odd):
        tools = TOOLS
    for number in range(draw(st.integers(1, 3))):
        turns.append(user(draw(texts)))
        if with_calls and draw(st.booleans()):
            calling = said(draw(st.just("") | texts), tool_calls=json.dumps([call(draw(words), number)]))
            turns += [calling, answer(draw(texts), number)]
        turn = said(draw(texts))
        if with_thoughts and draw(st.booleans()):
            turn["reasoning"] = draw(texts)
        if draw(st.integers(0, 3)) == 0:
            turn["train"] = False
        turns.append(turn)
    return turns, tools


def encode(family, turns, tools):
    """Encode a conversation and count it."""
    encoded = encoder(family).row("row", turns, tools)
    TRIED[f"{family.name}|{encoded.status.partition(':')[0]}"] += 1
    if encoded.status != "ok":
        assert not len(encoded.input_ids)
        assert encoded.problem
    return encoded


def runs(encoded, tokenizer):
    """The texts of the runs of positions with loss."""
    texts, run = [], []
    for token, label in zip([*encoded.input_ids, -1], [*encoded.labels, IGNORED], strict=True):
        if label != IGNORED:
            assert label == token
            run.append(int(token))
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def expected(turn, family):
    """A pattern of the text with loss of a turn: what it says, what closes a thought, a call, what ends the turn."""
    edges = r"\s*"
    parts = []
    if thought := (turn.get("reasoning") or "").strip():
        parts.append(re.escape(thought) + r"\s*(?:</think>|<\|end\|>)")
    if content := turn["content"].strip():
        parts.append(re.escape(content))
    if turn.get("tool_calls"):
        (made,) = json.loads(turn["tool_calls"])
        city = re.escape(made["function"]["arguments"]["city"])
        dumped = re.escape(json.dumps(made["function"]["arguments"]["city"], ensure_ascii=False)[1:-1])
        parts.append(
            rf"(?:<\|end\|>)?(?:(?!user|system|assistant).)*weather(?:(?!user|system|assistant).)*(?:{city}|{dumped}).*?"
        )
    ends = [re.escape(end) for end in (*family.ends, "<|call|>", "")]
    return re.compile(edges + edges.join(parts) + edges + f"(?:{'|'.join(ends)})" + edges, re.DOTALL)


def check_row(family, turns, tools):
    """Encode a conversation; what is accepted has loss on the unmasked turns' words, and nowhere else."""
    encoded = encode(family, turns, tools)
    if encoded.status != "ok":
        return encoded
    tokens, cut = encoder(family).loss_token_texts(turns, tools)
    assert not cut
    assert len(tokens) == encoded.loss_tokens
    for place, turn in enumerate(turns):
        text = "".join(token.text for token in tokens if token.turn == place)
        if carries_loss(turn) and full_text(turn).strip():
            assert expected(turn, family).fullmatch(text), (text, turn)
        else:
            assert not text.strip()
    # Runs of neighbouring spans may join; their text is the same.
    joined = "".join(token.text for token in tokens)
    assert re.sub(r"\s", "", "".join(runs(encoded, family.tokenizer))) == re.sub(r"\s", "", joined)
    return encoded


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_conversation_is_encoded_with_every_template(name):
    family = FAMILIES[name]
    turns = [user("Who is it?"), said("The fox."), user("And who asked?"), said("The user, twice.")]
    encoded = check_row(family, turns, None)
    assert encoded.status == "ok"
    once = [turns[0], said("The fox.", train=False), *turns[2:]]
    masked = check_row(family, once, None)
    assert masked.input_ids.tolist() == encoded.input_ids.tolist()
    assert 0 < masked.loss_tokens < encoded.loss_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_does_not_show_is_told_by_name(name):
    family = FAMILIES[name]
    made = json.dumps([call("Oslo")])
    tried = {
        "tools": ([user("Rain?"), said("No.")], TOOLS),
        "reasoning": ([user("Rain?"), said("No.", reasoning="Hm.")], None),
        "calls": ([user("Rain?"), said("", tool_calls=made), answer("Rain."), said("Yes.")], None),
    }
    for field, (turns, tools) in tried.items():
        encoded = check_row(family, turns, tools)
        named = "tool_calls" if field == "calls" else field
        assert encoded.status == ("ok" if field in family.shows else f"unsupported_field: {named}")


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40)
@given(st.data())
def test_loss_is_on_what_the_assistant_says(name, data):
    family = FAMILIES[name]
    check_row(family, *data.draw(conversations(words, family.shows)))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40)
@given(st.data())
def test_any_text_is_encoded_as_it_is_or_refused(name, data):
    family = FAMILIES[name]
    turns, tools = data.draw(conversations(hostile, family.shows))
    if encode(family, turns, tools).status != "ok":
        return
    tokens, _ = encoder(family).loss_token_texts(turns, tools)
    for place, turn in enumerate(turns):
        text = "".join(token.text for token in tokens if token.turn == place)
        if carries_loss(turn):
            assert all(part.strip() in text for part in (turn["content"], turn.get("reasoning") or ""))
        else:
            assert not text


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40)
@given(st.data())
def test_a_target_is_the_row_without_its_end_and_a_prompt_is_what_stands_before_the_answer(name, data):
    family = FAMILIES[name]
    (*before, last), tools = data.draw(conversations(words, family.shows))
    last = said("the fox is " + last["content"])
    row = encode(family, [*before, last], tools)
    assume(row.status == "ok")
    target = encoder(family).target(TargetExample("target", "all", before, "", last["content"], tools))
    length = len(target.input_ids)
    first = int(np.flatnonzero(target.labels != IGNORED)[0])
    assert target.input_ids.tolist() == row.input_ids[:length].tolist()
    assert (target.labels[first:] == row.labels[first:length]).all()
    assert family.tokenizer.decode(target.input_ids[first:]).strip() == last["content"].strip()
    assert encoder(family).prompt(before, tools=tools) == target.input_ids[:first].tolist()
    begun = encoder(family).prompt(before, "the fox", tools=tools)
    whole = family.tokenizer.decode(target.input_ids)
    assert family.tokenizer.decode(begun) == whole[: whole.rindex(last["content"].strip())] + "the fox"


# ---- published templates ----

PUBLISHED = published_templates()


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=10)
@given(conversation=conversations(words, frozenset()))
def test_published_templates_have_loss_on_the_answers_only(name, conversation):
    tokenizer = PUBLISHED_TOKENIZERS.setdefault(name, published_tokenizer(PUBLISHED[name]))
    encoder = ChatEncoder(tokenizer, "template", LENGTH)
    (*before, last), tools = conversation
    turns = [*before, said("the fox is " + last["content"])]
    row = encoder.row("row", turns, tools)
    TRIED[f"{name} of TRL|{row.status.partition(':')[0]}"] += 1
    plain = {"role", "content", "train"}
    if row.status != "ok":
        assert tools or any(turn["role"] not in ("user", "assistant") or turn.keys() - plain for turn in turns)
        return
    tokens, _ = encoder.loss_token_texts(turns, tools)
    for place, turn in enumerate(turns):
        text = "".join(token.text for token in tokens if token.turn == place).strip()
        content = turn["content"].strip() if carries_loss(turn) else ""
        assert content in text
        if not turn.keys() - plain:
            assert text.startswith(content)
            assert not SPECIAL.sub("", text.removeprefix(content)).strip()
    target = encoder.target(TargetExample("target", "all", before, "", turns[-1]["content"], tools))
    first = int(np.flatnonzero(target.labels != IGNORED)[0])
    assert target.input_ids.tolist() == row.input_ids[: len(target.input_ids)].tolist()
    assert encoder.prompt(before, tools=tools) == target.input_ids[:first].tolist()


# ---- templates on which earlier versions fell short ----


def case(name):
    """A tokenizer with the template of a case."""
    template = (CASES / f"template-{name}/template.jinja").read_text()
    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>"]
    return make_tokenizer(template, None, "<|endoftext|>", [*special, "<start_of_turn>", "<end_of_turn>"])


@pytest.mark.parametrize(
    ("name", "texts", "prompt"),
    [
        (
            "no-generation-prompt",
            ["The fox.<|im_end|>", "The user, twice.<|im_end|>"],
            "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "final-channel",
            ["The fox.<|end|>", "The user, twice.<|return|>"],
            "<|start|>user<|message|>Who is it?<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        (
            "with-date",
            ["The fox.<|im_end|>", "The user, twice.<|im_end|>"],
            "<|im_start|>system\nToday: 01 Jan 2025<|im_end|>\n<|im_start|>user\nWho is it?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "without-system",
            ["The fox.<end_of_turn>", "The user, twice.<end_of_turn>"],
            "<start_of_turn>user\nWho is it?<end_of_turn>\n<start_of_turn>assistant\n",
        ),
    ],
)
def test_headers_and_channels_are_in_prompt_target_and_row_and_carry_no_loss(name, texts, prompt):
    tokenizer = case(name)
    encoder = ChatEncoder(tokenizer, "template", LENGTH)
    assert runs(encoder.row("row", TALK), tokenizer) == texts
    assert tokenizer.decode(encoder.prompt(TALK[:1])) == prompt
    target = encoder.target(TargetExample("target", "all", TALK[:1], "", "The fox."))
    assert tokenizer.decode(target.input_ids) == prompt + "The fox."
    assert runs(target, tokenizer) == ["The fox."]


def test_a_row_that_the_template_refuses_has_a_status_and_its_words():
    encoded = ChatEncoder(case("without-system"), "template", LENGTH).row("row", [SYSTEM, *TALK])
    assert encoded.status == "template_refuses"
    assert "no system turns" in encoded.problem


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.writes_date])
def test_the_day_is_the_projects_whatever_day_it_is(name):
    family = FAMILIES[name]
    ids = [
        ChatEncoder(family.tokenizer, "template", LENGTH, day).row("row", TALK).input_ids.tolist()
        for day in (datetime.date(1999, 12, 31), datetime.date(1999, 12, 31), datetime.date(2030, 1, 2))
    ]
    assert ids[0] == ids[1] != ids[2]
    assert "1999" in family.tokenizer.decode(ids[0])
    assert str(datetime.date.today().year) not in family.tokenizer.decode(ids[2])


@pytest.mark.parametrize(
    "day",
    [
        "{% set form = '%Y' %}{{ strftime_now(form) }}",
        "{% set today = strftime_now %}{{ today('%Y') }}",
        "{{ [strftime_now][0]('%Y') }}",
        "{{ strftime_now\n('%Y' ~ '') }}",
    ],
)
def test_a_day_that_cannot_be_frozen_is_an_error(day):
    template = day + CHATML.replace("WRITTEN", "{{ m['content'] }}")
    with pytest.raises(ChatFormatError, match="cannot be frozen"):
        ChatEncoder(make_tokenizer(template, None, "<|im_end|>", ["<|im_start|>"]), "template", LENGTH).row("x", TALK)


def test_a_day_that_is_asked_for_only_if_it_can_be_is_frozen():
    day = "{# strftime_now #}{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    template = day + CHATML.replace("WRITTEN", "{{ m['content'] }}")
    tokenizer = make_tokenizer(template, None, "<|im_end|>", ["<|im_start|>"])
    encoded = ChatEncoder(tokenizer, "template", LENGTH, datetime.date(1999, 12, 31)).row("x", TALK)
    assert tokenizer.decode(encoded.input_ids).startswith("1999")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"rag": CHATML, "tool_use": CHATML}, "no default"),
        ([{"name": "default", "template": CHATML}], "of type list"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for m in messages %}", "unexpected end|Unexpected end"),
    ],
)
def test_a_template_that_cannot_run_is_one_error_that_names_it(template, words):
    tokenizer = make_tokenizer(CHATML, None, "<|im_end|>", ["<|im_start|>"])
    tokenizer.chat_template = template
    with pytest.raises(ChatFormatError, match=words) as refused:
        ChatEncoder(tokenizer, "template", LENGTH).row("x", TALK)
    assert refused.value.fix


# ---- what a template leaves out of a row ----


def with_body(written):
    tokenizer = make_tokenizer(CHATML.replace("WRITTEN", written), None, "<|im_end|>", ["<|im_start|>"])
    return ChatEncoder(tokenizer, "template", LENGTH)


def test_a_template_that_changes_every_text_is_an_error_that_says_so():
    with pytest.raises(ChatFormatError, match="changes the text of turn 1"):
        with_body("{{ m['content'] | lower }}").row("row", TALK)


@pytest.mark.parametrize("written", [LONG, TWICE])
def test_a_row_whose_text_the_template_changes_is_not_trained_on(written):
    encoded = with_body(written).row("row", [user("who?"), said("The quick brown fox.")])
    assert encoded.status == "template_drops_text"
    assert "turn 2" in encoded.problem
    assert with_body(written).row("row", [user("who?"), said("I am.")]).status == "ok"


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("gpt_oss", {"reasoning": "Hm."}, "Hm.<|end|> to=functions.weather<|channel|>commentary json<|message|>"),
        ("gpt_oss", {"content": "Hm."}, "Hm.<|end|> to=functions.weather<|channel|>commentary json<|message|>"),
        ("qwen3", {"reasoning": "Hm."}, 'Hm.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '),
        ("glm4_5", {"content": "Hm."}, "Hm.\n<tool_call>weather\n<arg_key>"),
    ],
)
def test_a_header_between_a_text_and_a_call_carries_no_loss(name, fields, text):
    turns = [user("Rain?"), said("", tool_calls=json.dumps([call("Oslo")])) | fields, answer("Rain."), said("Yes.")]
    tokens, _ = encoder(FAMILIES[name]).loss_token_texts(turns, TOOLS)
    assert "".join(token.text for token in tokens if token.turn == 1).startswith(text)


@pytest.mark.parametrize(("name", "status"), [("gpt_oss", "template_drops_text"), ("qwen3", "ok")])
def test_calls_that_differ_in_a_number_only_must_all_be_in_the_text(name, status):
    made = [{"type": "function", "function": {"name": "weather", "arguments": {"days": days}}} for days in (2, 3)]
    turns = [user("Rain?"), said("", tool_calls=json.dumps(made)), answer("Rain."), said("Yes.")]
    assert encoder(FAMILIES[name]).row("row", turns, TOOLS).status == status


@pytest.mark.parametrize("days", [2, 2.5, True, None, "two"])
@pytest.mark.parametrize(("value", "kept"), [("| tojson", object), ("| string", object), ("if v is string", str)])
def test_a_value_of_a_call_that_is_left_out_is_seen(days, value, kept):
    body = f"""{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}{{{{ c.function.name }}}}
        {{%- for k, v in c.function.arguments.items() %}}{{{{ ' ' + k + '=' }}}}{{{{ v {value} }}}}{{% endfor %}}
        {{%- endfor %}}"""
    made = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": days}}}]
    turns = [user("Rain?"), said("", tool_calls=json.dumps(made)), answer("Rain."), said("Yes.")]
    encoded = with_body(body).row("row", turns)
    assert encoded.status == ("ok" if isinstance(days, kept) else "template_drops_text"), encoded.problem


@pytest.mark.parametrize("more", [{}, {"arguments": None}, {"arguments": "null"}, {"arguments": ""}])
def test_a_call_without_arguments_says_its_name_only(more):
    made = json.dumps([{"type": "function", "function": {"name": "weather", **more}}])
    turns = [user("Rain?"), said("", tool_calls=made), answer("Rain."), said("Yes.")]
    body = with_body("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}")
    assert body.row("row", turns).status == "ok"


def test_an_answer_that_the_template_repeats_is_not_trained_on():
    body = with_body("{{ m['content'] }}{{ messages[2]['content'] if messages | length == 4 and loop.last }}")
    encoded = body.row("row", [SYSTEM, user("Who?"), said("The fox."), user("Sure?")])
    assert (encoded.status, "2 times" in encoded.problem) == ("template_drops_text", True)


def test_private_characters_in_a_call_are_not_taken_for_marks():
    made = json.dumps([call("\ue0002\ue001")])
    encoded = encoder(FAMILIES["qwen3"]).row("row", [user("Rain?"), said("", tool_calls=made)])
    assert (encoded.status, "private characters" in encoded.problem) == ("template_refuses", True)


@pytest.mark.parametrize(
    ("city", "tool", "problem"),
    [
        ("Oslo", "weather", None),
        ("Trondheim, N", "weather", "'Trondheim, N'"),
        ("Oslo", "weather_tomorrow", "the tool"),
    ],
)
def test_a_tool_or_an_argument_that_is_left_out_is_seen(city, tool, problem):
    tools = TOOLS.replace('"weather"', f'"{tool}"')
    made = json.dumps([call(city)]).replace('"city"', '"weather"')
    turns = [user("Rain?"), said("", tool_calls=made), answer("Rain."), said("Yes.")]
    encoded = with_body(NAMES).row("row", turns, tools)
    assert encoded.status == ("template_drops_text" if problem else "ok")
    assert problem is None or problem in encoded.problem


SHOWN = {
    "names": "{{ t.function.name }}",
    "described": "{{ t.function.name + t.function.description | replace('\n', ' ') }}",
    "parameters": "{{ t.function.name + t.function.description + ' ' + t.function.parameters.properties | join(' ') }}",
    "all": "{{ t | tojson }}",
    "as Python": "{{ t }}",
}


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        ("names", "Tell the"),
        ("described", "'city'"),
        ("parameters", "town"),
        ("all", None),
        ("as Python", None),
    ],
)
def test_what_a_template_leaves_out_of_a_tool_is_seen(shown, problem):
    city = {"type": "string", "description": 'A "town".', "enum": ["Zürich", "a\\b"], "default": None}
    function = {"name": "weather", "description": "Tell the\n 'weather'.", "parameters": {"properties": {"city": city}}}
    tools = json.dumps([{"type": "function", "function": function}], ensure_ascii=False)
    body = (
        f"{{% if loop.first %}}{{% for t in tools or [] %}}{SHOWN[shown]}{{% endfor %}}{{% endif %}}{{{{ m.content }}}}"
    )
    encoded = with_body(body).row("row", [user("Rain?"), said("Yes.")], tools)
    assert encoded.status == ("template_drops_text" if problem else "ok"), encoded.problem
    assert problem is None or problem in encoded.problem


@pytest.mark.parametrize(
    ("body", "fields", "status"),
    [
        ("{{ m.content }}", {"name": "Ann"}, "unsupported_field: name"),
        ("{{ m.content }}", {"name": "User"}, "ok"),
        ("{{ m.content }}", {"name": ""}, "ok"),
        ("{{ (m.name or '') + ': ' + m.content }}", {"name": "Ann"}, "ok"),
        ("{{ ((m.name or '') if loop.last else '') + m.content }}", {"name": "Ann"}, "unsupported_field: name"),
    ],
)
def test_a_participant_whose_name_is_left_out_is_seen(body, fields, status):
    encoded = with_body(body).row("row", [user("Ann?") | fields, said("Yes.")])
    assert encoded.status == status, encoded.problem
    assert status == "ok" or "'Ann' of turn 1" in encoded.problem


def test_the_tulu_format_shows_no_participants():
    tulu = ChatEncoder(FAMILIES["qwen2_5"].tokenizer, "tulu", LENGTH)
    assert tulu.row("row", [user("Who?") | {"name": "Ann"}, said("Me.")]).status == "unsupported_field: name"


@pytest.mark.parametrize(("content", "status"), [("x = [1, 2]", "template_refuses"), ("x = [1, 2] ", "ok")])
def test_a_token_that_an_answer_shares_with_the_next_header_is_seen(content, status):
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    special = ["<|user|>", "<|assistant|>"]  # that of tools is not among them
    tokenizer = make_tokenizer(template, None, "<|end|>", special, words="]<| ]<|")
    turns = [user("Who?"), said(content), {"role": "tool", "content": "Rain."}, said("Me.")]
    encoded = ChatEncoder(tokenizer, "template", LENGTH).row("row", turns)
    assert encoded.status == status
    assert status == "ok" or "the token ']<|' belongs to an answer" in encoded.problem

"""From a record's columns to its tokens, and to which of them are a completion's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lolcats_cli.teacher.documents import Document, RowFault, tokenise
from lolcats_cli.teacher.records import DataOptions

AUTO = DataOptions()
USER, ANSWER = {"role": "user", "content": "sea?"}, {"role": "assistant", "content": "ship"}
CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
)
# Thoughts of all turns but the last are left out, as Qwen 3 does: a beginning alone is rendered otherwise.
FORGETS = "{% for m in messages %}{{ m.content.split('!')[-1] if not loop.last else m.content }}|{% endfor %}"
MARKS = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"  # noqa: E501
TOOLS = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}|{% endfor %}"  # noqa: E501


@pytest.fixture
def chat(tiny_teacher) -> Any:
    """`chat(template)`: the tokenizer with that chat template."""

    def make(template: str | dict[str, str]) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
        tokenizer.chat_template = template
        return tokenizer

    return make


def text(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(document.ids)


def completion(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    assert document.completion is not None, document.untold
    return tokenizer.decode([i for i, mark in zip(document.ids, document.completion, strict=True) if mark])


def fault(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: DataOptions = AUTO) -> str:
    with pytest.raises(RowFault) as caught:
        tokenise(record, tokenizer, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_ends_with_the_end_token(tokenizer, ids) -> None:
    document = tokenise({"text": "the sea"}, tokenizer, AUTO)
    assert document.ids == ids("the sea")
    assert document.completion is None
    assert tokenise({"text": "sea</s>"}, tokenizer, AUTO).ids == ids("sea")
    assert tokenise({"body": "x", "text": "y"}, tokenizer, DataOptions(text_field="body")).ids == ids("x")


@pytest.mark.parametrize("given", ["", None, "absent", "home"])
def test_alpaca(tokenizer, ids, given: str | None) -> None:
    record = {"instruction": "Sing.", "output": "Lá."} | ({} if given == "absent" else {"input": given})
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSing.\n\n### Input:\nhome\n\n"
        "### Response:\n"
        if given == "home"
        else "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSing.\n\n### Response:\n"
    )
    document = tokenise(record, tokenizer, AUTO)
    assert document.ids == ids(prompt + "Lá.")
    assert completion(document, tokenizer) == "Lá.</s>"


def test_prompt_and_completion(tokenizer, ids, chat) -> None:
    document = tokenise({"prompt": "the sky is", "completion": " blue"}, tokenizer, AUTO)
    assert document.ids == ids("the sky is blue")
    assert completion(document, tokenizer) == " blue</s>"
    document = tokenise({"prompt": "", "completion": "all"}, tokenizer, AUTO)
    assert completion(document, tokenizer) == "all</s>"
    tokenizer = chat(CHAT)
    earlier = [USER, ANSWER, {"role": "user", "content": "now?"}]
    document = tokenise({"prompt": earlier, "completion": [ANSWER]}, tokenizer, AUTO)
    assert text(document, tokenizer) == "<u>sea?|<a>ship|<u>now?|<a>ship|"
    assert completion(document, tokenizer) == "ship|"


def test_a_token_across_the_border_is_the_completions(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    document = tokenise({"prompt": "ba", "completion": "ba"}, tokenizer, AUTO)
    assert document == Document([1, 2, 0, 3], [False, True, True, True])


def test_chat(chat) -> None:
    tokenizer = chat(CHAT)
    for record in (
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "sea?"}, {"from": "gpt", "value": "ship"}] * 2},
        {"conversations": [USER, ANSWER, USER, ANSWER]},
    ):
        document = tokenise(record, tokenizer, AUTO)
        assert text(document, tokenizer) == "<u>sea?|<a>ship|<u>sea?|<a>ship|"
        assert completion(document, tokenizer) == "ship|ship|"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    document = tokenise({"messages": [{"role": "user", "content": parts}]}, tokenizer, AUTO)
    assert text(document, tokenizer) == "<u>ab|"
    document = tokenise({"messages": [USER]}, tokenizer, AUTO)
    assert (text(document, tokenizer), completion(document, tokenizer)) == ("<u>sea?|", "")


def test_templates_that_say_what_the_assistant_generates(chat) -> None:
    tokenizer = chat(MARKS)
    document = tokenise({"messages": [ANSWER, USER, ANSWER]}, tokenizer, AUTO)
    assert text(document, tokenizer) == "ship|sea?|ship|"
    assert completion(document, tokenizer) == "shipship"


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (
            FORGETS,
            [USER, {"role": "assistant", "content": "hm!ship"}, USER, ANSWER],
            "renders the beginning of the conversation differently",
        ),
        (CHAT, [ANSWER, USER], "begins with the assistant"),
        ("{{ raise_exception('odd') if messages | length is odd else messages[0].content }}", [USER, ANSWER], "odd"),
    ],
)
def test_conversations_that_do_not_tell_the_completion(chat, template: str, messages: list, why: str) -> None:
    document = tokenise({"messages": messages}, chat(template), AUTO)
    assert document.ids
    assert document.completion is None
    assert why in document.untold


def test_tools_reach_the_template(chat) -> None:
    tokenizer = chat(TOOLS)
    schema = [{"name": "clock", "parameters": {}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    expected = '[clock]sea?|[{"name": "clock"}]|'
    for tools in (schema, json.dumps(schema)):
        document = tokenise({"messages": [USER, call], "tools": tools}, tokenizer, AUTO)
        assert text(document, tokenizer) == expected
    for none in (None, [], "[]", "null"):
        assert text(tokenise({"messages": [USER], "tools": none}, tokenizer, AUTO), tokenizer) == "sea?|"
    assert "the chat template does not show them" in fault({"messages": [USER], "tools": schema}, chat(CHAT))
    named = chat({"default": CHAT, "tool_use": TOOLS})
    assert text(tokenise({"messages": [USER], "tools": schema}, named, AUTO), named) == "[clock]sea?|"
    assert text(tokenise({"messages": [USER]}, named, AUTO), named) == "<u>sea?|"


def test_given_tokens(tokenizer) -> None:
    def given(**columns: Any) -> Document:
        return tokenise({"text": "ignored", **columns}, tokenizer, AUTO)

    assert given(input_ids=[5, 6]).ids == [5, 6]
    assert given(input_ids=[5, 6], attention_mask=None, labels=None).completion is None
    assert given(input_ids=[5, 6, 2, 2], attention_mask=[1, 1, 0, 0]).ids == [5, 6]
    assert given(input_ids=[2, 5, 6], attention_mask=[False, True, True]).ids == [5, 6]
    assert given(input_ids=[5, 6, 7], labels=[-100, 6, 7]) == Document([5, 6, 7], [False, True, True])
    assert given(input_ids=[2, 5, 6], attention_mask=[0, 1, 1], labels=[9, -100, 6]) == Document([5, 6], [False, True])
    assert given(input_ids=[], attention_mask=[]).ids == []


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no column": ({"body": "sea"}, "The columns are 'body'. They must include input_ids, or text, or messages, or"),
    "nothing": ({}, "The columns are none. They"),
    "many columns": ({f"c{i}": 1 for i in range(50)}, "'c19', …. They"),
    "a column with a line break": ({"a\nb": 1}, r"The columns are 'a\nb'. They"),
    "a number": ({"text": 5}, "The column text holds a number instead of text"),
    "null": ({"text": None}, "The column text holds null instead of text"),
    "a list": ({"text": ["a"]}, "The column text holds a list instead of text"),
    "half a surrogate pair": ({"text": "a\ud83d b"}, "not valid Unicode at character 1"),
    "alpaca: no output": ({"instruction": "do", "output": None}, "The column output holds null"),
    "alpaca: no instruction": ({"instruction": None, "output": "x"}, "The column instruction holds null"),
    "alpaca: input": ({"instruction": "do", "input": 5, "output": "x"}, "The column input holds a number"),
    "prompt: null": ({"prompt": None, "completion": "x"}, "The column prompt holds null"),
    "prompt: half a chat": (
        {"prompt": [USER], "completion": "x"},
        "The column completion holds text instead of messages",
    ),
    "chat: empty": ({"messages": []}, "The column messages holds no message."),
    "chat: text": ({"messages": "hello"}, "The column messages holds text instead of messages"),
    "chat: null": ({"messages": None}, "The column messages holds null"),
    "chat: list of text": ({"messages": ["hello"]}, "The message 1 of messages is text"),
    "chat: nested": ({"messages": [[USER]]}, "The message 1 of messages is a list"),
    "chat: other keys": (
        {"messages": [USER, {"a": 1}]},
        "The message 2 of messages has no role. It has the keys 'a'.",
    ),
    "chat: role null": ({"messages": [{"role": None, "content": "x"}]}, "has no role. It has the keys 'content'."),
    "chat: no content": ({"messages": [{"role": "user"}]}, "The message 1 of messages has no content"),
    "chat: null content": ({"messages": [{"role": "user", "content": None}]}, "has no content"),
    "chat: number": ({"messages": [{"role": "user", "content": 5}]}, "is a number instead of text"),
    "chat: picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has parts that are not text"),
    "chat: surrogate": ({"messages": [{"role": "user", "content": "\udc00"}]}, "not valid Unicode"),
    "chat: tools": (
        {"messages": [USER], "tools": 5},
        "The column tools holds a number instead of a list of JSON schemas",
    ),
    "chat: tools not JSON": ({"messages": [USER], "tools": "{x"}, "The column tools holds a text that is not JSON"),
    "sharegpt: speaker": (
        {"conversations": [{"from": "bing", "value": "x"}]},
        "has from='bing', which is not one of system",
    ),
    "sharegpt: null": ({"conversations": [{"from": "gpt", "value": None}]}, "has no content"),
    "tokens: text": ({"input_ids": ["a"]}, "input_ids holds something other than a list of integers"),
    "tokens: number": ({"input_ids": 5}, "input_ids holds something other than a list of integers"),
    "tokens: null": ({"input_ids": None}, "input_ids holds something other"),
    "tokens: floats": ({"input_ids": [1.0]}, "input_ids holds something other"),
    "tokens: booleans": ({"input_ids": [True]}, "input_ids holds something other"),
    "tokens: nested": ({"input_ids": [[1, 2]]}, "input_ids holds something other"),
    "mask: length": ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has 1 entries, and input_ids 2"),
    "mask: packed": (
        {"input_ids": [1, 2], "attention_mask": [1, 2]},
        "attention_mask holds something other than 0 and 1",
    ),
    "labels: length": ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, and input_ids 2"),
    "labels: shifted": ({"input_ids": [1, 2], "labels": [2, 3]}, "labels has 2 at place 0, and input_ids has 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_row(chat, name: str) -> None:
    record, message = FAULTS[name]
    assert message in fault(record, chat(CHAT))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (STRICT, [{"role": "system", "content": "x"}, USER], "refuses the conversation: System role not supported."),
        ("{{ messages[0].content.nothing.there }}", [USER], "The chat template refuses the conversation: "),
        ("{% for", [USER], "The chat template refuses the conversation: "),
        ("{{ 1 // 0 }}", [USER], "The chat template refuses the conversation: "),
        ("{# nothing #} ", [USER], "The chat template renders the conversation as an empty text."),
        (None, [USER], "the teacher's tokenizer has no chat template"),
    ],
)
def test_conversations_that_the_template_refuses(chat, template: str, messages: list, message: str) -> None:
    assert message in fault({"messages": messages}, chat(template))


def test_the_template_can_be_chosen(tokenizer, ids) -> None:
    record = {
        "input_ids": [5] * 30,
        "text": "the sea",
        "prompt": "a",
        "completion": "b",
        "instruction": "x",
        "output": "y",
    }
    assert tokenise(record, tokenizer, AUTO).ids == [5] * 30
    for template, expected in (("text", "the sea"), ("completion", "ab")):
        assert tokenise(record, tokenizer, DataOptions(template=template)).ids == ids(expected)
    assert "They must include messages." in fault(record, tokenizer, DataOptions(template="chat"))


def test_slow_tokenizers_do_not_tell_the_completion(tokenizer, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    document = tokenise({"prompt": "a", "completion": "b"}, tokenizer, AUTO)
    assert document.ids == ids("ab")
    assert document.completion is None
    assert "does not give the places of its tokens" in document.untold

"""Makes documents from records: chooses their columns, applies a template, and tokenises the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from lolcats_cli.errors import is_out_of_memory
from lolcats_cli.teacher.records import DataOptions, kind_of, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The columns that each template takes. "auto" takes the first template whose columns a record has.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "text": (),  # the column --text-field
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
# The prompts of Stanford Alpaca, on which the published students were trained.
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
Message = dict[str, Any]


class RowFault(Exception):
    """A sentence that tells why a row cannot be used. The caller knows the row."""


@dataclass(frozen=True)
class Document:
    """The tokens of a record.

    Attributes:
        completion: for every token, whether it belongs to a completion: to the text behind a prompt, or to a turn of
            the assistant. None if the record does not tell this.
        untold: why `completion` is None.
    """

    ids: list[int]
    completion: list[bool] | None = None
    untold: str = ""


def tokenise(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Document:
    """The document that a record's columns make.

    Raises:
        RowFault: the columns do not fit a template, or hold values that it does not take.
    """
    template = _template(record, options)
    if template == "tokens":
        return _given_tokens(record)
    if template in ("chat", "sharegpt"):
        column = TEMPLATES[template][0]
        messages = _messages(record[column], column)
        return _chat(messages, None, record.get("tools"), tokenizer)
    if template == "completion" and isinstance(record["prompt"], list):
        messages = _messages(record["prompt"], "prompt")
        answer = _messages(record["completion"], "completion")
        return _chat([*messages, *answer], len(messages), record.get("tools"), tokenizer)
    if template == "completion":
        return _text(_string(record, "prompt"), _string(record, "completion"), tokenizer)
    if template == "alpaca":
        given = "" if record.get("input") is None else _string(record, "input")
        prompt = ALPACA.format(
            with_input=", paired with an input that provides further context" if given else "",
            instruction=_string(record, "instruction"),
            input=f"### Input:\n{given}\n\n" if given else "",
        )
        return _text(prompt, _string(record, "output"), tokenizer)
    return _text(None, _string(record, options.text_field), tokenizer)


def _template(record: dict[str, Any], options: DataOptions) -> str:
    columns = TEMPLATES | {"text": (options.text_field,)}
    wanted = columns if options.template == "auto" else {options.template: columns[options.template]}
    for template, needed in wanted.items():
        if all(column in record for column in needed):
            return template
    raise RowFault(
        f"The columns are {_shown(record)}. They must include "
        f"{', or '.join(' and '.join(needed) for needed in wanted.values())}. "
        "Name the text column with --text-field."
    )


def _shown(names: Iterable[str]) -> str:
    """The first few names, each cut, for people."""
    few = [repr(name[:40]) for name in islice(names, 21)]
    return ", ".join([*few[:20], *(["…"] if len(few) > 20 else [])]) or "none"


def _string(record: dict[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise RowFault(f"The column {column} holds {kind_of(value)} instead of text.")
    return value


def _text(prompt: str | None, completion: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """The tokens of `prompt` and `completion` as one text, and the end token. A prompt of None makes it plain text."""
    text = (prompt or "") + completion
    found = _encode(text, None if prompt is None else [(len(prompt), len(text))], tokenizer, special=True)
    end, ids = tokenizer.eos_token_id, found.ids
    if end is None or ids[-1:] == [end]:
        return found
    return Document([*ids, end], None if found.completion is None else [*found.completion, True], found.untold)


def _encode(
    text: str, spans: Sequence[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase, special: bool = False
) -> Document:
    """The text's tokens. Tokens that end within one of the `spans` of characters belong to the completion."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault(
            f"The text is not valid Unicode at character {error.start}. There is half a surrogate pair, or a byte that "
            "is not UTF-8."
        ) from error
    told = spans is not None and tokenizer.is_fast
    # verbose=False: a text may be longer than the model's limit, because packing cuts it.
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=told, verbose=False)
    ids = list(encoded["input_ids"])
    if spans is None:
        return Document(ids, untold="Plain text has no prompt and completion.")
    if not told:
        return Document(ids, untold="The tokenizer does not give the places of its tokens in the text.")
    ends = [end if end > start else 0 for start, end in encoded["offset_mapping"]]  # 0: a token that is not in the text
    return Document(ids, [any(first < end <= last for first, last in spans) for end in ends])


def _messages(value: Any, column: str) -> list[Message]:
    """A column's messages. Those of ShareGPT get the usual roles and keys. Raises RowFault for anything else."""
    if value == []:
        raise RowFault(f"The column {column} holds no message.")
    if not isinstance(value, list):
        raise RowFault(f"The column {column} holds {kind_of(value)} instead of messages.")
    return [_message(message, f"message {number} of {column}") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f"The {where} is {kind_of(message)} instead of an object with role and content.")
    if "from" in message and "role" not in message:
        role = SHAREGPT_ROLES.get(str(message["from"]))
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowFault(f"The {where} has from={str(message['from'])[:40]!r}, which is not one of {known}.")
        message = {"role": role, "content": message.get("value")}
    # Templates print a null as the word None, but they know what to do with a missing key.
    told: Message = {key: value for key, value in message.items() if value is not None}
    content = told.get("content")
    if not isinstance(told.get("role"), str):
        raise RowFault(f"The {where} has no role. It has the keys {_shown(told)}.")
    if isinstance(content, list):  # a template that expects text would print the list as Python does
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowFault(f"The {where} has parts that are not text.")
        told["content"] = "".join(part["text"] for part in content)
    elif content is None and "tool_calls" not in told:
        raise RowFault(f"The {where} has no content.")
    elif content is not None and not isinstance(content, str):
        raise RowFault(f"The content of {where} is {kind_of(content)} instead of text.")
    return told


def _chat(messages: list[Message], prompt: int | None, tools: Any, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A conversation, rendered by the tokenizer's chat template.

    prompt: the completion is everything behind this number of messages. If it is None, the assistant's turns are the
    completion.
    """
    if tokenizer.chat_template is None:
        raise RowFault("This is a conversation, but the teacher's tokenizer has no chat template.")
    tools = _tools(tools)

    def render(messages: list[Message], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, **({"tokenize": False} | options))
        except Exception as error:  # a template may raise anything
            if is_out_of_memory(error):
                raise
            raise RowFault(f"The chat template refuses the conversation: {reason(error)}.") from error

    text = render(messages)
    if not text.strip():
        raise RowFault("The chat template renders the conversation as an empty text.")
    template = tokenizer.get_chat_template(None, tools)
    if tools and "tools" not in template:
        raise RowFault("The conversation has tools, and the chat template does not show them. Remove that column.")
    if prompt is None and tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        found = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Document(_encode(text, None, tokenizer).ids, [bool(mark) for mark in found["assistant_masks"]])
    try:
        spans = _answers(render, messages, text, prompt)
    except RowFault as fault:
        return Document(_encode(text, None, tokenizer).ids, untold=str(fault))
    return _encode(text, spans, tokenizer)


def _answers(
    render: Callable[..., str], messages: list[Message], text: str, prompt: int | None
) -> list[tuple[int, int]]:
    """The places of the completion in the rendered text. They are found by rendering the conversation's beginnings.

    Raises RowFault if a beginning is rendered differently alone than in the whole conversation.
    """
    spans = []
    for number in range(len(messages)) if prompt is None else [prompt]:
        if prompt is None and messages[number]["role"] != "assistant":
            continue
        if number == 0:
            raise RowFault("The conversation begins with the assistant, so the start of its turn cannot be found.")
        before = render(messages[:number], add_generation_prompt=True)
        after = text if prompt is not None else render(messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise RowFault(
                "The chat template renders the beginning of the conversation differently alone than in the whole."
            )
        spans.append((len(before), len(after)))
    return spans


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The JSON schemas of the column tools, which may also be a string with JSON; None if there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"The column tools holds a text that is not JSON ({reason(error)}).") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowFault(f"The column tools holds {kind_of(tools)} instead of a list of JSON schemas.")
    return tools or None


def _given_tokens(record: dict[str, Any]) -> Document:
    """The tokens of `input_ids`, without those that are padding by `attention_mask`.

    Tokens whose `labels` are -100 do not belong to a completion.
    """
    ids = _integers(record["input_ids"], "input_ids")
    mask, labels = (
        None if record.get(column) is None else _integers(record[column], column, len(ids))
        for column in ("attention_mask", "labels")
    )
    if mask is not None and not {0, 1}.issuperset(mask):
        raise RowFault("The column attention_mask holds something other than 0 and 1.")
    kept = [place for place in range(len(ids)) if mask is None or mask[place]]
    tokens = [ids[place] for place in kept]
    if labels is None:
        return Document(tokens, untold="There is no column labels.")
    wrong = next((place for place in kept if labels[place] not in (-100, ids[place])), None)
    if wrong is not None:
        raise RowFault(
            f"The column labels has {labels[wrong]} at place {wrong}, and input_ids has {ids[wrong]} there. A label "
            "must be the same as the token, or -100."
        )
    return Document(tokens, [labels[place] != -100 for place in kept])


def _integers(value: Any, column: str, length: int | None = None) -> list[int]:
    kinds = (int, bool) if column == "attention_mask" else (int,)
    if not isinstance(value, list) or not all(type(i) in kinds for i in value):
        raise RowFault(f"The column {column} holds something other than a list of integers.")
    if length not in (None, len(value)):
        raise RowFault(f"The column {column} has {len(value)} entries, and input_ids {length}.")
    return value

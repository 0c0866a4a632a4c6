"""Records to documents: which columns are taken, the text that a template makes of them, and its tokens."""

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

# The columns that each template takes. "auto" takes the first that a record has all columns of.
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
    """Why a row cannot be used, in a sentence; whoever catches it knows which row."""


@dataclass(frozen=True)
class Document:
    """The tokens of a record, and which of them are a completion's: what follows a prompt, or the assistant's turns.
    `completion` is None, for the reason `untold`, where the record does not tell."""

    ids: list[int]
    completion: list[bool] | None = None
    untold: str = ""


def tokenise(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Document:
    """The document that a record's columns make.

    Raises:
        RowFault: the columns are not those of a template, or do not hold what it takes.
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
        f"The columns are {_shown(record)}, but "
        f"{' or '.join(' and '.join(needed) for needed in wanted.values())} is needed. "
        "Name the text column with --text-field."
    )


def _shown(names: Iterable[str]) -> str:
    """The first few names, each cut, for people."""
    few = [repr(name[:40]) for name in islice(names, 21)]
    return ", ".join([*few[:20], *(["…"] if len(few) > 20 else [])]) or "none"


def _string(record: dict[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise RowFault(f"The column {column} holds {kind_of(value)}, not text.")
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
    """The text's tokens; if there are `spans` of characters, those that end within one are the completion's."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault(
            f"The text is not valid Unicode at character {error.start}: half a surrogate pair, or a byte that is not "
            "UTF-8."
        ) from error
    told = spans is not None and tokenizer.is_fast
    # verbose: packing cuts what is longer than the model's limit
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=told, verbose=False)
    ids = list(encoded["input_ids"])
    if spans is None:
        return Document(ids, untold="plain text has no prompt and completion")
    if not told:
        return Document(ids, untold="the tokenizer does not tell where its tokens stand in the text")
    ends = [end if end > start else 0 for start, end in encoded["offset_mapping"]]  # 0: a token that is not in the text
    return Document(ids, [any(first < end <= last for first, last in spans) for end in ends])


def _messages(value: Any, column: str) -> list[Message]:
    """A column's messages, those of ShareGPT with the usual roles and keys. Raises RowFault for anything else."""
    if not isinstance(value, list) or not value:
        raise RowFault(f"The column {column} holds {'no message' if value == [] else kind_of(value)}, not messages.")
    return [_message(message, f"message {number} of {column}") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowFault(f"In {where} stands {kind_of(message)}, not an object with role and content.")
    if "from" in message and "role" not in message:
        role = SHAREGPT_ROLES.get(str(message["from"]))
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowFault(f"In {where}, from is {str(message['from'])[:40]!r}, which is none of {known}.")
        message = {"role": role, "content": message.get("value")}
    # Templates print a null as the word None; a key that is missing they know.
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise RowFault(f"In {where} there is no role. It has the keys {_shown(message)}.")
    if isinstance(content, list):  # parts; a template that expects text would print the list as Python does
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowFault(f"In {where} the content is a list of other parts than text.")
        message["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and "tool_calls" in message):
        raise RowFault(f"In {where} the content is {'missing' if content is None else kind_of(content)}, not text.")
    return message


def _chat(messages: list[Message], prompt: int | None, tools: Any, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A conversation as the tokenizer's chat template renders it. The completion is all that follows the first `prompt`
    messages, or, if that is None, the assistant's turns."""
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
        raise RowFault("The chat template renders the conversation as nothing.")
    template = tokenizer.get_chat_template(None, tools)
    if tools and "tools" not in template:
        raise RowFault("The conversation has tools, which the chat template does not show. Remove that column.")
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
    """Where in the rendered text the completion stands: found by rendering the conversation's beginnings.

    Raises RowFault if a beginning alone is not rendered as it is in the whole.
    """
    spans = []
    for number in range(len(messages)) if prompt is None else [prompt]:
        if prompt is None and messages[number]["role"] != "assistant":
            continue
        if number == 0:
            raise RowFault("The conversation begins with the assistant, so it is not told where its turn starts.")
        before = render(messages[:number], add_generation_prompt=True)
        after = text if prompt is not None else render(messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise RowFault(
                "The chat template does not render the beginning of the conversation as it does in the whole."
            )
        spans.append((len(before), len(after)))
    return spans


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The JSON schemas of the column tools, which may be JSON in a string; None if there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowFault(f"The column tools holds text that is not JSON ({reason(error)}).") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowFault(f"The column tools holds {kind_of(tools)}, not a list of JSON schemas.")
    return tools or None


def _given_tokens(record: dict[str, Any]) -> Document:
    """Tokens as they were given, without those that `attention_mask` says are padding; `labels` of -100 are no
    completion's."""
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
        return Document(tokens, untold="there is no column labels")
    wrong = next((place for place in kept if labels[place] not in (-100, ids[place])), None)
    if wrong is not None:
        raise RowFault(
            f"In the column labels stands {labels[wrong]} at place {wrong}, where input_ids has {ids[wrong]}: it must "
            "be the same, or -100."
        )
    return Document(tokens, [labels[place] != -100 for place in kept])


def _integers(value: Any, column: str, length: int | None = None) -> list[int]:
    kinds = (int, bool) if column == "attention_mask" else (int,)
    if not isinstance(value, list) or not all(type(i) in kinds for i in value):
        raise RowFault(f"The column {column} holds something other than a list of integers.")
    if length not in (None, len(value)):
        raise RowFault(f"The column {column} has {len(value)} entries, and input_ids {length}.")
    return value

"""One training document, and how a record becomes one.

A record is a mapping of column names to values, as a JSON line or a Parquet row gives it. Three shapes are
those of `mlx_lm.lora --data`: `text`; `prompt` + `completion`; `messages` (+ `tools`). Two more become chats:
`conversations` of `from` and `value` (ShareGPT), and `instruction` (+ `input`) with `output` (Alpaca), both
with an optional `system`. Other columns are left alone. Costs one UTF-8 encoding of the text, which finds
half surrogate pairs before a tokenizer trips over them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from schemas.errors import DataError

Kind = Literal["text", "completion", "messages"]
Message = Mapping[str, Any]
MEND = "correct or remove the record"
CONVERSATIONS, SYSTEM = "conversations", "system"
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One document, before tokenizing.

    Attributes:
        kind: which of the three shapes the record had.
        source: the file it came from, as the user named it.
        line: 1-based line (or Parquet row) in `source`; 0 when the document is the whole file.
        text: the text of a `text` record, else empty.
        messages: the chat of a `messages` or `completion` record, else empty.
        tools: the tool descriptions that the chat template is given, or None.
    """

    kind: Kind
    source: str
    line: int = 0
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] | None = None

    @property
    def where(self) -> str:
        """`file:line`, or the file alone."""
        return place(self.source, self.line)


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The columns that hold the text; the defaults are those of mlx-lm."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    tools: str = "tools"

    def columns(self) -> tuple[str, ...]:
        """All names, for column projection."""
        own = (self.text, self.prompt, self.completion, self.messages, self.tools)
        return tuple(dict.fromkeys([*own, CONVERSATIONS, INSTRUCTION, INPUT, OUTPUT, SYSTEM]))

    def choices(self) -> str:
        """The accepted shapes, for messages."""
        return (
            f"'{self.text}', or '{self.prompt}' and '{self.completion}', or '{self.messages}', or "
            f"'{CONVERSATIONS}', or '{INSTRUCTION}' and '{OUTPUT}'"
        )


def place(source: str, line: int) -> str:
    """`file:line`; the file alone when `line` is 0."""
    return f"{source}:{line}" if line else source


def to_document(record: object, *, source: str, line: int, fields: FieldNames) -> Document:
    """Turns one record into a document.

    Where a record has the columns of several shapes, the order is mlx-lm's: completion, messages, text; then
    conversations, instruction.

    Raises:
        DataError: not a mapping, none of the shapes, or a value of the wrong type.
    """
    where = place(source, line)
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where}: a record must be an object with {fields.choices()}, found {describe(record)}; "
            "write one JSON object a line"
        )
    if fields.prompt in record and fields.completion in record:
        messages = (
            {"role": "user", "content": _string(record, fields.prompt, where)},
            {"role": "assistant", "content": _string(record, fields.completion, where)},
        )
        tools = _tools(record, fields.tools, where)
        return Document(kind="completion", source=source, line=line, messages=messages, tools=tools)
    if fields.messages in record:
        chat = _messages(record[fields.messages], fields.messages, where)
        tools = _tools(record, fields.tools, where)
        return Document(kind="messages", source=source, line=line, messages=chat, tools=tools)
    if fields.text in record:
        return Document(kind="text", source=source, line=line, text=_string(record, fields.text, where))
    if CONVERSATIONS in record:
        chat = _system(record, where) + _conversation(record[CONVERSATIONS], where)
        tools = _tools(record, fields.tools, where)
        return Document(kind="messages", source=source, line=line, messages=chat, tools=tools)
    if INSTRUCTION in record and OUTPUT in record:
        parts = [_string(record, INSTRUCTION, where)]
        if record.get(INPUT):
            parts.append(_string(record, INPUT, where))
        answer = _string(record, OUTPUT, where)
        turns = ({"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": answer})
        return Document(kind="completion", source=source, line=line, messages=_system(record, where) + turns)
    found = ", ".join(repr(str(key)) for key in record) or "no key at all"
    raise DataError(
        f"{where}: a record must have {fields.choices()}, found {found}; rename the keys ('cache' also takes "
        "names of columns, as --text-feature)"
    )


def plain_content(message: Message) -> Message:
    """The message for a chat template that takes strings only; null beside tool calls is an empty one."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if isinstance(content, list | tuple) and all(_text_of(part) is not None for part in content):
        return {**message, "content": "".join(str(_text_of(part)) for part in content)}
    return message


def _text_of(part: object) -> str | None:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else None


def describe(value: object) -> str:
    """What a value is, in the words of JSON, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a {type(value).__name__}"


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, found {describe(value)}; {MEND}")
    _check_encodable(value, key, where)
    return value


def _messages(value: object, key: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else describe(value)
        raise DataError(f"{where}: '{key}' must be a list of messages, found {found}; {MEND}")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: {key}[{number}] must be an object with a string 'role', found "
                f"{_message_fault(message)}; {MEND}"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | tuple):
            raise DataError(
                f"{where}: {key}[{number}] 'content' must be a string or a list of parts, found "
                f"{describe(content)}; {MEND}"
            )
    _check_encodable(json.dumps(value, ensure_ascii=False, default=str), key, where)
    return tuple(cast(list[Message], value))


def _system(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if not record.get(SYSTEM):
        return ()
    return ({"role": "system", "content": _string(record, SYSTEM, where)},)


def _conversation(value: object, where: str) -> tuple[Message, ...]:
    """Turns of `from` and `value` as messages; such of `role` and `content` are messages already."""
    turns = value if isinstance(value, list | tuple) else ()
    if not any(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        return _messages(value, CONVERSATIONS, where)
    chat = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in SHAREGPT_ROLES:
            raise DataError(
                f"{where}: {CONVERSATIONS}[{number}] must be an object with 'value' and a 'from' out of "
                f"{', '.join(SHAREGPT_ROLES)}, found {describe(turn)} from {speaker!r}; {MEND}"
            )
        chat.append({"role": SHAREGPT_ROLES[speaker], "content": _string(turn, "value", where)})
    return tuple(chat)


def _message_fault(message: object) -> str:
    if not isinstance(message, Mapping):
        return describe(message)
    return f"role {describe(message['role'])}" if "role" in message else "no 'role'"


def _tools(record: Mapping[str, Any], key: str, where: str) -> tuple[Any, ...] | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: '{key}' must be a list, found {describe(value)}; {MEND}")
    return tuple(value)


def _check_encodable(text: str, key: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: '{key}' must be Unicode text, found half of a surrogate pair at character "
            f"{error.start}; {MEND}"
        ) from error

"""The row formats: a parsed JSON value becomes a `Chat`, a `Completion` or a `Text`, or is refused with a reason.

A row's format is recognized by its keys; keys whose value is null do not count. Keys with a known meaning are followed
or refused, and all others are listed in the record as ignored. The formats are those of OpenAI and TRL (`messages`,
`prompt`/`completion`, `text`), ShareGPT and Stanford Alpaca.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from onward.data.row_types import (
    Chat,
    Completion,
    Message,
    Record,
    RowError,
    Text,
    check_answer,
    check_strings,
    check_text,
    kind_of,
)
from onward.data.rows.calls import functions_of, is_padded, json_if_any, tools_of, without_nulls
from onward.data.rows.messages import (
    WEIGHT_KEYS,
    list_in_text,
    message_list,
    message_of,
    said_weight,
    text_of_parts,
    weight_of,
)
from onward.data.rows.refused import LABEL_KEYS, refuse_known, refuse_shapes, refuse_tokens

SHAPES = (
    '{"messages": [...]}, {"conversations": [...]}, {"prompt": ..., "completion": ...}, '
    '{"instruction": ..., "output": ...} or {"text": ...}'
)
HALVES = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}
SYSTEM_KEYS = ("system", "system_prompt")
CHAT_KEYS = frozenset((*SYSTEM_KEYS, *WEIGHT_KEYS, "tools", "functions", "chat_template_kwargs"))
"""Keys that are followed in any row that is a chat."""

OF_CHATS = (*SYSTEM_KEYS, "history", "tools", "functions", "chat_template_kwargs")
"""Keys that only a chat can follow."""

DOCUMENTS = "documents"
"""A list of texts that a chat is about, which some templates write."""

OURS = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"))
"""Arguments of a template that a row must not set."""

Parser: TypeAlias = Callable[[dict[str, Any], bool], Record]


def parse_record(value: object, *, padded: bool = False) -> Record:
    """Return the row that a parsed JSON value represents.

    Args:
        value: the row.
        padded: whether the row was read from Arrow or Parquet, whose null fields in tools and arguments are padding.

    Raises:
        RowError: the value has none of the formats, breaks the rules of its format, or asks for something impossible.
    """
    if not isinstance(value, dict):
        raise RowError(f"the row is {kind_of(value)}, not an object", f"write each row as {SHAPES}")
    row: dict[str, Any] = {str(key): item for key, item in value.items() if item is not None}
    if len(row) > 1:
        refuse_known(row)
    for keys, parse in PARSERS:
        if all(key in row for key in keys):
            return parse(row, padded)
    refuse_tokens(row)
    refuse_shapes(row)
    for key, missing in HALVES.items():
        if key in row:
            raise RowError(f'the row has "{key}" but no "{missing}"', f'add "{missing}" to the row')
    found = ", ".join(f'"{key[:80]}"' for key in list(row)[:10]) or "none"
    raise RowError(
        f"no known row format (keys with a value: {found})",
        f"write each row as {SHAPES}, or name the keys in the config: columns: {{instruction: KEY, output: KEY}}",
    )


def _messages_row(row: dict[str, Any], padded: bool) -> Chat:
    return _listed_row(row, "messages", padded)


def _sharegpt_row(row: dict[str, Any], padded: bool) -> Chat:
    return _listed_row(row, "conversations", padded)


def _listed_row(row: dict[str, Any], key: str, padded: bool) -> Chat:
    turns = message_list(row[key], key)
    if len(row) == 1:
        return _chat(row, turns, padded=is_padded(row[key], padded=padded))
    _refuse_next_to(row, ("history",), "messages", 'write the earlier turns into the messages, or take "history" out')
    return _chat(row, _with_system(row, turns), padded=padded, read=(key,))


def _prompt_row(row: dict[str, Any], padded: bool) -> Chat | Completion:
    prompt, completion = _lists_in_text(row["prompt"], row["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        _refuse_next_to(row, ("history",), "messages", 'write the earlier turns into "prompt", or take "history" out')
        asked = _with_system(row, message_list(prompt, "prompt"))
        turns = asked + message_list(completion, "completion")
        return _chat(row, turns, padded=padded, read=("prompt", "completion"), given=len(asked))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RowError(
            f'"prompt" is {kind_of(prompt)} and "completion" is {kind_of(completion)}',
            "make both strings, or both lists of messages",
        )
    _refuse_next_to(row, OF_CHATS, "a prompt that is plain text", "write prompt and completion as messages")
    check_text(prompt, "prompt")
    check_answer(completion, "completion")
    ignored = _ignored(row, ("prompt", "completion", *WEIGHT_KEYS, *_good_labels(row)))
    return Completion(prompt, completion, ignored, _weight(row))


def _lists_in_text(prompt: Any, completion: Any) -> tuple[Any, Any]:
    """Return prompt and completion as lists of messages if both are JSON texts of such lists, else as they are."""
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return prompt, completion
    asked = list_in_text(prompt)
    answered = list_in_text(completion) if asked else None
    return (asked, answered) if answered else (prompt, completion)


def _alpaca_row(row: dict[str, Any], padded: bool) -> Chat:
    instruction = _string(row, "instruction")
    question = "\n\n".join(part for part in (instruction, _string(row, "input")) if part)
    pairs = [*_history(row), (question, _string(row, "output"))]
    turns: list[Message] = [
        message
        for asked, answer in pairs
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    return _chat(row, _with_system(row, turns), padded=padded, read=("instruction", "input", "output", "history"))


def _text_row(row: dict[str, Any], padded: bool) -> Text:
    text = _string(row, "text")
    _refuse_next_to(row, OF_CHATS, "plain text", "write the row as messages, or take {key} out")
    check_answer(text, "text", "write the text to train, or remove the row")
    return Text(text, _ignored(row, ("text", *WEIGHT_KEYS)), _weight(row))


PARSERS: tuple[tuple[tuple[str, ...], Parser], ...] = (
    (("messages",), _messages_row),
    (("conversations",), _sharegpt_row),
    (("prompt", "completion"), _prompt_row),
    (("instruction", "output"), _alpaca_row),
    (("text",), _text_row),
)


def _chat(
    row: dict[str, Any], turns: Sequence[Message], *, padded: bool, read: Sequence[str] = (), given: int = 0
) -> Chat:
    """Return the chat of a row.

    Args:
        read: the keys that the messages were read from; empty if the row has no other key.
        given: how many of the messages belong to the prompt, whose answers are not trained.
    """
    messages: list[Message] = []
    untrained: set[int] = set()
    weights: dict[int, float] = {}
    is_text = any(isinstance(row[key], str) for key in read if key in row)
    for place, turn in enumerate(turns):
        message, says = message_of(turn, place + 1, padded=padded and not is_text)
        if (says == 0 or place < given) and message["role"] == "assistant":
            untrained.add(place)
        elif says:
            weights[place] = says
        messages.append(message)
    _check_turns(messages)
    if not read:
        return _with_targets(Chat(messages, untrained=frozenset(untrained), weights=_others(weights)))
    whole = _weight(row)
    if whole != 1:
        answers = (place for place, message in enumerate(messages) if message["role"] == "assistant")
        weights = {place: whole * weights.get(place, 1.0) for place in answers if place not in untrained}
    tools = _tools(row, padded=padded)
    arguments = _template_arguments(row, padded=padded)
    ignored = _ignored(row, (*read, *CHAT_KEYS, *_good_labels(row)))
    return _with_targets(Chat(messages, tools, frozenset(untrained), _others(weights), arguments, ignored))


def _others(weights: Mapping[int, float]) -> dict[int, float]:
    return {place: weight for place, weight in weights.items() if weight != 1}


def _check_turns(messages: Sequence[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        if all(message["role"] != "assistant" for message in messages):
            raise RowError("the chat has no assistant turn", "add the assistant's answer as the last message")
        raise RowError(
            f"the last message is the {messages[-1]['role']}'s: the answer is missing",
            "end the chat with an assistant message",
        )


def _with_targets(chat: Chat) -> Chat:
    if chat.untrained and not chat.turns:
        raise RowError("no answer of the chat is in the loss: each has the weight 0", "remove the row")
    return chat


def _with_system(row: dict[str, Any], turns: list[Message]) -> list[Message]:
    """Return messages preceded by the system text that the row has next to them, if any."""
    texts = list(dict.fromkeys(text for key in SYSTEM_KEYS if (text := _system(row, key))))
    if not texts:
        return turns
    own = [_said(turn) for turn in turns if "system" in (turn.get("role"), turn.get("from"))]
    if len(texts) > 1 or (own and own != texts):
        raise RowError("the row has two different system texts", "keep one of them")
    return turns if own else [{"role": "system", "content": texts[0]}, *turns]


def _said(turn: Message) -> Any:
    """Return the text of a system message, which may be in parts."""
    content = turn.get("content", turn.get("value"))
    return text_of_parts(content, "the system message") if isinstance(content, list) else content


def _system(row: dict[str, Any], key: str) -> str:
    """Return a system text, which may be a list of parts (Anthropic's messages)."""
    return text_of_parts(row[key], f'"{key}"') if isinstance(row.get(key), list) else _string(row, key)


def _tools(row: dict[str, Any], *, padded: bool) -> list[Any] | None:
    tools = tools_of(row.get("tools"), padded=padded)
    functions = functions_of(row.get("functions"), padded=padded)
    if tools and functions:
        raise RowError("the row has both tools and functions", 'leave out "functions"')
    return tools or functions


def _refuse_next_to(row: dict[str, Any], keys: Sequence[str], what: str, remedy: str) -> None:
    """Refuse keys that cannot be followed in a row of this kind; empty ones are harmless."""
    for key in keys:
        if row.get(key) and row[key] != "[]":
            raise RowError(f'"{key}" stands next to {what}', remedy.replace("{key}", f'"{key}"'))


def _history(row: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = json_if_any(row.get("history"), '"history"') or []
    if isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        return [(asked, answer) for asked, answer in pairs]
    raise RowError(
        '"history" is not a list of pairs of strings', 'write "history" as [[QUESTION, ANSWER], ...], the oldest first'
    )


def _template_arguments(row: dict[str, Any], *, padded: bool) -> dict[str, Any]:
    given = json_if_any(row.get("chat_template_kwargs"), '"chat_template_kwargs"')
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise RowError(f'"chat_template_kwargs" is {kind_of(given)}', 'write "chat_template_kwargs" as an object')
    taken = sorted(OURS.intersection(given))
    if taken:
        raise RowError(f'"chat_template_kwargs" sets "{taken[0]}"', f'remove "{taken[0]}": the row itself sets it')
    check_strings(given, "chat_template_kwargs")
    given = without_nulls(given) if is_padded(row.get("chat_template_kwargs"), padded=padded) else given
    return {**_documents(row, padded=padded), **given}


def _documents(row: dict[str, Any], *, padded: bool) -> dict[str, Any]:
    """Return the texts that a chat is about as an argument of the template; it is ignored where none reads it."""
    documents = row.get(DOCUMENTS)
    if not isinstance(documents, list) or not documents or not all(isinstance(each, dict) for each in documents):
        return {}
    return {DOCUMENTS: without_nulls(documents) if padded else documents}


def _weight(row: dict[str, Any]) -> float:
    """Return the weight of a row's tokens in the loss."""
    weight = said_weight(row, "the row")
    if weight == 0:
        raise RowError("the row has the weight 0: none of it is in the loss", "remove the row")
    return 1.0 if weight is None else weight


def _good_labels(row: dict[str, Any]) -> Iterator[str]:
    """Yield the keys that call the answer good; one that calls it bad is refused, and any other label is ignored."""
    return (key for key in LABEL_KEYS if key in row and weight_of(row[key]) == 1)


def _ignored(row: dict[str, Any], read: Sequence[str]) -> tuple[str, ...]:
    return tuple(key for key in row if key not in read)


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise RowError(f'"{key}" is {kind_of(value)}, not a string', f'write "{key}" as a string')
    return value

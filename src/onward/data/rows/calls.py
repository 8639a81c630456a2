"""Tool calls in the forms that rows have them, converted to OpenAI's: `tool_calls` with `function` objects."""

from __future__ import annotations

from typing import Any

from onward.data.row_types import Message, RowError, check_strings, kind_of
from onward.data.strict_json import KEPT, RepeatedKey, parsed

CALL_REMEDY = 'write each call as {"type": "function", "function": {"name": ..., "arguments": {...}}}'
ARGUMENT_KEYS = ("arguments", "parameters")


def json_text(value: Any, where: str) -> Any:
    """Return the value of a JSON text; return any other value as it is.

    Raises:
        RowError: the text is not valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parsed(value)
    except RepeatedKey as error:
        raise RowError(f"in {where}, {error}", KEPT) from None
    except (ValueError, RecursionError):
        raise RowError(f"{where} cannot be read as JSON", f"write {where} as JSON") from None


def json_if_any(value: Any, where: str) -> Any:
    """Return what `json_text` returns; None for an empty text, which tables have where there is nothing.

    Raises:
        RowError: any other text is not valid JSON.
    """
    return None if isinstance(value, str) and not value.strip() else json_text(value, where)


def is_padded(value: Any, *, padded: bool) -> bool:
    """Return whether null fields of a value are padding; in JSON text somebody wrote them."""
    return padded and not isinstance(value, str)


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects, which Arrow adds where rows differ in their fields."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def tools_of(value: Any, *, padded: bool) -> list[Any] | None:
    """Return the schemas of tools from a list or its JSON text; None if there are none or the text is empty.

    Args:
        padded: whether null fields mean nothing.

    Raises:
        RowError: the value is not a list of objects.
    """
    listed = json_if_any(value, '"tools"')
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise RowError(f'"tools" is {kind_of(listed)}, not a list', 'write "tools" as a list of JSON schemas')
    padded = is_padded(value, padded=padded)
    tools: list[Any] = []
    for each in listed:
        tool = json_text(each, "a tool of the row")
        if not isinstance(tool, dict):
            raise RowError(f'"tools" contains {kind_of(tool)}', 'write "tools" as a list of JSON schemas')
        check_strings(tool, "tools")
        tools.append(without_nulls(tool) if is_padded(each, padded=padded) else tool)
    return tools or None


def functions_of(value: Any, *, padded: bool) -> list[Any] | None:
    """Return the schemas of tools from OpenAI's older `functions`, in the current form."""
    functions = tools_of(value, padded=padded)
    return [{"type": "function", "function": function} for function in functions] if functions else None


def calls_of(turn: Message, where: str, *, padded: bool) -> list[Message]:
    """Return the calls that a message makes with `tool_calls` or with OpenAI's older `function_call`.

    Raises:
        RowError: a call has no name, or arguments that are not an object.
    """
    listed = json_if_any(turn.get("tool_calls"), f'"tool_calls" of {where}') or []
    if not isinstance(listed, list):
        raise RowError(f'"tool_calls" of {where} is {kind_of(listed)}, not a list', CALL_REMEDY)
    check_strings(listed, where)
    legacy = json_if_any(turn.get("function_call"), f'"function_call" of {where}')
    if listed and legacy:
        raise RowError(f"{where} has both tool_calls and function_call", 'leave out "function_call"')
    if listed:
        return [_call(call, where, padded=is_padded(turn["tool_calls"], padded=padded)) for call in listed]
    return [_call(legacy, where, padded=is_padded(turn["function_call"], padded=padded))] if legacy else []


def called(text: str, where: str) -> list[Message]:
    """Return the calls in the text of a ShareGPT `function_call` turn: an object, or a list of them.

    Raises:
        RowError: the text is not JSON, or its value is not calls.
    """
    found = json_text(text, f"the call in {where}")
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise RowError(f"{where} calls nothing", CALL_REMEDY)
    return [_call(call, where, padded=False) for call in calls]


def _call(call: Any, where: str, *, padded: bool) -> Message:
    padded = is_padded(call, padded=padded)
    call = json_text(call, f"a call in {where}")
    if not isinstance(call, dict):
        raise RowError(f"a call in {where} is {kind_of(call)}, not an object", CALL_REMEDY)
    outer = {key: value for key, value in call.items() if value is not None}
    padded = is_padded(outer.get("function"), padded=padded)
    inner = json_text(outer.get("function", outer), f"a call in {where}")
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise RowError(f"a call in {where} has no name", CALL_REMEDY)
    key = next((key for key in ARGUMENT_KEYS if inner.get(key) is not None), None)
    given: Any = inner[key] if key else {}
    arguments = _arguments(given, f"the arguments of {inner['name']!r} in {where}", padded=padded)
    function = {
        ("arguments" if name == key else name): (arguments if name == key else value)
        for name, value in inner.items()
        if value is not None
    }
    function.setdefault("arguments", arguments)
    check_strings(outer, where)
    if "function" in outer:
        return {**outer, "function": function}
    named = {"name": function.pop("name"), "arguments": function.pop("arguments")}
    return {"type": "function", **function, "function": named}


def _arguments(given: Any, where: str, *, padded: bool) -> dict[str, Any] | str:
    """Return arguments as the row has them, an object or its JSON text; templates differ in which they take."""
    if isinstance(given, str) and not given.strip():
        return {}
    value = json_text(given, where)
    if not isinstance(value, dict):
        raise RowError(f"{where} are {kind_of(value)}, not an object", CALL_REMEDY)
    check_strings(value, f"one of {where}")
    if isinstance(given, str):
        return given
    return without_nulls(value) if padded else value

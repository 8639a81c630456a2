"""What a row says is what is trained, or the row is refused: for each trait that chat templates have."""

from __future__ import annotations

import json
from typing import Any

import pytest
import templates
from tiny import byte_state, byte_tokenizer
from tokenizers import processors
from trait_chats import chat_of, pieces, template

from onward.data.row_tokenizer import RowTokenizer
from onward.data.row_types import Chat, RowError
from onward.data.rows.records import parse_record
from onward.data.rows.template import ChatTemplate
from onward.data.tokenizer import TokenizerState

USER = {"role": "user", "content": "Qone"}
ANSWER = {"role": "assistant", "content": "Aone"}
SYSTEM = {"role": "system", "content": "Sone"}
AGAIN = [{"role": "user", "content": "Qtwo"}, {"role": "assistant", "content": "Atwo"}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome", "n": 3}}}
OTHER = {"id": "abcdefghj", "type": "function", "function": {"name": "add", "arguments": {"sum": True, "to": None}}}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TWO = {**CALLS, "tool_calls": [CALL, OTHER]}
RESULT = {"role": "tool", "content": "Sunny", "tool_call_id": "abcdefghi", "name": "look_up"}
LOST = (
    "the text before the answer of message {} is not what the model gets at inference: the chat template renders "
    "the beginning of the chat differently"
)
NO_END = (
    "the chat template writes no end token right after the answer of message {}, or leaves it out of the loss: the "
    "model would not learn to stop"
)
OUT = "the chat template does not write the {} of message {}"
NO_CALL = OUT.format("tool call", 2) + " (tool_calls)"
NO_THOUGHT = OUT.format("reasoning", 2) + " (reasoning_content)"
HALF = "the chat template leaves out a part of the answer of message 2"
TORN = "the chat template splits the answer of message 2 at '</think>'"
MOVED = "the chat template writes the system text of message 1 after a later message"
MARKS = "the chat template's {% generation %} markers "
PLAIN_ROW: dict[str, Any] = {"messages": [USER, ANSWER]}
CALLED = '\n<call>look_up {"city": "Rome", "n": 3}</call>'


def thinking(text: str) -> dict[str, Any]:
    """Return an answer with a thought in its content."""
    return {**ANSWER, "content": text}


@pytest.mark.parametrize(
    ("trait", "messages", "expected"),
    [
        ("WHOLE", [USER, CALLS], [CALLED + "<|im_end|>"]),
        (
            "WHOLE",
            [USER, {**CALLS, "tool_calls": [CALL, OTHER], "content": "Wait", "thinking": "hm"}, RESULT, ANSWER],
            [
                f"<think>\nhm\n</think>\nWait{CALLED}" + '\n<call>add {"sum": true, "to": null}</call><|im_end|>',
                "Aone<|im_end|>",
            ],
        ),
        ("CALLS_WITHOUT_CONTENT", [USER, CALLS], [CALLED + "<|im_end|>"]),
        ("TEXT_ARGUMENTS", [USER, CALLS], ['<call>look_up {"city": "Rome", "n": 3}<|im_end|>']),
        ("CALL_END", [USER, CALLS, RESULT, ANSWER], [CALLED + "<|call|>", "Aone<|im_end|>"]),
        ("MARKED", [USER, {**CALLS, "reasoning": "hm"}], ["<think>\nhm\n</think>\n" + CALLED + "<|im_end|>"]),
        ("MOVES_THOUGHTS", [USER, thinking("<think>T</think>A")], ["<think>\nT\n</think>\n\nA<|im_end|>"]),
        ("MOVES_THOUGHTS", [USER, ANSWER, *AGAIN], ["Aone<|im_end|>", "<think>\n\n</think>\n\nAtwo<|im_end|>"]),
        ("ASKS_TO_THINK", [USER, thinking("<think>\nT</think>A")], ["T</think>A<|im_end|>"]),
        ("TWO_ENDS", [USER, ANSWER, *AGAIN], ["Aone<|end|>", "Atwo<|return|>"]),
        ("SYSTEM_LAST", [USER, ANSWER, *AGAIN], [" Aone<|im_end|>", " Atwo<|im_end|>"]),
        ("PARTS", [SYSTEM, USER, ANSWER], ["Aone<|im_end|>"]),
        ("DROPS_CALLS", [USER, {**ANSWER, "tool_calls": []}], ["Aone<|im_end|>"]),
        ("DROPS_CALLS", [USER, thinking("a </think> b")], ["a </think> b<|im_end|>"]),
    ],
)  # fmt: skip
def test_targets(trait: str, messages: list[Any], expected: list[str]) -> None:
    """The targets are contents, thoughts and calls as the template writes them, to the token inference stops at."""
    assert expected == pieces(trait, {"messages": messages})


@pytest.mark.parametrize(
    ("trait", "messages", "reason"),
    [
        ("DROPS_CALLS", [USER, CALLS], NO_CALL),
        ("DROPS_CALLS", [USER, CALLS, RESULT, ANSWER], NO_CALL),
        ("DROPS_CALLS", [USER, {**CALLS, "content": "Wait"}], NO_CALL),
        ("FIRST_CALL_ONLY", [USER, TWO], NO_CALL),
        ("CALL_NAMES_ONLY", [USER, CALLS], OUT.format("arguments of the tool call", 2) + " (tool_calls)"),
        ("CALLS_WITHOUT_CONTENT", [USER, {**CALLS, "content": "Wait"}], NO_CALL),
        ("DROPS_CALLS", [USER, {**ANSWER, "reasoning_content": "hm"}], NO_THOUGHT),
        ("STRIPS_THOUGHTS", [USER, thinking("<think>T</think>A")], HALF),
        ("MOVES_THOUGHTS", [USER, thinking("<think>T</think>A"), *AGAIN], HALF),
        ("MOVES_THOUGHTS", [USER, thinking("Say </think> to end")], TORN),
        ("ASKS_TO_THINK", [USER, ANSWER], LOST.format(2)),
        ("NO_END", [USER, ANSWER], NO_END.format(2)),
        ("SYSTEM_LAST", [SYSTEM, USER, ANSWER, *AGAIN], MOVED),
        ("SYSTEM_AT_INFERENCE", [SYSTEM, USER, ANSWER], OUT.format("system text", 1)),
        ("NO_DEVELOPER", [{**SYSTEM, "role": "developer"}, USER, ANSWER], OUT.format("developer text", 1)),
        ("ROLES_REFUSED", [SYSTEM, USER, ANSWER], "the chat template refuses the row: Only users and assistants"),
        ("TWICE", [SYSTEM, USER, ANSWER], "the chat template writes the system text of message 1 twice"),
        ("START_TWICE", [USER, ANSWER], "the chat template writes the start token '<s>' twice"),
        ("MARKS_WITHOUT_CALLS", [USER, CALLS], MARKS + "leave out a part of message 2"),
        ("MARKS_QUESTIONS", [USER, ANSWER], MARKS + "enclose more than an answer"),
    ],
)  # fmt: skip
def test_refused(trait: str, messages: list[Any], reason: str) -> None:
    """What a template leaves out, tears, moves or does not end is refused with what is missing, and a remedy."""
    with pytest.raises(RowError) as refusal:
        pieces(trait, {"messages": messages})
    assert reason == refusal.value.reason
    assert "chat_template: FILE" in refusal.value.remedy or "splits" in reason or "refuses the row" in reason


def test_messages_that_are_not_in_the_loss() -> None:
    """A message of weight 0 is in the text but not in the loss, whatever is proven about it."""
    for trait in ("WHOLE", "MARKED", "MOVES_THOUGHTS"):
        row = {"messages": [USER, {**ANSWER, "weight": 0}, *AGAIN]}
        text, _ = template(trait).render(chat_of(row))
        assert "Aone" in text
        assert [part.rpartition("\n")[2] for part in pieces(trait, row)] == ["Atwo<|im_end|>"]
    row = {"messages": [USER, ANSWER, AGAIN[0], {**AGAIN[1], "train": False}]}
    assert ["Aone<|end|>"] == pieces("TWO_ENDS", row)
    assert ["Atwo<|im_end|>"] == pieces("WHOLE", {"prompt": [USER, ANSWER, AGAIN[0]], "completion": [AGAIN[1]]})


def test_tools_that_a_template_does_not_write_are_refused() -> None:
    """Inference would know the tools of the row as little as training did: the author means otherwise."""
    row = {"messages": [USER, ANSWER], "tools": json.dumps([{"type": "function", "function": {"name": "look_up"}}])}
    assert ["Aone<|im_end|>"] == pieces("WHOLE", row)
    with pytest.raises(RowError, match="does not write the tools of the row"):
        pieces("DROPS_CALLS", row)


def test_what_a_prompt_leaves_out_is_refused() -> None:
    """An answer to half of the messages would look like one to all; earlier thoughts are left out as templates do."""
    for trait, messages, reason in (
        ("NO_DEVELOPER", [{**SYSTEM, "role": "developer"}, USER], OUT.format("developer text", 1)),
        ("DROPS_CALLS", [USER, {**CALLS, "content": ""}, RESULT], NO_CALL),
        ("SYSTEM_LAST", [SYSTEM, USER, ANSWER, AGAIN[0]], None),
        ("WHOLE", [USER, {**CALLS, "content": ""}, RESULT], None),
        ("STRIPS_THOUGHTS", [USER, thinking("<think>T</think>A"), AGAIN[0]], None),
    ):
        if reason is None:
            assert messages[-1]["content"] in template(trait).prompt(Chat(messages))
            continue
        with pytest.raises(RowError) as refusal:
            template(trait).prompt(Chat(messages))
        assert reason == refusal.value.reason


SOME_TOOLS = [{"type": "function", "function": {"name": "one"}}, {"type": "function", "function": {"name": "look_up"}}]


@pytest.mark.parametrize(
    "before",
    [
        "{% if tools and messages[0].role != 'system' %}{{ tools | tojson }}{% endif %}",
        "{% if tools %}{{ tools[0] | tojson }}{% endif %}",
    ],
)
def test_tools_that_are_not_written_though_a_message_has_their_names(before: str) -> None:
    """A tool is written where another name of it would be, not where a question happens to hold its name."""
    asked = {"role": "user", "content": "May I look_up one?"}
    row = {"messages": [SYSTEM, asked, ANSWER], "tools": SOME_TOOLS}
    source = templates.chatml("{{ m.content }}", before=before)
    with pytest.raises(RowError, match="does not write the tools of the row"):
        ChatTemplate(byte_state(source)).render(chat_of(row))
    text, _ = template("WHOLE").render(chat_of({**row, "tools": [*SOME_TOOLS, {"type": "no_name"}]}))
    assert "no_name" in text


def test_a_chat_with_tools_is_rendered_by_the_template_for_tools() -> None:
    """Where a tokenizer has a template `tool_use`, transformers takes it for chats with tools, and so do rows."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": templates.DROPS_CALLS, "tool_use": templates.WHOLE, "rag": "{{ messages }}"}
    made = ChatTemplate(TokenizerState.of(tokenizer))
    messages: list[dict[str, Any]] = [USER, CALLS, RESULT, ANSWER]
    row = chat_of({"messages": messages, "tools": SOME_TOOLS})
    text, spans = made.render(row)
    assert tokenizer.apply_chat_template(row.messages, tools=row.tools, tokenize=False) == text
    assert [CALLED + "<|im_end|>", "Aone<|im_end|>"] == [text[start:end] for start, end in spans]
    assert tokenizer.apply_chat_template(
        messages[:1], tools=row.tools, tokenize=False, add_generation_prompt=True
    ) == made.prompt(Chat(messages[:1], row.tools))
    assert made.render(chat_of({"messages": [USER, ANSWER]})) == template("DROPS_CALLS").render(
        chat_of({"messages": [USER, ANSWER]})
    )
    with pytest.raises(RowError, match="does not write the tool call"):
        made.render(chat_of({"messages": messages}))
    whole = ChatTemplate(TokenizerState.of(tokenizer).with_template(templates.WHOLE))
    assert whole.render(row) == (text, spans)


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ lipsum(n=1) }}"])
def test_templates_that_draw_at_random_are_refused(drawn: str) -> None:
    """A row has to render to the same text each time, whoever renders it."""
    with pytest.raises(RowError, match="draws at random") as refusal:
        ChatTemplate(byte_state(templates.chatml("{{ m.content }}", before=drawn))).render(chat_of(PLAIN_ROW))
    assert "chat_template: FILE" in refusal.value.remedy


def test_a_prompt_that_depends_on_the_length_of_all_contents() -> None:
    """A template that joins contents to decide what to write is proven with the actual contents."""
    long = "{% if messages | map(attribute='content') | join | length > 50 %}Long{% endif %}"
    ask = "{% if add_generation_prompt %}" + long + "{% endif %}" + templates.ASK
    made = ChatTemplate(byte_state(templates.chatml("{{ m.content }}", ask=ask)))
    assert "Aone" in made.render(chat_of(PLAIN_ROW))[0]
    with pytest.raises(RowError, match=r"the text before the answer of message 2"):
        made.render(chat_of({"messages": [{**USER, "content": "Q" * 60}, ANSWER]}))


def test_a_single_answer_is_not_advised_to_be_left_out() -> None:
    """A row whose only answer has the weight 0 is refused, so that this is no remedy for it."""
    for messages, advised in (([USER, ANSWER], False), ([USER, ANSWER, *AGAIN], True)):
        with pytest.raises(RowError, match="what the model gets at inference") as refusal:
            pieces("ASKS_TO_THINK", {"messages": messages})
        assert ("the weight 0" in refusal.value.remedy) is advised


def test_arguments_of_the_template() -> None:
    """`chat_template_kwargs` reach the template, in the text and in the prompt that inference has."""
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False, "mood": 1}}
    text, spans = template("THINKING_SWITCH").render(chat_of(row))
    assert "assistant\n<think></think>Aone" in text
    assert ["Aone<|im_end|>"] == [text[start:end] for start, end in spans]
    assert ("chat_template_kwargs.mood",) == template("THINKING_SWITCH").ignored(chat_of(row))


def test_documents_next_to_a_chat() -> None:
    """Texts that a chat is about reach a template that reads them, which has to write each; others ignore the key."""
    written = "{% for d in documents or [] %}{{ d.title ~ ': ' ~ d.text ~ '\n' }}{% endfor %}"
    reading = ChatTemplate(byte_state(templates.chatml("{{ m.content }}", before=written)))
    row = {**PLAIN_ROW, "documents": [{"title": "One", "text": "Done"}, {"title": "Two", "text": "Dtwo"}], "id": 3}
    text, spans = reading.render(chat_of(row))
    assert text.startswith("One: Done\nTwo: Dtwo\n<|im_start|>user")
    assert ["Aone<|im_end|>"] == [text[start:end] for start, end in spans]
    assert ("id",) == reading.ignored(chat_of(row))
    assert ("documents", "id") == template("DROPS_CALLS").ignored(chat_of(row))
    assert template("DROPS_CALLS").render(chat_of(row)) == template("DROPS_CALLS").render(chat_of(PLAIN_ROW))
    first = written.replace("documents or []", "(documents or [])[:1]")
    with pytest.raises(RowError, match="does not write the documents of the row"):
        ChatTemplate(byte_state(templates.chatml("{{ m.content }}", before=first))).render(chat_of(row))
    assert () == reading.ignored(chat_of({**PLAIN_ROW, "chat_template_kwargs": {"documents": row["documents"]}}))


def test_every_key_that_the_template_reads() -> None:
    """Keys of a message reach the template where it reads them; the others are named."""
    row = {"messages": [{**USER, "name": "Ann", "mood": "!", "at": 5}, ANSWER], "source": "web"}
    text, _ = template("NAMES").render(chat_of(row))
    assert "Ann: !Qone" in text
    assert ("source", "messages.at") == template("NAMES").ignored(chat_of(row))
    assert ("source", "messages.name", "messages.mood", "messages.at") == template("DROPS_CALLS").ignored(chat_of(row))


@pytest.mark.parametrize("trait", ["WHOLE", "TEXT_ARGUMENTS"])
def test_arguments_as_an_object_and_as_json_text(trait: str) -> None:
    """Arguments are the same to a template whether the row has them as an object or as its JSON text."""
    text = json.dumps(CALL["function"]["arguments"])  # pyright: ignore[reportArgumentType, reportIndexIssue]
    other = {**CALL, "function": {"name": "look_up", "arguments": text}}
    rows = [{"messages": [USER, {**CALLS, "tool_calls": [call]}]} for call in (CALL, other)]
    assert pieces(trait, rows[0]) == pieces(trait, rows[1])


def test_arguments_as_json_text_without_spaces() -> None:
    """A template that writes JSON text as it is and objects as JSON gets the object, which inference hands over too."""
    rows: list[dict[str, Any]] = []
    for arguments in ({"city": "Rome", "n": 3}, '{"city":"Rome","n":3}'):
        call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
        rows.append({"messages": [USER, {**CALLS, "tool_calls": [call]}]})
    assert pieces("EITHER_ARGUMENTS", rows[0]) == pieces("EITHER_ARGUMENTS", rows[1])


def test_a_text_that_brings_the_start_token_of_its_tokenizer() -> None:
    """The tokenizer adds the start token: a text that begins with it would train it."""
    tokenizer = byte_tokenizer(bos_token="<s>")
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    rows = RowTokenizer(TokenizerState.of(tokenizer), 100)
    assert "a<s>" == rows.prepare(parse_record({"text": "a<s>"})).text
    for row in ({"text": "<s>a"}, {"prompt": "<s>a", "completion": "b"}):
        with pytest.raises(RowError, match="begins with the start token '<s>', which the tokenizer adds"):
            rows.prepare(parse_record(row))

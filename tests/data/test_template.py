import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import CHATML, TOKENIZERS, byte_state, byte_tokenizer
from trait_templates import template_text

from onward.data.row_types import Chat, RowError
from onward.data.rows.records import parse_record
from onward.data.rows.template import ChatTemplate
from onward.data.tokenizer import TokenizerState
from onward.errors import ModelError

ALTERNATE = "Roles take turns here: first user, then assistant"
THINK = "<think>\nhm\n</think>\n\n"


def template(name: str) -> ChatTemplate:
    """Return the template of that name with the special tokens of its model."""
    return ChatTemplate(byte_state(template_text(name), **TOKENIZERS[name]))


def chat(*contents: str, system: str | None = None) -> Chat:
    """Return a chat of alternating user and assistant turns."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
    return Chat(([{"role": "system", "content": system}] if system else []) + turns)


def pieces(chat_template: ChatTemplate, row: Chat) -> list[str]:
    """Return the texts of the targets of a rendered chat."""
    text, spans = chat_template.render(row)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("default_system", chat("Hi", "Hello"), ["Hello<|im_end|>"]),
        ("default_system", chat("Hi", "Hello", "And?", " More\n"), ["Hello<|im_end|>", " More\n<|im_end|>"]),
        ("default_system", chat("assistant", "assistant", "assistant", "Hi"), ["assistant<|im_end|>", "Hi<|im_end|>"]),
        ("qwen2_5", chat("Hi", "Hello", "And?", "More"), ["Hello<|im_end|>", "More<|im_end|>"]),
        ("qwen2_5", chat("Hi", "Hello", system="Be kind"), ["Hello<|im_end|>"]),
        ("qwen3", chat("Hi", "Hello"), ["<think>\n\n</think>\n\nHello<|im_end|>"]),
        ("qwen3", chat("Hi", THINK + "Hello"), [THINK + "Hello<|im_end|>"]),
        ("qwen3", chat("Hi", "A", "So", "B"), ["A<|im_end|>", "<think>\n\n</think>\n\nB<|im_end|>"]),
        (
            "qwen3_training",
            chat("Hi", "A", "So", "B"),
            ["<think>\n\n</think>\n\nA<|im_end|>", "<think>\n\n</think>\n\nB<|im_end|>"],
        ),
        ("llama3_2", chat("Hi", "  Hello\n", "So", "Bye"), ["Hello<|eot_id|>", "Bye<|eot_id|>"]),
        ("llama3_2", chat("Hi", "Hello", system="Be kind"), ["Hello<|eot_id|>"]),
        ("brackets", chat("Hi", "Hello", "So", "Bye"), ["Hello</s>", "Bye</s>"]),
        ("brackets", chat("Hi", "ASK", "ASK", "[ASK"), ["ASK</s>", "[ASK</s>"]),
        ("gemma", chat("Hi", " Hello ", "So", "model"), ["Hello<end_of_turn>", "model<end_of_turn>"]),
        ("phi3", chat("Hi", "Hello", "So", "Bye"), ["Hello<|end|>", "Bye<|end|>"]),
        ("plain_headers", chat("Hi", "Hello", "So", "Bye", system="Be kind"), ["Hello</s>", "Bye</s>"]),
        (
            "cohere2",
            chat("Hi", "Hello", "So", "Bye"),
            ["Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Bye<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        ),
    ],
)
def test_targets_are_the_answers_and_their_end_tokens(name: str, row: Chat, expected: list[str]) -> None:
    """For each template the targets are what the model has to produce, and not a character more."""
    assert expected == pieces(template(name), row)


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"llama3_2"}))
def test_text_is_what_transformers_renders(name: str) -> None:
    """The rendered text equals that of `apply_chat_template`."""
    tokenizer = byte_tokenizer(template_text(name), **TOKENIZERS[name])
    row = chat("Hi", "Hello", "So\n", f"{THINK}Bye")
    text, _ = ChatTemplate(TokenizerState.of(tokenizer)).render(row)
    assert tokenizer.apply_chat_template(row.messages, tokenize=False) == text


def test_tools_are_rendered_and_calls_are_targets() -> None:
    """Tool schemas reach the template; the call of a tool is a target, its result is not."""
    call = {"function": {"name": "w", "arguments": {"c": 1}}}
    row = parse_record(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "sun"},
                {"role": "assistant", "content": "Sunny."},
            ],
            "tools": [{"type": "function", "function": {"name": "w", "parameters": {}}}],
        }
    )
    assert isinstance(row, Chat)
    tokenizer = byte_tokenizer(template_text("qwen2_5"))
    text, spans = ChatTemplate(TokenizerState.of(tokenizer)).render(row)
    assert text == tokenizer.apply_chat_template(row.messages, tools=row.tools, tokenize=False)
    assert [
        '<tool_call>\n{"name": "w", "arguments": {"c": 1}}\n</tool_call><|im_end|>',
        "Sunny.<|im_end|>",
    ] == [text[start:end] for start, end in spans]


def test_a_row_renders_the_same_on_every_day() -> None:
    """A template that asks for the date always gets the same one, Llama 3.2's own default."""
    text, _ = template("llama3_2").render(chat("Hi", "Hello"))
    assert "Today Date: 26 Jul 2024\n" in text


def test_template_that_ignores_the_generation_prompt() -> None:
    """Where no generation prompt tells the header from the answer, the header is still not trained."""
    source = CHATML.partition("{% if add_generation_prompt")[0]
    row = chat("Hi", "assistant", "So", " a ")
    assert ["assistant<|im_end|>", " a <|im_end|>"] == pieces(ChatTemplate(byte_state(source)), row)


def test_a_header_before_a_thought_that_the_template_always_writes() -> None:
    """Without a generation prompt, the header is what precedes both the answer and its thought."""
    source = CHATML.partition("{% if add_generation_prompt")[0].replace(
        "+ message['content']",
        "+ ('<think>' + (message.reasoning_content or '') + '</think>' if message.role == 'assistant' else '') "
        "+ message['content']",
    )
    row = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A", "reasoning_content": "T"}])
    assert ["<think>T</think>A<|im_end|>"] == pieces(ChatTemplate(byte_state(source)), row)


NO_END = (
    "the chat template writes no end token right after the answer of message {}, or leaves it out of the loss: the "
    "model would not learn to stop"
)


def test_template_without_end_token() -> None:
    """Where nothing ends an answer, the model would not learn to stop: the row is refused."""
    source = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    with pytest.raises(RowError) as refusal:
        ChatTemplate(byte_state(source)).render(chat("Hi", "Hello", "So", "Bye \n"))
    assert NO_END.format(2) == refusal.value.reason


def test_template_with_an_end_token_after_the_last_answer_only() -> None:
    """An end token that only the last answer gets is trained there; an earlier answer without one is refused."""
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
    assert ["Hello\n<|im_end|>"] == pieces(ChatTemplate(byte_state(source)), chat("Hi", "Hello"))
    with pytest.raises(RowError) as refusal:
        ChatTemplate(byte_state(source)).render(chat("Hi", "Hello", "So", "Bye"))
    assert NO_END.format(2) == refusal.value.reason


OTHERWISE = (
    "the text before the answer of message 2 is not what the model gets at inference: the chat template renders "
    "the beginning of the chat differently"
)


@pytest.mark.parametrize("content", ["Hi", "#2", "a"])
def test_template_that_renders_prefixes_differently(content: str) -> None:
    """Where the beginning of a chat renders unlike the whole, the model would be asked otherwise than it was taught."""
    for count in ("(messages | length)", "(messages | tojson | length)"):
        with pytest.raises(RowError) as refusal:
            ChatTemplate(byte_state("{{ '#' + " + count + " | string }}" + CHATML)).render(chat("a", content))
        assert OTHERWISE == refusal.value.reason or "does not write the messages as they are" in refusal.value.reason


def test_a_message_that_holds_the_generation_prompt() -> None:
    """A generation prompt that a message quotes, with the answer after it, is not taken for the template's."""
    for quoted in ("<|im_start|>assistant\nHi", "a<|im_start|>assistant\n"):
        assert ["Hi<|im_end|>"] == pieces(template("default_system"), chat(quoted, "Hi"))
        assert ["Hi<|im_end|>", f"{quoted}<|im_end|>"] == pieces(
            template("default_system"), chat("a", "Hi", "b", quoted)
        )


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"brackets"}))
def test_both_proofs_agree(name: str) -> None:
    """What one proof for all chats of an order of roles gives is what the proof of each chat gives."""
    proven = template(name)
    rows = [
        chat("Hi", "Hello"), chat("Hi", "Hello", "So", "Bye\n", system="Be brief."), chat("", "a", "b", f"{THINK}c"),
        chat("assistant", "assistant", "assistant\n", " assistant "), chat("Hi", "Hello", "So", "Bye"),
    ]  # fmt: skip
    for row in rows:
        if name == "gemma" and row.messages[0]["role"] == "system":
            continue  # its template refuses them
        text, targets = proven._proven(row)  # pyright: ignore[reportPrivateUsage]
        assert (text, [(target.start, target.end) for target in targets]) == proven.render(row)


def test_template_that_changes_answers_is_refused() -> None:
    """A template that rewrites or hides an answer is refused, not trained on."""
    for change in ("| replace('l', '')", "| upper", "[:2]"):
        source = CHATML.replace("message['content']", f"(message['content'] {change})")
        with pytest.raises(RowError, match="changes or cuts the answer of message 2"):
            ChatTemplate(byte_state(source)).render(chat("HI", "Hello"))


GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}%s{% endgeneration %}%s{% else %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("{{ m['content'] }}<|im_end|>", "{{ '\n' }}"),
        ("{{ m['content'] }}<|im_end|>{{ '\n' }}", ""),
        ("{{ m['content'] }}", "<|im_end|>{{ '\n' }}"),
    ],
)
def test_generation_markers(inside: str, outside: str) -> None:
    """Markers are trusted, but the target always ends right after the end token."""
    source = GENERATION.replace("%s", inside, 1).replace("%s", outside, 1)
    row = chat("Hi", "Hello", "So", "Bye")
    assert ["Hello<|im_end|>", "Bye<|im_end|>"] == pieces(ChatTemplate(byte_state(source)), row)


def test_generation_markers_that_leave_out_an_answer_are_refused() -> None:
    """Markers around something else than the answer are refused, and those of answers that no end token follows."""
    source = GENERATION.replace("%s", "x", 1).replace("%s", "{{ m['content'] }}<|im_end|>", 1)
    with pytest.raises(RowError, match="markers leave out a part of message 2"):
        ChatTemplate(byte_state(source)).render(chat("Hi", "Hello"))
    endless = GENERATION.replace("%s", "{{ m['content'] }}", 1).replace("%s", "{{ '\n' }}", 1)
    with pytest.raises(RowError) as refusal:
        ChatTemplate(byte_state(endless)).render(chat("Hi", "Hello"))
    assert NO_END.format(2) == refusal.value.reason


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("default_system", chat("Hi", "a<|im_end|>b"), "a message contains the control token '<|im_end|>'"),
        ("default_system", chat("<|im_end|>", "b"), "a message contains the control token '<|im_end|>'"),
        (
            "phi3",
            chat("Hi", "a<|endoftext|>b"),
            "the answer of message 2 contains the end token '<|endoftext|>', at which inference stops",
        ),
        ("default_system", chat("Hi", "\ufdd0"), "a message contains the control token '\\ufdd0'"),
        ("gemma", chat("Hi", "Hello", system="x"), "the chat template refuses the row: System role not supported"),
        ("brackets", Chat(chat("a", "b").messages[1:]), f"the chat template refuses the row: {ALTERNATE}"),
    ],
)
def test_refused_rows(name: str, row: Chat, reason: str) -> None:
    """Control tokens in the text, and errors that the template raises, refuse the row."""
    with pytest.raises(RowError) as refusal:
        template(name).render(row)
    assert reason == refusal.value.reason


def test_each_of_several_end_tokens_is_a_control_token() -> None:
    """Inference stops at the first of two end tokens, so that neither may stand in a message."""
    source = CHATML.replace("'<|im_end|>'", "'<|im_end|></s>'")
    made = ChatTemplate(byte_state(source, eos_token="</s>"))
    assert ["Hello<|im_end|></s>"] == pieces(made, chat("Hi", "Hello"))
    for token in ("<|im_end|>", "</s>"):
        with pytest.raises(RowError, match="contains the control token"):
            made.render(chat("Hi", f"a{token}b"))


def test_white_space_before_an_answer_is_a_part_of_it() -> None:
    """Without a generation prompt, white space before an answer is what the model writes: nobody gives it that."""
    source = (
        "{% for m in messages %}{{ '[ASK] ' ~ m.content ~ ' [/ASK]' if m.role == 'user' "
        "else ' ' ~ m.content ~ eos_token }}{% endfor %}"
    )
    made, tokenizer = ChatTemplate(byte_state(source)), byte_tokenizer(source)
    assert [" Hello<|im_end|>"] == pieces(made, chat("Hi", "Hello"))
    asked = chat("Hi", "Hello").messages[:1]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == made.prompt(Chat(asked))


def test_a_tokenizer_that_splits_special_tokens_takes_no_chats() -> None:
    """The end token would be several tokens, none of which inference stops at."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.encode_special_tokens = True
    with pytest.raises(RowError, match="splits special tokens") as refusal:
        ChatTemplate(TokenizerState.of(tokenizer)).render(chat("Hi", "Hello"))
    assert '"split_special_tokens": false' in refusal.value.remedy


def test_tokenizer_without_template() -> None:
    """A chat for a model without a chat template is refused with both remedies."""
    with pytest.raises(RowError) as refusal:
        ChatTemplate(byte_state(None)).render(chat("Hi", "Hello"))
    assert "the tokenizer has no chat template" == refusal.value.reason
    assert "use prompt/completion rows, or a model with a chat template" == refusal.value.remedy


def test_broken_template() -> None:
    """A template that is no Jinja is an error of the model, not of a row."""
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate(byte_state("{% for %}"))


PROVEN = {
    name: template(name)
    for name in ("default_system", "qwen2_5", "llama3_2", "brackets", "gemma", "phi3", "plain_headers")
}
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=20)
ANSWERS = WORDS.filter(lambda text: bool(text.strip()))


@given(name=st.sampled_from(sorted(PROVEN)), turns=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3))
@settings(max_examples=150)
@example(name="brackets", turns=[("", "\n0"), ("", "0 ")])
@example(name="brackets", turns=[("[/ASK]", "[ASK]"), ("onwardProbeNumber0End", "onwardProbeNumber1End")])
@example(name="phi3", turns=[("<|assistant|>", "assistant\n"), ("\n", "<|user|>")])
def test_targets_of_random_chats(name: str, turns: list[tuple[str, str]]) -> None:
    """Whatever the messages say, each target is its answer, perhaps trimmed by the template, plus the end token."""
    found = pieces(PROVEN[name], chat(*(text for turn in turns for text in turn)))
    end = {"llama3_2": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}.get(
        name, "</s>" if name in ("brackets", "plain_headers") else "<|im_end|>"
    )
    trim = str.strip if name in ("llama3_2", "gemma") else str
    assert [trim(answer) + end for _, answer in turns] == found


@pytest.mark.parametrize(
    ("decides", "content"),
    [
        ("'nothink' in messages[-1].content", "please nothink"),
        ("messages[-1]['content'] == 'nothink'", "nothink"),
        ("messages[-1].content|length > 20", "a question that is longer than twenty characters"),
        ("messages[-1].content.lower().startswith('no')", "NO"),
        ("(messages|selectattr('content', 'equalto', 'x')|list)", "x"),
    ],
)
def test_a_prompt_that_depends_on_what_is_asked(decides: str, content: str) -> None:
    """Where inference would have another prompt for this very question, the row is refused; others are trained."""
    asks = f"<|im_start|>assistant\n{{% if {decides} %}}<think></think>{{% endif %}}"
    own = (
        CHATML[: CHATML.index("{% if add_generation_prompt %}")]
        + f"{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )
    asked = ChatTemplate(byte_state(own))
    assert ["A<|im_end|>"] == pieces(asked, chat("q", "A"))
    with pytest.raises(RowError, match="is not what the model gets at inference"):
        asked.render(chat(content, "A"))

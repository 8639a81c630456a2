"""Small chat templates, one for each trait that templates of models have. None of them is anybody's."""

from __future__ import annotations

HEAD = "{{ '<|im_start|>' + m.role + '\\n' }}"
END = "{{ '<|im_end|>' + '\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOLS = "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
THOUGHT = "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\\n<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + "
    "'</call>' }}{% endfor %}"
)


def chatml(body: str, *, before: str = "", head: str = HEAD, end: str = END, ask: str = ASK) -> str:
    """Return a template that writes `body` for each message `m`, between a header and an end."""
    return before + "{% for m in messages %}" + head + body + end + "{% endfor %}" + ask


WHOLE = chatml(THOUGHT + "{{ m.content }}" + CALLS, before=TOOLS)
"""Writes all that a message says."""

DROPS_CALLS = chatml("{{ m.content }}")
"""Writes contents and nothing else, as the templates of most small models."""

CALLS_WITHOUT_CONTENT = chatml(
    "{% if m.content is none %}" + CALLS + "{% else %}{{ m.content }}{% endif %}", before=TOOLS
)
"""Writes calls only where the content is null."""

TEXT_ARGUMENTS = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments }}"
    "{% endfor %}",
    before=TOOLS,
)
"""Takes the arguments of calls as JSON text."""

EITHER_ARGUMENTS = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
    "{{ '<call>' + c.function.name + ' ' + (a if a is string else a | tojson) }}{% endfor %}",
    before=TOOLS,
)
"""Writes arguments that are JSON text as they are."""

FIRST_CALL_ONLY = chatml(
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + ' ' + "
    "(m.tool_calls[0].function.arguments | tojson) }}{% endif %}"
)

CALL_NAMES_ONLY = chatml("{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}")

STRIPS_THOUGHTS = chatml("{{ m.content.split('</think>')[-1] }}")
"""Takes everything before `</think>` out of an answer."""

MOVES_THOUGHTS = chatml(
    "{% set text = m.content %}{% if m.role == 'assistant' %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] if '</think>' in text else '' %}"
    "{% set text = text.split('</think>')[-1] %}"
    "{% if loop.last %}{{ '<think>\\n' + thought.strip() + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ text.strip() }}{% else %}{{ text }}{% endif %}"
)
"""Writes the thought of the last answer in a form of its own, and leaves out those of earlier ones."""

ASKS_TO_THINK = chatml(
    "{{ m.content }}", ask="{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
"""Its generation prompt begins a thought, which the answers of a row have only where they say so."""

NO_END = chatml("{{ m.content }}", end="{{ '\\n' }}")
"""Nothing ends a message but the next header."""

TWO_ENDS = chatml(
    "{{ m.content }}",
    end="{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}",
)
"""Ends the last answer with another token than all other messages."""

CALL_END = chatml(
    "{{ m.content }}" + CALLS, before=TOOLS, end="{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}{{ '\\n' }}"
)
"""Ends an answer that calls a tool with a token of its own."""

SYSTEM_LAST = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
    "{% if m == users[-1] and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Writes the system text into the last question."""

SYSTEM_AT_INFERENCE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Writes the system text only where a question is the last message, which it is at inference and not in training."""

NO_DEVELOPER = chatml(
    "{{ m.content }}",
    before="",
    head="{% if m.role == 'developer' %}{% continue %}{% endif %}" + HEAD,
)
"""Leaves a developer's message out."""

ROLES_REFUSED = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('Only users and assistants') }}{% endif %}{% endfor %}" + DROPS_CALLS
)

TWICE = chatml("{{ m.content }}", ask=ASK, end="{{ '<|im_end|>\\n' }}{{ m.content if m.role == 'system' else '' }}")
"""Writes a system text twice."""

START_TWICE = "{{ bos_token + bos_token }}" + DROPS_CALLS

THINKING_SWITCH = chatml(
    "{{ m.content }}",
    head="{{ '<|im_start|>' + m.role + '\\n' }}"
    "{{ '<think></think>' if m.role == 'assistant' and enable_thinking is false else '' }}",
    ask="{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{{ '<think></think>' if enable_thinking is false else '' }}{% endif %}",
)
"""Reads `enable_thinking`."""

NAMES = chatml("{{ m.name + ': ' if m.name else '' }}{{ m.mood or '' }}{{ m.content }}")
"""Reads two more keys of a message."""

PARTS = chatml("{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}")
"""Takes contents as lists of parts only."""

MARKED = chatml(
    "{% if m.role == 'assistant' %}{% generation %}" + THOUGHT + "{{ m.content }}" + CALLS + "{{ '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}",
    before=TOOLS,
    end="{{ '\\n' }}",
)
"""Marks answers, thoughts, calls and end tokens."""

MARKS_WITHOUT_CALLS = chatml(
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}" + CALLS + "{% else %}"
    "{{ m.content }}{% endif %}",
    before=TOOLS,
)

MARKS_QUESTIONS = chatml("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}", end="{{ '\\n' }}")

SPECIAL = {
    "TWO_ENDS": ("<|end|>", "<|return|>"),
    "CALL_END": ("<|call|>",),
    "SYSTEM_LAST": ("[INST]", "[/INST]"),
    "SYSTEM_AT_INFERENCE": ("[INST]", "[/INST]"),
}
"""Special tokens that a template has besides those of every tiny tokenizer."""

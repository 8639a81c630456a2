"""The chat templates that the installed TRL ships: what is accepted is exact, and equals TRL's mask if it has one.

Left out of the comparison is white space after the end token, which TRL's marks enclose and Onward does not train.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_tokenizer

from onward.data.row_types import Chat, RowError
from onward.data.rows.records import parse_record
from onward.data.rows.template import ChatTemplate
from onward.data.tokenizer import TokenizerState

trl = pytest.importorskip("trl", reason="TRL is an extra of development: its chat templates are not in this repository")
FOLDER = Path(trl.__file__).parent / "chat_templates"
TOKEN = re.compile(
    r"<\|[^|<>{}'\" ]*\|>|<\uff5c[^\uff5c]*\uff5c>|</?[a-z_]*of_[a-z]+>|<\|?[a-z_]+\|?>|\[/?[A-Z_]+\]|<\|[A-Z_]+>"
)
ENDS = {"gptoss": "<|return|>", "llama3": "<|eot_id|>", "phi3": "<|endoftext|>", "cohere": "<|END_OF_TURN_TOKEN|>"}
NAMES = (
    "qwen3", "qwen3_training", "qwen2_5_training", "llama3_1", "llama3_training", "gptoss", "gptoss_training",
    "glm4moe", "glm4moe_training", "phi3_training", "gemma3_training", "cohere2_training", "lfm2_v2_training",
    "deepseek_r1_distill", "deepseek_r1_distill_training", "qwen3_5_think_training", "gemma4", "idefics3",
)  # fmt: skip

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "fN0", "arguments": {"city": "zN1", "n": 41}}}
THOUGHT = "<think>\nzN2\n</think>\n\nzN3"
QUESTIONS = [{"role": "user", "content": f"zQ{number}"} for number in range(2)]
ANSWERS = [{"role": "assistant", "content": f"zA{number}"} for number in range(2)]
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "zQ7", "tool_call_id": "abcdefghi", "name": "fN0"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "plain": [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1]],
    "system": [{"role": "system", "content": "zQ8"}, QUESTIONS[0], ANSWERS[0]],
    "developer": [{"role": "developer", "content": "zQ8"}, QUESTIONS[0], ANSWERS[0]],
    "call": [QUESTIONS[0], CALLS, RESULT, ANSWERS[0]],
    "reasoning": [QUESTIONS[0], {**ANSWERS[0], "reasoning_content": "zN4"}],
    "reasoning twice": [*(m for n in range(2) for m in (QUESTIONS[n], {**ANSWERS[n], "reasoning_content": f"zN{n}"}))],
    "thought": [QUESTIONS[0], {"role": "assistant", "content": THOUGHT}],
    "torn": [QUESTIONS[0], {"role": "assistant", "content": "zN5 </think> zN6"}],
    "weight": [QUESTIONS[0], {"role": "assistant", "content": "zQ9", "weight": 0}, QUESTIONS[1], ANSWERS[1]],
}
"""Words with an A or an N are in the loss, words with a Q are not."""


@cache
def tokenizer(name: str) -> Any:
    """Return a tokenizer with one of TRL's templates."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted(set(TOKEN.findall(source)) - {"<think>", "</think>", "<tool_call>", "</tool_call>"})
    end = next((token for start, token in ENDS.items() if name.startswith(start)), "<|im_end|>")
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>" if name.startswith("deepseek") else end
    return byte_tokenizer(source, extra=special, eos_token=end, bos_token="<|begin|>")


def masked(name: str, chat: Chat, messages: list[dict[str, Any]]) -> str:
    """Return the text that TRL's marks enclose, without white space."""
    made = tokenizer(name).apply_chat_template(
        messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [one for one, is_inside in zip(made["input_ids"], made["assistant_masks"], strict=True) if is_inside]
    return "".join(tokenizer(name).decode(ids).split())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_trained_exactly_or_refused(name: str) -> None:
    """Whatever the template does with a kind of chat, no accepted row is trained otherwise than it says."""
    template = ChatTemplate(TokenizerState.of(tokenizer(name)))
    accepted: list[str] = []
    for kind, messages in ROWS.items():
        chat = parse_record({"messages": messages})
        assert isinstance(chat, Chat)
        try:
            text, spans = template.render(chat)
        except RowError:
            continue
        accepted.append(kind)
        trained = "".join(text[start:end] for start, end in spans)
        for word in re.findall(r"[zf][QAN]\d", str([{**message, "name": ""} for message in messages])):
            assert ("Q" not in word) == (word in trained), (kind, word)
            assert word[0] == "f" or 1 == text.count(word), (kind, word)
        if name.endswith("_training") and kind != "weight":
            forms = template._forms.messages(chat)  # pyright: ignore[reportPrivateUsage]
            assert masked(name, chat, forms) == "".join(trained.split()), kind
    assert accepted or name in ("glm4moe", "deepseek_r1_distill")

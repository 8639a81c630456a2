"""Chat templates: those of models, read from the installed TRL that ships them, and small ones of our own for a trait.

No template of others is kept in this repository.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

OWN = {
    # a text of its own stands first where the chat has no system message
    "default_system": (
        "{% if messages and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # questions in brackets of ordinary text, no generation prompt, roles refused
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
        "{{ raise_exception('Roles take turns here: first user, then assistant') }}{% elif m['role'] == 'user' %}"
        "{{ '[ASK] ' ~ m['content'] ~ ' [/ASK]' }}{% else %}{{ m['content'] ~ eos_token }}{% endif %}{% endfor %}"
    ),
    # headers of ordinary text, the tokenizer's end token after every turn, no line end after the generation prompt
    "plain_headers": (
        "{% for m in messages %}\n{{ '<|' ~ m['role'] ~ '|>\n' ~ m['content'] ~ eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
}
"""Our own templates, each named by its trait."""


def trl_folder() -> Path:
    """Return the folder of TRL's chat templates, without importing TRL."""
    spec = find_spec("trl")
    assert spec is not None, "TRL is part of the extra dev"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def template_text(name: str) -> str:
    """Return one of our own templates, or the one of this name that TRL ships."""
    return OWN[name] if name in OWN else (trl_folder() / f"{name}.jinja").read_text(encoding="utf-8")

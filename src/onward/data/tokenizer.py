"""A loaded tokenizer as plain values, so that rows can be tokenized without transformers or torch.

Only transformers knows how to load the tokenizer of every model, and importing it takes seconds. What it loads is
therefore recorded once in a `TokenizerState`, which needs nothing but the `tokenizers` library to encode text and can
be stored as a cache file.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from onward.atomic import read_checked, replace_checked
from onward.data.templates.rendering import Renderer
from onward.data.tokenized import FORMAT
from onward.digest import sha256_file, sha256_json
from onward.errors import ModelError

STATE_FORMAT = 2
_KIND = f"onward tokenizer {STATE_FORMAT}.{FORMAT} "
"""The beginning of the file of a stored state."""
LAST_CALL = ("padding", "truncation")
"""Entries of a serialized tokenizer that record how it was last called and are no part of it."""
WEIGHT_ENDINGS = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".pt", ".pth", ".safetensors")
)
TOOL_TEMPLATE = "tool_use"
TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class TokenizerState:
    """Everything that decides how a tokenizer turns rows into tokens and targets.

    Args:
        backend: the tokenizer of the `tokenizers` library, in its own JSON form, without padding and truncation.
        chat_template: the Jinja source of the default chat template; "" if there is none.
        special_tokens_map: the named special tokens, which chat templates see as variables.
        special_tokens: every special token, the longest first.
        bos_id: id of the token that begins a text, if there is one.
        eos_id: id of the token that ends a text, if there is one.
        pad_id: id of the padding token, if there is one.
        splits_special_tokens: whether special tokens found in a text are tokenized like any other text.
        fingerprint: SHA-256 of all that decides how rows become tokens and targets, by which a run recognizes its
            tokenizer.
        tool_template: the Jinja source of the template for chats with tools, if it is a separate one; else "". The
            fingerprint does not cover it, because earlier releases did not read it.
    """

    backend: str
    chat_template: str
    special_tokens_map: dict[str, str]
    special_tokens: tuple[str, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    splits_special_tokens: bool
    fingerprint: str
    tool_template: str = ""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerState:
        """Return the state of a loaded Hugging Face tokenizer.

        Raises:
            ModelError: the tokenizer is a slow one, its chat template is unusable, or it cannot be restored from its
                own serialized form.
        """
        backend, template = _backend(tokenizer), _default_template(tokenizer)
        tool_template = _tool_template(tokenizer, template)
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        for source in (template, tool_template):
            Renderer(source, dict(named))  # refuses a template that is not valid Jinja
        text: str = backend.to_str()
        state = cls(
            backend=_as_never_called(backend, text),
            chat_template=template,
            special_tokens_map=named,
            special_tokens=_special_tokens(tokenizer),
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            splits_special_tokens=backend.encode_special_tokens,
            fingerprint=_fingerprint(text, template, named, tokenizer.eos_token_id),
            tool_template=tool_template,
        )
        if _added_ids(state.tokenizer) != _added_ids(backend):
            raise ModelError(
                "the tokenizer gives different token ids after it is loaded from its own serialized form",
                hint="give the tokens in its vocabulary ids without gaps, then save it again with save_pretrained",
            )
        return state

    def with_template(self, template: str | None) -> TokenizerState:
        """Return the state of this tokenizer with another chat template, also for chats with tools; with None, itself.

        Raises:
            ModelError: the template is not valid Jinja.
        """
        if template is None:
            return self
        Renderer(template, dict(self.special_tokens_map))
        fingerprint = _fingerprint(self.backend, template, self.special_tokens_map, self.eos_id)
        return replace(self, chat_template=template, tool_template="", fingerprint=fingerprint)

    @classmethod
    def from_json(cls, text: str | bytes) -> TokenizerState:
        """Return the state that `to_json` wrote.

        Raises:
            ValueError: `text` is not such a state.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            values["special_tokens"] = tuple(values["special_tokens"])
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the state of a tokenizer: {error}") from error

    def to_json(self) -> str:
        """Return the state as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself; it neither pads nor truncates."""
        made = Tokenizer.from_str(self.backend)
        made.encode_special_tokens = self.splits_special_tokens
        return made

    @property
    def largest_id(self) -> int:
        """The largest id that a token of any text can have, special tokens included."""
        return max(*self.tokenizer.get_vocab(with_added_tokens=True).values(), self.largest_special_id)

    @property
    def largest_special_id(self) -> int:
        """The largest id of a named token or of one that is put around a text; -1 if there is none."""
        named = [token for token in (self.bos_id, self.eos_id, self.pad_id) if token is not None]
        processor: Any = self.tokenizer.post_processor
        inserted = [] if processor is None else _inserted_ids(json.loads(processor.__getstate__()))
        return max(*named, *inserted, -1, -1)


def save_tokenizer_state(path: Path, state: TokenizerState) -> None:
    """Atomically store a state as the file `path`.

    Raises:
        OSError: the disk is full or failing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_checked(path, state.to_json().encode(), _KIND)


def load_tokenizer_state(path: Path) -> TokenizerState | None:
    """Return the state that was stored as `path`; None if there is none, or if the file is damaged or outdated.

    Raises:
        OSError: the file exists but cannot be read.
    """
    body = read_checked(path, _KIND)
    return None if body is None else TokenizerState.from_json(body)


def tokenizer_files_digest(folder: Path) -> str:
    """Return a SHA-256 of everything that decides which tokenizer transformers loads from a model folder.

    That is every file that does not hold weights, by name and content, because vocabulary files have different names
    from one model to the next; and the versions of the libraries that read them. Equal digests mean equal states.

    Raises:
        OSError: the folder or a file in it cannot be read.
    """
    folders = [folder, folder / TEMPLATE_FOLDER]
    paths = [path for place in folders if place.is_dir() for path in sorted(place.iterdir()) if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in paths
        if path.suffix.lower() not in WEIGHT_ENDINGS
    }
    return sha256_json([STATE_FORMAT, FORMAT, *_library_versions(), files])


@functools.cache  # the longest part of the digest of a usual tokenizer
def _library_versions() -> tuple[str, str]:
    """Return the versions of the libraries that read a tokenizer's files, without importing them."""
    from importlib.metadata import version

    return version("tokenizers"), version("transformers")


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not report where its tokens are in the text",
            hint="use a model that ships a tokenizer.json",
        )
    return backend


def _as_never_called(backend: Any, text: str) -> str:
    if backend.padding is None and backend.truncation is None:
        return text
    return json.dumps(json.loads(text) | dict.fromkeys(LAST_CALL), ensure_ascii=False)


def _fingerprint(backend: str, template: str, special_tokens_map: dict[str, str], eos_id: int | None) -> str:
    """Return the fingerprint; every run records it in its ledger, so it must never change."""
    values = {key: value for key, value in json.loads(backend).items() if key not in LAST_CALL}
    return sha256_json([FORMAT, values, hashlib.sha256(template.encode()).hexdigest(), special_tokens_map, eos_id])


def _default_template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # several templates, none of them named "default"
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ModelError(
            f"the tokenizer has several chat templates ({names}) and none is the default",
            hint="save the one to use as chat_template.jinja in the folder of the tokenizer",
        ) from None


def _tool_template(tokenizer: Any, default: str) -> str:
    """Return the template that transformers takes for chats with tools, if that is another one than the default."""
    named = tokenizer.chat_template
    found: str = named.get(TOOL_TEMPLATE, "") if isinstance(named, dict) else ""
    return "" if found == default else found


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = {*added, *tokenizer.all_special_tokens} - {""}
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


def _added_ids(backend: Any) -> dict[int, str]:
    return {index: token.content for index, token in backend.get_added_tokens_decoder().items()}


def _inserted_ids(post_processor: Any) -> list[int]:
    """Return the ids that a serialized post-processor puts around a text, wherever it is nested."""
    if not isinstance(post_processor, dict):
        return []
    inner: list[Any] = post_processor.get("processors", [])
    templates: dict[str, Any] = post_processor.get("special_tokens", {})
    pairs = [post_processor[name] for name in ("cls", "sep") if name in post_processor]
    own = [index for token in templates.values() for index in token["ids"]] + [index for _, index in pairs]
    return own + [index for part in inner for index in _inserted_ids(part)]

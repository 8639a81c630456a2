"""The plain form of a tokenizer: nothing is lost on the way from transformers to a file and back."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from trait_templates import template_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onward.data.row_tokenizer import RowTokenizer
from onward.data.row_types import Completion, RowError, Text
from onward.data.rows.records import parse_record
from onward.data.tokenized import FORMAT, unpack
from onward.data.tokenizer import TokenizerState, load_tokenizer_state, save_tokenizer_state, tokenizer_files_digest
from onward.digest import sha256_json
from onward.errors import ModelError

TEXTS = [row["messages"][1]["content"] for row in tiny.chat_rows(40)]
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ROWS = [
    Text(" a  b\n\u00e9\U0001f600 7</s>"), Completion("The river ", "runs past."), *map(parse_record, tiny.chat_rows(6))
]  # fmt: skip


def trained(model: Any, trainer: Any, **parts: Any) -> Any:
    """Return a Hugging Face tokenizer around a small model trained on `TEXTS`, with four special tokens."""
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
    tokenizer.chat_template = template_text("plain_headers")
    return tokenizer


def unigram() -> Any:
    """A tokenizer as T5 has it."""
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(NAMED.values()), unk_token="<unk>", show_progress=False
    )
    parts = {"normalizer": normalizers.NFKC(), "pre_tokenizer": pre_tokenizers.Metaspace()}
    return trained(models.Unigram(), trainer, decoder=decoders.Metaspace(), **parts)


def wordpiece() -> Any:
    """A tokenizer as BERT has it, whose post-processor puts tokens around a text."""
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(NAMED.values()), show_progress=False)
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    tokenizer = trained(models.WordPiece(unk_token="<unk>"), trainer, **parts)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("</s>", "<s>")]
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def byte_fallback() -> Any:
    """A tokenizer as Llama 2 has it: BPE over characters, bytes where a character is unknown."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*NAMED.values(), *fallback], show_progress=False)
    parts = {"normalizer": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])}
    return trained(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), trainer, **parts)


def word_level() -> Any:
    """A tokenizer of whole words."""
    trainer = trainers.WordLevelTrainer(special_tokens=list(NAMED.values()), show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.Whitespace())


def template_post_processor() -> Any:
    """A byte-level tokenizer that puts tokens around a text, and pads and cuts it since it was last called."""
    tokenizer = tiny.byte_tokenizer(template_text("brackets"), bos_token="<s>", eos_token="</s>")
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), post_processor])
    tokenizer(["a", "bcd"], truncation=True, max_length=2, padding="max_length")
    return tokenizer


def split_special_tokens() -> Any:
    """A tokenizer that does not recognize special tokens in a text."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer


def with_template(name: str) -> Any:
    """A byte-level tokenizer with one of the templates of `trait_templates` and its special tokens."""
    return tiny.byte_tokenizer(template_text(name), **tiny.TOKENIZERS[name])


MODELS = (unigram, wordpiece, byte_fallback, word_level, template_post_processor, split_special_tokens)
KINDS: dict[str, Callable[[], Any]] = {
    **{kind.__name__: kind for kind in MODELS},
    **{name: partial(with_template, name) for name in tiny.TOKENIZERS},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A Hugging Face tokenizer of each kind."""
    return KINDS[request.param]()


def stored(tokenizer: Any, path: Path) -> TokenizerState:
    """Return the state of a tokenizer after it went through a file."""
    save_tokenizer_state(path, TokenizerState.of(tokenizer))
    state = load_tokenizer_state(path)
    assert state is not None
    return state


def encodings(backend: Any, text: str) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return ids and offsets of a text with and without the tokens that the tokenizer puts around it."""
    backend.no_padding()
    backend.no_truncation()
    made = [backend.encode(text, add_special_tokens=special) for special in (True, False)]
    return [(encoding.ids, encoding.offsets) for encoding in made]


def test_a_stored_state_encodes_like_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """Ids and offsets of any text are those of the tokenizer that transformers loaded."""
    state = stored(tokenizer, tmp_path / "state")
    assert TokenizerState.of(tokenizer) == state
    for text in ("", " ", "a  b\n\n", "\u00e9\U0001f600\u2581", "x</s>y<|im_end|>z<unk>", "<0x41>", *TEXTS):
        assert encodings(tokenizer.backend_tokenizer, text) == encodings(state.tokenizer, text)


def test_a_stored_state_makes_the_same_rows(tokenizer: Any, tmp_path: Path) -> None:
    """Texts, tokens and targets of every kind of row are the same straight from transformers and through a file."""
    ways = [RowTokenizer(state, 500) for state in (TokenizerState.of(tokenizer), stored(tokenizer, tmp_path / "state"))]
    assert [outcome(ways[0], row) for row in ROWS] == [outcome(ways[1], row) for row in ROWS]
    rendered = outcome(ways[1], parse_record(tiny.chat_rows(1)[0]))
    chat = tiny.chat_rows(1)[0]["messages"]
    if not isinstance(rendered, str) and "strftime_now" not in tokenizer.chat_template:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert encodings(tokenizer.backend_tokenizer, text)[1][0] == rendered[0]


def outcome(row_tokenizer: RowTokenizer, record: Any) -> str | tuple[list[int], list[bool]]:
    """Return ids and targets of a row, or why it is refused."""
    try:
        (packed,) = row_tokenizer.encode([row_tokenizer.prepare(record)])
    except RowError as error:
        return error.reason
    row = unpack(packed)
    return row.ids.tolist(), row.targets.tolist()


def test_the_fingerprint_is_what_runs_have_recorded(tokenizer: Any) -> None:
    """The fingerprint is computed from the same values in the same form as in every run made before."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    del values["padding"], values["truncation"]
    template = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    expected = sha256_json([FORMAT, values, template, special, tokenizer.eos_token_id])
    assert expected == TokenizerState.of(tokenizer).fingerprint


def test_fingerprints_tell_tokenizers_apart() -> None:
    """Another template, special token or vocabulary has another fingerprint; the same has the same."""
    states = [
        tiny.byte_state(), tiny.byte_state(None), tiny.byte_state("{{ messages }}"), tiny.byte_state(bos_token="<s>"),
        tiny.byte_state(extra=["<x>"]), TokenizerState.of(unigram()),
    ]  # fmt: skip
    assert 6 == len({state.fingerprint for state in states})
    assert states[0] == tiny.byte_state()


def test_what_the_fingerprint_leaves_out_is_told_apart_too() -> None:
    """A template for chats with tools, and whether special tokens are split, give a tokenizer another key; without
    either the key is the fingerprint.
    """
    plain = tiny.byte_state()
    assert ("", plain.fingerprint) == (plain.extras, plain.key)
    others = [replace(plain, tool_template=text) for text in ("{{ 1 }}", "{{ 2 }}")]
    others.append(replace(plain, splits_special_tokens=True))
    assert {plain.fingerprint} == {state.fingerprint for state in others}
    assert 4 == len({state.key for state in [plain, *others]}) == len({state.extras for state in [plain, *others]})
    assert plain.with_template("{{ 3 }}").key == others[0].with_template("{{ 3 }}").key


def test_special_tokens_follow_from_what_the_fingerprint_covers(tokenizer: Any) -> None:
    """Every special token is one that the serialized backend or a name calls special."""
    state = TokenizerState.of(tokenizer)
    added = {token["content"] for token in json.loads(state.backend)["added_tokens"] if token["special"]}
    assert {*state.special_tokens} == added | {*state.special_tokens_map.values()}


def test_the_largest_id() -> None:
    """It counts added tokens, gaps in the vocabulary, and what the post-processor puts around a text."""

    def assert_largest(expected: int, state: TokenizerState) -> None:
        assert expected == state.largest_id
        assert expected == RowTokenizer(state, max_length=8).largest_id  # which knows the lengths of its tokens

    assert_largest(258, tiny.byte_state())
    assert_largest(259, tiny.byte_state(bos_token="<s>"))
    backend = tiny.byte_tokenizer().backend_tokenizer
    values = json.loads(backend.to_str())
    values["model"]["vocab"]["far"] = 7000
    assert_largest(7000, state_of(values))
    nested = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 9000)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(), nested])
    assert_largest(9000, state_of(json.loads(backend.to_str())))
    backend.post_processor = processors.BertProcessing(("</s>", 9100), ("<s>", 9001))
    assert_largest(9100, state_of(json.loads(backend.to_str())))


def state_of(values: Any) -> TokenizerState:
    """Return the state of a tokenizer given in its serialized form."""
    backend = Tokenizer.from_str(json.dumps(values))
    return TokenizerState.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>"))


def test_a_slow_tokenizer_is_refused() -> None:
    """A tokenizer that does not know the places of its tokens in the text is an error of the model."""
    with pytest.raises(ModelError, match="object is a slow tokenizer"):
        TokenizerState.of(object())


def test_an_unusable_template_is_refused() -> None:
    """A template that is not Jinja, or several without a default, are errors of the model."""
    with pytest.raises(ModelError, match="not valid Jinja"):
        tiny.byte_state("{% for %}")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = {"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    with pytest.raises(ModelError, match=r"several chat templates \(rag, tool_use\) and none is the default"):
        TokenizerState.of(tokenizer)
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": "{{ 2 }}"}
    assert tiny.CHATML == TokenizerState.of(tokenizer).chat_template


def test_a_tokenizer_whose_ids_do_not_survive_saving_is_refused() -> None:
    """A tokenizer that no file can restore is refused: it would train other ids than users of the model get."""
    tokenizer = tiny.byte_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*alphabet, "ab"])}
    tokenizer.backend_tokenizer.model = models.BPE(vocabulary, [("a", "b")])
    with pytest.raises(ModelError, match="different token ids after it is loaded from its own serialized form"):
        TokenizerState.of(tokenizer)


def test_damage_is_noticed(tmp_path: Path) -> None:
    """A stored state that is missing, cut, changed or of another format is ignored, so that it is made again."""
    path = tmp_path / "folder" / "state"
    assert load_tokenizer_state(path) is None
    save_tokenizer_state(path, tiny.byte_state())
    assert [path] == list(path.parent.iterdir())
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for damaged in (b"", data[:10], data[:-1], data + b"\n", flipped, data.replace(b" 3.1 ", b" 0.1 ", 1), data[1:]):
        path.write_bytes(damaged)
        assert load_tokenizer_state(path) is None
    path.write_bytes(data)
    assert tiny.byte_state() == load_tokenizer_state(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"special_tokens": []}', "1", '{"special_tokens": 1}', b"\xff"])
def test_what_is_no_state_is_refused(text: str | bytes) -> None:
    """Any other JSON, and text that is not JSON, is a ValueError."""
    with pytest.raises(ValueError, match=r"not the state of a tokenizer|Expecting value|decode"):
        TokenizerState.from_json(text)


def test_the_digest_of_the_files_follows_what_decides_the_tokenizer(tmp_path: Path) -> None:
    """Every change of a file that transformers may read changes the digest; weights and copies do not."""
    folder = tiny.save_tiny_model(tmp_path / "a")
    seen = [tokenizer_files_digest(folder)]
    (folder / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja", "added_tokens.json",
                 "special_tokens_map.json", "vocab.txt", "merges.txt", "spiece.model",
                 "additional_chat_templates/rag.jinja"):  # fmt: skip
        with (folder / name).open("ab") as stream:
            stream.write(b" ")
        seen.append(tokenizer_files_digest(folder))
    (folder / "vocab.txt").rename(folder / "vocab.model")
    seen.append(tokenizer_files_digest(folder))
    assert len(seen) == len(set(seen))
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert seen[-1] == tokenizer_files_digest(folder)
    assert seen[0] == tokenizer_files_digest(tiny.save_tiny_model(tmp_path / "b"))


def test_a_saved_tokenizer_has_the_state_of_the_one_in_memory(tmp_path: Path) -> None:
    """What a checkpoint carries is the tokenizer that the run trained with."""
    for name, kind in KINDS.items():
        if name in ("template_post_processor", "split_special_tokens"):
            continue  # how it was last called and this switch are no part of what transformers saves
        tokenizer = kind()
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert TokenizerState.of(tokenizer).fingerprint == TokenizerState.of(loaded).fingerprint, name


PROGRAM = """
import hashlib
import sys
from pathlib import Path
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.data.tokenizer import load_tokenizer_state

folder = Path(sys.argv[1])
row_tokenizer = RowTokenizer(load_tokenizer_state(folder / "s"), 99)
source = folder / "a.jsonl"
report = tokenize_file(source, folder / "tokens", hashlib.sha256(source.read_bytes()).hexdigest(), row_tokenizer)
print(report.rows, [name for name in ("torch", "transformers", "huggingface_hub", "pyarrow") if name in sys.modules])
"""


def test_tokenizing_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """A process that tokenizes a file of chats with a stored state imports none of the large packages."""
    save_tokenizer_state(tmp_path / "s", tiny.byte_state())
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(9))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "9 []\n" == done.stdout

"""The page of training files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from made_pages.examples import EXAMPLES, REFUSED_FILES, REFUSED_ROWS
from made_pages.words import NOTE, cell, names, refusal
from onward.config import Config
from onward.data.files.faults import FileError
from onward.data.files.formats import COMPRESSIONS, listed
from onward.data.files.sources import read_rows
from onward.data.report import PROBLEMS_SHOWN
from onward.data.row_types import RowError
from onward.data.rows import messages, records
from onward.data.rows.columns import ANSWERS, BESIDES, QUESTIONS
from onward.data.rows.records import parse_record

LIMITS: Sequence[tuple[str, str]] = (
    (
        "max_row_mb",
        "MiB of a row, in the file and as the text that is tokenized; a value counts for more than its text",
    ),
    ("max_unpacked_mb", "MiB to which a compressed, Parquet or Arrow file unpacks"),
    ("max_unpack_ratio", "the same, as a multiple of the file's size; judged above 16 MiB"),
)
"""Key and what it bounds."""

FORMATS_HEAD = """\
A training file is a sequence of rows, and every row is checked before any is trained. Either the whole file enters the
stream, or none of it: a refused file goes to `rejected/` with a report that names up to {shown} rows, each with a
reason and a remedy. The files of one command are accepted together or not at all.

## Endings

| ending | content | reports count by |
|---|---|---|
| `.jsonl`, `.ndjson` | one JSON object per line; blank lines are skipped | line |
| `.json` | an array of objects, or objects one after another | row |
| `.txt` | plain text: each [document](#documents-of-a-txt) is a row `{{"text": ...}}` | line |
| `.csv`, `.tsv` | a table: its first line names the columns, values are strings; blank lines are skipped | line |
| `.parquet` | one row per table row, columns are keys; needs `pip install 'onward[parquet]'` | row |
| `.arrow` | Arrow's file or stream format, as written by `datasets`; otherwise like `.parquet` | row |
| `.zip` | an archive with one file of a format above `.parquet`; `__MACOSX` is ignored | as in that file |

{compressions} after the ending of a text format means that the file is compressed: `rows.jsonl.gz`. Text is UTF-8; CRLF
line ends are accepted, and so is a byte order mark at the start of a file or of a line of JSON.

The separator of a `.csv` is whichever of comma, semicolon, tab and vertical bar is most frequent in its first line;
that of a `.tsv` is the tab. A field that contains the separator, a line end or a double quote must be in double quotes,
with each double quote inside it doubled; a file with any other quoting is refused. A column without a name is ignored.

`onward add` and `onward train` also take two other sources, and copy each into one file:

- **A folder** that `Dataset.save_to_disk` wrote: its files one after another, as `FOLDER.arrow`. For a `DatasetDict`,
  name the split: `FOLDER/train`.
- **A data set of the Hugging Face Hub**: `hf://datasets/OWNER/NAME`, followed by `@REVISION` and `/FILE` or `/FOLDER`
  if needed; `*` matches any name. It is downloaded into the cache of `huggingface_hub`. If a data set or a folder has
  several files, those for training are taken (`train` in their names); `FOLDER/*` means all.

A Parquet column that no row format reads may contain anything. In a column that a format reads, a row with a date, a
decimal or binary data is refused.

## Row formats

The format of a row is recognized by its keys, in the order of this page: the first format whose keys are all present is
used. Keys whose value is null do not count. One file may contain rows of several formats. Keys with a known meaning are
followed or refused; all others are named when the file is accepted: `ignored keys: id, source`.
"""

COLUMNS = """\
## Columns with other names

A row that has none of these formats, but one key for a question and one for its answer, is read as a chat, like a row
of Alpaca:

| | keys |
|---|---|
| question | {questions}; `input` if there is no other |
| answer | {answers} |
| appended to the question, if present | {besides} |

So `question`/`answer`, `query`/`response`, `input`/`output` and Dolly's `instruction`/`context`/`response` are read.
Capital letters and white space around a name do not matter. The line that accepts the file says which columns were
used. `prompt` with `completion` is the format above. A row with two keys for the question, or two for the answer, is
refused with both names.

For any other names, set the config key `columns`: `columns: {{prompt: question, completion: answer}}` joins the two
without a template, `{{instruction: question, output: answer}}` makes a chat of them, `{{text: body}}` reads one column.
Rows that have none of these columns are read as usual. Where `columns` yields a complete format, keys of other formats
are ignored.

## Documents of a `.txt`

| `text.documents` | a row is |
|---|---|
| `line` | a line |
| `blank` | the lines between two blank ones |
| `file` | the whole file |
| `auto` | one of these, judged by the first 256 KiB; the line that accepts the file says which |

`auto` chooses `blank` if blank lines separate groups of several lines (32 at most on average); otherwise `file` if most
lines begin in lower case or with white space, which suggests that they continue the line before; otherwise `line`.
`onward init` writes `auto`; a run whose config does not name the key reads lines, as earlier releases did. Lines within
a row end in a line feed.

"""

CHAT_RULES = """\
## Rules of chats

- Roles: {roles}. These other names for them are understood: {other_roles}. A message may use `from` and `value` in
  place of `role` and `content`.
- Content is a string or a list of parts. Parts `{{"type": "text", "text": ...}}` are joined; parts
  `{{"type": "thinking", ...}}` before them are the reasoning. A part may use `value` for its text.
- There is at least one assistant turn, and the last message is one. An assistant turn may be empty only if it calls
  tools.
- Calls are `tool_calls`, OpenAI's older `function_call`, or the JSON text of a `function_call` turn. `arguments` may be
  an object or its JSON text: the template gets the object if it accepts one, otherwise the text. An empty list of calls
  counts as none.
- {reasoning} of an assistant message hold its reasoning. A row that has reasoning both there and in the content
  (`<think>...</think>`) is refused: both would be trained.
- Every other key of a message is passed to the template if the template reads it.
- No message contains an end token of the template, and no answer contains that of the tokenizer.
- The template is that of the run's tokenizer, or `chat_template`. If the tokenizer has one named `tool_use`, chats with
  tools are rendered with it. Chats are refused if there is no template, if the template draws at random, or if the
  tokenizer splits special tokens. In the template, the current date is always the same, so that a row always renders
  the same.

A row may have these keys in addition to its messages:

| key | what it means |
|---|---|
| {system} | a system message that comes before the others: a string, or a list of text parts |
| `tools`, `functions` | schemas of tools for the template, a list or its JSON text; `functions` is OpenAI's old form |
| `documents` | texts that the chat is about, a list of objects, for templates that read them; otherwise ignored |
| `chat_template_kwargs` | an object whose values the template gets by name, for example `enable_thinking` |
| {weights} | of an answer or a row: 0 or `false` leaves it out of the loss; any other number weights its tokens |
| `messages`, `conversations`, `prompt` with `completion` | may be the JSON text of the list |

Weights and `label` may be strings (`"0"`, `"false"`), as in a `.csv`. Keys that make sense only for a chat (`system`,
`history`, `tools`, `chat_template_kwargs`) are refused in a row of plain text unless they are empty; so is `history` in
a row with messages.

In Parquet and Arrow files, which give all rows the same fields, null fields in `tools` and `arguments` are left out; in
JSON they are kept.

After rendering, Onward proves that the content, the reasoning and the calls of every message appear in the text once,
in the order of the messages. The text before each answer in the loss must be what the template renders at inference for
the messages before it, and the answer must end with a token at which inference stops. If the template leaves out a call
or a thought, splits an answer at `</think>`, moves the system text or ends an answer without a token, the row is
refused: use another template, `chat_template: FILE`.
"""

FILES_TAIL = """\
Any other error that the content causes in reading, parsing, rendering or tokenizing is a refusal too, and names the row
where it was noticed. Special files, files that may not be read, files that change while they are read and files without
rows are refused. A refused file gives exit status 3; a path that is missing, or a directory that is no saved data set,
is wrong usage, exit status 2. A fault of the machine (disk, memory, file descriptors) never refuses a file: it is read
again later.

A file is opened once, never through a symbolic link, and hashed while its rows are read: what is trained has the hash
that is in the ledger.
"""

LIMITS_HEAD = """\
A file that exceeds one of these while it is read is refused; the report names the key to raise.
"""

LIMITS_TAIL = """\
Limits do not change what is trained. Tokenizing a row can take about 130 times its size in memory, most of it in the
`tokenizers` library: lower `max_row_mb` if memory is scarce. Files that were accepted earlier are not judged again.
"""

FORMATS_TAIL = """\
## What the loss covers

| row | covered |
|---|---|
| chat | every assistant turn and its end token, nothing else: no header, no other role, no white space after it |
| `prompt` and `completion` | every token of the completion, and what closes it |
| `text` | every token but the first, and what closes it |

What closes a completion or a text is the end token, after any other tokens that the tokenizer itself puts after a text,
such as BERT's `[SEP]`. A run that was trained before this was so goes on without those.

A token that overlaps a covered character is covered. The first token of a row never is, since nothing predicts it, nor
is a header token that includes leading white space of the answer (Phi-3's). An answer in a rendered chat begins where
the prompt would end at inference, and ends with the end token after it: what the template writes in between, such as
the markup of a call, is part of it. A template with `{% generation %}` markers says
itself what is covered; the end token is added if the markers leave it out. To find where each message's text ends up,
the chat is rendered once more with unique words in its place. No row is trained with an empty mask.

The loss of a step is the mean over all covered tokens of all its rows, whatever `gradient_accumulation` is. If rows or
answers have weights, it is the weighted mean: the sum of weight times loss, divided by the sum of the weights. The
weight of a row multiplies that of an answer in it. `onward grid` measures without weights. Only the anchor can be part
of the loss besides ([What the model knows](knowledge.md#the-anchor)): there is no term for the routers of a mixture of
experts, and no label smoothing.

## Rows that are too long

`over_length` decides what happens to a row of more than `max_length` tokens:

| `over_length` | what happens |
|---|---|
| `auto` | plain text is split into several rows without loss; other rows are cut as under `truncate` |
| `truncate` | its end is cut off; a row with no covered token left is dropped |
| `drop` | the row is left out |
| `reject` | the file is rejected |

`onward init` writes `auto`; a run whose config does not name the key cuts, as earlier releases did. A text is split
between two tokens: after the last sentence that ends in the second half of a row, otherwise at white space, otherwise
between two characters. Joined, the rows are the tokens of the text, with one end token at its end; if the tokenizer
begins a text with a special token, each row begins with it. Every token except the first of each row is a target.

The line that accepts a file, the line that begins its training and the log say how many rows were split, cut and
dropped, and how many tokens were lost, with their share. `onward history --json` has `split`, `truncated`, `dropped`,
`tokens` and `lost_tokens`. A file whose rows are all dropped is rejected.

## Rows that cannot be trained

With `bad_rows: reject`, the default, one such row is enough to refuse the file. `bad_rows: drop` leaves such rows out:
the log and the command name the first {shown} of them with line and reason, and say how many there are;
`onward history --json` has `bad_rows`. A file may lose up to ten rows that way if they are less than half of it, and
more if they are at most `bad_rows_share` of it; otherwise it is refused. An error that makes the rest of a file
unreadable always refuses it.

## Duplicates

A file is identified by the SHA-256 of its bytes. Content that is already in the stream is refused, whatever its name;
`--again` accepts it, and trains its rows in a different order. After a kill you may repeat the same
`onward train FILE...`: files that are in the stream but not yet trained are not refused. Undone files do not count. If
`train` was killed before it had read its files, the next `train` or `watch` takes them in.

## Order

Rows are trained in an order that is a function of the run's seed, the file's SHA-256 and the epoch. Every row of a file
is trained exactly `epochs` times. The last step of an epoch has the rows that remain. A file that is trained again
(`--again`) has a different order each time.
"""


def formats_page() -> str:
    """Return the text of file-formats.md."""
    compressions = listed(COMPRESSIONS)
    head = FORMATS_HEAD.format(shown=PROBLEMS_SHOWN, compressions=compressions)
    lines = [NOTE, "", "# Training files", "", head]
    for name, what, row in EXAMPLES:
        kind = type(parse_record(row)).__name__.lower()
        lines += [f"### {name}", "", f"{what} Kind: {kind}.", "", "```json", json.dumps(row), "```", ""]
    lines.append(COLUMNS.format(questions=names(QUESTIONS), answers=names(ANSWERS), besides=names(BESIDES)))
    lines.append(
        CHAT_RULES.format(
            roles=names(messages.ROLES), other_roles=names(messages.OTHER_ROLES),
            reasoning=names(messages.REASONING_KEYS), system=names(records.SYSTEM_KEYS),
            weights=names(messages.WEIGHT_KEYS),
        )
    )  # fmt: skip
    lines += ["## What is refused", "", "Rows:", "", "| row | reason | remedy |", "|---|---|---|"]
    for value in REFUSED_ROWS:
        error = refusal(parse_record, value, RowError)
        lines.append(f"| `{cell(json.dumps(value))}` | {cell(error.reason)} | {cell(error.remedy)} |")
    lines += ["", "Files:", "", "| file | reason | remedy |", "|---|---|---|"]
    for what, name, content in REFUSED_FILES:
        reason, remedy = _file_refusal(name, content)
        lines.append(f"| {what} | {cell(reason)} | {cell(remedy)} |")
    lines += ["", FILES_TAIL, "## Limits", "", LIMITS_HEAD, "| key | default | what it bounds |", "|---|---|---|"]
    lines += [f"| `{key}` | {getattr(Config(), key)} | {what} |" for key, what in LIMITS]
    lines += ["", LIMITS_TAIL, FORMATS_TAIL.replace("{shown}", str(PROBLEMS_SHOWN))]
    return "\n".join(lines).rstrip() + "\n"


def _file_refusal(name: str, content: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            row = next(row for row in read_rows(path) if row.problem)
        except FileError as error:
            return error.reason, error.remedy
    return row.problem or "", row.remedy or ""

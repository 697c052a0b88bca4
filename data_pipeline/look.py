"""What a file holds, and how a run reads it: columns, forms, bad rows, rows as a model sees them, lengths."""

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml
from rich.text import Text

from data_pipeline import chat, forms
from data_pipeline.config import CHAT_KINDS, DataConfig, SourceConfig
from data_pipeline.documents import NOT_BAD, Document, Reject, read_documents
from data_pipeline.files import version
from data_pipeline.readers import BLANK, Row, file_rows, kind_of
from data_pipeline.tokenizer import Tokenizer

_ROWS = 1000  # that are read of each file
_SHOWN, _SHOWN_CHARACTERS = 3, 1500
_BAR = 40  # characters
LEARNED, READ = "bold green", "dim"


def look(path: str, config: DataConfig, tokenizer: Tokenizer | None, in_colour: bool) -> Iterator[Text]:
    """What a file holds, in pieces to print. Of `config`, the settings of rows apply.

    Learned text is coloured, or without colours the rest is marked [- -]. Raises DataError for a file that
    cannot be read.
    """
    for text in _look(path, config, tokenizer, in_colour):
        letters = (letter if letter in "\n\t" or letter.isprintable() else "\ufffd" for letter in text.plain)
        text.plain = "".join(letters)  # a terminal would obey control characters
        yield text


def _look(path: str, config: DataConfig, tokenizer: Tokenizer | None, in_colour: bool) -> Iterator[Text]:
    rows = list(itertools.islice(file_rows(path), _ROWS + 1))
    whole, rows = len(rows) <= _ROWS, rows[:_ROWS]
    source = source_of(path, rows)
    count = f"{len(rows):,} row{'s' * (len(rows) != 1)}" + ("" if whole else " read, of more")
    yield Text(f"{path}: {kind_of(path)}, {version(path)[0]:,} bytes, {count}\n", style="bold")
    if columns := _columns(rows):
        yield Text(f"  columns  {', '.join(f'{name}: {kind}' for name, kind in columns.items())}\n")
    if source is None:
        faults = [row.fault for row in rows if row.fault not in (None, BLANK)]
        law = forms.misfit(SourceConfig("sft", [path]), columns) + "; and none of its columns is text"
        law = law if columns else str(faults[0]) if faults else "it has no row"
        law += _remedy(rows) if not columns and kind_of(path) == "jsonl" else ""
        yield Text(f"  not read {law}\n\n", style="red")
        return
    how = f"kind {source.kind}"
    if source.kind in CHAT_KINDS:
        values = (row.value for row in rows if isinstance(row.value, dict))
        found = Counter(forms.form_of(source, value) or "none" for value in values)
        how += ", " + ", ".join(f"form {name} in {number:,} rows" for name, number in found.most_common())
    yield Text(f"  read as  {how}\n")
    items = list(read_documents(replace(config, sources={"it": source}), "it", rows, tokenizer))
    documents = [item for item in items if isinstance(item, Document)]
    rejects = [item for item in items if isinstance(item, Reject) and item.code != BLANK]
    for title, is_bad in (("bad     ", True), ("left out", False)):
        if found := Counter(item.reason for item in rejects if (item.code not in NOT_BAD) is is_bad):
            shown = (f"{number:,} x {reason}" for reason, number in found.most_common(5))
            yield Text(f"  {title} {found.total():,} rows: {'; '.join(shown)}\n", style="red")
    if ignored := Counter(key for item in documents for key in item.ignored):
        yield Text(
            f"  not used {', '.join(f'{key} ({number:,})' for key, number in ignored.most_common())}\n"
        )
    for document in documents[:_SHOWN]:
        yield Text(f"--- row {document.row.line}\n", style="bold")
        yield _shown(document, in_colour)
    yield Text(_lengths(documents, tokenizer))
    line = _yaml_of(path, source)
    yield Text(f"in a file of conf/   data: {{sources: {{{line}}}}}\n", style="bold")
    override = shlex.quote(f"data.sources={{{line}}}")
    yield Text(f"on a command line    {override}\n\n", style="bold")


def _remedy(rows: list[Row]) -> str:
    """How to write JSON that is no JSON lines: a list of all rows, or rows over several lines."""
    begin = next((row.raw.strip()[:1] for row in rows if row.raw and row.raw.strip()), b"")
    filters = {b"[": ".[]", b"{": "."}
    return f"; one row a line: jq -c {filters[begin]} FILE" if begin in filters else ""


def source_of(path: str, rows: list[Row]) -> SourceConfig | None:
    """How a run reads a file with these rows; None if it has no conversation, no prompt and no text."""
    kind = kind_of(path)
    if kind == "text":
        return SourceConfig(kind, [path])
    columns = _columns(rows)
    for chat_kind in CHAT_KINDS:
        source = SourceConfig(chat_kind, [path])
        if chat_kind == "prompts" and "answer" not in columns:
            source.required_fields = []
        if forms.form_of(source, columns) is not None:
            return source
    texts = {name: 0 for name, kind in columns.items() if kind == "str"}
    for row in rows:
        for name in texts:
            value = row.value.get(name) if isinstance(row.value, dict) else None
            texts[name] += len(value) if isinstance(value, str) else 0
    if not texts:
        return None
    longest = max(texts, key=lambda name: (name == "text", texts[name]))
    return SourceConfig(kind, [path], None if longest == "text" else longest)


def _columns(rows: list[Row]) -> dict[str, str]:
    """The columns or keys of rows, each with the type of its first value that is not null."""
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.value.items() if isinstance(row.value, dict) else ():
            if value is not None:
                found.setdefault(name, type(value).__name__)
    return found


def _shown(document: Document, in_colour: bool) -> Text:
    pieces = document.pieces or [chat.Piece(document.text, None, True)]
    out, left = Text(), _SHOWN_CHARACTERS
    for is_learned, group in itertools.groupby(pieces, lambda piece: piece.loss):
        text = "".join(piece.control or piece.text or "" for piece in group)
        cut = text[:left] + ("..." if len(text) > left else "")
        left = max(left - len(text), 0)
        marked = cut if in_colour or is_learned or document.pieces is None else f"[-{cut}-]"
        out.append(marked, LEARNED if is_learned else READ)
        if not left:
            break
    return out.append("\n")


def _lengths(documents: list[Document], tokenizer: Tokenizer | None) -> str:
    """A histogram of the lengths of documents, in tokens or without a tokenizer in characters."""
    lengths = []
    for document in documents:
        if tokenizer is None:
            texts = [document.text] if document.pieces is None else [of.text or "" for of in document.pieces]
            lengths.append(sum(map(len, texts)))
        elif document.pieces is None:
            lengths.append(len(tokenizer.encode(document.text)))
        else:
            lengths.append(len(chat.encode(document.pieces, tokenizer)[0]))
    if not lengths:
        return "no document\n"
    unit = "characters (data.tokenizer=NAME counts tokens)" if tokenizer is None else "tokens"
    mean = sum(lengths) / len(lengths)
    lines = [f"lengths of {len(lengths):,} documents in {unit}: mean {mean:,.0f}, longest {max(lengths):,}"]
    powers = Counter(max(length - 1, 0).bit_length() for length in lengths)
    most = max(powers.values())
    for power in range(min(powers), max(powers) + 1):
        bar = "#" * -(-powers[power] * _BAR // most)
        lines.append(f"  up to {2**power:>9,} {powers[power]:>6,} {bar}".rstrip())
    return "\n".join(lines) + "\n"


def _yaml_of(path: str, source: SourceConfig) -> str:
    """The line of YAML that makes the file a source of a run."""
    stem = Path(path).name.partition(".")[0]
    name = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in stem) or "mine"
    name = name if _is_text(name) else f"data_{name}"
    keys = {"kind": source.kind, "paths": f"[{_quoted(path)}]"}
    keys |= {} if source.text_key is None else {"text_key": _quoted(source.text_key)}
    keys |= {} if source.required_fields is None else {"required_fields": "[]"}
    return f"{name}: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"


def _quoted(text: str) -> str:
    """A text as YAML and as Hydra read it, which takes only ASCII letters without quotes."""
    plain = all((letter.isascii() and letter.isalnum()) or letter in "/._-" for letter in text)
    if plain and _is_text(text):
        return text
    text = text.replace("${", "\\${")  # else the name of a key
    # in double quotes YAML takes a backslash for the begin of an escape, and Hydra does not
    in_single = {"\\", "\t"} & {*text} and not {"'", "\n"} & {*text}
    return f"'{text}'" if in_single else json.dumps(text, ensure_ascii=False)


def _is_text(word: str) -> bool:
    """Whether a word without quotes is a text, and no number, date, null or true, to YAML and to Hydra."""
    try:
        float(word)  # of which Hydra knows more than YAML, such as 1e5
    except ValueError:
        return not word[:1].isdigit() and isinstance(yaml.safe_load(word), str)
    return False

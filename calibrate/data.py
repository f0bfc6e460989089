"""Text to token windows: the calibration set, and the tokens that `eval` scores.

A source of text is one of

    None              the text that ships with fewbit
    a .txt file       one document
    a .jsonl file     one document for each line: {"text": ...}, or {"messages": [...]}, which go
                      through the tokenizer's chat template
    org/name[:split]  a data set on the hub, streamed (needs the package `datasets` and a network)

Documents are tokenised without added special tokens and joined by the tokenizer's end-of-text
token where it has one. Calibration windows start at offsets that are uniform over the
n − length + 1 possible ones and independent, so they may overlap; a text with a single window's
worth of tokens is enough. Offsets come from a seeded generator of their own: the global random
state is neither read nor changed.

Nothing is filtered, shuffled, padded or cleaned here, and no window crosses the end of the text.
"""

import hashlib
import importlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..quant.errors import CalibrationError, nearest_name

_BUNDLED = ("calib", "eval")
_DATASET_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.%\[\]-]+))?")
_STREAMED_SURPLUS = 8  # streamed sets: read this many times the tokens that the windows cover


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int | None
    bos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """`["input_ids"]` of `text`."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool) -> Any:
        """A conversation as the text that the model was trained on."""
        ...


@dataclass(frozen=True)
class TokenText:
    """A whole text as tokens.

    ids: int64 [tokens]. text_sha256: of the file's bytes (streamed sets: of what was read).
    source: file name, "bundled" or data-set id; never a path.
    """

    ids: torch.Tensor
    text_sha256: str
    source: str


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows that a model is run on to collect statistics.

    windows: int64 [samples, length]. n_tokens_available: tokens of the text they were drawn from.
    text_sha256, source: as in `TokenText`.
    """

    windows: torch.Tensor
    text_sha256: str
    source: str
    seed: int
    n_tokens_available: int

    def fingerprint(self) -> dict[str, Any]:
        """What the manifest records: equal fingerprints mean equal windows."""
        samples, length = self.windows.shape
        ids = self.windows.contiguous().numpy().astype("<i8").tobytes()
        return {
            "windows_sha256": hashlib.sha256(ids).hexdigest(),
            "text_sha256": self.text_sha256,
            "source": self.source,
            "samples": samples,
            "length": length,
            "seed": self.seed,
            "n_tokens_available": self.n_tokens_available,
        }


def load_calibration(
    spec: str | Path | None,
    tokenizer: Tokenizer,
    samples: int,
    length: int,
    seed: int,
    *,
    context: int | None = None,
    first_token: int | None = None,
) -> CalibrationSet:
    """Draw `samples` random windows of `length` tokens from `spec` (see the module's text).

    context: the model's longest sequence, if known. first_token: replaces the first token of every
    window (`window_start`). CalibrationError: a missing, empty, undecodable or too short text, a
    malformed line, a window longer than the context, sizes below 1.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise CalibrationError(f"calibration {name} must be at least 1, got {value}")
    if context is not None and length > context:
        raise CalibrationError(
            f"calibration length {length} is beyond the model's context of {context} tokens; "
            f"use a length of at most {context}"
        )
    text = load_tokens(spec, tokenizer, "calib", enough=samples * length * _STREAMED_SURPLUS)
    require_tokens(text, length)
    windows = draw_windows(text.ids, samples, length, seed)
    if first_token is not None:
        windows[:, 0] = first_token
    return CalibrationSet(windows, text.text_sha256, text.source, seed, text.ids.numel())


def draw_windows(ids: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """Windows int64 [samples, length] of `ids` [tokens], starting at seeded uniform offsets."""
    generator = torch.Generator().manual_seed(seed)
    last = ids.numel() - length
    starts = torch.randint(0, last + 1, (samples, 1), generator=generator)
    return ids[starts + torch.arange(length)]


def require_tokens(text: TokenText, length: int) -> None:
    """CalibrationError unless `text` holds at least one window of `length` tokens."""
    if text.ids.numel() < length:
        raise CalibrationError(
            f"{text.source}: the text has {text.ids.numel()} tokens, one window needs {length}; "
            f"give a longer text or a shorter length"
        )


def window_start(model_type: str, tokenizer: Tokenizer) -> int | None:
    """The token that every window must open with, or None.

    Only the Gemma family asks for one: without it, its first positions have activations that
    never occur in use.
    """
    return tokenizer.bos_token_id if model_type.startswith("gemma") else None


def bundled_text(kind: str) -> str:
    """The text that ships with fewbit: "calib" or "eval" (disjoint)."""
    return _bundled_bytes(kind).decode("utf-8")


def _bundled_bytes(kind: str) -> bytes:
    if kind not in _BUNDLED:
        raise CalibrationError(
            f"unknown bundled text {kind!r}{nearest_name(kind, _BUNDLED)}; "
            f"there are {' and '.join(_BUNDLED)}"
        )
    data = importlib.resources.files(__package__.rpartition(".")[0] + ".quant") / "data"
    return (data / f"{kind}.txt").read_bytes()


def load_tokens(
    spec: str | Path | None, tokenizer: Tokenizer, bundled: str, *, enough: int | None = None
) -> TokenText:
    """All tokens of `spec`; None means the bundled text of that kind ("calib" or "eval").

    enough: tokens after which a streamed data set is read no further; files are read whole.
    """
    if spec is None:
        raw = _bundled_bytes(bundled)
        return _join([raw.decode("utf-8")], tokenizer, raw, "bundled")
    path = Path(spec).expanduser()
    if path.is_dir():
        raise CalibrationError(f"{spec} is a folder; give a .txt or .jsonl file in it")
    if path.suffix in (".txt", ".jsonl"):
        raw = _read_bytes(path)
        text = _decode(raw, path.name)
        documents = [text] if path.suffix == ".txt" else list(_jsonl(text, path.name, tokenizer))
        return _join(documents, tokenizer, raw, path.name)
    if path.is_file():
        raise CalibrationError(
            f"{path.name}: calibration text is a .txt or .jsonl file, got "
            f"{path.suffix or 'no ending'!r}; rename or convert it"
        )
    return _streamed(str(spec), tokenizer, enough)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(f"there is no file {path}; check the path of the text") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            f"convert it (iconv -t UTF-8)"
        ) from error


def _jsonl(text: str, name: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The document of every line that is not blank."""
    # Not splitlines(): it also cuts at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{where} is not JSON: {error}") from error
        yield _document(record, where, tokenizer)


def _document(record: object, where: str, tokenizer: Tokenizer) -> str:
    """The text of one record, {"text": str} or {"messages": [{"role": str, "content": str}]}."""
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return _chat(record["messages"], where, tokenizer)
    found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
    raise CalibrationError(
        f'{where}: expected an object with "text" (a string) or "messages" (a list), got {found}'
    )


def _chat(messages: list[Any], where: str, tokenizer: Tokenizer) -> str:
    from jinja2.exceptions import TemplateError  # the template engine comes with torch

    if not tokenizer.chat_template:
        raise CalibrationError(
            f'{where} has "messages", but the tokenizer has no chat template; give "text" instead'
        )
    for message in messages:
        parts = message if isinstance(message, dict) else {}
        if not isinstance(parts.get("role"), str) or not isinstance(parts.get("content"), str):
            raise CalibrationError(
                f'{where}: every message needs "role" and "content" strings, got {message!r:.80}'
            )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise CalibrationError(f"{where}: the chat template refuses it: {error}") from error


def _join(documents: list[str], tokenizer: Tokenizer, raw: bytes, source: str) -> TokenText:
    """Tokenise and concatenate, the end-of-text token between documents."""
    ids: list[int] = []
    for document in documents:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += _tokenize(document, tokenizer)
    if not ids:
        raise CalibrationError(f"{source}: the text is empty; give one with words in it")
    tensor = torch.tensor(ids, dtype=torch.int64)
    return TokenText(tensor, hashlib.sha256(raw).hexdigest(), source)


def _tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    # verbose=False: a whole text is longer than the context on purpose, no need to warn of it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _streamed(spec: str, tokenizer: Tokenizer, enough: int | None) -> TokenText:
    """The leading documents of a data set on the hub."""
    match = _DATASET_ID.fullmatch(spec)
    if match is None:
        raise CalibrationError(
            f"no such calibration text: {spec!r}; allowed are a .txt or .jsonl file, or a hub "
            f"data set as org/name or org/name:split"
        )
    documents: list[str] = []
    n_tokens = 0
    for index, record in enumerate(_records(match[1], match[2] or "train")):
        document = _document(record, f"{spec} record {index}", tokenizer)
        documents.append(document)
        n_tokens += len(_tokenize(document, tokenizer))
        if enough is not None and n_tokens >= enough:
            break
    return _join(documents, tokenizer, "\0".join(documents).encode(), spec)


def _records(name: str, split: str) -> Iterable[object]:
    """Records of a hub data set, in its own order; CalibrationError where it cannot be had."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise CalibrationError(
            f"{name!r} is no local file, and HF_HUB_OFFLINE forbids asking the hub; "
            f"give a .txt or .jsonl file, or unset HF_HUB_OFFLINE"
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"{name!r} is no local file; to read it from the hub, run: pip install datasets"
        ) from error
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # unreachable, unknown, private; no such split
        raise CalibrationError(
            f"the hub data set {name!r} (split {split!r}) cannot be read: {error}; "
            f"check its name and the network, or give a .txt or .jsonl file"
        ) from error

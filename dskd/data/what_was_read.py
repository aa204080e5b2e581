"""What the sources of prepared rows held: counted while they are read, kept in the rows' manifest,
said whenever a run uses them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_SHOWN = 80


class DomainRead(BaseModel):
    """What was read of one domain.

    Attributes:
        documents: those that were taken (or examples, or questions), by the split that they are of.
        skipped: rows that were left out because they have no text, or not all of their cells.
        hidden: hidden files and folders that were left out.
        longest: characters of the longest document.
        longest_tokens: of the longest document of those that were read as tokens.
        example: how the first one begins, on one line.
    """

    model_config = ConfigDict(extra="forbid")

    documents: dict[str, int] = {}
    skipped: int = Field(0, ge=0)
    hidden: int = Field(0, ge=0)
    longest: int = Field(0, ge=0)
    longest_tokens: int = Field(0, ge=0)
    example: str = ""

    def take(self, split: str, text: str) -> None:
        """Count one document."""
        self.documents[split] = self.documents.get(split, 0) + 1
        self.longest = max(self.longest, len(text))
        self.example = self.example or _beginning(text)

    def take_tokens(self, split: str, documents: int, longest: int, example: str) -> None:
        """Count some documents that were read as tokens, of which the longest has so many;
        ``example`` is how the first one begins."""
        self.documents[split] = self.documents.get(split, 0) + documents
        self.longest_tokens = max(self.longest_tokens, longest)
        self.example = self.example or _beginning(example)

    def skip(self) -> None:
        """Count one row that is left out."""
        self.skipped += 1


def _beginning(text: str) -> str:
    words = " ".join(text[: 8 * _SHOWN].split())
    plain = "".join(letter if letter.isprintable() else " " for letter in words)
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN].rstrip()} ..."


def read_lines(manifest: dict[str, Any]) -> list[str]:
    """The rows of a manifest in a few lines for a reader, a domain each; rows that were prepared
    before this was counted have one line.

    Args:
        manifest: of prepared rows, checked.
    """
    splits = {
        name: f"{of['rows']:,} rows of {of['tokens']:,} tokens"
        for name, of in manifest["splits"].items()
    }
    rows = splits.get("rows") or f"{splits['train']} to train on, {splits['validation']} held out"
    what = "examples" if "classes" in manifest else "documents"
    what = "questions" if "questions" in manifest else what
    read = {name: DomainRead.model_validate(of) for name, of in manifest.get("read", {}).items()}
    lines = [f"data: {rows}", *(_domain_line(name, what, of) for name, of in read.items())]
    return [*lines, *_text_lines(manifest)]


def _text_lines(manifest: dict[str, Any]) -> list[str]:
    """How many bytes the rows to evaluate on stand for, or why that is not known; nothing of rows
    that are no plain text of a causal LM."""
    settings = manifest.get("settings", {})
    if settings.get("objective") != "causal" or settings.get("questions") is not None:
        return []
    if "texts" not in manifest:
        text = "these rows were prepared before bytes were counted; without their folder they are"
        return [f"  no bits per byte: {text} prepared again, the same"]
    return [
        f"  no bits per byte: {text['hidden']}"
        if text["hidden"]
        else f"  {sum(of['bytes'] for of in text['domains'].values()):,} bytes to evaluate on"
        for text in manifest["texts"].values()
    ]


def _domain_line(name: str, what: str, read: DomainRead) -> str:
    parts = [f"{sum(read.documents.values()):,} {what}"]
    if held := read.documents.get("validation", 0):
        parts.append(f"{held:,} held out")
    if read.skipped:
        why = "incomplete" if what == "examples" else "without text"
        parts.append(f"{read.skipped:,} {why} skipped")
    if read.hidden:
        parts.append(f"{read.hidden:,} hidden files or folders left out")
    if read.longest or not read.longest_tokens:
        parts.append(f"the longest {read.longest:,} characters")
    if read.longest_tokens:
        parts.append(f"the longest {read.longest_tokens:,} tokens")
    return f"  {name}: {', '.join(parts)}; the first: {read.example}"

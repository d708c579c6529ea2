"""Digests: a result file carries one of itself, and those of the files beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_MARK = b',\n "seal": "'
_END = b'"\n}\n'


class Broken(ValueError):
    """A sealed text that is not the one that was sealed."""


def sealed(text: str) -> str:
    """Return a JSON object, written with `indent=1`, with the digest of its text as last key `seal`."""
    body = text.rstrip().removesuffix("}").rstrip().encode()
    return (body + _MARK + hashlib.sha256(body).hexdigest().encode() + _END).decode()


def unsealed(content: bytes) -> tuple[bytes, bool]:
    """Return a JSON object without its seal, and whether it had one. Raises Broken where the seal is not its text's."""
    body, mark, rest = content.rpartition(_MARK)
    if not mark:
        return content, False
    if rest != hashlib.sha256(body).hexdigest().encode() + _END:
        raise Broken("its content is not what was written")
    return body + b"\n}\n", True


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

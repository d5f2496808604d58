"""Digests of the files of a store, which show later damage.

A shard's flag in `progress/` holds the digest and length of the shard's file. The digest also
covers the store's identity and the file's key, so it detects a file that was moved to another
place, with or without its flag, as well as a changed file.

A digest shows damage. It does not show who wrote a store: an attacker who changes a file can
change its digest too (see `docs/trust.md`).
"""

from __future__ import annotations

import hashlib
import struct

SEAL_BYTES = 40  # SHA-256, and the length as a little-endian 64-bit integer


def seal(identity: bytes, key: str, data: bytes) -> bytes:
    """Return the digest and length of `data`, bound to file `key` of store `identity`."""
    digest = hashlib.sha256(identity)
    digest.update(key.encode() + b"\0")
    digest.update(data)
    return digest.digest() + struct.pack("<Q", len(data))


def sealed_size(sealed: bytes) -> int:
    """Return the length of the sealed file, in bytes."""
    return int.from_bytes(sealed[-8:], "little")


def digest_of(data: bytes) -> str:
    """Return the SHA-256 (hex) of a file of the layout."""
    return hashlib.sha256(data).hexdigest()

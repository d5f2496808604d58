"""Digests: what a file of a store held when it was written.

A unit's flag in `progress/` holds the digest of the unit's file and its length. The digest covers
the store's identity and the file's key as well, so that a file which is put in another's place,
with or without its flag, is noticed like one that was changed.

A digest shows damage. It does not show who wrote a store: whoever changes a file on purpose can
change its digest too (see `docs/trust.md`).
"""

from __future__ import annotations

import hashlib
import struct

SEAL_BYTES = 40  # SHA-256, and the length as a little-endian integer of 64 bits


def seal(identity: bytes, key: str, data: bytes) -> bytes:
    """`SEAL_BYTES` bytes that stand for `data` in the file `key` of the store `identity`."""
    digest = hashlib.sha256(identity)
    digest.update(key.encode() + b"\0")
    digest.update(data)
    return digest.digest() + struct.pack("<Q", len(data))


def sealed_size(sealed: bytes) -> int:
    """The length of the file for which `sealed` stands."""
    return int.from_bytes(sealed[-8:], "little")


def digest_of(data: bytes) -> str:
    """SHA-256 of a file of the layout, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()

"""Credentials: refused in URLs and options (the environment holds them), removed from messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from patchsweep.errors import StoreError

_OPTION = re.compile(
    r"^(key|token|secret|credentials?)$|secret|passw|_key$|_token$|connection_string", re.I
)
_VARIABLE = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.I)
_SIGNED = re.compile(r"([?&](?:X-Amz-[A-Za-z-]+|Signature|sig|AWSAccessKeyId|token)=)[^&\s]+", re.I)
_USER = re.compile(r"://[^/@\s]+@")
# a password may hold slashes, so it extends from the colon after the user to the last @
_PASSWORD = re.compile(r"://[^/@\s]*:\S*@")
_PORT = re.compile(r"://[^/@:\s]+:\d+/")  # a port, not a password; the @ is in the path
_ACCESS_KEY = re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{12,}")
# protocols whose address begins with a bucket: text before an @ can only be credentials
_BUCKETS = re.compile(r"^(s3|s3a|gs|gcs)://[^/\s]*@", re.I)
_SHORTEST = 8  # shorter values of the environment, such as "false", are not secrets


def scrub(text: str) -> str:
    """Remove users and passwords of URLs, signatures and the environment's secrets from `text`."""
    text = _PASSWORD.sub("://***@", text)
    text = _USER.sub("://***@", text)
    text = _SIGNED.sub(r"\1***", text)
    text = _ACCESS_KEY.sub("***", text)
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value) >= _SHORTEST:
            for shape in (value, quote(value, safe="")):
                text = text.replace(shape, "***")
    return text


def refuse_credentials(url: str, storage_options: Mapping[str, Any]) -> None:
    """Raise if an address or options hold credentials, which would get into configs and logs.

    Raises:
        StoreError: `url` or `storage_options` hold credentials.
    """
    password = _PASSWORD.search(url) and not _PORT.search(url)
    if password or any(p.search(url) for p in (_BUCKETS, _SIGNED, _ACCESS_KEY)):
        where = f"a store's URL carries no credentials, but {scrub(url)!r} did"
    elif name := _secret_option(storage_options):
        where = f"storage_options carry no credentials, but {name!r} is one"
    else:
        return
    raise StoreError(
        f"{where}; leave them out and set them in the environment (for S3: AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY)"
    )


def _secret_option(options: Mapping[str, Any]) -> str | None:
    for name, value in options.items():
        if _OPTION.search(str(name)):
            return str(name)
        if isinstance(value, Mapping) and (inner := _secret_option(value)):
            return inner
    return None

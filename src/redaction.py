"""What must not leave this machine is taken out of whatever does: keys, tokens, passwords."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
_SECRET_NAME = re.compile(
    r"(?i)(?:^|[._\-])(?:key|token|secret|password|passwd|passphrase|credentials?|apikey|auth|authorization)$"
)
_SECRET_VARIABLE = re.compile(
    r"(?i)(?:key|token|secret|passw(?:or)?d|passphrase|credentials?)(?:_|$)|(?:^|_)(?:auth|pat|pass)(?:_|$)"
)
_SHORTEST = 8
"""Of a variable's value that is taken out wherever it stands: shorter ones are found in harmless words."""
_USERINFO = re.compile(r"(?<=://)[^\s/'\"<>]+@")
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_\-]{16,}"
    r"|\b(?:hf|gh[pousr]|github_pat|glpat|xox[abprs]|npm|pypi)[-_][A-Za-z0-9_\-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\b(?:AIza|dapi)[A-Za-z0-9_\-]{30,}"
    r"|\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*",
    re.DOTALL,
)
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9+/=_.\-]{12,}")
_ASSIGNED = re.compile(
    r"(?i)((?:api_?key|access_?key|private_?key|secret|passw(?:or)?d|passphrase|authorization)"
    r"\\?[\"']?\s*[:=]\s*\\?[\"']?)([^\s\"'\\&,;()\[\]{}*]{6,})(?=[\s\"'\\&,;}]|$)"
)
_PERHAPS = re.compile(  # of names that may also be harmless: what is quoted, or looks made at random
    r"(?i)((?:token|[._-]key)\\?[\"']?\s*[:=]\s*)"
    r"(\\?[\"'][^\s\"'\\]{8,}(?=\\?[\"'])|(?=[^\s&,;]*\d)[^\s\"'\\&,;()\[\]{}*]{8,}(?=[\s\"'\\&,;}]|$))"
)
_HARMLESS = {"none", "null", "true", "false"}


def redacted(text: str) -> str:
    """The text with every secret masked: values of secret variables, passwords in addresses, known forms of keys.

    >>> redacted("postgresql://ann:s3cret@db/mlflow and api_key=abcdefgh12")
    'postgresql://***@db/mlflow and api_key=***'
    """
    for value in _secret_values():
        text = text.replace(value, MASK)
    text = _BEARER.sub(rf"\1{MASK}", _KEYS.sub(MASK, _USERINFO.sub(f"{MASK}@", text)))
    return _PERHAPS.sub(_masked, _ASSIGNED.sub(_masked, text))


def _masked(found: re.Match[str]) -> str:
    name, value = found.groups()
    bare = value.lstrip("\\\"'")
    harmless = bare.lower() in _HARMLESS or _is_number(bare)
    return found[0] if harmless else name + value[: len(value) - len(bare)] + MASK


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[-+]?(\d{1,12}|(?=[^.eE]*[.eE])\d*\.?\d*([eE][-+]?\d+)?)", value) is not None


def redacted_values(value: Any, name: str = "") -> Any:  # noqa: ANN401 - any JSON value
    """The same for nested plain values; whatever stands under the name of a secret is masked as a whole.

    >>> redacted_values({"endpoint": {"key": "abc", "url": "http://a:b@c"}, "key_env": "NAME"})
    {'endpoint': {'key': '***', 'url': 'http://***@c'}, 'key_env': 'NAME'}
    """
    if isinstance(value, Mapping):
        return {redacted(str(key)): redacted_values(inner, str(key)) for key, inner in value.items()}
    if value is not None and _SECRET_NAME.search(name):
        return MASK
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Sequence):
        return [redacted_values(inner, name) for inner in value]
    return value


def without_credentials(uri: str) -> str:
    """An address as it may be stored and printed: without user and password, and without a query.

    >>> without_credentials("https://ann:s3cret@host:5000/x?token=1")
    'https://host:5000/x'
    """
    return _USERINFO.sub("", uri, count=1).partition("?")[0]


def _secret_values() -> list[str]:
    """Values of variables whose name speaks of a secret, in every spelling; longer ones first: one may hold another."""
    found: set[str] = set()
    for name, value in os.environ.items():
        # A variable may name the file in which a key is; no file has a longer name.
        is_secret = _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST
        if is_secret and (len(value) > 255 or not Path(value).exists()):
            found |= {value, json.dumps(value)[1:-1], quote(value, safe=""), quote_plus(value)}
    return sorted(found, key=len, reverse=True)

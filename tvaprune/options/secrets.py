"""Passwords and access tokens in text: kept out of messages, and refused in what is written down."""

import re

# user:password@ of a URL, and tokens of a hub, a forge, and a store.
_SECRET = re.compile(
    r"(?<=://)[^/\s@'\"]+(?=@)|\bhf_[A-Za-z0-9]{16,}|\bgh[opsu]_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
)


def has_secret(text: str) -> bool:
    """Whether a text holds what looks like a password in a URL or an access token."""
    return _SECRET.search(text) is not None


def without_secrets(text: str) -> str:
    """The text with *** in the place of every such password and token."""
    return _SECRET.sub("***", text)

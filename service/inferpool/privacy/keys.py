"""The keys of samples: one encrypts, all decrypt, and each is derived into one key for each purpose.

A file of keys has a line for each key, `ID BASE64`, 32 bytes each. The first one encrypts. To rotate, put a
new line on top; remove the old line once its samples have expired, and what is left of them is unreadable.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final

from inferpool.errors import ConfigError
from inferpool.system.files import read_file
from inferpool.system.install_hints import install_command

KEYS_VARIABLE: Final = "INFERPOOL_SAMPLES_KEYS"
"""The variable that may hold the keys themselves, in place of a file."""
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_MOST_BYTES: Final = 64 * 1024
_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_HASHES: Final = 1 << 64
_HASH_DIGITS: Final = 32
"""Hexadecimal digits of a hashed value: 128 bits."""


class _Key:
    """One key, and what is derived from it (HKDF-SHA256): a key for each purpose."""

    def __init__(self, name: str, secret: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError:
            raise ConfigError(f"samples need cryptography: {install_command('privacy')}") from None

        def derived(purpose: bytes) -> bytes:
            return HKDF(SHA256(), _KEY_BYTES, None, b"inferpool samples: " + purpose).derive(secret)

        self.name = name
        self.cipher = AESGCM(derived(b"encryption"))
        self.lookup = derived(b"lookup")
        self.choice = derived(b"choice")
        self.fields = derived(b"fields")


class SampleKeys:
    """The keys of a server."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """The first of `keys`, secrets of 32 bytes by their ids, encrypts. Raises ConfigError."""
        self._keys = {name: _Key(name, secret) for name, secret in keys.items()}
        self._first = next(iter(self._keys.values()))
        self.choice_key: Final = self._first.choice

    @property
    def current(self) -> str:
        """The id of the key that encrypts."""
        return self._first.name

    @property
    def names(self) -> list[str]:
        """The ids of all keys."""
        return list(self._keys)

    def encrypt(self, content: bytes, about: bytes) -> bytes:
        """`content` by AES-256-GCM, after its random nonce; `about` is authenticated, and not encrypted."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed: bytes = self._first.cipher.encrypt(nonce, content, about)
        return nonce + sealed

    def decrypt(self, name: str, sealed: bytes, about: bytes) -> bytes | None:
        """What `encrypt` got with the key `name`; None if the key is gone or the bytes were changed."""
        from cryptography.exceptions import InvalidTag

        key = self._keys.get(name)
        try:
            return (
                None
                if key is None
                else key.cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
            )
        except (InvalidTag, ValueError):
            return None

    def token(self, kind: str, text: str, name: str | None = None) -> bytes:
        """What stands for a request id or a tenant beside a sample: found by it, and not read from it."""
        key = self._first if name is None else self._keys[name]
        return hmac.digest(key.lookup, f"{kind}\0{text}".encode(), "sha256")

    def hashed(self, field: str, text: str) -> str:
        """A keyed hash of a value of `field`, HMAC-SHA256: equal values have equal ones until a rotation."""
        return hmac.new(self._first.fields, f"{field}\0{text}".encode(), "sha256").hexdigest()[:_HASH_DIGITS]


def is_chosen(key: bytes, request_id: str, threshold: int) -> bool:
    """Whether the request is one of the share that `threshold_of` has made a threshold of.

    The hash has a key, so that nobody can choose an id that is never kept, or always.
    """
    digest = blake2b(request_id.encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") < threshold


def threshold_of(share: float) -> int:
    """The threshold of `is_chosen` for a share of the requests, 0 to 1."""
    return int(share * _HASHES)


def read_keys(file: Path | None, variable: str | None = None) -> SampleKeys | None:
    """The keys in `file`, or else in the text of a `variable`; None without either.

    Raises ConfigError, which names the line, and never its content.
    """
    if file is None and not variable:
        return None
    source = KEYS_VARIABLE if file is None else str(file)
    try:
        text = (variable or "").replace(",", "\n") if file is None else read_file(file, _MOST_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not a text file") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        try:
            secret = base64.b64decode(parts[1], validate=True) if len(parts) == 2 else b""
        except (binascii.Error, ValueError):
            secret = b""
        if not _ID.fullmatch(parts[0]) or parts[0] in keys or len(secret) != _KEY_BYTES:
            raise ConfigError(
                f"{source}: line {number} is no key; expected an id of its own, a space, and 32 bytes in"
                " base64, as `inferpool samples new-key` writes them"
            )
        keys[parts[0]] = secret
    if not keys:
        raise ConfigError(f"{source}: there are no keys; `inferpool samples new-key` makes one")
    return SampleKeys(keys)


def add_key(file: Path, name: str) -> None:
    """Make a key, and put it on top of `file`, which only its owner may read; raises ConfigError, OSError."""
    if not _ID.fullmatch(name):
        raise ConfigError(f"{name[:40]!r} is no id; expected at most 32 letters, digits, dots and dashes")
    before = ""
    if file.exists():
        before = read_file(file, _MOST_BYTES).decode()
        if any(line.split()[:1] == [name] for line in before.splitlines()):
            raise ConfigError(f"{file} has a key {name} already")
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    line = f"{name} {base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()}\n"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(line + before)
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

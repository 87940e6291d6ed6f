"""Who may ask: one line for each tenant's key, of which only the hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from psa_vlm.errors import ConfigError
from psa_vlm.strict_yaml import read_yaml

PREFIX = "psa-"
_DIGEST = 64


def new_key() -> str:
    """A random key: 256 bits, so that its plain SHA-256 can't be guessed back."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


class Keys:
    """The keys of all tenants.

    Args:
        hashes: tenant -> the hashes of its keys; two while one replaces the other.

    Raises:
        ConfigError: a hash is malformed, or stands for two tenants.
    """

    def __init__(self, hashes: Mapping[str, Sequence[str]]) -> None:
        self.hashes = {name: tuple(ones) for name, ones in hashes.items()}
        every = [one for ones in self.hashes.values() for one in ones]
        for one in every:
            if len(one) != _DIGEST or set(one) - set("0123456789abcdef"):
                raise ConfigError("keys: not the hash of a key; make one with 'psa-vlm keys add'")
        if len(set(every)) < len(every):
            raise ConfigError("keys: the same key stands there twice; take one out")

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """Read a YAML file: for each tenant, a list of hashes.

        Raises:
            ConfigError: it can't be read, or is no such list.
        """
        data = read_yaml(path)
        if not isinstance(data, dict) or not all(
            isinstance(name, str)
            and isinstance(ones, list)
            and all(isinstance(one, str) for one in ones)
            for name, ones in data.items()
        ):
            raise ConfigError(f"{path}: write a list of key hashes for each tenant")
        try:
            return cls(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads."""
        data = {name: list(ones) for name, ones in self.hashes.items()}
        Path(path).write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")

    def tenant(self, key: str) -> str | None:
        """Whose key it is, or None; every hash is compared, so that time tells nothing."""
        given, found = hash_key(key), None
        for name, ones in self.hashes.items():
            for one in ones:
                if hmac.compare_digest(one, given):
                    found = name
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

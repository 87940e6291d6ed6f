"""Keys: one for each tenant, of which only the hash is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from psa_vlm.errors import ConfigError
from psa_vlm.serving.keys import Keys, hash_key, is_loopback, new_key


def test_a_key_finds_its_tenant_and_no_other(tmp_path: Path) -> None:
    old, new, other = new_key(), new_key(), new_key()
    path = tmp_path / "keys.yaml"
    Keys({"school": [hash_key(old), hash_key(new)], "press": [hash_key(other)]}).save(path)
    assert old not in path.read_text()
    keys = Keys.load(path)
    assert [keys.tenant(key) for key in (old, new, other)] == ["school", "school", "press"]
    for wrong in ("", new_key(), old[:-1], hash_key(old), old.upper(), "\ud800"):
        assert keys.tenant(wrong) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("school: secret", "write a list of key hashes"),
        ("- a", "write a list of key hashes"),
        ("", "write a list of key hashes"),
        ("school: [psa-plain]", "not the hash of a key"),
        (f"a: [{'1a' * 32}]\nb: [{'1a' * 32}]", "stands there twice"),
        (f"a: [{'1a' * 32}]\na: [{'1b' * 32}]", "given twice"),
    ],
)
def test_a_malformed_file_is_an_error(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        Keys.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_what_a_loopback_is(host: str, local: bool) -> None:
    assert is_loopback(host) is local

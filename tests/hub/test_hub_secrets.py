"""Tokens, passwords and signed addresses: sent where they belong, and shown to nobody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, get_token

from bundle_helpers import failed, invoke
from gguf_builder import small_model
from hub_server import FakeHub, fresh, serving

MODEL = small_model().build()
NAME = "tiny-Q6_K.gguf"
TOKEN = "hf_VerySecretToken0123456789"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fresh(tmp_path, monkeypatch) as served:
        served.add("org/tiny", {NAME: MODEL})
        yield served


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")
    with serving() as storage:
        storage.repositories = hub.repositories
        hub.storage = storage.endpoint.replace("127.0.0.1", "localhost")  # another host by its name
        assert invoke("org/tiny:Q6_K", "out").exit_code == 0
        assert {asked.headers["authorization"] for asked in hub.asked} == {f"Bearer {TOKEN}"}
        assert ["authorization" in asked.headers for asked in storage.asked] == [False]


def test_a_token_in_a_file_is_not_used(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert get_token() == TOKEN
    assert invoke("org/tiny:Q6_K", "out").exit_code == 0
    assert len(hub.contents()) == 1
    assert all("authorization" not in asked.headers for asked in hub.asked)


Patch = pytest.MonkeyPatch


def break_listing(hub: FakeHub, monkeypatch: Patch) -> None:
    hub.listing_failures = [503]


def break_storage(hub: FakeHub, monkeypatch: Patch) -> None:
    hub.storage = "http://127.0.0.1:1"


def break_xet(hub: FakeHub, monkeypatch: Patch) -> None:
    """Its package's errors quote addresses."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("error sending request for url (http://storage?signature=very-secret)")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)


def gate(hub: FakeHub, monkeypatch: Patch) -> None:
    hub.add("org/tiny", {NAME: MODEL}, gated=True, token="another")


def hide(hub: FakeHub, monkeypatch: Patch) -> None:
    hub.add("org/tiny", {NAME: MODEL}, token="another")


@pytest.mark.parametrize(
    ("spoil", "code", "cause"),
    [
        (break_listing, 4, "answers with HTTP status 503"),
        (break_storage, 4, "cannot be read from: Connection refused"),
        (break_xet, 4, f"{NAME}: Xet could not download it"),
        (gate, 3, "org/tiny is gated: its terms have to be accepted, and HF_TOKEN is of an account without access"),
        (hide, 3, "has no repository org/tiny, or the account of HF_TOKEN may not see it"),
    ],
)
def test_the_token_is_never_shown(
    spoil: Callable[[FakeHub, Patch], None], code: int, cause: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    spoil(hub, monkeypatch)
    result = invoke("org/tiny:Q6_K", "out", "--verbose", "--json")
    assert result.exit_code == code
    assert cause in json.loads(result.stdout)["error"]
    assert "Traceback (most recent call last)" in result.stderr
    assert any(asked.headers.get("authorization") == f"Bearer {TOKEN}" for asked in hub.asked)
    for secret in (TOKEN, TOKEN[:12], "signature", "very-secret"):
        assert secret not in result.output


def test_without_a_token_a_gated_repository_says_so(hub: FakeHub, monkeypatch: Patch) -> None:
    gate(hub, monkeypatch)
    failed(invoke("org/tiny:Q6_K", "out"), 3, "is gated: its terms have to be accepted, and no HF_TOKEN", "Accept")


@pytest.mark.parametrize("token", [f"{TOKEN}\x01x", f"{TOKEN} x", f"{TOKEN}é", f"{TOKEN}\nx: y", TOKEN * 100])
def test_a_token_that_is_none_is_not_sent_and_not_shown(
    token: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    result = invoke("org/tiny:Q6_K", "out", "--verbose")
    assert result.exit_code == 2
    assert "HF_TOKEN holds characters that no token has" in result.stderr
    assert TOKEN not in result.output
    assert hub.asked == []


@pytest.mark.parametrize("endpoint", ["secret-host", "ftp://secret", "http://[secret", "http://secret:99999", ""])
def test_an_endpoint_that_is_none_is_not_shown(
    endpoint: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    result = invoke("org/tiny:Q6_K", "out", "--verbose")
    assert result.exit_code == 2, result.output
    assert "HF_ENDPOINT is not an address" in result.stderr
    assert "secret" not in result.output


def test_the_password_in_an_endpoint_is_not_shown(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint.replace("//", "//me:password@"))
    result = invoke("org/none:Q6_K", "out", "--verbose", "--json")
    assert result.exit_code == 3
    assert ":password@" not in result.output
    assert ":password@" not in invoke("org/tiny:Q6_K", "out", "--verbose", "--json").output

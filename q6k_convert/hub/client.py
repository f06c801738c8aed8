"""Talking to the Hugging Face Hub: its listing of a repository, its files' content.

Settings and the session are huggingface_hub's. Requests are not: what answers is untrusted, so its length is
bounded, its words are not repeated, and no error tells an address, for those may carry signatures and names.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from q6k_convert import __version__
from q6k_convert.errors import UsageError
from q6k_convert.hub.names import MAX_LISTING_BYTES

_WAIT_SECONDS = 1.0  # before the first new attempt; doubled each time, 8 s at most
_PASSING = {408, 429, 500, 502, 503, 504}
_ERROR_CODE = re.compile(r"[A-Za-z]{1,40}")

T = TypeVar("T")


class RefusedError(Exception):
    """The Hub answered with an error.

    Attributes:
        status: of HTTP.
        code: the Hub's word for it (`GatedRepo`, `RevisionNotFound`, …), or "".
    """

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"HTTP status {status} {code}".rstrip())
        self.status = status
        self.code = code


class UnreachableError(Exception):
    """The Hub did not answer, or broke off; the text says how, without addresses."""


class Client:
    """The Hub that HF_ENDPOINT names, as the holder of HF_TOKEN, if that is set.

    Raises:
        UsageError: one of the two cannot be what it should be. Neither is repeated, for both may be secret.
    """

    def __init__(self) -> None:
        from huggingface_hub import constants

        # Its warnings quote addresses, and those of storage carry signatures.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self.endpoint: str = constants.ENDPOINT
        self.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        self.base = public_address()
        # Only from the environment: a token that lies in a file was not meant for this program.
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and not re.fullmatch(r"[!-~]{1,1000}", token):
            raise UsageError("HF_TOKEN holds characters that no token has", "Set it to the token and nothing else.")
        self.has_token = bool(token)
        # What arrives has to be the file, byte for byte.
        self._headers = {"user-agent": f"q6k-convert/{__version__}", "accept-encoding": "identity"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"

    def listing(self, repository: str, revision: str) -> bytes:
        """What the Hub says of a repository, to be mistrusted: JSON, cut off a little past its largest size.

        Raises:
            RefusedError, UnreachableError: no answer, even after a while.
        """
        address = f"{self.endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"

        def read() -> bytes:
            body = bytearray()
            with self._answer(address, {}) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_LISTING_BYTES:
                        break
            return bytes(body)

        return patiently(read, lambda: 0, retries=2)

    @contextmanager
    def content(self, repository: str, commit: str, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file's content from `start` on: where it really starts (0, if parts are not served), and the bytes."""
        address = f"{self.endpoint}/{repository}/resolve/{commit}/{quote(name)}"
        with self._answer(address, {"range": f"bytes={start}-"} if start else {}) as response:
            stated = str(response.headers.get("content-range", ""))
            part = response.status_code == 206
            if part and not stated.startswith(f"bytes {start}-"):
                raise UnreachableError("another part came than was asked for")
            yield (start if part else 0), response.iter_raw()

    @contextmanager
    def _answer(self, address: str, headers: dict[str, str]) -> Iterator[Any]:
        from huggingface_hub import get_session
        from huggingface_hub.errors import HfHubHTTPError

        # What its transport raises: httpx in releases 1 of the package, httpx2 in releases 2.
        transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
        try:
            # A redirection to another host, which the session follows, loses the token.
            with get_session().stream(
                "GET", address, headers=self._headers | headers, timeout=self.timeout
            ) as response:
                partial = response.status_code == 206 and "range" in headers
                if response.status_code != 200 and not partial:
                    code = str(response.headers.get("x-error-code", ""))
                    raise RefusedError(response.status_code, code if _ERROR_CODE.fullmatch(code) else "")
                yield response
        except transport_error as error:
            raise UnreachableError(_reason(error, self.timeout)) from None


def public_address() -> str:
    """The Hub's address without a name and password, if it has them: what may be printed.

    Raises:
        UsageError: HF_ENDPOINT is no address. It is not repeated.
    """
    from huggingface_hub import constants

    try:
        parts = urlsplit(constants.ENDPOINT)
        host = (parts.hostname or "") + (f":{parts.port}" if parts.port else "")
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise UsageError("HF_ENDPOINT is not an address like https://huggingface.co", "Unset or correct it.")
    return f"{parts.scheme}://{host}"


def patiently(attempt: Callable[[], T], position: Callable[[], int], *, retries: int) -> T:
    """Tries until it succeeds, or fails `retries` + 1 times in a row without getting on."""
    failures, furthest = 0, position()
    while True:
        try:
            return attempt()
        except (UnreachableError, RefusedError) as error:
            # Further than ever: one that has to begin anew each time gets nowhere.
            failures = 1 if position() > furthest else failures + 1
            furthest = max(furthest, position())
            if failures > retries or (isinstance(error, RefusedError) and error.status not in _PASSING):
                raise
        time.sleep(min(8.0, _WAIT_SECONDS * 2 ** (failures - 1)))


def _reason(error: BaseException, timeout: float) -> str:
    """How a transport failed; never with an address or a header in it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    kind = type(error).__name__
    if "Timeout" in kind:
        return f"nothing came for {timeout} s"
    return "the connection broke off" if kind in ("RemoteProtocolError", "ReadError") else kind

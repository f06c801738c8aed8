"""Turn failures of the Hub into this program's errors.

Messages never repeat the text of the Hub or of huggingface_hub: it may hold signed addresses or the token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from q6k_convert.errors import InputRejectedError, IOFailedError, Q6KConvertError
from q6k_convert.hub.names import Reference


@contextmanager
def in_words(reference: Reference, address: str, has_token: bool) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into this program's; errors of the disk pass unchanged.

    Args:
        reference: the file or quantisation asked for.
        address: address of the Hub, without a password.
        has_token: whether a token was sent.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Base class of transport errors: httpx's with huggingface_hub 1, httpx2's with huggingface_hub 2.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except LocalEntryNotFoundError as error:  # wraps whatever went wrong with a request
        raise _failure(error.__cause__ or error, reference, address, has_token) from None
    except (transport_error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _failure(error, reference, address, has_token) from None


def _failure(error: BaseException, reference: Reference, address: str, has_token: bool) -> Q6KConvertError:
    from huggingface_hub import errors

    name, page = reference.repository, f"{address}/{reference.repository}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        has = "HF_TOKEN is of an account without access" if has_token else "no HF_TOKEN is set"
        return reference.reject(
            f"{name} is gated: its terms have to be accepted, and {has}",
            f"Accept them at {page}, and set HF_TOKEN to a token of that account.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return reference.reject(f"{name} has no revision {reference.revision!r}", f"Look at {page}/tree/main.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return reference.reject("a file that it lists is not there", "Run again; name a commit if it stays so.")
    if status in (401, 404):
        why = "the account of HF_TOKEN may not see it" if has_token else "it takes an HF_TOKEN to see it"
        return reference.absent(
            InputRejectedError,
            f"{address} has no repository {name}, or {why}",
            f"Check the name at {page}; if it is private, set HF_TOKEN to a token that may read it.",
        )
    if status in (403, 451):
        return reference.reject(f"{name} is closed to us (HTTP status {status})", f"Look at {page}.")
    return reference.absent(
        IOFailedError,
        f"{address} {f'answers with HTTP status {status}' if status else f'cannot be read from: {_reason(error)}'}",
        "Run the same command again later; HF_HUB_OFFLINE=1 uses what the cache has.",
    )


def _reason(error: BaseException) -> str:
    """Return how a connection failed: the system's message or the error's class, as its text may hold addresses."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return "a file of another length than announced" if type(error) is OSError else type(error).__name__

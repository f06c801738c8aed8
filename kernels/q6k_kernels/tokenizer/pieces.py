"""What tokens are as bytes, in vocabularies of all kinds."""

from __future__ import annotations

from collections.abc import Callable

from q6k_kernels.tokenizer.special import BYTE, NEVER_TEXT, USER_DEFINED

SPACE = "\u2581"
"""Stands for a space in SentencePiece's tokens."""


def _byte_alphabet() -> dict[str, int]:
    """Return the character -> byte map of byte-level vocabularies: printable bytes stand for themselves."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(themselves)]
    return {chr(byte): byte for byte in themselves} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def byte_level_token(text: str) -> str:
    """Return a text as byte-level vocabularies write it: a character for each byte."""
    return "".join(_CHARACTERS[byte] for byte in text.encode())


def byte_level_piece(token: str) -> bytes:
    """Return the bytes of a byte-level token, or its UTF-8 text if it has characters outside that alphabet."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def sentencepiece_piece(token: str) -> bytes:
    """Return the bytes of a SentencePiece token."""
    return token.replace(SPACE, " ").encode()


def byte_token(token: str) -> bytes | None:
    """Return the byte that a token `<0xNN>` stands for; None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None


def token_of_byte(byte: int) -> str:
    """Return the token `<0xNN>` of a byte."""
    return f"<0x{byte:02X}>"


def piece(token: str, kind: int, piece_of: Callable[[str], bytes]) -> bytes:
    """Return the bytes of a token by its type; none of what is never text.

    Args:
        token: its text in the vocabulary.
        kind: its type.
        piece_of: what gives the bytes of an ordinary token of this vocabulary.
    """
    if kind in NEVER_TEXT:
        return b""
    if kind == BYTE and (byte := byte_token(token)) is not None:
        return byte
    if kind == USER_DEFINED and piece_of is byte_level_piece:
        return token.encode()  # matched in a text before its bytes become characters
    return piece_of(token)

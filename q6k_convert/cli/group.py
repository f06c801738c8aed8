"""Typer classes of the program: `convert` is the default command, and help shows no type beside flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

_MEANT = {
    "run": ("To run a bundle's model", ("generate",)),
    **dict.fromkeys(("benchmark", "speed"), ("To measure a bundle's model", ("bench",))),
    **dict.fromkeys(("ppl", "eval", "quality"), ("To compute a perplexity", ("perplexity",))),
    **dict.fromkeys(("complete", "completion", "infer"), ("To continue a text", ("generate",))),
    **dict.fromkeys(("serve", "server"), ("There is no server; to chat", ("chat",))),
    **dict.fromkeys(("info", "show", "list", "ls", "dump"), ("To look inside a file", ("inspect",))),
    **dict.fromkeys(("check", "validate", "test"), ("To check a bundle", ("verify",))),
    **dict.fromkeys(("compile",), ("To compile a model", ("export",))),
    **dict.fromkeys(("download", "pull", "get"), ("To download and convert a file of the Hub", ("convert",))),
    **dict.fromkeys(("quantize", "quantise", "repack"), ("To repack a GGUF file", ("convert",))),
    "help": ("For help", ("--help",)),
    "version": ("For the version", ("--version",)),
}
"""First words that people try -> what they want, and the command that does it."""


class PlainCommand(TyperCommand):
    """Command whose help shows no type beside flags, which take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the command."""
        return _without_flag_types(super().get_params(ctx))


class ConvertByDefault(TyperGroup):
    """Command group that reads `q6k-convert model.gguf out/` as `q6k-convert convert model.gguf out/`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of the program itself."""
        return _without_flag_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `convert` in front unless a command or an option of the program itself comes first."""
        own = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_mistyped(ctx, args)
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def _refuse_mistyped(self, ctx: Any, args: list[str]) -> None:
        from difflib import get_close_matches
        from shlex import join

        word = args[0]
        if Path(word).exists():
            return
        if word in _MEANT:
            want, command = _MEANT[word]
            ctx.fail(f"There is no command {word!r}. {want}: `{join(['q6k-convert', *command, *args[1:]])}`.")
        if close := get_close_matches(word, self.commands, n=1):
            ctx.fail(f"There is no command and no file {word!r}. Did you mean {close[0]!r}?")


def _without_flag_types(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params

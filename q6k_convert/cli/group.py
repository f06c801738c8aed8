"""The program's own way with commands: `convert` is understood where none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.core import TyperGroup


class ConvertByDefault(TyperGroup):
    """`q6k-convert model.gguf out/` is `q6k-convert convert model.gguf out/`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `convert` in front unless a command or an option of the program itself comes first."""
        own = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_mistyped(ctx, args[0])
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def _refuse_mistyped(self, ctx: Any, word: str) -> None:
        from difflib import get_close_matches

        if (close := get_close_matches(word, self.commands, n=1)) and not Path(word).exists():
            ctx.fail(f"There is no command and no file {word!r}. Did you mean {close[0]!r}?")

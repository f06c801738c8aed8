"""Compare what chat templates render here and in transformers, for those in a source tree of llama.cpp.

    python scripts/golden/check_templates.py LLAMA_CPP

Each `models/templates/*.jinja` must give the same text for a few conversations, or fail both times. Exit code 1:
something differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from q6k_kernels.tokenizer.chat import MAX_TEXT
from q6k_kernels.tokenizer.rendering import render_task

_SYSTEM = {"role": "system", "content": "Be brief. /no_think \n"}
_USER = {"role": "user", "content": "  Hi <b>&'\"é\n"}
_ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
CONVERSATIONS = ([_USER], [_SYSTEM, _USER], [_USER, _ANSWER, _USER], [_SYSTEM, _USER, _ANSWER, _USER])
NAMES: tuple[dict[str, str], ...] = (
    {},
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
)


def theirs(template: str, messages: list[dict[str, str]], names: dict[str, str]) -> str | None:
    """Return the text that transformers renders; None if the template fails."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template

    try:
        rendered = render([messages], chat_template=template, add_generation_prompt=True, **names)[0]
    except (TemplateError, TypeError, ValueError):
        return None
    return str(rendered[0])


def main() -> int:
    """Compare all templates; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tree", type=Path, metavar="LLAMA_CPP", help="llama.cpp's source tree")
    args = parser.parse_args()
    files = sorted((args.tree / "models" / "templates").glob("*.jinja"))
    if not files:
        parser.error(f"{args.tree}/models/templates has no *.jinja")
    rendered = failed = different = 0
    for path in files:
        template = path.read_text(encoding="utf-8")
        for messages in CONVERSATIONS:
            for names in NAMES:
                task = {"template": template, "conversations": [messages], "variables": names, "most": MAX_TEXT}
                found, expected = render_task(task), theirs(template, messages, names)
                if found.get("texts", [None]) != [expected]:
                    print(f"{path.name}: expected {expected!r:.300}, found {str(found)[:300]}")
                    different += 1
                rendered, failed = rendered + (expected is not None), failed + (expected is None)
    print(f"{len(files)} templates: {rendered} texts, {failed} failures, {different} differences")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

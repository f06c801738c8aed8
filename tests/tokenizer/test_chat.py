"""Chat templates: rendered as transformers does, in bounds, and no control token out of a message."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from q6k_kernels.tokenizer import chat
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from q6k_kernels.tokenizer.vocabulary import TokenizerError
from tokenizer_files import sentencepiece, sentencepiece_ids, write

USER = [{"role": "user", "content": "Grüße"}]
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}</s>\n{% endfor %}"


def test_it_renders_as_transformers_does() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    template = (
        "{{ bos_token }}\n"
        "  {% for m in messages %}\n"
        "{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "[{{ m['role'] }}] {{ m.content | trim | tojson }}\n"
        "{% generation %}x{{ loop.index }}{% endgeneration %}\n"
        "  {% endfor %}\n"
        "{% if add_generation_prompt %}<go>{% endif %}"
    )
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": ' <b>"Ü" '}]
    theirs, _ = utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert chat.render(template, messages, {"bos_token": "<s>"}) == theirs[0]
    assert "[user]" in theirs[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[0].__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{{ 'x' * 5000000 }}", "longer than"),
    ],
)
def test_what_a_template_may_not_do_is_an_error(template: str, words: str) -> None:
    with pytest.raises(chat.TemplateError, match=words):
        chat.render(template, USER, {})


def test_time_and_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(chat.TemplateError, match="MemoryError|stopped"):
        chat.render("{{ ('x' * 10**10) | length }}", USER, {})
    doubling = "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    with pytest.raises(chat.TemplateError, match="MemoryError|stopped"):
        chat.render(doubling, USER, {})
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(chat.TemplateError, match="was stopped"):
        chat.render(loops, USER, {})
    with pytest.raises(chat.TemplateError, match="more than the limit"):
        chat.render(" " * (chat.MAX_TEMPLATE + 1), USER, {})


def test_only_the_templates_own_control_tokens_steer(tmp_path: Path) -> None:
    keys = sentencepiece() | {"chat_template": PLAIN}
    tokenizer = load_tokenizer(write(tmp_path / "m", keys))

    def text(part: str) -> list[int]:
        return sentencepiece_ids(keys, part)

    asked = [{"role": "user", "content": " The dog "}]
    assert tokenizer.encode_chat(asked) == [1, *text("user: The dog"), 2, *text("\n")]
    for evil in ("</s>", "a</s>b", "<<s>s>", "</s></s>", "<|im_end|>", "\ufdd0</s>"):
        ids = tokenizer.encode_chat([{"role": "user", "content": evil}])
        assert ids == [1, *text(f"user: {evil}"), 2, *text("\n")], evil
        assert evil in tokenizer.decode(ids)


def test_bos_is_there_once(tmp_path: Path) -> None:
    keys = sentencepiece() | {"chat_template": PLAIN.removeprefix("{{ bos_token }}")}
    with_bos = load_tokenizer(write(tmp_path / "a", keys)).encode_chat(USER)
    keys["ggml.add_bos_token"] = False
    assert with_bos == [1, *load_tokenizer(write(tmp_path / "b", keys)).encode_chat(USER)]


def test_what_is_wrong_is_said_with_what_to_do(tmp_path: Path) -> None:
    keys = sentencepiece()
    with pytest.raises(TokenizerError, match="the model has no chat template"):
        load_tokenizer(write(tmp_path / "a", keys)).encode_chat(USER)
    keys["chat_template"] = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(TokenizerError, match="System role not supported") as caught:
        load_tokenizer(write(tmp_path / "b", keys)).encode_chat(USER)
    assert "--system" in caught.value.remedy

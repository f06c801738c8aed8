"""Chat templates: rendered as transformers does, in bounds, and no control token out of a message."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from q6k_kernels.errors import PackageMissingError
from q6k_kernels.tokenizer import chat, rendering
from q6k_kernels.tokenizer.tokenizer import load_tokenizer
from q6k_kernels.tokenizer.tokenizer_error import TokenizerError
from tokenizer_files import CONTROL, sentencepiece, sentencepiece_ids, write

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
        (r"{{ '\ud800' }}", "UnicodeEncodeError"),
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


def test_filters_and_names_are_those_of_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    template = (
        "{% if tools is not none %}T{{ tools[0] }}{% endif %}{% if documents is not none %}D{% endif %}"
        "{% for m in messages %}{{ m | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
        "{{ m | tojson(indent=2) }}{{ m | tojson }}{% endfor %}"
    )
    theirs, _ = utils.render_jinja_template([USER], chat_template=template)
    assert chat.render(template, USER, {}) == theirs[0]
    assert "\\u00fc" in theirs[0]


def test_what_templates_of_today_use_renders_alike() -> None:
    """Macros, namespaces, neighbours in loops, slices, tests of types, methods of texts, whitespace control."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    template = (
        "{%- macro turn(role, text='') -%}\n    <|turn>{{ role }}\n{{ text | trim }}<turn|>\n{% endmacro -%}\n"
        "{#- a comment -#}\n"
        "{%- set seen = namespace(last=none, system='') -%}\n"
        "{%- if messages[0].role in ['system', 'developer'] and messages[0].content is string -%}\n"
        "  {%- set seen.system = messages[0]['content'] -%}{%- set loop_messages = messages[1:] -%}\n"
        "{%- else -%}{%- set loop_messages = messages -%}{%- endif %}\n"
        "{{ (bos_token | default('')) ~ turn('system', seen.system) if seen.system else bos_token }}\n"
        "  {% for m in loop_messages[::-1] | reverse %}\n"
        "{%- if m is not mapping or m.content is iterable and m.content is not string %}{% break %}{% endif %}"
        "{%- set text = m.content.split('</think>')[-1].lstrip('\\n') "
        "if '</think>' in m.content else m.content %}\n"
        "{{ turn(m.role | replace('assistant', 'model') | upper, text) }}"
        "{% if loop.previtem is defined and loop.previtem.role == m.role %}again{% endif %}\n"
        "{% for key, value in m | dictsort %}{{ key }}={{ value[:2] | tojson }}"
        "{{ ', ' if not loop.last }}{% endfor %}"
        "\t{% if m.get('tool_calls') is none or m.tool_calls is undefined %}-{% endif %}\n"
        "  {% endfor %}\n"
        "{{- strftime_now('%Y') | length }}{{ '%05.1f' | format(2.25) }}"
        "{{ {'a': [1, none, true]} | tojson(indent=2) }}\n"
        "{%- if add_generation_prompt and enable_thinking is not defined -%}\n<|turn>model\n{% endif %}\n\n"
    )
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nJa"}
    system = {"role": "system", "content": " be\n"}
    for messages in (USER, [system, *USER], [*USER, answer, *USER, *USER]):
        theirs, _ = utils.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
        )
        task = {"template": template, "conversations": [messages], "variables": {"bos_token": "<s>"}, "most": 9999}
        assert rendering.render_task(task) == {"texts": theirs}
        assert theirs[0].endswith("<|turn>model\n")


def test_the_process_knows_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked = {}
    run = subprocess.run

    def spy(command: list[str], **more: Any) -> Any:
        asked.update(more, command=command)
        return run(command, **more)

    monkeypatch.setattr(chat.subprocess, "run", spy)
    assert chat.render("{{ messages[0].content }}", USER, {}) == "Grüße"
    assert asked["env"] == {}
    assert "-I" in asked["command"]


def test_jinja_has_to_be_a_release_whose_sandbox_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, refused in (
        ("3.1.5", True),
        ("2.11.3", True),
        ("3.1.6", False),
        ("3.2.0rc1", False),
        ("4.0", False),
    ):
        monkeypatch.setattr(chat.metadata, "version", lambda _, found=found: found)
        if refused:
            with pytest.raises(PackageMissingError, match=f"jinja2 3.1.6 or later, found {found}") as caught:
                chat.render("x", USER, {})
            assert "[inference]" in caught.value.remedy
        else:
            assert chat.render("x", USER, {}) == "x"
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PackageMissingError, match="not installed"):
        chat.render("x", USER, {})


def test_the_program_itself_answers_with_a_text_or_an_error() -> None:
    """In this process, where coverage sees it."""
    task = {"template": "{% generation %}{{ messages[0].content | tojson }}{% endgeneration %}"}
    task |= {"conversations": [USER, [{"role": "user", "content": "b"}]], "variables": {}, "most": 100}
    assert rendering.render_task(task) == {"texts": ['"Grüße"', '"b"']}
    assert "longer than 2 characters" in rendering.render_task(task | {"most": 2})["error"]
    refused = rendering.render_task(task | {"template": "{{ raise_exception(strftime_now('%Y')) }}"})
    assert refused["error"].startswith("TemplateError: 2")


@pytest.mark.parametrize("template", ["{{ messages[-1].content }}", PLAIN.replace("messages", "messages[1:]")])
def test_a_system_message_is_never_lost(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m", sentencepiece() | {"chat_template": template}))
    system = [{"role": "system", "content": "be brief \n"}, *USER]
    with pytest.raises(TokenizerError, match="the chat template drops the system message") as caught:
        tokenizer.encode_chat(system)
    assert "into the prompt" in caught.value.remedy
    tokenizer = load_tokenizer(write(tmp_path / "m", sentencepiece() | {"chat_template": PLAIN}))
    expected = "system: be brief"
    assert expected in tokenizer.decode(tokenizer.encode_chat(system))
    assert tokenizer.encode_chat([{"role": "system", "content": " "}, *USER])


def test_a_template_sees_the_system_message_as_it_is(tmp_path: Path) -> None:
    """Templates cut switches like this off, and then blanks."""
    template = (
        "{% set s = messages[0].content %}{{ s.replace('/no_think', '').rstrip() ~ '.' ~ s.endswith('think') }}"
    )
    tokenizer = load_tokenizer(write(tmp_path / "m", sentencepiece() | {"chat_template": template}))
    ids = tokenizer.encode_chat([{"role": "system", "content": "be brief /no_think"}, *USER])
    assert tokenizer.decode(ids) == " be brief.True"


def test_many_control_tokens_cost_no_time(tmp_path: Path) -> None:
    keys = sentencepiece() | {"chat_template": PLAIN}
    more = [f"<|{'x' * (i % 7)}reserved_{i}|>" for i in range(40_000)]
    keys["ggml.tokens"] += more
    keys["ggml.scores"] += [0.0] * len(more)
    keys["ggml.token_type"] += [CONTROL] * len(more)
    tokenizer = load_tokenizer(write(tmp_path / "m", keys))
    text = "<|reserved " * 100_000 + more[-1]
    start = time.process_time()
    ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert time.process_time() - start < 10
    assert not {*ids} & {*range(len(keys["ggml.tokens"]) - len(more), len(keys["ggml.tokens"]))}
    assert tokenizer.decode(ids).count("<|reserved ") == 100_000


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

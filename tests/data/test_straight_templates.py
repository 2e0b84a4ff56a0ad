"""Which templates are straight, and that what is kept of them gives what they render."""

from typing import Any

import pytest

from ftkit.data.straight_templates import fill, find_frame, is_straight, probe
from ftkit.data.template_texts import CHATML, PLAIN
from tests.data.trl_templates import read_template, template_names
from tests.tiny_models import tiny_tokenizer

STRAIGHT = {
    "printed": "{{ messages[0].content }}",
    "by item": "{{ messages[0]['content'] }}",
    "joined": "{% for m in messages %}{{ '<' + m.role + '>' ~ m.content + eos_token }}{% endfor %}",
    "trimmed": "{% for m in messages %}[{{ m.content | trim }}][{{ m['content'].strip() }}]{% endfor %}",
    "kept in a variable": "{% for m in messages %}{% set c = m.content | trim %}{{ '<' + c + '>' }}{% endfor %}",
    "kept twice": "{% for m in messages %}{% set c = m.content %}{% if loop.first %}{% set c = 'A' + c %}{% endif %}"
    "{{ c }}{% endfor %}",
    "by place": "{% for m in messages %}{% if messages[loop.index0 - 1].role == 'user' %}{{ m.content }}{% endif %}"
    "{% endfor %}",
    "by the neighbours": "{% for m in messages %}{{ m.content }}"
    "{% if not loop.last and loop.nextitem.role == 'assistant' %}!{% endif %}{% endfor %}",
    "without the system": "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = 'You help.' %}{% endif %}"
    "{{ s }}{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
    "by type": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
    "whether there is any": "{% for m in messages %}{% if m.content and 'tool_calls' not in m %}{{ m.content or '' }}"
    "{% endif %}{% endfor %}",
    "out of order, and some not at all": "{{ messages[-1].content }}|{{ messages[0].content }}",
    "either": "{% for m in messages %}{{ m.content if m.role == 'user' else '-' + m.content }}{% endfor %}",
}
NOT = {
    "compared": "{% if messages[0].content == 'a' %}a{% endif %}",
    "searched": "{% if '</think>' in messages[0].content %}{{ messages[0].content.split('</think>')[-1] }}{% endif %}",
    "counted": "{{ messages[0].content | length }}",
    "changed": "{{ messages[0].content | upper }}",
    "cut": "{{ messages[0].content[:5] }}",
    "trimmed of something": "{{ messages[0].content.strip('x') }}",
    "a joined text trimmed": "{% set c = messages[0].content + ' ' %}{{ c | trim }}",
    "a whole message": "{{ messages[0] | tojson }}",
    "all messages": "{{ messages }}",
    "messages compared": "{% if messages[0] == messages[1] %}a{% endif %}",
    "messages chosen": "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}",
    "a method": "{% for key, value in messages[0].items() %}{{ value }}{% endfor %}",
    "a method by item": "{{ messages[0]['get']('content') }}",
    "a field by variable": "{% set key = 'content' %}{% if messages[0][key] == 'a' %}b{% endif %}",
    "in a macro": "{% macro say(m) %}{% if m.content == 'a' %}b{% endif %}{% endmacro %}{{ say(messages[0]) }}",
    "in a macro's text": "{% macro say() %}{{ messages[0].content }}{% endmacro %}{% if say() == 'a' %}b{% endif %}",
    "in a block's text": "{% set c %}{{ messages[0].content }}{% endset %}{{ c | length }}",
    "in a filter's text": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "in a namespace": "{% set ns = namespace(c=messages[0].content) %}{% if ns.c == 'a' %}b{% endif %}",
    "put into a namespace": "{% set ns = namespace(c='') %}{% set ns.c = messages[0].content %}{{ ns.c | length }}",
    "in a list": "{% set all = [messages[0].content] %}{{ all[0] | length }}",
    "a variable that may be it": "{% set c = messages[0].content or 'a' %}{{ c | length }}",
    "set below where it is used": "{% for m in messages %}{{ c | length }}{% set c = m.content %}{% endfor %}",
    "with": "{% with c = messages[0].content %}{{ c | length }}{% endwith %}",
    "as a place": "{{ messages[messages[0].content].role }}",
    "letter by letter": "{% for letter in messages[0].content %}{{ letter }}-{% endfor %}",
    "the loop itself": "{% for m in messages %}{% if loop.changed(m.content) %}a{% endif %}{% endfor %}",
    "a neighbour's text": "{% for m in messages %}{% if loop.previtem.content == 'a' %}b{% endif %}{% endfor %}",
    "repeated": "{{ messages[0].content * 2 }}",
    "formatted": "{{ '%s' % messages[0].content }}",
    "a default": "{{ messages[0].content | default('a', true) | length }}",
}
TEXTS = ["Hello", "  two\n", "</think>x", "a", '"quotes" {{ x }} <|im_end|>', "\ud800é\u2003", "\U000f0001"]


def render(template: str, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
    rendered = tiny_tokenizer().apply_chat_template(
        messages, chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
    )
    assert isinstance(rendered, str)
    return rendered


def conversation(roles: str, shift: int = 0) -> list[dict[str, Any]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": TEXTS[(shift + place) % len(TEXTS)]} for place, role in enumerate(roles)]


@pytest.mark.parametrize("template", [*STRAIGHT.values(), CHATML, PLAIN], ids=[*STRAIGHT, "chatml", "plain"])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_the_frame_of_a_straight_template_gives_what_it_renders(template: str, generation_prompt: bool) -> None:
    assert is_straight(template)
    for roles in ("u", "ua", "suaua", "uaua"):
        frame = find_frame(render(template, probe(conversation(roles)), generation_prompt))
        for shift in range(len(TEXTS)):
            messages = conversation(roles, shift)
            assert fill(frame, messages) == render(template, messages, generation_prompt)


@pytest.mark.parametrize("template", NOT.values(), ids=NOT.keys())
def test_a_template_that_looks_at_the_texts_is_not_straight(template: str) -> None:
    assert not is_straight(template)


def test_templates_of_the_field() -> None:
    straight = {name for name in template_names() if is_straight(read_template(name))}
    assert straight >= {"gemma", "llama3", "phi3", "qwen2_5"}
    assert straight.isdisjoint({"qwen3", "gptoss", "deepseekv3", "gemma3"})  # These look for thoughts, or into texts.

"""Chat templates that ftkit brings along, and today's date taken out of the ones that print it."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML. It needs the tokens <|im_start|> and <|im_end|>."""

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""Plain headings; every answer ends in the tokenizer's own EOS, so that a base model needs no new token."""

BUILT_IN = {"chatml": CHATML, "plain": PLAIN}
"""Names that `model.chat_template` accepts besides a file."""

# Noon of Thursday, 1 January 2026. Every code that a template of the field uses, longest first.
_DATE = {"%-d": "1", "%-m": "1", "%d": "01", "%m": "01", "%Y": "2026", "%y": "26", "%B": "January", "%b": "Jan"}
_DATE |= {"%A": "Thursday", "%a": "Thu", "%j": "001", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"}


def pin_date(template: str) -> str:
    """The template with `strftime_now` answering 1 January 2026, so that a run does not depend on its day.

    `strftime_now` is a global of transformers' template environment and cannot come in as a keyword; a macro of the
    same name, put before the template, takes its place without touching transformers.
    """
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    # The newline belongs to the block (trim_blocks): the template still begins at the start of a line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"

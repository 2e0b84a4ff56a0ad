"""Which conversations a template is asked to render."""

from ftkit.data.chat import ChatTemplate
from ftkit.verification.conversations import LONG_TOKENS, make_probes
from tests.tiny_models import CHATML, tiny_tokenizer

PLAIN = {"one question", "several turns", "other scripts", "emoji", "spaces at the ends", "empty lines first"}
PLAIN |= {"words of special tokens", "code", "long text"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
THOUGHTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}",
)
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "<|im_end|>", "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>"
)


def names(template: str, **options) -> dict[str, bool]:
    return {probe.name: probe.answered for probe in probes(template, **options)}


def probes(template: str, *, system_prompt: str | None = None, context: int = 10_000):
    tokenizer = tiny_tokenizer(template)
    chat = ChatTemplate(tokenizer, template)
    return make_probes(chat, ("<|im_end|>",), system_prompt=system_prompt, count=len, context=context)


def test_a_template_gets_what_it_can_render() -> None:
    assert names(NO_SYSTEM).keys() == PLAIN
    assert names(CHATML).keys() == PLAIN | {"system prompt"}
    assert names(THOUGHTS).keys() == PLAIN | {"system prompt", "thoughts"}
    with_tools = names(TOOLS)
    assert with_tools.keys() == PLAIN | {"system prompt", "tools", "a tool's result"}
    assert [name for name, answered in with_tools.items() if not answered] == ["tools", "a tool's result"]


def test_texts_have_what_tokenizers_differ_in() -> None:
    texts = {probe.name: probe.messages[-1]["content"] for probe in probes(CHATML)}
    assert texts["spaces at the ends"] != texts["spaces at the ends"].strip()
    assert texts["empty lines first"].startswith("\n\n")
    assert "<|im_end|>" in texts["words of special tokens"]
    assert LONG_TOKENS / 4 < len(texts["long text"]) <= LONG_TOKENS
    assert "Box number 1 holds 7 apples." in texts["long text"]
    assert len({probe.name: 0 for probe in probes(CHATML)}) == len(texts)


def test_the_long_text_fits_into_the_context() -> None:
    assert len(next(p for p in probes(CHATML, context=200) if p.name == "long text").messages[-1]["content"]) <= 100


def test_the_runs_system_prompt_is_sent_where_there_is_none() -> None:
    for probe in probes(CHATML, system_prompt="Be brief."):
        systems = [m["content"] for m in probe.messages if m["role"] == "system"]
        assert systems == (["Answer in one word."] if probe.name == "system prompt" else ["Be brief."])

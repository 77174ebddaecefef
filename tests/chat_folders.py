"""Folders with small tokenizers that look like Qwen's, and templates of our own that render as Qwen's official ones.

The templates were written for these tests. That they give the same strings as the templates of Qwen2.5-7B-Instruct and
Qwen3-0.6B was checked once, outside of this repository, over random conversations.
"""

import functools
import importlib.util
import json
import pydoc_data.topics
from pathlib import Path

import pytest
import tokenizers

FIRST_ADDED = 2048
# As in Qwen 3: the flag says whether the tokenizer calls it special.
ADDED = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|vision_start|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
IDS = {text: FIRST_ADDED + number for number, text in enumerate(ADDED)}
IM_START, IM_END = IDS["<|im_start|>"], IDS["<|im_end|>"]

# Qwen 2's and 3's pre-tokenizer
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{% for tool in tools %}\n"
    "{{ tool | tojson }}{% endfor %}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_RESULT = (
    "{% if loop.first or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n<tool_response>\n"
    "{{ m.content }}\n</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
)

QWEN25_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN25_TEMPLATE = (
    "{% set given = messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content if given else '"
    + QWEN25_DEFAULT
    + "' }}{% if tools %}\n\n"
    + _TOOLS
    + "{% endif %}<|im_end|>\n"
    "{% for m in (messages[1:] if given else messages) %}"
    "{% if m.role == 'tool' %}" + _RESULT + "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}\n{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{% set f = c.function if c.function is defined else c %}"
    '\n<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3_TEMPLATE = (
    "{% set given = messages[0].role == 'system' %}"
    "{% if tools %}<|im_start|>system\n{% if given %}{{ messages[0].content }}\n\n{% endif %}" + _TOOLS + "<|im_end|>\n"
    "{% elif given %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    # the last question that is no tool's result in disguise: thinking after it stays
    "{% set ns = namespace(last=messages|length - 1) %}"
    "{% for m in messages if m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{% if loop.last %}{% set ns.question = m %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if ns.question is defined and m is sameas ns.question %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set number = loop.index0 %}"
    "{% if m.role == 'tool' %}" + _RESULT + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content is defined %}{% set thought, said = m.reasoning_content, m.content %}"
    "{% elif '</think>' in m.content %}{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% set said = parts[-1].lstrip('\n') %}"
    "{% else %}{% set thought, said = '', m.content %}{% endif %}"
    "{% if number > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% if said or not loop.first %}{{ '\n' }}{% endif %}"
    "{% set f = c.function if c.function else c %}"
    '<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'user' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Jinja drops a template's last newline and, as chat templates are read, the newline after a block tag.
QWEN25_TEMPLATE, QWEN3_TEMPLATE = (text.replace("%}\n", "%}{{ '\\n' }}") for text in (QWEN25_TEMPLATE, QWEN3_TEMPLATE))


@functools.cache
def _tokenizer_json() -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=FIRST_ADDED,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = list(pydoc_data.topics.topics.values())[:40]
    tokenizer.train_from_iterator([*text, "你好，世界。😊é" * 50, "\n\n<|im_start|>|>\n" * 50], trainer)
    assert tokenizer.get_vocab_size() == FIRST_ADDED
    tokenizer.add_tokens(
        [tokenizers.AddedToken(text, special=special, normalized=False) for text, special in ADDED.items()]
    )
    return tokenizer.to_str()


def write_chat_folder(folder: Path, template: str | None, family: str = "qwen3", **config) -> Path:
    """A folder with config.json, a trained byte-level tokenizer and `template`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **({} if template is None else {"chat_template": template}),
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def real_v1_vocabulary() -> Path:
    """The first Qwen's own vocabulary file, which the package `dashscope` carries; skips the test without it."""
    spec = importlib.util.find_spec("dashscope")  # not imported: that takes seconds
    if spec is None or spec.origin is None:
        pytest.skip("needs the package dashscope for qwen.tiktoken")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@functools.cache
def real_v1_tokenizer():
    """The first Qwen's tokenizer on its real vocabulary."""
    from qwen_jax.tokenizer_v1 import TiktokenTokenizer

    return TiktokenTokenizer(real_v1_vocabulary())

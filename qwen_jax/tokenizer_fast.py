"""Tokenizers of Qwen 1.5 and newer, from `tokenizer.json`, with the folder's own chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .chat_template import CHATML, ChatTemplate, StandIns, plain_messages, texts_in
from .errors import CheckpointError
from .json_keys import read_json
from .tokenizer import IM_END, IM_START, Tokenizer, checked_text, optional_json

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTROL_SPELLING = re.compile(r"<\|.*\|>", re.DOTALL)


class FastTokenizer(Tokenizer):
    """A `tokenizer.json` whose added tokens are found by our own code, so that ordinary text cannot become one.

    The `tokenizers` library gets the vocabulary and its pre-tokenizer without any added token. Added tokens, control
    tokens among them, are put in where a text is known to be the frame of a chat (or the caller asks for it).

    Args:
        definition: the parsed `tokenizer.json`.
        config: the parsed `tokenizer_config.json`.
        template: the chat template; None for plain ChatML.
        where: the folder, for messages.
    """

    def __init__(self, definition: dict[str, Any], config: Mapping[str, Any], template: str | None, where: str):
        self._where = where
        added = _added_tokens(definition, config, where)
        self._added = {token["content"]: token["id"] for token in added}
        flagged = {token["content"] for token in added if token["special"]}
        self._control = {
            text: token for text, token in self._added.items() if text in flagged or _CONTROL_SPELLING.fullmatch(text)
        }
        self._pattern = _added_pattern(added)
        self._tag_pattern = _added_pattern([token for token in added if token["content"] not in self._control])
        self._plain = _without_added_tokens(definition, self._added, where)
        self._bytes = _token_bytes(definition, self._plain.get_vocab(with_added_tokens=False), where)
        self._bytes |= {token: text.encode() for text, token in self._added.items() if text not in self._control}
        for token in self._control.values():
            self._bytes.pop(token, None)
        self._vocab_size = max([*self._bytes, *self._control.values()]) + 1
        self._named = {
            name: _text_of(config[name]) for name in _NAMED_TOKENS if config.get(name) and _text_of(config[name])
        }
        self._eos = self._added.get(self._named.get("eos_token", ""))
        self._template = None if template is None else ChatTemplate(template, where)
        self.has_own_template = template is not None

    @classmethod
    def from_folder(cls, folder: Path) -> "FastTokenizer":
        """From `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
        config = optional_json(folder / "tokenizer_config.json")
        return cls(read_json(folder / "tokenizer.json"), config, _folder_template(folder, config), str(folder))

    @classmethod
    def from_vocabulary(cls, folder: Path) -> "FastTokenizer":
        """From `vocab.json` and `merges.txt`, which `transformers` knows how to make a tokenizer of."""
        from transformers import Qwen2Tokenizer

        config = optional_json(folder / "tokenizer_config.json")
        built = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
        definition = json.loads(built.backend_tokenizer.to_str())
        return cls(definition, config, _folder_template(folder, config), str(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of the vocabulary and the added tokens."""
        return self._vocab_size

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The control tokens: text → id."""
        return self._control

    @property
    def eos_token_id(self) -> int | None:
        """The `eos_token` of `tokenizer_config.json`."""
        return self._eos

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; none for control tokens and for ids that the vocabulary has not."""
        return self._bytes.get(token, b"")

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """The ids of `text`; tags like `<think>` become their own tokens, control tokens only if asked for."""
        return self._encode(checked_text(text), self._pattern if control_tokens else self._tag_pattern)

    def _encode(self, text: str, added: re.Pattern[str] | None, stand_ins: StandIns | None = None) -> list[int]:
        ids: list[int] = []

        def plain(part: str) -> None:
            if part:
                part = part if stand_ins is None else stand_ins.restore(part)
                ids.extend(self._plain.encode(part, add_special_tokens=False).ids)

        start = 0
        for match in added.finditer(text) if added else ():
            plain(text[start : match.start()])
            ids.append(self._added[match.group(match.lastgroup or 0)])
            start = match.end()
        plain(text[start:])
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids of the folder's own template rendered, with every given text kept as text.

        Where no given text spells a control token, the ids are those of the whole rendered string. Without a template,
        turns are plain ChatML and no system text is invented.

        Args:
            messages: dictionaries with `role` and `content`, and whatever else the template reads.
            tools: OpenAI-style function definitions.
            add_generation_prompt: whether the assistant's turn is opened at the end.
            **template_kwargs: further variables of the template, such as `enable_thinking`.
        """
        if not messages:
            raise ValueError("messages: expected at least one message, got none.")
        tools = list(tools) if tools else None
        template = self._template or self._default_template(messages, tools)
        plain = plain_messages(messages)
        given = {"messages": plain, "tools": tools, **template_kwargs}
        tags = [text for text in self._added if text not in self._control]
        stand_ins = StandIns(self._control, tags, [template.source, *texts_in(given)])
        rendered = template.render(
            **{"documents": None, **self._named, **stand_ins.protect(template_kwargs)},
            messages=stand_ins.protect(plain),
            tools=stand_ins.protect(tools, from_tools=True),
            add_generation_prompt=add_generation_prompt,
        )
        return self._encode(checked_text(rendered), self._pattern, stand_ins)

    def _default_template(self, messages: Sequence[Mapping[str, Any]], tools: list | None) -> ChatTemplate:
        if tools or any(message.get("role") == "tool" or message.get("tool_calls") for message in messages):
            raise ValueError(f"{self._where}: tools need a chat template, and the folder has none; use a chat model.")
        missing = [text for text in (IM_START, IM_END) if text not in self._control]
        if missing:
            raise ValueError(
                f"{self._where}: no chat template, and no {', '.join(missing)} in the vocabulary for plain ChatML; "
                "use `generate` with a prompt of your own."
            )
        return ChatTemplate(CHATML, self._where)


def _text_of(token: Any) -> str:
    return token.get("content", "") if isinstance(token, Mapping) else str(token)


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template's text: chat_template.jinja before tokenizer_config.json, of several the one named "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise CheckpointError(f"{folder}: chat_template has {sorted(named)}, expected one named 'default'.")
        template = named["default"]
    return template or None


def _added_tokens(definition: Mapping[str, Any], config: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """All added tokens with their flags: tokenizer.json's, then those that tokenizer_config.json alone knows."""
    added = {token["content"]: {**_FLAGS, **token} for token in definition.get("added_tokens") or ()}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(token["content"], {**_FLAGS, **token, "id": int(number)})
    vocabulary = definition["model"].get("vocab") or {}
    extra = [*(config.get("additional_special_tokens") or ()), *(config.get("extra_special_tokens") or ())]
    for text in [_text_of(token) for token in (*extra, *(config.get(name) for name in _NAMED_TOKENS)) if token]:
        if text in added:
            added[text]["special"] = True
        elif isinstance(vocabulary, dict) and text in vocabulary:
            added[text] = {**_FLAGS, "content": text, "id": vocabulary[text], "special": True}
    ids = [token["id"] for token in added.values()]
    if len(set(ids)) != len(ids):
        twice = sorted({number for number in ids if ids.count(number) > 1})
        raise CheckpointError(f"{where}/tokenizer.json: added tokens must have different ids, found {twice[:5]} twice.")
    return list(added.values())


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def _added_pattern(added: Sequence[Mapping[str, Any]]) -> re.Pattern[str] | None:
    """Finds added tokens as `tokenizers` does: the leftmost, of those the longest, with white space they swallow."""
    parts = []
    for number, token in enumerate(sorted(added, key=lambda token: len(token["content"]), reverse=True)):
        part = f"(?P<t{number}>{re.escape(token['content'])})"
        if token["single_word"]:
            part = rf"(?<!\w){part}(?!\w)"
        parts.append((r"\s*" if token["lstrip"] else "") + part + (r"\s*" if token["rstrip"] else ""))
    return re.compile("|".join(parts)) if parts else None


def _without_added_tokens(definition: Mapping[str, Any], added: Mapping[str, int], where: str) -> tokenizers.Tokenizer:
    """The tokenizer for ordinary text: no added tokens, and no way to build one from pieces."""
    model = dict(definition["model"])
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{where}/tokenizer.json: model type {model['type']!r} is not supported, expected 'BPE'.")
    inside = [text for text in added if text in model["vocab"]]
    if inside:
        model["vocab"] = {text: token for text, token in model["vocab"].items() if text not in added}
        model["merges"] = [
            pair
            for pair in model["merges"]
            if ("".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1)) not in added
        ]
    plain = {
        **definition,
        "model": model,
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}/tokenizer.json: not a readable tokenizer ({error}).") from error


def _token_bytes(definition: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> dict[int, bytes]:
    """The bytes of every ordinary token, as the file's decoder joins them."""
    decoder = definition.get("decoder") or definition.get("pre_tokenizer") or {}
    kinds = {
        part.get("type"): part for part in [decoder, *decoder.get("decoders", ()), *decoder.get("pretokenizers", ())]
    }
    if "ByteLevel" in kinds:
        alphabet = {character: byte for byte, character in enumerate(_byte_alphabet())}
        # A vocabulary may hold words outside the alphabet (an added token of old); they stand for themselves.
        return {
            token: bytes(alphabet[c] for c in text) if all(c in alphabet for c in text) else text.encode()
            for text, token in vocabulary.items()
        }
    if "ByteFallback" in kinds:
        byte = re.compile(r"<0x([0-9A-Fa-f]{2})>")
        space = kinds.get("Replace", {}).get("pattern", {}).get("String")
        result = {}
        for text, token in vocabulary.items():
            match = byte.fullmatch(text)
            plain = text.replace(space, kinds["Replace"]["content"]) if space else text
            result[token] = bytes([int(match.group(1), 16)]) if match else plain.encode()
        return result
    raise CheckpointError(
        f"{where}/tokenizer.json: decoder {decoder.get('type')!r} is not supported, expected ByteLevel or ByteFallback."
    )


def _byte_alphabet() -> list[str]:
    """The characters that byte-level vocabularies (GPT-2's invention) write the bytes 0 to 255 with."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]

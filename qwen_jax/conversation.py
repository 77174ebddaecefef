"""Chat on top of generation: upstream's `model.chat` and a stream of the text so far."""

from collections.abc import Iterator, Sequence

from qwen_jax.chat import extend_history, prompt_ids
from qwen_jax.text_stream import TextStream
from qwen_jax.tools import REACT_STOP

DEFAULT_NEW_TOKENS = 256


def chat(model, tokenizer, query=None, history=None, system=None, **options) -> tuple[str, list]:
    """Answers a question: (response, new history), as upstream's `model.chat`; the caller's history is not touched.

    Args:
        model: a `QwenForCausalLM`, which has this function as a method.
        tokenizer: the checkpoint's, from `AutoTokenizer`.
        query: the question; None if `messages` hold everything.
        history: (question, answer) pairs or OpenAI-style messages.
        system: system text; None for the format's own default.
        **options: see `chat_stream`.
    """
    response = ""
    for response in model.chat_stream(tokenizer, query, history, system, **options):  # noqa: B007
        pass
    if query is None:
        messages = list(options.get("messages") or ())
        return response, [*messages, {"role": "assistant", "content": response}]
    return response, extend_history(history, query, response)


def chat_stream(
    model,
    tokenizer,
    query=None,
    history=None,
    system=None,
    *,
    messages=None,
    tools=None,
    stop_words: Sequence[str] = (),
    max_new_tokens: int | None = None,
    template_options: dict | None = None,
    **settings,
) -> Iterator[str]:
    """Yields the text of the answer so far, whole characters only, each a prefix of the next.

    It ends at an end-of-turn or end-of-text token, at an id that generation_config.json names, or at a stop word.

    Args:
        model: a `QwenForCausalLM`, which has this function as a method.
        tokenizer: the checkpoint's, from `AutoTokenizer`.
        query: the question; None if `messages` hold everything.
        history: (question, answer) pairs or OpenAI-style messages; never changed.
        system: system text; None for the format's own default.
        messages: OpenAI-style messages instead of query and history.
        tools: OpenAI-style function definitions; `qwen_jax.chat.parse_tool_calls` reads the calls in an answer.
        stop_words: texts that end the answer, not part of it.
        max_new_tokens: at most so many; None for generation_config.json's number or 256.
        template_options: for the folder's chat template, such as `{"enable_thinking": False}`.
        **settings: seed, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, chunk, see `generate`.

    Raises:
        ValueError: system text and latest question alone do not fit; a bad argument.
    """
    options = dict(template_options or {})
    if "enable_thinking" in settings:
        options["enable_thinking"] = settings.pop("enable_thinking")
    own = model.generation_config
    new = max_new_tokens
    if new is None:
        new = min(own.max_new_tokens or DEFAULT_NEW_TOKENS, max(model.max_length // 2, 1))
    ids = prompt_ids(
        tokenizer,
        query,
        history,
        system,
        tools,
        max(model.max_length - new, 1),
        messages=messages,
        max_window_size=own.max_window_size,
        **options,
    )
    stop_ids = {*tokenizer.stop_token_ids, *(own.eos_token_ids or ())}
    stops = [*([stop_words] if isinstance(stop_words, str) else stop_words)]
    if tools and tokenizer.uses_react:
        stops.append(REACT_STOP)
    text = TextStream(tokenizer, stops, stop_ids)
    shown = None
    for chunk in model.stream(
        [ids], max_new_tokens=new, eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids, default=0), **settings
    ):
        current = text.push(chunk.tokens_BN[0][chunk.kept_BN[0]].tolist())
        if text.finished:
            break
        if current != shown:
            yield current
            shown = current
    final = text.finish()
    if final != shown:
        yield final

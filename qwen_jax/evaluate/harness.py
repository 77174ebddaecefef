"""lm-eval's tasks on our model: MMLU, C-Eval, GSM8K, HumanEval and any other, also from local files."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]  (an extra of its own)
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from qwen_jax.evaluate.likelihood import Pair, continuation_logprobs, greedy_answers, rolling_pairs, split_pair


class HarnessModel(LM):
    """`lm_eval`'s model interface.

    Args:
        model: a `QwenForCausalLM`.
        tokenizer: the checkpoint's, from `AutoTokenizer`.
        batch_size: rows at once; None for as many as fit when scoring, 8 when generating.
        max_gen_toks: tokens of an answer where the task says nothing.
    """

    def __init__(self, model, tokenizer, *, batch_size: int | None = None, max_gen_toks: int = 256):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self._prefix = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.stop_token_ids[0]
        self._chat = False

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests goes by."""
        return type(self.tokenizer).__name__

    def chat_template(self, chat_template: bool | str = False) -> str:
        """lm-eval only writes it into its results; the folder's own is always the one used."""
        return "" if not chat_template else "the checkpoint's own"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text with its control tokens spelled; from then on they are read as such in requests."""
        self._chat = True
        ids = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM`."""
        texts: list[Any] = [request.args for request in requests]
        pairs = [split_pair(self.tokenizer, text, choice, self._prefix, self._chat) for text, choice in texts]
        return continuation_logprobs(self.model, pairs, self.model.max_length, self.batch_size)

    def loglikelihood_rolling(self, requests) -> list[float]:
        """See `lm_eval.api.model.LM`."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            found = rolling_pairs(self.tokenizer.encode(request.args[0]), self._prefix, self.model.max_length)
            pairs += found
            counts.append(len(found))
        scores = iter(continuation_logprobs(self.model, pairs, self.model.max_length, self.batch_size))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """See `lm_eval.api.model.LM`; requests with the same settings share batches."""
        answers: dict[int, str] = {}
        alike: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_generation(request.args[1], self.max_gen_toks), []).append(index)
        for (until, new, options), indices in alike.items():
            room = self.model.max_length - new
            prompts = [self.tokenizer.encode(requests[i].args[0], control_tokens=self._chat)[-room:] for i in indices]
            batch = self.batch_size or 8
            texts = greedy_answers(self.model, self.tokenizer, prompts, until, new, batch, **dict(options))
            answers |= dict(zip(indices, texts, strict=True))
        return [answers[index] for index in range(len(requests))]


def _generation(settings: dict[str, Any], max_gen_toks: int):
    """(stop texts, new tokens, sampling options), hashable.

    Raises:
        ValueError: for a setting that is not known, which would change the answers.
    """
    settings = dict(settings)
    until = settings.pop("until", [])
    until = tuple([until] if isinstance(until, str) else until)
    new = int(settings.pop("max_gen_toks", settings.pop("max_tokens", max_gen_toks)))
    sample = bool(settings.pop("do_sample", False))
    options = {name: settings.pop(name) for name in ("temperature", "top_p", "top_k") if name in settings}
    if settings:
        raise ValueError(f"generation_kwargs: {sorted(settings)} are not known; remove them from the task.")
    if not sample or not options.get("temperature", 1.0):
        options = {}
        sample = False
    return until, new, (("do_sample", sample), *sorted(options.items()))


def run_tasks(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    unsafe_code: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """lm-eval's results by task.

    Args:
        model: a `QwenForCausalLM`.
        tokenizer: the checkpoint's.
        tasks: names.
        include_path: a folder of further tasks (YAML); with it lm-eval's own are left out, so that nothing is looked
            for in the network.
        num_fewshot: examples in front of a question; None for the task's own number.
        limit: only so many questions of each task.
        chat_template: ask as a chat.
        unsafe_code: run the code that the model writes, which tasks like HumanEval need; without it they are refused.
        batch_size: see `HarnessModel`.
        seed: of few-shot examples and sampling.

    Raises:
        ValueError: a task runs the model's code and `unsafe_code` is false; a task sets what is not known.
    """
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    run: Any = simple_evaluate  # its decorator hides the signature from type checkers
    # Before anything is loaded: such tasks run a first piece of code when their files are imported.
    entries = [manager.task_index.get(task) for task in tasks]
    unsafe = [entry.name for entry in entries if entry is not None and (entry.cfg or {}).get("unsafe_code")]
    if unsafe and not unsafe_code:
        raise ValueError(
            f"{', '.join(unsafe)}: runs code that the model writes on this machine; pass --unsafe-code "
            "(unsafe_code=True) if nothing here can come to harm."
        )
    with _code_execution(unsafe_code):
        results = run(
            model=HarnessModel(model, tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=unsafe_code,
            random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=0,
            log_samples=False,
        )
    return results["results"]


@contextlib.contextmanager
def _code_execution(allowed: bool) -> Iterator[None]:
    """Sets the switch that the package `evaluate` looks at before it runs a model's code; what it was comes back."""
    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.pop(name, None)
    if allowed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before

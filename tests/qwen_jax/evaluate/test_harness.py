"""lm-eval on local task files, offline; runs where lm-eval is installed (extra `eval`)."""

import json
import os
from pathlib import Path

import pytest

from qwen_jax import QwenForCausalLM
from qwen_jax.evaluate.likelihood import continuation_logprobs, split_pair

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # other packages' warnings are not ours to mend

CASE = Path(__file__).parents[2] / "golden" / "qwen2-int4-per-channel" / "quantized"
QUESTIONS = [
    {"question": f"Is {number} even?", "choices": [" yes", " no"], "answer": number % 2} for number in range(6)
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = "task: choice\noutput_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
FREE = (
    "task: free\noutput_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: ['no'], max_gen_toks: 4, do_sample: false}\n"
)


class Bytes:
    """A tokenizer of single bytes."""

    eos_token_id = 0
    stop_token_ids = (0,)

    def encode(self, text, control_tokens=False):
        return list(text.encode())

    def token_bytes(self, token):
        return bytes([token % 256])

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return self.encode("".join(f"<{each['role']}>{each['content']}" for each in messages))

    def decode(self, ids, skip_special_tokens=True):
        return bytes(token % 256 for token in ids).decode("latin-1")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.json").write_text(json.dumps(QUESTIONS))
    for name, text, metric in (("choice", CHOICE, "acc"), ("free", FREE, "exact_match")):
        common = COMMON.format(data=tmp_path / "data.json")
        metrics = f"metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]\n"
        (tmp_path / f"{name}.yaml").write_text(text + common + metrics)
    return tmp_path


@pytest.mark.parametrize("chat", [False, True])
def test_local_tasks(tasks, chat):
    from qwen_jax.evaluate.harness import run_tasks

    model = QwenForCausalLM.from_pretrained(CASE, dtype="float32", max_length=64)
    results = run_tasks(model, Bytes(), ["choice", "free"], include_path=str(tasks), chat_template=chat)
    right = 0
    for question in QUESTIONS:
        context = f"<user>{question['question']}" if chat else question["question"]
        pairs = [split_pair(Bytes(), context, choice, 0) for choice in question["choices"]]
        yes, no = (logprob for logprob, _ in continuation_logprobs(model, pairs, 64))
        right += (no > yes) == bool(question["answer"])
    assert results["choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert results["free"]["exact_match,none"] == 0


CODE = """task: code
unsafe_code: true
output_type: generate_until
doc_to_target: ''
metric_list: [{metric: !function code_metric.passed, aggregation: mean, higher_is_better: true}]
generation_kwargs: {until: ['no'], max_gen_toks: 4, do_sample: false}
"""
# As HumanEval's: asks for the switch when it is imported, and runs what the model wrote.
CODE_METRIC = """import os
import pathlib
ran = pathlib.Path(__file__).parent / "ran"
if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
    raise ValueError("not allowed")
ran.write_text("")
def passed(references, predictions):
    ran.write_text(ran.read_text() + "answer ")
    return 1.0
"""


@pytest.mark.parametrize("name", ["code", "several"])
def test_code_of_the_model_runs_only_when_asked(name, tasks, monkeypatch):
    from qwen_jax.evaluate.harness import run_tasks

    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # said for something else
    (tasks / "code.yaml").write_text(CODE + COMMON.format(data=tasks / "data.json"))
    (tasks / "code_metric.py").write_text(CODE_METRIC)
    (tasks / "several.yaml").write_text("group: several\ntask: [code]\n")
    model = QwenForCausalLM.from_pretrained(CASE, dtype="float32", max_length=64)
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda *arguments, **options: pytest.fail("the model was asked"))
        message = "code: runs code that the model writes .* --unsafe-code" if name == "code" else "not allowed"
        with pytest.raises(ValueError, match=message):
            run_tasks(model, Bytes(), [name], include_path=str(tasks))
    assert not (tasks / "ran").exists()
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    results = run_tasks(model, Bytes(), [name], include_path=str(tasks), unsafe_code=True)
    assert (tasks / "ran").read_text() == "answer " * len(QUESTIONS)
    assert results["code"]["passed,none"] == 1.0
    assert "HF_ALLOW_CODE_EVAL" not in os.environ

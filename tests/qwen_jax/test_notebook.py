"""What notebooks begin and end with: the choice of a model, and what is printed of it."""

import io
import urllib.error

import pytest

from qwen_jax import QwenForCausalLM, notebook
from qwen_jax.demo.checkpoints import demo_checkpoints
from tests import demo_run

HUB_ID = "Qwen/Qwen2.5-1.5B-Instruct-GPTQ-Int4"


@pytest.fixture(autouse=True, scope="module")
def demo_is_made():
    demo_run.first_run()


@pytest.fixture
def hub(monkeypatch):
    """Sets what an attempt to reach the Hub gives: an exception, or None for an answer."""

    def answer(what, offline=False):
        def urlopen(url, timeout):
            assert url.startswith("https://") and timeout <= 10
            if what is not None:
                raise what
            return io.BytesIO()

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)

    return answer


def test_a_hub_that_answers(hub, capsys):
    hub(None)
    assert notebook.choose_model(HUB_ID) == HUB_ID
    assert capsys.readouterr().out == f"Model: {HUB_ID}, from the Hugging Face Hub\n"
    hub(urllib.error.HTTPError("https://hub", 503, "busy", None, None))  # loading says what is wrong, not this
    assert notebook.choose_model(HUB_ID) == HUB_ID


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), TimeoutError()])
def test_no_hub(hub, capsys, error):
    hub(error)
    assert notebook.choose_model(HUB_ID) == str(demo_checkpoints().quantized)
    said = capsys.readouterr().out
    assert "SmolLM2" in said and "Int4" in said and f"the Hub, which has {HUB_ID}, cannot be reached" in said


def test_offline_asks_nobody(hub, capsys):
    hub(AssertionError("asked"), offline=True)
    assert notebook.choose_model(HUB_ID, stand_in="float") == str(demo_checkpoints().source)
    assert "float16" in (said := capsys.readouterr().out) and "HF_HUB_OFFLINE" in said


def test_folders_and_the_stand_in_itself(hub, tmp_path):
    hub(AssertionError("asked"))
    assert notebook.choose_model(str(tmp_path)) == str(tmp_path)
    assert notebook.choose_model("SmolLM2") == str(demo_checkpoints().quantized)


def test_setup_and_environment(capsys):
    folder = demo_checkpoints().quantized
    model = QwenForCausalLM.from_pretrained(folder, use_cache_quantization=True)
    notebook.print_setup(folder, model)
    said = capsys.readouterr().out
    # 30 layers × 3 heads × (64 + 4 bytes), keys and values; the layers' matrices share a line, attention has one
    assert "cpu" in said and "KV cache 8-bit, 12,240 bytes a token" in said and "Activations float32" in said
    assert said.count("packed words decoded in registers") == 1 and said.count("attention") == 1
    assert str(folder.parent) not in said
    notebook.print_environment()
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"device", "qwen-jax", "jax", "python", "date"} <= set(facts) and "driver" not in facts

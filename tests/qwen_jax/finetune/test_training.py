"""The training step: PEFT's losses, gradients and logits; meshes; what is trained and what is never touched."""

from pathlib import Path

import jax
import numpy as np
import pytest

from converters import names, peft
from qwen_jax import checkpoint_store
from qwen_jax.adapter import apply
from qwen_jax.finetune import FinetuneSettings, parameters
from qwen_jax.finetune.programs import TrainingPrograms
from qwen_jax.finetune.rows import Batch
from qwen_jax.generation import Programs
from qwen_jax.model import Decoder
from tests.edited import GOLDEN

CASES = sorted(folder.parent.name for folder in GOLDEN.glob("*/lora"))
SMALL = "qwen2-int4-per-channel"
PLAIN = dict(rank=8, alpha=16, learning_rate=1e-3, schedule="constant", warmup=0, clip=0, batch_size=2, length=24)


def error(found, wanted):
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


class Run:
    """A golden case ready to be trained."""

    def __init__(self, folder: Path, adapter=None, mesh=None, **settings):
        self.weights = checkpoint_store.open_weights(folder, dtype="float32", kernels="auto", mesh=mesh)
        self.decoder = Decoder(self.weights.config, self.weights, dtype="float32")
        self.config = getattr(self.weights, "whole_config", self.weights.config)
        self.settings = FinetuneSettings(**(PLAIN | settings))
        if adapter is None:
            self.template = parameters.initial(self.config, self.decoder, self.weights, self.settings)
        else:
            self.template = peft.read(adapter, self.config)
        tree, scales = parameters.from_adapter(self.template, self.decoder)
        self.programs = TrainingPrograms(self.decoder, self.weights, tree, scales, self.settings, 6)
        self.state = self.programs.start(tree)

    def adapter(self, tree=None):
        return parameters.to_adapter(self.state.parameters if tree is None else tree, self.template, self.decoder)

    def logits(self, ids):
        decoder = apply(self.decoder, self.adapter(), self.weights, dtype="float32")
        return np.asarray(Programs(decoder).score(ids.astype(np.int32), np.full(len(ids), ids.shape[1], np.int32)))


def golden_batch(folder: Path) -> Batch:
    """Both rows of `ids`, the first 8 positions not learned."""
    ids = np.load(folder / "golden.npz")["ids"].astype(np.int32)
    targets = np.full_like(ids, -1)
    targets[:, 7:-1] = ids[:, 8:]
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return Batch(ids[None], targets[None], positions[None], None, np.full((1, len(ids)), ids.shape[1], np.int32))


def check_gradients(run: Run, found, golden):
    for key in (key for key in golden if key.startswith("grad0.")):
        module, half = key.removeprefix("grad0.").rsplit(".lora_", 1)
        path, _ = names.ours(run.config.family, f"{module}.weight")
        term = found.modules[path]
        wanted, got = golden[key], term.a_RI if half.startswith("A") else term.b_OR
        if wanted.any():
            assert error(got, wanted) < 1e-3, key
        else:  # b is zero at first, so a has no gradient yet
            assert not got.any(), key


@pytest.mark.parametrize("case", CASES)
def test_six_steps_are_peft_s(case):
    folder = GOLDEN / case
    golden, batch = np.load(folder / "lora" / "lora.npz"), golden_batch(folder)
    run = Run(folder / "quantized", folder / "lora" / "initial_adapter")
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.decoder)]
    loss, gradients = run.programs.gradients(run.state.parameters, batch)
    check_gradients(run, run.adapter(gradients), golden)
    losses = []
    for step in range(6):
        if step == 5:  # the golden logits are those of the sixth forward
            assert error(run.logits(batch.ids[0]), golden["final_logits"]) < 1e-4
        run.state, metrics = run.programs.step(run.state, batch)
        losses.append(float(metrics.loss))
    assert float(loss) == pytest.approx(losses[0], rel=1e-6)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
    after = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.decoder)]
    assert before == after  # every packed array, scale, norm


@pytest.mark.parametrize(("case", "shape"), [("qwen2-int4-g64-actorder-asym", (2, 3))])
def test_a_mesh_has_the_same_gradients(case, shape):
    folder = GOLDEN / case
    mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])
    run = Run(folder / "quantized", folder / "lora" / "initial_adapter", mesh=mesh)
    golden, batch = np.load(folder / "lora" / "lora.npz"), golden_batch(folder)
    loss, gradients = run.programs.gradients(run.state.parameters, batch)
    assert float(loss) == pytest.approx(golden["losses"][0], rel=1e-5)
    check_gradients(run, run.adapter(gradients), golden)


SAVED = ("embed_tokens", "lm_head", "model.norm", "input_layernorm")


@pytest.mark.parametrize("shape", [None, (1, 2)])
def test_whole_modules_learn_too_and_come_back(shape, tmp_path):
    folder = GOLDEN / SMALL
    mesh = None if shape is None else jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[:2])
    run = Run(folder / "quantized", mesh=mesh, modules_to_save=SAVED, target_modules=("q_proj", "down_proj"))
    batch, step = golden_batch(folder), 1e-2
    _, gradients = run.programs.gradients(run.state.parameters, batch)
    for name, gradient in gradients["saved"].items():
        # the loss's change along the gradient, by central differences
        direction = gradient / np.linalg.norm(gradient)

        def loss(scale, name=name, direction=direction):
            tree = run.state.parameters
            moved = tree | {"saved": tree["saved"] | {name: tree["saved"][name] + np.float32(scale) * direction}}
            return float(run.programs.gradients(moved, batch)[0])

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert slope == pytest.approx(float(np.linalg.norm(gradient)), rel=0.02), name
    run.state, _ = run.programs.step(run.state, batch)
    if shape is not None:
        return
    trained = run.adapter()
    peft.write(
        tmp_path / "adapter", trained, run.config, base_model="", targets=["q_proj", "down_proj"], rank=8, alpha=16
    )
    again = peft.read(tmp_path / "adapter", run.config)
    assert again.saved.keys() == trained.saved.keys() and again.modules.keys() == trained.modules.keys()
    for name in trained.saved:
        assert np.array_equal(again.saved[name], trained.saved[name]), name
        assert not np.array_equal(trained.saved[name], run.template.saved[name]), name


def test_logits_before_the_first_step_are_the_base_s():
    folder = GOLDEN / SMALL
    run, ids = Run(folder / "quantized"), golden_batch(folder).ids[0]
    base = Programs(run.decoder).score(ids, np.full(2, 24, np.int32))
    np.testing.assert_array_equal(run.logits(ids), base)


def test_accumulated_batches_have_the_gradient_of_one():
    folder = GOLDEN / SMALL
    batch = golden_batch(folder)
    learned = batch.targets.copy()
    learned[0, 0, :16] = -1  # rows with unlike numbers of learned tokens
    batch = batch._replace(targets=learned)
    apart = Batch(*(None if array is None else np.swapaxes(array, 0, 1) for array in batch))
    run = Run(folder / "quantized", folder / "lora" / "adapter")
    tree = run.state.parameters
    (one, whole), (two, parts) = run.programs.gradients(tree, batch), run.programs.gradients(tree, apart)
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    for wanted, found in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert error(found, np.asarray(wanted, np.float64)) < 1e-5


def test_packed_conversations_do_not_see_each_other():
    folder = GOLDEN / SMALL
    batch = golden_batch(folder)
    run = Run(folder / "quantized", folder / "lora" / "adapter")
    apart, _ = run.programs.gradients(run.state.parameters, batch)

    def packed(segments):
        row = [array.reshape(1, 1, 48) for array in (batch.ids, batch.targets, batch.positions)]
        numbers = np.repeat(np.asarray(segments, np.int32), 24).reshape(1, 1, 48)
        together = Batch(*row, numbers, np.full((1, 1), 48, np.int32))
        return float(run.programs.gradients(run.state.parameters, together)[0])

    assert packed([1, 2]) == pytest.approx(float(apart), rel=1e-6)
    assert packed([1, 1]) != pytest.approx(float(apart), rel=1e-3)


def test_dropout_is_drawn_anew_each_step_and_the_same_again():
    folder = GOLDEN / SMALL
    batch = golden_batch(folder)
    run = Run(folder / "quantized", folder / "lora" / "adapter", dropout=0.5, learning_rate=1e-30)
    again = run.programs.start(jax.tree.map(np.array, run.state.parameters))
    losses = []
    for _ in range(2):
        run.state, metrics = run.programs.step(run.state, batch)
        losses.append(float(metrics.loss))
    _, metrics = run.programs.step(again, batch)
    assert losses[0] == float(metrics.loss) and losses[0] != losses[1]


def test_a_first_generation_model_learns_by_its_own_names():
    folder = GOLDEN / "qwen1-int4-g32"
    run = Run(folder / "quantized", learning_rate=1e-2)
    assert {path.split(".", 2)[2] for path in run.template.modules} == {
        "attention.qkv",
        "attention.output",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    }
    batch = golden_batch(folder)
    losses = []
    for _ in range(4):
        run.state, metrics = run.programs.step(run.state, batch)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)

"""Fine-tuning at a model's dimensions with random packed weights: tokens/s and peak memory of the training step.

    python benchmarks/finetune.py --model qwen-7b --rank 64 --rows 4 --length 1024 --output finetune_h100.json

One conversation a row (cuDNN's attention on a GPU); --packing lays four a row, kept apart. --peer runs PEFT's Q-LoRA
(4-bit NF4 of bitsandbytes) at the same dimensions instead, where PyTorch, transformers, peft and bitsandbytes are
installed. --topology v5p:1x1x1 compiles the step for a TPU that need not be here and tells its memory. The last line is
JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np


def ours(arguments) -> dict:
    import jax

    from qwen_jax.bench.environment import environment
    from qwen_jax.bench.models import MODELS
    from qwen_jax.bench.random_weights import RandomWeights
    from qwen_jax.finetune import FinetuneSettings, parameters
    from qwen_jax.finetune.programs import TrainingPrograms
    from qwen_jax.finetune.rows import Batch
    from qwen_jax.memory import device_peak
    from qwen_jax.model import Decoder

    config = MODELS[arguments.model]
    dtype = arguments.dtype
    weights = RandomWeights(config, bits=arguments.bits, group_size=arguments.group_size, dtype=dtype)
    decoder = Decoder(config, weights, dtype=dtype)
    settings = FinetuneSettings(rank=arguments.rank, alpha=16, batch_size=arguments.rows, length=arguments.length)
    template = parameters.initial(config, decoder, weights, settings)
    tree, scales = parameters.from_adapter(template, decoder)
    programs = TrainingPrograms(decoder, weights, tree, scales, settings, arguments.steps)
    state = programs.start(tree)
    loaded = device_peak()
    shape = (1, arguments.rows, arguments.length)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    part = arguments.length // 4 if arguments.packing else arguments.length
    position = np.arange(arguments.length, dtype=np.int32)
    segments = np.broadcast_to(position // part + 1, shape).astype(np.int32) if arguments.packing else None
    lengths = np.full(shape[:2], arguments.length, np.int32)
    batch = Batch(ids, np.roll(ids, -1, -1), np.broadcast_to(position % part, shape), segments, lengths)
    batch = jax.device_put(batch)
    seconds, losses = [], []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        state, metrics = programs.step(state, batch)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - start)
    best = statistics.median(seconds[2:] or seconds)
    return {
        **environment(),
        "command": "python benchmarks/finetune.py",
        "model": arguments.model,
        "bits": arguments.bits,
        "rank": arguments.rank,
        "trained": parameters.size(state.parameters),
        "rows": arguments.rows,
        "length": arguments.length,
        "packing": arguments.packing,
        "dtype": dtype,
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": round(best, 4),
        "tokens_per_second": round(arguments.rows * arguments.length / best, 1),
        "peak_bytes_before_the_first_step": loaded,
        "peak_bytes": device_peak(),
        "losses": [round(loss, 4) for loss in losses],
    }


def compiled(arguments) -> dict:
    """Bytes of the training step on a TPU, by its compiler."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct
    from jax.sharding import NamedSharding, PartitionSpec

    from converters import names, peft
    from pallas_kernels.chip import compiling_for
    from qwen_jax.bench import device_weights
    from qwen_jax.bench.models import MODELS
    from qwen_jax.finetune import FinetuneSettings
    from qwen_jax.finetune.programs import State, TrainingPrograms
    from qwen_jax.finetune.rows import Batch
    from qwen_jax.plan import aot, chips
    from qwen_jax.plan.abstract import Storage

    config, topology, rank = MODELS[arguments.model], chips.parse(arguments.topology), arguments.rank
    sharding = NamedSharding(aot.mesh_of(topology, 1, 1), PartitionSpec())
    settings = FinetuneSettings(rank=rank, alpha=16, batch_size=arguments.rows, length=arguments.length)
    layers, terms, shapes = config.num_layers, {}, names.modules(config)
    for path in peft.chosen(config, settings.targets(config)):
        inputs, outputs = shapes[path]
        a, b = (layers, inputs, rank), (layers, rank, outputs)
        terms[path.split(".", 2)[2]] = {key: ShapeDtypeStruct(s, jnp.float32) for key, s in (("a", a), ("b", b))}
    tree = {"terms": {"0": terms}, "saved": {}}
    scales = {"0": {module: ShapeDtypeStruct((layers,), jnp.float32) for module in terms}}
    ids = ShapeDtypeStruct((1, arguments.rows, arguments.length), jnp.int32)
    batch = Batch(ids, ids, ids, None, ShapeDtypeStruct(ids.shape[:2], jnp.int32))
    with compiling_for(topology.chip.kind):
        storage = Storage(bits=arguments.bits, group_size=arguments.group_size)
        programs = TrainingPrograms(device_weights.shapes(config, storage, None), None, tree, scales, settings, 8)
        state = jax.eval_shape(lambda tree: State(tree, programs.optimizer.init(tree), jnp.int32(0)), tree)
        place = lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        step = programs._step.lower(*jax.tree.map(place, (state, programs.frozen, batch)))
        memory = aot.compile_uncached(step).memory_analysis()
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    return {
        "compiled_for": arguments.topology,
        "model": arguments.model,
        "bits": arguments.bits,
        "rank": rank,
        "rows": arguments.rows,
        "length": arguments.length,
        "base_bytes": size(programs.frozen),
        "state_bytes": size(state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def peer(arguments) -> dict:
    import bitsandbytes as bnb
    import peft
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qwen_jax.bench.models import MODELS

    config, device = MODELS[arguments.model], arguments.peer_device
    theirs = transformers.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16, attn_implementation="sdpa")
    # As `from_pretrained` with a BitsAndBytesConfig leaves a checkpoint, without the detour by the disk.
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, old in list(owner.named_children()):
                if isinstance(old, torch.nn.Linear):
                    biased = old.bias is not None
                    new = bnb.nn.Linear4bit(
                        old.in_features, old.out_features, biased, torch.bfloat16, quant_type="nf4", device="meta"
                    )
                    new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
                    new.bias = old.bias
                    setattr(owner, name, new.to(device))
                    del old
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=arguments.rank, lora_alpha=16, target_modules=names))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-4)
    ids = torch.randint(0, config.vocab_size, (arguments.rows, arguments.length), device=device)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits
        seconds.append(time.perf_counter() - start)
    best = statistics.median(seconds[2:] or seconds)
    return {
        "peer": "PEFT Q-LoRA, bitsandbytes NF4",
        "device": torch.cuda.get_device_name() if cuda else device,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, bnb)},
        "model": arguments.model,
        "step_seconds": round(best, 4),
        "tokens_per_second": round(arguments.rows * arguments.length / best, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "losses": [round(loss, 4) for loss in losses],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--topology")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-device", default="cuda")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    result = (compiled if arguments.topology else peer if arguments.peer else ours)(arguments)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file, indent=2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

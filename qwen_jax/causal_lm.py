"""`QwenForCausalLM`: what a user loads, calls, generates and chats with."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from converters import peft
from qwen_jax import checkpoint_store, conversation
from qwen_jax.adapter import apply as apply_adapter
from qwen_jax.config import ModelConfig
from qwen_jax.generation import CHUNK, Chunk, Programs, bucket
from qwen_jax.generation_config import GenerationConfig
from qwen_jax.inputs import align, check_ids, pad
from qwen_jax.kv_cache import CacheState, KVCache, bytes_per_token
from qwen_jax.model import Decoder
from qwen_jax.read_progress import Progress
from qwen_jax.sampling import SamplingConfig
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharding import check_mesh, reproducible_mesh
from qwen_jax.text_stream import TextStream

logger = logging.getLogger("qwen_jax")

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_ROOM = 4096  # tokens a cache of `prefill` holds at most when nothing is said


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate(..., return_dict=True)` returns.

    Attributes:
        sequences: int32 [B, T + new], prompt included, as transformers; finished rows padded with the padding id.
        tokens: for each row its new token ids, the stop token included, nothing after it.
        logprobs: for each row the natural logarithm of each new token's probability, or None.
    """

    sequences: np.ndarray
    tokens: list[list[int]]
    logprobs: list[list[float]] | None


class QwenForCausalLM:
    """A Qwen model, float or quantized, with its compiled programs.

    Attributes:
        config: the architecture.
        generation_config: the checkpoint's own defaults for `generate` and `chat`.
        dtype: dtype of activations.
        use_cache_quantization: whether `prefill` and `generate` keep keys and values in 8 bits.
        max_length: tokens (prompt and answer) a cache holds at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        generation_config: GenerationConfig,
        *,
        use_cache_quantization: bool = False,
        max_length: int | None = None,
        mesh: Mesh | None = None,
        config: ModelConfig | None = None,
    ):
        self.decoder = decoder
        self.config: ModelConfig = config or decoder.config  # on a mesh the decoder's own is that of one device's share
        self.dtype = decoder.dtype
        self.generation_config = generation_config
        self.use_cache_quantization = use_cache_quantization
        self.max_length = max_length or self.config.max_position_embeddings
        self._room = max_length or min(self.config.max_position_embeddings, DEFAULT_ROOM)
        self._programs = Programs(decoder) if mesh is None else ShardedPrograms(decoder, mesh)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str = "auto",
        use_cache_quantization: bool = False,
        mesh: Mesh | None = None,
        kernels: str = "auto",
        max_length: int | None = None,
        lm_head: str | None = None,
        adapter: str | Path | None = None,
        one_launch: bool = True,
        reproducible: bool = False,
        progress: Progress | None = None,
    ) -> "QwenForCausalLM":
        """Loads a Hub id, a Hugging Face folder (float, GPTQ, compressed-tensors) or a folder written by `convert`.

        Args:
            name: hub id or path.
            dtype: of activations: "float32", "bfloat16", "float16", or "auto" (bfloat16 where the device computes in
                it, float32 on a CPU). Float weights are kept in it, or in the file's own 16 bits under float32.
            use_cache_quantization: keep keys and values in 8 bits.
            mesh: a `jax.sharding.Mesh` with the axes "data" (rows of a batch), "model" (heads, MLP, vocabulary) and, if
                wanted, "sequence" (a long cache's length), in any order, Explicit or Auto, of any sizes; None for one
                device.
            kernels: "auto" or the name of a kernel ("xla", "mosaic_gpu", …); see `qwen-jax info`.
            max_length: tokens a cache holds at most, prompt and answer; None for the model's own context.
            lm_head: "int8" rounds the output projection to 8 bits (other numbers than the checkpoint's); None keeps it.
            adapter: a LoRA adapter's folder, of PEFT or of `qwen-jax finetune`: it runs beside the weights, which stay
                as they are.
            one_launch: on Hopper GPUs, decode up to 8 rows with all layers in one kernel launch where that kernel takes
                the model (`qwen-jax info` says so, and why not); False: a kernel at a time.
            reproducible: the same bits on one device and on every mesh, by sums that are exact in any order; 7 to 50
                times slower, in float32 (docs/sharding.md).
            progress: called with the bytes read so far and their number.

        Raises:
            CheckpointError: files missing, damaged or of a kind that is not read.
            ValueError: a bad argument.
        """
        if dtype not in (*DTYPES, "auto"):
            raise ValueError(f"dtype={dtype!r} is none of {[*DTYPES, 'auto']}.")
        if lm_head not in (None, "int8"):
            raise ValueError(f'lm_head={lm_head!r} is none of [None, "int8"].')
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: expected at least 1 token, or None for the model's context.")
        if mesh is not None:
            check_mesh(mesh)
        if dtype == "auto":
            dtype = default_dtype(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
        if reproducible:
            kernels, mesh = "exact", reproducible_mesh(dtype, kernels, adapter, mesh)
        elif kernels == "exact":
            raise ValueError('kernels="exact": are those of reproducible=True. Give that instead.')
        folder = checkpoint_store.find(name)
        weights = checkpoint_store.open_weights(
            folder, dtype=dtype, kernels=kernels, lm_head=lm_head, mesh=mesh, progress=progress
        )
        decoder = Decoder(
            weights.config,
            weights,
            dtype=dtype,
            kernels=kernels,
            unroll=jax.default_backend() == "gpu",
            one_launch=one_launch,
        )
        if adapter is not None:
            whole: ModelConfig = getattr(weights, "whole_config", weights.config)
            decoder = apply_adapter(decoder, peft.read(adapter, whole), weights, dtype=dtype, kernels=kernels)
        generation_config = GenerationConfig.from_folder(folder)
        return cls(
            decoder,
            generation_config,
            use_cache_quantization=use_cache_quantization,
            max_length=max_length,
            mesh=mesh,
            config=getattr(weights, "whole_config", None),
        )

    # -- logits ------------------------------------------------------------------------------------------------------

    def __call__(self, input_ids, attention_mask=None) -> jax.Array:
        """Logits of every position, float32 [B, T, V]; a masked position's are arbitrary."""
        ids_BT, lengths_B, start_B = align(input_ids, attention_mask, self.config.vocab_size)
        T = ids_BT.shape[1]
        logits_BTV = self._programs.score(pad(ids_BT, bucket(T)), lengths_B)[:, :T]
        if not start_B.any():
            return logits_BTV
        index_BT = np.clip(np.arange(T) - start_B[:, None], 0, T - 1)
        return jnp.take_along_axis(logits_BTV, index_BT[:, :, None], axis=1)

    def prefill(self, input_ids, attention_mask=None) -> tuple[jax.Array, KVCache]:
        """Reads a prompt into a new cache of `max_length` tokens; logits of its last token, float32 [B, 1, V].

        Without `max_length` the cache holds the model's context, at most 4096 tokens or twice the prompt.
        """
        ids_BT, lengths_B, _ = align(input_ids, attention_mask, self.config.vocab_size)
        longest = int(lengths_B.max())
        room = max(self._room, min(self.max_length, 2 * longest))
        if longest > room:
            raise ValueError(
                f"input_ids: {longest} tokens, but the cache holds {room}. Shorten the prompt or load the model with a "
                f"larger max_length."
            )
        cache = self._empty(len(lengths_B), max(room, bucket(ids_BT.shape[1])))
        logits_BV, state = self._programs.prefill(pad(ids_BT, bucket(ids_BT.shape[1])), lengths_B, cache)
        return logits_BV[:, None], KVCache(state, longest, room, len(lengths_B))

    def decode(self, token_ids, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One more token a row, int [B, 1]; its logits, float32 [B, 1, V], and the cache that replaces `cache`.

        Raises:
            ConsumedCacheError: `cache` was used before; its arrays were updated in place.
        """
        token_B1 = check_ids(np.asarray(token_ids), self.config.vocab_size, "token_ids")
        if token_B1.shape != (cache.slots, 1):
            raise ValueError(
                f"token_ids: shape {token_B1.shape}, expected ({cache.slots}, 1): one token for each row of the cache."
            )
        if cache.longest + 1 > cache.room:
            raise ValueError(
                f"cache: full, it holds {cache.room} tokens a row. Load the model with a larger max_length."
            )
        longest = cache.longest + 1
        active_length = min(bucket(longest, 128), cache.allocated)
        logits_BV, state = self._programs.decode(token_B1[:, 0], cache.take(), active_length)
        return logits_BV[:, None], KVCache(state, longest, cache.room, cache.slots)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids,
        *,
        attention_mask=None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] = (),
        tokenizer=None,
        logprobs: bool = False,
        return_dict: bool = False,
        chunk: int = CHUNK,
    ):
        """Continues each row of ids; int32 [B, T + new], prompt included, as transformers.

        Settings that are None come from the checkpoint's generation_config.json. A row is independent of the rest of
        its batch: an integer `seed` gives every row what it would get alone, a sequence gives each row its own.

        Args:
            input_ids: int [B, T] (or [T]); left- or right-padded rows need `attention_mask`, no id means padding.
            attention_mask: 0/1 [B, T]; the ones of a row must be adjacent.
            max_new_tokens: at most so many (default 256).
            do_sample: draw, or take the most probable token.
            temperature: see `SamplingConfig`, as top_k, top_p, min_p and repetition_penalty.
            top_k: 0 keeps all.
            top_p: 1 keeps all.
            min_p: 0 keeps all.
            repetition_penalty: 1 for none.
            seed: one for all rows, or one a row.
            eos_token_id: id or ids that end a row; an empty list for none.
            pad_token_id: fills finished rows.
            stop_strings: texts that end a row; they, and what follows, are cut from ids and logprobs. Need `tokenizer`.
            tokenizer: for `stop_strings`.
            logprobs: also return each token's log-probability (implies `return_dict`).
            return_dict: return a `Generation`.
            chunk: tokens a dispatch.
        """
        ids_BT, lengths_B, _ = align(input_ids, attention_mask, self.config.vocab_size)
        sampling = self._sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty)
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        B = len(lengths_B)
        texts = None
        if stop_strings:
            if tokenizer is None:
                raise ValueError("stop_strings: a tokenizer is needed to find them in the text; give tokenizer=.")
            texts = [TextStream(tokenizer, stop_strings) for _ in range(B)]
        stop_ids, pad_id = self._stops(eos_token_id, pad_token_id)
        tokens: list[list[int]] = [[] for _ in range(B)]
        scores: list[list[float]] = [[] for _ in range(B)]
        for part in self._stream(
            ids_BT, lengths_B, sampling, seed, stop_ids, pad_id, max_new_tokens, logprobs=logprobs, chunk=chunk
        ):
            for row in range(B):
                if texts and texts[row].finished:
                    continue
                kept = part.kept_BN[row]
                new = part.tokens_BN[row][kept].tolist()
                tokens[row] += new
                if part.logprobs_BN is not None:
                    scores[row] += part.logprobs_BN[row][kept].tolist()
                if texts:
                    texts[row].push(new)
            if texts and all(texts[row].finished or part.done_B[row] for row in range(B)):
                break
        if texts:
            for row, text in enumerate(texts):
                if text.finished:
                    del tokens[row][text.token_count :], scores[row][text.token_count :]
        prompt_BT = np.asarray(input_ids, np.int32).reshape(B, -1)
        width = max((len(row) for row in tokens), default=0)
        new_BN = np.full((B, width), pad_id, np.int32)
        for row, ids in enumerate(tokens):
            new_BN[row, : len(ids)] = ids
        sequences = np.concatenate([prompt_BT, new_BN], axis=1)
        if return_dict or logprobs:
            return Generation(sequences, tokens, scores if logprobs else None)
        return sequences

    def stream(self, input_ids, *, max_new_tokens: int | None = None, seed=0, eos_token_id=None, **settings):
        """Yields `generation.Chunk`s as they come; one prompt or a batch, arguments as `generate`."""
        attention_mask = settings.pop("attention_mask", None)
        pad_token_id = settings.pop("pad_token_id", None)
        logprobs, chunk = settings.pop("logprobs", False), settings.pop("chunk", CHUNK)
        ids_BT, lengths_B, _ = align(input_ids, attention_mask, self.config.vocab_size)
        names = [field.name for field in dataclasses.fields(SamplingConfig)]
        if unknown := sorted(set(settings) - set(names)):
            raise ValueError(f"{unknown[0]}: unknown argument, expected one of {names}.")
        sampling = self._sampling(*(settings.get(name) for name in names))
        stop_ids, pad_id = self._stops(eos_token_id, pad_token_id)
        return self._stream(
            ids_BT, lengths_B, sampling, seed, stop_ids, pad_id, max_new_tokens, logprobs=logprobs, chunk=chunk
        )

    def _stream(
        self, ids_BT, lengths_B, sampling, seed, stop_ids, pad_id, max_new_tokens, *, logprobs, chunk
    ) -> Iterator[Chunk]:
        new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        new = conversation.DEFAULT_NEW_TOKENS if new is None else new
        if new < 1:
            raise ValueError(f"max_new_tokens={new}: expected at least 1.")
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: expected at least 1.")
        longest = int(lengths_B.max())
        if longest >= self.max_length:
            raise ValueError(
                f"input_ids: {longest} tokens leave no room for an answer, a cache holds {self.max_length}. Shorten "
                f"the prompt or load the model with a larger max_length."
            )
        new = min(new, self.max_length - longest)
        seed_B = np.broadcast_to(np.asarray(seed, np.uint32), len(lengths_B))
        padded_BT = pad(ids_BT, bucket(ids_BT.shape[1]))
        room = max(bucket(longest + new, 128), padded_BT.shape[1])
        cache = self._empty(len(lengths_B), room)
        return self._programs.stream(
            padded_BT, lengths_B, cache, sampling, seed_B, stop_ids, pad_id, new, logprobs, chunk
        )

    def _sampling(self, do_sample, temperature, top_k, top_p, min_p, repetition_penalty) -> SamplingConfig:
        given = dict(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        own = {name: getattr(self.generation_config, name) for name in given}
        chosen = {name: own[name] if value is None else value for name, value in given.items()}
        return SamplingConfig(**{name: value for name, value in chosen.items() if value is not None})

    def _stops(self, eos_token_id, pad_token_id) -> tuple[tuple[int, ...], int]:
        if eos_token_id is None:
            stop_ids = self.generation_config.eos_token_ids or self.config.eos_token_ids
        else:
            stop_ids = tuple(np.atleast_1d(np.asarray(eos_token_id, np.int64)).tolist())
        pad = self.generation_config.pad_token_id if pad_token_id is None else pad_token_id
        if pad is None:
            pad = stop_ids[0] if stop_ids else 0
        return tuple(stop_ids), pad

    # -- chat --------------------------------------------------------------------------------------------------------

    chat = conversation.chat
    chat_stream = conversation.chat_stream

    # -- parts ----------------------------------------------------------------------------------------------------

    def _empty(self, slots: int, room: int) -> CacheState:
        return self._programs.empty_cache(slots, room, self.dtype, self.use_cache_quantization)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token takes in the cache."""
        return bytes_per_token(self.config, self.dtype, self.use_cache_quantization)


def default_dtype(device: jax.Device) -> str:
    """bfloat16 where the device computes in it, float16 on older GPUs, float32 on a CPU."""
    if device.platform == "cpu":
        return "float32"
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "9.0")) < 8.0:
        return "float16"
    return "bfloat16"

"""One program over a mesh: which dimension lies on which mesh axis, who holds which heads, rows and columns.

A mesh has the axes "data" (rows of a batch) and "model" (heads, the MLP's inner dimension, the vocabulary), and for
long caches "sequence": it splits the cache along its length, and the MLP and the vocabulary further; attention's
projections have a copy on each of its devices. The whole forward runs under one `jax.shard_map`: each device sees a
model of its own share, uniform in shape, and the few reductions between devices are written out (`parallel_linear.py`,
`split_cache.py`). Arrays carry names of their dimensions; `AXES` is the one table that says where a name lies.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.adapted_linear import AdaptedLinear
from qwen_jax.config import ModelConfig
from qwen_jax.linear import Linear, RMSNorm

DATA, MODEL, SEQUENCE = "data", "model", "sequence"

# Logical dimension → mesh axes, as far as a mesh has them; None: every device holds all of it.
AXES: dict[str, tuple[str, ...] | str | None] = {
    "batch": DATA,  # rows of ids, slots of the cache
    "heads": MODEL,  # heads × head_dim, side by side
    "kv_heads": MODEL,
    "cache_length": SEQUENCE,
    "mlp": (MODEL, SEQUENCE),
    "vocabulary": (MODEL, SEQUENCE),
    "hidden": None,
    "features": None,  # of a normalisation
    "layers": None,
    "length": None,
    "head_dim": None,
    "devices": (DATA, MODEL, SEQUENCE),  # an entry each
    "private": None,  # the further dimensions of a kernel's own layout, the rank of an adapter
}

KV_AXES = ("layers", "batch", "kv_heads", "cache_length", "head_dim")


def axis_of(name: str, mesh_axes: Sequence[str] = (DATA, MODEL)) -> tuple[str, ...] | str | None:
    """Where a logical dimension lies on a mesh with these axes: one axis, several, or None.

    Raises:
        ValueError: for a name that is not in `AXES`.
    """
    if name not in AXES:
        raise ValueError(f"axes: {name!r} is unknown, expected names of {sorted(AXES)}.")
    placed = AXES[name]
    placed = (placed,) if isinstance(placed, str) else placed or ()
    kept = tuple(axis for axis in placed if axis in mesh_axes)
    return kept if len(kept) > 1 else kept[0] if kept else None


def spec(names: Sequence[str], mesh_axes: Sequence[str] = (DATA, MODEL)) -> P:
    """The PartitionSpec of an array whose dimensions have these logical names, on a mesh with these axes.

    Raises:
        ValueError: for a name that is not in `AXES`, and for two dimensions on one mesh axis.
    """
    placed = [axis_of(name, mesh_axes) for name in names]
    used = [axis for axes in placed for axis in ((axes,) if isinstance(axes, str) else axes or ())]
    if len(set(used)) < len(used):
        raise ValueError(f"axes {tuple(names)}: lie on mesh axes {placed}, expected each of those at most once.")
    while placed and placed[-1] is None:
        placed.pop()
    return P(*placed)


def check_mesh(mesh: Mesh) -> None:
    """Refuses a mesh that a model cannot be laid on.

    Raises:
        ValueError: for axes other than "data" and "model" and, if wanted, "sequence" (in any order), and for manual
            axes.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh: {type(mesh).__name__}, expected a jax.sharding.Mesh, as jax.make_mesh makes it.")
    if set(mesh.axis_names) - {SEQUENCE} != {DATA, MODEL}:
        raise ValueError(
            f"mesh: axes {tuple(mesh.axis_names)}, expected {DATA!r} and {MODEL!r} in either order, and {SEQUENCE!r} "
            f'or not. Make it with jax.make_mesh((1, {mesh.size}), ("{DATA}", "{MODEL}")).'
        )
    if AxisType.Manual in mesh.axis_types:
        raise ValueError("mesh: axes of type Manual, expected Explicit or Auto. Call from outside shard_map.")


def parse_mesh(text: str) -> Mesh:
    """A mesh from its sizes along "data", "model" and, if there are three, "sequence", as "1x8" or "1x4x2".

    It has the first so many devices of all processes.

    Raises:
        ValueError: for other text, or where there are fewer devices.
    """
    sizes = text.lower().split("x")
    if len(sizes) not in (2, 3) or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(
            f"mesh={text!r}: expected two sizes, devices for rows x devices for each layer, as 1x8, or a third for the "
            "length of the cache, as 1x4x2."
        )
    shape = tuple(map(int, sizes))
    count, devices = math.prod(shape), jax.devices()
    if count > len(devices):
        raise ValueError(f"mesh={text!r}: {count} devices, but JAX sees {len(devices)} ({devices[0].platform}).")
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"mesh={text!r}: {count} devices, expected all {len(devices)} of {jax.process_count()} processes."
        )
    return jax.make_mesh(shape, (DATA, MODEL, SEQUENCE)[: len(shape)], devices=devices[:count])


def reproducible_mesh(dtype: str, kernels: str, adapter, mesh: Mesh | None) -> Mesh:
    """The mesh of a model that computes the same bits on all of them; one device is one, too.

    Raises:
        ValueError: for an option of `from_pretrained` that does not go with it.
    """
    if dtype != "float32":
        raise ValueError(f'reproducible=True: holds in float32, got {dtype}. Give dtype="float32".')
    if kernels != "auto":
        raise ValueError(f'reproducible=True: has kernels of its own, got kernels={kernels!r}. Leave it at "auto".')
    if adapter is not None:
        raise ValueError("reproducible=True: adapters are summed in the devices' order. Merge it: qwen-jax merge.")
    if mesh is not None and mesh.shape.get(SEQUENCE, 1) > 1:
        raise ValueError(
            "reproducible=True: the shares of a cache are merged in the devices' order. Leave out the axis "
            f"{SEQUENCE!r}, or make it 1."
        )
    return jax.make_mesh((1, 1), (DATA, MODEL), devices=jax.devices()[:1]) if mesh is None else mesh


def mesh_name(mesh) -> str:
    """The text that `parse_mesh` takes for a mesh (None: one device)."""
    return mesh_text(*(1 if mesh is None else mesh.shape.get(axis, 1) for axis in (DATA, MODEL, SEQUENCE)))


def mesh_text(data: int, model: int, sequence: int = 1) -> str:
    """The text that `parse_mesh` takes for these sizes, "sequence" left out where it is 1."""
    return f"{data}x{model}" + (f"x{sequence}" if sequence > 1 else "")


# -- names of the dimensions of parameters ----------------------------------------------------------------------------


def tensor_axes(weight: QuantizedTensor | DenseTensor, axes: tuple[str, str]):
    """The same tensor with the names of its dimensions in the place of each array.

    A kernel's own layout has no rows and columns: it is packed from a device's share, and the shares lie one behind the
    other along its first dimension (after the layers).
    """
    stack = ("layers",) if weight.stack else ()
    rows, columns = axes
    natural: dict[str, tuple[str, str]] = dict.fromkeys(("gptq", "mosaic_tpu", "plain", "row_pairs"), (rows, columns))
    natural["transposed"] = (columns, rows)

    def names(array, order):
        if array is None:
            return None
        if order is None:
            split = next((name for name in axes if AXES[name] is not None), "private")
            order = (split, *["private"] * (array.ndim - len(stack) - 1))
        return stack + order

    order = natural.get(weight.layout)
    if isinstance(weight, DenseTensor):
        return dataclasses.replace(weight, data=names(weight.data, order))
    return dataclasses.replace(
        weight,
        packed=names(weight.packed, order),
        scales=names(weight.scales, order),
        zeros=names(weight.zeros, order),
        permutation=None if weight.permutation is None else (*stack, rows),
    )


def parameter_axes(decoder) -> list[tuple[str, ...]]:
    """The names of the dimensions of each array of a `Decoder`, in the order of `jax.tree.leaves(decoder)`."""
    names: dict[int, tuple[str, ...]] = {}
    for module in jax.tree.leaves(decoder, is_leaf=lambda node: isinstance(node, Linear | RMSNorm)):
        if isinstance(module, Linear):
            named = tensor_axes(module.weight, module.axes)
            leaves = jax.tree.leaves(named, is_leaf=lambda node: isinstance(node, tuple))
            names |= {id(a): n for a, n in zip(jax.tree.leaves(module.weight), leaves, strict=True)}
            stack = ("layers",) if module.weight.stack else ()
            names[id(module.bias)] = (*stack, module.axes[1])
            names[id(getattr(module, "inputs", None))] = (*stack, module.axes[0])
            names[id(getattr(module, "peers", None))] = ("devices", "private")
        elif isinstance(module, RMSNorm):
            names[id(module.scale)] = ("layers", "features")[-module.scale.ndim :]
    for block in decoder.blocks:
        names[id(block.attention.key_bias)] = ("layers", "heads")
    for module in jax.tree.leaves(decoder, is_leaf=lambda node: isinstance(node, AdaptedLinear)):
        if isinstance(module, AdaptedLinear):
            names |= {id(array): axes for array, axes in module.array_axes()}
    return [names[id(leaf)] for leaf in jax.tree.leaves(decoder)]


# -- shares ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Which heads each device holds; every device has the same number, some of them possibly empty (zero).

    Attributes:
        devices: on the "model" axis.
        kv_heads: of one device.
        queries: query heads that go with each of them.
        kv_table: for each device its key/value heads, −1 an empty one; a head may have copies on several devices.
        query_table: for each device its query heads, each exactly once in the whole table, −1 an empty one.
    """

    devices: int
    kv_heads: int
    queries: int
    kv_table: tuple[tuple[int, ...], ...]
    query_table: tuple[tuple[int, ...], ...]

    @property
    def heads(self) -> int:
        """Query heads of one device."""
        return self.kv_heads * self.queries


@functools.cache
def head_layout(heads: int, kv_heads: int, devices: int) -> HeadLayout:
    """The cheapest uniform layout: each key/value head in k copies, each copy with its share of the query heads.

    k is the one for which a device has the least columns and rows to multiply: two for a query head (query, output),
    two for a key/value head. 28 heads over 4 on 8 devices: 2 copies, each with 4 heads of 7 (one of 8 is empty).
    """
    ratio = heads // kv_heads

    def shape(copies: int) -> tuple[int, int]:
        return -(-kv_heads * copies // devices), -(-ratio // copies)

    def cost(copies: int) -> int:
        slots, queries = shape(copies)
        return slots * (2 * queries + 2)

    copies = min(range(1, min(ratio, devices) + 1), key=cost)
    slots, queries = shape(copies)
    kv_table, query_table = [], []
    for slot in range(slots * devices):
        head, copy = divmod(slot, copies)
        kv_table.append(head if head < kv_heads else -1)
        for place in range(copy * queries, (copy + 1) * queries):
            query_table.append(head * ratio + place if head < kv_heads and place < ratio else -1)
    return HeadLayout(
        devices,
        slots,
        queries,
        tuple(tuple(row) for row in np.reshape(kv_table, (devices, -1)).tolist()),
        tuple(tuple(row) for row in np.reshape(query_table, (devices, -1)).tolist()),
    )


def head_columns(table: Sequence[Sequence[int]], head_dim: int) -> np.ndarray:
    """Columns [devices, heads · head_dim] of the heads in `table`; −1 where a head is empty."""
    heads_NH = np.asarray(table)
    columns_NHK = heads_NH[:, :, None] * head_dim + np.arange(head_dim)
    return np.where(heads_NH[:, :, None] < 0, -1, columns_NHK).reshape(len(heads_NH), -1)


def even_split(size: int, devices: int, multiple: int) -> np.ndarray:
    """Indices 0 … size − 1 in runs of a length divisible by `multiple`, one a device: [devices, length], −1 beyond."""
    length = -(-size // (devices * multiple)) * multiple
    index = np.arange(devices * length).reshape(devices, length)
    return np.where(index < size, index, -1)


def row_multiples(size: int, group_size: int | None) -> list[int]:
    """What the lengths of the pieces of `split_rows` may be multiples of; the last one divides the others."""
    smallest = 32  # rows that fill whole words for every number of bits
    if group_size is None or group_size >= size:
        return [smallest]
    multiples = [group_size]
    while multiples[-1] % 2 == 0 and multiples[-1] // 2 >= smallest:
        multiples.append(multiples[-1] // 2)
    return multiples


def split_rows(size: int, group_size: int | None, devices: int) -> np.ndarray:
    """Rows of a row-parallel matrix for each device: [devices, length], −1 beyond.

    Whole groups, unless that gives the fullest device more than an eighth above its share: then halves of groups, and
    so on down to 32 rows. 13696 rows in groups of 128 on 8 devices: 14 groups each, 107 of the 112 real.
    """
    splits = [even_split(size, devices, multiple) for multiple in row_multiples(size, group_size)]
    for rows in splits:
        if rows.shape[1] * devices <= 1.125 * size:
            return rows
    return min(splits, key=lambda rows: rows.shape[1])


def split_vocabulary(size: int, devices: int) -> np.ndarray:
    """Token ids of each device: [devices, width], −1 beyond the vocabulary."""
    return even_split(size, devices, 128 if size >= devices * 4096 else 8)


def local_config(config: ModelConfig, layout: HeadLayout) -> ModelConfig:
    """The config of one device's share: its own numbers of heads."""
    return dataclasses.replace(config, num_heads=layout.heads, num_kv_heads=layout.kv_heads)


def pieces_along(name: str, mesh) -> int:
    """Into how many pieces a mesh cuts a logical dimension."""
    placed = axis_of(name, mesh.axis_names)
    return math.prod(mesh.shape[axis] for axis in ((placed,) if isinstance(placed, str) else placed or ()))


# -- placing -----------------------------------------------------------------------------------------------------------


class Placement:
    """Puts NumPy arrays on a mesh, each device's piece straight to it.

    A device's number says which share it holds: its place on "model", and on "sequence" within that.

    Attributes:
        mesh: axes "data" and "model", and "sequence" or not.
        data: devices along "data".
        model: devices along "model".
        direct: whether a kernel may write to its peers' memory: this process owns all devices, numbered in their order.
        sequence: devices along "sequence", 1 where the mesh has no such axis.
        parts: model · sequence, the shares that there are.
        numbers: of the shares that devices of this process hold.
    """

    def __init__(self, mesh: Mesh):
        check_mesh(mesh)
        self.mesh = mesh
        self.data, self.model, self.sequence = (mesh.shape.get(axis, 1) for axis in (DATA, MODEL, SEQUENCE))
        self.parts = self.model * self.sequence
        process = jax.process_index()
        self._devices = []
        for place, device in np.ndenumerate(mesh.devices):
            where = dict(zip(mesh.axis_names, place, strict=True))
            if device.process_index == process:
                self._devices.append((where[MODEL] * self.sequence + where.get(SEQUENCE, 0), device))
        if not self._devices:
            raise ValueError(f"mesh: no device of process {process}, expected some of every process's.")
        self.numbers = sorted({number for number, _ in self._devices})
        ids = [device.id for device in mesh.devices.flat]
        self.direct = len(self._devices) == len(ids) and ids == list(range(len(ids)))

    def axis(self, name: str) -> tuple[str, ...] | str:
        """The mesh axis, or axes, that a logical dimension is split over."""
        found = axis_of(name, self.mesh.axis_names)
        assert found is not None, name
        return found

    def spec(self, names: Sequence[str]) -> P:
        """The PartitionSpec of an array with these dimensions."""
        return spec(names, self.mesh.axis_names)

    def sharding(self, names: Sequence[str]) -> NamedSharding:
        """Where an array with these dimensions lies."""
        return NamedSharding(self.mesh, self.spec(names))

    def each(self, table_NX: np.ndarray) -> np.ndarray:
        """A table with a row for each place on "model" as one with a row for each share."""
        return np.repeat(table_NX, self.sequence, axis=0)

    def put(self, piece: Callable[[int], np.ndarray], names: Sequence[str]) -> jax.Array:
        """A global array from the piece of each share; no dimension may lie on "data"."""
        pieces = {number: np.asarray(piece(number)) for number in self.numbers}
        shape = list(pieces[self.numbers[0]].shape)
        assert len(shape) == len(names), (shape, names)
        for place, name in enumerate(names):
            shape[place] *= pieces_along(name, self.mesh)
        arrays = [jax.device_put(pieces[number], device) for number, device in self._devices]
        return jax.make_array_from_single_device_arrays(tuple(shape), self.sharding(names), arrays)

    def put_tree(self, pieces: Mapping[int, object], names):
        """`put` for each array of equal trees; `names` is a tree of the same shape with tuples of names."""
        flat = {number: jax.tree.leaves(tree) for number, tree in pieces.items()}
        structure = jax.tree.structure(pieces[self.numbers[0]])
        names = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple))
        arrays = [self.put(lambda number, n=n: flat[number][n], axes) for n, axes in enumerate(names)]
        return jax.tree.unflatten(structure, arrays)

    def rows(self, array: np.ndarray, names: Sequence[str]) -> jax.Array:
        """A global array of which every process holds all in NumPy."""
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, self.sharding(names), lambda index: array[index])

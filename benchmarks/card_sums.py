"""A chain of sums over the cards of this host, ours (one launch each) and XLA's: microseconds each, and whether equal.

    timeout 100 python benchmarks/card_sums.py

Every second sum is normed, as in a layer, and each depends on the one before; one of XLA's small operations is counted
with each. Bits are compared for two cards: of more, XLA adds in an order of its own. The caller ends what hangs.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import card_sums
from pallas_kernels.chip import default_chip
from qwen_jax import peers
from qwen_jax.bench.timing import seconds
from qwen_jax.linear import RMSNorm
from qwen_jax.sharding import DATA, MODEL, Placement

SUMS, EPSILON = 160, 1e-6
SHAPES = [(1, 4096), (1, 8192), (8, 8192), (32, 4096), (32, 8192), (64, 8192), (7, 3584)]


def ours(share, hidden, scale_LD, layer, addresses):
    """(sum, normed, sum of the normed)."""
    hidden, normed = card_sums.add_sum_norm(
        share, hidden, scale_LD, layer, addresses, epsilon=EPSILON, chip=default_chip()
    )
    return hidden, normed, card_sums.add_sum(normed, hidden, addresses, chip=default_chip())


def xla(share, hidden, scale_LD, layer, addresses):
    """The same."""
    del addresses
    hidden = hidden + lax.psum(share, MODEL)
    normed = RMSNorm(scale_LD, EPSILON)(hidden, layer)
    return hidden, normed, hidden + lax.psum(normed, MODEL)


def chain(form, shares_NMD, hidden_MD, scale_LD, addresses):
    """The residual stream after `SUMS` sums."""
    for n in range(SUMS // 2):
        _, _, hidden_MD = form(shares_NMD[0] + hidden_MD, hidden_MD, scale_LD, n % 2, addresses)
        hidden_MD = hidden_MD * jnp.bfloat16(2**-3)
    return hidden_MD


def main() -> None:
    """Prints a line a shape."""
    cards, random, good = len(jax.devices()), np.random.default_rng(0), True
    mesh = jax.make_mesh((1, cards), (DATA, MODEL))
    placement = Placement(mesh)

    specs = (P(MODEL), P(), P(), placement.spec(("devices", "private")))

    def run(function, form):
        local = functools.partial(function, form)
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(MODEL), check_vma=False))

    def first(form, shares_NMD, hidden_MD, scale_LD, addresses):
        return jnp.stack(form(shares_NMD[0], hidden_MD, scale_LD, 1, addresses))

    for rows, width in SHAPES:
        addresses = peers.addresses(placement, width, "bfloat16")
        if addresses is None:
            sys.exit(f"{cards} {default_chip()}: no sums of our own here.")
        draw = lambda *shape: jnp.asarray(random.normal(0, 1, shape), jnp.bfloat16)  # noqa: E731
        arrays = draw(cards, rows, width), draw(rows, width), jnp.ones((2, width), jnp.float32)
        arrays = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=False)]
        arrays.append(addresses)
        found, want = (np.asarray(run(first, form)(*arrays), np.float64) for form in (ours, xla))
        found, want = (x.reshape(cards, 3, rows, width) for x in (found, want))
        other, apart = np.count_nonzero(found[:, 0] != want[:, 0]), np.count_nonzero(found != found[:1])
        error = np.linalg.norm(found - want) / np.linalg.norm(want)
        chains = [functools.partial(run(chain, form), *arrays) for form in (ours, xla)]
        one, another = (np.asarray(chains[0]()).tobytes() for _ in range(2))
        times = [seconds(each) / SUMS * 1e6 for each in chains]
        good &= (cards > 2 or not other) and not apart and error < 2**-7 and one == another
        print(f"{rows} x {width}: {times[0]:.1f} us, XLA {times[1]:.1f}; error {error:.1e}, other numbers {other}, "
              f"cards differ in {apart}, twice {'the same' if one == another else 'OTHER'}", flush=True)  # fmt: skip
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

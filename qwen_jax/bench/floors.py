"""The least time that a measured case can take: its bytes at a copy's rate, or its operations at the chip's."""

import math
from typing import Any

import jax

from qwen_jax.bench import prefill
from qwen_jax.plan.chips import CHIPS


def add_to_call(record: dict[str, Any], copy: float, digits: int, operations_us: float = 0.0) -> None:
    """Adds floor, rate and shares to a record with "us" and "bytes" of one operation; one that failed stays as it is.

    Args:
        record: of `matmul` or `attention`.
        copy: GB/s of a copy in the same run.
        digits: that the floor's µs are rounded to.
        operations_us: at the chip's rate, where they may take longer than the bytes.
    """
    if "us" in record:
        floor, speed = max(record["bytes"] / copy / 1e3, operations_us), record["bytes"] / record["us"] / 1e3
        record |= {"floor_us": round(floor, digits), "of_floor": floor / record["us"]}
        record |= {"gigabytes_per_second": speed, "of_copy": speed / copy}


def add(kind: str, record: dict[str, Any], copy: float, chip: str | None = None) -> None:
    """Adds floor and shares to a record of `decode` or `prefill`; one that failed stays as it is.

    Args:
        kind: "decode" or "prefill".
        record: of either.
        copy: GB/s of a copy in the same run.
        chip: `device_kind`, for the rate of operations; None for JAX's first device.
    """
    if kind == "decode" and "gigabytes_per_second" in record:
        record["of_copy"] = record["gigabytes_per_second"] / copy
        record["floor_ms"] = record["bytes_per_step"] / copy / 1e6
    if kind == "prefill" and "milliseconds" in record:
        if chip is None:
            chip = jax.devices()[0].device_kind
        flops = next((known.flops for known in CHIPS.values() if known.kind == chip), None)
        if flops is not None:
            count = prefill.operations(record["model"], record["layers"], record["batch"], record["context"])
            devices = math.prod(map(int, record["mesh"].split("x")))
            record["floor_ms"] = count / (flops * devices) * 1e3
            record["of_floor"] = record["floor_ms"] / record["milliseconds"]

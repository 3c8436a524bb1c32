"""Published facts about TPUs and GPUs, from the data files in assets/devices."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parent / "assets" / "devices"


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceFacts:
    """Facts about a kind of device. A device is what JAX calls one: of a TPU7x chip, one half.

    name: name of the data file, such as "v5e" or "a100-80gb".
    platform: "tpu" or "cuda".
    device_kinds: the values of `jax.Device.device_kind` that the file is for. All have the same
      `peak_flops`; the other facts are those of the first one.
    memory_bytes: size of the device's memory.
    memory_bytes_per_s: rate at which it reads its memory.
    peak_flops: rate of dense bfloat16 matrix products in FLOP/s.
    topologies: TPU slices that a program can be compiled for without them, from small to large, as
      numbers of chips in each direction.
    devices_per_chip: number of devices of a TPU chip.
    gpu: description of a GPU for XLA's compiler, with the names of its GpuDeviceInfoProto; None for
      a TPU.
    sources: where the facts are published.
    """

    name: str
    platform: str
    device_kinds: tuple[str, ...]
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops: float
    sources: tuple[str, ...]
    topologies: tuple[str, ...] = ()
    devices_per_chip: int = 1
    gpu: Mapping | None = None


@functools.cache
def known_devices() -> dict[str, DeviceFacts]:
    """Returns all kinds of devices by name."""
    paths = sorted(_FOLDER.glob("*.json"))
    return {path.stem: _read(path) for path in paths}


def facts_of(device_kind: str) -> DeviceFacts | None:
    """Returns the facts about the devices with a `jax.Device.device_kind`; None if unknown."""
    devices = known_devices().values()
    return next((facts for facts in devices if device_kind in facts.device_kinds), None)


def _read(path: Path) -> DeviceFacts:
    fields = json.loads(path.read_text())
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return DeviceFacts(path.stem, **fields | lists)

"""What the PyTorch sides of the benchmarks share: models of `transformers` with random weights."""

import inspect
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

from benchmarks.timing import repeated
from janus_jax.families import janus_transformers
from janus_jax.models.janus import JanusConfig

PACKAGES = ("torch", "transformers", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COPY_BYTES = 2**30 if DEVICE == "cuda" else 2**26
COPIES = 20
IMAGE_TOKEN = 5  # stands for an image in a prompt
STD = 0.02  # standard deviation of random weights


def device_name() -> str:
    """Returns the name of the GPU, as JAX has it, or "cpu"."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def now() -> float:
    """Waits for the device and returns the time."""
    synchronize()
    return time.perf_counter()


def random_model(cfg: JanusConfig) -> transformers.JanusForConditionalGeneration:
    """Returns JanusForConditionalGeneration with the sizes of `cfg`, all of it in its dtype."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    transformers.utils.logging.set_verbosity_error()
    name = np.dtype(cfg.language_model.dtype).name
    config = transformers.JanusConfig(**janus_transformers.write(cfg, name, IMAGE_TOKEN))
    with torch.device("meta"):
        model = transformers.JanusForConditionalGeneration(config)
    model = model.to(getattr(torch, name)).to_empty(device=DEVICE).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, STD)
        else:
            parameter.fill_(1)
    _fill_buffers(model)
    return model


def _fill_buffers(model: torch.nn.Module) -> None:
    """Computes the buffers that are not random: positions of patches and RoPE frequencies."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if "position_ids" in name:
                buffer.copy_(torch.arange(buffer.numel(), device=DEVICE).reshape(buffer.shape))
    llama = model.model.language_model
    with torch.device(DEVICE):
        llama.rotary_emb = type(llama.rotary_emb)(config=llama.config)


def takes_cache(module: torch.nn.Module) -> str:
    """Returns the name of the argument that takes the cache; newer releases call it `cache`."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def copy_bandwidth() -> float:
    """Measures the bandwidth of copies on the device in bytes/s, as jax_side.copy_bandwidth."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)
        synchronize()

    copies()
    return 2 * COPY_BYTES * COPIES / statistics.median(repeated(copies, 5))


def peak_memory() -> dict[str, float]:
    """Returns peak_gb, the peak memory of the GPU since random_model; empty on the CPU."""
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if DEVICE == "cuda" else {}


def compiled(function: Callable, backend: str) -> Callable:
    """Returns the function compiled for one shape, with `inductor` as a CUDA graph on a GPU.

    backend: "inductor", or another backend of torch.compile, to test this on the CPU in less time.
    """
    mode = dict(mode="reduce-overhead") if backend == "inductor" else {}
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False, **mode)

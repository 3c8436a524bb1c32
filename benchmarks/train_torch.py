"""Measures a training step with PyTorch, see benchmarks/train.py."""

import statistics

import torch
import transformers

from benchmarks.models import config, shapes
from benchmarks.records import Record, spread
from benchmarks.timing import repeated, seconds_of
from benchmarks.torch_side import DEVICE, PACKAGES, STD, device_name, peak_memory, synchronize
from benchmarks.train import case
from janus_jax.families.config import write_llama

LEARNING_RATE, BETAS = 1e-4, (0.9, 0.95)  # as stage 2


class Training:
    """Takes one step per call, on the same rows, one row at a time."""

    def __init__(self, model: str, batch_size: int, seq_len: int):
        sizes = write_llama(config(model).language_model)
        llama = transformers.LlamaConfig(**sizes, initializer_range=STD)
        with torch.device(DEVICE):
            self._model = transformers.LlamaForCausalLM(llama).train()
            self._tokens = torch.randint(1, llama.vocab_size, (batch_size, seq_len))
        self._model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = self._model.parameters()
        self._optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, BETAS, fused=True)

    def __call__(self) -> None:
        for row in self._tokens:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self._model(input_ids=row[None], labels=row[None], use_cache=False).loss
            (loss / len(self._tokens)).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronize()


def measure(record: Record, model: str, batch_size: int, seq_len: int, runs: int) -> None:
    """Measures one model. For the arguments see train.measurement."""
    record.describe(device_name(), PACKAGES)
    transformers.utils.logging.set_verbosity_error()
    training = Training(model, batch_size, seq_len)
    first, seconds = seconds_of(training), repeated(training, runs)
    figures = dict(
        tokens_per_s=batch_size * seq_len / statistics.median(seconds),
        step_s=spread(seconds),
        first_s=first,
    )
    name = case(model, "torch_eager", batch_size, seq_len)
    record.add(name, figures | peak_memory(), shapes=shapes(config(model)))

"""The settings of a run, checked, and what they name: checkpoint, processor, devices and rows."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from janus_jax.data.loading import RowsConfig, open_rows
from janus_jax.data.records import KINDS
from janus_jax.data.skipped import Skipped
from janus_jax.data.sources import FORMATS, Formats
from janus_jax.families.family import ModelConfig
from janus_jax.interop.files import Report
from janus_jax.interop.folders import check_folder, check_processor
from janus_jax.interop.load import DTYPES, Folder, check_weights, open_folder
from janus_jax.models.layers import REMAT_CHOICES
from janus_jax.paths import check_local
from janus_jax.processing.processor import Processor
from janus_jax.sharding import check_mesh, make_mesh, num_batch_shards, parse_mesh
from janus_jax.training.lora import LoRAConfig
from janus_jax.training.stages import ALL_BUT_VQ, base_config
from janus_jax.training.step import learning_rates

MODEL = "model"  # folder of the trained model in a run's output
SCAN_CHOICES = ("auto", "on", "off")


def no_progress(description: str) -> contextlib.AbstractContextManager[None]:
    """Reports nothing."""
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The settings of a run and what they name. No weights are loaded.

    Attributes:
        settings: ConfigDict of stages.base_config.
        source: the initial checkpoint folder.
        processor: the processor of the initial checkpoint.
        model_cfg: the sizes of its model, with the dtypes to train in.
        mesh: the devices.
        rows: how the rows of a batch are made.
        lora: the adapters to train instead of the weights, or None.
        formats: the source formats that a mixture may use, by name.
        progress: called with the description of a task; returns a context manager that yields the
            function to report progress to, or None.
    """

    settings: Any
    source: Folder
    processor: Processor
    model_cfg: ModelConfig
    mesh: Mesh
    rows: RowsConfig
    lora: LoRAConfig | None
    formats: Formats
    progress: Callable[[str], contextlib.AbstractContextManager[Report | None]]

    @classmethod
    def from_settings(
        cls, settings, formats: Formats = FORMATS, progress=no_progress
    ) -> "Inputs":
        """Checks the settings, and that the weights of the initial checkpoint fit its config.json.

        settings: ConfigDict of stages.base_config.
        formats: the source formats that a mixture may use, by name.
        progress: see the attribute; by default nothing is reported.
        Raises FileNotFoundError or ValueError if a setting or the initial checkpoint cannot be used
        for training.
        """
        check_settings(settings)
        init = check_init(settings.init)
        check_output(init, settings)
        source = open_folder(init)
        processor = source.processor()
        check_processor(init, processor, source.cfg)
        mesh = parse_mesh(settings.mesh) if settings.mesh else make_mesh(fsdp=jax.device_count())
        check_mesh(mesh, source.sizes.heads)
        model_cfg = source.cfg.with_dtype(DTYPES[settings.dtype]).with_remat(settings.remat)
        lora, rows = lora_config(settings), rows_config(settings, mesh)
        check_weights(source)  # before a model with the sizes in config.json is built
        return cls(settings, source, processor, model_cfg, mesh, rows, lora, formats, progress)

    def open_rows(
        self, folder: Path, mixture: dict | None = None
    ) -> tuple[grain.IterDataset, Skipped]:
        """Opens the rows of this process and their skipped records, see data/loading.py.

        folder: where skipped records are listed. mixture: replaces that of the settings.
        Raises ValueError or FileNotFoundError if the mixture cannot be opened.
        """
        rows = self.rows if mixture is None else dataclasses.replace(self.rows, mixture=mixture)
        hosts = jax.process_index(), jax.process_count()
        return open_rows(
            rows, self.processor, self.source.cfg, folder, *hosts, formats=self.formats
        )


def check_init(init: str) -> Path:
    """Returns the checkpoint folder `init`; "janus_tiny" is the shipped model.

    Raises FileNotFoundError if it is not a checkpoint folder.
    """
    try:
        return check_folder(init)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init must be a checkpoint folder: {error}") from None


def check_output(init: Path, settings) -> None:
    """Raises ValueError if `output` is not a folder, or if the run would replace `init`."""
    output = settings.output
    check_local("output", output)
    if not output or (Path(output).exists() and not Path(output).is_dir()):
        raise ValueError(f"output must be a writable folder, got {output!r}")
    if init.resolve() == (Path(output) / MODEL).resolve():
        raise ValueError(f"init must not be the model folder in output, got {settings.init}")


def lora_config(settings) -> LoRAConfig | None:
    """Returns the settings of LoRA, None without it.

    Raises ValueError if one of them is out of its range, or combined with `trained`.
    """
    rank, trained = settings.lora_rank, settings.trained
    if not rank:
        return None
    if trained != ALL_BUT_VQ:
        rule = "trained cannot be combined with LoRA; set lora_rank=0 or remove trained"
        raise ValueError(f"{rule}, got lora_rank={rank} trained={trained!r}")
    return LoRAConfig(rank, settings.lora_alpha, settings.lora_targets)


def rows_config(settings, mesh: Mesh) -> RowsConfig:
    """Returns the settings of the rows.

    Raises ValueError if the rows cannot be divided among the devices and processes.
    """
    values = {field.name: settings[field.name] for field in dataclasses.fields(RowsConfig)}
    rows = RowsConfig(**values | dict(mixture=settings.mixture.to_dict()))
    parts = num_batch_shards(mesh) * settings.accumulate
    if rows.batch_size % parts:
        rule = f"batch_size must be a multiple of data * fsdp * accumulate = {parts}"
        raise ValueError(f"{rule}, got {rows.batch_size}")
    rows.own_streams(jax.process_index(), jax.process_count())
    return rows


def check_settings(settings) -> None:
    """Raises ValueError for a number out of its range, or a name that is not a valid choice."""
    if unknown := sorted(set(settings) - set(base_config())):
        raise ValueError(f"the config has settings that do not exist: {', '.join(unknown)}")
    _check_numbers(settings)
    learning_rates(settings)  # raises if the settings of the schedule do not fit together
    if settings.eval_every and not settings.eval_mixture:
        raise ValueError(f"eval_every={settings.eval_every} requires eval_mixture, got none")
    if settings.sample_every and not (settings.prompts or settings.questions):
        given = f"sample_every={settings.sample_every}"
        raise ValueError(f"{given} requires prompts or questions, got none")
    names = dict(dtype=DTYPES, model_dtype=DTYPES, remat=REMAT_CHOICES, scan=SCAN_CHOICES)
    for name, choices in names.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {settings[name]!r}")
    _check_loss_weights(settings.loss_weights.to_dict())
    for pair in settings.questions:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"questions must be pairs (image path, question), got {pair!r}")
    for name in ("trained", "reinit", "lora_targets"):
        try:
            re.compile(settings[name])
        except re.error as error:
            rule = "must be a regular expression"
            raise ValueError(f"{name} {rule}, got {settings[name]!r}: {error}") from None


def _check_numbers(settings) -> None:
    counts = ("steps", "log_every", "save_every", "keep", "accumulate", "chunk", "eval_batches")
    minimums = dict.fromkeys(counts, 1)
    minimums |= dict.fromkeys(("seed", "lora_rank", "eval_every", "sample_every"), 0)
    for name, minimum in minimums.items():
        if settings[name] < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {settings[name]}")
    for name in ("ema_decay", "b1", "b2"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {settings[name]}")
    norm = settings.max_grad_norm
    if not 0 < norm < math.inf:
        raise ValueError(f"max_grad_norm must be positive and finite, got {norm}")
    for name in ("learning_rate", "end_learning_rate", "weight_decay"):
        if not 0 <= settings[name] < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {settings[name]}")
    if settings.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {settings.seed}")


def _check_loss_weights(weights: dict[str, float]) -> None:
    if weights.keys() != set(KINDS):
        raise ValueError(f"loss_weights must have the keys {', '.join(KINDS)}, got {weights}")
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"loss_weights must be at least 0, and one positive, got {weights}")

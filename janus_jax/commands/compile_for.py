"""The command line of `python -m janus_jax.compile_for`."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_jax.commands.config_flag import check_overrides, load_config, settings_errors
from janus_jax.commands.terminal import OneLineParser

if TYPE_CHECKING:
    from janus_jax.aot.jobs import Job
    from janus_jax.devices import DeviceFacts
    from janus_jax.families.family import ModelConfig

COMMAND = "python -m janus_jax.compile_for"
NAME = "compile_for"
_TEXT_LENGTH = 64  # default length of a prompt, without its images
# Flags that only some jobs use.
_JOBS_OF_FLAGS = {
    "--num_images": ("draw", "answer"),
    "--max_batch": ("draw",),
    "--prompt_length": ("draw", "answer"),
    "--max_new_tokens": ("answer",),
    "--dtype": ("draw", "answer"),
    "--config": ("train",),
    "--count": ("train",),
}
_EPILOG = f"""\
examples:
  {COMMAND} --device h100 --model janus_pro_7b --job draw --num_images 4
  {COMMAND} --device v5e --model janus_pro_7b --job answer --mesh tensor=4
  {COMMAND} --device h100 --count 8 --model janus_pro_1b --job train \\
      --config=configs/janus_pro_1b_stage2.py --config.remat=full --config.accumulate=16
"""


def make_parser() -> OneLineParser:
    """Returns the parser of all flags except --config.NAME=VALUE."""
    from janus_jax.aot.topology import device_names
    from janus_jax.families.registry import released_models

    parser = OneLineParser(
        NAME,
        prog=COMMAND,
        description="Compile the programs of sample.py or train.py for TPUs or GPUs that are not "
        "in this machine,\nand report the memory, the collectives and the kernels. Exits with "
        "status 1 if the job\ndoes not fit.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", required=True, choices=device_names(), help="kind of device")
    text = "draw: generate images; answer: answer a question about images; train: a training step"
    add("--job", required=True, choices=("draw", "answer", "train"), help=text)
    text = (
        f"the model: {', '.join(released_models())}, or a checkpoint folder, whose weights are "
        "not read (default for --job train: init of the config)"
    )
    add("--model", metavar="MODEL", help=text)
    text = (
        'devices to shard over, such as "tensor=4" (default: one; for --job train: all of '
        "--topology or --count, on fsdp)"
    )
    add("--mesh", default="", metavar="AXIS=N,...", help=text)
    text = "TPU slice (default: the smallest one with enough devices)"
    add("--topology", default="", metavar="2x4", help=text)
    add("--count", type=_count, metavar="N", help="number of GPUs of --job train (default: 1)")
    text = "number of images to generate, or of images in the question (default: 1)"
    add("--num_images", type=_count, metavar="N", help=text)
    text = "maximum number of images to generate at a time"
    add("--max_batch", type=_count, metavar="N", help=text)
    text = "tokens of the prompt, with those of its images (default: 64 plus those of the images)"
    add("--prompt_length", type=_count, metavar="N", help=text)
    text = "maximum number of tokens of the answer (default: 256)"
    add("--max_new_tokens", type=_count, metavar="N", help=text)
    text = "dtype of the jobs draw and answer (default: bfloat16)"
    add("--dtype", choices=("bfloat16", "float32"), help=text)
    text = "config of --job train; --config.NAME=VALUE changes a setting, as for train.py"
    add("--config", metavar="CONFIG", help=text)
    text = "share of a GPU's memory that JAX may use (default: 0.75, as in JAX)"
    add("--memory_fraction", type=_fraction, metavar="F", help=text)
    add("--json", action="store_true", help="print the report as JSON, sizes in bytes")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return value


def make_job(args: argparse.Namespace, overrides: Sequence[str], known: Sequence[str]) -> "Job":
    """Returns the job that the flags describe.

    Args:
        args: the flags. overrides: arguments --config.NAME=VALUE. known: names of all flags.
    Raises:
        ValueError, FileNotFoundError: flags do not fit together or one is missing; there is no such
            model or config; or the compiler is not installed.
    """
    from janus_jax.aot.jobs import Answer, Draw, Train
    from janus_jax.devices import known_devices
    from janus_jax.families.registry import sizes_of
    from janus_jax.interop.load import DTYPES

    facts = known_devices()[args.device]
    check_overrides(overrides, known)
    _check_flags(args, overrides, facts.platform)
    common = dict(facts=facts, topology=args.topology, mesh=args.mesh)
    if args.job == "train":
        return Train(**common | _training(args, facts, load_config(args.config, overrides)))
    if args.model is None:
        raise ValueError("--model is required")
    cfg = find_model(args.model).with_dtype(DTYPES[args.dtype or "bfloat16"])
    common |= dict(cfg=cfg, num_images=args.num_images or 1)
    if args.job == "draw":
        length = args.prompt_length or _TEXT_LENGTH
        return Draw(**common, prompt_length=length, max_batch=args.max_batch)
    tokens = common["num_images"] * sizes_of(cfg).input_image_tokens
    length = args.prompt_length or _TEXT_LENGTH + tokens
    return Answer(**common, prompt_length=length, max_new_tokens=args.max_new_tokens or 256)


def _training(args: argparse.Namespace, facts: "DeviceFacts", config) -> dict:
    """Returns the model, the mesh and the config of a training job, as arguments of Train."""
    from janus_jax.families.registry import released_models

    if config.task != "stage":
        raise ValueError(f"--job train needs a config whose task is stage, got {config.task!r}")
    models = released_models()
    if args.model is None and config.init not in models and not Path(config.init).is_dir():
        raise ValueError(
            f"--model is required, a checkpoint folder or one of {', '.join(models)}, because init "
            f"of the config is not a folder, got {config.init!r}"
        )
    if config.mesh and (args.mesh or args.count):
        flag = "--mesh" if args.mesh else "--count"
        raise ValueError(f"{flag} cannot be combined with the config's mesh={config.mesh}")
    mesh = args.mesh or config.mesh or _fsdp_mesh(facts, args)
    return dict(cfg=find_model(args.model or config.init), mesh=mesh, config=config)


def _check_flags(args: argparse.Namespace, overrides: Sequence[str], platform: str) -> None:
    """Raises ValueError for a flag that the job or the kind of device does not use."""
    has_overrides = any("config." in word for word in overrides)
    if overrides and not has_overrides:
        raise ValueError(f"arguments must be flags, got {overrides[0]!r}")
    for flag, jobs in _JOBS_OF_FLAGS.items():
        given = getattr(args, flag[2:]) or (flag == "--config" and has_overrides)
        if given and args.job not in jobs:
            hint = "; use --mesh, such as --mesh tensor=4" if flag == "--count" else ""
            raise ValueError(f"{flag} cannot be combined with --job {args.job}{hint}")
    if platform == "tpu" and (args.count or args.memory_fraction):
        flag = "--count" if args.count else "--memory_fraction"
        hint = "; use --topology, such as --topology 2x4" if args.count else ""
        raise ValueError(f"{flag} is for GPUs, got --device {args.device}{hint}")
    if platform == "cuda" and args.topology:
        hint = "--count" if args.job == "train" else "--mesh"
        raise ValueError(f"--topology is for TPUs, got --device {args.device}; use {hint}")
    if args.count and args.mesh:
        raise ValueError("--count cannot be combined with --mesh, which has the number of GPUs")
    if args.topology and not args.mesh and args.job != "train":
        raise ValueError("--topology needs --mesh to shard over the slice, such as --mesh tensor=4")


def _fsdp_mesh(facts: "DeviceFacts", args: argparse.Namespace) -> str:
    """Returns the mesh of a run that names none: all devices on fsdp, as train.py does."""
    from janus_jax.aot.topology import num_devices

    count = num_devices(facts, args.topology) if args.topology else args.count
    return f"fsdp={count or 1}"


def find_model(name: str) -> "ModelConfig":
    """Returns the config of a released model or of the model in a checkpoint folder.

    Raises:
        ValueError: there is neither such a model nor such a folder.
    """
    from janus_jax.families.registry import released_models
    from janus_jax.interop.load import open_folder

    models = released_models()
    if name in models:
        return models[name]()
    if not name or not Path(name).is_dir():
        known = ", ".join(models)
        raise ValueError(f"--model must be a checkpoint folder or one of {known}, got {name!r}")
    return open_folder(name).cfg


def run(args: argparse.Namespace, job: "Job") -> bool:
    """Compiles a job and prints the report. Returns whether it fits."""
    from janus_jax.aot import report
    from janus_jax.aot.changes import find_change
    from janus_jax.aot.measure import GPU_MEMORY_FRACTION, measure

    fraction = args.memory_fraction or GPU_MEMORY_FRACTION
    job.held()  # raises errors about the mesh and the config before the first line is printed
    _log("compiling; large models take minutes")
    measured = measure(job, fraction, _log)
    facts = report.as_dict(measured, args.model or job.config.init)
    if not args.json:  # now, because the search for a change may take long or be interrupted
        print("\n".join(report.lines(facts)), flush=True)
    if not measured.fits:
        facts |= report.advice_dict(find_change(measured, fraction, _log))
    print(json.dumps(facts) if args.json else report.verdict(facts))
    return measured.fits


def _log(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. argv: arguments after the command; None means those of the process."""
    # Python calls its own handlers only after XLA is done, which may take minutes. Nothing is
    # written that a handler would have to remove.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ["JAX_PLATFORMS"] = "cpu"  # devices of this machine are not used
    parser = make_parser()
    args, overrides = parser.parse_known_args(argv)
    with settings_errors(NAME):
        if not run(args, make_job(args, overrides, parser.flag_names())):
            sys.exit(1)

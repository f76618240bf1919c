"""The options of a training itself, for :mod:`dyhead_cuda.commands.arguments`.

Like that module it imports nothing that ``--help`` should not need.
"""

from __future__ import annotations

from typing import Any, get_args

from dyhead_cuda.commands import train_defaults
from dyhead_cuda.commands.options import integer, number
from dyhead_cuda.detection.names import DEVICES, Amp, Optimizer, Schedule
from dyhead_cuda.detection.training.config import TrainConfig

# Beyond these, options can only be mistakes: no memory or time is enough.
MAX_BATCH, MAX_WORKERS, MAX_EPOCHS = 4096, 512, 1_000_000
MAX_RATE, MAX_FACTOR = 1e30, 1e6  # together within float32
MAX_EMA = 0.999999
_USUAL = TrainConfig(1)  # for the defaults


def add(group: Any) -> None:
    """Adds the options to a group of ``python -m dyhead_cuda train``."""
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=integer(1),
        metavar="N",
        help="steps of the optimizer in all; a run that is there can be given more "
        f"({train_defaults.stated('steps')})",
    )
    length.add_argument(
        "--epochs",
        type=number(0.001, MAX_EPOCHS),
        metavar="N",
        help="in place of --steps: so many passes over the images (default: as --steps says)",
    )
    group.add_argument(
        "--batch-size",
        type=integer(1, MAX_BATCH),
        default=_USUAL.batch_size,
        metavar="N",
        help="images per step and process (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=get_args(Optimizer),
        default=_USUAL.optimizer,
        help="sgd has a momentum of 0.9 (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=number(1e-12, MAX_RATE),
        metavar="RATE",
        help=f"the highest learning rate ({train_defaults.stated('lr')})",
    )
    group.add_argument(
        "--offset-lr",
        type=number(0, MAX_FACTOR),
        default=_USUAL.offset_lr,
        metavar="FACTOR",
        help="factor on the learning rate of the convolutions that predict where the head samples "
        "its maps (default: %(default)s)",
    )
    group.add_argument(
        "--body-lr",
        type=number(0, MAX_FACTOR),
        default=_USUAL.body_lr,
        metavar="FACTOR",
        help="factor on the learning rate of the backbone; 0.1 is usual where it has pretrained "
        "weights (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=get_args(Schedule),
        default=_USUAL.schedule,
        help="how the learning rate falls after the warmup: cosine, to 0 at the last step, or "
        "step, to a tenth after 8/12 and 11/12 of the steps (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay",
        type=number(0, MAX_RATE),
        default=_USUAL.weight_decay,
        metavar="RATE",
        help="of weights; biases and normalisations have none (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-steps",
        type=integer(0),
        default=_USUAL.warmup_steps,
        metavar="N",
        help="first steps, in which the learning rate grows from almost 0 (default: %(default)s)",
    )
    group.add_argument(
        "--clip-norm",
        type=number(0),
        default=_USUAL.clip_norm,
        metavar="NORM",
        help="gradients with a larger L2 norm are scaled down to it; 0: never "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--amp",
        choices=get_args(Amp),
        default=_USUAL.amp,
        help="mixed precision: compute in 16 bits where that is safe (default: %(default)s)",
    )
    group.add_argument(
        "--ema",
        type=number(0, MAX_EMA),
        default=_USUAL.ema,
        metavar="DECAY",
        help="measure and keep as the best an exponential moving average of the weights; 0.9998 "
        "is usual for long runs, 0: the weights themselves (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=integer(0),
        default=_USUAL.seed,
        metavar="N",
        help="of the first weights and of the order of the images (default: %(default)s)",
    )
    group.add_argument(
        "--eval-every",
        type=integer(1),
        metavar="STEPS",
        help="steps between measurements on val; there is always one after the last step (default: "
        f"for digits a tenth of the steps, at least {train_defaults.MIN_EVAL_EVERY}; for a folder "
        "only after the last step)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=integer(1),
        default=_USUAL.checkpoint_every,
        metavar="STEPS",
        help="steps between checkpoints, from which a stopped run goes on (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=integer(0, MAX_WORKERS),
        default=_USUAL.workers,
        metavar="N",
        help="processes that load images beside the training; 0: it loads them itself "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        default=_USUAL.device,
        help="auto: the GPUs if there are any (default: %(default)s)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="stop with an error at operations whose result varies from run to run, as some do on "
        "GPUs (default: run them)",
    )

"""The options of a run: what may be asked for, the defaults, and how they are stored."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradbits.core.checks import check_bits, check_choice, check_integer, check_number
from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.train.datasets import DATA_SETS, TEXT_SETS
from gradbits.train.entry import FLOAT, Entry, parse_entry, parse_override
from gradbits.train.models import IMAGE_MODELS, TEXT_MODELS
from gradbits.train.sharing import SHARE_BITS
from gradbits.wire import Codec, codec, codecs
from gradbits.wire.baselines import BASELINES

OPTIMIZERS = ("sgd", "adam", "adamw", "quantized_adam", "onebit_adam")
OWN_WIRE = ("quantized_adam", "onebit_adam")  # optimizers that talk to the other ranks themselves
WIRE_OPTIONS = ("wire_bits", "wire_bucket", "wire_feedback", "wire_start", "entropy")
PATHS = ("data_dir", "text", "init")
SCHEDULES = ("cosine", "constant")
COMPUTE = ("auto", "integer", "simulate")
DRAWS = 32
LATE = ("measure_variance", "draws")  # change no number of the training: a finished run may still be asked for them
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4},
    "small_cnn": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "resnet20": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "resnet18": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "mobilenet": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-5},
    "gpt": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01},
}
OTHER_MODEL: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
# data -> (batch size, epochs, steps)
DATA_DEFAULTS: dict[str, tuple[int, int | None, int | None]] = {
    "digits": (128, 40, None),
    "fashion-mnist": (128, 3, None),
    "mnist": (128, 2, None),
    "idx": (128, 3, None),
    "pydoc": (16, None, 400),
    "text": (16, None, 400),
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides the numbers of a run; ``None`` stands for the default, which ``resolved`` fills in.

    Args:
        data: a name from ``DATA_SETS``; ``data_dir`` and ``text`` say where it is, ``limit`` keeps the first samples.
        model: a built-in name or ``package.module:factory``; ``model_set`` holds ``name=value`` texts for it.
        init: a model file that every network starts from, in place of the seed's weights.
        networks: entries to train, each ``name`` or ``name:path=value``; ``overrides`` go to all quantized ones.
        seeds: one training per entry and seed.
        epochs, steps: length of a training; one of them.
        batch_size: samples of a batch.
        optimizer: ``sgd`` (momentum 0.9), ``adam``, ``adamw``, ``quantized_adam`` or ``onebit_adam``; ``lr`` and
            ``weight_decay`` are its arguments.
        wire: codec of the gradients between ranks, or ``none``, ``fp16``, ``bf16`` or ``powersgd`` for PyTorch's own.
        wire_bits, wire_bucket: options of the codec; ``wire_feedback`` and ``entropy`` as in ``gradbits.wire.codec``;
            ``wire_start`` steps go uncompressed.
        schedule: ``cosine`` (rises over the first twentieth, falls to 0) or ``constant``.
        device, threads: where it is computed.
        compute: how products of quantized layers are computed.
        pack_activations: bits of what autograd keeps, for every network; None packs nothing.
        gradient_l1: coefficient of the L1 norms of the loss's gradients by weights and, unless
            ``gradient_l1_activations`` says another, by activations; None: no such term.
        gradient_l1_start: part of the steps before the term begins.
        eval_bits: numbers of bits to which the trained float networks are quantized for a further test.
        prune: sparsity that the weights of every network reach while they train; None prunes nothing.
        share: bits of the codebooks that the weights of every network end in; None shares nothing.
        measure_variance: whether bias and variance of the gradients of every quantized network are measured at the end.
        draws: how often their noise is drawn for that.
        save_every, log_every: steps between checkpoints (besides those at every test) and between lines of the log.
    """

    data: str | None = None
    data_dir: str | None = None
    text: str | None = None
    limit: int | None = None
    model: str | None = None
    model_set: tuple[str, ...] | None = None
    init: str | None = None
    networks: tuple[str, ...] | None = None
    overrides: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    device: str | None = None
    threads: int | None = None
    compute: str | None = None
    pack_activations: int | None = None
    gradient_l1: float | None = None
    gradient_l1_activations: float | None = None
    gradient_l1_start: float | None = None
    eval_bits: tuple[int, ...] | None = None
    prune: float | None = None
    share: int | None = None
    measure_variance: bool | None = None
    draws: int | None = None
    wire: str | None = None
    wire_bits: int | None = None
    wire_bucket: int | None = None
    wire_feedback: bool | None = None
    wire_start: int | None = None
    entropy: str | None = None
    save_every: int | None = None
    log_every: int | None = None

    def resolved(self) -> TrainOptions:
        """Return the options with every default filled in, checked.

        Raises:
            ArgumentError, DtypeError: an option that is not legal, alone or beside another.

        >>> options = TrainOptions(model="gpt").resolved()
        >>> options.data, options.optimizer, options.networks
        ('pydoc', 'adamw', ('int8_dynamic',))
        """
        data = self.data or ("text" if self.text else "pydoc" if self.model in TEXT_MODELS else "digits")
        check_choice(data, "data", DATA_SETS)
        is_text = data in TEXT_SETS
        model = self.model or ("gpt" if is_text else "small_cnn")
        if model in (IMAGE_MODELS if is_text else TEXT_MODELS):
            legal = TEXT_MODELS if is_text else IMAGE_MODELS
            raise ArgumentError(f"model={model!r}: does not fit data {data!r}; use {', '.join(legal)} or a factory")
        if self.epochs is not None and self.steps is not None:
            raise ArgumentError(f"steps={self.steps}: give epochs or steps, not both (epochs={self.epochs})")
        batch_size, epochs, steps = DATA_DEFAULTS[data]
        if self.epochs is not None or self.steps is not None:
            epochs, steps = self.epochs, self.steps
        defaults = {
            **MODEL_DEFAULTS.get(model, OTHER_MODEL),
            "batch_size": batch_size,
            "model_set": (),
            "networks": ("int8_dynamic" if is_text else "unified_int8",),
            "overrides": (),
            "seeds": (0,),
            "schedule": "cosine",
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "compute": "auto",
            "log_every": 10,
            **({"draws": DRAWS} if self.measure_variance else {}),
        }
        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        settled = {**defaults, **given, "data": data, "model": model, "epochs": epochs, "steps": steps}
        for key in PATHS:  # a resumed run may be started from another folder
            if key in settled:
                settled[key] = str(Path(settled[key]).resolve())
        options = TrainOptions(**settled)
        options._check()
        return options

    def _check(self) -> None:
        for name, low in (("epochs", 1), ("steps", 1), ("limit", 1), ("save_every", 1)):
            if (value := getattr(self, name)) is not None:
                check_integer(value, name, low)
        if self.pack_activations is not None:
            check_bits(self.pack_activations, "pack_activations")
        self._check_gradient_l1()
        if self.eval_bits is not None:
            for bits in self.eval_bits:
                check_bits(bits, "eval_bits")
            if not self.eval_bits or len(set(self.eval_bits)) != len(self.eval_bits):
                raise ArgumentError(f"eval_bits={self.eval_bits}: must be different numbers of bits, at least one")
        if self.prune is not None:
            check_number(self.prune, "prune", 0.0, 1.0, open_low=True, open_high=True)
        if self.share is not None:
            check_bits(self.share, "share", *SHARE_BITS)
        if self.draws is not None:
            check_integer(self.draws, "draws", 3)
            if not self.measure_variance:
                raise ArgumentError(f"draws={self.draws}: is for measure_variance=True (--measure-variance) only")
        for name in ("batch_size", "threads", "log_every"):
            check_integer(getattr(self, name), name, 1)
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        self._check_wire()
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_choice(self.compute, "compute", COMPUTE)
        check_number(self.lr, "lr", 0.0, open_low=True)
        check_number(self.weight_decay, "weight_decay", 0.0)
        for seed in self.seeds or ():
            check_integer(seed, "seeds", 0, 2**63 - 1)
        for name in ("seeds", "networks"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ArgumentError(f"{name}={','.join(map(str, values))!r}: must be different values, at least one")
        entries = self.entries()
        if len({entry.label for entry in entries}) != len(entries):
            raise ArgumentError(f"networks={','.join(self.networks or ())!r}: two entries are the same network")
        if self.measure_variance and all(entry.is_float for entry in entries):
            raise ArgumentError(f"measure_variance=True: {' and '.join(FLOAT)} have no quantizers whose noise varies")
        if self.overrides and all(entry.is_float for entry in entries):
            raise ArgumentError(f"set={self.overrides[0]!r}: {' and '.join(FLOAT)} have no quantizers to override")
        try:
            device = torch.device(self.device or "cpu")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ArgumentError(f"device={self.device!r}: is not available here: {reason}") from error

    def _check_gradient_l1(self) -> None:
        limits = {"gradient_l1": math.inf, "gradient_l1_activations": math.inf, "gradient_l1_start": 1.0}
        for name, high in limits.items():
            if (value := getattr(self, name)) is not None:
                check_number(value, name, 0.0, high, open_high=True)
                if self.gradient_l1 is None:
                    raise ArgumentError(f"{name}={value}: goes with gradient_l1, which is not given")
        if self.gradient_l1 is None:
            return
        if quantized := [entry.label for entry in self.entries() if not entry.is_float]:
            raise ArgumentError(
                f"gradient_l1={self.gradient_l1}: needs second derivatives, which {quantized[0]} has not; train fp32"
            )
        if self.pack_activations is not None:
            raise ArgumentError(
                f"gradient_l1={self.gradient_l1}: cannot be combined with pack_activations={self.pack_activations}"
            )

    def _check_wire(self) -> None:
        given = {name: value for name in WIRE_OPTIONS if (value := getattr(self, name)) is not None}
        if self.optimizer in OWN_WIRE:
            if self.wire is not None or given:
                name, value = next(iter({"wire": self.wire, **given}.items()))
                raise ArgumentError(f"{name}={value!r}: {self.optimizer} talks to the other ranks itself")
            return
        if self.wire is None or self.wire in BASELINES:
            if illegal := [name for name in given if not (name == "wire_start" and self.wire == "powersgd")]:
                raise ArgumentError(
                    f"{illegal[0]}={given[illegal[0]]!r}: wire {self.wire or 'none'!r} has no such option"
                )
            if self.wire == "powersgd":
                check_integer(self.wire_start or 2, "wire_start", 2)
            return
        check_choice(self.wire, "wire", (*BASELINES, *codecs()))
        check_integer(self.wire_start or 0, "wire_start", 0)
        self.wire_codec()

    def wire_codec(self) -> Codec:
        """Return the codec that ``wire`` and its options describe."""
        options: dict[str, Any] = {"bits": self.wire_bits, "bucket": self.wire_bucket}
        options = {name: value for name, value in options.items() if value is not None}
        try:
            return codec(self.wire or "", entropy=self.entropy, feedback=self.wire_feedback, **options)
        except ArgumentError as error:  # names the codec's argument
            if any(str(error).startswith(f"{name}=") for name in options):
                raise ArgumentError(f"wire_{error}") from None
            raise

    def entries(self) -> list[Entry]:
        """Return the networks to train."""
        return [parse_entry(text, self.overrides or ()) for text in self.networks or ()]

    def model_options(self) -> dict[str, Any]:
        """Return the model's keyword arguments; a value that reads as JSON is one, anything else is a text."""
        options = {}
        for text in self.model_set or ():
            name, value = parse_override(text)
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainOptions:
        """Return the options that ``to_dict`` described.

        Raises:
            CorruptDataError: an option that this version does not know.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise CorruptDataError(f"stored options: {sorted(unknown)[0]!r} is not an option of this version")
        settled: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**settled)

    def merged(self, stored: TrainOptions) -> TrainOptions:
        """Return ``stored``, the options of the run to resume, provided that ``self`` asks for nothing else.

        To measure variance may be asked for later.

        Raises:
            ArgumentError: an option was given that differs from the stored one; names it.
        """
        settings = stored.to_dict()
        late = {key: value for key in LATE if (value := getattr(self, key)) is not None}
        if late and not stored.measure_variance:
            stored = dataclasses.replace(stored, **{"draws": DRAWS, **late})
            stored._check()
        for key, value in self.to_dict().items():
            if value is None or (key in late and not settings["measure_variance"]):
                continue
            if key in PATHS:
                value = str(Path(value).resolve())
            before = settings[key]
            if key == "networks":
                value, before = ([parse_entry(text).label for text in texts] for texts in (value, before))
            if value != before:
                raise ArgumentError(f"{key}={_shown(value)}: the run to resume was started with {_shown(before)}")
        return stored


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

"""The folder of a run: what is in it, when it may be used, and the options stored there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradbits.core.errors import ArgumentError, CorruptDataError, GradbitsError
from gradbits.core.files import write_atomically
from gradbits.train.entry import Entry
from gradbits.train.options import TrainOptions

FORMAT = "gradbits-run"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Paths of a run.

    Args:
        root: the folder that receives everything.
    """

    root: Path

    @property
    def options(self) -> Path:
        """The options that the run was started with."""
        return self.root / "options.json"

    @property
    def log(self) -> Path:
        """A JSON object a line."""
        return self.root / "log.jsonl"

    @property
    def results(self) -> Path:
        """A list of records."""
        return self.root / "results.json"

    @property
    def curves(self) -> Path:
        """A picture of losses and test results."""
        return self.root / "curves.png"

    @property
    def variance(self) -> Path:
        """Bias and variance of the gradients, where they were measured."""
        return self.root / "variance.json"

    @property
    def variance_picture(self) -> Path:
        """The variances as a picture."""
        return self.root / "variance.png"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def reports(self) -> Path:
        """The folder of the reports: what was quantized in each network and what was not, and why."""
        return self.root / "reports"

    @property
    def models(self) -> Path:
        """The folder of the trained models."""
        return self.root / "models"

    def checkpoint(self, index: int, entry: Entry, seed: int) -> Path:
        """The checkpoint of one network; ``index`` keeps labels apart that look alike as file names."""
        return self.checkpoints / f"{index}-{entry.slug}-seed{seed}.pt"

    def model(self, index: int, entry: Entry, seed: int, slugs: Sequence[str]) -> Path:
        """The trained model of one network; ``slugs`` of all networks say whether its own one is unmistakable."""
        name = entry.slug if slugs.count(entry.slug) == 1 else f"{index}-{entry.slug}"
        return self.models / f"{name}-seed{seed}.safetensors"

    def report(self, index: int, entry: Entry) -> Path:
        """The report of one network."""
        return self.reports / f"{index}-{entry.slug}.txt"

    def clear(self) -> None:
        """Remove what an earlier run left here, and nothing else."""
        for path in (self.options, self.log, self.results, self.curves, self.variance, self.variance_picture):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.models, self.reports):
            shutil.rmtree(folder, ignore_errors=True)


def check_usable(out: Path | None, overwrite: bool) -> None:
    """Refuse a folder that a new run may not use; nothing is made or removed.

    Raises:
        ArgumentError: it is a file, or not empty and ``overwrite`` is False.
    """
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise ArgumentError(f"out={str(out)!r}: is a file; must be a folder")
    if any(out.iterdir()) and not overwrite:
        raise ArgumentError(f"out={str(out)!r}: is not empty; use --resume, --overwrite or another folder")


def claim(out: Path | None, name: str, overwrite: bool, base: Path = Path("runs")) -> Folder:
    """Make the folder of a new run, or clear the one of an earlier run.

    Args:
        out: the folder; None makes a fresh one under ``base``, numbered and with ``name``.
        name: for a fresh folder.
        overwrite: whether the folder may hold something.
        base: where fresh folders go.

    Raises:
        ArgumentError: see ``check_usable``.
        GradbitsError: it cannot be written.
    """
    check_usable(out, overwrite)
    try:
        folder = Folder(root=out if out is not None else _fresh(base, name))
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.clear()
    except OSError as error:
        raise GradbitsError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error
    return folder


def open_run(out: Path | None, options: TrainOptions) -> tuple[Folder, TrainOptions]:
    """Return the folder of a run to resume and the options that it was started with.

    Args:
        out: the folder.
        options: as given now; must not ask for anything else.

    Raises:
        ArgumentError: there is no run, or it was started with other options.
        CorruptDataError: the stored options are damaged.
    """
    if out is None:
        raise ArgumentError("out=None: name the folder of the run to resume: --out DIR --resume")
    folder = Folder(root=out)
    if not folder.options.is_file():
        raise ArgumentError(f"out={str(out)!r}: there is no run to resume: options.json is missing")
    return folder, options.merged(TrainOptions.from_dict(read_run(folder)["options"]))


def write_run(folder: Folder, options: TrainOptions, fingerprint: str, command: str) -> None:
    """Store what a resumed run must know."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "options": options.to_dict(),
        "data_fingerprint": fingerprint,
        "command": command,
    }
    write_atomically(folder.options, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def read_run(folder: Folder) -> dict[str, Any]:
    """Return what ``write_run`` stored.

    Raises:
        CorruptDataError: the file is damaged, of another program, or of a later version.
    """
    path = folder.options
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptDataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptDataError(f"{path}: does not describe a run of gradbits")
    if content.get("version") != VERSION:
        raise CorruptDataError(f"{path}: has format version {content.get('version')!r}; this version reads {VERSION}")
    if not isinstance(content.get("options"), dict):
        raise CorruptDataError(f"{path}: holds no options")
    return content


def _fresh(base: Path, name: str) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    for number in range(1, 100_000):
        path = base / f"{number:03d}-{name}"
        try:
            # numbers are given out by making the folder, so two runs started together do not meet
            if not any(base.glob(f"{number:03d}-*")):
                path.mkdir()
                return path
        except FileExistsError:
            continue
    raise GradbitsError(f"{base}: has no free number for a further run")

"""A whole run: every network of a comparison under every seed, then what each step costs, then the results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from gradbits.core.errors import CorruptDataError, MissingDependencyError
from gradbits.core.files import write_atomically
from gradbits.train.checkpoint import load_checkpoint
from gradbits.train.datasets import TEXT_SETS, load_data
from gradbits.train.entry import Entry
from gradbits.train.folder import Folder, open_folder, read_run, write_run
from gradbits.train.interrupt import StopRequest, stop_on_signals
from gradbits.train.log import Log
from gradbits.train.loop import Plan, Position, read_position, restore, train
from gradbits.train.measure import measure
from gradbits.train.network import Network, build_network
from gradbits.train.options import TrainOptions
from gradbits.train.picture import draw_log
from gradbits.train.progress import make_reporter
from gradbits.train.results import Record, load_results, make_record, results_table, save_results
from gradbits.train.tasks import CONTEXT, Task, make_task


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to train: its entry, its seed and the file of its checkpoint."""

    entry: Entry
    seed: int
    checkpoint: Path


class Experiment:
    """The networks that ``options`` ask for, each trained from the seed's initial weights on the seed's batches.

    Args:
        options: what to train; ``None`` in it stands for a default.
        out: receives log, checkpoints, results and curves; None makes a fresh folder under ``runs``.
        resume: go on with the run in ``out``; the result is bit for bit that of a run without a break.
        overwrite: start again in ``out`` although it is not empty.
        command: the command line, for the records.
        console: where progress and the table are shown; None: nowhere.

    Raises:
        ArgumentError: an option that is not legal, or a folder that may not be used.
        CorruptDataError: the run to resume is damaged.
    """

    def __init__(
        self,
        options: TrainOptions,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        command: str = "",
        console: Console | None = None,
    ) -> None:
        self.folder, self.options = open_folder(
            None if out is None else Path(out), options, resume=resume, overwrite=overwrite
        )
        self.resumed = resume
        self.command = command
        self.console = console or Console(quiet=True)

    def run(self) -> list[Record]:
        """Train and measure; return a record for each network.

        Raises:
            ArgumentError, CorruptDataError, MissingDataError: the parts refuse something; nothing was trained yet.
            Interrupted: SIGINT or SIGTERM came; the state has been saved.
        """
        with _threads(self.options.threads or 1), stop_on_signals() as stop:
            self._prepare()
            ends = self._train_all(stop)
            if self.resumed and self.folder.results.is_file():
                records = load_results(self.folder.results)
            else:
                records = self._measure_all(ends, stop)
                save_results(self.folder.results, records)
        title = f"{self.options.data}, {self.options.model}"
        try:
            draw_log(self.folder.log, self.folder.curves, title)
        except MissingDependencyError as error:
            self.console.print(f"no {self.folder.curves.name}: {error}", markup=False, highlight=False)
        self.console.print(results_table(records))
        return records

    def _prepare(self) -> None:
        """Load the data and build every network once: what is wrong is refused now, not after hours of training."""
        options = self.options
        data = load_data(
            options.data or "",
            data_dir=Path(options.data_dir) if options.data_dir else None,
            text=Path(options.text) if options.text else None,
            limit=options.limit,
        )
        context = options.model_options().get("context", CONTEXT)
        self.task: Task = make_task(data, options.batch_size or 1, context)
        self.fingerprint = data.fingerprint()
        self.total = options.steps or (options.epochs or 1) * self.task.steps_per_epoch
        entries = options.entries()
        self.jobs = [
            Job(entry=entry, seed=seed, checkpoint=self.folder.checkpoint(index, entry, seed))
            for seed in options.seeds or ()
            for index, entry in enumerate(entries, start=1)
        ]
        for job in self.jobs[: len(entries)]:
            network = self._build(job)
            if not job.entry.is_float:
                _write_report(self.folder, job, network.model)
        if self.resumed:
            stored = read_run(self.folder)
            if stored.get("data_fingerprint") != self.fingerprint:
                raise CorruptDataError(
                    f"data {options.data!r}: is not what the run in {self.folder.root} was started with"
                )
            self.command = str(stored.get("command", self.command))
        else:
            write_run(self.folder, options, self.fingerprint, self.command)
        self.console.print(
            f"{options.data}, {options.model}: {self.total} steps for each network; everything goes to"
            f" {self.folder.root}",
            highlight=False,
            soft_wrap=True,
        )

    def _build(self, job: Job) -> Network:
        return build_network(job.entry, self.options, self.task, job.seed, self.total)

    def _identity(self, job: Job) -> dict[str, object]:
        return {"network": job.entry.label, "seed": job.seed, "steps": self.total, "data": self.fingerprint}

    def _train_all(self, stop: StopRequest) -> list[Position]:
        """Train what is not trained yet, one network after the other; the log is cut back to the latest checkpoint."""
        ends: list[Position] = []
        for job in self.jobs:
            position = None
            if job.checkpoint.exists():
                position = read_position(load_checkpoint(job.checkpoint), job.checkpoint, self._identity(job))
            if position is None or not position.step == position.tested == self.total:
                keep = position.log_bytes if position else ends[-1].log_bytes if ends else 0
                position = self._train(job, keep, position is not None, stop)
            ends.append(position)
        return ends

    def _train(self, job: Job, keep: int, has_checkpoint: bool, stop: StopRequest) -> Position:
        options, reporter = self.options, make_reporter(self.console)
        network = self._build(job)
        position = restore(network, job.checkpoint, self._identity(job)) if has_checkpoint else None
        plan = Plan(
            seed=job.seed,
            total=self.total,
            test_every=_test_every(options, self.task, self.total),
            log_every=options.log_every or 1,
            save_every=options.save_every,
        )
        label = job.entry.label if len(options.seeds or ()) == 1 else f"{job.entry.label} seed {job.seed}"
        reporter.start(label, self.total, position.step if position else 0)
        try:
            with Log(self.folder.log, keep=keep, common={"network": job.entry.label, "seed": job.seed}) as log:
                return train(
                    network,
                    self.task,
                    plan,
                    checkpoint=job.checkpoint,
                    log=log,
                    reporter=reporter,
                    stop=stop,
                    identity=self._identity(job),
                    position=position,
                )
        finally:
            reporter.stop()

    def _measure_all(self, ends: list[Position], stop: StopRequest) -> list[Record]:
        """Measure the trained networks of each seed side by side and return the records."""
        records = []
        for seed in self.options.seeds or ():
            group = [(job, end) for job, end in zip(self.jobs, ends, strict=True) if job.seed == seed]
            networks = []
            for job, _ in group:
                network = self._build(job)
                restore(network, job.checkpoint, self._identity(job))
                networks.append(network)
            costs = measure(networks, self.task, seed, stop)
            for (job, end), cost in zip(group, costs, strict=True):
                records.append(
                    make_record(
                        entry=job.entry,
                        options=self.options,
                        task=self.task,
                        seed=seed,
                        at=end,
                        cost=cost,
                        command=self.command,
                    )
                )
        return records


def _test_every(options: TrainOptions, task: Task, total: int) -> int:
    # an epoch of images; text has few and long epochs, and its test is short
    if options.data in TEXT_SETS:
        return min(task.steps_per_epoch, max(1, total // 8))
    return task.steps_per_epoch


def _write_report(folder: Folder, job: Job, model: nn.Module) -> None:
    from gradbits import report

    text = f"{report(model)}\n"
    path = folder.reports / f"{job.checkpoint.stem.rpartition('-seed')[0]}.txt"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

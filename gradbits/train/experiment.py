"""A whole run: every network of a comparison under every seed, then what each step costs, then the results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from gradbits.core.errors import ArgumentError, CorruptDataError, GradbitsError, MissingDependencyError
from gradbits.core.files import write_atomically
from gradbits.train.checkpoint import load_checkpoint
from gradbits.train.compressing import weight_sparsity
from gradbits.train.datasets import TEXT_SETS, load_data
from gradbits.train.entry import Entry
from gradbits.train.evaluate import has_diverged
from gradbits.train.evaluate_bits import evaluate_network_bits
from gradbits.train.evaluate_file import check_model_set
from gradbits.train.folder import Folder, check_usable, claim, open_run, read_run, write_run
from gradbits.train.interrupt import StopRequest, stop_on_signals
from gradbits.train.log import Log, NoLog
from gradbits.train.loop import Plan, Position, read_position, restore, train
from gradbits.train.measure import Cost, measure
from gradbits.train.model_file import model_metadata, save_model
from gradbits.train.network import Network, build_network
from gradbits.train.options import DRAWS, OWN_WIRE, TrainOptions
from gradbits.train.picture import draw_log
from gradbits.train.progress import make_reporter
from gradbits.train.ranks import Ranks, SharedTask
from gradbits.train.results import Record, bits_table, load_results, make_record, results_table, save_results
from gradbits.train.tasks import CONTEXT, Task, make_task
from gradbits.train.variance import draw_variances, measure_variances, save_variances, variance_table


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to train: its entry, its seed, and the files of its checkpoint and of the trained model."""

    entry: Entry
    seed: int
    checkpoint: Path
    model: Path


class Experiment:
    """The networks that ``options`` ask for, each trained from the seed's initial weights on the seed's batches.

    Args:
        options: what to train; ``None`` in it stands for a default.
        out: receives log, checkpoints, results and curves; None makes a fresh folder under ``runs``.
        resume: go on with the run in ``out``; the result is bit for bit that of a run without a break.
        overwrite: start again in ``out`` although it is not empty.
        command: the command line, for the records.
        console: where progress and the table are shown; None: nowhere.
        ranks: the processes that run it together; rank 0 tests, logs and writes. None: this one alone.

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
        ranks: Ranks | None = None,
    ) -> None:
        if resume and overwrite:
            raise ArgumentError("resume=True: cannot be combined with overwrite=True")
        self.out = None if out is None else Path(out)
        self.ranks = ranks or Ranks()
        self.overwrite = overwrite
        self._folder: Folder | None = None  # a new run gets its folder when nothing about it can be refused any more
        if resume:
            self._folder, self.options = self.ranks.first(lambda: open_run(self.out, options))
        else:
            self.ranks.first(lambda: check_usable(self.out, overwrite))
            self.options = self.ranks.first(options.resolved)
        self._check_ranks()
        self.resumed = resume
        self.command = command
        self.console = console or Console(quiet=True)

    def folder(self) -> Folder:
        """Return the folder of the run.

        Raises:
            ArgumentError: a new run has none before its first step.
        """
        if self._folder is None:
            raise ArgumentError(f"out={self.out!s}: this run has not begun, so it has no folder")
        return self._folder

    def _check_ranks(self) -> None:
        options = self.options
        if self.ranks.world == 1 and options.wire is not None:
            raise ArgumentError(
                f"wire={options.wire!r}: there is one process only, which has nobody to send to; start with torchrun "
                "--nproc-per-node 2 -m gradbits train ..."
            )

    def run(self) -> list[Record]:
        """Train and measure; return a record for each network, on rank 0.

        Raises:
            ArgumentError, CorruptDataError, MissingDataError: the parts refuse something; nothing was trained yet.
            Interrupted: SIGINT or SIGTERM came; the state has been saved.
        """
        with _threads(self.options.threads or 1), stop_on_signals(shared=self.ranks.world > 1) as stop:
            folder = self._prepare()
            ends = self._train_all(folder, stop)
            if self.resumed and self.ranks.first(folder.results.is_file):
                records = self.ranks.first(lambda: load_results(folder.results))
            else:
                records = self._measure_all(folder, ends, stop)
                if self.ranks.leads:
                    save_results(folder.results, records)
            if not self.ranks.leads:
                return records
            title = f"{self.options.data}, {self.options.model}"
            with self._without_plots(folder.curves):
                draw_log(folder.log, folder.curves, title)
            self.console.print(results_table(records))
            if (table := bits_table(records)) is not None:
                self.console.print(table)
            if self.options.measure_variance:
                self._measure_variances(folder, title, stop)
        return records

    def _prepare(self) -> Folder:
        """Load the data, build every network once, and only then make the folder.

        So what is wrong is refused before anything is written, and not after hours in the networks before it.
        """
        options = self.options
        check_model_set(options.model_set)
        data = load_data(
            options.data or "",
            data_dir=Path(options.data_dir) if options.data_dir else None,
            text=Path(options.text) if options.text else None,
            limit=options.limit,
        )
        context = options.model_options().get("context", CONTEXT)
        self.task: Task = make_task(data, options.batch_size or 1, context)
        if self.ranks.world > 1:
            self.task = SharedTask(self.task, self.ranks)
        self.fingerprint = data.fingerprint()
        self.total = options.steps or (options.epochs or 1) * self.task.steps_per_epoch
        entries = options.entries()
        seeds = options.seeds or ()
        networks = [self._build(entry, seeds[0]) for entry in entries]
        if self._folder is not None:
            folder = self._folder
            stored = self.ranks.first(lambda: read_run(folder))
            if stored.get("data_fingerprint") != self.fingerprint:
                raise CorruptDataError(f"data {options.data!r}: is not what the run in {folder.root} was started with")
            self.command = str(stored.get("command", self.command))
        else:
            folder = self._folder = self.ranks.first(lambda: self._claim(networks))
        self.jobs = [
            Job(
                entry=entry,
                seed=seed,
                checkpoint=folder.checkpoint(index, entry, seed),
                model=folder.model(index, entry, seed, [each.slug for each in entries]),
            )
            for seed in seeds
            for index, entry in enumerate(entries, start=1)
        ]
        self.console.print(
            f"{options.data}, {options.model}: {self.total} steps for each network; everything goes to {folder.root}",
            highlight=False,
            soft_wrap=True,
        )
        return folder

    def _claim(self, networks: list[Network]) -> Folder:
        folder = claim(self.out, f"{self.options.data}-{self.options.model}", self.overwrite)
        write_run(folder, self.options, self.fingerprint, self.command)
        for index, network in enumerate(networks, start=1):
            if not network.entry.is_float:
                _write_report(folder.report(index, network.entry), network.model)
        return folder

    def _build(self, entry: Entry, seed: int) -> Network:
        return build_network(entry, self.options, self.task, seed, self.total, self.ranks)

    def _identity(self, job: Job) -> dict[str, object]:
        return {"network": job.entry.label, "seed": job.seed, "steps": self.total, "data": self.fingerprint}

    def _train_all(self, folder: Folder, stop: StopRequest) -> list[Position]:
        """Train what is not trained yet, one network after the other; the log is cut back to the latest checkpoint."""
        ends: list[Position] = []
        for job in self.jobs:
            position = self.ranks.first(lambda: self._stored_position(job))  # noqa: B023
            if position is None or not position.step == position.tested == self.total:
                keep = position.log_bytes if position else ends[-1].log_bytes if ends else 0
                position = self._train(job, folder.log, keep, position is not None, stop)
            ends.append(position)
        return ends

    def _stored_position(self, job: Job) -> Position | None:
        if not job.checkpoint.exists():
            return None
        return read_position(load_checkpoint(job.checkpoint), job.checkpoint, self._identity(job))

    def _train(self, job: Job, log_path: Path, keep: int, has_checkpoint: bool, stop: StopRequest) -> Position:
        options, reporter = self.options, make_reporter(self.console)
        network = self._build(job.entry, job.seed)
        network.connect(options)
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
            with self._log(log_path, keep, job) as log:
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
                    metadata=model_metadata(job.entry, options, job.seed),
                )
        finally:
            reporter.stop()

    def _log(self, path: Path, keep: int, job: Job) -> Log:
        if not self.ranks.leads:
            return NoLog()
        return Log(path, keep=keep, common={"network": job.entry.label, "seed": job.seed})

    def _measure_all(self, folder: Folder, ends: list[Position], stop: StopRequest) -> list[Record]:
        """Write the trained models, measure the networks of each seed side by side and return the records."""
        records = []
        for seed in self.options.seeds or ():
            group = [(job, end) for job, end in zip(self.jobs, ends, strict=True) if job.seed == seed]
            networks = []
            for job, _ in group:
                network = self._build(job.entry, job.seed)
                network.connect(self.options)
                restore(network, job.checkpoint, self._identity(job))
                if self.ranks.leads:
                    save_model(job.model, network.model, model_metadata(job.entry, self.options, seed))
                networks.append(network)
            wires = [self._wire_record(network, end) for network, (_, end) in zip(networks, group, strict=True)]
            widths = self.options.eval_bits
            alone = None if self.ranks.world > 1 else stop
            bits = [evaluate_network_bits(network, self.task, widths, seed, alone) for network in networks]
            sparsities = [weight_sparsity(network.model) for network in networks]  # before measuring trains them on
            costs = self._costs(networks, seed, alone)
            for (job, end), cost, sparsity, found, wire in zip(group, costs, sparsities, bits, wires, strict=True):
                records.append(
                    make_record(
                        entry=job.entry,
                        options=self.options,
                        task=self.task,
                        seed=seed,
                        at=end,
                        cost=cost,
                        command=self.command,
                        model_file=job.model.relative_to(folder.root).as_posix(),
                        sparsity=sparsity,
                        bits=found,
                        wire=wire,
                    )
                )
        return records

    def _costs(self, networks: list[Network], seed: int, stop: StopRequest | None) -> list[Cost | None]:
        """Measure the networks side by side; a diverged one that refuses to go on costs None and spoils no other."""
        together = self.ranks.world > 1
        diverged = [has_diverged(network.model) for network in networks]
        try:
            return list(measure(networks, self.task, seed, stop, together=together))
        except GradbitsError:
            if not any(diverged):
                raise
        kept = [network for network, lost in zip(networks, diverged, strict=True) if not lost]
        costs = iter(measure(kept, self.task, seed, stop, together=together) if kept else ())
        found: list[Cost | None] = []
        for network, lost in zip(networks, diverged, strict=True):
            try:
                found.append(measure([network], self.task, seed, stop, together=together)[0] if lost else next(costs))
            except GradbitsError:
                found.append(None)
        return found

    def _measure_variances(self, folder: Folder, title: str, stop: StopRequest) -> None:
        """Measure the gradients of the first seed's quantized networks; show them, write them, draw them."""
        networks = []
        seed = (self.options.seeds or (0,))[0]
        for job in self.jobs:
            if job.seed == seed and not job.entry.is_float:
                networks.append(self._build(job.entry, seed))
                restore(networks[-1], job.checkpoint, self._identity(job))
        batch = self.task.batch(seed, self.total)  # the one that would have been trained on next
        reports = {}
        for network in networks:
            label = network.entry.label
            try:
                ((_, report),) = measure_variances([network], batch, self.options.draws or DRAWS, stop)
            except GradbitsError as error:
                if not has_diverged(network.model):
                    raise
                self.console.print(f"\n{label}\ndiverged: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            reports[label] = report
            self.console.print(f"\n{label}\n{report}", markup=False, highlight=False, soft_wrap=True)
        self.console.print(variance_table(reports))
        save_variances(folder.variance, reports, seed=seed, step=self.total)
        with self._without_plots(folder.variance_picture):
            draw_variances(folder.variance_picture, reports, f"{title}, after {self.total} steps")

    @contextlib.contextmanager
    def _without_plots(self, path: Path) -> Iterator[None]:
        """Go on where a picture cannot be drawn for want of a package; say so."""
        try:
            yield
        except MissingDependencyError as error:
            self.console.print(f"no {path.name}: {error}", markup=False, highlight=False)

    def _wire_record(self, network: Network, end: Position) -> Record:
        """Return what the record says of several ranks: bytes are those that rank 0 has sent."""
        if network.link is None:
            return {}
        options, counts = self.options, network.link.counts
        return {
            "ranks": self.ranks.world,
            "wire": options.optimizer if options.optimizer in OWN_WIRE else options.wire or "none",
            "wire_bits": options.wire_bits,
            "wire_bucket": options.wire_bucket,
            "wire_feedback": options.wire_feedback,
            "wire_start": options.wire_start,
            "entropy": options.entropy,
            "wire_bytes_per_step": counts.bytes_sent / end.step,
            "wire_ratio": counts.ratio,
            "wire_seconds": counts.seconds,
        }


def _test_every(options: TrainOptions, task: Task, total: int) -> int:
    # an epoch of images; text has few and long epochs, and its test is short
    if options.data in TEXT_SETS:
        return min(task.steps_per_epoch, max(1, total // 8))
    return task.steps_per_epoch


def _write_report(path: Path, model: nn.Module) -> None:
    from gradbits import report

    text = f"{report(model)}\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""What a run shows while it trains: a bar on a terminal, a line per test elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from gradbits.train.loop import Position


class Reporter(Protocol):
    """Follows the training of one network."""

    def start(self, label: str, total: int, at: int) -> None:
        """A network begins, or goes on after ``at`` of ``total`` steps."""

    def step(self, at: Position, loss: float) -> None:
        """A step was made."""

    def test(self, at: Position, metric: str) -> None:
        """A test was made."""

    def stop(self) -> None:
        """The network is trained, or the run is stopped."""


class LineReporter:
    """A line per test.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._label, self._total = "", 0
        self._loss = float("nan")

    def start(self, label: str, total: int, at: int) -> None:
        """Say so when a network goes on in the middle."""
        self._label, self._total = label, total
        if at:
            self.console.print(f"{label}  resumed at step {at}/{total}", highlight=False, soft_wrap=True)

    def step(self, at: Position, loss: float) -> None:
        """Keep the loss, averaged over about ten steps."""
        self._loss = loss if self._loss != self._loss else 0.9 * self._loss + 0.1 * loss

    def test(self, at: Position, metric: str) -> None:
        """Print step, loss, test result and time."""
        self.console.print(
            f"{self._label}  step {at.step}/{self._total}  loss {self._loss:.4f}  {shown(at.metric, metric)}"
            f"  {at.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )

    def stop(self) -> None:
        """Forget the network."""
        self._loss = float("nan")


class BarReporter:
    """A bar with loss, training accuracy, test result and the time that is left.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._loss, self._right, self._test = float("nan"), float("nan"), ""

    def start(self, label: str, total: int, at: int) -> None:
        """Add a bar."""
        self._loss, self._right, self._test = float("nan"), float("nan"), ""
        self._progress.start()
        self._task = self._progress.add_task(label, total=total, completed=at, state="")

    def step(self, at: Position, loss: float) -> None:
        """Move the bar."""
        self._loss = loss if self._loss != self._loss else 0.9 * self._loss + 0.1 * loss
        if at.recent_targets:
            self._right = at.recent_right / at.recent_targets
        state = f"loss {self._loss:.3f}  accuracy {100 * self._right:.1f} %  {self._test}"
        self._progress.update(self._task, completed=at.step, state=state)

    def test(self, at: Position, metric: str) -> None:
        """Show the test result from now on."""
        self._test = shown(at.metric, metric)
        state = f"loss {self._loss:.3f}  accuracy {100 * self._right:.1f} %  {self._test}"
        self._progress.update(self._task, state=state)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def make_reporter(console: Console) -> Reporter:
    """Return the reporter that fits the console."""
    return BarReporter(console) if console.is_terminal else LineReporter(console)


def shown(value: float, metric: str) -> str:
    """Return a test result for people.

    >>> shown(0.9861, "test_accuracy"), shown(2.05, "bits_per_byte")
    ('test 98.61 %', 'test 2.050 bits per byte')
    """
    return f"test {100 * value:.2f} %" if metric == "test_accuracy" else f"test {value:.3f} bits per byte"

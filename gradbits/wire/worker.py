"""A thread that runs jobs one after the other: collectives keep one order while autograd goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

Job = Callable[[], object]
Failure = Callable[[BaseException], object]


class Worker:
    """Runs jobs in the order in which they were given; after one has failed, the others are dropped.

    Args:
        inline: run each job at once in the calling thread, as for CUDA, whose kernels run asynchronously anyway.
    """

    def __init__(self, inline: bool = False) -> None:
        self.error: BaseException | None = None
        self._inline = inline
        self._jobs: queue.SimpleQueue[tuple[Job, Failure]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open = 0
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, failed: Failure) -> None:
        """Have ``job`` run after all jobs before it; ``failed`` is told the error if it fails or is dropped."""
        if self._inline:
            self._run(job, failed)
            return
        with self._changed:
            self._open += 1
        if self._thread is None:
            # a daemon: a collective that waits for a dead rank must not keep the process from ending
            threads = torch.get_num_threads()
            self._thread = threading.Thread(target=self._loop, args=(threads,), name="gradbits-wire", daemon=True)
            self._thread.start()
        self._jobs.put((job, failed))

    def wait(self) -> None:
        """Wait for all jobs.

        Raises:
            BaseException: what the first job that failed has raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)
        if self.error is not None:
            raise self.error

    def _loop(self, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP keeps the number by thread
        while True:
            self._run(*self._jobs.get())
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    @torch.no_grad()
    def _run(self, job: Job, failed: Failure) -> None:
        if self.error is None:
            try:
                job()
            except BaseException as error:
                self.error = error
        if self.error is not None:
            failed(self.error)

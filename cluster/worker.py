"""What runs in Ray's actors: the processes of a job, and the desk where driver and workers leave messages."""

import contextlib
import logging
import os
import threading
import time

import ray
import ray.train

from cluster import backend
from cluster.host import SAVE, Host, watchdog
from cluster.job import Job, Request
from cluster.private import train_context

LOOK = 2.0  # seconds between two looks for messages from driver or workers, and for a notice of preemption


class Ended(Exception):
    """The job's own end, which another try would not change."""

    def __init__(self, code: int, message: str):
        super().__init__(code, message)
        self.code, self.message = code, message


class Desk:
    """Where the driver leaves messages for the workers, and the workers say how far they are."""

    def __init__(self):
        self._code = 0
        self._furthest = 0
        self._news: list[dict] = []
        self._begun: set[str] = set()

    def begun(self, what: str) -> None:
        self._begun.add(what)

    def has_begun(self, what: str) -> bool:
        return what in self._begun

    def tell(self, values: dict) -> None:
        self._news.append(values)

    def news(self) -> list[dict]:
        """What was told since the last call."""
        news, self._news = self._news, []
        return news

    def got_on(self) -> None:
        self._furthest += 1

    def furthest(self) -> int:
        return self._furthest

    def ask(self, code: int) -> None:
        self._code = code

    def asked(self) -> int:
        return self._code


class Worker(Host):
    """One of the processes of a run on Ray."""

    def __init__(self, request: Request, desk):
        super().__init__()
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.first_here = context.get_local_rank() == 0
        self.name = f"host {ray.util.get_node_ip_address()}, process {self.rank}"
        self._hang_timeout = request.hang_timeout if self.world > 1 else 0
        # The public get_preemption_info is a barrier over all workers.
        self._context = train_context.get_train_context()
        self._notices, self._told = 0, 0
        self._desk = desk
        threading.Thread(target=self._look, args=(desk,), daemon=True, name="notices").start()

    def _look(self, desk) -> None:
        known = None
        while ray.is_initialized():  # a question to the desk after Ray's end would start a new Ray
            info = self._context.preemption_context.preemption_info
            if info is not None and info != known:
                known, self._notices = info, self._notices + 1
            if self.rank == 0:  # it is enough to ask one process: what one is asked, all do
                with contextlib.suppress(Exception):  # the desk's host is gone, and the driver with it
                    self._asked = ray.get(desk.asked.remote(), timeout=60) or self._asked
            time.sleep(LOOK)

    def stoppable(self):
        return contextlib.nullcontext()

    def asked(self) -> int:
        if self._told < self._notices:
            self._told = self._notices
            return max(SAVE, self._asked)
        return self._asked

    def watched(self, progress):
        return watchdog(progress, self._hang_timeout, self.name)

    def has_begun(self, what: str) -> bool:
        return ray.get(self._desk.has_begun.remote(what))

    def begun(self, what: str) -> None:
        ray.get(self._desk.begun.remote(what))

    def report(self, values: dict) -> None:
        ray.train.report(values)
        if self.rank == 0:
            self._desk.tell.remote(values)

    def saved(self) -> None:
        if self.rank == 0:
            self._desk.got_on.remote()


def work(config: dict) -> None:
    """Ray Train's training function: calls the job on this worker. Raises Ended where the job does not end well."""
    if backend.problem:
        raise Ended(2, backend.problem)
    # Without this every worker would log again what is reported to Ray. The second logger has its file's name.
    for name in ("ray.train", train_context.__file__):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Unpickling imports JAX, which may be the problem above, so it comes after that.
    job: Job = ray.cloudpickle.loads(config["job"])
    # Relative paths shall mean what they mean in the folder where the job was started, if this host has that folder.
    with contextlib.suppress(OSError):
        os.chdir(config["cwd"])
    worker = Worker(config["request"], config["desk"])
    code, message = job.call(worker)
    if code:
        # Ray would show a traceback of an end that is no error of the code.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise Ended(code, message)
    if worker.world > 1:
        import jax

        jax.distributed.shutdown()

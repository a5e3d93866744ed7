"""What runs in an actor of Ray Train: one of the processes of a job, and the desk where driver and workers leave word."""

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

LOOK = 2.0  # seconds between looks for word from the driver, or the workers, and for a notice of preemption


class Ended(Exception):
    """The job's own end: another try would not change it."""

    def __init__(self, code: int, message: str):
        super().__init__(code, message)
        self.code, self.message = code, message


class Desk:
    """Where the driver leaves word for the workers, and they say how far they are."""

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
        self._context = (
            train_context.get_train_context()
        )  # the public get_preemption_info is a barrier over all workers
        self._notices, self._told = 0, 0
        self._desk = desk
        threading.Thread(target=self._look, args=(desk,), daemon=True, name="notices").start()

    def _look(self, desk) -> None:
        known = None
        while ray.is_initialized():  # else to ask would start a Ray
            info = self._context.preemption_context.preemption_info
            if info is not None and info != known:
                known, self._notices = info, self._notices + 1
            if self.rank == 0:  # one is enough: what one is asked, all do
                with contextlib.suppress(Exception):  # its host is gone, and so is the driver
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
    """Ray Train's training function: the job's, on this worker. Raises Ended unless it ends well."""
    if backend.problem:
        raise Ended(2, backend.problem)
    for name in ("ray.train", train_context.__file__):  # the other is named by its file
        logging.getLogger(name).setLevel(logging.WARNING)  # else it repeats what is reported to it, on every worker
    job: Job = ray.cloudpickle.loads(config["job"])  # not before: it imports JAX, which may be the problem
    with contextlib.suppress(OSError):  # relative paths mean what they mean where the job was started, if that is here
        os.chdir(config["cwd"])
    worker = Worker(config["request"], config["desk"])
    code, message = job.call(worker)
    if code:
        logging.getLogger("ray.train").setLevel(
            logging.CRITICAL
        )  # else it shows a traceback of what is no error of the code
        raise Ended(code, message)
    if worker.world > 1:
        import jax

        jax.distributed.shutdown()

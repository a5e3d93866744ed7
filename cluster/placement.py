"""Which hosts of a Ray cluster a job's workers go to, and what each of them gets."""

import time
from collections import Counter
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.host import ClusterError
from cluster.launch import Request


@dataclass(frozen=True)
class Placement:
    """What each worker gets, and how many there are."""

    platform: str                    # GPU, TPU or CPU
    resources: dict[str, float]      # of a worker
    workers: tuple[int, int]         # fewest, most
    exactly: bool                    # asked for in this number
    topology: str | None = None      # of a TPU slice, e.g. 4x4
    accelerator: str | None = None   # e.g. TPU-V6E

    def fits(self, workers: int, batches: tuple[int, ...]) -> bool:
        """Whether a number of workers divides every batch; of CPU cores a worker uses as many as do."""
        devices = 1 if self.platform == "CPU" else int(self.resources[self.platform])
        return all(batch % (workers * devices) == 0 for batch in batches)

    def fitting(self, batches: tuple[int, ...]) -> "Placement":
        """The same with at most as many workers as divide the batches; ClusterError where none does, or another number was asked."""
        low, high = self.workers
        found = [n for n in range(low if self.exactly else 1, high + 1) if self.fits(n, batches)]
        if not found:
            devices = "" if self.platform == "CPU" else f" of {self.resources[self.platform]:g} {self.platform}s"
            raise ClusterError(f"Batches of {' and '.join(map(str, batches))} pairs do not divide among {high} workers{devices}; "
                               "use another --num_workers, or a --batch_size that is a multiple.")
        if found[-1] < high:
            print(f"{found[-1]} workers, not {high}: more do not divide the batch", flush=True)
        if low < high and self.exactly and found[0] > low:
            print(f"at least {found[0]} workers, not {low}: fewer do not divide the batch", flush=True)
        return replace(self, workers=(found[0] if low < high else found[-1], found[-1]))


def placement(request: Request, alone: bool) -> Placement:
    """One worker a host, with all that the host has, or `workers_per_host`; waits until there are hosts for them.

    `alone`: Ray runs on this machine only, where all workers asked for share the host. ClusterError when the
    cluster does not have in time what is asked.
    """
    asked = request.workers()
    low, high = asked or (1, 0)
    until = time.monotonic() + (0 if alone else request.wait_for_hosts)
    called = None
    while True:
        nodes = [n for n in ray.nodes() if n["Alive"]]
        platform = request.devices.upper() if request.devices != "auto" else next(
            (p for p in ("TPU", "GPU") if any(n["Resources"].get(p) for n in nodes)), "CPU")
        a_host = request.workers_per_host or 1
        if alone and asked and not request.workers_per_host:  # all of them, as far as there are devices for them
            high = max(low, min([high, *(int(n["Resources"].get(platform, 0)) for n in nodes)]))
            a_host = high
        hosts = [n for n in nodes if min(n["Resources"].get(p, 0) for p in ("CPU", platform)) >= a_host]
        if len(hosts) * a_host >= low and (asked or hosts):
            break
        if not (alone or called):  # an autoscaler brings what somebody asks for
            called = placement_group([{"CPU": a_host, platform: a_host}] * -(-low // a_host), strategy="STRICT_SPREAD")
        if time.monotonic() > until:
            if called:
                remove_placement_group(called)
            there = Counter(", ".join(f"{n['Resources'].get(p, 0):g} {p}" for p in ("CPU", "GPU", "TPU")
                                      if p == "CPU" or n["Resources"].get(p)) for n in nodes)
            raise ClusterError(
                f"The cluster cannot fit this run: it asks for {low} workers, {a_host} a host, each with at least one "
                f"{platform if platform == 'CPU' else platform + ' and one CPU'}, and there are {', '.join(f'{k} × {v}' for v, k in there.items()) or 'no hosts'}; start more "
                "hosts, ask for fewer with --num_workers, put more on one with --workers_per_host, or wait longer with "
                "--wait_for_hosts.")
        time.sleep(0.5)
    if called:
        remove_placement_group(called)  # from here on the workers' own claims count
    each = min(int(n["Resources"][platform]) for n in hosts) // a_host
    resources = {"CPU": float(each)} if platform == "CPU" else {"CPU": 1.0, platform: float(each)}
    most = high if asked else len(hosts) * a_host
    found = Placement(platform, resources, (low if asked else most, most), bool(asked))
    if platform == "TPU" and most > 1:
        labels = hosts[0]["Labels"]
        pod = labels.get("ray.io/tpu-pod-type", "")  # v6e-16
        found = Placement(platform, resources, found.workers, found.exactly, labels.get("ray.io/tpu-topology"),
                          f"TPU-{pod.split('-')[0].upper()}" if pod else None)
    return found

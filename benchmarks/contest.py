"""A contest: each contender alone in a fresh process, so that none profits from another's memory or caches."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from typing import Any

import psutil

THREADS = 2


def contend(
    *arguments: Any, gigabytes: float | None = None, seconds: float = 900
) -> dict[str, Any] | str:
    """Run the calling script as `script child arguments…`; what it printed last as JSON, or why
    there is nothing.

    `gigabytes` limits the contender's address space: by default 70 % of the free memory.
    """
    most = int(gigabytes * 10**9 if gigabytes else 0.7 * psutil.virtual_memory().available)
    try:
        done = subprocess.run(
            [sys.executable, sys.argv[0], "child", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        )
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "emory" in done.stderr or done.returncode < 0:
        return f"out of memory ({most / 1e9:.0f} GB allowed)"
    return done.stderr.strip().splitlines()[-1][:70]


def measured(function: Callable[[], Any], repeats: int = 0) -> dict[str, Any]:
    """Seconds, CPU seconds, peak of the process's own memory beyond what it had (MB), and the
    result.

    Mapped files are not counted. With `repeats`, `s` is the least of as many further runs without
    the watcher.
    """

    def own() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    def watch() -> None:
        while not done.wait(0.001 if repeats else 0.02):
            peak.append(max(peak.pop(), own()))

    before, peak, done = own(), [0], threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin, cpu = time.perf_counter(), time.process_time()
    result = function()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    done.set()
    watcher.join()
    if repeats:
        seconds = min(timeit.repeat(function, number=1, repeat=repeats))
    return {"s": seconds, "cpu": cpu, "MB": max(0, peak[0] - before) / 1e6, "result": result}

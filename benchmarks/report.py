"""Where a benchmark's rows go: a JSON file that is whole after every row, and a plot at the end, also when the end comes early."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.__main__ import provenance

Rows = list[dict[str, Any]]


class Report:
    """``with Report(...) as report: report.add(row)``. SIGTERM (what ``timeout`` sends) ends the ``with`` like a last row.

    Args:
        out: directory. name: of the files, before device and time. device: cpu or cuda.
        seconds: how long new rows may be started, see :meth:`late`.
        plot: called with the rows, what is known about machine and build, and the path of the picture; None: there is no picture.
        more: what else the file says about the run.
    """

    def __init__(self, out: Path, name: str, device: str, seconds: float, plot: Callable[[Rows, dict[str, str], Path], None] | None, **more: Any) -> None:
        self.end, self.plot, self.more, self.rows = time.monotonic() + seconds, plot, more, Rows()
        self.about = provenance()
        self.about.update({key: value for key, value in more.items() if isinstance(value, str)})
        out.mkdir(parents=True, exist_ok=True)
        self.stem = out / f"{name}-{device}-{time.strftime('%Y%m%d-%H%M%S')}"
        for key, value in self.about.items():
            print(f"{key:<14}{value}")
        print(flush=True)

    def __enter__(self) -> Report:
        self.before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
        return self

    def late(self, what: Any) -> bool:
        """Whether it is too late to start ``what``; says so."""
        if time.monotonic() <= self.end:
            return False
        print(f"not run, out of time: {what}", flush=True)
        return True

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        path = self.stem.with_suffix(".json")
        path.with_suffix(".part").write_text(json.dumps({"about": self.about, **self.more, "rows": self.rows}, indent=1) + "\n")
        path.with_suffix(".part").replace(path)

    def __exit__(self, *error: Any) -> None:
        signal.signal(signal.SIGTERM, self.before)
        if self.rows and self.plot:
            self.plot(self.rows, self.about, self.stem.with_suffix(".png"))
        if self.rows:
            print(f"\nwritten: {self.stem}.json" + (f", {self.stem}.png" if self.plot else ""), flush=True)

"""Who is alive: a worker says so while it trains, and a run whose worker has fallen silent is taken over."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_ft.functional.seed_pruning import Judged, collapsed
from lightning_ft.seeds.asha import goes_on
from lightning_ft.seeds.board import Board, Claim, rows
from lightning_ft.seeds.cells import KNOWN
from lightning_ft.seeds.job import LeaseLostError, Progress
from lightning_ft.seeds.record import Evaluation


class Lease(Progress):
    """Renews the hold on a cell from a thread of its own, until it ends or is lost.

    Args:
        claim: The cell.
        seconds: After so long a silence another worker may take over; a sign of life is given each fourth of it.
    """

    def __init__(self, claim: Claim, seconds: float) -> None:
        self.claim = claim
        self.seconds = seconds
        self.facts: dict[str, Any] = {}
        self.ending: dict[str, Any] = {}
        """Of a run that ASHA stopped."""
        self._begun_at: int | None = None
        self._step: int | None = None
        self._beats = 0
        self._since = time.monotonic()
        self._lost = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Say for the last time how far the training came."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            self._beat()

    def _renew(self) -> None:
        heard = time.monotonic()
        while not self._over.wait(self.seconds / 4):
            try:
                if not self._beat():
                    self._lost.set()
                    return
                heard = time.monotonic()
            except Exception:  # noqa: BLE001  # of whatever storage, which may be away for a moment
                if time.monotonic() - heard > self.seconds:
                    self._lost.set()

    def _beat(self) -> bool:
        self._beats += 1
        return self.claim.note(beat=[self._beats, self._step, time.monotonic() - self._since])

    # ---- what the training says

    @override
    def at(self, step: int) -> None:
        if self._begun_at is None:
            self._begun_at = step
            if not self.claim.note(begun_at=step):
                self._lost.set()
        self._step = step
        self.check()

    @property
    def idle(self) -> bool:
        """Whether the training said where it is, and nothing was left for it to do."""
        return self._begun_at is not None and self._begun_at == self._step

    def check(self) -> None:
        """Stop a training whose cell another worker has."""
        if self._lost.is_set():
            raise LeaseLostError(f"another worker has taken run {self.claim.cell.run} over")

    @override
    def report(
        self,
        evaluations: Sequence[Evaluation],
        *,
        horizon: int,
        chance: float | None = None,
        constants: Sequence[float] = (),
        classes: int | None = None,
    ) -> None:
        told = {"horizon": horizon, "chance": chance, "constants": list(constants) or None, "classes": classes}
        facts = {name: value for name, value in told.items() if value is not None}
        news: dict[str, Any] = {} if facts == self.facts else {"facts": facts}
        self.facts = facts
        if not self.claim.note(**news, evaluations=rows(evaluations)):
            self._lost.set()
        self.check()

    @override
    def goes_on(self, score: float, loss: float, step: int) -> bool:
        known = {name: self.facts[name] for name in KNOWN if name in self.facts}
        reason = collapsed(Judged(score, loss), mode=self.claim.board.settings.mode, **known)
        if reason is None and goes_on(self.claim, score, step, self.facts["horizon"]):
            return True
        self.ending = {"stopped": True} if reason is None else {"stopped": True, "collapsed": reason}
        return False


class Watch:
    """Finds trials whose worker has died. Clocks of machines are not compared: silence is timed on this one's.

    Args:
        board: The study.
        seconds: The lease.
        clock: The time in seconds.
    """

    def __init__(self, board: Board, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.board = board
        self.seconds = seconds
        self.clock = clock
        self._heard: dict[int, tuple[Any, float]] = {}

    def bury(self, me: str, trials: Sequence[Any]) -> int:
        """Fail trials that nobody trains, so that they are begun again; how many there were.

        Args:
            trials: All of the study, as they stand now.
            me: The caller's name. It holds nothing now: what goes by its name is of an earlier process.
        """
        now, count = self.clock(), 0
        for trial in trials:
            if trial.state.name != "RUNNING":
                self._heard.pop(trial.number, None)
                continue
            sign, since = trial.user_attrs.get("beat"), self._heard.get(trial.number, (object(), now))
            if sign != since[0]:
                self._heard[trial.number] = (sign, now)
            silent = sign == since[0] and now - since[1] >= self.seconds
            if silent or trial.user_attrs.get("worker") == me:
                count += self.board.fail(trial)
        return count


@contextmanager
def name_of_worker(out: Path) -> Iterator[str]:
    """A name that no other living worker has, on whichever machine; it returns to use as soon as its owner dies.

    Args:
        out: The folder of the study.
    """
    host, folder = socket.gethostname(), out / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # a name that never returns: what its owner leaves waits for the lease to end
        yield f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
        return
    for number in range(1000):
        handle = os.open(folder / f"{host}-{number}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        try:
            # Another folder may stand on a machine of the same name, and its workers work at the same study.
            if len(mark := os.read(handle, 6)) < 6:
                mark = secrets.token_hex(3).encode()
                os.pwrite(handle, mark, 0)
            yield f"{host}-{number}-{mark.decode()}"
        finally:
            os.close(handle)
        return
    raise RuntimeError(f"there are a thousand workers in {folder}")

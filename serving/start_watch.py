"""Follows the start of an endpoint: until its replicas answer, or until none ever can.

Ray Serve starts another replica in the place of one that has died, but calls the deployment failed
meanwhile, at which `serve.run` raises and its caller would end the replicas that answer. So the
endpoint is deployed without waiting, and its status is watched here.
"""

import contextlib
import re
import time
from dataclasses import KW_ONLY, dataclass

import httpx
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster.output.progress import say
from cluster.output.result_text import counted, printable
from raymill.errors import UserError

POLL_S = 0.5
# Without a replica that starts or ends in a deployment that has failed: as long as Ray Serve goes
# on, it starts another one within its control loop's half second.
GIVEN_UP_S = 10.0
AWAY_S = 120.0  # of Ray Serve's controller, which Ray starts anew if it dies
# The replicas beside the first one may take so many times its seconds, and these besides. Then the
# start is over without them.
LATE_FACTOR, LATE_S = 3.0, 60.0
READY_TIMEOUT_S = 60.0  # for a proxy to hear of a replica that Ray Serve calls ready

_REPLICAS = "Replica"  # the deployment
_RUNNING = "RUNNING"  # a replica's state
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")  # a deployment's status after a death
_REASON_AFTER = "Error:\n"  # in a deployment's message


@dataclass(frozen=True)
class Sight:
    """An endpoint's state at one moment, by Ray Serve."""

    num_up: int = 0  # replicas that answer
    is_whole: bool = False  # whether all that it wants do
    has_failed: bool = False  # whether a deployment has lost a replica, and has not recovered yet
    is_given_up: bool = False  # whether nothing starts or ends where one has failed
    message: str = ""  # about the failure


def sight_of(app: ApplicationStatusOverview | None) -> Sight:
    if app is None:
        return Sight(is_given_up=True, message="the application was deleted meanwhile")
    if not app.deployments:  # not created yet, or they cannot be
        has_failed = app.status == ApplicationStatus.DEPLOY_FAILED
        return Sight(is_given_up=has_failed, has_failed=has_failed, message=app.message)
    failed = [each for each in app.deployments.values() if each.status in _FAILED]
    stuck = [each for each in failed if not each.replica_states.keys() - {_RUNNING}]
    replicas = app.deployments.get(_REPLICAS)
    states = {} if replicas is None else replicas.replica_states
    about = stuck[0] if stuck else replicas
    return Sight(
        num_up=sum(number for state, number in states.items() if state == _RUNNING),
        is_whole=app.status == ApplicationStatus.RUNNING,
        has_failed=bool(failed),
        is_given_up=bool(stuck),
        message="" if about is None else about.message,
    )


@dataclass
class StartWatch:
    """Decides what to say of a start, whether it is over, and whether it is hopeless."""

    url: str
    num_wanted: int  # replicas
    began_s: float
    _: KW_ONLY
    num_up: int = 0
    is_over: bool = False
    _message: str = ""
    _reason: str = ""  # of the last failure
    _first_up_s: float | None = None
    _given_up_since_s: float | None = None
    _over_since_s: float | None = None
    _is_incomplete: bool = False  # whether it has said so

    def look(self, sight: Sight, now_s: float) -> list[str]:
        """Returns what there is to say at `now_s`. Raises `UserError` if no replica can become
        ready, or none that is can be reached."""
        before, self.num_up = self.num_up, sight.num_up
        if sight.num_up and self._first_up_s is None:
            self._first_up_s = now_s
        self._require_hope(sight, now_s)
        lines = self._news(sight, before)
        is_late = self._is_late(now_s)
        if is_late and not sight.is_whole and not self.is_over:
            lines.append(
                f"the endpoint is used as it is: {self._count}; Ray Serve goes on starting the rest"
            )
        self.is_over = sight.is_whole or is_late
        self._require_answers(now_s)
        return lines

    @property
    def _count(self) -> str:
        verb = "answers" if self.num_up == 1 else "answer"
        num_wanted = max(self.num_wanted, self.num_up)
        return f"{self.num_up} of {counted(num_wanted, 'replica')} {verb}"

    def _news(self, sight: Sight, before: int) -> list[str]:
        lines = []
        is_new = bool(sight.message) and sight.message != self._message
        self._message = sight.message
        if sight.num_up < before and sight.has_failed:
            lines.append(
                f"a replica has ended before all had started: {self._count}, and another one is started in its place"
            )
        elif is_new and _REASON_AFTER in sight.message and not sight.is_given_up:
            reason, before_it = _reason_in(sight.message), self._reason
            self._reason = reason
            why = "for the same reason" if reason == before_it else f"as {reason}"
            lines.append(
                f"a replica has ended while it loaded, {why}: {self._count}, and another one is started in its place"
            )
        elif before < sight.num_up < self.num_wanted and not sight.is_whole:
            lines.append(f"{self._count} at {self.url}; the rest is still loading")
        if lines:
            self._is_incomplete = True
        if sight.is_whole and self._is_incomplete:
            self._is_incomplete = False
            lines.append(f"{self._count} now")
        return lines

    def _is_late(self, now_s: float) -> bool:
        """Whether other replicas take much longer than the first one did."""
        if self._first_up_s is None or not self.num_up:
            return False
        longest_s = LATE_S + LATE_FACTOR * (self._first_up_s - self.began_s)
        return now_s - self._first_up_s > longest_s

    def _require_hope(self, sight: Sight, now_s: float) -> None:
        if not sight.is_given_up:
            self._given_up_since_s = None
            return
        if self._given_up_since_s is None:
            self._given_up_since_s = now_s
        if now_s - self._given_up_since_s >= GIVEN_UP_S:
            rest = (
                f"; what was served before goes on: {counted(sight.num_up, 'replica')}"
                if sight.num_up
                else ""
            )
            raise UserError(
                f"the endpoint could not be started, and Ray Serve tries no more: {_reason_in(sight.message)}{rest}"
            )

    def _require_answers(self, now_s: float) -> None:
        if not self.is_over or not self.num_up:
            self._over_since_s = None
        elif self._over_since_s is None:
            self._over_since_s = now_s
        elif now_s - self._over_since_s > READY_TIMEOUT_S:
            raise UserError(
                f"{self.url}/ready did not answer within {READY_TIMEOUT_S:.0f} s. If Ray Serve already runs on this "
                "cluster, it keeps the host and port with which it was started"
            )


def follow_start(app_name: str, *, url: str, num_wanted: int) -> None:
    """Returns once all replicas answer, or the first does and the others are late, and `url` answers
    too. Says what happens meanwhile. Raises `UserError` if none can become ready."""
    watch = StartWatch(url, num_wanted, time.monotonic())
    seen_s = time.monotonic()
    while True:
        try:
            sight = sight_of(serve.status().applications.get(app_name))
            seen_s = time.monotonic()
            for line in watch.look(sight, seen_s):
                say(line)
        except RayActorError as error:
            if time.monotonic() - seen_s > AWAY_S:
                raise UserError(
                    f"Ray Serve's controller has not answered for {AWAY_S:.0f} s ({_reason_in(str(error))})"
                ) from None
        if watch.is_over and _is_ready(url):
            return
        time.sleep(POLL_S)


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.get(f"{url}/ready", timeout=READY_TIMEOUT_S, trust_env=False)
        return answer.status_code == httpx.codes.OK
    return False


def _reason_in(message: str) -> str:
    """Returns the line of a message that says why: the last one, where there is a traceback,
    without the exception's name."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines or "ActorDiedError" in lines[-1]:
        return "its process was killed, ran out of memory or crashed"
    words = re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1])
    return printable(words, keep="")[:500].rstrip(". ")

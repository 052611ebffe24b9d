"""Keeps an endpoint of this machine up until a signal, and ends it without cutting its answers."""

import signal
from types import FrameType

from cluster.endpoint.local_end import LONGEST_STREAM_S, cut, drain, entrance_of
from cluster.local.local_cluster import LocalCluster
from cluster.output.progress import say
from cluster.output.result_text import counted, forget_closed_terminal
from cluster.stages.stage_module import ENDING_SIGNALS, exit_on_signal


class _EndAskedError(BaseException):
    """The first signal has come."""


def keep_up(cluster: LocalCluster, *, host: str, port: int) -> bool:
    """Returns after a signal, once all answers are whole: True, or False if some had to be cut.
    Exits at a second signal."""
    entrance = entrance_of(host, port)
    try:
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _ask_to_end)
        while True:
            if cluster.lost_head():
                say(
                    "the head of the local cluster was lost: it is restarted, and the endpoint comes back with it"
                )
                cluster.restart_head()
    except _EndAskedError:
        pass
    try:
        num_cut = drain(entrance, on_open=_say_waiting)
    except BaseException:
        cut(entrance)
        raise
    if num_cut:
        say(
            f"{counted(num_cut, 'answer')} took longer than {LONGEST_STREAM_S:.0f} s and ended with an error event"
        )
    return num_cut == 0


def _ask_to_end(number: int, frame: FrameType | None) -> None:
    forget_closed_terminal()
    for again in ENDING_SIGNALS:
        if signal.getsignal(again) is not signal.SIG_IGN:
            signal.signal(again, exit_on_signal)
    raise _EndAskedError


def _say_waiting(num_open: int) -> None:
    say(
        f"ending: {counted(num_open, 'answer')} may finish within {LONGEST_STREAM_S:.0f} s, and nothing new is taken; "
        "a second signal ends at once"
    )

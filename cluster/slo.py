"""The endpoint's objective and what is left of its error budget, in PromQL."""

from cluster.metric_table import METRICS

OBJECTIVE = 0.999
"""Share of the valid completions that are answered whole, over `PERIOD`. Invalid, refused (429) and drained ones (503
while an operator has the endpoint drained) do not count; an answer with status 200 whose replica itself ended it with
an error event counts as answered."""

PERIOD = "30d"

BUDGET = round(1 - OBJECTIVE, 6)

FAST_BURN, SLOW_BURN = 14.4, 6.0
"""Times the rate that would just use up the budget: 2% of it in an hour, 5% in six (Google's SRE workbook)."""


def error_ratio(window: str) -> str:
    """Share of the completions within a window that failed."""
    (answers,) = METRICS["raymill:http_answers"].series
    failed = f'sum(rate({answers}{{outcome=~"failed|cut"}}[{window}]))'
    return f'{failed} / sum(rate({answers}{{outcome=~"ok|failed|cut"}}[{window}]))'


def burn_rate(window: str) -> str:
    return f"({error_ratio(window)}) / {BUDGET}"


def budget_left() -> str:
    """Share of the period's budget, below 0 once it is overspent."""
    return f"1 - {burn_rate(PERIOD)}"

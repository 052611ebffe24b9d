"""Says why each pod of a Ray cluster does not go away, from what Ray says about its nodes. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeUse:
    """A worker node, and what it holds."""

    name: str  # of its pod
    group: str
    tasks: tuple[str, ...] = ()  # names of those that run there
    actors: tuple[str, ...] = ()  # class names of those that live there
    placement_groups: int = 0  # number of those that reserve resources there


@dataclass(frozen=True)
class GroupBounds:
    min_replicas: int
    idle_timeout_s: int


def why_not_idle(nodes: list[NodeUse], bounds: dict[str, GroupBounds]) -> dict[str, str]:
    """Returns a reason by pod name. Of a group's pods without work, `minReplicas` decides how many stay."""
    reasons: dict[str, str] = {}
    for group, bound in bounds.items():
        ours = [node for node in nodes if node.group == group]
        busy = [node for node in ours if _holds(node)]
        kept = max(0, bound.min_replicas - len(busy))
        for node in ours:
            if held := _holds(node):
                reasons[node.name] = f"holds {', '.join(held)}"
            elif kept:
                kept -= 1
                reasons[node.name] = f"has no work, and stays as {group} keeps {bound.min_replicas} pods (minReplicas)"
            else:
                wait = f"{bound.idle_timeout_s} s after its last (idleTimeoutSeconds)"
                reasons[node.name] = f"has no work, and goes {wait}"
    return reasons


def _holds(node: NodeUse) -> list[str]:
    held = []
    if node.tasks:
        held.append(f"{_number(node.tasks, 'task')} ({_names(node.tasks)})")
    if node.actors:
        held.append(f"{_number(node.actors, 'actor')} ({_names(node.actors)})")
    if node.placement_groups:
        held.append(f"a share of {node.placement_groups} placement group{'s' * (node.placement_groups > 1)}")
    return held


def _number(things: tuple[str, ...], word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) > 1)}"


def _names(things: tuple[str, ...]) -> str:
    names = sorted(set(things))
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")

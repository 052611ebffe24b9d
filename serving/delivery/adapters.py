"""Decides about the adapters that have names of their own, beside the model that they stand on: as
parts of the endpoint's state, without clock or cluster."""

from collections.abc import Callable, Mapping

from serving.delivery.promotion import Delivery, DeliveryError, Version

Order = Callable[[Delivery], Delivery]


def continued(state: Delivery, references: Mapping[str, str]) -> Delivery:
    """Returns the state with which an endpoint starts whose settings name adapters by `references`.
    Those go on with what was promoted for which the settings name the same checkpoint as before.
    The others are left out: what replaces them begins anew."""
    lines = {
        name: line
        for name, line in state.adapters.items()
        if references.get(name) == line.deployment
    }
    return state if len(lines) == len(state.adapters) else state.having(adapters=lines)


def begin_adapters(
    state: Delivery,
    references: Mapping[str, str],
    versions: Mapping[str, Version],
    *,
    new_origin: Callable[[], str],
) -> Delivery:
    """Returns the state with these versions of adapters that the settings name by `references`. One
    that the state has already stays as it is."""
    lines = {
        name: Delivery(
            deployment=references[name],
            origin=new_origin(),
            model_name=name,
            live=version.having(serial=1),
        )
        for name, version in versions.items()
        if name not in state.adapters
    }
    return state.having(adapters=state.adapters | lines) if lines else state


def on_line(name: str, order: Order, *, num_places: int) -> Order:
    """Returns the order on the whole state that is `order` on one of its lines. It raises
    `DeliveryError` for an unknown name, and if the engines have no place for one adapter more."""

    def ordered(state: Delivery) -> Delivery:
        after = state.with_line(name, order(state.line(name)))
        if name in state.adapters and state.num_adapters < after.num_adapters > num_places:
            raise DeliveryError(
                f"the new version of {name} is loaded beside the one that serves, so the engines need places for "
                f"{after.num_adapters} adapters, and have {num_places}: set engine.max_adapters to as many"
            )
        return after

    return ordered

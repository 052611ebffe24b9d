"""Says who owns which field of an object, as Kubernetes keeps it in `managedFields`. Pure.

A field is a path of keys. Every list is one field: Ray's CRDs give `workerGroupSpecs` no list type,
so whoever changes one key in it owns all of it. (The lists that do have a type are not written by
two managers here.)
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
Path = tuple[str, ...]

_UNOWNED = {("apiVersion",), ("kind",)} | {
    ("metadata", key)
    for key in (
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "generation",
        "creationTimestamp",
        "deletionTimestamp",
        "managedFields",
    )
}
_MISSING = object()


@dataclass(frozen=True)
class Manager:
    name: str
    operation: str
    """`Apply`, or `Update` for every other way to write."""
    subresource: str = ""


@dataclass
class Owners:
    """The owners of one object's fields."""

    of: dict[Path, set[Manager]] = field(default_factory=dict)

    def update(self, before: Object, after: Object, manager: Manager) -> None:
        """Makes the manager of a write that is no apply the only owner of what it changed."""
        for path in leaves(before).keys() - leaves(after).keys():
            self.of.pop(path, None)
        for path, value in leaves(after).items():
            if _at(before, path) != value:
                self.of[path] = {manager}

    def conflicts(
        self, live: Object, wanted: Object, manager: Manager
    ) -> list[tuple[Manager, Path]]:
        """Returns the fields that others own and an apply of `wanted` would change, compared before
        defaults are filled in."""
        return sorted(
            (
                (owner, path)
                for path, value in leaves(wanted).items()
                if _at(live, path) not in (_MISSING, value)
                for owner in self.of.get(path, set())
                if owner != manager
            ),
            key=str,
        )

    def apply(self, live: Object, wanted: Object, manager: Manager) -> Object:
        """Returns the object with `wanted` in it, and without what the manager applied earlier and
        no longer does.

        The manager then owns `wanted`, with others where they agree.
        """
        result, fields = copy.deepcopy(live), leaves(wanted)
        for path in [
            path for path, owners in self.of.items() if manager in owners and path not in fields
        ]:
            self.of[path].discard(manager)
            if not self.of[path]:
                del self.of[path]
                _remove(result, path)
        for path, value in fields.items():
            others = self.of.get(path, set()) if _at(live, path) == value else set()
            self.of[path] = others | {manager}
            _set(result, path, copy.deepcopy(value))
        return result

    def shown(self) -> list[Object]:
        """Returns `metadata.managedFields`."""
        found: dict[Manager, Object] = {}
        for path, owners in self.of.items():
            for owner in owners:
                at = found.setdefault(owner, {})
                for key in path:
                    at = at.setdefault(f"f:{key}", {})
        return [
            {
                "manager": owner.name,
                "operation": owner.operation,
                "fieldsType": "FieldsV1",
                "fieldsV1": fields,
            }
            | ({"subresource": owner.subresource} if owner.subresource else {})
            for owner, fields in found.items()
        ]


def owners_of(shown: list[Object]) -> Owners:
    """Returns the owners that `metadata.managedFields` shows, for whoever writes it."""
    owners = Owners()
    for entry in shown:
        manager = Manager(entry["manager"], entry["operation"], entry.get("subresource", ""))
        for path in _members(entry["fieldsV1"], ()):
            owners.of.setdefault(path, set()).add(manager)
    return owners


def _members(fields: Object, path: Path) -> Iterator[Path]:
    for key, part in fields.items():
        if key == ".":
            yield path
        elif part:
            yield from _members(part, (*path, key.removeprefix("f:")))
        else:
            yield (*path, key.removeprefix("f:"))


def leaves(value: Object) -> dict[Path, Any]:
    """Returns the fields of an object that have owners, with their values."""
    return {path: item for path, item in _leaves(value, ()) if path not in _UNOWNED}


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif path:
        yield path, value


def _at(value: Any, path: Path) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _set(value: Object, path: Path, item: Any) -> None:
    for key in path[:-1]:
        if not isinstance(value.get(key), dict):
            value[key] = {}
        value = value[key]
    value[path[-1]] = item


def _remove(value: Object, path: Path) -> None:
    for key in path[:-1]:
        value = value.get(key, {})
    value.pop(path[-1], None)

"""Evaluates a ValidatingAdmissionPolicy of the manifests on a request, as the API server does:
variables when they are asked for, and an expression that cannot be evaluated refuses."""

from typing import Any

import celpy
from celpy.adapter import json_to_cel

from tests.k8s.manifests import Manifest

_ENVIRONMENT = celpy.Environment()
_PROGRAMS: dict[str, Any] = {}


def refusals(
    policy: Manifest,
    wanted: Manifest,
    *,
    before: Manifest | None = None,
    user: str = "somebody",
    groups: tuple[str, ...] = (),
) -> list[str]:
    """Returns the messages with which the policy refuses to create the object, or to update the one
    `before`: none if it admits it, or is not asked."""
    operation = "CREATE" if before is None else "UPDATE"
    request = {"operation": operation, "userInfo": {"username": user, "groups": list(groups)}}
    given = {"object": wanted, "oldObject": before, "request": request}
    values = {name: json_to_cel(value) for name, value in given.items()}
    variables = _Variables(
        {it["name"]: it["expression"] for it in policy["spec"].get("variables", [])}
    )
    if not all(
        variables.value(it["expression"], values) for it in policy["spec"]["matchConditions"]
    ):
        return []
    return [
        rule["message"]
        for rule in policy["spec"]["validations"]
        if not variables.holds(rule["expression"], values)
    ]


class _Variables:
    """The policy's variables, each evaluated once, when it is named."""

    def __init__(self, expressions: dict[str, str]) -> None:
        self._expressions = expressions
        self._known: dict[str, Any] = {}

    def holds(self, expression: str, values: dict[str, Any]) -> bool:
        try:
            return bool(self.value(expression, values))
        except celpy.CELEvalError:
            return False

    def value(self, expression: str, values: dict[str, Any]) -> Any:
        named = [name for name in self._expressions if f"variables.{name}" in expression]
        for name in named:
            if name not in self._known:
                try:
                    self._known[name] = self.value(self._expressions[name], values)
                except celpy.CELEvalError as error:
                    self._known[name] = error
        known = {json_to_cel(name): self._known[name] for name in named}
        program = _PROGRAMS.get(expression)
        if program is None:
            program = _ENVIRONMENT.program(_ENVIRONMENT.compile(expression))
            _PROGRAMS[expression] = program
        return program.evaluate(values | {"variables": celpy.celtypes.MapType(known)})

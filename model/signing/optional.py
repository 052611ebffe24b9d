"""Imports what signs and checks signatures, which is optional."""

import importlib
from typing import Any

from model.tables import pip_line
from raymill.errors import UserError


def library(name: str) -> Any:
    """Returns a module, where it is needed: some take half a second. Raises `UserError`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{error}: `{pip_line('sign')}` brings what signs and checks signatures"
        ) from None

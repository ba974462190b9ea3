"""Options of `tinychat run` for models that a server has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tinychat.base.errors import UsageError
from tinychat.base.load_options import LoadOptions
from tinychat.cli.options import file_type, pick

if TYPE_CHECKING:
    from tinychat.process.connector import Connector

THERE = ("think", "effort")  # load options that a server can be told


def served_options(f: Any) -> Any:
    """Give a command the options that name a server."""
    for option in (
        click.option(
            "--api-key-file", type=file_type(), help="The server's key stands in this file (mode 600)."
        ),
        click.option("--api-key-env", metavar="NAME", help="The server's key is that environment variable."),
        click.option("--server", metavar="URL", help="Have a server answer that speaks as OpenAI's does."),
    ):
        f = option(f)
    return f


def served(model: str, o: dict[str, Any], typed: bool) -> tuple[str, Connector | None]:
    """The model's name, and who finds it where it is a server's. `typed`: by the user; else it is a stored
    chat's, or the default.

    Raises UsageError for options that make no sense together, and for a key that cannot be used.
    """
    from tinychat.process.address import Address, KeySource, full_name, split_name

    id, address = split_name(model)
    if o["server"] is None and address is None:
        for option in ("api_key_env", "api_key_file"):
            if o[option] is not None:
                name = option.replace("_", "-")
                raise UsageError(f"--{name} is for a server.", "Name it: --server URL.")
        return model, None
    here = [name for name in pick(o, LoadOptions.SETTINGS) if name not in THERE]
    if here:
        flag = f"--{here[0].replace('_', '-')}"
        raise UsageError(f"{flag} is for models of this machine.", f"Leave out {flag}, or --server.")
    if o["api_key_env"] is not None and o["api_key_file"] is not None:
        raise UsageError("--api-key-env and --api-key-file exclude each other.", "Choose one.")
    server = address if o["server"] is None else Address.parse(o["server"])
    assert server is not None
    if typed and address not in (None, server):
        raise UsageError(f"That model is one of {address}, not of {server}.", "Leave out --server.")
    model = full_name(id if typed or address is not None else "", server)
    keys = KeySource(server, o["api_key_env"], o["api_key_file"])
    keys.key(server)
    from tinychat.process.connector import Connector

    return model, Connector(server, keys)

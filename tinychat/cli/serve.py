"""`tinychat serve`: the HTTP server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from tinychat.base import locations
from tinychat.base.errors import UsageError
from tinychat.base.preferences import Preferences
from tinychat.cli.first import no_model, usual_model
from tinychat.cli.options import answering_options, complete_models, loading_options
from tinychat.cli.preferred import load_options

if TYPE_CHECKING:
    from tinychat.model import Model
    from tinychat.serve.server import Server


@click.command()
@click.argument("model", required=False, metavar="[MODEL]", shell_complete=complete_models)
@click.option(
    "--model",
    "others",
    multiple=True,
    metavar="MODEL",
    help="A model to serve as well; may be given several times. It is loaded when it is asked for.",
    shell_complete=complete_models,
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen; beyond this machine only with a key.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key",
    envvar="TINYCHAT_API_KEY",
    metavar="KEY",
    help="What clients must send; or set TINYCHAT_API_KEY.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="A web page that may ask, such as http://localhost:3000; may be given several times.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Answers that are made at once.",
)
@click.option(
    "--keep-alive",
    type=click.FloatRange(0),
    metavar="MINUTES",
    help="Unload a model that nobody asks for so long; default: when room is needed.",
)
@answering_options
@loading_options
def serve(model: str | None, others: tuple[str, ...], **o: Any) -> None:
    """Serve MODEL to other programs over HTTP, with OpenAI's API.

    It listens on this machine only (http://127.0.0.1:8080/v1), unless --host says otherwise; then clients
    must send the key. docs/serve.md says how to point other programs at it.
    """
    preferences = Preferences.read()
    names = list(dict.fromkeys([*([model] if model else []), *others]))
    if not names and not (usual := usual_model(preferences)[0]):
        raise no_model()
    names = names or [usual]
    import asyncio

    from tinychat.serve.limits import Limits
    from tinychat.serve.rack import served_name
    from tinychat.serve.server import Address, listen
    from tinychat.serve.server import serve as run

    options = {name: load_options(preferences.of(name), o) for name in names}
    loads = {served_name(name): partial(_load, name, options[name]) for name in names}
    if len(loads) < len(names):
        raise UsageError("Two models would be served under one name.", "Give each of them once.")
    limits = Limits(parallel=o["parallel"])
    address = Address(o["host"], o["port"], o["api_key"] or None, o["origins"], limits)
    sockets = listen(address)
    keep_alive = None if o["keep_alive"] is None else 60 * o["keep_alive"]

    def ready(server: Server) -> None:
        host, port = sockets[0][0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        click.echo(f"Serving {', '.join(loads)} at http://{host}:{port}/v1 (Ctrl+C ends it).", err=True)

    asyncio.run(
        run(loads, address, sockets, keep_alive=keep_alive, ready=ready, folder=locations.kv_file("x").parent)
    )


def _load(name: str, options: dict[str, Any]) -> Model:
    from tinychat.loading import load

    click.echo(f"Loading {name}.", err=True)
    return load(name, **options, progress=partial(click.echo, err=True))


commands = [serve]

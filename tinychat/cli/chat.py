"""`tinychat run`: one answer on stdout, or a conversation."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from tinychat.base import prompts
from tinychat.base.errors import UsageError
from tinychat.base.load_options import LoadOptions
from tinychat.base.preferences import Preferences, Section
from tinychat.base.sampling_params import SamplingParams
from tinychat.cli.calls import to_the_end, toolbox_of
from tinychat.cli.first import choose_model, model_unasked, usual_model
from tinychat.cli.options import (
    CHAT_NUMBER,
    answering_options,
    complete_chats,
    complete_models,
    file_type,
    loading_options,
    pick,
    sampling_options,
)
from tinychat.cli.output import Printer, cancel_on_interrupt, describe
from tinychat.cli.preferred import load_options
from tinychat.cli.preferred import sampling_options as sampling_from
from tinychat.cli.served import served, served_options
from tinychat.cli.words import attached, gather, is_json, model_and_prompt, schema_of

if TYPE_CHECKING:
    from tinychat.base.events import Event
    from tinychat.chats.chat_store import ChatStore
    from tinychat.chats.keeper import Keeper
    from tinychat.chats.records import Chat

CUT = 5  # exit code: the answer was cut before it had the form that was asked for


@click.command()
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]", shell_complete=complete_models)
@click.option("-s", "--system", help="System prompt.")
@click.option(
    "-p",
    "--prompt",
    "kept",
    metavar="NAME",
    shell_complete=lambda c, p, begun: [n for n in prompts.names() if n.startswith(begun)],
    help="A prompt of your own, prompts/NAME.md beside config.toml; the words go where it says {{input}}.",
)
@sampling_options
@answering_options
@loading_options
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=file_type(),
    help="Send this text file along; may be given several times.",
)
@served_options
@click.option("-c", "--continue", "latest", is_flag=True, help="Go on with the chat spoken in last.")
@click.option(
    "--resume",
    type=CHAT_NUMBER,
    metavar="ID",
    shell_complete=complete_chats,
    help="Go on with chat ID (`tinychat chats`).",
)
@click.option("--no-store", is_flag=True, help="Keep nothing of this conversation.")
@click.option("--plain", is_flag=True, help="Line by line instead of the chat screen.")
@click.option(
    "--allow-tool",
    multiple=True,
    metavar="SERVER/TOOL",
    help="Let the model call this MCP tool without asking; may be given several times.",
)
@click.option("--schema", metavar="FILE|JSON", help="Hold one answer to this JSON schema.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, finish_reason, stats.")
@click.option("--stream-json", is_flag=True, help="One JSON object an event.")
@click.option("-v", "--verbose", is_flag=True, help="Timings on stderr.")
def run(words: tuple[str, ...], **o: Any) -> None:
    """Chat with MODEL, or answer PROMPT (with what is piped in put before it) and exit.

    MODEL is an alias (`tinychat list --all`), a Hugging Face repo id, a local folder or a .gguf file; with
    --server the name of one of its models. What cannot be a MODEL is the PROMPT, quoted or as several words;
    with -c or --resume a single word is, too.
    """
    if o["as_json"] and o["stream_json"]:
        raise UsageError("--json and --stream-json exclude each other.", "Choose one.")
    resumed = o["latest"] or o["resume"] is not None
    keys = o["api_key_env"] is not None or o["api_key_file"] is not None
    remote = o["server"] is not None or (keys and not resumed)  # a key alone is refused by `served`
    model, prompt = model_and_prompt(words, resumed or o["kept"] is not None, remote)
    named, preferences = model is not None, Preferences.read()
    own = None if o["kept"] is None else prompts.find(o["kept"])
    model = model or (own and own.model) or ""
    # A chat keeps files as what they are, beside the question; one answer alone reads them as they are.
    attachments = attached(o["files"]) if resumed else []
    text = gather(prompt, () if resumed else o["files"])
    if own is not None:
        text = own.filled(text)
    if text is None and attachments:
        text = ""
    if text is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "There is nothing to answer.", 'Give a prompt: tinychat run MODEL "…", or pipe text into it.'
        )
    if resumed and o["no_store"]:
        raise UsageError("--no-store knows no earlier chats.", "Leave it out to go on with one.")
    # One answer alone is not kept.
    kept = _open_store(o) if resumed or text is None else None
    chat = _earlier(kept, o) if kept is not None and resumed else None
    if chat is not None and not named:
        model = chat.model
    elif not model and o["server"] is None:
        model = usual_model(preferences)[0]
    if o["schema"] is not None:
        o["schema"] = schema_of(o["schema"], alone=text is not None)
    model, o["connector"] = served(model, o, named)
    plain = o["plain"] or os.environ.get("TERM") in ("dumb", "unknown")
    if not model and text is not None:
        model = model_unasked()
    if not model and plain:
        model = choose_model()
    _prefer(preferences, model, o, chat, own)
    if text is not None:
        sys.exit(_answer(model, text, attachments, kept, chat, o))
    assert kept is not None  # a conversation is
    if plain:
        _converse(model, kept, chat, o)
    else:
        sys.exit(_show(model, kept, chat, o, preferences))


def _prefer(
    preferences: Preferences, model: str, o: dict[str, Any], chat: Chat | None, own: prompts.Prompt | None
) -> None:
    """Add what the files say: `sampling` and `load`. A chat that goes on has its own words and sampling, and
    how a server's model is loaded is not ours to say.
    """
    section = preferences.of(model) if o["connector"] is None else Section(preferences.general.system)
    if own is not None:
        section = own.section.over(section)
    o["load"] = load_options(section, o)
    o["sampling"] = pick(o, SamplingParams.SETTINGS)
    if chat is None:
        o["sampling"] = sampling_from(section, o)
        o["system"] = section.system if o["system"] is None else o["system"]


def _open_store(o: dict[str, Any]) -> ChatStore:
    from tinychat.chats.chat_store import ChatStore

    store = ChatStore(in_memory=o["no_store"])
    if store.notice:
        click.echo(store.notice, err=True)
    return store


def _earlier(store: ChatStore, o: dict[str, Any]) -> Chat | None:
    """The chat to go on with, if there is one."""
    from tinychat.chats.chat_store import chosen

    chat = chosen(store, o["latest"], o["resume"])
    if chat is None:
        click.echo("There is no chat to go on with yet: this begins one.", err=True)
    return chat


def _show(
    model: str, store: ChatStore, chat: Chat | None, o: dict[str, Any], preferences: Preferences
) -> int:
    """A conversation on the screen; the exit code."""
    from tinychat.tui.first_frame import first_frame

    with first_frame():
        from tinychat.mcp.toolbox import Toolbox
        from tinychat.tui.app import make_app

        options = pick(o, LoadOptions.SETTINGS) | ({"keep_kv": False} if o["no_store"] else {})
        engine = None
        if o["connector"] is not None:
            from tinychat.process.remote_engine import RemoteEngine

            engine = RemoteEngine(o["connector"])
        app = make_app(
            model, store, chat, o["system"], o["sampling"], options, engine=engine, preferences=preferences,
            toolbox=Toolbox.found(o["allow_tool"]),
        )  # fmt: skip
    return app.run_to_end()


def _converse(model: str, store: ChatStore, chat: Chat | None, o: dict[str, Any]) -> None:
    """A conversation line by line."""
    with (
        toolbox_of(o["allow_tool"], False) as toolbox,
        _session(model, o, None) as session,
        ExitStack() as others,
    ):
        from tinychat.chats.keeper import Keeper
        from tinychat.cli.repl import Repl

        def another(name: str) -> Any:
            load = load_options(Preferences.read().of(name), o)
            return others.enter_context(_loaded(name, {**o, "load": load}))

        keeper = Keeper(store, session, chat)
        try:
            load_model = another if o["connector"] is None else None
            Repl(session, keeper, o["verbose"], toolbox, load_model).run()
        finally:
            _close(keeper)


def _answer(
    model: str,
    text: str,
    attachments: list[dict[str, str]],
    store: ChatStore | None,
    chat: Chat | None,
    o: dict[str, Any],
) -> int:
    """One answer on stdout, kept in the store if there is one; the exit code."""
    # It ends where its context does; a conversation goes on.
    load = o["load"]
    once = "none" if chat is None and not (load.get("kv_budget") or load.get("kv_policy")) else None
    with toolbox_of(o["allow_tool"], True) as toolbox, _session(model, o, once) as session:
        keeper = None
        if store is not None:
            from tinychat.chats.keeper import Keeper

            keeper = Keeper(store, session, chat)
        session.response_format = o["schema"]
        if tools := toolbox.offered():
            session.tools = tools
        events = session.send(text, attachments=attachments)
        follow = partial(keeper.follow, session) if keeper else iter
        code = _print(session, to_the_end(toolbox, session, events, follow), o)
        if keeper:
            keeper.keep(session)  # results of calls that were stopped
        return code or int(keeper is not None and _close(keeper))


def _loaded(model: str, o: dict[str, Any]) -> Any:
    """The model, of this machine or of a server."""
    if o["connector"] is not None:
        return o["connector"](model, o["load"], lambda what, done, total: None)
    from tinychat.hub.reach import remember_model
    from tinychat.loading import load

    remember = (lambda *_: None) if o["no_store"] else remember_model
    remember(model, True)
    loaded = load(model, **o["load"], progress=partial(click.echo, err=True))
    remember(model)
    return loaded


@contextmanager
def _session(model: str, o: dict[str, Any], kv_policy: str | None) -> Iterator[Any]:
    with _loaded(model, o) as loaded:
        session = loaded.session(o["system"], kv_policy=kv_policy, **o["sampling"])
        if loaded.template is None:
            click.echo(
                "This model has no chat template: it continues your text instead of answering.", err=True
            )
        yield session


def _close(keeper: Keeper) -> bool:
    """Whether something of the chat is lost, which has been said then."""
    lost = keeper.close(say=partial(click.echo, err=True))
    if lost:
        click.echo(lost, err=True)
    return bool(lost)


def _print(session: Any, events: Iterator[Event], o: dict[str, Any]) -> int:
    from tinychat.base.events import Done, Notice, event_to_json

    out = Printer()
    done: Done | None = None
    with cancel_on_interrupt(session) as interrupted:
        try:
            for event in events:
                if o["stream_json"]:
                    out.json(event_to_json(event))
                elif not o["as_json"]:
                    out.show(event)
                if isinstance(event, Notice):
                    click.echo(event.message, err=True)
                if isinstance(event, Done):
                    done = event
        except BaseException:
            out.end()  # an error begins a line of its own
            raise
    if done is None:
        raise AssertionError("an answer ends with Done")
    if o["as_json"]:
        answer = {
            "model": session.model.name,
            "text": done.completion.text,
            "reasoning": done.completion.reasoning,
            "finish_reason": done.finish_reason,
            "stats": done.stats.as_dict(),
        }
        out.json(answer)
    elif not o["stream_json"]:
        out.end()
    if done.finish_reason == "context_full":
        click.echo(f"The context of {session.model.n_ctx} tokens is full.", err=True)
    if o["verbose"]:
        click.echo(describe(done.stats), err=True)
    if o["schema"] is not None and done.finish_reason in ("length", "context_full"):
        click.echo("The answer was cut before it was complete: it is no valid JSON.", err=True)
        return CUT
    if o["schema"] is not None and not interrupted and not is_json(done.completion.text):
        click.echo("The answer is no JSON: the server did not hold it to the schema.", err=True)
        return CUT
    return 130 if interrupted else 0


commands = [run]

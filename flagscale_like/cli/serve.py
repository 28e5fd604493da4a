"""`serve`: a model behind an OpenAI-compatible interface on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flagscale_like.cli.base import Adapter, Checkpoint, Force, app, example, open_model
from flagscale_like.cli.generate import Rows
from flagscale_like.cli.model_options import Precision
from flagscale_like.errors import ConfigError, PlatformError

BACKLOG = 2048  # connections that wait while the model is loaded
LOCAL = ("127.0.0.1", "localhost", "::1")


@app.command(epilog=example("flagscale-like serve --checkpoint runs/demo --port 8000"))
def serve(  # typer makes an option of every parameter
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the folder's.")] = None,
    rows: Rows = 32,
    room: Annotated[
        int, typer.Option(help="Most tokens of a text with its prompt; 0: as many as the model takes.", min=0)
    ] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder. Default: the run's tokenizer.")] = None,
    adapter: Adapter = None,
    force: Force = False,
    precision: Precision = "fp32",
) -> None:
    """Serve a checkpoint or a Hugging Face folder at /v1/completions and /v1/chat/completions, to try it. Ctrl-C ends it.

    Requests that come while others run join their batch. There is no authentication.
    """
    import importlib.util
    import socket

    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise PlatformError("serve needs uvicorn and starlette: pip install 'flagscale_like[serve]'")
    import uvicorn

    from flagscale_like.config import Parallel
    from flagscale_like.recipes.generate import TextGenerator
    from flagscale_like.recipes.serve import Api
    from flagscale_like.runtime.parallel import parallel_context

    source, found_tokenizer = open_model(checkpoint, adapter=adapter, force=force)
    folder = tokenizer or found_tokenizer
    if folder is None:
        raise ConfigError("the run names no tokenizer: give --tokenizer FOLDER")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        raise PlatformError(
            f"cannot listen at {host}:{port}: {error.strerror}: give another --host or --port"
        ) from None
    with listener, parallel_context(Parallel(), alone=True) as ctx:
        writer = TextGenerator(source, folder, ctx, rows=rows, room=room, precision=precision)
        api = Api(writer, name or checkpoint.resolve().name)
        if host not in LOCAL:
            typer.echo(f"whoever reaches {host} can use the model: there is no authentication", err=True)
        typer.echo(f"serving {api.name} at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)")
        uvicorn.Server(uvicorn.Config(api.app(), log_level="warning")).run(sockets=[listener])

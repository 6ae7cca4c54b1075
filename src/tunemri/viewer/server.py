"""The local host of the viewer: three fixed pages and one websocket, for one person on this machine.

Who may talk to it (threats M1 to M6 of the design page on reliability): only loopback is bound; a request must name a
loopback host; the websocket must come from the page itself; and both need a cookie that only the holder of the link,
good for one use, receives. Nothing a client says ever becomes a path, and nothing is written to the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from .. import errors
from .session import Answer, Desk, Session, pack

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocket

__all__ = ["INSTALL", "application", "listen", "prepare", "serve", "static"]

INSTALL = 'in the clone of tunemri: pip install ".[viewer]"'
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KINDS = {"viewer.html": "text/html", "viewer.js": "text/javascript", "viewer.css": "text/css"}
_MAX_MESSAGE = 64 * 1024
_MAX_CLIENTS = 4
_MAX_CONNECTIONS = 256  # cheap ones: pages are constant and small
_PATIENCE = 10.0  # seconds for a whole request
_ADVANCE = 2.0  # seconds that the first image may hold up the start
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_REFUSED = (
    "This page belongs to one run of tunemri view. Its link works once: go on in the browser where you opened it, "
    "or stop tunemri view, start it again, and open the new link.\n"
)


def static(name: str) -> str:
    """The text of viewer.html, viewer.js or viewer.css."""
    return (importlib.resources.files(__package__) / "static" / name).read_text(encoding="utf-8")


def application(session: Session, token: str, cookie: str) -> Starlette:
    """The pages and the websocket behind their guard.

    Arguments:
        token: what the link carries; it opens the page once.
        cookie: the cookie's name; cookies are shared by all ports of a host, so it should hold the port.

    Raises:
        BadOption: the extra `viewer` is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.routing import Route, WebSocketRoute
    except ImportError as error:
        raise errors.BadOption(f"the viewer needs {error.name}", key="viewer", help=INSTALL, exit_code=3) from None

    pages = {name: static(name).encode() for name in _KINDS}
    desk = Desk(session)
    clients: set[object] = set()

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "viewer.html")
        if name not in pages:
            return Response("no such page\n", 404, media_type="text/plain")
        return Response(pages[name], media_type=_KINDS[name])

    async def link(websocket: WebSocket) -> None:
        await websocket.accept()
        if len(clients) >= _MAX_CLIENTS:
            await websocket.close(1013, f"already {_MAX_CLIENTS} windows open")
            return
        owner = object()
        clients.add(owner)
        try:
            await _converse(websocket, owner, session, desk)
        finally:
            clients.discard(owner)
            desk.stop(owner)
            desk.stop(None)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # The first image in advance, while nobody else needs the processor; a slow one goes on while the browser opens.
        made = threading.Event()
        desk.ask(None, session.read({"slot": "a", "number": 0, "slice": len(session.scan) // 2}), lambda _: made.set())
        await asyncio.to_thread(made.wait, _ADVANCE)
        yield
        await asyncio.to_thread(desk.close)

    return Starlette(
        routes=[Route("/", page), Route("/{name}", page), WebSocketRoute("/link", link)],
        middleware=[Middleware(_Guard, token=token, cookie=cookie)],
        lifespan=lifespan,
    )


async def _converse(websocket: WebSocket, owner: object, session: Session, desk: Desk) -> None:
    """Requests in, answers out, until the other side leaves."""
    from starlette.websockets import WebSocketDisconnect

    loop = asyncio.get_running_loop()
    outbox: asyncio.Queue[Answer] = asyncio.Queue()

    def tell(answer: Answer) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            loop.call_soon_threadsafe(outbox.put_nowait, answer)

    async def send() -> None:
        while True:
            await websocket.send_bytes(pack(await outbox.get()))

    async def receive() -> None:
        tell(await asyncio.to_thread(session.about))
        while True:
            text = await websocket.receive_text()
            try:
                message = json.loads(text)
                if isinstance(message, dict) and "stop" in message:
                    desk.stop(owner, str(message["stop"]))
                elif isinstance(message, dict) and "state" in message:
                    session.note(message["state"])
                else:
                    desk.ask(owner, session.read(message), tell)
            except (ValueError, OverflowError, RecursionError):
                tell(Answer(head={"type": "refused", "what": "not a message"}))
            except errors.TunemriError as error:
                tell(Answer(head={"type": "refused", "what": str(error)[:300]}))

    tasks = [asyncio.create_task(send()), asyncio.create_task(receive())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in done:
        error = task.exception()
        # KeyError: a binary message where text was expected.
        if error is not None and not isinstance(error, WebSocketDisconnect | RuntimeError | KeyError):
            raise error


class _Guard:
    """Host, Origin, method and cookie are checked before anything else sees a request; safe headers on every answer."""

    def __init__(self, app: ASGIApp, *, token: str, cookie: str) -> None:
        self.app, self.cookie = app, cookie
        self.token: str | None = token
        self.secret = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse, RedirectResponse, Response

        headers, http = Headers(scope=scope), scope["type"] == "http"
        host, origin = headers.get("host", ""), headers.get("origin")
        answer: Response | None = None
        foreign = origin is not None and not _same_origin(origin, host)
        if not _loopback(host) or len(headers.getlist("host")) != 1 or foreign or (not http and origin is None):
            answer = PlainTextResponse("refused\n", 403)
        elif http and scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("refused\n", 405)
        elif not self._known(headers):
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0] if http else ""
            answer = PlainTextResponse(_REFUSED, 401 if http else 403)
            if (
                self.token is not None
                and scope["method"] == "GET"
                and scope["path"] == "/"
                and secrets.compare_digest(given.encode(), self.token.encode())
            ):
                self.token = None  # once
                answer = RedirectResponse("/", 303)
                answer.set_cookie(self.cookie, self.secret, httponly=True, samesite="strict", path="/")
        if answer is not None and not http:
            await send({"type": "websocket.close", "code": 4403, "reason": "refused"})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await (answer or self.app)(scope, receive, guarded if http else send)

    def _known(self, headers: Any) -> bool:
        """Whether the cookie is ours. Read by hand: a cookie jar of another program must not spoil it."""
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self.cookie and secrets.compare_digest(value.encode(), self.secret.encode()):
                return True
        return False


def _loopback(host: str) -> bool:
    """Whether a Host names this machine; its port may be another one, at the far end of `ssh -L`."""
    try:
        return urlsplit(f"//{host}").hostname in _LOOPBACK and "@" not in host and "/" not in host
    except ValueError:
        return False


def _same_origin(origin: str, host: str) -> bool:
    return origin == f"http://{host}" and _loopback(host)


def listen(port: int | None) -> socket.socket:
    """A bound loopback socket on `port`; None takes 8765 or, where that is taken, any free one.

    Raises:
        Busy: the port asked for is taken; status 3.
    """
    for candidate in (port,) if port is not None else (8765, 0):
        try:
            return socket.create_server(("127.0.0.1", candidate))
        except OSError as error:
            if port is not None:
                raise errors.Busy(
                    f"port {port} cannot be used: {error.strerror}", key="port",
                    help=f"--port {port + 1}, or leave --port out: a free one is found", exit_code=3,
                ) from None  # fmt: skip
    raise errors.Busy("no free port on this machine", key="port", exit_code=3)


def prepare(session: Session, sock: socket.socket) -> tuple[uvicorn.Server, str]:
    """A server for a bound socket, not yet running, and the link that opens its page once.

    Raises:
        BadOption: the extra `viewer` is not installed.
    """
    try:
        import uvicorn
        import websockets  # noqa: F401  uvicorn answers websockets only with it
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError as error:
        raise errors.BadOption(f"the viewer needs {error.name}", key="viewer", help=INSTALL, exit_code=3) from None

    class Impatient(H11Protocol):
        """Closes a connection that dawdles over a request: a few of them would keep everybody out."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(_PATIENCE, self.look)

        def look(self) -> None:
            if self not in self.connections:  # gone, or a websocket by now
                return
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            else:
                self.loop.call_later(_PATIENCE, self.look)

    port, token = sock.getsockname()[1], secrets.token_urlsafe(16)
    config = uvicorn.Config(
        application(session, token, f"tunemri-{port}"), log_level="error", access_log=False, lifespan="on",
        http=Impatient, ws="websockets-sansio", ws_max_size=_MAX_MESSAGE, ws_per_message_deflate=False, limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=5, timeout_graceful_shutdown=2, h11_max_incomplete_event_size=16 * 1024,
        server_header=False, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config), f"http://127.0.0.1:{port}/?token={token}"


def serve(session: Session, sock: socket.socket, started: Callable[[str], None]) -> None:
    """Serve until interrupted; `started` is given the link once the server answers.

    Raises:
        BadOption: the extra `viewer` is not installed.
    """
    server, link = prepare(session, sock)

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            started(link)
        await serving

    asyncio.run(run())

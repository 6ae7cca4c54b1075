"""The viewer in a notebook: the same page in a cell, and a still picture wherever no widget can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import errors, plots
from ..evaluation import Contestant
from ..methods import METHODS, Reconstructor, load, reconstruct
from ..scan import Scan
from .server import INSTALL, static
from .session import Answer, Desk, Session, pack

__all__ = ["View", "view"]

Models = Reconstructor | str | Sequence[Reconstructor | str]


def view(scan: Scan, models: Models = "hyper-brain", *, reference: Tensor | None = None, title: str = "scan") -> View:
    """Turn the dials of one or several methods on a scan, live in a notebook.

        v = tunemri.view(scan, ["hyper-brain", "tv"])
        v                   # the last line of a cell shows it
        v.settings, v.kept  # where the dials are, and what was kept

    Arguments:
        scan: what was measured.
        models: a method or several, loaded or by name.
        reference: `(B, H, W)`, or None: unknown.
        title: what to call the scan.

    Returns:
        a `View`; without anywidget it shows a still picture and says what to install.
    """
    given = [models] if isinstance(models, Reconstructor | str) else list(models)
    contestants: list[Contestant] = []
    for m in given:
        model = load(m) if isinstance(m, str) else m
        name = (
            m if isinstance(m, str) else next((n for n, kind in METHODS.items() if type(m) is kind), type(m).__name__)
        )
        count = sum(1 for c in contestants if c.name.split(" #")[0] == name)
        contestants.append(Contestant(name=f"{name} #{count + 1}" if count else name, model=model))
    return View(Session(scan, contestants, reference=reference, title=title))


class View:
    """A scan with dials; made by `view`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._widget: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """The dials of the first pane, as last turned."""
        return dict(self.session.state.get("dials", {}))

    @property
    def kept(self) -> list[dict[str, Any]]:
        """What was kept: model, dials, slice, note."""
        return [{**k, "model": self.session.contestants[k["model"]].name} for k in self.session.state.get("kept", [])]

    def widget(self) -> Any:
        """The anywidget itself.

        Raises:
            BadOption: anywidget is not installed.
        """
        try:
            import anywidget
        except ImportError:
            raise errors.BadOption("a live view needs anywidget", key="view", help=INSTALL, exit_code=3) from None
        if self._widget is None:
            self._widget = _widget(anywidget.AnyWidget, self.session)
        return self._widget

    def close(self) -> None:
        """Stop what is being computed, end the threads and take the widget away; shown again, it begins anew."""
        if self._widget is not None:
            self._widget.close()
            self._widget = None

    def picture(self) -> bytes:
        """A still picture as PNG: each method at its own setting, on the middle slice."""
        session, middle = self.session, len(self.session.scan) // 2
        panels = []
        for c in session.contestants:
            out = reconstruct(session.scan, c.model, **c.dials)
            words = " ".join(f"{n}={v:.3g}" if isinstance(v, float) else f"{n}={v}" for n, v in out.dials.items())
            panels.append(plots.Panel(title=f"{c.name} {words}".strip(), image=out.image[middle]))
        truth = None if session.reference is None else session.reference[middle].abs()
        return plots.strip(panels, truth).png(100)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Mapping[str, Any]:
        import base64

        names = ", ".join(c.name for c in self.session.contestants)
        bundle: dict[str, Any] = {
            "text/plain": f"tunemri view of {self.session.title}: {names}",
            "image/png": base64.b64encode(self.picture()).decode(),
        }
        try:
            live = self.widget()._repr_mimebundle_()
        except errors.BadOption as error:
            bundle["text/plain"] += f" (a still picture: {error})"
            return bundle
        data = live[0] if isinstance(live, tuple) else live
        return {**bundle, **{k: v for k, v in (data or {}).items() if k != "text/plain"}}


def _widget(base: Any, session: Session) -> Any:
    """An anywidget that speaks with a desk of its own."""
    desk = Desk(session)

    class Viewer(base):
        _esm = static("viewer.js")
        _css = static("viewer.css")

        def close(self) -> None:
            desk.close()
            super().close()

    widget = Viewer()

    def tell(answer: Answer) -> None:
        widget.send({"packed": True}, [pack(answer)])

    def take(_: Any, content: Any, __: Any) -> None:
        try:
            if isinstance(content, dict) and "hello" in content:
                tell(session.about())
            elif isinstance(content, dict) and "bye" in content:
                desk.stop(widget)
            elif isinstance(content, dict) and "stop" in content:
                desk.stop(widget, str(content["stop"]))
            elif isinstance(content, dict) and "state" in content:
                session.note(content["state"])
            else:
                desk.ask(widget, session.read(content), tell)
        except errors.TunemriError as error:
            tell(Answer(head={"type": "refused", "what": str(error)[:300]}))

    widget.on_msg(take)
    return widget

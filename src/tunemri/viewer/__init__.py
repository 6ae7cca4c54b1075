"""The viewer: move the dial, see the range, keep the one you trust.

    session    what is asked and answered          server   on this machine, in the browser
    offline    one file with live dials            widget   in a notebook

The page itself is `static/viewer.js`, the same in all three.
"""

from .offline import export
from .server import listen, serve
from .session import Session, Source
from .widget import View, view

__all__ = ["Session", "Source", "View", "export", "listen", "serve", "view"]

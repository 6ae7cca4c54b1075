"""The same minimal viewer three times, for benchmarks/viewer.py: ours, Panel's and Gradio's.

    python benchmarks/viewer_apps.py tunemri|panel|gradio PORT MODEL

One 256² scan, one slider, one image. The corner of the image shows the dial, so that another setting has other pixels,
whatever the model makes of it. Panel and Gradio are written as their manuals do it, with what they offer against floods.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

import tunemri
from tunemri.fourier import pad
from tunemri.methods import prepare
from tunemri.operators import LinearOperator
from tunemri.scan import Reconstruction, Scan

SIZE = (256, 256)


class Marked(tunemri.Reconstructor):
    """A method whose image carries its first dial in a corner."""

    def __init__(self, model: tunemri.Reconstructor) -> None:
        super().__init__()
        self.model = model

    def declared(self) -> dict[str, tunemri.Dial]:
        return self.model.dials

    def forward(self, y: Tensor, A: LinearOperator, **dials: float) -> Reconstruction:
        out = self.model(y, A, **dials)
        image = out.image.clone()
        name, dial = next(iter(self.dials.items()))
        image[:, :24, :24] = (float(dials.get(name, dial.default)) - dial.lo) / (dial.hi - dial.lo)
        return replace(out, image=image)


def scene(name: str, size: tuple[int, int] = SIZE) -> tuple[Scan, Tensor, Marked]:
    """The scan (one coil, four times undersampled), its reference and the method."""
    _, truth = tunemri.sample()
    x = pad(truth, size)
    scan, target = tunemri.simulate(x, mask=tunemri.make_mask("poisson", size, 4), coils=1, noise=0.01)
    return replace(scan, csm=prepare(scan).csm), target.abs(), Marked(tunemri.load(name)).eval()


def ours(port: int, name: str) -> None:
    from tunemri.evaluation import Contestant
    from tunemri.viewer import Session, listen, serve

    scan, target, model = scene(name)
    session = Session(scan, [Contestant(name=name, model=model)], reference=target)
    serve(session, listen(port), lambda link: print(link, flush=True))


def panel(port: int, name: str) -> None:
    import panel as pn
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

    scan, target, model = scene(name)
    dial, about = next(iter(model.dials.items()))
    top = float(target.max())

    def image(value: float) -> list:
        return [tunemri.reconstruct(scan, model, **{dial: value}).magnitude[0].flipud().numpy()]

    def page() -> pn.Row:
        source = ColumnDataSource({"image": image(float(about.default))})
        plot = figure(width=400, height=400, toolbar_location=None, output_backend="canvas")
        from bokeh.models import LinearColorMapper

        grey = LinearColorMapper(palette="Greys256", low=top, high=0)
        plot.image("image", x=0, y=0, dw=1, dh=1, source=source, color_mapper=grey)
        slider = pn.widgets.FloatSlider(name=dial, start=about.lo, end=about.hi, step=0.01, value=float(about.default))
        slider.param.watch(lambda event: source.data.update(image=image(event.new)), "value")
        return pn.Row(slider, plot)

    print(f"http://127.0.0.1:{port}/", flush=True)
    pn.serve(page, port=port, address="127.0.0.1", show=False, websocket_origin=[f"127.0.0.1:{port}"])


def gradio(port: int, name: str) -> None:
    import gradio as gr

    scan, target, model = scene(name)
    dial, about = next(iter(model.dials.items()))
    top = float(target.max())

    def image(value: float):
        grey = tunemri.reconstruct(scan, model, **{dial: value}).magnitude[0] / top
        return grey.clamp(0, 1).mul(255).byte().numpy()

    with gr.Blocks(analytics_enabled=False) as page:
        slider = gr.Slider(about.lo, about.hi, value=about.default, step=0.01, label=dial)
        shown = gr.Image(image(float(about.default)), format="png", height=400)
        slider.input(image, slider, shown, show_progress="hidden", trigger_mode="always_last")
    print(f"http://127.0.0.1:{port}/", flush=True)
    page.launch(server_name="127.0.0.1", server_port=port, quiet=True, inbrowser=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"tunemri": ours, "panel": panel, "gradio": gradio}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])

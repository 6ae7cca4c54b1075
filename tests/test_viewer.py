"""The viewer without a browser: what it answers, who may ask, what it never does."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

import tunemri
from laws import scan
from test_reconstructors import build
from tunemri import errors, formats
from tunemri.evaluation import Contestant
from tunemri.fourier import fft2
from tunemri.methods import METHODS, Dial, Reconstructor, prepare, reconstruct
from tunemri.methods.hyperrecon import HyperRecon
from tunemri.scan import Geometry, Reconstruction, select
from tunemri.simulate import phantom
from tunemri.tuning import choose
from tunemri.viewer import Session, Source, server, widget
from tunemri.viewer import session as engine
from tunemri.viewer.offline import page
from tunemri.viewer.session import Answer, Desk, letters, pack

pytest.importorskip("uvicorn", reason='the extra "viewer" is not installed')
connect = pytest.importorskip("websockets.sync.client", reason='the extra "viewer" is not installed').connect
QUIET = pytest.mark.filterwarnings("ignore:the image misses the measured data")  # untrained weights do


class Slow(Reconstructor):
    """An image after many small steps, as of a method that iterates; `shade` is what it shows."""

    def __init__(self, steps: int = 400) -> None:
        super().__init__()
        self.steps = steps

    def forward(
        self, y, A, *, shade: Annotated[float, Dial(sentence="brightness", default=0.5, low="dark", high="light")] = 0.5
    ):
        x = A.H(y)
        for _ in range(self.steps):
            time.sleep(0.005)
            x = x + 0
        return Reconstruction(image=x * shade, dials={"shade": shade})


class Posterior(Reconstructor):
    """A mean with a variance where asked for, and a record of how it went."""

    def forward(
        self, y, A, *, lam: Annotated[float, Dial(sentence="weight", default=1.0, lo=0.1, hi=10, scale="log")] = 1.0,
        estimate: Annotated[str, Dial(sentence="which", default="map", choices=("map", "mmse"))] = "map",
    ):  # fmt: skip
        x = A.H(y) / (1 + lam)
        sd = x.abs() / 2
        certificate = {"psi": [3.0, 2.0, 1.5], "branch": ["proposed", "gradient"], "descent": True, "gradient": 0.01}
        return Reconstruction(
            image=x, dials={"lam": lam, "estimate": estimate}, variance=sd**2 if estimate == "mmse" else None,
            samples=torch.stack((x + sd, x - sd), 1) if estimate == "mmse" else None,
            stats={
                "r_hat": [1.02], "odd": float("nan"), "certificate": [certificate],
                "long": "x" * 10**6,
            },
        )  # fmt: skip


def session(*names: str, shape=(24, 20), slices=1, coils=2, reference=False) -> Session:
    s = scan(shape, coils=coils, slices=slices, noise=0.02)
    truth = torch.stack([phantom(shape, seed=b) for b in range(slices)]) if reference else None
    contestants = [Contestant(name=n, model=build(n)) for n in names or ("tv",)]
    return Session(s, contestants, reference=truth, title="a <b>test</b>")


def ask(s: Session, slot: str = "a", number: int = 1, **more) -> Answer:
    return s.answer(s.read({"slot": slot, "number": number, **more}))


def complex_image(answer: Answer) -> np.ndarray:
    return answer.arrays["image"].view(np.complex64)[..., 0]


# ---------------------------------------------------------------- answers


@QUIET
@pytest.mark.parametrize("name", METHODS)
def test_an_answer_is_the_reconstruction(name):
    """Whatever the method: its image bit for bit, with dials, residual and seconds, at its default and at another setting."""
    s = session(name, slices=2)
    dials = s.contestants[0].model.dials
    moved = {n: d.choices[-1] if d.choices else d.at(0.7) for n, d in dials.items()}
    for setting in ({}, moved):
        for index in range(2):
            got = ask(s, slice=index, dials=setting)
            torch.manual_seed(0)
            expected = reconstruct(select(s.scan, slice(index, index + 1)), build(name), **got.head["dials"])
            assert np.array_equal(complex_image(got), expected.image[0].numpy())
            assert got.head["residual"] == pytest.approx(float(expected.residual[0]))
            assert set(got.head["dials"]) == set(dials)
            json.dumps(got.head, allow_nan=False)


@QUIET
@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself(name):
    about = session(name, reference=True).about().head
    json.dumps(about, allow_nan=False)
    model = about["models"][0]
    assert set(model["dials"]) == set(build(name).dials)
    for dial in model["dials"].values():
        assert dial["start"] == dial["default"]
        assert dial.get("choices") or dial["lo"] <= dial["start"] <= dial["hi"]


@pytest.mark.parametrize(
    "change",
    [
        {"slot": "../../etc/passwd"}, {"slot": None}, {"number": -1}, {"number": 1.5}, {"number": True}, {"model": 1},
        {"model": "0"}, {"slice": -1}, {"slice": 10**9}, {"slice": float("nan")}, {"slice": "0;rm"}, {"dials": []},
        {"dials": {"lam": float("nan")}}, {"dials": {"lam": float("inf")}}, {"dials": {"lam": 99}}, {"dials": {"lam": None}},
        {"dials": {"lam": [1]}}, {"dials": {"lam": "x"}}, {"dials": {"other": 1}}, {"path": "x"}, {"coil": 2}, {"coil": -1},
        {"coil": True}, {"coil": "0"}, {"by": "reference"}, {"by": "diverse"}, {"by": []}, {"by": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_a_request_is_refused(change):
    with pytest.raises(errors.BadOption):
        session().read({"slot": "a", "number": 1, **change})


@pytest.mark.parametrize("message", [None, [], "a", 3, {}, {"slot": "a"}])
def test_nor_is_anything_else_a_request(message):
    with pytest.raises(errors.BadOption):
        session().read(message)


def test_metrics_come_with_a_reference_only():
    assert ask(session()).head["metrics"] == {}
    s = session(reference=True)
    assert ask(s).head["metrics"]["psnr"] > 10
    truth = ask(s, "reference")
    assert np.allclose(np.abs(complex_image(truth)), s.reference[0].abs())
    with pytest.raises(errors.NoData):
        ask(session(), "reference")


def test_kspace_of_a_perfect_image_has_no_residual():
    s = session("zero-filled", coils=1)
    s.scan = scan((24, 20), every=1)  # everything sampled
    got = ask(s, "kspace")
    assert got.arrays["misfit"].max() < 1e-5 * got.arrays["image"].max()
    assert sum(got.head["rings"]["samples"]) == 24 * 20
    assert got.arrays["image"].argmax() == 12 * 20 + 10, "zero frequency lies in the centre"


def test_kspace_of_one_coil_is_a_part_of_all():
    s = session("sense", coils=3)
    out, one = s.image(s.read({"slot": "a", "number": 1}))[0], s.scan
    full = fft2(out.image[:, None] * one.csm)[0]
    parts = [ask(s, "kspace", coil=c) for c in range(3)]
    for c, part in enumerate(parts):
        assert part.head["coil"] == c
        assert np.allclose(part.arrays["image"], full[c].abs(), atol=1e-5)
        assert np.allclose(part.arrays["misfit"], ((full[c] - one.kspace[0, c]) * one.mask[0, 0]).abs(), atol=1e-5)
    for name in ("image", "misfit"):
        total = np.sqrt(sum(part.arrays[name] ** 2 for part in parts))
        assert np.allclose(ask(s, "kspace").arrays[name], total, atol=1e-5)


def test_variance_and_what_a_method_counted_reach_the_page():
    s = Session(scan((24, 20)), [Contestant(name="posterior", model=Posterior())])
    assert set(ask(s).arrays) == {"image"}
    got = ask(s, dials={"estimate": "mmse"})
    assert np.allclose(got.arrays["std"], np.abs(complex_image(got)) / 2, rtol=1e-3)
    x = torch.from_numpy(complex_image(got))
    assert np.allclose(got.arrays["samples"], torch.stack((x + x.abs() / 2, x - x.abs() / 2)).abs(), rtol=1e-3)
    stats = json.loads(json.dumps(got.head["stats"], allow_nan=False))
    assert stats["r_hat"] == 1.02, "of one slice, not a list"
    assert stats["odd"] is None
    assert stats["certificate"]["psi"] == [3.0, 2.0, 1.5]
    assert "long" not in stats


def test_a_range_of_many_dials_is_made_once():
    torch.manual_seed(0)
    terms = ("mae", "ssim", "mse", "dc", "tv")
    model = HyperRecon(main={"name": "unrolled", "stages": 1, "width": 2}, widths=[2, 2], terms=terms)
    s = Session(scan((12, 10)), [Contestant(name="five", model=model)])
    request = s.read({"slot": "range", "number": 1})
    coarse = s.basis(request, fine=False)
    assert len(coarse.settings) == 3**4
    assert s.basis(request) is coarse
    assert s.about().head["models"][0]["terms"] == list(terms)


def test_letters_only_where_a_header_says_so():
    s = session().scan
    assert letters(s) is None
    # Rows run from anterior to posterior, columns from right to left of the patient: radiological, as acquired.
    affine = ((0.0, -1.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    import dataclasses

    assert letters(dataclasses.replace(s, geometry=Geometry(affine=affine))) == ["R", "L", "A", "P"]


def test_packed_answers_are_aligned_and_come_apart_again():
    arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.arange(4, dtype=np.float32), "c": np.ones((2, 3), np.int16)}
    data = pack(Answer(head={"type": "x", "word": "ü"}, arrays=arrays))
    length = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + length])
    assert head["word"] == "ü"
    for entry in head["arrays"]:
        at = 4 + length + entry["at"]
        assert at % 8 == 0
        value = arrays[entry["name"]]
        assert np.array_equal(np.frombuffer(data, value.dtype, value.size, at).reshape(entry["shape"]), value)


def test_a_state_is_checked_like_a_request_and_becomes_commands():
    s = session("tv", "zero-filled")
    s.note(
        {"model": 0, "slice": 0, "dials": {"lam": 0.01}, "kept": [{"model": 1, "slice": 0, "dials": {}, "note": "x"}]}
    )
    assert s.state["dials"] == {"lam": 0.01}
    assert s.command(s.state["kept"][0]).startswith("tunemri.reconstruct(")
    for bad in ({"model": 7}, {"dials": {"lam": -1}}, {"kept": [3]}, {"kept": [{"note": 4}]}, []):
        with pytest.raises(errors.BadOption):
            s.note(bad)
    assert s.state["dials"] == {"lam": 0.01}


# ---------------------------------------------------------------- who works when


class Inbox:
    """Answers as they come, from whichever thread."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.changed = threading.Condition()

    def __call__(self, answer: Answer) -> None:
        with self.changed:
            self.answers.append(answer)
            self.changed.notify_all()

    def until(self, found, seconds: float = 20) -> Answer:
        with self.changed:
            assert self.changed.wait_for(lambda: any(map(found, self.answers)), seconds), [a.head for a in self.answers]
            return next(a for a in self.answers if found(a))


@pytest.fixture
def desk():
    opened = []

    def make(s: Session) -> Desk:
        opened.append(Desk(s))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def slow_session(steps: int) -> Session:
    return Session(scan((16, 16)), [Contestant(name="slow", model=Slow(steps))])


def test_the_latest_move_wins_and_a_long_job_is_stopped(desk):
    s, inbox, owner = slow_session(4000), Inbox(), object()
    d = desk(s)

    def move(number: int, shade: float) -> None:
        d.ask(owner, s.read({"slot": "a", "number": number, "dials": {"shade": shade}}), inbox)

    move(1, 0.1)
    time.sleep(0.7)  # twenty seconds of work, found to be long
    for number, shade in enumerate((0.2, 0.3, 0.4), 2):
        move(number, shade)
    s.contestants[0].model.steps = 1
    last = inbox.until(lambda a: a.head["type"] == "image")
    assert last.head["number"] == 4
    assert last.head["dials"] == {"shade": 0.4}
    assert [a.head["type"] for a in inbox.answers] == ["stopped", "image"]


def test_the_back_gives_way_to_the_front(desk):
    """While an image is being made for somebody, the range stands still."""
    s, inbox, owner = slow_session(20), Inbox(), object()
    d = desk(s)
    d.ask(owner, s.read({"slot": "range", "number": 1}), inbox)
    inbox.until(lambda a: a.head["type"] == "progress")
    s.contestants[0].model.steps = 200  # a second in front; the back has a copy of its own, a tenth of a second each
    before = len(inbox.answers)
    d.ask(owner, s.read({"slot": "a", "number": 2}), inbox)
    inbox.until(lambda a: a.head["type"] == "image")
    kinds = [a.head["type"] for a in inbox.answers[before:]]
    assert kinds.index("image") <= 2, "one that was just done, and what it completed"
    inbox.until(lambda a: a.head["type"] == "range" and not a.head["final"])
    d.stop(owner, "range")
    inbox.until(lambda a: a.head["type"] == "stopped")


def test_the_front_never_waits_for_a_back_that_waits_for_it(desk, monkeypatch):
    """Either thread may estimate the maps of a slice, and the back one stands still while the front one works."""
    bare, began = dataclasses.replace(scan((24, 24), coils=2), csm=None), threading.Event()
    s = Session(bare, [Contestant(name="slow", model=Slow(2))], csm="low-resolution")
    d, inbox, owner = desk(s), Inbox(), object()

    def slowly(one, **options):
        began.set()
        for _ in range(30):
            torch.ones(1).add(1)
            time.sleep(0.01)
        return prepare(one, **options)

    monkeypatch.setattr(engine, "prepare", slowly)
    d.ask(owner, s.read({"slot": "range", "number": 1}), inbox)
    assert began.wait(5)
    d.ask(owner, s.read({"slot": "a", "number": 2}), inbox)
    inbox.until(lambda a: a.head["type"] == "image", 10)


def test_stop_keeps_the_coarse_range(desk):
    s, inbox, owner = slow_session(20), Inbox(), object()
    d = desk(s)
    d.ask(owner, s.read({"slot": "range", "number": 1}), inbox)
    coarse = inbox.until(lambda a: a.head["type"] == "range")
    assert not coarse.head["final"]
    d.stop(owner)
    inbox.until(lambda a: a.head["type"] == "stopped")
    assert not any(a.head.get("final") and a.head["type"] == "range" for a in inbox.answers)


def test_a_choice_is_the_one_of_the_library_with_its_reason(desk):
    """By every criterion that the page offers; words are not chosen but kept."""
    s = session("sense", slices=2)
    s.scan = dataclasses.replace(s.scan, noise_std=0.02)
    offered = s.about().head["criteria"]
    assert offered == ["heldout-kspace", "discrepancy", "sure"]
    d, inbox, owner = desk(s), Inbox(), object()
    for number, by in enumerate(offered, 1):
        d.ask(owner, s.read({"slot": "choose", "number": number, "slice": 1, "by": by}), inbox)
        got = inbox.until(lambda a, n=number: a.head["type"] in ("choice", "error") and a.head["number"] == n).head
        expected = choose(select(s.scan, slice(1, 2)), build("sense"), by=by)
        assert (got["dials"], got["reason"]) == (expected.dials, expected.reason)
    s.contestants[0] = Contestant(name="posterior", model=Posterior())
    d.ask(owner, s.read({"slot": "choose", "number": 9, "dials": {"estimate": "mmse"}}), inbox)
    found = inbox.until(lambda a: a.head["number"] == 9 and a.head["type"] in ("choice", "error")).head
    assert found["dials"]["estimate"] == "mmse"
    s.scan = dataclasses.replace(s.scan, noise_std=None)
    assert s.about().head["criteria"] == ["heldout-kspace", "discrepancy"], "SURE needs a known noise"


def ours() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in ("tunemri-front", "tunemri-back")]


def test_threads_end_when_there_is_nothing_to_do_and_come_back(desk, monkeypatch):
    monkeypatch.setattr(engine, "_IDLE", 0.2)
    before, s, inbox = len(ours()), session("sense"), Inbox()
    d = desk(s)
    assert len(ours()) == before, "none before the first request"
    for number in (1, 2):
        d.ask(object(), s.read({"slot": "a", "number": number}), inbox)
        inbox.until(lambda a, n=number: a.head["number"] == n)
        end = time.monotonic() + 10
        while len(ours()) > before:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_an_error_is_an_answer_and_work_goes_on(desk):
    s, inbox, owner = session("tv"), Inbox(), object()
    d = desk(s)
    bad = s.read({"slot": "a", "number": 1})
    good, s.scan = s.scan, None  # a bug of ours
    s._slices.clear()
    d.ask(owner, bad, inbox)
    assert inbox.until(lambda a: a.head["type"] == "error").head["word"] == "internal"
    s.scan = good
    d.ask(owner, s.read({"slot": "a", "number": 2}), inbox)
    inbox.until(lambda a: a.head["type"] == "image")


@QUIET
@pytest.mark.parametrize("name", METHODS)
def test_the_range_of_every_method_comes_with_its_landscape(name, desk):
    s, inbox = session(name, coils=1, reference=True), Inbox()
    if not any(not d.choices for d in s.contestants[0].model.dials.values()):
        return
    desk(s).ask(object(), s.read({"slot": "range", "number": 1}), inbox)
    found = inbox.until(lambda a: a.head["type"] == "range", 60)
    scores = inbox.until(lambda a: a.head["type"] == "scores", 60)
    pictures, steps = found.arrays["pictures"], found.head["steps"]
    assert len(pictures) == len(steps) == found.arrays["coefficients"].shape[1] + 1
    assert pictures.shape[1:] == (24, 20, 2)
    assert len(scores.head["values"]["psnr"]) == len(found.arrays["coefficients"])


# ---------------------------------------------------------------- one file


def test_the_file_says_how_exact_it_is_and_needs_nothing_from_outside():
    s = session("sense", reference=True)
    text, facts = page(s)
    assert facts["checked_db"] > 35
    assert facts["bytes"] == len(text.encode()) < 400_000
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:|//)""", text)
    assert "&lt;b&gt;test" in text
    assert "<b>test" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


def test_the_file_starts_where_the_dials_were_and_does_not_say_where_the_scan_lay():
    s = session("sense", slices=3)
    s.source = Source(path="/home/somebody/private/a scan.h5", sha256="0" * 64)
    s.contestants = [dataclasses.replace(s.contestants[0], name="/home/somebody/model.safetensors")]
    text, _ = page(s, 0, 2, {"lam": 0.125})
    assert "somebody" not in text
    packed = re.findall(r"data-answer>([^<]+)<", text)
    answers = [zlib.decompress(base64.b64decode(p)) for p in packed]
    assert not any(b"somebody" in a for a in answers)
    about = head(answers[0])
    assert about["models"][0]["dials"]["lam"]["start"] == 0.125
    assert about["cut"] == 2, "what a pick kept in the file must name"
    assert (about["source"]["word"], about["source"]["options"]) == ("'a scan.h5'", " --slice 2")


def test_the_command_writes_the_file_and_its_sidecar(tmp_path):
    shape, out = (24, 20), tmp_path / "range.html"
    formats.write(tmp_path / "s.h5", scan(shape, coils=2, slices=2, noise=0.02))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "tunemri", "export", str(tmp_path / "s.h5"), "-m", "sense", *map(str, words)]
        return subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)

    done = run("-o", out, "--slice", 1, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["slice"] == 1
    assert facts["checked_db"] > 35
    assert json.loads((tmp_path / "range.html.json").read_text())["out_sha256"] == facts["out_sha256"]
    before = out.read_bytes()
    for words in (["-o", out], ["-o", out, "--overwrite", "--slice", 2], ["-o", tmp_path / "range.txt"]):
        refused = run(*words)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error[bad_option]")
    assert out.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_method_without_dials_makes_no_file():
    with pytest.raises(errors.BadOption):
        page(session("zero-filled"))


# ---------------------------------------------------------------- who may ask


@contextlib.contextmanager
def served(s: Session):
    """A running server: its link."""
    sock = server.listen(0)
    running, link = server.prepare(s, sock)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield link
    finally:
        running.should_exit = True
        thread.join(10)
        sock.close()


def get(link: str, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    parts = urlsplit(link)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", headers.pop("Host", parts.netloc))
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.body = answer.read()
    connection.close()
    return answer


def enter(link: str) -> str:
    """Spend the token; the cookie that it buys."""
    parts = urlsplit(link)
    answer = get(link, f"/?{parts.query}")
    assert answer.status == 303
    assert answer.headers["Location"] == "/"
    said = answer.headers["Set-Cookie"]
    assert "HttpOnly" in said
    assert "samesite=strict" in said.lower()
    return said.split(";")[0]


def socket_of(link: str, cookie: str | None, origin: str | None = None, host: str | None = None):
    parts = urlsplit(link)
    return connect(
        f"ws://{host or parts.netloc}/link", sock=socket.create_connection((parts.hostname, parts.port), timeout=10),
        origin=origin or f"http://{parts.netloc}", additional_headers={"Cookie": cookie} if cookie else {}, compression=None,
        max_size=None,
    )  # fmt: skip


def head(data: bytes) -> dict:
    return json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])


@pytest.fixture(scope="module")
def live():
    with served(session("tv", "zero-filled", reference=True)) as link:
        yield link, enter(link)


def test_the_token_works_once_and_the_cookie_from_then_on(live):
    link, cookie = live
    assert get(link, f"/?{urlsplit(link).query}").status == 401
    assert get(link).status == 401
    assert get(link, Cookie="tunemri-1=x").status == 401
    assert get(link, Cookie=cookie + "x").status == 401
    answer = get(link, Cookie=f"other=1; {cookie}")
    assert answer.status == 200
    assert b"viewer.js" in answer.body


def test_looking_at_the_headers_of_the_link_does_not_spend_it():
    with served(session("zero-filled")) as link:
        assert get(link, f"/?{urlsplit(link).query}", method="HEAD").status == 401
        enter(link)


def test_slow_clients_keep_nobody_out_and_are_shown_the_door(monkeypatch):
    monkeypatch.setattr(server, "_PATIENCE", 0.5)
    with served(session("zero-filled")) as link, contextlib.ExitStack() as stack:
        parts, cookie = urlsplit(link), enter(link)
        ws = stack.enter_context(socket_of(link, cookie))
        idle = [
            stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=5)) for _ in range(50)
        ]
        for one in idle:
            one.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert get(link, Cookie=cookie).status == 200
        assert {one.recv(100) for one in idle} == {b""}, "each is closed"
        ws.recv(timeout=5)
        ws.send(json.dumps({"slot": "a", "number": 5}))
        assert head(ws.recv(timeout=10))["number"] == 5, "a websocket stays"


def test_headers_are_safe_on_every_answer(live):
    link, cookie = live
    for answer in (
        get(link, Cookie=cookie),
        get(link, "/viewer.js", Cookie=cookie),
        get(link),
        get(link, Host="evil.example"),
    ):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


FOREIGN = [
    "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1", "a@127.0.0.1",
    "[::2]", "[",
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_host_is_refused(live, host):
    link, cookie = live
    for path in ("/", "/viewer.js"):
        answer = get(link, path, Host=host, Cookie=cookie)
        assert answer.status in (400, 403)
        assert b"viewer" not in answer.body


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:9000", "[::1]:9000"])
def test_an_ssh_tunnel_from_another_port_is_not(live, host):
    link, cookie = live
    assert get(link, Host=host, Cookie=cookie).status == 200
    with socket_of(link, cookie, origin=f"http://{host}", host=host) as ws:
        assert head(ws.recv(timeout=10))["type"] == "about"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1", "file://"]
)
def test_a_foreign_origin_is_refused(live, origin):
    link, cookie = live
    assert get(link, Origin=origin, Cookie=cookie).status == 403
    with pytest.raises(Exception, match="403"):
        socket_of(link, cookie, origin=origin)


def test_a_socket_without_cookie_is_refused(live):
    with pytest.raises(Exception, match="403"):
        socket_of(live[0], None)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent_to_the_pages(live, method):
    assert get(live[0], "/", method, Cookie=live[1]).status == 405


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/../session.py", "/..%2fsession.py", "/%2e%2e/session.py", "/static/viewer.js", "/viewer.js%00", "//etc/passwd",
     "/session.py", "/..\\session.py", "/viewer.js/", "/.viewer.js", "/%252e%252e%252fsession.py"],
)  # fmt: skip
def test_no_path_leads_anywhere(live, path):
    answer = get(live[0], path, Cookie=live[1])
    assert answer.status in (404, 307)
    assert b"import" not in answer.body
    assert answer.body in (b"", b"no such page\n", b"Not Found")


def test_the_socket_answers_and_survives_nonsense(live):
    with socket_of(*live) as ws:
        assert head(ws.recv(timeout=10))["type"] == "about"
        for bad in (
            "",
            "{",
            "[" * 5000,
            "[]",
            '{"slot":"x","number":1}',
            '{"slot":"a","number":1,"dials":{"lam":1e999}}',
            '{"slot":"a","number":1,"dials":{"lam":1' + "0" * 400 + "}}",
            '{"state":3}',
        ):
            ws.send(bad)
            assert head(ws.recv(timeout=10))["type"] == "refused"
        ws.send(json.dumps({"slot": "a", "number": 5}))
        assert head(ws.recv(timeout=10))["number"] == 5
    with socket_of(*live) as ws:
        ws.recv(timeout=10)
        ws.send("x" * 70_000)
        with pytest.raises(Exception, match="1009|too big"):
            ws.recv(timeout=10)
    with socket_of(*live) as ws:
        ws.recv(timeout=10)
        ws.send(b"binary")
    assert get(live[0], Cookie=live[1]).status == 200


def test_there_is_room_for_four_windows(live):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            assert head(stack.enter_context(socket_of(*live)).recv(timeout=10))["type"] == "about"
        fifth = stack.enter_context(socket_of(*live))
        with pytest.raises(Exception, match="1013"):
            fifth.recv(timeout=10)
    time.sleep(0.3)
    with socket_of(*live) as ws:
        assert head(ws.recv(timeout=10))["type"] == "about"


def test_a_closed_window_ends_its_work():
    s = slow_session(4000)
    with served(s) as link:
        cookie = enter(link)
        with socket_of(link, cookie) as ws:
            ws.recv(timeout=10)
            ws.send(json.dumps({"slot": "a", "number": 1}))
            time.sleep(0.3)
        s.contestants[0].model.steps = 1
        start = time.monotonic()
        with socket_of(link, cookie) as ws:
            ws.recv(timeout=10)
            ws.send(json.dumps({"slot": "a", "number": 1, "dials": {"shade": 0.2}}))
            assert head(ws.recv(timeout=10))["type"] == "image"
        assert time.monotonic() - start < 5


def test_only_loopback_is_bound_and_a_taken_port_is_said():
    sock = server.listen(0)
    try:
        address, port = sock.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(errors.Busy) as refused:
            server.listen(port)
        assert refused.value.exit_code == 3
        assert str(port + 1) in str(refused.value)
    finally:
        sock.close()


def test_the_page_is_made_of_text_never_of_markup():
    script = server.static("viewer.js")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "localStorage",
        "http://",
        "https://",
    ):
        assert word not in script.replace("http://www.w3.org", ""), word


def test_the_command_serves_says_so_and_ends(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tunemri", "view", "--no-open", "-m", "zero-filled"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
    ) as process:  # fmt: skip
        link = process.stdout.readline().strip()
        try:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{20,}", link)
            cookie = enter(link)
            with socket_of(link, cookie) as ws:
                assert head(ws.recv(timeout=20))["title"] == "the embedded sample"
                ws.send(
                    json.dumps(
                        {
                            "state": {
                                "model": 0,
                                "slice": 0,
                                "dials": {},
                                "kept": [{"model": 0, "slice": 0, "dials": {}, "note": "good"}],
                            }
                        }
                    )
                )
                ws.send(json.dumps({"slot": "a", "number": 1}))
                assert head(ws.recv(timeout=20))["type"] == "image"
        finally:
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "kept: tunemri recon " in said
    assert "# good" in said
    assert list(tmp_path.iterdir()) == [], "something was left on the disk"


# ---------------------------------------------------------------- notebook


def test_a_view_has_a_still_picture_and_a_widget():
    s = scan((32, 28), coils=2)
    shown = tunemri.view(s, ["tv", "zero-filled", tunemri.load("tv")])
    assert [c.name for c in shown.session.contestants] == ["tv", "zero-filled", "tv #2"]
    bundle = shown._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")
    if "application/vnd.jupyter.widget-view+json" in bundle:
        inside = shown.widget()
        assert "export default" in inside._esm
        inside._handle_custom_msg({"state": {"model": 0, "slice": 0, "dials": {"lam": 0.02}, "kept": []}}, [])
        assert shown.settings == {"lam": 0.02}
    assert tunemri.load("tv").view(s).session.contestants[0].name == "tv"


def test_a_closed_view_leaves_no_thread_and_a_closed_cell_no_work():
    pytest.importorskip("anywidget", reason='the extra "viewer" is not installed')
    before, view = len(ours()), widget.view(scan((16, 16)), Slow(2000))
    inside = view.widget()
    inside._handle_custom_msg({"slot": "a", "number": 1}, [])
    assert len(ours()) == before + 1
    start = time.monotonic()
    inside._handle_custom_msg({"bye": True}, [])
    view.close()
    assert len(ours()) == before
    assert time.monotonic() - start < 5
    assert view.widget() is not inside
    view.close()


def test_without_anywidget_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    bundle = widget.view(scan((32, 28)), "tv")._repr_mimebundle_()
    assert 'pip install ".[viewer]"' in bundle["text/plain"]
    assert "image/png" in bundle


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    sock = server.listen(0)
    with pytest.raises(errors.BadOption, match="clone of tunemri: .*viewer"), contextlib.closing(sock):
        server.prepare(session(), sock)


def test_static_files_are_in_the_package():
    folder = Path(server.__file__).parent / "static"
    assert {p.name for p in folder.iterdir()} == {"viewer.html", "viewer.js", "viewer.css"}

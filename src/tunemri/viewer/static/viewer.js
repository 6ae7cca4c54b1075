// The tunemri viewer: one canvas module, no dependency, no build step, the same in three hosts.
//
//   server     a websocket on this machine          (webSocket)
//   notebook   anywidget calls `render`             (notebook)
//   one file   answers lie in the page itself       (embedded)
//
// A host is a `link`: send(message), and it calls link.answer(answer) and link.state(open, why). An answer is one binary
// block, `unpack`ed; what can be asked is in session.py. Everything from outside becomes text, never markup.

// ---------------------------------------------------------------- numbers

const KINDS = {float32: Float32Array, int16: Int16Array, uint8: Uint8Array};

export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const {name, dtype, shape, at} of head.arrays) {
    arrays[name] = new KINDS[dtype](buffer, 4 + length + at, shape.reduce((a, b) => a * b, 1));
    arrays[name].shape = shape;
  }
  return {...head, arrays};
}

const clamp = (x, lo = 0, hi = 1) => Math.min(hi, Math.max(lo, x));
const numeric = dials => Object.keys(dials).filter(n => !dials[n].choices);

// Values at even steps of a slider: its ends, or a measured curve.
const knots = dial => dial.curve || [dial.lo, dial.hi];

export function position(dial, value) {
  const k = knots(dial), steps = k.length - 1;
  let i = 0;
  while (i < steps - 1 && k[i + 1] <= value) i++;
  const part = dial.scale === "log" ? Math.log(value / k[i]) / (Math.log(k[i + 1] / k[i]) || 1) : (value - k[i]) / (k[i + 1] - k[i] || 1);
  return clamp((i + part) / steps);
}

export function valueAt(dial, p) {
  const k = knots(dial), along = clamp(p) * (k.length - 1), i = Math.min(Math.floor(along), k.length - 2), part = along - i;
  const v = dial.scale === "log" ? Math.exp(Math.log(k[i]) + part * Math.log(k[i + 1] / k[i])) : k[i] + part * (k[i + 1] - k[i]);
  return clamp(Number(v.toPrecision(4)), dial.lo, dial.hi);  // four digits: a setting that a person can repeat
}

// The weights of loss terms, on the simplex, from the dials of a hypernetwork, and back: stick breaking from the last term.
export const weightsOf = lambdas => lambdas.reduceRight(([left, ...w], l) => [left * (1 - l), left * l, ...w], [1]);
export function lambdasOf(weights) {
  let head = weights[0];
  return weights.slice(1).map(w => (head += w) > 0 ? w / head : 0);
}

// One weight moved to v; the others share what is left as they did, or evenly where they had nothing.
export function moved(weights, k, v) {
  const rest = 1 - weights[k];
  return weights.map((w, i) => i === k ? v : (1 - v) * (rest > 0 ? w / rest : 1 / (weights.length - 1)));
}

const shown = v => typeof v === "string" ? v : v === 0 ? "0" : Number(v.toPrecision(3)).toString();
const words = dials => Object.entries(dials).map(([n, v]) => `${n} ${shown(v)}`).join(", ");
const keyOf = w => JSON.stringify([w.model, w.slice, Object.entries(w.dials).sort()]);

function quantile(plane, q) {
  const step = Math.max(1, Math.floor(plane.length / 20000));
  const some = Float32Array.from({length: Math.ceil(plane.length / step)}, (_, i) => plane[i * step]).sort();
  return some[Math.round(q * (some.length - 1))];
}

function moments(values) {
  let sum = 0, square = 0;
  for (const v of values) sum += v;
  const mean = sum / values.length;
  for (const v of values) square += (v - mean) ** 2;
  return {mean, sd: Math.sqrt(square / Math.max(1, values.length - 1)), count: values.length};
}

// The range of a method: any setting rebuilt from a mean and a few components, without a network or a model.
export class Range {
  constructor({names, axes, steps, arrays, ...facts}, dials) {
    Object.assign(this, {names, axes, steps, dials, facts, scores: null});
    const [count, height, width] = arrays.pictures.shape, size = height * width * 2;
    this.pictures = Array.from({length: count}, (_, r) => arrays.pictures.subarray(r * size, (r + 1) * size));
    this.mean = Float32Array.from(this.pictures[0], v => v * steps[0]);
    this.coefficients = arrays.coefficients;
    this.rank = count - 1;
  }

  at(settings) { return this.names.map(n => position(this.dials[n], settings[n])); }

  // Linear between the points of a grid; `stride` numbers at each point, the last axis fastest.
  static between(values, axes, stride, where) {
    const out = new Float32Array(stride), corners = 2 ** where.length;
    const low = where.map((p, d) => { let i = 0; while (i < axes[d].length - 2 && axes[d][i + 1] <= p) i++; return i; });
    const part = where.map((p, d) => clamp((p - axes[d][low[d]]) / (axes[d][low[d] + 1] - axes[d][low[d]])));
    for (let k = 0; k < corners; k++) {
      let weight = 1, index = 0;
      where.forEach((_, d) => {
        const up = (k >> d) & 1;
        weight *= up ? part[d] : 1 - part[d];
        index = index * axes[d].length + low[d] + up;
      });
      if (weight) for (let r = 0; r < stride; r++) out[r] += weight * values[index * stride + r];
    }
    return out;
  }

  weights(where) { return Range.between(this.coefficients, this.axes, this.rank, where); }

  rebuild(where) {
    const c = this.weights(where), out = Float32Array.from(this.mean);
    for (let r = 0; r < this.rank; r++) {
      const a = c[r] * this.steps[r + 1], part = this.pictures[r + 1];
      if (a) for (let i = 0; i < out.length; i++) out[i] += a * part[i];
    }
    return out;
  }

  // Mean and standard deviation of the magnitude over some pixels.
  probe(where, pixels) {
    const c = this.weights(where), m = new Float32Array(pixels.length);
    pixels.forEach((i, k) => {
      let re = this.mean[2 * i], im = this.mean[2 * i + 1];
      for (let r = 0; r < this.rank; r++) {
        const a = c[r] * this.steps[r + 1];
        re += a * this.pictures[r + 1][2 * i];
        im += a * this.pictures[r + 1][2 * i + 1];
      }
      m[k] = Math.sqrt(re * re + im * im);
    });
    return moments(m);
  }

  // Root mean square difference of two settings, from coefficients alone: the components are orthonormal.
  distance(a, b) {
    let sum = 0;
    for (let r = 0; r < a.length; r++) sum += (a[r] - b[r]) ** 2;
    return Math.sqrt(2 * sum / this.mean.length);
  }

  // All places of a grid, the last axis fastest.
  static places(axes) { return axes.reduce((all, axis) => all.flatMap(p => axis.map(v => [...p, v])), [[]]); }

  score(name, where) {
    const s = this.scores, values = s && s.values[name];
    return values ? Range.between(values, s.axes, 1, where)[0] : NaN;
  }

  best(name, higher) {
    const s = this.scores, values = s && s.values[name];
    if (!values) return null;
    let at = -1;
    values.forEach((v, i) => { if (Number.isFinite(v) && (at < 0 || (higher ? v > values[at] : v < values[at]))) at = i; });
    return at < 0 ? null : {where: Range.places(s.axes)[at], value: values[at]};
  }

  // Per-pixel standard deviation of the magnitude over the whole range: where in the anatomy the dials matter at all.
  map() {
    if (this._map) return this._map;
    const few = {1: 9, 2: 4}[this.names.length] || 3, even = Array.from({length: few}, (_, i) => i / (few - 1));
    const places = Range.places(this.names.map(() => even)), n = this.mean.length / 2;
    const sum = new Float64Array(n), square = new Float64Array(n);
    for (const p of places) {
      const x = this.rebuild(p);
      for (let i = 0; i < n; i++) { const m = Math.hypot(x[2 * i], x[2 * i + 1]); sum[i] += m; square[i] += m * m; }
    }
    return this._map = Float32Array.from(sum, (s, i) => Math.sqrt(Math.max(0, square[i] / places.length - (s / places.length) ** 2)));
  }

  // k accepted settings that differ most from each other: each next one is the farthest from all before.
  diverse(k, accept, first) {
    const places = Range.places(this.scores.axes).filter(accept);
    if (!places.length) return [];
    const all = places.map(p => this.weights(p)), start = this.weights(first);
    const near = all.map(w => this.distance(w, start));
    let next = near.indexOf(Math.min(...near));
    const taken = [];
    near.fill(Infinity);
    while (taken.length < Math.min(k, places.length)) {
      taken.push(next);
      all.forEach((w, i) => { near[i] = Math.min(near[i], this.distance(w, all[next])); });
      next = near.indexOf(Math.max(...near));
      if (near[next] === 0) break;
    }
    return taken.map(i => places[i]);
  }
}

// ---------------------------------------------------------------- colours

function ramp(...stops) {
  const lut = new Uint32Array(256), rgb = stops.map(s => [1, 3, 5].map(i => parseInt(s.slice(i, i + 2), 16)));
  for (let i = 0; i < 256; i++) {
    const x = i / 255 * (rgb.length - 1), k = Math.min(rgb.length - 2, Math.floor(x));
    const [r, g, b] = rgb[k].map((v, c) => Math.round(v + (x - k) * (rgb[k + 1][c] - v)));
    lut[i] = (255 << 24 | b << 16 | g << 8 | r) >>> 0;
  }
  return lut;
}

const GREY = ramp("#000000", "#ffffff"), INVERTED = ramp("#ffffff", "#000000");
const SIGNED = ramp("#9fd8ff", "#2f7fe0", "#123a73", "#000000", "#7a3a08", "#f0831e", "#ffd9a0");  // as plots.SIGNED
SIGNED.fill(0xff000000, 127, 129);  // equal is black, and nothing else
const CIVIDIS = ramp("#00204d", "#17366c", "#414d6b", "#666970", "#8b8779", "#b3a772", "#ddc95f", "#ffea46");
const BLACK_FIRST = CIVIDIS.slice();
BLACK_FIRST[0] = 0xff000000;
const CYCLIC = ramp("#e2d9e2", "#95b5c7", "#6276ba", "#5e3c9e", "#2f1436", "#7b2150", "#b0555a", "#cca389", "#e2d9e2");

const PARTS = {
  magnitude: (re, im) => Math.hypot(re, im),
  phase: (re, im) => Math.atan2(im, re),
  real: re => re,
  imaginary: (re, im) => im,
};

// The difference of two planes; that of two phases never exceeds half a turn.
function minus(x, y, part) {
  const d = new Float32Array(x.length), turn = 2 * Math.PI;
  for (let i = 0; i < d.length; i++) { d[i] = x[i] - y[i]; if (part === "phase") d[i] -= turn * Math.round(d[i] / turn); }
  return d;
}

function planeOf(data, part) {
  const out = new Float32Array(data.length / 2), f = PARTS[part];
  if (part === "magnitude") {
    for (let i = 0; i < out.length; i++) { const re = data[2 * i], im = data[2 * i + 1]; out[i] = Math.sqrt(re * re + im * im); }
  } else for (let i = 0; i < out.length; i++) out[i] = f(data[2 * i], data[2 * i + 1]);
  return out;
}

// A plane of numbers, painted through a window and a colour map into a canvas of its own size.
class Picture {
  constructor() { this.canvas = document.createElement("canvas"); this.stamp = ""; }

  paint(plane, width, height, lo, hi, lut, stamp) {
    if (stamp && stamp === this.stamp) return this.canvas;
    if (this.canvas.width !== width || this.canvas.height !== height || !this.pixels) {
      Object.assign(this.canvas, {width, height});
      this.context = this.canvas.getContext("2d");
      this.image = this.context.createImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const scale = 255.999 / ((hi - lo) || 1e-30), out = this.pixels;
    for (let i = 0; i < out.length; i++) {
      const v = (plane[i] - lo) * scale;
      out[i] = lut[v < 0 ? 0 : v > 255 ? 255 : v | 0];
    }
    this.context.putImageData(this.image, 0, 0);
    this.stamp = stamp;
    return this.canvas;
  }
}

// ---------------------------------------------------------------- small things

function h(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (k in e && k !== "list") e[k] = v;
    else e.setAttribute(k, v);
  }
  e.append(...children.flat().filter(c => c !== null && c !== undefined));
  return e;
}

function save(name, parts, type) {
  const url = URL.createObjectURL(new Blob(parts, {type}));
  h("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const CRC = Uint32Array.from({length: 256}, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ n >>> 1 : n >>> 1; return n; });

// A PNG that says in itself how it was made: a tEXt chunk before the end.
export function withText(png, keyword, text) {
  const body = new TextEncoder().encode(`tEXt${keyword}\0${text.replace(/[^\x20-\x7e]/g, "?")}`);
  let crc = ~0;
  for (const b of body) crc = CRC[(crc ^ b) & 255] ^ crc >>> 8;
  const chunk = new Uint8Array(body.length + 8), view = new DataView(chunk.buffer), end = png.length - 12;
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(body.length + 4, ~crc);
  return [png.slice(0, end), chunk, png.slice(end)];
}

export function npy(data, shape) {
  let head = `{'descr': '<c8', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  head = head.padEnd(Math.ceil((head.length + 11) / 64) * 64 - 11) + "\n";
  return [new Uint8Array([0x93, 78, 85, 77, 80, 89, 1, 0, head.length & 255, head.length >> 8]), head, data];
}

const HELP = [
  ["drag", "window (across) and level (up and down), all panes"], ["ctrl+drag", "of this pane alone"], ["double click", "automatic window"],
  ["alt+drag, o", "a circle: mean ± standard deviation in it; a click takes it away"],
  ["right drag, ctrl+wheel", "zoom"], ["middle drag, shift+drag", "move"], ["wheel", "slice, or zoom if there is one slice"],
  ["arrows", "turn the dials by 1 %; with shift by 10 %"], ["[ ] { }", "first and second dial"],
  ["space (hold)", "flicker: B in the place of A"], ["b", "blink by itself: 1, 2, 4 times a second, off"], ["w", "swipe A over B"],
  ["p", "pin A as B"], ["s", "swap A and B"], ["t", "reference as B"], ["u", "undo the dials"], ["k", "keep this setting"],
  ["1 … 6", "go to a picture of the gallery"], ["m g h j", "magnitude, phase, real, imaginary"], ["f", "k-space"],
  ["d", "third pane: difference, where the dials matter, profile, error"], ["i", "invert"], ["r", "reset the view"],
  ["n N", "next, previous slice"], ["?", "this list"],
];

// ---------------------------------------------------------------- the viewer

const TABS = ["tune", "landscape", "uncertainty", "methods", "k-space", "report"];
const THIRD = {difference: "A − B", matters: "where the dials matter", profile: "profile along a row", error: "A − reference"};
const CRITERIA = {"heldout-kspace": "held-out data", discrepancy: "residual = noise", sure: "SURE"};
const LONG = 10;  // seconds an image: a range is then made only if asked for
const REST = 90;  // ms without a move before the exact image is asked for, where a preview is there meanwhile

export class Viewer {
  constructor(root, link) {
    Object.assign(this, {root, link, tab: "tune", part: "magnitude", third: "difference", inverted: false, open: false});
    this.view = {zoom: 1, x: .5, y: .5};
    this.kview = {zoom: 1, x: .5, y: .5};
    this.window = null;  // shared by both panes
    this.own = {};  // a window of one pane alone
    this.gain = 1;
    this.roi = null;  // centre and radius in pixels
    this.ranges = new Map();
    this.exact = new Map();
    this.seconds = new Map();  // that an image takes, by method and choices
    this.kept = [];
    this.past = [];
    this.trail = [];
    this.number = 0;
    this.cursor = null;
    this.gallery = [];
    this.dirty = new Set();
    root.classList.add("tunemri");
    root.tabIndex = 0;
    link.answer = answer => this.receive(answer);
    link.state = (open, why) => this.connection(open, why);
  }

  // ---------------------------------------------------------- answers

  connection(open, why) {
    this.open = open;
    if (!this.about) {
      if (!open) this.root.replaceChildren(h("p", {className: "lost"}, why || "Connecting …"));
      return;
    }
    this.progressing = this.choosing = null;
    this.banner.hidden = open;
    this.banner.textContent = open ? "" : `${why || "Lost the server, retrying."} Dials show previews.`;
    for (const w of [this.a, this.b, ...this.rows]) w.number = 0;  // what was asked before is not coming any more
  }

  receive(answer) {
    if (answer.type === "about") return this.meet(answer);
    const take = this[{image: "image", range: "range", scores: "scores", progress: "progress", kspace: "kspace",
      error: "failed", refused: "failed", stopped: "halted", export: "exported", choice: "choice"}[answer.type]];
    if (take && this.about) take.call(this, answer);
  }

  meet(about) {
    const again = this.about;
    this.about = about;
    if (!again) {
      const want = (model, slice) => ({model, slice, dials: this.starts(model)});
      const middle = Math.floor(about.slices / 2);
      this.slice = middle;
      this.a = {slot: "a", want: want(0, middle), frame: null};
      const second = about.models.length > 1 ? 1 : 0;
      this.b = {slot: "b", want: want(second, middle), frame: null};
      this.rows = about.models.map((_, i) => ({slot: `row${i}`, want: want(i, middle), frame: null}));
      this.build();
    }
    for (const w of [this.a, this.b]) if (!w.truth && (w.frame?.kind !== "exact" || !this.matches(w))) this.refresh(w, 0);
    this.askRange();
    if (this.tab !== "tune") this.show(this.tab);
    this.redraw();
  }

  starts(model) {
    return Object.fromEntries(Object.entries(this.about.models[model].dials).map(([n, d]) => [n, d.start]));
  }

  matches(well) { return !!well.frame && keyOf(well.frame) === keyOf(well.want); }

  // An exact image. It is shown if it is what is wanted, or if nothing better is there; never in the place of a newer one.
  image(answer) {
    const frame = {...answer, kind: "exact", data: answer.arrays.image, height: answer.arrays.image.shape[0], width: answer.arrays.image.shape[1]};
    const elsewhere = answer.slice !== this.slice;  // on its way while the slice was changed
    if (answer.slot === "reference") {
      if (elsewhere) return;
      this.truth = frame;
      if (this.wantTruth) { this.wantTruth = false; this.b.frame = frame; this.b.truth = true; }
      return this.redraw();
    }
    const well = this.well(answer.slot);
    if (!well) return;
    this.remember(frame);
    const newest = keyOf(frame) === keyOf(well.want);
    if (well.number === answer.number) { well.number = 0; well.error = null; }
    this.seconds.set(this.rangeKey(answer.model, "", answer.dials), answer.seconds);
    if (this.rangeWaits && well === this.a && newest) this.askRange();
    if (well.truth || elsewhere || (!newest && this.matches(well))) return;
    well.frame = frame;
    this.redraw();
    if (well === this.a && this.tab === "k-space") this.askKspace();
    if (well === this.a && this.tab === "report") this.buildReport();
  }

  remember(frame) {
    this.exact.set(keyOf(frame), frame);
    if (this.exact.size > 48) this.exact.delete(this.exact.keys().next().value);
  }

  well(slot) { return [this.a, this.b, ...this.rows].find(w => w.slot === slot); }

  range(answer) {
    const range = new Range(answer, this.about.models[answer.model].dials);
    const key = this.rangeKey(answer.model, answer.slice, answer.fixed);
    const old = this.ranges.get(key);
    if (old?.scores) range.scores = old.scores;
    this.ranges.delete(key);
    this.ranges.set(key, range);
    if (this.ranges.size > 6) this.ranges.delete(this.ranges.keys().next().value);
    range.final = answer.final;
    if (this.progressing) this.progressing = answer.final ? null : this.progressing;
    for (const w of [this.a, this.b]) if (!w.frame) this.refresh(w, 0);
    this.pick();
    this.redraw();
  }

  scores({model, slice, fixed, axes, values}) {
    const range = this.ranges.get(this.rangeKey(model, slice, fixed));
    // Not known is not zero: NaN stays NaN between the points of a grid.
    if (range) range.scores = {axes, values: Object.fromEntries(Object.entries(values).map(([n, all]) => [n, all.map(v => v ?? NaN)]))};
    for (const w of [this.a, this.b]) if (range && w.frame?.kind === "preview" && this.rangeOf(w.frame) === range) w.frame = this.preview(w.frame, range);
    this.pick();
    const tuned = this.rows.find(w => w.tuning && w.want.model === model);
    if (tuned) this.atItsBest(tuned);
    this.redraw();
  }

  progress(answer) {
    if (answer.slot !== "choose") this.progressing = answer;
    else if (this.choosing?.number === answer.number) this.choosing = {...this.choosing, ...answer};
    this.dirty.add("facts");
    this.later();
  }

  choice({number, model, slice, dials, by, reason}) {
    if (this.choosing?.number !== number) return;
    this.choosing = null;
    if (model !== this.a.want.model || slice !== this.slice) return this.say("chosen, but for another method or slice");
    this.turn(Object.fromEntries(numeric(this.dials()).map(n => [n, Number(dials[n].toPrecision(4))])));
    this.picked = {key: keyOf(this.a.want), text: `${CRITERIA[by]}: ${reason}`};
    this.redraw();
  }

  failed(answer) {
    const well = this.well(answer.slot);
    if (answer.slot === "range" && answer.number === this.rangeNumber) { this.progressing = null; this.unmade = `no range: ${answer.what}`; }
    if (answer.slot === "choose") this.choosing = null;
    if (well && well.number === answer.number) well.number = 0;
    if (well) well.error = answer.what + (answer.help && !answer.what.includes(answer.help) ? `; ${answer.help}` : "");
    else this.say(answer.what);
    this.redraw();
  }

  halted(answer) {
    const well = this.well(answer.slot);
    if (well && well.number === answer.number) well.number = 0;
    if (well === this.a && this.rangeWaits) this.unmade = "no range yet";
    // One that a newer request replaced is not worth a word.
    if (answer.slot === "range" && answer.number === this.rangeNumber) { this.progressing = null; this.unmade = "the range was stopped"; }
    if (answer.slot === "choose" && answer.number === this.choosing?.number) this.choosing = null;
    this.redraw();
  }

  // ---------------------------------------------------------- asking

  send(slot, want, more = {}) {
    const number = ++this.number;
    if (this.open) this.link.send({slot, number, model: want.model, slice: want.slice, dials: want.dials, ...more});
    return number;
  }

  // Show at once what can be shown, and ask for the rest.
  refresh(well, delay = REST) {
    clearTimeout(well.timer);
    if (well === this.b) this.wantTruth = false;
    well.truth = false;
    well.error = null;
    const known = this.exact.get(keyOf(well.want)), range = this.rangeOf(well.want);
    if (known) well.frame = known;
    else {
      if (range) well.frame = this.preview(well.want, range);
      const ask = () => {
        well.since = performance.now();
        well.number = this.send(well.slot, well.want);
        setTimeout(() => { this.dirty.add("facts"); this.later(); }, 450);
      };
      if (!this.link.offline) range && delay ? well.timer = setTimeout(ask, this.gesture ? 3 * delay : delay) : ask();
    }
    this.redraw();
  }

  preview(want, range) {
    const [height, width] = this.about.shape, where = range.at(want.dials);
    const facts = {metrics: {}, residual: null, noise: this.noise};
    if (range.scores) for (const name of Object.keys(range.scores.values)) {
      if (name === "residual") facts.residual = range.score(name, where);
      else facts.metrics[name] = range.score(name, where);
    }
    return {model: want.model, slice: want.slice, dials: {...want.dials}, kind: "preview", data: range.rebuild(where), height, width, ...facts};
  }

  rangeKey(model, slice, dials) {
    const choices = Object.entries(this.about.models[model].dials).filter(([, d]) => d.choices).map(([n]) => dials[n]);
    return `${model}|${slice}|${choices.join("|")}`;
  }

  rangeOf(want) { return this.ranges.get(this.rangeKey(want.model, want.slice, want.dials)); }

  // Not before the first image: it tells how long the range will take.
  askRange(want = this.a.want, delay = 300, anyway = false) {
    clearTimeout(this.rangeTimer);
    this.unmade = "";
    this.rangeWaits = false;
    if (this.link.offline || !numeric(this.about.models[want.model].dials).length || this.rangeOf(want)?.final) return;
    const each = this.seconds.get(this.rangeKey(want.model, "", want.dials));
    if (!anyway && each === undefined) { this.rangeWaits = want === this.a.want; return; }
    if (!anyway && each > LONG) { this.unmade = `no range yet: ${each.toFixed(0)} s a setting`; return; }
    this.rangeTimer = setTimeout(() => { this.rangeNumber = this.send("range", want); }, delay);
  }

  stop(slot) { if (this.open) this.link.send({stop: slot}); }

  // ---------------------------------------------------------- what a person does

  // One move of the dials of a well (A unless said otherwise); `settled` ends a gesture, which undo takes back as a whole.
  turn(changes, {well = this.a, settled = true} = {}) {
    if (well === this.a && !this.gesture) { this.past.push(structuredClone(well.want)); this.gesture = true; }
    const before = this.rangeKey(well.want.model, well.want.slice, well.want.dials);
    Object.assign(well.want.dials, changes);
    if (settled) this.gesture = false;
    if (this.past.length > 200) this.past.shift();
    if (well === this.a) { this.trail.push({...well.want.dials}); if (this.trail.length > 60) this.trail.shift(); }
    this.refresh(well);
    if (before !== this.rangeKey(well.want.model, well.want.slice, well.want.dials)) this.askRange(well.want);
    this.note();
  }

  // A setting without ground truth, by the criterion of the menu.
  choose() {
    if (!numeric(this.dials()).length) return this.say("this method has nothing to set");
    this.choosing = {done: 0, number: this.send("choose", this.a.want, {by: this.criterion.value})};
    this.redraw();
  }

  nudge(index, by) {
    const name = this.axes()[index];
    if (!name) return;
    const dial = this.dials()[name], p = clamp(position(dial, this.a.want.dials[name]) + by);
    this.turn({[name]: valueAt(dial, p)});
  }

  go(want) {
    this.past.push(structuredClone(this.a.want));
    const other = want.model !== this.a.want.model;
    this.a.want = structuredClone(want);
    this.a.want.slice = this.slice;
    if (other) { this.trail = []; this.buildDials(); }
    this.refresh(this.a, 0);
    this.askRange();
    this.note();
  }

  undo() {
    const want = this.past.pop();
    if (!want) return this.say("nothing to undo");
    this.go(want);
    this.past.pop();
  }

  pin() {
    this.b.want = structuredClone(this.a.want);
    clearTimeout(this.b.timer);
    this.b.truth = this.wantTruth = false;
    this.b.error = null;
    this.b.frame = this.a.frame;
    if (this.a.frame?.kind !== "exact" || !this.matches(this.a)) this.refresh(this.b, 0);
    this.redraw();
  }

  swap() {
    if (this.b.truth) return this.say("the reference cannot be A");
    [this.a.want, this.b.want] = [this.b.want, this.a.want];
    [this.a.frame, this.b.frame] = [this.b.frame, this.a.frame];
    this.buildDials();
    this.refresh(this.a, 0);
    this.refresh(this.b, 0);
    this.askRange();
    this.note();
  }

  reference() {
    if (!this.about.reference) return this.say("no reference: quality unknown");
    if (this.link.offline) return this.say("this file holds the scores, not the reference itself");
    if (this.b.truth) return this.refresh(this.b, 0);
    if (this.truth?.slice === this.slice) { this.b.frame = this.truth; this.b.truth = true; return this.redraw(); }
    this.wantTruth = true;
    this.send("reference", this.a.want);
  }

  keep() {
    const note = this.picked?.key === keyOf(this.a.want) ? this.picked.text.slice(0, 500) : "";
    this.kept.push({...structuredClone(this.a.want), note});
    this.buildKept();
    this.keptList.querySelector("li:last-child input")?.focus();
    this.note();
    this.redraw();
  }

  // What a notebook, and the command line when it ends, should know.
  note() {
    if (this.open && !this.link.offline) this.link.send({state: {...this.a.want, kept: this.kept.map(k => ({...k}))}});
  }

  toSlice(k) {
    k = clamp(k, 0, this.about.slices - 1);
    if (k === this.slice) return;
    this.slice = k;
    this.truth = null;
    const truth = this.b.truth || this.wantTruth;
    for (const w of [this.a, this.b, ...this.rows]) { w.want.slice = k; if (w.frame?.slice !== k) w.frame = null; }
    for (const w of [this.a, this.b]) this.refresh(w, 0);
    if (truth) { this.wantTruth = true; this.send("reference", this.a.want); }
    this.askRange(this.a.want, 700);
    this.pick();
    if (this.tab !== "tune") this.show(this.tab);
    this.sliceInput.value = k;
  }

  say(text) {
    this.status.textContent = text;
    clearTimeout(this.sayTimer);
    this.sayTimer = setTimeout(() => { this.status.textContent = ""; }, 6000);
  }

  command(want = this.a.want) {
    const {source, models, slices} = this.about, model = models[want.model];
    if (!source) return `tunemri.reconstruct(scan, model${Object.entries(want.dials).map(([n, v]) => `, ${n}=${JSON.stringify(v)}`).join("")})`;
    const set = Object.entries(want.dials).map(([n, v]) => `${n}=${v}`);
    return `tunemri recon ${source.word} -m ${model.word}${set.length ? " --set " + set.join(" ") : ""}`
      + `${slices > 1 ? ` --slice ${want.slice}` : ""}${source.options} -o out.h5`;
  }

  picks() {
    const {source, models, version, title} = this.about;
    const pick = k => ({model: models[k.model].name, model_sha256: models[k.model].sha256, dials: k.dials, slice: String(this.about.cut ?? k.slice), note: k.note});
    const from = source ? {scan: source.scan, scan_sha256: source.sha256, csm: source.csm} : {title};
    // The first pick lies at the top as well: `recon --from picks.json` is that one, `--from picks.json#2` the second.
    return JSON.stringify({tunemri: version, ...from, ...pick(this.kept[0]), picks: this.kept.map(pick)}, null, 1) + "\n";
  }

  // ---------------------------------------------------------- looking

  dials(model = this.a.want.model) { return this.about.models[model].dials; }
  axes() {
    const names = numeric(this.dials());
    this.chosen = (this.chosen || []).filter(n => names.includes(n));
    return [...this.chosen, ...names.filter(n => !this.chosen.includes(n))].slice(0, 2);
  }

  plane(frame) {
    frame.planes ||= {};
    return frame.planes[this.part] ||= planeOf(frame.data, this.part);
  }

  // The same window for both panes, or one for each where the switch says so.
  autoWindow() {
    const of = ({data}) => {
      const m = planeOf(data, "magnitude");
      return {lo: quantile(m, .005), hi: quantile(m, .995) || 1};
    };
    const frame = this.a.frame || this.b.frame;
    if (!frame) return;
    this.window = of(frame);
    this.own = {};
    if (this.perPane) for (const w of [this.a, this.b]) if (w.frame) this.own[w.slot] = of(w.frame);
    this.gain = 1;
    this.redraw();
  }

  togglePerPane() {
    this.perPane = !this.perPane;
    this.perPaneButton.classList.toggle("on", this.perPane);
    this.autoWindow();
  }

  // What black and white stand for, and the colours between; of a pane with a window of its own, that one.
  tones(well) {
    const {lo, hi} = this.own[well?.slot] || this.window || {lo: 0, hi: 1}, grey = this.inverted ? INVERTED : GREY;
    if (this.part === "phase") return [-Math.PI, Math.PI, CYCLIC];
    return this.part === "magnitude" ? [lo, hi, grey] : [-hi, hi, grey];
  }

  // The same in words.
  scaleText(well) {
    const [lo, hi] = this.tones(well);
    if (this.part === "phase") return "phase −π … π rad";
    const text = this.part === "magnitude" ? `W ${shown(hi - lo)}  L ${shown((hi + lo) / 2)}` : `${this.part} −${shown(hi)} … ${shown(hi)}`;
    return this.own[well?.slot] ? `${text}  (this pane's own)` : text;
  }

  resetView() { this.view = {zoom: 1, x: .5, y: .5}; this.redraw(); }

  redraw() {
    if (!this.window && this.a.frame) this.autoWindow();
    ["panes", "pad", "facts", "tiles", "tab"].forEach(d => this.dirty.add(d));
    this.later();
  }

  later() {
    if (this.frameAsked || !this.about) return;
    this.frameAsked = true;
    requestAnimationFrame(() => {
      this.frameAsked = false;
      const dirty = this.dirty;
      this.dirty = new Set();
      if (dirty.has("panes")) this.drawPanes();
      if (dirty.has("pad")) this.drawPad();
      if (dirty.has("facts")) this.drawFacts();
      if (dirty.has("tiles")) this.drawTiles();
      if (dirty.has("tab")) this.drawTab();
    });
  }
  // ---------------------------------------------------------- the page

  build() {
    const {about, root} = this, button = (text, title, onclick, more = {}) => h("button", {type: "button", title, onclick, ...more}, text);
    this.tabBar = h("nav", {}, TABS.map(name => button(name, name, () => this.show(name), {className: "tab", "data-tab": name})));
    this.sliceInput = h("input", {type: "number", min: 0, max: about.slices - 1, value: this.slice, title: "slice, counted from 0 (n, N, wheel)",
      onchange: e => this.toSlice(Math.round(Number(e.target.value) || 0))});
    this.banner = h("div", {className: "banner", hidden: true, role: "alert"});
    this.status = h("span", {className: "status", role: "status"});
    this.factsLine = h("span", {className: "facts-line"});
    this.help = h("dialog", {}, h("h2", {}, "Mouse and keys"), h("dl", {}, HELP.flatMap(([k, what]) => [h("dt", {}, k), h("dd", {}, what)])),
      button("close", "close", () => this.help.close()));

    const swatch = (id, label) => {
      const pane = {id, canvas: h("canvas", {"aria-label": label, "data-pane": id}), picture: new Picture(), other: new Picture()};
      pane.title = h("b", {}, label);
      pane.what = h("span", {className: "what"});
      pane.chip = h("span", {className: "chip"});
      pane.facts = h("div", {className: "facts"});
      pane.bar = h("div", {className: "bar", hidden: true}, h("i"));
      pane.error = h("div", {className: "error", hidden: true});
      pane.root = h("figure", {"data-pane": id}, h("figcaption", {ondblclick: () => this.solo(id)}, pane.title, pane.what, pane.chip),
        h("div", {className: "frame"}, pane.canvas, pane.bar, pane.error), pane.facts);
      this.listen(pane);
      return pane;
    };
    this.panes = {a: swatch("a", "A"), b: swatch("b", "B"), c: swatch("c", "A − B")};
    this.thirdMenu = h("select", {title: "third pane (d)", onchange: e => { this.third = e.target.value; this.redraw(); }},
      Object.entries(THIRD).filter(([k]) => k !== "error" || (about.reference && !this.link.offline)).map(([k, v]) => h("option", {value: k}, v)));
    this.panes.c.title.replaceWith(this.thirdMenu);
    this.row = h("div", {className: "row"}, Object.values(this.panes).map(p => p.root));

    this.partMenu = h("select", {title: "m g h j", onchange: e => this.setPart(e.target.value)}, Object.keys(PARTS).map(p => h("option", {}, p)));
    const tools = h("div", {className: "tools"},
      button("pin as B", "p", () => this.pin()), button("swap", "s", () => this.swap()),
      about.reference && !this.link.offline ? button("reference", "t: as B", () => this.reference()) : null,
      button("flicker", "hold space", () => this.blink()), button("swipe", "w", () => this.toggleSwipe()),
      this.partMenu, button("auto window", "double click", () => this.autoWindow()),
      this.perPaneButton = button("per pane", "each pane gets a window of its own: the two greys then no longer compare", () => this.togglePerPane()),
      this.roiButton = button("ROI", "o: draw a circle, in any pane", () => this.toggleRoi()), button("reset view", "r", () => this.resetView()),
      h("span", {className: "gap"}), button("copy command", "the command line that makes pane A", () => this.copyCommand()),
      button("save PNG", "the panes with their captions", () => this.savePng()),
      this.link.offline ? null : button("save NPY", "pane A, exact, complex", () => this.saveNpy()));

    this.padCanvas = h("canvas", {className: "pad", "aria-label": "dials", tabIndex: -1});
    this.listenPad();
    this.ground = h("select", {title: "what the pad shows behind the dials", onchange: () => { this.groundStamp = ""; this.redraw(); }});
    this.legend = h("div", {className: "legend", hidden: true});
    this.axisMenus = h("div", {className: "axes"});
    this.criterion = h("select", {title: "by which a setting is chosen without ground truth"}, about.criteria.map(c => h("option", {value: c}, CRITERIA[c])));
    this.pickedText = h("div", {className: "picked soft", hidden: true});
    this.sliders = h("div", {className: "sliders"});
    this.modelMenu = h("select", {className: "model", title: "method of pane A", onchange: e => {
      const model = Number(e.target.value);
      this.go({model, slice: this.slice, dials: this.starts(model)});
    }}, about.models.map((m, i) => h("option", {value: i}, m.name)));
    this.residual = h("div", {className: "residual"});
    this.work = h("div", {className: "work"});
    const side = h("aside", {}, h("label", {className: "field"}, h("span", {}, "method"), this.modelMenu), this.padCanvas, this.legend,
      h("label", {className: "field"}, h("span", {}, "behind it"), this.ground), this.axisMenus, this.sliders,
      h("div", {className: "tools"}, button("undo", "u", () => this.undo()), button("keep", "k", () => this.keep()),
        about.reference ? button("★ best", "the setting with the best PSNR on this scan", () => this.toBest()) : null,
        button("defaults", "the method's own setting", () => this.turn(this.starts(this.a.want.model)))),
      this.link.offline ? null : this.choosers = h("div", {className: "field"}, button("pick for me", "a setting without ground truth, and why; as tunemri choose", () => this.choose()), this.criterion),
      this.pickedText, this.residual, this.work);

    this.within = h("select", {title: "which settings count as good", onchange: () => { this.pick(); this.redraw(); }},
      (about.reference ? [["0.5", "0.5 dB"], ["1", "1 dB"], ["3", "3 dB"], ["Infinity", "everything"]]
        : [["1.1", "residual within 10 % of the least"], ["1.5", "residual within 50 %"], ["Infinity", "everything"]])
        .map(([value, text]) => h("option", {value, selected: value === "1" || value === "1.5"}, text)));
    this.tiles = h("div", {className: "tiles"});
    this.spreadText = h("span", {className: "soft"});
    this.keptList = h("ol", {className: "kept"});
    const below = h("div", {className: "below"},
      h("section", {}, h("h3", {}, "Good settings that differ most ", h("label", {className: "soft"}, "within ", this.within, about.reference ? " of best" : ""), this.spreadText), this.tiles),
      h("section", {className: "keeping"}, h("h3", {}, "Kept ", button("export kept", "picks.json, for recon --from", () => this.exportKept())), this.keptList));

    this.sections = {
      tune: h("div", {className: "tune"}, this.row, tools, below),
      landscape: h("div", {className: "landscape"}), uncertainty: h("div", {className: "uncertainty"}),
      methods: h("div", {className: "methods"}), "k-space": h("div", {className: "kspace"}), report: h("div", {className: "report"}),
    };
    this.stage = h("div", {className: "stage"}, Object.values(this.sections));
    const orientation = about.letters ? null : h("span", {className: "chip", title: "the file does not say how the slice lies in the patient"}, "orientation unknown, array order");
    root.replaceChildren(
      h("header", {}, h("b", {className: "name"}, "tunemri"), h("span", {className: "title", title: about.provenance}, about.title),
        about.slices > 1 ? h("label", {className: "slice"}, "slice ", this.sliceInput, ` of ${about.slices}`) : null, this.tabBar,
        h("span", {className: "gap"}), orientation, h("span", {className: "chip warn"}, "not for diagnosis"), button("?", "mouse and keys", () => this.help.showModal())),
      this.banner, h("div", {className: "body"}, side, this.stage),
      h("footer", {}, this.factsLine, this.status, h("span", {className: "gap"}),
        h("span", {className: "soft"}, "drag: window · wheel: ", about.slices > 1 ? "slice" : "zoom", " · space: A/B · p pin · k keep · u undo · ? keys")),
      this.help);
    this.buildDials();
    this.buildKept();
    this.show("tune");
    this.listenKeys();
    new ResizeObserver(() => { for (const p of Object.values(this.panes)) p.picture.stamp = p.key = ""; this.groundStamp = ""; this.redraw(); }).observe(this.stage);
    const outside = about.models.flatMap(m => m.outside.map(s => `${m.name}: ${s}`));
    if (outside.length) this.sections.tune.prepend(h("div", {className: "banner"}, `Outside what was trained: ${outside.join("; ")}. Do not trust the image without a look at the data.`));
  }

  // The setting of A in the other coordinates: one weight for each loss term.
  weights() { return weightsOf(this.about.models[this.a.want.model].terms.slice(1).map(n => this.a.want.dials[n])); }

  weigh(k, v, how) {
    if (!this.gesture) this.held = this.weights();  // a hand that comes back finds the others as they were
    const dials = this.dials(), lambdas = lambdasOf(moved(this.held, k, clamp(v)));
    const terms = this.about.models[this.a.want.model].terms.slice(1);
    this.turn(Object.fromEntries(terms.map((n, i) => [n, clamp(Number(lambdas[i].toPrecision(4)), dials[n].lo, dials[n].hi)])), how);
  }

  weightRow(term, k) {
    const out = h("input", {type: "text", className: "value", inputMode: "decimal", "aria-label": `weight of ${term}, value`, onchange: e => {
      const v = Number(e.target.value);
      if (Number.isFinite(v) && e.target.value.trim()) this.weigh(k, v);
      this.redraw();
    }});
    const slider = h("input", {type: "range", min: 0, max: 1, step: "any", "aria-label": `weight of ${term}`,
      oninput: e => this.weigh(k, Number(e.target.value), {settled: false}), onchange: () => { this.gesture = false; }});
    this.rowsOf[`w_${term}`] = {out, slider, weight: k};
    return h("div", {className: "dial"}, h("div", {className: "dial-head"}, h("b", {title: `weight of ${term} among all terms`}, `w ${term}`), out), slider);
  }

  buildDials() {
    const dials = this.dials(), names = Object.keys(dials), numbers = numeric(dials);
    this.modelMenu.value = this.a.want.model;
    this.rowsOf = {};
    const {terms} = this.about.models[this.a.want.model], several = terms.length > 2;
    const rows = several && this.simplex ? terms.map((term, k) => this.weightRow(term, k)) : names.map(name => {
      const d = dials[name], value = this.a.want.dials[name];
      const head = out => h("div", {className: "dial-head"}, h("b", {title: d.sentence}, name), out);
      if (d.choices) {
        const menu = h("select", {onchange: e => this.turn({[name]: e.target.value}), disabled: !!this.link.offline}, d.choices.map(c => h("option", {selected: c === value}, c)));
        this.rowsOf[name] = {menu};
        return h("div", {className: "dial"}, head(menu));
      }
      const out = h("input", {type: "text", className: "value", inputMode: "decimal", "aria-label": `${name}, value`, onchange: e => {
        const v = Number(e.target.value);
        if (Number.isFinite(v) && e.target.value.trim()) this.turn({[name]: clamp(v, d.lo, d.hi)});
        this.redraw();
      }});
      const slider = h("input", {type: "range", min: 0, max: 1, step: "any", "aria-label": name,
        oninput: e => this.turn({[name]: valueAt(d, Number(e.target.value))}, {settled: false}), onchange: () => { this.gesture = false; }});
      this.rowsOf[name] = {out, slider};
      return h("div", {className: "dial"}, head(h("span", {}, out, d.unit ? ` ${d.unit}` : "")), slider,
        h("div", {className: "ends"}, h("span", {}, d.low), h("span", {}, d.high)));
    });
    const other = h("input", {type: "checkbox", checked: !!this.simplex, onchange: e => { this.simplex = e.target.checked; this.buildDials(); this.redraw(); }});
    this.sliders.replaceChildren(...(several ? [h("label", {className: "soft", title: "the weight of every loss term, with sum 1, in place of each term's share of what the later ones leave"}, other, " weights")] : []), ...rows);
    if (!names.length) this.sliders.append(h("p", {className: "soft"}, "This method has nothing to set."));
    this.padCanvas.hidden = !numbers.length;
    if (this.choosers) this.choosers.hidden = !numbers.length;
    this.ground.parentElement.hidden = !numbers.length;
    this.axisMenus.replaceChildren(...(numbers.length > 2 ? ["across", "up"].map((label, k) => h("label", {}, `${label} `, h("select", {onchange: e => {
      const other = this.axes()[1 - k];
      this.chosen = k ? [other, e.target.value] : [e.target.value, other];
      this.groundStamp = "";
      this.redraw();
    }}, numbers.map(n => h("option", {selected: n === this.axes()[k]}, n))))) : []));
    const scored = Object.entries(this.about.metrics).map(([n, m]) => [n, m.label]);
    const grounds = [...scored, ["residual", "data residual"], ["change", this.changeName()], ["spread", "how fast the image changes"],
      ["roi-mean", "mean in the ROI"], ["roi-sd", "standard deviation in the ROI"], ["none", "nothing"]];
    const chosen = this.ground.value || (this.about.reference ? "psnr" : "change");
    this.ground.replaceChildren(...grounds.map(([value, text]) => h("option", {value, selected: value === chosen}, text)));
    this.groundStamp = "";
    this.pick();
  }

  buildKept() {
    this.keptList.replaceChildren(...this.kept.map((k, i) => h("li", {},
      h("button", {type: "button", title: "go there", onclick: () => { this.toSlice(k.slice); this.go(k); }}, `${this.about.models[k.model].name} ${words(k.dials)}${this.about.slices > 1 ? ` · slice ${k.slice}` : ""}`),
      h("input", {type: "text", value: k.note, placeholder: "why this one?", maxLength: 500, "aria-label": "note", oninput: e => { k.note = e.target.value; this.note(); }}),
      h("button", {type: "button", title: "drop it", onclick: () => { this.kept.splice(i, 1); this.buildKept(); this.note(); this.redraw(); }}, "×"))));
    if (!this.kept.length) this.keptList.append(h("li", {className: "soft"}, "k keeps the setting of A, with a note"));
  }

  solo(id) { this.row.dataset.solo = this.row.dataset.solo === id ? "" : id; this.redraw(); }
  setPart(part) { this.part = part; this.partMenu.value = part; for (const p of Object.values(this.panes)) p.picture.stamp = p.key = ""; this.redraw(); }
  toggleSwipe() { this.swipe = this.swipe === undefined ? .5 : undefined; this.redraw(); }

  blink() {
    clearInterval(this.blinking);
    this.flick = false;
    this.rate = {0: 1, 1: 2, 2: 4}[this.rate || 0] || 0;
    this.blinking = this.rate ? setInterval(() => { this.flick = !this.flick; this.dirty.add("panes"); this.later(); }, 500 / this.rate) : null;
    this.say(this.rate ? `A and B in turn, ${this.rate} times a second` : "");
    this.redraw();
  }

  toBest() {
    const range = this.rangeOf(this.a.want), best = range?.best("psnr", true);
    if (!best) return this.say(numeric(this.dials()).length ? this.unmade || "the range is not there yet" : "this method has nothing to set");
    this.turn(Object.fromEntries(range.names.map((n, d) => [n, valueAt(range.dials[n], best.where[d])])));
  }

  // The gallery: settings that pass, as different as can be.
  pick() {
    const range = this.rangeOf(this.a.want);
    this.gallery = [];
    this.tiles.replaceChildren();  // never those of another slice or method
    this.spreadText.textContent = numeric(this.dials()).length ? "" : "this method has nothing to set";
    if (!range?.scores || !range.rank) return;
    const limit = Number(this.within.value), psnr = range.best("psnr", true), least = range.best("residual", false);
    const passes = psnr ? p => range.score("psnr", p) >= psnr.value - limit : p => !least || range.score("residual", p) <= least.value * limit;
    const places = range.diverse(6, passes, psnr ? psnr.where : range.at(this.starts(this.a.want.model)));
    this.gallery = places.map(where => {
      const dials = {...this.a.want.dials, ...Object.fromEntries(range.names.map((n, d) => [n, valueAt(range.dials[n], where[d])]))};
      return {where, want: {model: this.a.want.model, slice: this.slice, dials}, data: null, picture: new Picture()};
    });
    const w = places.map(p => range.weights(p)), far = w.map((a, i) => w.slice(i + 1).map(b => range.distance(a, b))).flat();
    const top = this.window ? this.window.hi : 1;
    this.spreadText.textContent = far.length ? ` mean difference ${(100 * far.reduce((s, v) => s + v, 0) / far.length / top).toFixed(1)} % of white` : "";
    this.tiles.replaceChildren(...this.gallery.map((g, i) => g.root = h("button", {type: "button", className: "tile", title: "go; shift: pin as B",
      onclick: e => { if (e.shiftKey) { this.b.want = structuredClone(g.want); this.refresh(this.b, 0); } else this.go(g.want); }},
      g.canvas = h("canvas"), h("span", {}, h("b", {}, String(i + 1)), ` ${range.names.map(n => shown(g.want.dials[n])).join(", ")}`))));
    this.dirty.add("tiles");
  }

  // ---------------------------------------------------------- mouse and keys

  listen(pane) {
    const c = pane.canvas;
    let from = null;
    c.addEventListener("contextmenu", e => e.preventDefault());
    c.addEventListener("pointerdown", e => {
      e.preventDefault();
      this.root.focus({preventScroll: true});
      c.setPointerCapture(e.pointerId);
      const alone = (e.ctrlKey || e.metaKey) && pane.id !== "c", kind = e.button === 1 || (e.button === 0 && e.shiftKey) ? "move" : e.button === 2 ? "zoom"
        : e.altKey || this.drawing ? "roi" : "window";
      const box = c.getBoundingClientRect(), spot = this.pixelAt(c, e.clientX - box.left, e.clientY - box.top);
      from = {kind, alone, spot, x: e.clientX, y: e.clientY, view: {...this.view}, window: {...(this.own[pane.id] || this.window || {lo: 0, hi: 1})}, gain: this.gain};
      if (kind === "roi") this.setRoi(null);
    });
    c.addEventListener("pointermove", e => {
      const box = c.getBoundingClientRect();
      this.cursor = this.pixelAt(c, e.clientX - box.left, e.clientY - box.top);
      if (this.swipe !== undefined && pane.id === "a" && !from) this.swipe = clamp((e.clientX - box.left) / box.width);
      if (from) {
        const dx = e.clientX - from.x, dy = e.clientY - from.y;
        if (from.kind === "window") this.dragWindow(pane, from, dx / 300, dy / 300);
        else if (from.kind === "roi") this.setRoi({...from.spot, r: Math.hypot(this.cursor.x - from.spot.x, this.cursor.y - from.spot.y)});
        else if (from.kind === "zoom") this.zoomTo(from.view.zoom * Math.exp(-dy / 150));
        else if (from.kind === "move") {
          const s = this.scaleOf(c);
          this.view.x = from.view.x - dx * devicePixelRatio / (s.x * s.width);
          this.view.y = from.view.y - dy * devicePixelRatio / (s.y * s.height);
        }
        this.dirty.add("tiles");
      }
      this.dirty.add("panes");
      this.later();
    });
    const end = () => { from = null; };
    c.addEventListener("pointerup", end);
    c.addEventListener("pointercancel", end);
    c.addEventListener("pointerleave", () => { this.cursor = null; this.dirty.add("panes"); this.later(); });
    c.addEventListener("dblclick", () => this.autoWindow());
    c.addEventListener("wheel", e => {
      e.preventDefault();
      if (this.about.slices > 1 && !e.ctrlKey) return this.toSlice(this.slice + Math.sign(e.deltaY));
      const box = c.getBoundingClientRect();
      this.zoomTo(this.view.zoom * Math.exp(-e.deltaY / 400), this.pixelAt(c, e.clientX - box.left, e.clientY - box.top));
    }, {passive: false});
  }

  // Across: width; up and down: level. In the difference pane: how strongly differences show.
  dragWindow(pane, from, dx, dy) {
    if (pane.id === "c") { this.gain = clamp(from.gain * Math.exp(dx * 3), .02, 50); return; }
    const {lo, hi} = from.window, width = (hi - lo) * Math.exp(dx * 2), level = (lo + hi) / 2 + dy * (hi - lo);
    const moved = {lo: level - width / 2, hi: level + width / 2};
    if (from.alone || this.own[pane.id]) this.own[pane.id] = moved;
    else this.window = moved;
  }

  // A circle in which values are counted; one that holds no pixel is none.
  setRoi(roi) {
    if (roi) {
      const [height, width] = this.about.shape, pixels = [];
      for (let y = Math.max(0, Math.ceil(roi.y - roi.r)); y <= Math.min(height - 1, roi.y + roi.r); y++) {
        for (let x = Math.max(0, Math.ceil(roi.x - roi.r)); x <= Math.min(width - 1, roi.x + roi.r); x++) {
          if ((x - roi.x) ** 2 + (y - roi.y) ** 2 <= roi.r ** 2) pixels.push(y * width + x);
        }
      }
      this.roiPixels = pixels;
      if (roi.r < 1 || !pixels.length) roi = null;
    }
    this.roi = roi;
    this.groundStamp = "";
    this.redraw();
  }

  toggleRoi() {
    this.drawing = !this.drawing;
    this.roiButton.classList.toggle("on", this.drawing);
    if (!this.drawing) this.setRoi(null);
  }

  zoomTo(zoom, at) {
    zoom = clamp(zoom, .5, 40);
    if (at) {  // the pixel under the pointer stays there
      const [height, width] = this.about.shape, k = this.view.zoom / zoom;
      this.view.x = (at.x + .5) / width + (this.view.x - (at.x + .5) / width) * k;
      this.view.y = (at.y + .5) / height + (this.view.y - (at.y + .5) / height) * k;
    }
    this.view.zoom = zoom;
    this.dirty.add("tiles");
    this.dirty.add("panes");
    this.later();
  }

  listenKeys() {
    const where = this.link.page ? document : this.root;
    const ours = e => {
      const into = e.target;
      if (into.closest?.("dialog")) return false;
      return !(into.matches?.("select, textarea, input:not([type=range])") || e.ctrlKey || e.metaKey || e.altKey);
    };
    where.addEventListener("keydown", e => {
      if (!this.link.page) e.stopPropagation();  // JupyterLab has keys of its own
      if (!ours(e)) return;
      if (e.key.startsWith("Arrow") && e.target.matches?.("input")) return;  // that slider's own
      const step = e.shiftKey ? .1 : .01;
      const keys = {
        ArrowLeft: () => this.nudge(0, -step), ArrowRight: () => this.nudge(0, step),
        ArrowDown: () => this.nudge(this.axes().length > 1 ? 1 : 0, -step), ArrowUp: () => this.nudge(this.axes().length > 1 ? 1 : 0, step),
        "[": () => this.nudge(0, -.01), "]": () => this.nudge(0, .01), "{": () => this.nudge(1, -.01), "}": () => this.nudge(1, .01),
        " ": () => { if (!this.flick) { this.flick = true; this.dirty.add("panes"); this.later(); } },
        b: () => this.blink(), w: () => this.toggleSwipe(), p: () => this.pin(), s: () => this.swap(), t: () => this.reference(), u: () => this.undo(),
        k: () => this.keep(), m: () => this.setPart("magnitude"), g: () => this.setPart("phase"), h: () => this.setPart("real"),
        j: () => this.setPart("imaginary"), f: () => this.show(this.tab === "k-space" ? "tune" : "k-space"),
        d: () => this.nextThird(), o: () => this.toggleRoi(), i: () => { this.inverted = !this.inverted; this.redraw(); }, r: () => this.resetView(),
        n: () => this.toSlice(this.slice + 1), N: () => this.toSlice(this.slice - 1), "?": () => this.help.showModal(),
      };
      const act = keys[e.key] || (/^[1-6]$/.test(e.key) && this.gallery[e.key - 1] && (() => this.go(this.gallery[e.key - 1].want)));
      if (!act) return;
      e.preventDefault();
      act();
    });
    // Another window may take the key's release.
    globalThis.addEventListener("blur", () => { this.gesture = false; if (this.flick && !this.blinking) { this.flick = false; this.redraw(); } });
    where.addEventListener("keyup", e => {
      this.gesture = false;
      if (e.key === " " && this.flick && !this.blinking) { this.flick = false; e.preventDefault(); this.dirty.add("panes"); this.later(); }
    });
  }

  nextThird() {
    const options = [...this.thirdMenu.options].map(o => o.value);
    this.third = options[(options.indexOf(this.third) + 1) % options.length];
    this.thirdMenu.value = this.third;
    this.redraw();
  }

  listenPad() {
    const c = this.padCanvas;
    let down = false;
    const move = (e, settled) => {
      const box = c.getBoundingClientRect(), m = this.margin(), axes = this.axes();
      const x = clamp((e.clientX - box.left - m.left) / (box.width - m.left - m.right)), y = 1 - clamp((e.clientY - box.top - m.top) / (box.height - m.top - m.bottom));
      const places = axes.length > 1 ? [x, y] : [x];
      this.turn(Object.fromEntries(axes.map((n, k) => [n, valueAt(this.dials()[n], places[k])])), {settled});
    };
    c.addEventListener("pointerdown", e => { e.preventDefault(); this.root.focus({preventScroll: true}); down = true; c.setPointerCapture(e.pointerId); move(e, false); });
    c.addEventListener("pointermove", e => { if (down) move(e, false); });
    c.addEventListener("pointerup", e => { if (down) move(e, true); down = false; this.gesture = false; });
    c.addEventListener("pointercancel", () => { down = false; this.gesture = false; });
  }

  // ---------------------------------------------------------- drawing

  fit(canvas) {
    const box = canvas.getBoundingClientRect(), r = devicePixelRatio || 1;
    const width = Math.max(1, Math.round(box.width * r)), height = Math.max(1, Math.round(box.height * r));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    return canvas.getContext("2d");
  }

  // Canvas pixels per image pixel, and where the image starts.
  scaleOf(canvas, view = this.view, aspect = this.about.aspect) {
    const [height, width] = this.about.shape;
    const x = Math.min(canvas.width / width, canvas.height / (height * aspect)) * view.zoom, y = x * aspect;
    return {x, y, width, height, left: canvas.width / 2 - view.x * width * x, top: canvas.height / 2 - view.y * height * y};
  }

  pixelAt(canvas, px, py) {
    const s = this.scaleOf(canvas), r = devicePixelRatio || 1;
    return {x: Math.floor((px * r - s.left) / s.x), y: Math.floor((py * r - s.top) / s.y)};
  }

  drawImage(context, picture, s = this.scaleOf(context.canvas)) {
    context.imageSmoothingEnabled = s.x < 3 * (devicePixelRatio || 1);
    context.drawImage(picture, s.left, s.top, s.width * s.x, s.height * s.y);
  }

  drawPanes() {
    if (this.tab !== "tune") return;
    const {a, b, c} = this.panes;
    this.drawWell(a, this.flick ? this.b : this.a, this.swipe === undefined ? null : this.b);
    this.drawWell(b, this.b, null);
    this.drawThird(c);
    c.facts.title = c.facts.textContent;
  }

  letter(well) { return well === this.a ? "A" : "B"; }
  name(frame) { return frame.status === "reference" ? "reference" : `${this.about.models[frame.model].name}`; }

  // A number for each frame ever shown.
  stamp(frame) {
    this.stamps ||= new WeakMap();
    if (!this.stamps.has(frame)) this.stamps.set(frame, this.stampCount = (this.stampCount || 0) + 1);
    return this.stamps.get(frame);
  }

  drawWell(pane, well, over) {
    const context = this.fit(pane.canvas), {width, height} = pane.canvas, frame = well.frame, tones = this.tones(well);
    // Everything that the pane depends on: painting is dear where there is no graphics card.
    const key = JSON.stringify([well.slot, frame && this.stamp(frame), over?.frame ? [this.stamp(over.frame), this.swipe] : 0, this.part, tones.slice(0, 2), this.own,
      this.inverted, this.view, this.cursor, this.roi, width, height, well.error, this.matches(well)]);
    if (key === pane.key) return;
    pane.key = key;
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    pane.title.textContent = this.letter(well);
    pane.title.className = well === this.a ? "is-a" : "is-b";
    pane.error.hidden = !well.error;
    pane.error.textContent = well.error || "";
    if (!frame) { pane.what.textContent = "…"; pane.chip.textContent = pane.facts.textContent = ""; return; }
    const paint = (picture, f, tones) => this.drawImage(context, picture.paint(this.plane(f), f.width, f.height, ...tones,
      `${this.stamp(f)}|${this.part}|${tones.slice(0, 2)}|${this.inverted}`));
    paint(pane.picture, frame, tones);
    if (over?.frame) {
      const x = this.swipe * width;
      context.save();
      context.beginPath();
      context.rect(x, 0, width - x, height);
      context.clip();
      context.fillRect(x, 0, width - x, height);
      paint(pane.other, over.frame, this.tones(over));
      context.restore();
      context.fillStyle = "#f0a23c";
      context.fillRect(x - 1, 0, 2, height);
    }
    this.overlay(context, pane, this.plane(frame), this.scaleText(well));
    // The caption belongs to the pixels, not to the slider: what is drawn is what is named.
    pane.what.textContent = `${this.name(frame)}${Object.keys(frame.dials).length && frame.status !== "reference" ? " " + words(frame.dials) : ""}`;
    if (over?.frame) pane.what.textContent += ` | B ${this.name(over.frame)}${over.frame.status === "reference" ? "" : " " + words(over.frame.dials)}`;
    pane.what.title = pane.what.textContent;
    const rough = frame.kind !== "exact";
    pane.chip.textContent = rough ? "preview" : this.matches(well) || well.truth ? "exact" : "exact, earlier setting";
    pane.chip.className = `chip ${rough ? "rough" : "fine"}`;
    const range = this.rangeOf(frame);
    pane.chip.title = rough && range ? `rebuilt from ${range.rank} components; worst error ${range.facts.worst_db?.toFixed(0)} dB below the maximum` : "";
    const metrics = Object.entries(frame.metrics || {}).map(([n, v]) => `${this.about.metrics[n].label} ${this.digits(n, v)}`);
    pane.facts.textContent = [...metrics.slice(0, 3), frame.residual != null ? `residual ${(100 * frame.residual).toFixed(2)} %` : null,
      frame.status && frame.status !== "converged" && frame.status !== "reference" ? `not converged: ${frame.status}` : null].filter(Boolean).join(" · ");
  }

  digits(name, v) { return v === null || !Number.isFinite(v) ? "–" : this.about.metrics[name].unit === "dB" ? `${v.toFixed(2)}` : v.toFixed(4); }

  drawThird(pane) {
    const context = this.fit(pane.canvas), {width, height} = pane.canvas;
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    pane.chip.textContent = pane.what.textContent = pane.facts.textContent = "";
    const span = this.window ? this.window.hi - this.window.lo : 1, [h0, w0] = this.about.shape;
    if (this.third === "profile") return this.drawProfile(context, pane);
    if (this.third === "matters") {
      const range = this.rangeOf(this.a.want);
      if (!range) { pane.facts.textContent = numeric(this.dials()).length ? this.unmade || "the range is being made" : "nothing to set, nothing that changes"; return; }
      const top = .1 * span / this.gain, map = range.map();
      this.drawImage(context, pane.picture.paint(map, w0, h0, 0, top, CIVIDIS, ""));
      this.overlay(context, pane, map, `0 … ${top.toPrecision(2)}`);
      pane.facts.textContent = "standard deviation over the whole range of the dials; drag across for contrast";
      return;
    }
    const one = this.a.frame, two = this.third === "error" ? this.truth : this.b.frame;
    if (this.third === "error" && !two && this.open && !this.askedTruth) {
      this.askedTruth = true;
      this.send("reference", this.a.want);
      setTimeout(() => { this.askedTruth = false; }, 2000);
    }
    if (!one || !two) return;
    const phase = this.part === "phase", d = minus(this.plane(one), this.plane(two), this.part);
    const rms = Math.sqrt(d.reduce((sum, v) => sum + v * v, 0) / d.length), top = (phase ? .25 * Math.PI : .1 * span) / this.gain;
    this.drawImage(context, pane.picture.paint(d, w0, h0, -top, top, SIGNED, ""));
    this.overlay(context, pane, d, `±${top.toPrecision(2)}${phase ? " rad" : ""}`);
    pane.chip.textContent = one.kind === "exact" && two.kind === "exact" ? "exact" : "preview";
    pane.chip.className = `chip ${pane.chip.textContent === "exact" ? "fine" : "rough"}`;
    pane.facts.textContent = phase ? `rms ${rms.toPrecision(2)} rad, background included; orange: A is ahead, blue: behind, black: equal`
      : `rms ${(100 * rms / span).toFixed(2)} % of the window; orange: A is ${this.part === "magnitude" ? "brighter, blue: darker" : "higher, blue: lower"}, black: equal`;
  }

  // One row of A, B and the reference, that under the pointer; through the window that the images have.
  drawProfile(context, pane) {
    const {width, height} = pane.canvas, [h0, w0] = this.about.shape, r = devicePixelRatio || 1, [lo, hi] = this.tones();
    if (this.cursor && this.cursor.y >= 0 && this.cursor.y < h0) this.row0 = this.cursor.y;
    const row = this.row0 ?? h0 >> 1, s = this.scaleOf(pane.canvas);
    const lines = [["reference", this.truth, "#9aa0a8"], ["B", this.b.frame, "#5aa9f0"], ["A", this.a.frame, "#f0a23c"]].filter(([name, f]) => f && !(name === "B" && this.b.truth));
    context.lineJoin = "round";
    context.font = `${12 * r}px system-ui, sans-serif`;
    lines.forEach(([name, frame, colour], k) => {
      const plane = this.plane(frame);
      context.beginPath();
      for (let x = 0; x < w0; x++) context[x ? "lineTo" : "moveTo"](s.left + (x + .5) * s.x, height * (.95 - .9 * (plane[row * w0 + x] - lo) / (hi - lo || 1)));
      Object.assign(context, {lineWidth: 1.4 * r, strokeStyle: colour, fillStyle: colour, textAlign: "right"});
      context.stroke();
      context.fillText(name, width - 8 * r, (18 + 16 * k) * r);
    });
    pane.scale = `row ${row}`;
    pane.facts.textContent = `row ${row}, that under the pointer; ${shown(lo)} … ${shown(hi)} from bottom to top; across as the images`;
  }

  // Letters, window, zoom and the value under the pointer: painted with the pixels, so that they cannot disagree.
  overlay(context, pane, plane, scale) {
    pane.scale = scale;
    const {width, height} = context.canvas, r = devicePixelRatio || 1, letters = this.about.letters;
    context.font = `${12 * r}px system-ui, sans-serif`;
    context.lineWidth = 3 * r;
    context.lineJoin = "round";
    context.strokeStyle = "rgba(0,0,0,.8)";
    context.fillStyle = "#e9e9ea";
    const text = (t, x, y, align) => { context.textAlign = align; context.strokeText(t, x, y); context.fillText(t, x, y); };
    if (letters) {
      text(letters[0], 8 * r, height / 2, "left");
      text(letters[1], width - 8 * r, height / 2, "right");
      text(letters[2], width / 2, 16 * r, "center");
      text(letters[3], width / 2, height - 8 * r, "center");
    }
    text(scale, 8 * r, height - 8 * r, "left");
    const s = this.scaleOf(context.canvas);
    text(`${(s.x / r).toFixed(1)}×`, width - 8 * r, height - 8 * r, "right");
    pane.measured = this.roi && moments(this.roiPixels.map(i => plane[i]));
    if (this.roi) {
      const {x, y, r: radius} = this.roi, {mean, sd, count} = pane.measured;
      text(`${mean.toPrecision(3)} ± ${sd.toPrecision(2)}  (${count} px)`, width - 8 * r, 16 * r, "right");
      for (const [line, colour] of [[3, "#000"], [1.5, "#7fd08a"]]) {
        context.beginPath();
        context.ellipse(s.left + (x + .5) * s.x, s.top + (y + .5) * s.y, radius * s.x, radius * s.y, 0, 0, 2 * Math.PI);
        Object.assign(context, {lineWidth: line * r, strokeStyle: colour});
        context.stroke();
      }
      Object.assign(context, {lineWidth: 3 * r, strokeStyle: "rgba(0,0,0,.8)"});
    }
    const p = this.cursor;
    if (!p || p.x < 0 || p.y < 0 || p.x >= s.width || p.y >= s.height) return;
    text(`(${p.y}, ${p.x})  ${shown(plane[p.y * s.width + p.x])}`, 8 * r, 16 * r, "left");
    const x = s.left + (p.x + .5) * s.x, y = s.top + (p.y + .5) * s.y;
    context.lineWidth = r;
    context.strokeStyle = "rgba(240,162,60,.9)";
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { context.moveTo(x + 4 * r * dx, y + 4 * r * dy); context.lineTo(x + 10 * r * dx, y + 10 * r * dy); }
    context.stroke();
  }

  // The pad: two dials across and up before a map, or one dial under its curve. Marks keep off the rim.
  margin() { return this.axes().length > 1 ? {left: 12, right: 12, top: 12, bottom: 12} : {left: 12, right: 12, top: 14, bottom: 14}; }

  // Change can be counted from B only where B is of the same method; else from the method's own setting.
  comparable() { return !this.b.truth && this.rangeKey(this.b.want.model, this.slice, this.b.want.dials) === this.rangeKey(this.a.want.model, this.slice, this.a.want.dials); }
  changeName() { return this.comparable() ? "change against B" : "change against the default"; }

  // What lies behind the dials: a number for a place on the pad, NaN where it is not known yet.
  behind(range) {
    const kind = this.ground.value;
    if (!range || kind === "none") return null;
    if (kind === "change") {
      const origin = range.weights(range.at(this.comparable() ? this.b.want.dials : this.starts(this.a.want.model)));
      return p => range.distance(range.weights(p), origin);
    }
    if (kind === "spread") return p => p.reduce((sum, _, d) => {
      const [q, s] = [-.02, .02].map(e => p.map((v, k) => k === d ? clamp(v + e) : v));
      return sum + range.distance(range.weights(q), range.weights(s)) / Math.abs(s[d] - q[d]) / 10;
    }, 0);
    if (kind.startsWith("roi")) {
      if (!this.roi) return null;
      if (range.probed?.roi !== this.roi) range.probed = {roi: this.roi, known: new Map()};
      const {known} = range.probed;
      return p => {
        const place = p.join();
        if (!known.has(place)) known.set(place, range.probe(p, this.roiPixels));
        return known.get(place)[kind.slice(4)];
      };
    }
    return range.scores?.values[kind] ? p => range.score(kind, p) : null;
  }

  // A number of a landscape, in its unit.
  amount(kind, v) {
    if (!Number.isFinite(v)) return "–";
    if (this.about.metrics[kind]) return this.digits(kind, v);
    return kind === "residual" ? `${(100 * v).toFixed(2)} %` : kind.startsWith("roi") ? shown(v) : `${(100 * v / (this.window?.hi || 1)).toFixed(1)} % of white`;
  }

  // A full place (all numeric dials) from one on the pad.
  place(range, spot) {
    const at = range.at(this.a.want.dials);
    this.axes().forEach((n, k) => { at[range.names.indexOf(n)] = spot[k]; });
    return at;
  }

  drawPad() {
    const names = this.axes();
    for (const [name, row] of Object.entries(this.rowsOf)) {
      const weight = row.weight !== undefined, value = weight ? this.weights()[row.weight] : this.a.want.dials[name];
      if (row.menu) row.menu.value = value;
      else {
        row.slider.value = weight ? value : position(this.dials()[name], value);
        if (document.activeElement !== row.out) row.out.value = weight ? shown(value) : String(Number(value.toPrecision(4)));
      }
    }
    this.legend.hidden = true;
    if (!names.length || this.padCanvas.hidden) return;
    for (const o of this.ground.options) if (o.value === "change") o.textContent = this.changeName();
    this.padCanvas.classList.toggle("line", names.length === 1);
    const context = this.fit(this.padCanvas), r = devicePixelRatio || 1, {width, height} = this.padCanvas, m = this.margin();
    const box = {x: m.left * r, y: m.top * r, w: width - (m.left + m.right) * r, h: height - (m.top + m.bottom) * r};
    context.fillStyle = "#0b0c0e";
    context.fillRect(0, 0, width, height);
    const range = this.rangeOf(this.a.want), f = this.behind(range), two = names.length > 1;
    this.curve = null;
    if (f && two) this.drawGround(context, box, range, f);
    if (f && !two) this.drawCurve(context, box, range, f);
    if (!f) {
      context.fillStyle = "#9aa0a8";
      context.font = `${12 * r}px system-ui, sans-serif`;
      context.textAlign = "center";
      const why = this.ground.value === "none" ? "" : this.ground.value.startsWith("roi") && range ? "draw a circle: ROI, or alt+drag" : this.link.offline || range?.final ? "not known without a reference" : this.unmade || (this.rangeWaits && "after the first image") || "the range is being made …";
      context.fillText(why, width / 2, height / 2 - 14 * r);
    }
    const spot = where => {
      const x = box.x + where[0] * box.w;
      return [x, two ? box.y + (1 - where[1]) * box.h : this.curve ? this.curve(where[0]) : box.y + box.h / 2];
    };
    const where = dials => names.map(n => position(this.dials()[n], dials[n]));
    const mark = (where, draw) => { const [x, y] = spot(where); draw(x, y); };
    const outlined = (fill, path) => { context.beginPath(); path(); context.lineWidth = 3 * r; context.strokeStyle = "#000"; context.stroke(); context.fillStyle = fill; context.fill(); };
    const label = (text, x, y, fill) => {
      context.font = `600 ${12 * r}px system-ui, sans-serif`;
      context.textAlign = "center";
      context.lineWidth = 3.5 * r;
      context.strokeStyle = "#000";
      context.strokeText(text, x, y);
      context.fillStyle = fill;
      context.fillText(text, x, y);
    };
    context.fillStyle = "rgba(240,162,60,.55)";
    for (const t of this.trail.slice(-24)) mark(where(t), (x, y) => context.fillRect(x - r, y - r, 2 * r, 2 * r));
    const best = range && this.about.reference && range.best(this.about.metrics[this.ground.value] ? this.ground.value : "psnr", this.about.metrics[this.ground.value]?.higher ?? true);
    if (best) mark(names.map(n => best.where[range.names.indexOf(n)]), (x, y) => outlined("#ffea46", () => {
      for (let i = 0; i < 10; i++) { const a = Math.PI * (i / 5 - .5), q = (i % 2 ? 3.2 : 8) * r; context[i ? "lineTo" : "moveTo"](x + q * Math.cos(a), y + q * Math.sin(a)); }
      context.closePath();
    }));
    this.gallery.forEach((g, i) => mark(where(g.want.dials), (x, y) => label(String(i + 1), two ? x + (x > width - 24 * r ? -9 : 9) * r : x, two ? y + 4 * r : height - (i % 2 ? 4 : 16) * r, "#e9e9ea")));
    for (const k of this.kept) if (k.model === this.a.want.model) mark(where(k.dials), (x, y) => outlined("#7fd08a", () => {
      context.moveTo(x, y - 6 * r); context.lineTo(x + 6 * r, y); context.lineTo(x, y + 6 * r); context.lineTo(x - 6 * r, y); context.closePath();
    }));
    if (!this.b.truth && this.b.want.model === this.a.want.model) mark(where(this.b.want.dials), (x, y) => label("B", x, y + 4 * r, "#5aa9f0"));
    mark(where(this.a.want.dials), (x, y) => {
      for (const [width, colour] of [[4, "#000"], [2, "#f0a23c"]]) {
        context.beginPath();
        context.arc(x, y, 7 * r, 0, 2 * Math.PI);
        context.lineWidth = width * r;
        context.strokeStyle = colour;
        context.stroke();
      }
    });
    if (two) {
      context.fillStyle = "#9aa0a8";
      label(`${names[0]} →`, box.x + box.w - 30 * r, height - 3 * r, "#b8bdc4");
      label(`↑ ${names[1]}`, box.x + 30 * r, 12 * r, "#b8bdc4");
    }
  }

  drawGround(context, box, range, f) {
    const n = this.ground.value.startsWith("roi") ? 17 : 48, stamp = `${this.ground.value}|${keyOf(this.b.want)}|${this.b.truth}|${range.facts.settings}|${!!range.scores}|${this.axes()}|${range.names.length > 2 ? keyOf(this.a.want) : ""}`;
    if (this.groundStamp !== stamp) {
      const values = Float32Array.from({length: n * n}, (_, i) => f(this.place(range, [(i % n) / (n - 1), 1 - Math.floor(i / n) / (n - 1)])));
      const good = values.filter(Number.isFinite), lo = Math.min(...good), hi = Math.max(...good);
      const lower = this.about.metrics[this.ground.value]?.higher === false || this.ground.value === "residual";
      this.groundPicture ||= new Picture();
      this.groundPicture.paint(values, n, n, lo, hi, lower ? CIVIDIS.slice().reverse() : CIVIDIS, "");
      this.legend.replaceChildren(h("span", {}, this.amount(this.ground.value, lo)), h("i", {className: lower ? "reversed" : ""}), h("span", {}, this.amount(this.ground.value, hi)));
      this.groundStamp = stamp;
    }
    this.legend.hidden = false;
    context.imageSmoothingEnabled = true;
    context.drawImage(this.groundPicture.canvas, box.x, box.y, box.w, box.h);
  }

  drawCurve(context, box, range, f, {label = true} = {}) {
    const r = devicePixelRatio || 1, n = 65, values = Array.from({length: n}, (_, i) => f([i / (n - 1)]));
    const good = values.filter(Number.isFinite), lo = Math.min(...good), hi = Math.max(...good), span = hi - lo || 1;
    const top = box.y + 16 * r, tall = box.h - 36 * r, y = v => top + (1 - (v - lo) / span) * tall;
    context.beginPath();
    values.forEach((v, i) => context[i ? "lineTo" : "moveTo"](box.x + i / (n - 1) * box.w, y(v)));
    context.lineWidth = 1.6 * r;
    context.strokeStyle = "#b8bdc4";
    context.stroke();
    const curve = {y: p => y(f([p])), level: y, lo, hi};
    if (!label) return curve;
    this.curve = curve.y;
    context.font = `${11 * r}px system-ui, sans-serif`;
    context.fillStyle = "#9aa0a8";
    const name = this.ground.selectedOptions[0]?.textContent || "", metric = this.about.metrics[this.ground.value];
    context.textAlign = "left";
    context.fillText(metric ? `${name}, ${metric.higher ? "higher" : "lower"} is better` : name, 8 * r, 14 * r);
    context.textAlign = "right";
    const [low, high] = [lo, hi].map(v => this.amount(this.ground.value, v));
    context.fillText(`${low} … ${high}`, context.canvas.width - 8 * r, 14 * r);
    return curve;
  }

  // What is going on, one line each. A line stays the same element: a button that is replaced under the pointer takes no click.
  workLine(id, text, label, act) {
    let line = this.work.querySelector(`[data-line=${id}]`);
    if (!line) this.work.append(line = h("div", {"data-line": id, className: label ? "" : "soft"}, h("span"), label ? h("button", {type: "button", onclick: act}, label) : null));
    line.hidden = !text;
    if (text && line.firstChild.textContent !== text) line.firstChild.textContent = `${text} `;
  }

  drawFacts() {
    const f = this.a.frame, model = this.about.models[this.a.want.model];
    const parts = [`${this.about.coils} coil${this.about.coils > 1 ? "s" : ""}, ${this.about.acceleration.toFixed(1)}× measured`];
    if (f) parts.push(f.kind === "exact" ? `exact in ${f.seconds < 1 ? Math.round(1000 * f.seconds) + " ms" : f.seconds.toFixed(1) + " s"}` : `preview${this.link.offline ? `, worst error ${this.link.worst} dB` : ""}`);
    this.factsLine.textContent = parts.join(" · ");
    for (const [id, well] of [["a", this.a], ["b", this.b]]) {
      const bar = this.panes[id].bar, waits = well.number && this.open && performance.now() - well.since > 400;
      bar.hidden = !waits;
      if (waits) {
        const took = (performance.now() - well.since) / 1000, usual = this.seconds.get(this.rangeKey(well.want.model, "", well.want.dials)) || 0;
        bar.firstChild.style.width = `${usual ? Math.min(97, 100 * took / usual) : 50}%`;
        this.dirty.add("facts");
        setTimeout(() => this.later(), 100);
      }
    }
    this.residual.replaceChildren();
    const noise = this.noise = f?.noise ?? this.noise;
    if (f?.residual != null) {
      const ratio = noise ? f.residual / noise : null;
      this.residual.append(h("div", {}, `data residual ${(100 * f.residual).toFixed(2)} %`, ratio ? ` = ${ratio.toFixed(2)} × the noise` : ""));
      if (ratio) {
        const dot = h("i");
        dot.style.left = `${100 * clamp(ratio / 2)}%`;
        this.residual.append(h("div", {className: "scale", title: "residual over expected noise: below 1 the image fits noise, far above 1 it misses data"}, dot),
          h("div", {className: "ends"}, h("span", {}, "fits noise"), h("span", {}, "1"), h("span", {}, "misses data")));
      }
    }
    const p = this.progressing, c = this.choosing, range = this.rangeOf(this.a.want), each = ({each}) => each < 1 ? `${Math.round(1000 * each)} ms each` : `${each.toFixed(1)} s each`;
    const busy = this.a.number && performance.now() - this.a.since > 400;
    const unmade = this.unmade && !p && !range?.final && numeric(this.dials()).length;
    this.workLine("range", p && `making the range${p.final ? ", finer" : ""}: ${p.done} settings, ${each(p)}`, "stop and keep", () => this.stop("range"));
    this.workLine("choose", c && (c.done ? `choosing: ${c.done} settings tried, ${each(c)}` : p ? "choosing, after the range" : "choosing …"), "stop", () => this.stop("choose"));
    this.workLine("exact", busy && `exact image of ${model.name}: ${((performance.now() - this.a.since) / 1000).toFixed(1)} s`, "stop, keep the preview", () => this.stop("a"));
    this.workLine("unmade", unmade && this.unmade, "make it", () => { this.askRange(this.a.want, 0, true); this.redraw(); });
    this.workLine("facts", range && !p && `preview from ${range.facts.settings} settings, ${range.rank} components; worst error ${range.facts.worst_db?.toFixed(0) ?? "–"} dB below the maximum`);
    const picked = this.picked?.key === keyOf(this.a.want);
    this.pickedText.hidden = !picked;
    if (picked) this.pickedText.textContent = this.picked.text;
  }

  drawTiles() {
    if (this.tab !== "tune" || !this.gallery.length) return;
    const range = this.rangeOf(this.a.want);
    if (!range) return;
    const [lo, hi, lut] = this.tones(), [height, width] = this.about.shape;
    for (const g of this.gallery) {
      g.data ||= range.rebuild(g.where);
      g.planes ||= {};
      g.planes[this.part] ||= planeOf(g.data, this.part);
      const context = this.fit(g.canvas), key = `${this.part}|${lo}|${hi}|${this.inverted}|${JSON.stringify(this.view)}|${g.canvas.width}`;
      g.root.classList.toggle("here", keyOf(g.want) === keyOf({...this.a.want, slice: g.want.slice}));
      if (g.key === key) continue;
      g.key = key;
      context.fillStyle = "#000";
      context.fillRect(0, 0, g.canvas.width, g.canvas.height);
      this.drawImage(context, g.picture.paint(g.planes[this.part], width, height, lo, hi, lut, `${this.part}|${lo}|${hi}|${this.inverted}`));
    }
  }

  // ---------------------------------------------------------- the other tabs

  show(tab) {
    this.tab = tab;
    for (const [name, section] of Object.entries(this.sections)) section.hidden = name !== tab;
    for (const b of this.tabBar.children) {
      const name = b.dataset.tab;
      b.classList.toggle("on", name === tab);
      b.hidden = (name === "uncertainty" && !this.uncertain()) || (name === "landscape" && !numeric(this.dials()).length) || (this.link.offline && ["methods", "k-space", "uncertainty"].includes(name));
    }
    ({methods: () => this.buildMethods(), "k-space": () => this.buildKspace(), report: () => this.buildReport(), landscape: () => this.buildLandscape(),
      uncertainty: () => this.buildUncertainty()})[tab]?.();
    this.redraw();
  }

  drawTab() {
    const std = [...this.tabBar.children].find(b => b.dataset.tab === "uncertainty");
    std.hidden = !this.uncertain();
    [...this.tabBar.children].find(b => b.dataset.tab === "landscape").hidden = !numeric(this.dials()).length;
    ({methods: () => this.drawMethods(), landscape: () => this.drawLandscape(), uncertainty: () => this.drawUncertainty(), "k-space": () => this.drawKspace()})[this.tab]?.();
  }

  // Whether A gives a variance, or did at another setting of its numbers.
  uncertain() {
    const {frame, want} = this.a;
    if (frame?.arrays?.std) this.gives = this.rangeKey(frame.model, "", frame.dials);
    return !!frame?.arrays?.std || this.gives === this.rangeKey(want.model, "", want.dials);
  }

  buildLandscape() {
    const section = this.sections.landscape, names = [...Object.keys(this.about.metrics), "residual", "change", ...(this.roi ? ["roi-mean", "roi-sd"] : [])];
    this.land = names.map(kind => {
      const canvas = h("canvas"), read = h("span", {className: "soft"});
      const metric = this.about.metrics[kind];
      const title = metric ? `${metric.label} ${metric.higher ? "↑" : "↓"}` : kind === "change" ? this.changeName() : {residual: "data residual", "roi-mean": "mean in the ROI", "roi-sd": "standard deviation in the ROI"}[kind];
      const item = {kind, canvas, read, root: h("figure", {title: metric ? `${metric.higher ? "higher" : "lower"} is better` : "not a measure of quality"}, h("figcaption", {}, h("b", {}, title), " ", read), canvas), picture: new Picture()};
      const spot = e => {
        const b = canvas.getBoundingClientRect(), m = this.landMargin();
        return [clamp((e.clientX - b.left - m.left) / (b.width - m.left - m.right)), clamp(1 - (e.clientY - b.top - m.top) / (b.height - m.top - m.bottom))];
      };
      canvas.addEventListener("pointermove", e => this.hover(spot(e)));
      canvas.addEventListener("pointerleave", () => { this.hovering = null; this.redraw(); });
      canvas.addEventListener("click", e => this.turn(Object.fromEntries(this.axes().map((n, k) => [n, valueAt(this.dials()[n], spot(e)[k])]))));
      return item;
    });
    this.crop = h("canvas", {className: "crop"});
    this.cropText = h("figcaption", {}, "");
    section.replaceChildren(h("p", {className: "soft"}, "Point at a place to see its image, click to go there. ",
      this.about.reference ? "★ is the best on this very scan." : "No reference: quality unknown, so there is no star."),
    h("div", {className: "lands"}, h("figure", {}, this.cropText, this.crop), this.land.map(l => l.root)));
    this.cropPicture = new Picture();
  }

  hover(spot) { this.hovering = spot; this.dirty.add("tab"); this.later(); }

  drawLandscape() {
    const range = this.rangeOf(this.a.want), names = this.axes(), r = devicePixelRatio || 1;
    if (!range || !names.length) {
      this.cropText.textContent = names.length ? "the range is being made" : "this method has nothing to set";
      return;
    }
    const kept = this.ground.value, spot = this.hovering || names.map(n => position(this.dials()[n], this.a.want.dials[n]));
    for (const item of this.land) {
      const context = this.fit(item.canvas), {width, height} = item.canvas, m = this.landMargin();
      const box = {x: m.left * r, y: m.top * r, w: width - (m.left + m.right) * r, h: height - (m.top + m.bottom) * r};
      this.ground.value = item.kind;
      const f = this.behind(range), metric = this.about.metrics[item.kind];
      context.fillStyle = "#0b0c0e";
      context.fillRect(0, 0, width, height);
      if (!f) continue;
      const at = s => f(this.place(range, s)), v = at(spot), best = metric && range.best(item.kind, metric.higher);
      item.read.textContent = this.amount(item.kind, v) + (best ? `, best ${this.digits(item.kind, best.value)}` : "");
      let y = null;
      if (names.length > 1) {
        const n = item.kind.startsWith("roi") ? 17 : 48, values = Float32Array.from({length: n * n}, (_, i) => at([(i % n) / (n - 1), 1 - Math.floor(i / n) / (n - 1)]));
        const lower = metric?.higher === false || item.kind === "residual", good = values.filter(Number.isFinite), lo = Math.min(...good), hi = Math.max(...good);
        const lut = lower ? CIVIDIS.slice().reverse() : CIVIDIS;
        item.picture.paint(values, n, n, lo, hi, lut, "");
        context.drawImage(item.picture.canvas, box.x, box.y, box.w, box.h);
        if (metric?.unit === "dB" && best) {
          for (const drop of [.1, .5, 1]) this.isoline(context, box, values, n, best.value - drop, `−${drop}`);
          item.read.textContent += `; ${(100 * good.filter(v => v >= best.value - 1).length / good.length).toFixed(0)} % within 1 dB`;
        }
        this.scaleBar(context, box, lut, [hi, (lo + hi) / 2, lo].map(v => this.amount(item.kind, v).replace(" of white", "")));
      } else {
        const curve = this.drawCurve(context, box, range, p => at(p), {label: false});
        y = curve.y;
        Object.assign(context, {font: `${11 * r}px system-ui, sans-serif`, fillStyle: "#b8bdc4", textAlign: "left"});
        Object.assign(context, {lineWidth: 3 * r, strokeStyle: "#0b0c0e"});
        for (const v of [curve.hi, curve.lo]) for (const how of ["strokeText", "fillText"]) context[how](this.amount(item.kind, v), 6 * r, curve.level(v) - 4 * r);
      }
      this.frameText(context, names);
      const point = s => [box.x + s[0] * box.w, y ? y(s[0]) : box.y + (1 - s[1]) * box.h];
      const glyph = (s, text, colour) => {
        const [px, py] = point(s);
        context.font = `${18 * r}px system-ui, sans-serif`;
        context.textAlign = "center";
        context.lineWidth = 4 * r;
        context.strokeStyle = "#000";
        context.strokeText(text, px, py + 6 * r);
        context.fillStyle = colour;
        context.fillText(text, px, py + 6 * r);
      };
      if (best) glyph(names.map(n => best.where[range.names.indexOf(n)]), "★", "#ffea46");
      glyph(spot, "○", "#f0a23c");
    }
    this.ground.value = kept;
    const context = this.fit(this.crop), [lo, hi, lut] = this.tones(), [height, width] = this.about.shape;
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.crop.width, this.crop.height);
    this.drawImage(context, this.cropPicture.paint(planeOf(range.rebuild(this.place(range, spot)), this.part), width, height, lo, hi, lut, ""));
    this.cropText.textContent = `preview at ${names.map((n, k) => `${n} ${shown(valueAt(this.dials()[n], spot[k]))}`).join(", ")}`;
  }

  // Room for the numbers of the colours beside a map of two dials.
  landMargin() { return {left: 12, right: this.axes().length > 1 ? 66 : 12, top: 12, bottom: 12}; }

  // What the colours of a landscape stand for: highest above, lowest below.
  scaleBar(context, box, lut, texts) {
    const r = devicePixelRatio || 1, x = box.x + box.w + 6 * r;
    this.bar ||= new Picture();
    context.drawImage(this.bar.paint(Float32Array.from({length: 256}, (_, i) => 255 - i), 1, 256, 0, 255, lut, ""), x, box.y, 6 * r, box.h);
    Object.assign(context, {font: `${11 * r}px system-ui, sans-serif`, fillStyle: "#b8bdc4", textAlign: "left"});
    texts.forEach((t, k) => context.fillText(t, x + 9 * r, box.y + k / 2 * (box.h - 11 * r) + 10 * r));
  }

  // The ends of the dials, along the rim of a landscape.
  frameText(context, names) {
    const r = devicePixelRatio || 1, {width, height} = context.canvas, [across, up] = names.map(n => this.dials()[n]);
    Object.assign(context, {font: `${11 * r}px system-ui, sans-serif`, fillStyle: "#b8bdc4", lineWidth: 3 * r, strokeStyle: "#000"});
    const text = (t, x, y, align) => { context.textAlign = align; context.strokeText(t, x, y); context.fillText(t, x, y); };
    text(`${names[0]} → ${shown(across.lo)} ${across.low}`, 6 * r, height - 4 * r, "left");
    text(`${across.high} ${shown(across.hi)}`, width - 6 * r, height - 4 * r, "right");
    if (up) text(`${names[1]} ↑ ${shown(up.hi)} ${up.high}`, 6 * r, 11 * r, "left");
  }

  // Where a surface crosses a level: marching squares, one segment for each cell that it passes.
  isoline(context, box, values, n, level, text) {
    const r = devicePixelRatio || 1, at = (i, j) => values[j * n + i] - level;
    const spot = (i, j) => [box.x + i / (n - 1) * box.w, box.y + j / (n - 1) * box.h];
    let last = null;
    context.beginPath();
    for (let j = 0; j < n - 1; j++) for (let i = 0; i < n - 1; i++) {
      const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]], cuts = [];
      corners.forEach(([x, y], k) => {
        const [u, v] = corners[(k + 1) % 4], a = at(x, y), b = at(u, v);
        if ((a < 0) !== (b < 0)) cuts.push(spot(x + (u - x) * a / (a - b), y + (v - y) * a / (a - b)));
      });
      for (let k = 0; k + 1 < cuts.length; k += 2) { context.moveTo(...cuts[k]); context.lineTo(...cuts[k + 1]); if (!last || cuts[k][0] > last[0]) last = cuts[k]; }
    }
    context.lineWidth = 1.2 * r;
    context.strokeStyle = "rgba(255,255,255,.85)";
    context.stroke();
    if (last) { context.font = `${11 * r}px system-ui, sans-serif`; context.fillStyle = "#fff"; context.textAlign = "right"; context.fillText(text, last[0] - 3 * r, last[1] - 3 * r); }
  }

  // Whatever the method of A is: as soon as it gives a variance, this tab shows it.
  buildUncertainty() {
    const figure = (title, ...more) => {
      const item = {canvas: h("canvas"), text: h("div", {className: "facts"}), picture: new Picture(), over: new Picture(), scale: ""};
      item.root = h("figure", {}, h("figcaption", {}, h("b", {}, title), more), h("div", {className: "frame"}, item.canvas), item.text);
      item.canvas.addEventListener("pointermove", e => { const box = item.canvas.getBoundingClientRect(); this.cursor = this.pixelAt(item.canvas, e.clientX - box.left, e.clientY - box.top); this.redraw(); });
      item.canvas.addEventListener("pointerleave", () => { this.cursor = null; this.redraw(); });
      return item;
    };
    const limit = h("input", {type: "range", min: 0, max: 1, step: .01, value: 1, "aria-label": "threshold of the standard deviation", oninput: e => { this.std.limit = Number(e.target.value); this.redraw(); }});
    const std = this.std = {limit: 1, mean: figure("estimate", h("label", {className: "soft", title: "in colour: where the standard deviation lies above this"}, "colour above ", limit)), map: figure("standard deviation"),
      error: figure("|A − reference|, same colours"), text: h("p", {}), table: h("table")};
    const step = by => { std.draw += by; this.redraw(); };
    std.cine = h("input", {type: "checkbox", onchange: () => this.cine()});
    std.draws = figure("draws", h("button", {type: "button", title: "the one before", onclick: () => step(-1)}, "‹"), h("button", {type: "button", title: "the next", onclick: () => step(1)}, "›"),
      h("label", {className: "soft"}, std.cine, " 3 a second"));
    std.draw = 0;
    std.error.root.hidden = !this.about.reference || !!this.link.offline;
    this.sections.uncertainty.replaceChildren(h("div", {className: "row"}, std.mean.root, std.map.root, std.draws.root, std.error.root), std.text, std.table);
    if (this.about.reference && this.truth?.slice !== this.slice) this.send("reference", this.a.want);
  }

  // Draws from the posterior in turn, as long as the tab is open.
  cine() {
    clearInterval(this.cineTimer);
    if (!this.std.cine.checked) return;
    this.cineTimer = setInterval(() => {
      if (this.tab !== "uncertainty") return clearInterval(this.cineTimer);
      this.std.draw += 1;
      this.redraw();
    }, 333);
  }

  drawUncertainty() {
    const frame = this.a.frame, sd = frame?.arrays?.std, ui = this.std;
    ui.text.hidden = ui.table.hidden = !sd;
    if (!sd) { ui.map.text.textContent = "still being made; what is seen, if anything, belongs to the setting before"; return; }
    const [lo, hi, lut] = this.tones(), top = quantile(sd, .995) || 1, {width, height} = frame, p = this.cursor;
    const draw = (item, plane, ...tones) => {
      const context = this.fit(item.canvas);
      context.fillStyle = "#000";
      context.fillRect(0, 0, item.canvas.width, item.canvas.height);
      this.drawImage(context, item.picture.paint(plane, width, height, ...tones, ""));
      return context;
    };
    const magnitude = planeOf(frame.data, "magnitude"), context = draw(ui.mean, this.plane(frame), lo, hi, lut);
    const limit = ui.limit * top, some = ui.limit < 1, within = p && p.x >= 0 && p.y >= 0 && p.x < width && p.y < height, i = within ? p.y * width + p.x : -1;
    if (some) {
      const colours = CIVIDIS.slice();
      colours[0] = 0;  // nothing below the threshold
      this.drawImage(context, ui.mean.over.paint(sd.map(v => v < limit ? -1 : v), width, height, 0, top, colours, ""));
    }
    ui.mean.text.textContent = within ? `(${p.y}, ${p.x})  ${shown(magnitude[i])} ± ${shown(sd[i])}` : some ? `in colour: standard deviation above ${shown(limit)}` : "point at a place to read it";
    this.overlay(draw(ui.map, sd, 0, top, CIVIDIS), ui.map, sd, `0 … ${shown(top)}`);
    ui.map.text.textContent = "spread under this method's prior and noise model, not the error";
    const {samples} = frame.arrays, count = samples ? samples.shape[0] : 0, k = ((ui.draw % count) + count) % count;
    ui.draws.root.hidden = !count;
    if (count) {
      const one = samples.subarray(k * width * height, (k + 1) * width * height);
      this.overlay(draw(ui.draws, one, ...(this.part === "magnitude" ? [lo, hi, lut] : [0, quantile(magnitude, .995), GREY])), ui.draws, one, `${k + 1} of ${count}`);
      ui.draws.text.textContent = "what comes and goes between draws is not in the data";
    }
    const truth = this.truth?.slice === this.slice ? planeOf(this.truth.data, "magnitude") : null;
    if (truth) {
      const error = magnitude.map((v, k) => Math.abs(v - truth[k]));
      this.overlay(draw(ui.error, error, 0, top, CIVIDIS), ui.error, error, `0 … ${shown(top)}`);
      // Where there is signal: outside it both are next to nothing.
      const floor = .05 * quantile(truth, .995), share = k => {
        let inside = 0, all = 0;
        truth.forEach((v, j) => { if (v > floor) { all += 1; if (error[j] <= k * sd[j]) inside += 1; } });
        return (100 * inside / (all || 1)).toFixed(0);
      };
      ui.error.text.textContent = `within 1 sd: ${share(1)} % of the pixels with signal, 2 sd: ${share(2)} % (normal errors: 68, 95)`;
    }
    ui.text.textContent = `${this.name(frame)} ${words(frame.dials)}`;
    ui.table.replaceChildren(...this.counted(frame));
  }

  // What a method counted on its way, one number to a line.
  counted(frame) {
    const flat = Object.entries(frame?.stats || {}).flatMap(([k, v]) => v && typeof v === "object" && !Array.isArray(v) && k !== "certificate" ? Object.entries(v) : [[k, v]]);
    const rows = flat.filter(([, v]) => v === null || typeof v !== "object" || (Array.isArray(v) && v.length < 9 && v.every(x => typeof x !== "object")));
    return rows.map(([k, v]) => h("tr", {}, h("th", {}, k.replaceAll("_", " ")), h("td", {}, [v].flat().map(x => typeof x === "number" ? shown(x) : String(x ?? "–")).join(", "))));
  }

  buildMethods() {
    const head = h("div", {className: "soft"}, "One window, one zoom, one scale of differences for all. ",
      h("label", {}, h("input", {type: "checkbox", checked: !!this.blind, onchange: e => {
        this.blind = e.target.checked;
        this.order = this.blind ? this.rows.map((_, i) => i).sort(() => Math.random() - .5) : null;
        this.buildMethods();
      }}), " hide names and shuffle, for a fair look"), " ",
      h("label", {}, h("input", {type: "checkbox", checked: !!this.locked, onchange: e => { this.locked = e.target.checked; }}), " move dials of the same name together"));
    const order = this.order || this.rows.map((_, i) => i);
    this.methodRows = order.map(i => {
      const row = this.rows[i], dials = this.dials(i), item = {row, image: h("canvas"), error: h("canvas"), pictures: [new Picture(), new Picture()],
        name: h("b", {}, this.blind ? `method ${order.indexOf(i) + 1}` : this.about.models[i].name), text: h("div", {className: "facts"}), values: {}, sliders: {},
        stop: h("button", {type: "button", hidden: true, onclick: () => this.stop(row.slot)}, "stop")};
      const controls = numeric(dials).map(n => {
        item.values[n] = h("span", {className: "soft"});
        return h("label", {className: "dial"}, h("span", {}, this.blind ? "dial " : `${n} `, item.values[n]), item.sliders[n] = h("input", {type: "range", min: 0, max: 1, step: "any", value: position(dials[n], row.want.dials[n]),
          "aria-label": `${n} of ${this.about.models[i].name}`, oninput: e => this.turnRow(row, n, Number(e.target.value))}));
      });
      const go = h("div", {className: "tools"}, h("button", {type: "button", onclick: () => { this.show("tune"); this.go(row.want); }}, "open as A"),
        h("button", {type: "button", onclick: () => { this.b.want = structuredClone(row.want); this.refresh(this.b, 0); this.show("tune"); }}, "open as B"),
        this.about.reference && numeric(dials).length ? h("button", {type: "button", title: "the setting with the best PSNR on this scan", onclick: () => { row.tuning = true; this.rangeOf(row.want)?.scores ? this.atItsBest(row) : this.send("range", row.want); }}, "★ best") : null);
      item.root = h("div", {className: "method"}, h("figure", {}, h("figcaption", {}, item.name), item.image),
        h("figure", {}, h("figcaption", {className: "soft"}, this.about.reference ? "error × 5" : "difference from A × 5"), item.error), h("div", {}, item.text, item.stop, controls, go));
      if (!row.frame || !this.matches(row)) this.refresh(row, 0);
      return item;
    });
    if (this.about.reference && this.truth?.slice !== this.slice) this.send("reference", this.a.want);
    this.sections.methods.replaceChildren(head, ...this.methodRows.map(m => m.root));
  }

  turnRow(row, name, place) {
    for (const {row: other, sliders} of this.methodRows) {
      if (other !== row && !(this.locked && sliders[name])) continue;
      this.turn({[name]: valueAt(this.dials(other.want.model)[name], place)}, {well: other});
      sliders[name].value = place;
    }
  }

  atItsBest(row) {
    row.tuning = false;
    const range = this.rangeOf(row.want), best = range?.best("psnr", true);
    if (best) this.turn(Object.fromEntries(range.names.map((n, d) => [n, valueAt(range.dials[n], best.where[d])])), {well: row});
    if (this.tab === "methods") this.buildMethods();
  }

  drawMethods() {
    const [lo, hi, lut] = this.tones(), other = this.about.reference ? this.truth : this.a.frame;
    for (const {row, image, error, pictures, text, values, stop} of this.methodRows || []) {
      for (const [n, e] of Object.entries(values)) e.textContent = this.blind ? "" : shown(row.want.dials[n]);
      const frame = row.frame, one = this.fit(image), two = this.fit(error);
      for (const c of [one, two]) { c.fillStyle = "#000"; c.fillRect(0, 0, c.canvas.width, c.canvas.height); }
      const busy = row.number && this.open && performance.now() - row.since > 400;
      stop.hidden = !busy;
      if (busy) { this.dirty.add("tab"); setTimeout(() => this.later(), 200); }
      text.textContent = row.error || (busy ? "in work or waiting its turn …" : "");
      if (!frame) continue;
      const x = this.plane(frame), current = this.matches(row);
      this.drawImage(one, pictures[0].paint(x, frame.width, frame.height, lo, hi, lut, ""));
      if (other) {
        const d = minus(x, this.plane(other), this.part), top = (hi - lo) / 5;
        this.drawImage(two, pictures[1].paint(d, frame.width, frame.height, -top, top, SIGNED, ""));
      }
      const metrics = Object.entries(frame.metrics).map(([n, v]) => `${this.about.metrics[n].label} ${this.digits(n, v)}`);
      text.textContent = [row.error, current ? frame.kind : `${frame.kind}, earlier setting${this.blind ? "" : ` ${words(frame.dials)}`}`, ...metrics, frame.residual != null ? `residual ${(100 * frame.residual).toFixed(2)} %` : null,
        frame.seconds !== undefined ? `${frame.seconds.toFixed(2)} s` : null].filter(Boolean).join(" · ");
    }
  }

  askKspace() { this.send("kspace", this.a.want, this.coil ? {coil: Number(this.coil)} : {}); }

  kspace(answer) {
    if (answer.slice !== this.slice || String(answer.coil ?? "") !== (this.coil || "")) return;
    this.spectrum = answer;
    this.redraw();
  }

  buildKspace() {
    const {coils, acceleration} = this.about, view = this.kview;
    const coil = h("select", {onchange: e => { this.coil = e.target.value; this.askKspace(); }}, h("option", {value: ""}, "all coils"),
      Array.from({length: coils}, (_, k) => h("option", {value: k, selected: this.coil === String(k)}, `coil ${k + 1}`)));
    const sampled = h("input", {type: "checkbox", checked: !!this.onlySampled, onchange: e => { this.onlySampled = e.target.checked; this.redraw(); }});
    const pane = title => {
      const item = {canvas: h("canvas"), read: h("span", {className: "soft"}), picture: new Picture()}, c = item.canvas;
      let from = null;
      const at = e => {
        const box = c.getBoundingClientRect(), s = this.scaleOf(c, view, 1), r = devicePixelRatio || 1;
        return {x: Math.floor(((e.clientX - box.left) * r - s.left) / s.x), y: Math.floor(((e.clientY - box.top) * r - s.top) / s.y)};
      };
      const zoom = (to, {x, y}) => {  // the point under the pointer stays there
        const [height, width] = this.about.shape, k = view.zoom / (to = clamp(to, 1, 40));
        Object.assign(view, {zoom: to, x: (x + .5) / width + (view.x - (x + .5) / width) * k, y: (y + .5) / height + (view.y - (y + .5) / height) * k});
        this.redraw();
      };
      c.addEventListener("wheel", e => { e.preventDefault(); zoom(view.zoom * Math.exp(-e.deltaY / 400), at(e)); }, {passive: false});
      c.addEventListener("pointerdown", e => { e.preventDefault(); c.setPointerCapture(e.pointerId); from = {x: e.clientX, y: e.clientY, at: {...view}}; });
      c.addEventListener("pointermove", e => {
        this.kcursor = at(e);
        if (from) {
          const s = this.scaleOf(c, view, 1), r = devicePixelRatio || 1;
          view.x = from.at.x - (e.clientX - from.x) * r / (s.x * s.width);
          view.y = from.at.y - (e.clientY - from.y) * r / (s.y * s.height);
        }
        this.redraw();
      });
      for (const end of ["pointerup", "pointercancel"]) c.addEventListener(end, () => { from = null; });
      c.addEventListener("pointerleave", () => { this.kcursor = null; this.redraw(); });
      c.addEventListener("dblclick", () => { Object.assign(view, {zoom: 1, x: .5, y: .5}); this.redraw(); });
      item.root = h("figure", {}, h("figcaption", {}, h("b", {}, title), item.read), h("div", {className: "frame"}, c));
      return item;
    };
    const rings = h("div", {className: "rings"});
    this.spectrum = null;
    this.kpanes = {image: pane("k-space of A (log)"), misfit: pane("data − A, where sampled (log)"), rings, text: h("p", {})};
    this.sections["k-space"].replaceChildren(h("div", {className: "tools"}, coils > 1 ? coil : null, h("label", {}, sampled, " sampled points only"),
      h("span", {className: "soft"}, `wheel: zoom · drag: move · double click: all · measured acceleration ${acceleration.toFixed(2)}`)),
    h("div", {className: "row"}, this.kpanes.image.root, this.kpanes.misfit.root, rings), this.kpanes.text);
    this.askKspace();
  }

  drawKspace() {
    const s = this.spectrum, panes = this.kpanes;
    if (!s || !panes) return;
    const [height, width] = this.about.shape, {image, misfit, mask} = s.arrays;
    s.top ||= image.reduce((a, b) => Math.max(a, b), 1e-30);
    s.logs ||= Object.fromEntries(Object.entries({image, misfit}).filter(([, plane]) => plane).map(([name, plane]) => [name, Float32Array.from(plane, v => Math.log10(v + s.top * 1e-6))]));
    const high = Math.log10(s.top), p = this.kcursor, inside = p && p.x >= 0 && p.y >= 0 && p.x < width && p.y < height;
    panes.misfit.root.hidden = !misfit;
    for (const [name, lut] of [["image", GREY], ["misfit", BLACK_FIRST]]) {
      const {canvas, picture, read} = panes[name];
      let plane = s.logs[name];
      if (!plane) continue;
      if (mask && (name === "misfit" || this.onlySampled)) plane = (s.masked ||= {})[name] ||= plane.map((v, i) => mask[i] ? v : -Infinity);
      const context = this.fit(canvas);
      context.fillStyle = "#000";
      context.fillRect(0, 0, canvas.width, canvas.height);
      // What was not sampled is black, not the colour of a small number.
      this.drawImage(context, picture.paint(plane, width, height, high - 5, high, lut, `${s.number}|${this.onlySampled}`), this.scaleOf(canvas, this.kview, 1));
      read.textContent = inside ? `(${p.y - (height >> 1)}, ${p.x - (width >> 1)})  ${plane[p.y * width + p.x] === -Infinity ? "not sampled" : shown(s.arrays[name][p.y * width + p.x])}` : "";
    }
    if (this.ringsOf !== s) {
      this.ringsOf = s;
      panes.rings.replaceChildren(...(s.rings ? [this.rings(s.rings)] : []));
      const ratio = s.noise ? s.residual / s.noise : null;
      panes.text.textContent = [`A: ${this.about.models[s.model].name} ${words(s.dials)}${this.about.slices > 1 ? `, slice ${s.slice}` : ""}.`,
        s.residual === null ? "Its data residual is not known" : `Data residual ${(100 * s.residual).toFixed(2)} %`,
        misfit ? "" : "(over the samples along the trajectory: off the grid, there is no picture of it)",
        s.residual === null ? "." : ratio ? `= ${ratio.toFixed(2)} times what noise alone would leave: ${ratio < .8 ? "the image fits noise" : ratio > 1.25 ? "the image misses some of the data" : "as it should be"}.` : "; the noise of this scan is unknown."].join(" ").replace(/ +([.;])/g, "$1");
    }
  }

  // Means over rings around zero frequency: signal, residual, noise.
  rings({signal, misfit, samples, noise}) {
    const canvas = h("canvas", {width: 640, height: 480}), c = canvas.getContext("2d"), used = samples.map((n, i) => n > 0 ? i : -1).filter(i => i >= 0);
    const all = [...used.map(i => signal[i]), ...used.map(i => misfit[i]), noise || 0].filter(v => v > 0), lo = Math.log10(Math.min(...all)) - .2, hi = Math.log10(Math.max(...all)) + .2;
    const x = i => 20 + i / (samples.length - 1) * 600, y = v => 460 - (Math.log10(Math.max(v, 1e-30)) - lo) / (hi - lo) * 440;
    c.fillStyle = "#0b0c0e";
    c.fillRect(0, 0, 640, 480);
    const line = (values, colour, text, dash = []) => {
      c.beginPath();
      c.setLineDash(dash);
      used.forEach((i, k) => c[k ? "lineTo" : "moveTo"](x(i), y(values[i])));
      Object.assign(c, {lineWidth: 2, strokeStyle: colour, fillStyle: colour, font: "18px system-ui, sans-serif"});
      c.stroke();
      c.fillText(text, 440, 40 + 26 * ["image", "residual", "noise"].indexOf(text));
    };
    line(signal, "#e9e9ea", "image");
    line(misfit, "#f0a23c", "residual");
    if (noise) line(signal.map(() => noise), "#5aa9f0", "noise", [8, 6]);
    return h("figure", {}, h("figcaption", {}, h("b", {}, "mean from centre to edge (log)")), canvas);
  }

  // The record of a method that goes down one energy after another.
  descents({levels}) {
    const falls = x => x.every((v, i) => !i || v <= x[i - 1] + 1e-6 * Math.abs(x[i - 1])), cell = v => h("td", {}, v);
    return h("section", {}, h("h3", {}, "Certificate of A"), h("table", {}, h("tr", {}, ["σ", "iterations", "energy, from", "to", "never rises"].map(t => h("th", {}, t))),
      levels.map(({sigma, iterations, objective}) => h("tr", {}, cell(shown(sigma)), cell(String(iterations)), cell(objective[0].toPrecision(6)), cell(objective.at(-1).toPrecision(6)), cell(falls(objective) ? "yes" : "NO")))));
  }

  // The record of a method that proves its descent: the energy after each phase, and which step was taken there.
  certificate() {
    const frame = this.a.frame, c = frame?.stats?.certificate;
    if (Array.isArray(c?.levels)) return this.descents(c);
    if (!Array.isArray(c?.psi) || !Array.isArray(c.branch)) return "";
    const colours = {proposed: "#7fd08a", damped: "#5aa9f0", waited: "#c58fe0", gradient: "#f0a23c", stopped: "#9aa0a8"};
    const canvas = h("canvas", {className: "trace", width: 1520, height: 440, "aria-label": "energy after each phase"}), context = canvas.getContext("2d");
    const psi = c.psi.map(Number), lo = Math.min(...psi), hi = Math.max(...psi), last = psi.length - 1 || 1;
    const x = i => 30 + i / last * 1460, y = v => 400 - (v - lo) / (hi - lo || 1) * 340;
    Object.assign(context, {fillStyle: "#0b0c0e", lineWidth: 3, strokeStyle: "#b8bdc4", font: "24px system-ui, sans-serif"});
    context.fillRect(0, 0, 1520, 440);
    context.beginPath();
    psi.forEach((v, i) => context[i ? "lineTo" : "moveTo"](x(i), y(v)));
    context.stroke();
    psi.forEach((v, i) => {
      context.fillStyle = i ? colours[c.branch[i - 1]] || "#e9e9ea" : "#e9e9ea";
      context.beginPath();
      context.arc(x(i), y(v), 9, 0, 2 * Math.PI);
      context.fill();
    });
    context.fillStyle = "#9aa0a8";
    context.fillText(`Ψ ${psi[0].toPrecision(6)} → ${psi.at(-1).toPrecision(6)}`, 1100, 40);
    const count = name => c.branch.filter(b => b === name).length;
    const legend = Object.entries(colours).filter(([name]) => count(name)).map(([name, colour]) => {
      const word = h("span", {}, `● ${name} ${count(name)}  `);
      word.style.color = colour;
      return word;
    });
    return h("section", {}, h("h3", {}, "Certificate of A"), h("p", {}, c.descent ? "Ψ never rises" : "Ψ rises somewhere: nothing is proved", c.guarded === false ? " (the safeguard is off)" : "",
      `; ‖∇φ‖/√pixels at the end ${Number(c.gradient).toPrecision(3)}. Steps: `, legend), canvas, h("table", {}, this.counted({stats: {...c, psi: {}, branch: {}}})));
  }

  buildReport() {
    const {about} = this, model = about.models[this.a.want.model], button = (text, title, onclick) => h("button", {type: "button", title, onclick}, text);
    const facts = [["scan", about.title], ["provenance", about.provenance], ["scan SHA-256", about.source?.sha256 || ""], ["matrix", about.shape.join(" × ")],
      ["coils, measured acceleration", `${about.coils}, ${about.acceleration.toFixed(3)}`], ["method of A", model.name], ["weights SHA-256", model.sha256 || "none"],
      ["dials of A", Object.entries(this.a.want.dials).map(([n, v]) => `${n}=${v}`).join(" ") || "none"], ["tunemri", about.version], ["command of A", this.command()]];
    this.sections.report.replaceChildren(
      h("div", {className: "tools"}, this.link.offline ? null : button("save HTML", "one file with live dials, without a network", () => { this.send("export", this.a.want); this.say("making the file …"); }),
        button("save PNG", "the panes with their captions", () => { this.show("tune"); requestAnimationFrame(() => this.savePng()); }),
        button("print or PDF", "by your browser", () => print()), button("export kept", "picks.json", () => this.exportKept()), button("copy command", "of pane A", () => this.copyCommand())),
      h("h3", {}, "Kept"), h("ol", {className: "kept"}, this.kept.length ? this.kept.map(k => h("li", {}, `${about.models[k.model].name} ${words(k.dials)}: ${k.note || "no note"}`, h("code", {}, this.command(k)))) : h("li", {className: "soft"}, "nothing yet")),
      this.certificate(), h("h3", {}, "Provenance"), h("table", {}, facts.map(([k, v]) => h("tr", {}, h("th", {}, k), h("td", {}, v)))),
      h("p", {className: "soft"}, "For research: not for diagnosis. Previews are rebuilt from a few components; measurements need the exact image."));
  }

  // ---------------------------------------------------------- taking things away

  async copyCommand() {
    const text = this.command();
    try { await navigator.clipboard.writeText(text); this.say(`copied: ${text}`); } catch { this.say(text); }
  }

  exportKept() {
    if (!this.kept.length) return this.say("nothing kept yet: press k");
    save("picks.json", [this.picks()], "application/json");
  }

  saveNpy() {
    if (this.a.frame?.kind !== "exact" || !this.matches(this.a)) return this.say("the exact image is still being made");
    save("image.npy", npy(this.a.frame.data, [this.a.frame.height, this.a.frame.width]), "application/octet-stream");
  }

  // The three panes as they are, with what they are written beneath; how to make A again is a text in the file.
  async savePng() {
    const shown = Object.values(this.panes).filter(p => p.canvas.width > 1 && p.canvas.offsetParent);
    if (!this.window) return this.say("there is no image yet");
    const strip = 64, width = shown.reduce((sum, p) => sum + p.canvas.width + 8, -8), height = Math.max(...shown.map(p => p.canvas.height)) + strip;
    const canvas = h("canvas", {width, height}), c = canvas.getContext("2d");
    c.fillStyle = "#000";
    c.fillRect(0, 0, width, height);
    let left = 0;
    for (const p of shown) {
      c.drawImage(p.canvas, left, 0);
      c.save();
      c.beginPath();
      c.rect(left, 0, p.canvas.width, height);
      c.clip();
      c.fillStyle = "#e9e9ea";
      c.font = "14px system-ui, sans-serif";
      const title = p === this.panes.c ? THIRD[this.third] : `${p.title.textContent}  ${p.what.textContent}  (${p.chip.textContent})`;
      c.fillText(title, left + 6, p.canvas.height + 20);
      c.fillStyle = "#9aa0a8";
      c.font = "12px system-ui, sans-serif";
      c.fillText(`${p.scale || ""}, ${this.part}  ${p.facts.textContent}`, left + 6, p.canvas.height + 38);
      c.fillText(`${this.about.title}${this.about.slices > 1 ? `, slice ${this.slice}` : ""} · tunemri ${this.about.version} · not for diagnosis`, left + 6, p.canvas.height + 54);
      c.restore();
      left += p.canvas.width + 8;
    }
    const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
    save("tunemri.png", withText(new Uint8Array(await blob.arrayBuffer()), "Command", this.command(this.a.frame || this.a.want)), "image/png");
  }

  exported(answer) { save("range.html", [answer.arrays.html], "text/html"); this.say("saved range.html"); }
}

// ---------------------------------------------------------------- the three hosts

// A websocket on this machine. A lost server is tried again; nothing that was on its way is waited for.
export function webSocket(url) {
  const link = {page: true, send() {}};
  let pause = 250, lost = 0;
  const connect = () => {
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => { pause = 250; lost = 0; link.state(true); };
    socket.onmessage = e => link.answer(unpack(e.data));
    socket.onclose = e => {
      link.send = () => {};
      lost += 1;
      link.state(false, e.code === 1013 ? e.reason : lost > 8 ? "The server is gone. If tunemri view was started again, open its new link." : "");
      setTimeout(connect, pause);
      pause = Math.min(5000, pause * 1.6);
    };
    link.send = message => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); };
    link.drop = () => socket.close();
  };
  link.start = connect;
  return link;
}

// A notebook: anywidget hands over its comm.
export function notebook(model) {
  const link = {send: message => model.send(message)};
  const take = (content, buffers) => {
    const view = buffers[0];
    link.answer(unpack(view.buffer ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : view));
  };
  link.start = () => { model.on("msg:custom", take); link.state(true); model.send({hello: true}); };
  link.end = () => { model.off("msg:custom", take); model.send({bye: true}); };
  return link;
}

// One file: all answers are in the page, packed; dials move by the range alone.
export function embedded(blocks) {
  const link = {page: true, offline: true, send() {}};
  link.start = async () => {
    for (const block of blocks) {
      const bytes = Uint8Array.from(atob(block.textContent.trim()), c => c.charCodeAt(0));
      const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const answer = unpack(await new Response(plain).arrayBuffer());
      if (answer.checked_db !== undefined) link.worst = answer.checked_db === null ? "–" : answer.checked_db.toFixed(0);
      link.answer(answer);
    }
  };
  return link;
}

function begin(root, link) {
  const viewer = new Viewer(root, link);
  link.start();
  return viewer;
}

export default {
  render({model, el}) {
    const root = h("div");
    el.append(root);
    const link = notebook(model);
    begin(root, link);
    return () => link.end();
  },
};

const page = globalThis.document?.getElementById("tunemri");
if (page?.dataset.host === "server") page.viewer = begin(page, webSocket(`ws${location.protocol === "https:" ? "s" : ""}://${location.host}/link`));
if (page?.dataset.host === "file") page.viewer = begin(page, embedded(document.querySelectorAll("script[data-answer]")));

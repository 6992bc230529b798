// The matrix as a heat map: one pixel a pair, painted once a round and scaled to the page.

import { NO_NUMBER, describe } from "./api.js";
import { UNREACHABLE, css, isDark, named, pack, ramp, unknown } from "./colours.js";
import { fitted, make, oncePerFrame } from "./dom.js";

const CELL = 10; // CSS pixels of a pair that is shown larger
const LARGEST = 3000; // CSS pixels: canvases have limits

export class HeatMap {
  /** `onCell(text)` says what the cursor is on, "" for nothing; `onSelect(name)` is called when a row's node is chosen. */
  constructor(canvas, legend, onCell, onSelect) {
    Object.assign(this, { canvas, legend, onCell, onSelect, matrix: null, larger: false, row: -1, column: -1 });
    this.picture = document.createElement("canvas");
    this.redraw = oncePerFrame(() => this.draw());
    new ResizeObserver(() => this.size()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => {
      this.point(event);
      this.choose();
    });
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** Show another matrix, or the same in another order. The cursor stays on its pair, wherever that is now. */
  setMatrix(matrix) {
    const pair = this.row < 0 ? null : [this.row, this.column].map((i) => this.matrix.names[i]);
    this.matrix = matrix;
    if (pair) {
      const places = pair.map((name) => matrix.index.get(name));
      [this.row, this.column] = places.includes(undefined) ? [-1, -1] : places;
      this.tell();
    }
    this.paint();
    this.size();
  }

  setLarger(larger) {
    this.larger = larger;
    this.size();
  }

  size() {
    if (!this.matrix) return;
    const frame = this.canvas.parentElement.clientWidth;
    const wide = this.larger ? Math.min(LARGEST, Math.max(frame, this.matrix.n * CELL)) : Math.min(frame, 560);
    this.canvas.style.width = this.canvas.style.height = `${wide}px`;
    this.redraw();
  }

  paint() {
    const { n, rtt, kind } = this.matrix;
    const [low, high] = this.range();
    const colours = ramp(low, high);
    const none = unknown();
    const [unreachable, missing, self] = [pack(UNREACHABLE), pack(none), pack(isDark() ? [20, 23, 27] : [251, 250, 247])];
    this.picture.width = this.picture.height = Math.max(n, 1);
    const context = this.picture.getContext("2d");
    const image = context.createImageData(this.picture.width, this.picture.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < n * n; i++) {
      const what = kind[i] & 7;
      if (what === 4) pixels[i] = self;
      else if (what === 2) pixels[i] = unreachable;
      else if (rtt[i] === NO_NUMBER) pixels[i] = missing;
      else if (what === 3) pixels[i] = paler(colours[rtt[i]], none);
      else pixels[i] = colours[rtt[i]];
    }
    context.putImageData(image, 0, 0);
    this.explain(low, high, colours, none);
  }

  /** The 2nd and 98th percentile of the known times, in 0.1 ms: a few extremes must not take the colours. */
  range() {
    const { n, rtt, kind } = this.matrix;
    const counts = new Uint32Array(65536);
    let all = 0;
    for (let i = 0; i < n * n; i++) {
      if (rtt[i] === NO_NUMBER || (kind[i] & 7) === 4) continue;
      counts[rtt[i]]++;
      all++;
    }
    const reach = (share) => {
      let passed = 0;
      for (let tenth = 0; tenth < 65536; tenth++) {
        passed += counts[tenth];
        if (passed >= share * all) return tenth;
      }
      return 65535;
    };
    if (!all) return [10, 1000];
    const low = Math.max(1, reach(0.02));
    return [low, Math.max(low * 2, reach(0.98))];
  }

  explain(low, high, colours, none) {
    const swatch = (colour) => {
      const box = make("span", { class: "swatch square" });
      box.style.background = colour;
      return box;
    };
    const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => Math.round(low * (high / low) ** share));
    const text = (tenth) => `${tenth < 100 ? (tenth / 10).toFixed(1) : Math.round(tenth / 10)} ms`;
    const kinds = this.matrix.kind;
    const has = (what) => kinds.some((kind) => (kind & 7) === what);
    this.legend.replaceChildren(
      ...steps.map((tenth) => make("span", {}, swatch(css(colours[tenth])), text(tenth))),
      ...(has(3) ? [make("span", {}, swatch(css(paler(colours[steps[2]], none))), "paler: estimated")] : []),
      ...(has(2) ? [make("span", {}, swatch(css(pack(UNREACHABLE))), "unreachable")] : []),
      ...(has(0) ? [make("span", {}, swatch(css(pack(none))), "not measured")] : []),
    );
  }

  draw() {
    if (!this.matrix) return;
    const [context, width] = fitted(this.canvas);
    const { n, groups } = this.matrix;
    if (!n) return;
    context.imageSmoothingEnabled = n > width;
    context.drawImage(this.picture, 0, 0, width, width);
    const cell = width / n;
    context.strokeStyle = named("ink");
    context.lineWidth = 1;
    context.beginPath();
    for (let i = 1; i < n; i++) {
      if (groups[i] === groups[i - 1]) continue;
      context.moveTo(i * cell, 0);
      context.lineTo(i * cell, width);
      context.moveTo(0, i * cell);
      context.lineTo(width, i * cell);
    }
    if (this.orderedByGroup()) context.stroke();
    if (this.row < 0) return;
    const [x, y, side] = [this.column * cell, this.row * cell, Math.max(cell, 7)];
    for (const [colour, thick] of [["#ffffff", 4], ["#000000", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.strokeRect(x + cell / 2 - side / 2, y + cell / 2 - side / 2, side, side);
    }
  }

  orderedByGroup() {
    const { groups } = this.matrix;
    const borders = groups.filter((group, i) => i && group !== groups[i - 1]).length;
    return borders < new Set(groups).size;
  }

  point(event) {
    if (!this.matrix?.n) return;
    const cell = this.canvas.clientWidth / this.matrix.n;
    const within = (at) => Math.min(this.matrix.n - 1, Math.max(0, Math.floor(at / cell)));
    this.move(within(event.offsetY), within(event.offsetX));
  }

  onKey(event) {
    if (!this.matrix?.n || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const last = this.matrix.n - 1;
    if (event.key in steps) {
      const far = event.shiftKey ? 10 : 1;
      const [down, right] = steps[event.key];
      const bounded = (at) => Math.min(last, Math.max(0, at));
      this.row < 0 ? this.move(0, Math.min(1, last)) : this.move(bounded(this.row + down * far), bounded(this.column + right * far));
    } else if (event.key === "Home") this.move(Math.max(this.row, 0), 0);
    else if (event.key === "End") this.move(Math.max(this.row, 0), last);
    else if (event.key === "Enter") this.choose();
    else return;
    event.preventDefault();
  }

  choose() {
    if (this.row >= 0) this.onSelect(this.matrix.names[this.row]);
  }

  move(row, column) {
    [this.row, this.column] = [row, column];
    this.tell();
    if (this.larger) this.reveal();
    this.redraw();
  }

  tell() {
    const { n, names, rtt, kind } = this.matrix;
    const i = this.row * n + this.column;
    this.onCell(this.row < 0 ? "" : `${names[this.row]} to ${names[this.column]}: ${describe(rtt[i], kind[i])}`);
  }

  reveal() {
    const frame = this.canvas.parentElement;
    const cell = this.canvas.clientWidth / this.matrix.n;
    const near = (at, from, size) => Math.min(Math.max(from, (at + 1) * cell - size + 20), at * cell - 20);
    if (document.activeElement !== this.canvas) return;
    frame.scrollTop = near(this.row, frame.scrollTop, frame.clientHeight);
    frame.scrollLeft = near(this.column, frame.scrollLeft, frame.clientWidth);
  }
}

const paler = (packed, [red, green, blue]) =>
  pack([((packed & 255) + red) >> 1, (((packed >> 8) & 255) + green) >> 1, (((packed >> 16) & 255) + blue) >> 1]);

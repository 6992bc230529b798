// The map: nodes where their latencies put them, coloured by group, with the paths between them.

import { fitted, oncePerFrame } from "./dom.js";
import { groupColour, named } from "./colours.js";

const DIRECT = 1;
const RELAYED = 9;
const UNREACHABLE = 2;
const NAMES_SHOWN = 40; // more names at once could not be read
const LINKS_AT_FIRST = 400; // more paths than that are drawn only if asked for
const REACH = 24; // CSS pixels from a node within which a click means it

export class NetworkMap {
  /** `onSelect(name or null)` is called when the reader chooses a node. */
  constructor(canvas, onSelect) {
    this.canvas = canvas;
    this.onSelect = onSelect;
    this.nodes = [];
    this.links = [];
    this.linksOf = new Map();
    this.medoids = new Map();
    this.marked = new Map();
    this.shown = { [DIRECT]: null, [RELAYED]: null, [UNREACHABLE]: null };
    this.selected = -1;
    this.view = null;
    this.redraw = oncePerFrame(() => this.draw());
    new ResizeObserver(this.redraw).observe(canvas);
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.onPointer(event));
  }

  setData(map, medoids) {
    const kept = this.nodes[this.selected]?.name;
    this.nodes = map.nodes;
    this.links = map.links;
    this.medoids = medoids;
    this.linksOf = new Map();
    this.links.forEach((link) => {
      for (const end of link.slice(0, 2)) {
        if (!this.linksOf.has(end)) this.linksOf.set(end, []);
        this.linksOf.get(end).push(link);
      }
    });
    for (const kind of [DIRECT, RELAYED, UNREACHABLE]) this.shown[kind] ??= this.links.length <= LINKS_AT_FIRST;
    this.selected = this.nodes.findIndex((node) => node.name === kept);
    this.redraw();
  }

  /** Mark nodes: replicas of a service, by name, with what is written beside them. */
  mark(marked) {
    this.marked = marked;
    this.redraw();
  }

  show(kind, wanted) {
    this.shown[kind] = wanted;
    this.redraw();
  }

  select(name) {
    this.selected = name === null ? -1 : this.nodes.findIndex((node) => node.name === name);
    if (this.selected >= 0 && this.view && !this.inside(this.nodes[this.selected])) this.centre(this.nodes[this.selected]);
    this.redraw();
  }

  placed = (node) => node.x !== null && node.y !== null;

  fit() {
    const placed = this.nodes.filter(this.placed);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { x, y } of placed) {
      [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
    }
    if (!placed.length) [left, right, top, bottom] = [-1, 1, -1, 1];
    const margin = Math.min(70, width / 6);
    const scale = Math.min((width - 2 * margin) / Math.max(right - left, 1e-3), (height - 90) / Math.max(bottom - top, 1e-3));
    return { x: (left + right) / 2, y: (top + bottom) / 2, scale };
  }

  project({ x, y }) {
    const view = this.view ?? this.fit();
    const { clientWidth: width, clientHeight: height } = this.canvas;
    return [width / 2 + (x - view.x) * view.scale, height / 2 + (y - view.y) * view.scale];
  }

  inside(node) {
    if (!this.placed(node)) return true;
    const [x, y] = this.project(node);
    return x > 10 && y > 10 && x < this.canvas.clientWidth - 10 && y < this.canvas.clientHeight - 10;
  }

  centre({ x, y }) {
    this.view = { ...(this.view ?? this.fit()), x, y };
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const all = this.fit();
    const view = this.view ?? all;
    const scale = Math.min(all.scale * 400, view.scale * factor);
    if (scale <= all.scale) {
      this.view = null;
    } else {
      const [right, down] = [x - this.canvas.clientWidth / 2, y - this.canvas.clientHeight / 2];
      const [px, py] = [view.x + right / view.scale, view.y + down / view.scale];
      this.view = { x: px - right / scale, y: py - down / scale, scale };
    }
    this.redraw();
  }

  zoomAll() {
    this.view = null;
    this.redraw();
  }

  draw() {
    const [context, width, height] = fitted(this.canvas);
    const [ink, faint, paper, bad] = ["ink", "faint", "paper", "bad"].map(named);
    const points = this.nodes.map((node) => (this.placed(node) ? this.project(node) : null));
    const line = (links, colour, dash, alpha, thick) => {
      context.save();
      context.strokeStyle = colour;
      context.globalAlpha = alpha;
      context.lineWidth = thick;
      context.setLineDash(dash);
      context.beginPath();
      for (const [a, b] of links) {
        if (!points[a] || !points[b]) continue;
        context.moveTo(...points[a]);
        context.lineTo(...points[b]);
      }
      context.stroke();
      context.restore();
    };
    const alpha = Math.max(0.04, Math.min(0.5, 60 / Math.max(this.links.length, 1)));
    const own = this.linksOf.get(this.selected) ?? [];
    for (const [links, strong, each] of [[this.links, alpha, 1], [own, 0.9, 1.5]]) {
      const of = (kind) => (links === own || this.shown[kind] ? links.filter((link) => link[3] === kind) : []);
      line(of(DIRECT), faint, [], strong, each);
      line(of(RELAYED), faint, [6, 4], Math.min(1, strong * 1.6), each + 0.5);
      line(of(UNREACHABLE), bad, [2, 4], Math.min(1, strong * 1.6), each + 0.5);
    }
    const radius = this.nodes.length > 500 ? 2.5 : this.nodes.length > 100 ? 4 : 6.5;
    const visible = [];
    this.nodes.forEach((node, i) => {
      if (!points[i]) return;
      const [x, y] = points[i];
      if (x < -20 || y < -20 || x > width + 20 || y > height + 20) return;
      visible.push(i);
      context.beginPath();
      context.arc(x, y, radius, 0, 7);
      context.lineWidth = 1.5;
      context.strokeStyle = groupColour(node.group);
      context.fillStyle = node.state === "fresh" ? groupColour(node.group) : paper;
      context.fill();
      context.stroke();
      if (node.state === "silent") {
        context.beginPath();
        context.moveTo(x - radius, y + radius);
        context.lineTo(x + radius, y - radius);
        context.stroke();
      }
    });
    for (const [name] of this.marked) {
      const i = this.nodes.findIndex((node) => node.name === name);
      if (i < 0 || !points[i]) continue;
      context.beginPath();
      context.rect(points[i][0] - radius - 4, points[i][1] - radius - 4, 2 * radius + 8, 2 * radius + 8);
      context.lineWidth = 2.5;
      context.strokeStyle = ink;
      context.stroke();
    }
    if (this.selected >= 0 && points[this.selected]) {
      context.beginPath();
      context.arc(...points[this.selected], radius + 5, 0, 7);
      context.lineWidth = 2.5;
      context.strokeStyle = ink;
      context.stroke();
    }
    this.write(context, points, visible, radius, ink, paper, width);
  }

  /** Write names, the important ones first, and none over another. */
  write(context, points, visible, radius, ink, paper, width) {
    const rank = (i) =>
      i === this.selected ? 0 : this.marked.has(this.nodes[i].name) ? 1 : this.medoids.has(this.nodes[i].name) ? 2 : 3;
    const all = visible.length <= NAMES_SHOWN;
    const named = visible.filter((i) => all || rank(i) < 3).sort((a, b) => rank(a) - rank(b));
    const taken = [];
    context.font = "12px system-ui, sans-serif";
    context.lineJoin = "round";
    for (const i of named.slice(0, 4 * NAMES_SHOWN)) {
      const text = this.nodes[i].name + (this.marked.get(this.nodes[i].name) ?? "");
      const size = context.measureText(text).width;
      const [x, y] = points[i];
      const left = x + radius + 6 + size > width ? x - radius - 6 - size : x + radius + 6;
      const box = [left, y - 8, left + size, y + 8];
      if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
      taken.push(box);
      context.strokeStyle = paper;
      context.lineWidth = 3;
      context.strokeText(text, left, y + 4);
      context.fillStyle = ink;
      context.fillText(text, left, y + 4);
    }
  }

  choose(i) {
    this.selected = i;
    if (i >= 0 && !this.inside(this.nodes[i])) this.centre(this.nodes[i]);
    this.redraw();
    this.onSelect(i < 0 ? null : this.nodes[i].name);
  }

  onKey(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) this.step(...steps[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5);
    else if (event.key === "-") this.zoom(1 / 1.5);
    else if (event.key === "0") this.zoomAll();
    else if (event.key === "n") this.next(1);
    else if (event.key === "p") this.next(-1);
    else if (event.key === "Escape") this.choose(-1);
    else return;
    event.preventDefault();
  }

  /** Go to the next node by name, so that each can be reached. */
  next(by) {
    const order = this.nodes.map((node, i) => i).filter((i) => this.placed(this.nodes[i]));
    order.sort((a, b) => (this.nodes[a].name < this.nodes[b].name ? -1 : 1));
    if (!order.length) return;
    const here = order.indexOf(this.selected);
    this.choose(order[here < 0 ? (by > 0 ? 0 : order.length - 1) : (here + by + order.length) % order.length]);
  }

  /** Go to the nearest node in a direction; from nowhere, to the one nearest to the middle. */
  step(right, down) {
    const from = this.nodes[this.selected];
    const middle = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2];
    const [x, y] = from && this.placed(from) ? this.project(from) : middle;
    let best = -1;
    let least = Infinity;
    this.nodes.forEach((node, i) => {
      if (i === this.selected || !this.placed(node)) return;
      const [nx, ny] = this.project(node);
      const along = (nx - x) * right + (ny - y) * down;
      const across = Math.abs((nx - x) * down + (ny - y) * right);
      if (from && along <= Math.max(0, across * 0.5)) return;
      const cost = from ? along + 2 * across : Math.hypot(nx - x, ny - y);
      if (cost < least) [best, least] = [i, cost];
    });
    if (best >= 0) this.choose(best);
  }

  onWheel(event) {
    // A wheel alone scrolls the page; with the map in focus, or with Ctrl, it zooms.
    if (!event.ctrlKey && document.activeElement !== this.canvas) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
  }

  onPointer(event) {
    const [startX, startY] = [event.offsetX, event.offsetY];
    const view = this.view ?? this.fit();
    let dragged = false;
    const move = (later) => {
      const [right, down] = [later.offsetX - startX, later.offsetY - startY];
      if (!dragged && Math.hypot(right, down) < 5) return;
      dragged = true;
      this.view = { scale: view.scale, x: view.x - right / view.scale, y: view.y - down / view.scale };
      this.redraw();
    };
    const end = (later) => {
      this.canvas.removeEventListener("pointermove", move);
      this.canvas.removeEventListener("pointerup", end);
      this.canvas.removeEventListener("pointercancel", end);
      if (!dragged && later.type === "pointerup") this.pick(startX, startY);
    };
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerup", end);
    this.canvas.addEventListener("pointercancel", end);
  }

  pick(x, y) {
    let best = -1;
    let least = REACH;
    this.nodes.forEach((node, i) => {
      if (!this.placed(node)) return;
      const [nx, ny] = this.project(node);
      const distance = Math.hypot(nx - x, ny - y);
      if (distance < least) [best, least] = [i, distance];
    });
    this.choose(best);
  }
}

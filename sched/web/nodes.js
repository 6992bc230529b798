// The table of nodes: sorted, filtered, a page at a time.

import { seconds } from "./api.js";
import { groupColour } from "./colours.js";
import { make } from "./dom.js";

const PAGE = 50;
const COLUMNS = [
  ["Node", (node) => node.name],
  ["Group", (node) => node.group ?? Infinity],
  ["Report", (node) => ["fresh", "stale", "silent"].indexOf(node.state)],
  ["Age", (node) => node.report_age_s ?? Infinity],
  ["Direct", (node) => node.peers.direct],
  ["Relayed", (node) => node.peers.relayed],
  ["Unreachable", (node) => node.peers.unreachable],
  ["Overlay", (node) => node.overlay[0] ?? ""],
];
const NUMBERS = new Set(["Age", "Direct", "Relayed", "Unreachable"]);

export class NodeTable {
  /** `onSelect(name)` is called when a node is chosen. */
  constructor(table, pages, onSelect) {
    Object.assign(this, { table, pages, onSelect, nodes: [], read: 0, filter: "", column: 0, down: false, page: 0 });
    this.head = make("thead");
    this.body = make("tbody");
    table.replaceChildren(this.head, this.body);
    this.previous = make("button", { type: "button", onclick: () => this.turn(-1) }, "Earlier");
    this.next = make("button", { type: "button", onclick: () => this.turn(1) }, "Later");
    this.where = make("span", { class: "hint", role: "status" });
    pages.replaceChildren(this.where, this.previous, this.next);
    this.drawHead();
  }

  setNodes(nodes) {
    this.nodes = nodes;
    this.read = performance.now();
    this.draw();
  }

  setFilter(text) {
    this.filter = text.trim().toLowerCase();
    this.page = 0;
    this.draw();
  }

  turn(by) {
    this.page += by;
    this.draw();
  }

  drawHead() {
    const sort = (column) => {
      [this.down, this.column] = [this.column === column && !this.down, column];
      this.drawHead();
      this.draw();
      this.head.querySelectorAll("button")[column].focus();
    };
    const cells = COLUMNS.map(([title], i) =>
      make(
        "th",
        {
          scope: "col",
          class: NUMBERS.has(title) ? "number" : null,
          "aria-sort": i === this.column ? (this.down ? "descending" : "ascending") : null,
        },
        make("button", { type: "button", onclick: () => sort(i) }, title),
      ),
    );
    this.head.replaceChildren(make("tr", {}, ...cells));
  }

  draw() {
    const key = COLUMNS[this.column][1];
    const found = this.nodes.filter((node) => !this.filter || node.name.toLowerCase().includes(this.filter));
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      return (x < y ? -1 : x > y ? 1 : a.name < b.name ? -1 : 1) * (this.down ? -1 : 1);
    };
    found.sort(compare);
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    this.page = Math.min(Math.max(this.page, 0), last);
    const part = found.slice(this.page * PAGE, (this.page + 1) * PAGE);
    this.body.replaceChildren(...part.map((node) => this.row(node)));
    this.previous.disabled = this.page === 0;
    this.next.disabled = this.page === last;
    this.previous.hidden = this.next.hidden = last === 0;
    const first = this.page * PAGE;
    this.where.textContent = found.length ? `${first + 1} to ${first + part.length} of ${found.length}` : "no node";
    this.tick();
  }

  row(node) {
    const colour = make("span", { class: "swatch" });
    colour.style.background = groupColour(node.group);
    const age = make("td", { class: "number" });
    age.ageAtRead = node.report_age_s;
    const count = (value) => make("td", { class: "number" }, String(value));
    return make(
      "tr",
      {},
      make("td", {}, make("button", { type: "button", onclick: () => this.onSelect(node.name) }, node.name)),
      make("td", {}, colour, node.group === null ? "none" : String(node.group)),
      make("td", { class: node.state === "fresh" ? null : "bad" }, node.state),
      age,
      count(node.peers.direct),
      count(node.peers.relayed),
      count(node.peers.unreachable),
      make("td", {}, node.overlay.join(" ")),
    );
  }

  /** Let the ages go on. */
  tick() {
    const since = (performance.now() - this.read) / 1000;
    for (const row of this.body.rows) {
      const cell = row.cells[3];
      const text = cell.ageAtRead === null ? "never" : seconds(cell.ageAtRead + since);
      if (cell.textContent !== text) cell.textContent = text;
    }
  }
}

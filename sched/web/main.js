// Asks the scheduler every few seconds and gives each part of the page what is new.

import { NO_NUMBER, Refused, byName, describe, forget, knownToken, milliseconds, parseMatrix, readNew, seconds, useToken } from "./api.js";
import { groupColour } from "./colours.js";
import { at, facts, make, table } from "./dom.js";
import { HeatMap } from "./heat.js";
import { NetworkMap } from "./map.js";
import { NodeTable } from "./nodes.js";
import { Placer } from "./place.js";

const EVERY = 5000; // ms between looks at the scheduler
const PEERS_SHOWN = 12;
const KINDS = [["show-direct", 1], ["show-relayed", 9], ["show-unreachable", 2]];

let status = null;
let nodes = [];
let matrix = null; // by group, as it is read
let selected = null;
let answered = performance.now();

const map = new NetworkMap(at("map"), choose);
const heat = new HeatMap(at("heat"), at("heat-legend"), showCell, choose);
const list = new NodeTable(at("nodes"), at("pages"), (name) => {
  choose(name);
  at("map-section").scrollIntoView();
  at("map").focus({ preventScroll: true });
});
const placer = new Placer((marked) => map.mark(marked));

function choose(name) {
  selected = name;
  map.select(name);
  at("find").value = name ?? "";
  showNode();
}

/** Say what is known of the chosen node. */
function showNode() {
  const node = nodes.find(({ name }) => name === selected);
  if (!node) {
    at("node").replaceChildren();
    return;
  }
  const parts = [
    make("h3", {}, node.name),
    facts([
      ["Group", node.group === null ? "none: too little is known of it" : String(node.group)],
      ["Report", node.report_age_s === null ? "never" : `${node.state}, ${seconds(node.report_age_s)} old`],
      ["Peers", `${node.peers.direct} direct, ${node.peers.relayed} relayed, ${node.peers.unreachable} unreachable`],
      ["Overlay", node.overlay.join(", ") || "unknown"],
      ...(node.certificate ? [["Certificate", `serial ${node.certificate.serial}, ${node.certificate.groups.join(", ") || "no groups"}`]] : []),
    ]),
  ];
  const row = matrix?.index.get(node.name);
  if (row !== undefined) {
    const start = row * matrix.n;
    const peers = matrix.names.map((name, i) => [name, matrix.rtt[start + i], matrix.kind[start + i]]);
    const near = peers.filter(([name, rtt, kind]) => name !== node.name && rtt !== NO_NUMBER && (kind & 7) !== 4);
    near.sort((a, b) => a[1] - b[1]);
    const silent = peers.filter(([, , kind]) => (kind & 7) === 2);
    const rows = [...near.slice(0, PEERS_SHOWN), ...silent.slice(0, PEERS_SHOWN)].map(([name, rtt, kind]) => [name, describe(rtt, kind)]);
    if (rows.length) parts.push(table(`Nearest to ${node.name}`, [["Nearest"], ["Round trip"]], rows));
  }
  at("node").replaceChildren(...parts);
}

/** Say what is known of a pair; only what is new, because it is read aloud. */
function showCell(text) {
  const shown = text || "\u00a0"; // the line stays as high
  if (at("cell").textContent !== shown) at("cell").textContent = shown;
}

/** The order is a view of what is here: it changes at once, so that keys never move over another order than the chosen. */
function showMatrix() {
  heat.setMatrix(at("order").value === "name" ? byName(matrix) : matrix);
}

function showStatus() {
  const { nodes: count, pairs, groups, round, round_time: when, time } = status;
  const age = round ? `, computed ${seconds(time - when)} ago` : "";
  at("summary").textContent = round
    ? `${count.all} nodes (${count.fresh} fresh), ${groups} groups, ${pairs.measured} pairs measured, ${pairs.estimated} estimated, ${pairs.unreachable} unreachable${age}`
    : `${count.all} nodes have reported; nothing is computed yet`;
  showProblems(status.problems);
}

function showProblems(problems) {
  const wanted = problems.join("\n");
  if (at("problems").dataset.text === wanted) return;
  at("problems").dataset.text = wanted;
  at("problems").replaceChildren(...problems.map((problem) => make("li", {}, problem)));
}

function showGroups({ groups, ungrouped, silhouette, within_ms: within }) {
  const items = groups.map((group) => {
    const colour = make("span", { class: "swatch" });
    colour.style.background = groupColour(group.id);
    const text = `${group.id}: ${group.size} nodes, ${milliseconds(group.within_ms)} inside, around ${group.medoid}`;
    return make("li", {}, make("button", { type: "button", onclick: () => choose(group.medoid) }, colour, text));
  });
  if (ungrouped.length) items.push(make("li", {}, `${ungrouped.length} in no group`));
  if (silhouette !== null) items.push(make("li", { class: "hint" }, `silhouette ${silhouette.toFixed(2)}, median inside ${milliseconds(within)}`));
  at("groups").replaceChildren(...items);
}

function showMap(drawn, medoids) {
  map.setData(drawn, medoids);
  for (const [id, kind] of KINDS) at(id).checked = map.shown[kind];
  const missing = drawn.nodes.filter((node) => node.x === null).length;
  const notes = [];
  if (missing) notes.push(`${missing} of ${drawn.nodes.length} nodes are not on the map: too little is measured of them.`);
  if (drawn.stress !== null && drawn.nodes.length > 2) notes.push(`${Math.round(100 * drawn.stress)} % of the distances cannot be shown in two dimensions.`);
  notes.push("Hollow: its report is old; struck through: silent. Solid line: direct; dashed: relayed; dotted: unreachable.");
  at("map-note").textContent = notes.join(" ");
  at("names").replaceChildren(...drawn.nodes.map(({ name }) => make("option", { value: name })));
}

let latestGroups = null;

async function refresh() {
  status = (await readNew("/v1/status")) ?? status;
  showStatus();
  const [groups, drawn, reported, cells] = await Promise.all([
    readNew("/v1/groups"),
    readNew("/v1/map?links=true"),
    readNew("/v1/nodes"),
    readNew("/v1/matrix?order=group&format=binary", true),
  ]);
  latestGroups = groups ?? latestGroups;
  if (groups) showGroups(groups);
  if (drawn) showMap(drawn, new Set(latestGroups.groups.map(({ medoid }) => medoid)));
  if (reported) {
    nodes = reported.nodes;
    list.setNodes(nodes);
  }
  if (cells) {
    matrix = parseMatrix(cells);
    showMatrix();
  }
  if (reported || cells) showNode();
  await placer.refresh();
}

async function look() {
  try {
    await refresh();
    at("access").hidden = true;
    answered = performance.now();
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    forget();
    if (error instanceof Refused && error.status === 401) {
      at("access").hidden = false;
      at("summary").textContent = knownToken() ? "The scheduler does not take this token." : "The scheduler wants a token.";
    } else if (error instanceof Refused) showProblems([error.message]);
    else {
      console.debug(error);
      showProblems([`The scheduler has not answered for ${seconds((performance.now() - answered) / 1000)}; what is shown is from before.`]);
    }
  }
}

async function forever() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resume) => setTimeout(resume, EVERY));
  }
}

for (const [id, kind] of KINDS) at(id).addEventListener("change", () => map.show(kind, at(id).checked));
at("zoom-in").addEventListener("click", () => map.zoom(1.5));
at("zoom-out").addEventListener("click", () => map.zoom(1 / 1.5));
at("zoom-all").addEventListener("click", () => map.zoomAll());
at("find").addEventListener("change", () => {
  const name = at("find").value.trim();
  if (nodes.some((node) => node.name === name)) choose(name);
  else if (!name) choose(null);
  else at("node").replaceChildren(make("p", { class: "bad" }, `No node is called ${name}.`));
});
at("filter").addEventListener("input", () => list.setFilter(at("filter").value));
at("order").addEventListener("change", () => {
  if (matrix) showMatrix();
});
at("heat-closer").addEventListener("click", () => {
  heat.setLarger(!heat.larger);
  at("heat-closer").setAttribute("aria-pressed", String(heat.larger));
});
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("access-token").value);
  look();
});

function repaint() {
  map.redraw();
  if (matrix) showMatrix();
  if (latestGroups) showGroups(latestGroups);
  list.draw();
}
const theme = at("theme");
theme.value = localStorage.getItem("theme") ?? "";
function useTheme() {
  if (theme.value) document.documentElement.dataset.theme = theme.value;
  else delete document.documentElement.dataset.theme;
}
useTheme();
theme.addEventListener("change", () => {
  localStorage.setItem("theme", theme.value);
  useTheme();
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
setInterval(() => list.tick(), 1000);
forever();

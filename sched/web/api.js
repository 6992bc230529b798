// Talks to the scheduler. What is read is kept by its ETag, so that an unchanged answer costs nothing.

export class Refused extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

let token = sessionStorage.getItem("token") ?? "";

export function useToken(text) {
  token = text;
  sessionStorage.setItem("token", text);
}

export const knownToken = () => token;

async function request(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { cache: "no-cache", ...options, headers, signal: AbortSignal.timeout(60000) });
  if (answer.ok) return answer;
  let body = {};
  try {
    body = await answer.json();
  } catch {
    // Not our server's answer: its status has to do.
  }
  throw new Refused(answer.status, body.error ?? "", body.detail ?? `the scheduler answered ${answer.status}`);
}

const tags = new Map();

/** Return what is at a path, or null if it is what was read from there before. */
export async function readNew(path, binary = false) {
  const answer = await request(path);
  const tag = answer.headers.get("ETag");
  if (tag && tags.get(path) === tag) return null;
  const value = await (binary ? answer.arrayBuffer() : answer.json());
  if (tag) tags.set(path, tag);
  return value;
}

/** Let everything be new to the next look: something that was read has not been shown. */
export const forget = () => tags.clear();

export const read = async (path) => (await request(path)).json();

export async function send(method, path, body) {
  const answer = await request(path, {
    method,
    headers: { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  return answer.status === 204 ? null : answer.json();
}

/** Take the binary matrix apart: names, groups, and views of n x n times (0.1 ms) and kinds. */
export function parseMatrix(buffer) {
  const view = new DataView(buffer);
  if (view.getUint32(0) !== 0x43454d31) throw new Error("this is no matrix");
  const n = view.getUint32(4, true);
  const length = view.getUint32(12, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 16, length)));
  return {
    n,
    round: view.getUint32(8, true),
    names: header.names,
    groups: header.groups,
    index: indexOf(header.names),
    rtt: new Uint16Array(buffer, 16 + length, n * n),
    kind: new Uint8Array(buffer, 16 + length + 2 * n * n, n * n),
  };
}

const indexOf = (names) => new Map(names.map((name, i) => [name, i]));

/** Return the same matrix with its nodes sorted by name. */
export function byName(matrix) {
  const { n } = matrix;
  const sorted = [...matrix.index].sort(([a], [b]) => (a < b ? -1 : 1));
  const names = sorted.map(([name]) => name);
  const from = Uint32Array.from(sorted, ([, i]) => i);
  const [rtt, kind] = [new Uint16Array(n * n), new Uint8Array(n * n)];
  for (let row = 0, i = 0; row < n; row++) {
    const start = from[row] * n;
    for (let column = 0; column < n; column++, i++) {
      rtt[i] = matrix.rtt[start + from[column]];
      kind[i] = matrix.kind[start + from[column]];
    }
  }
  const groups = Array.from(from, (i) => matrix.groups[i]);
  return { ...matrix, names, groups, index: indexOf(names), rtt, kind };
}

export const NO_NUMBER = 65535;
export const RELAYED = 8;

/** Say what is known of a pair. */
export function describe(rtt, kind) {
  const what = kind & 7;
  if (what === 2) return "unreachable";
  if (what === 4) return "the node itself";
  if (rtt === NO_NUMBER) return "not measured";
  const time = rtt === 65534 ? "6.6 s or more" : milliseconds(rtt / 10);
  if (what === 3) return `${time}, estimated`;
  return `${time}, measured, ${kind & RELAYED ? "relayed" : "direct"}`;
}

export const milliseconds = (ms) =>
  ms === null || ms === undefined ? "unknown" : `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;

export function seconds(s) {
  if (s === null || s === undefined) return "never";
  if (s < 120) return `${Math.max(0, Math.round(s))} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

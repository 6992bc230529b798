// The form that places a service, and the answer with its reasons.

import { Refused, knownToken, milliseconds, read, send, useToken } from "./api.js";
import { at, facts, make, table } from "./dom.js";

const percent = (share) => (share === null || share === undefined ? "unknown" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);

/** Read "a=1, b=2.5" into weights, or throw an error that names the part that is wrong. */
export function parseUsers(text) {
  const users = {};
  for (const part of text.split(/[,\n]/).map((piece) => piece.trim()).filter(Boolean)) {
    const [name, weight, more] = part.split("=").map((piece) => piece.trim());
    const number = weight === undefined ? 1 : Number(weight);
    if (!name || more !== undefined || weight === "" || !Number.isFinite(number) || number <= 0)
      throw new Error(`Users: "${part}" is not node=weight with a weight above 0`);
    if (name in users) throw new Error(`Users: ${name} is there twice`);
    users[name] = number;
  }
  return users;
}

const namesIn = (text) => text.split(/[,\s]+/).filter(Boolean);

export class Placer {
  /** `onPlaced(Map of name to text)` marks where replicas are. */
  constructor(onPlaced) {
    this.onPlaced = onPlaced;
    this.asked = 0;
    this.shown = "";
    at("token").value = knownToken();
    at("place").addEventListener("submit", (event) => {
      event.preventDefault();
      this.attempt(() => this.tryIt());
    });
    at("save").addEventListener("click", () => this.attempt(() => this.keep()));
  }

  async attempt(action) {
    at("place-error").textContent = "";
    for (const button of [at("try"), at("save")]) button.disabled = true;
    try {
      await action();
    } catch (error) {
      at("place-error").textContent =
        error instanceof Refused || !(error instanceof TypeError) ? error.message : "The scheduler does not answer.";
    } finally {
      for (const button of [at("try"), at("save")]) button.disabled = false;
    }
  }

  /** What the form asks for, as the scheduler wants it. */
  wanted() {
    const replicas = Number(at("replicas").value);
    if (!Number.isInteger(replicas) || replicas < 1) throw new Error("Replicas: a whole number from 1");
    const users = parseUsers(at("users").value);
    const service = { replicas, users: Object.keys(users).length ? users : "all" };
    if (at("capacity").value) {
      service.capacity = Number(at("capacity").value);
      if (!(service.capacity > 0)) throw new Error("Demand that a node can serve: a number above 0");
    }
    const [allowed, current] = [namesIn(at("allowed").value), namesIn(at("current").value)];
    if (allowed.length) service.allowed = allowed;
    if (current.length) service.current = current;
    return service;
  }

  async tryIt() {
    const wanted = this.wanted();
    at("answer").replaceChildren(make("p", { class: "hint" }, "Computing …"));
    try {
      this.explain(await send("POST", "/v1/placements", { ...wanted, listed: 10, baselines: true }), wanted);
    } catch (error) {
      at("answer").replaceChildren();
      throw error;
    }
  }

  async keep() {
    const name = at("service").value.trim();
    if (!name || !at("service").checkValidity()) throw new Error("Name: 1 to 63 of a-z, 0-9, - and .");
    const wanted = this.wanted();
    if (at("token").value) useToken(at("token").value);
    await send("PUT", `/v1/services/${encodeURIComponent(name)}`, wanted);
    await this.refresh();
  }

  explain(decision, wanted) {
    const { candidates, users = [], baselines = {} } = decision;
    this.onPlaced(new Map(decision.nodes.map((name) => [name, " (replica)"])));
    const mean = decision.mean_ms;
    const parts = [make("h3", {}, decision.service ? `Service ${decision.service}` : "Where it would go")];
    if (decision.error) parts.push(make("p", { class: "bad" }, decision.error));
    parts.push(...decision.warnings.map((warning) => make("p", { class: "bad" }, warning)));
    const bound = decision.bound_ms;
    parts.push(
      facts([
        ["On", decision.nodes.join(", ") || "nothing"],
        ["Users' mean", milliseconds(mean)],
        ["95 % of users within", milliseconds(decision.p95_ms)],
        ["Best that can be", bound === null ? "unknown" : `not below ${milliseconds(bound)}: at most ${percent(decision.gap)} better`],
        ...(decision.before_ms === null ? [] : [["Before", milliseconds(decision.before_ms)]]),
        ["Why", decision.reason || "it is the best found"],
        ...(decision.confidence === null ? [] : [["Confidence", percent(decision.confidence)]]),
      ]),
    );
    if (decision.moves.length && wanted?.current)
      parts.push(make("p", {}, `Moves: ${decision.moves.map(({ from, to }) => `${from ?? "new"} to ${to}`).join(", ")}`));
    if (candidates.length) {
      parts.push(make("h4", {}, "Candidates"));
      const rows = candidates.map((candidate) => [
        candidate.node,
        make("span", { class: candidate.chosen ? "good" : null }, candidate.chosen ? "chosen" : "refused"),
        milliseconds(candidate.mean_ms),
        candidate.verdict,
      ]);
      parts.push(table("Candidates", [["Node"], [""], ["All users to it", true], ["Why"]], rows));
    }
    const rivals = Object.entries(baselines);
    if (rivals.length) {
      parts.push(make("h4", {}, "Beside simpler ways"));
      const rows = [["crossedge", { mean_ms: mean, p95_ms: decision.p95_ms }], ...rivals].map(([name, { mean_ms, p95_ms }]) => [
        name.replaceAll("-", " "),
        milliseconds(mean_ms),
        milliseconds(p95_ms),
        mean ? `${(mean_ms / mean).toFixed(2)} x` : "",
      ]);
      parts.push(table("Beside simpler ways", [["Way"], ["Mean", true], ["95 %", true], ["Times ours", true]], rows));
    }
    if (users.length) {
      const rows = users.slice(0, 50).map((user) => [
        user.node,
        String(user.weight),
        user.served_by.map(([replica, , ms]) => `${replica} (${milliseconds(ms)})`).join(", ") || "nobody",
      ]);
      const heading = users.length > 50 ? `Users (the first 50 of ${users.length})` : "Users";
      parts.push(make("h4", {}, heading), table("Users", [["Users at"], ["Weight", true], ["Served by"]], rows));
    }
    at("answer").replaceChildren(...parts);
    at("answer").focus({ preventScroll: true });
    at("answer").scrollIntoView({ block: "nearest" });
  }

  /** Show the services that are kept. What is shown already stays, so that its buttons keep focus and clicks. */
  async refresh() {
    const asked = ++this.asked;
    const { services } = await read("/v1/services");
    const shown = JSON.stringify(services);
    if (asked !== this.asked || shown === this.shown) return; // somebody asked later, or nothing is new
    this.shown = shown;
    if (!services.length) {
      at("services").replaceChildren(make("p", { class: "hint" }, "None yet."));
      return;
    }
    const act = (title, action) =>
      make("button", { type: "button", onclick: () => this.attempt(action) }, title);
    const rows = services.map(({ name, replicas, decision }) => [
      name,
      decision?.nodes.join(", ") || "not decided yet",
      String(replicas),
      decision ? milliseconds(decision.mean_ms) : "",
      decision ? percent(decision.gap) : "",
      decision?.reason ?? "",
      make(
        "span",
        { class: "buttons" },
        act("Why", async () => this.explain(await read(`/v1/services/${encodeURIComponent(name)}/decision`))),
        act("Delete", async () => {
          if (!confirm(`Delete the service ${name}?`)) return;
          if (at("token").value) useToken(at("token").value);
          await send("DELETE", `/v1/services/${encodeURIComponent(name)}`);
          await this.refresh();
        }),
      ),
    ]);
    const columns = [["Name"], ["On"], ["Replicas", true], ["Mean", true], ["Gap", true], ["Why"], [""]];
    at("services").replaceChildren(table("Services", columns, rows));
  }
}


// Every value that comes from the server becomes a text node or the value of an attribute, never HTML: `h` is the
// only way to make an element. The key lives in the variable `key`, and nowhere else.

const POLL_MS = 3000; // between two looks while something changes
const JOB_MS = 1000; // while a job runs
const IDLE_MS = 10000; // while nothing does
const MOST_MS = 60000; // while the server does not answer
const TIMEOUT_MS = 15000;
const HISTORY_MS = 300000;
const WINDOW_MS = 60000; // that rates and percentiles are of
const MOST_SHOWN = 20000; // characters of an answer

const $ = (id) => document.getElementById(id);
const home = new URL(location.pathname.endsWith("/") ? "." : `${location.pathname}/`, location.href);

// --- Elements ---

const SVG = ["svg", "rect", "polyline"];

function h(name, attributes, ...children) {
  const made = SVG.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes ?? {})) {
    if (value === true) made.setAttribute(attribute, "");
    else if (value !== false && value != null) made.setAttribute(attribute, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child != null && child !== false) made.append(child);
  }
  return made;
}

// Make the children of `parent` like `wanted`, and leave alone what is alike: focus and selections stay.
function show(parent, ...wanted) {
  const children = wanted.flat(Infinity).filter((child) => child != null && child !== false)
    .map((child) => (child instanceof Node ? child : document.createTextNode(child)));
  children.forEach((child, index) => {
    const old = parent.childNodes[index];
    if (!old) parent.append(child);
    else if (old.nodeName !== child.nodeName) old.replaceWith(child);
    else if (child.nodeType === Node.TEXT_NODE) {
      if (old.data !== child.data) old.data = child.data;
    } else {
      for (const { name } of [...old.attributes]) {
        if (!child.hasAttribute(name) && name !== "open") old.removeAttribute(name);
      }
      for (const { name, value } of child.attributes) {
        if (old.getAttribute(name) !== value) old.setAttribute(name, value);
      }
      show(old, ...child.childNodes);
    }
  });
  while (parent.childNodes.length > children.length) parent.lastChild.remove();
}

function table(caption, heads, rows, kind) {
  return h("div", { class: "scroll" },
    h("table", { class: kind },
      h("caption", { class: "hidden" }, caption),
      h("thead", null, h("tr", null, heads.map((head) => (head === "" ? h("td") : h("th", { scope: "col", class: head.number && "number" }, head.text ?? head))))),
      h("tbody", null, rows)));
}
const number = (text) => ({ text, number: true });
const cell = (...children) => h("td", { class: "number" }, children);
const head = (...children) => h("th", { scope: "row" }, children);
const graph = (share) => h("td", { class: "graph" }, bar(share));
const facts = (pairs) => h("dl", { class: "facts" },
  pairs.filter(([, value]) => value != null && value !== "").map(([name, value]) => [h("dt", null, name), h("dd", null, value)]));

function bar(share) {
  const width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;
  return h("svg", { class: "length", "aria-hidden": "true" }, h("rect", { width, height: "100%", rx: 2 }));
}

function spark(values) {
  if (values.length < 2) return h("svg", { class: "spark", "aria-hidden": "true" });
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, index) =>
    `${((84 * index) / (values.length - 1)).toFixed(1)},${(17 - (16 * value) / most).toFixed(1)}`);
  return h("svg", { class: "spark", viewBox: "0 0 84 18", "aria-hidden": "true" }, h("polyline", { points: points.join(" ") }));
}

// --- Numbers as text ---

const rounded = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const count = (value) => whole.format(value);
const figure = (value) => (Math.abs(value) >= 1000 ? whole.format(value) : rounded.format(value));
const share = (value) => `${figure(100 * value)} %`;

function ms(value) {
  if (value == null) return "–";
  if (value === Infinity) return "> 5 s"; // above all buckets
  if (value && value < 0.1) return `${figure(1000 * value)} µs`;
  return value < 1000 ? `${figure(value)} ms` : `${figure(value / 1000)} s`;
}

const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${figure(value)} ${units[unit]}`;
}

// --- Requests ---

let key = "";
let admin = false;

class Refusal extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? problem?.error ?? `the server answered with status ${status}`);
    this.status = status;
  }
}

async function send(method, path, { body, type, headers, timeout = TIMEOUT_MS } = {}) {
  const sent = { ...headers };
  if (key) sent["X-Api-Key"] = key;
  if (type) sent["Content-Type"] = type;
  const signal = timeout ? AbortSignal.timeout(timeout) : undefined;
  return fetch(new URL(path, home), { method, body, headers: sent, signal, credentials: "omit", redirect: "error", cache: "no-store" });
}

async function ask(method, path, json) {
  const options = json === undefined ? {} : { body: JSON.stringify(json), type: "application/json" };
  const answer = await send(method, path, options);
  const content = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refusal(answer.status, content);
  return content;
}

const at = (...names) => names.map(encodeURIComponent).join("/");

// --- The poll ---

let status = null;
let jobs = null;
let tag = "";
let wanted = null; // the sentence of a server that wants a key, or another one
let paused = false;
let failures = 0;
let idle = 0;
let timer = 0;
let round = 0;
const history = new Map(); // of each "model/version": [{time, requests, errors, counts}]

async function poll() {
  clearTimeout(timer);
  const mine = ++round;
  if (document.hidden || (paused && status)) return tell();
  try {
    const answer = await send("GET", "status", { headers: tag ? { "If-None-Match": tag } : {} });
    if (mine !== round) return;
    if (answer.status === 304) idle++;
    else {
      const content = await answer.json();
      if (mine !== round) return;
      if (!answer.ok) throw new Refusal(answer.status, content);
      idle = 0;
      tag = answer.headers.get("ETag") ?? "";
      announce(status, content);
      status = content;
    }
    remember();
    if (admin) jobs = (await ask("GET", "jobs")).jobs;
    failures = 0;
    wanted = null;
  } catch (error) {
    if (mine !== round) return;
    if (error.status === 401 || error.status === 403) {
      [status, jobs, tag, wanted] = [null, null, "", error];
      history.clear();
    } else failures++;
  }
  if (mine !== round) return;
  render();
  tell();
  if (!wanted) timer = setTimeout(poll, pause());
}

function pause() {
  if (failures) return Math.min(MOST_MS, POLL_MS * 2 ** failures);
  if (jobs?.some((job) => job.state === "running")) return JOB_MS;
  return idle >= 5 ? IDLE_MS : POLL_MS;
}

function tell() {
  const text = wanted ? "" : paused ? "Paused" : failures ? `The server does not answer; next try in ${count(pause() / 1000)} s` : status ? "Live" : "";
  show($("live"), text);
  $("live").className = failures ? "trouble" : "quiet";
}

function announce(before, after) {
  if (!before) return;
  const states = (from) => new Map(from.models.flatMap((model) => model.versions.map((version) => [`${model.name} ${version.version}`, version.state])));
  const old = states(before);
  for (const [name, state] of states(after)) {
    if (old.get(name) !== state) $("spoken").append(h("p", null, `${name} is ${state}`));
  }
  while ($("spoken").childNodes.length > 20) $("spoken").firstChild.remove();
}

function remember() {
  const time = performance.now();
  for (const model of status.models) {
    for (const version of model.versions) {
      const name = at(model.name, version.version);
      const { requests, duration } = version.figures;
      const total = sum(requests);
      let points = history.get(name) ?? [];
      // A server that has started again counts from zero.
      if (points.length && points.at(-1).total > total) points = [];
      points.push({ time, total, requests, counts: duration.counts });
      history.set(name, points.filter((point) => time - point.time < HISTORY_MS));
    }
  }
}

// What has happened to a version within the last minute, as far as this page has seen.
function recent(model, version) {
  const points = history.get(at(model.name, version.version)) ?? [];
  const last = points.at(-1);
  const first = points.find((point) => last.time - point.time < WINDOW_MS) ?? last;
  const seconds = last ? (last.time - first.time) / 1000 : 0;
  const counts = last ? last.counts.map((value, index) => value - first.counts[index]) : [];
  const bounds = version.figures.duration.bounds;
  return {
    rate: seconds ? (last.total - first.total) / seconds : null,
    p50: quantile(bounds, counts, 0.5),
    p99: quantile(bounds, counts, 0.99),
    refused: points.length ? less(last.requests, points[0].requests) : {},
    rates: points.slice(1).map((point, index) => (1000 * (point.total - points[index].total)) / (point.time - points[index].time)),
  };
}

const less = (after, before) => Object.fromEntries(Object.entries(after).map(([code, value]) => [code, value - (before[code] ?? 0)]));

// Milliseconds, by a straight line within a bucket.
function quantile(bounds, counts, rank) {
  const total = counts.reduce((all, one) => all + one, 0);
  if (!total) return null;
  let before = 0;
  for (let index = 0; index < bounds.length; index++) {
    if (before + counts[index] >= rank * total) {
      const low = index ? bounds[index - 1] : 0;
      return 1000 * (low + ((bounds[index] - low) * (rank * total - before)) / counts[index]);
    }
    before += counts[index];
  }
  return Infinity;
}

// --- What is shown ---

const COLOURS = { ready: "good", ok: "good", done: "good", promoted: "good", loading: "warn", draining: "warn", degraded: "warn", hung: "bad", failed: "bad", lost: "bad", unavailable: "bad", not_answering: "bad", rolled_back: "bad" };
const state = (name) => h("span", { class: `state ${COLOURS[name] ?? ""}` }, name.replaceAll("_", " "));
const dot = (name) => h("span", { class: `dot ${COLOURS[name] ?? ""}`, "aria-hidden": "true" });
const link = (model, version) => `#/${at(model, ...(version == null ? [] : [version]))}`;

// The version that stands for a model in the list.
const chief = (model) => model.versions.find((version) => version.version === model.default) ?? model.versions.at(-1);

let place = null; // what the address says: {model, version}
let built = ""; // what the main part was built for

function route() {
  let names = [];
  try {
    names = location.hash.replace(/^#\//, "").split("/").filter(Boolean).map(decodeURIComponent);
  } catch { /* no address of this page */ }
  place = location.hash.startsWith("#/") && names.length ? { model: names[0], version: names[1] } : null;
  // The skip link has an address of its own, which is no other view.
}

function found() {
  const model = place && status.models.find((each) => each.name === place.model);
  if (!model) return {};
  return { model, version: place.version ? model.versions.find((each) => String(each.version) === place.version) : chief(model) };
}

function render() {
  $("pause").hidden = !status;
  show($("health"), status ? state(status.health.status) : null);
  show($("nav"), status && [
    h("li", { class: "all" }, h("a", { href: "#/", "aria-current": place ? null : "page" }, "All models")),
    status.models.map((model) => h("li", null,
      h("a", { href: link(model.name), "aria-current": place?.model === model.name ? "page" : null },
        dot(chief(model)?.state ?? ""), h("span", null, model.name), h("span", { class: "hidden" }, ` ${chief(model)?.state ?? "no version"}`)))),
  ]);
  const main = $("main");
  if (wanted || !status) {
    built = "";
    show(main, wanted ? [
      h("div", { class: "panel" }, h("h1", { tabindex: "-1" }, "This server asks for a key"), h("p", { class: "text" }, `${wanted.message}.`),
        h("button", { type: "button", class: "main", "data-act": "ask-key" }, "Enter a key")),
    ] : h("p", { class: "quiet" }, failures ? "The server does not answer yet." : "Loading …"));
    return;
  }
  const { model, version } = found();
  document.title = model ? `${model.name} – Inferpool` : "Inferpool";
  if (place && !version) {
    built = "";
    show(main, h("h1", { tabindex: "-1" }, "Not found"), h("p", { class: "text" }, `There is no ${model ? `version ${place.version} of ${model.name}` : `model called ${place.model}`}.`),
      h("a", { href: "#/" }, "All models"));
  } else if (!place) {
    if (built !== "all") main.replaceChildren(h("div", { id: "all" }));
    built = "all";
    show($("all"), overview());
  } else {
    const what = at(model.name, version.version);
    if (built !== what) buildModel(model, version);
    built = what;
    updateModel(model, version);
  }
}

function overview() {
  const { server, health, models } = status;
  const ready = models.filter((model) => model.default != null).length;
  const problems = Object.entries(health.problems);
  const versions = models.flatMap((model) => model.versions.map((version) => ({ model, version })));
  return [
    h("div", { class: "top" },
      h("h1", { tabindex: "-1" }, "Models"),
      h("p", { class: "quiet" }, [`${ready} of ${models.length} ready`, `${count(server.in_flight_requests)} requests in flight`,
        server.memory_held != null && `${share(server.memory_held)} of ${bytes(server.memory_limit_bytes)} of memory held`,
        `Inferpool ${server.version}`].filter(Boolean).join(" · "), " · ", h("a", { href: new URL("docs", home).href }, "all routes")),
      problems.length > 0 && h("div", { class: "alert warn" }, problems.map(([name, text]) => h("div", null, h("strong", null, name), `: ${text}`)))),
    h("section", { class: "panel", "aria-label": "Models" },
      models.length ? table("Models", ["Model", "State", number("Requests/s"), number("p50"), number("p99"), number("Queue"), "Last 5 minutes"], models.map(modelRow), "models")
        : h("p", { class: "quiet" }, "The repository has no model.")),
    h("div", { class: "panels" },
      refusals(versions),
      engines(versions),
      jobsPanel()),
  ];
}

function modelRow(model) {
  const version = chief(model);
  if (!version) return h("tr", null, head(h("a", { href: link(model.name) }, model.name)), h("td", { colspan: 6 }, "no version"));
  const now = recent(model, version);
  const others = model.versions.length - 1;
  return h("tr", null,
    head(h("a", { href: link(model.name) }, model.name), " ", h("span", { class: "quiet small" }, `version ${version.version}`, others > 0 && ` and ${plural(others, "other")}`)),
    h("td", null, state(version.state), version.phase && h("span", { class: "quiet small" }, ` ${version.phase}`)),
    h("td", { class: "number", "data-unit": "requests/s" }, now.rate == null ? "–" : figure(now.rate)),
    h("td", { class: "number", "data-unit": "p50" }, ms(now.p50)),
    h("td", { class: "number", "data-unit": "p99" }, ms(now.p99)),
    h("td", { class: "number", "data-unit": "rows wait" }, count(version.queue_rows)),
    h("td", { class: "optional" }, spark(now.rates)));
}

const MEANINGS = { 400: "malformed", 401: "no key", 403: "not allowed", 404: "not found", 408: "sent too slowly", 413: "too large", 415: "media type", 422: "invalid input", 429: "queue full, or rate used up", 499: "client left", 500: "failed", 503: "not ready or overloaded", 504: "deadline missed" };

function refusals(versions) {
  const rows = versions.flatMap(({ model, version }) => {
    const lately = recent(model, version).refused;
    return Object.entries(version.figures.requests).filter(([code]) => code >= "400").map(([code, total]) => ({ name: `${model.name}/${version.version}`, code, total, lately: lately[code] ?? 0 }));
  });
  const dropped = versions.flatMap(({ model, version }) => Object.entries(version.figures.dropped).map(([reason, total]) => ({ name: `${model.name}/${version.version}`, reason, total })));
  const { refused_keys: keys, refused_connections: connections } = status.server;
  const others = [...Object.entries(keys).map(([reason, total]) => ["Keys", reason, total]), ...Object.entries(connections).map(([reason, total]) => ["Connections", reason, total])];
  rows.sort((one, other) => other.lately - one.lately || other.total - one.total);
  return h("section", { class: "panel" }, h("h2", null, "Refused and failed requests"),
    rows.length + others.length + dropped.length
      ? table("Refused and failed requests", ["Model", "Why", number("Last 5 min"), number("Since start")], [
        rows.map((row) => h("tr", null, head(row.name), h("td", null, row.code, " ", h("span", { class: "quiet" }, MEANINGS[row.code] ?? "")), cell(count(row.lately)), cell(count(row.total)))),
        dropped.map((row) => h("tr", null, head(row.name), h("td", null, "dropped: ", row.reason), cell(""), cell(count(row.total)))),
        others.map(([what, reason, total]) => h("tr", null, head(what), h("td", null, reason), cell(""), cell(count(total))))])
      : h("p", { class: "quiet" }, "None since the server started."));
}

function engines(versions) {
  const by = new Map();
  for (const { model, version } of versions) {
    if (!version.instances.length) continue;
    const name = version.engine?.name ?? "";
    const engine = by.get(name) ?? { ...version.engine, devices: new Set(), versions: [] };
    version.instances.forEach((instance) => engine.devices.add(instance.device));
    engine.versions.push(`${model.name}/${version.version}`);
    by.set(name, engine);
  }
  const cards = status.server.cards;
  return h("section", { class: "panel" }, h("h2", null, "Engines and cards"),
    by.size ? table("Processes that run models", ["Engine", "Devices", number("Restarts"), "Runs"], [...by].map(([name, engine]) => h("tr", null,
      head(name || "in the server’s process", engine.pid ? h("span", { class: "quiet small" }, ` process ${engine.pid}`) : null),
      h("td", null, [...engine.devices].join(", ")), cell(count(engine.restarts ?? 0)), h("td", { class: "text" }, engine.versions.join(", ")))))
      : h("p", { class: "quiet" }, "No model is loaded."),
    cards.length ? [h("h3", null, "Graphics cards"), table("Graphics cards", ["Card", "Busy", "Memory", number("Power")], cards.map((card) => h("tr", null,
      head(card.device, card.temperature_celsius != null && h("span", { class: "quiet small" }, ` ${figure(card.temperature_celsius)} °C`)),
      h("td", null, card.utilization == null ? "–" : [share(card.utilization), bar(card.utilization)]),
      h("td", null, `${bytes(card.memory_used_bytes ?? 0)} of ${bytes(card.memory_total_bytes ?? 0)}`, bar(card.memory_used_bytes / card.memory_total_bytes)),
      cell(card.power_watts == null ? "–" : `${figure(card.power_watts)} W`))))]
      : h("p", { class: "quiet small" }, "There is no graphics card."));
}

function jobsPanel() {
  const panel = (...children) => h("section", { class: "panel wide" }, h("h2", null, "Loads and unloads"), children);
  if (!admin) {
    return panel(h("p", { class: "quiet" }, "The jobs are shown to a key with the scope ", h("code", null, "admin"), ". "), h("button", { type: "button", "data-act": "ask-key" }, "Enter a key"));
  }
  if (!jobs?.length) return panel(h("p", { class: "quiet" }, "There was none since the server started."));
  return panel(table("The latest first", ["Job", "State", "Progress", "", ""], [...jobs].reverse().slice(0, 20).map((job) => h("tr", null,
    head(`${job.kind} ${job.model}`, h("span", { class: "quiet small" }, job.versions.length ? ` ${job.versions.join(", ")}` : "")),
    h("td", null, state(job.state)),
    h("td", null, job.state === "running" ? h("progress", { max: 1, value: job.share, "aria-label": `Progress of ${job.kind} ${job.model}` }) : ""),
    h("td", { class: "text" }, job.state === "running" ? [job.phase ?? "", job.seconds_left != null && ` ${figure(job.seconds_left)} s left`] : job.reason || new Date(job.ended).toLocaleTimeString()),
    h("td", { class: "number" }, job.state === "running" && h("button", { type: "button", "data-act": "cancel", "data-job": job.id, "data-name": `${job.kind} ${job.model}` }, "Cancel"))))));
}

// --- One version ---

let detail = null; // what is told of the version once: classes

function buildModel(model, version) {
  detail = null;
  const part = (id, tag = "section", kind = "panel") => h(tag, { id, class: kind });
  $("main").replaceChildren(part("top", "div", "top"), part("stats", "div", ""),
    h("div", { class: "panels" },
      h("div", { class: "stack" }, tryPanel(model, version), part("latency"), part("traffic")),
      h("div", { class: "stack" }, part("batching"), part("about"), part("manage"))));
  const mine = at(model.name, version.version);
  ask("GET", `models/${mine}`).then((told) => {
    if (built !== mine) return;
    detail = told;
    render();
  }).catch(() => {});
}

function updateModel(model, version) {
  show($("top"), top(model, version));
  show($("stats"), stats(model, version));
  show($("batching"), batching(version));
  show($("latency"), latency(version));
  show($("about"), about(version));
  show($("traffic"), traffic(model));
  $("traffic").hidden = !model.traffic.canary && !model.traffic.shadow;
  updateManage(model, version);
}

function top(model, version) {
  const labels = (each) => Object.entries(model.labels).filter(([, number]) => number === each.version).map(([label]) => h("span", { class: "tag" }, label));
  return [
    h("div", { class: "crumb" }, h("a", { href: "#/" }, "All models")),
    h("div", { class: "row" }, h("h1", { tabindex: "-1", class: "text" }, model.name), state(version.state), version.phase && h("span", { class: "quiet" }, version.phase)),
    model.description && h("p", { class: "quiet text" }, model.description),
    version.reason && h("div", { class: `alert ${version.state === "failed" ? "bad" : "warn"}` }, version.reason),
    h("ul", { class: "versions", "aria-label": "Versions" }, model.versions.map((each) => h("li", null,
      h("a", { href: link(model.name, each.version), "aria-current": each.version === version.version ? "page" : null },
        dot(each.state), `Version ${each.version}`, h("span", { class: "hidden" }, ` ${each.state}`), labels(each), each.version === model.default && h("span", { class: "quiet small" }, "default"))))),
  ];
}

function stats(model, version) {
  const now = recent(model, version);
  const { requests, batches, queue_wait_ms: wait, duration } = version.figures;
  const runs = batches.reduce((total, line) => total + line.runs, 0);
  const rows = batches.reduce((total, line) => total + line.rows * line.runs, 0);
  const failed = Object.entries(requests).filter(([code]) => code >= "500").reduce((total, [, value]) => total + value, 0);
  const refused = Object.entries(requests).filter(([code]) => code >= "400" && code < "500").reduce((total, [, value]) => total + value, 0);
  const since = (rank) => `since start ${ms(quantile(duration.bounds, duration.counts, rank))}`;
  const item = (name, value, more) => h("div", null, h("dt", null, name), h("dd", null, value), h("dd", { class: "small" }, more));
  return h("dl", { class: "stats" },
    item("Requests per second", now.rate == null ? "–" : figure(now.rate), `${count(sum(requests))} since start`),
    item("p50, last minute", ms(now.p50), since(0.5)),
    item("p99, last minute", ms(now.p99), since(0.99)),
    item("Queue", plural(version.queue_rows, "row"), wait ? `${ms(wait)} of work` : "nothing waits"),
    item("Rows per batch", runs ? figure(rows / runs) : "–", plural(runs, "batch").replace("batchs", "batches")),
    item("Failed", count(failed), `${count(refused)} refused`));
}

const EVIDENCE = { graph: "shown by reading the graph", runs: "shown by running rows alone and together" };

function batching(version) {
  const { batching: verdict, figures } = version;
  const most = Math.max(...figures.batches.map((line) => line.runs), 1);
  const reasons = Object.entries(figures.reasons).sort(([, one], [, other]) => other - one);
  const all = sum(figures.reasons) || 1;
  return [
    h("h2", null, "Batching"),
    h("p", null, h("span", { class: `state ${verdict.enabled ? "good" : "warn"}` }, verdict.enabled ? `up to ${plural(verdict.max_rows, "row")} together` : "each request alone"),
      verdict.evidence && h("span", { class: "quiet small" }, ` ${EVIDENCE[verdict.evidence]}`)),
    verdict.reason && h("p", { class: "text" }, verdict.reason),
    verdict.max_delay_ms > 0 && h("p", { class: "quiet" }, `A batch waits ${ms(verdict.max_delay_ms)} for more rows.`),
    figures.batches.length > 0 && [h("h3", null, "Batch sizes"), table("Batches that ran, by their rows", ["Rows", number("Batches"), ""], [...figures.batches].sort((one, other) => one.rows - other.rows).map((line) =>
      h("tr", null, head(count(line.rows)), cell(count(line.runs)), graph(line.runs / most))))],
    reasons.length > 0 && [h("h3", null, "Why batches were no larger"), table("Batches by the reason of their dispatch", ["Reason", number("Batches"), ""], reasons.map(([reason, runs]) =>
      h("tr", null, head(reason), cell(count(runs)), graph(runs / all))))],
  ];
}

function latency(version) {
  const lines = [...version.latency].sort((one, other) => one.rows - other.rows);
  const most = Math.max(...lines.map((line) => line.compute_ms), 1e-9);
  return [
    h("h2", null, "Latency by rows"),
    lines.length > 0 && h("p", { class: "quiet small" }, "The time of a batch in the model, as measured when it was loaded and since."),
    lines.length ? table("Time of a batch in the model", [number("Rows"), number("Time"), number("A row"), ""], lines.map((line) => h("tr", null,
      h("th", { scope: "row", class: "number" }, figure(line.rows)), cell(ms(line.compute_ms)), cell(ms(line.compute_ms / line.rows)), graph(line.compute_ms / most))))
      : h("p", { class: "quiet" }, "Nothing was measured."),
  ];
}

const shape = (sizes) => (sizes ? `[${sizes.map((size) => (size === -1 ? "any" : size)).join(", ")}]` : "of any rank");

function about(version) {
  const tensors = (list) => list.map((tensor) => h("div", null, h("code", null, tensor.name), " ", h("span", { class: "quiet" }, `${tensor.datatype} ${shape(tensor.shape)}${tensor.optional ? ", optional" : ""}`)));
  const places = {};
  version.instances.forEach(({ device, state: how }) => { places[`${device}, ${how.replaceAll("_", " ")}`] = (places[`${device}, ${how.replaceAll("_", " ")}`] ?? 0) + 1; });
  const { gpu, engine } = version;
  const classes = detail?.classes;
  return [
    h("h2", null, "About this version"),
    facts([
      ["Inputs", version.inputs.length ? tensors(version.inputs) : null],
      ["Outputs", version.outputs.length ? tensors(version.outputs) : null],
      ["Takes", version.media_types.join(", ")],
      ["Digest", version.digest && h("code", null, version.digest)],
      ["Runtime", version.backend],
      ["Instances", Object.entries(places).map(([where, many]) => h("div", null, `${many} on ${where}`))],
      ["Engine", engine && `${engine.name}, process ${engine.pid}, ${plural(engine.restarts, "restart")}`],
      ["Threads", version.threads || null],
      ["Load", version.load_ms ? ms(version.load_ms) : null],
      ["Precision", gpu?.precision],
      ["Padding", gpu?.padding],
      ["CUDA graphs", gpu && (gpu.graphs === true ? "yes" : gpu.graphs || "no")],
      ["TensorRT", gpu?.tensorrt],
      ["On the CPU", gpu && Object.entries(gpu.cpu_nodes).map(([kind, many]) => `${kind} × ${many}`).join(", ")],
    ]),
    classes && h("details", null, h("summary", null, `${count(classes)} class names`),
      h("p", { class: "names" }, detail.class_names.map((name) => h("span", { class: "tag" }, name)), classes > detail.class_names.length && h("span", { class: "quiet" }, `and ${count(classes - detail.class_names.length)} more`))),
  ];
}

function traffic({ traffic: { canary, shadow } }) {
  const trial = (name, side) => h("tr", null, head(`${name}: version ${side.version}`), cell(count(side.requests)), cell(count(side.failures)), cell(ms(side.p50_ms)), cell(ms(side.p99_ms)));
  return [
    h("h2", null, "Traffic"),
    canary && [
      h("p", null, h("strong", null, `Canary: version ${canary.version}`), ` answers ${share(canary.share)}, by ${canary.by} `, state(canary.state)),
      canary.reason && h("p", { class: "text" }, canary.reason),
      table("What both versions have done", ["Version", number("Requests"), number("Failed"), number("p50"), number("p99")], [trial("canary", canary.canary), trial("stable", canary.stable)]),
    ],
    shadow && [
      h("p", null, h("strong", null, `Shadow: version ${shadow.version}`), ` gets copies of ${share(shadow.share)} of the requests.`),
      facts([
        ["Compared", `${count(shadow.compared)}, ${count(shadow.failed)} failed, ${count(shadow.dropped)} dropped, ${count(shadow.unlike)} of another shape`],
        ["Labels changed", shadow.changed_labels == null ? null : share(shadow.changed_labels)],
        ["Mean time", shadow.sent_ms == null ? null : `${ms(shadow.copy_ms)}, and ${ms(shadow.sent_ms)} of the answers that were sent`],
        ["Slower", shadow.slower == null ? null : `${share(shadow.slower)} of the copies`],
      ]),
      shadow.outputs.length > 0 && table("Differences of the outputs", ["Output", number("Largest"), number("Mean")], shadow.outputs.map((output) =>
        h("tr", null, head(output.name), cell(figure(output.largest)), cell(figure(output.mean))))),
    ],
  ];
}

// --- Try a model ---

// Numbers of one row stay on one line.
function pretty(value, indent = "") {
  const flat = (each) => each === null || typeof each !== "object";
  const deeper = `${indent}  `;
  if (flat(value) || (Array.isArray(value) && value.every(flat))) return JSON.stringify(value);
  if (Array.isArray(value)) return `[\n${value.map((each) => deeper + pretty(each, deeper)).join(",\n")}\n${indent}]`;
  return `{\n${Object.entries(value).map(([name, each]) => `${deeper}${JSON.stringify(name)}: ${pretty(each, deeper)}`).join(",\n")}\n${indent}}`;
}

function zeros(version) {
  const own = version.inputs.filter((tensor) => !tensor.optional);
  const fill = ([size, ...rest], datatype) => Array.from({ length: Math.max(size, 1) }, () => (rest.length ? fill(rest, datatype) : datatype === "BYTES" ? "text" : datatype === "BOOL" ? false : 0));
  const elements = own.reduce((total, { shape: sizes }) => total + (sizes ?? []).reduce((product, size) => product * Math.max(size, 1), 1), 0);
  if (elements > 1024) return "";
  return pretty({ inputs: Object.fromEntries(own.map((tensor) => [tensor.name, fill(tensor.shape?.length ? tensor.shape : [1], tensor.datatype)])) });
}

const sentenceIn = (value) => (typeof value === "string" ? value : value && typeof value === "object" ? Object.values(value).map(sentenceIn).find((text) => text !== undefined) : undefined);

function tryPanel(model, version) {
  const types = version.media_types;
  const pictures = types.filter((type) => type.startsWith("image/"));
  const modes = [pictures.length && ["picture", "Picture"], types.includes("text/plain") && ["sentence", "Sentence"], ["json", "JSON"]].filter(Boolean);
  const path = `predict/${at(model.name, version.version)}`;
  let mode = modes[0][0];
  let picture = null;

  const textarea = h("textarea", { id: "json", spellcheck: "false", autocomplete: "off", "aria-describedby": "try-fault" });
  const sentence = h("textarea", { id: "sentence", class: "prose", "aria-describedby": "try-fault" });
  const samples = h("select", { id: "sample" }, h("option", { value: "" }, "an example of zeros"));
  const file = h("input", { type: "file", id: "file", class: "hidden", accept: pictures.join(",") });
  const preview = h("span", null, "Drop a picture here, or choose a file");
  const drop = h("label", { class: "drop", for: "file" }, preview, file);
  const run = h("button", { type: "button", class: "main", id: "run" }, "Predict");
  const fault = h("p", { id: "try-fault", class: "fault", role: "alert" });
  const answer = h("div", { class: "answer", id: "answer" });
  const parts = {
    picture: h("div", null, drop),
    sentence: h("div", null, h("label", { for: "sentence" }, "Sentence"), sentence),
    json: h("div", null, h("div", { class: "between" }, h("label", { for: "json" }, "Body"), h("span", null, h("label", { for: "sample", class: "quiet" }, "Start with "), samples)), textarea),
  };
  const choose = (chosen) => {
    mode = chosen;
    for (const [name, part] of Object.entries(parts)) part.hidden = name !== mode;
  };
  const take = (chosen) => {
    if (!chosen) return;
    picture = chosen;
    const url = URL.createObjectURL(chosen);
    const image = h("img", { src: url, alt: "" });
    image.onload = image.onerror = () => URL.revokeObjectURL(url);
    preview.replaceChildren(image, h("br"), `${chosen.name}, ${bytes(chosen.size)}`);
    predict();
  };
  const predict = async () => {
    if (run.getAttribute("aria-disabled") === "true") return;
    fault.textContent = "";
    let body = textarea.value, type = "application/json";
    if (mode === "picture") {
      if (!picture) { fault.textContent = "Choose a picture first."; return; }
      [body, type] = [picture, picture.type || "application/octet-stream"];
    } else if (mode === "sentence") [body, type] = [sentence.value, "text/plain"];
    run.setAttribute("aria-disabled", "true");
    answer.setAttribute("aria-busy", "true");
    try {
      const began = performance.now();
      const got = await send("POST", path, { body, type, headers: { Accept: "application/json" }, timeout: 0 });
      const content = await got.json();
      if (!got.ok) throw new Refusal(got.status, content);
      show(answer, result(content, got.headers.get("Server-Timing") ?? "", performance.now() - began));
    } catch (error) {
      show(answer);
      fault.textContent = error instanceof Refusal ? `${error.status}: ${error.message}` : `The server did not answer: ${error.message}`;
    } finally {
      run.removeAttribute("aria-disabled");
      answer.removeAttribute("aria-busy");
    }
  };
  const fill = () => {
    const sample = known[samples.value];
    textarea.value = sample ? pretty({ inputs: sample.inputs }) : zeros(version);
  };

  run.onclick = predict;
  samples.onchange = fill;
  file.onchange = () => take(file.files[0]);
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); };
  for (const area of [textarea, sentence]) {
    area.onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) predict(); };
  }
  let known = [];
  textarea.value = zeros(version);
  ask("GET", `models/${at(model.name, version.version)}/samples`).then((told) => {
    known = told.samples;
    known.forEach((sample, index) => samples.append(h("option", { value: String(index) }, sample.name)));
    if (!known.length) return;
    samples.value = "0";
    fill();
    sentence.value ||= known.map((sample) => sentenceIn(sample.inputs)).find(Boolean) ?? "";
  }).catch(() => {});
  choose(mode);
  return h("section", { class: "panel", "aria-labelledby": "try-title" },
    h("div", { class: "between" }, h("h2", { id: "try-title" }, "Try it"),
      modes.length > 1 && h("div", { class: "choices", role: "radiogroup", "aria-label": "What to send" }, modes.map(([name, text]) => {
        const radio = h("input", { type: "radio", name: "mode", value: name, checked: name === mode });
        radio.onchange = () => choose(name);
        return h("label", null, radio, ` ${text}`);
      }))),
    Object.values(parts),
    h("div", { class: "row" }, run, h("span", { class: "quiet small" }, "POST ", h("code", null, `/${path}`))),
    fault, h("div", { "aria-live": "polite" }, answer));
}

function result(content, timing, total) {
  const times = Object.fromEntries([...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, value]) => [name, Number(value)]));
  const rows = content.predictions ?? [];
  const text = pretty(content);
  return [
    h("p", { class: "quiet small" }, `Version ${content.version} answered in ${ms(total)}`, times.compute != null && `: ${ms(times.queue)} in the queue, ${ms(times.compute)} in the model`),
    rows.length > 0 && table("Predictions", [rows.length > 1 && "Row", "Label", number("Score"), ""].filter((name) => name !== false), rows.slice(0, 10).map((labels, index) => labels.slice(0, 5).map((best, rank) =>
      h("tr", { class: rank ? null : "best" }, rows.length > 1 && h("td", { class: "quiet" }, rank ? "" : count(index + 1)), head(best.label), cell(best.score == null ? "–" : figure(best.score)), graph(best.score))))),
    rows.length > 10 && h("p", { class: "quiet" }, `and ${count(rows.length - 10)} more rows`),
    h("details", { open: !rows.length }, h("summary", null, "The whole answer"), h("pre", { tabindex: "0", role: "region", "aria-label": "The whole answer" }, text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN)} …` : text)),
  ];
}

// --- Changes ---

function updateManage(model, version) {
  const panel = $("manage");
  if (!admin) {
    panel.removeAttribute("data-for");
    show(panel, h("h2", null, "Manage"), h("p", { class: "quiet" }, "Loads, labels and traffic need a key with the scope ", h("code", null, "admin"), "."),
      h("button", { type: "button", "data-act": "ask-key" }, "Enter a key"));
    return;
  }
  // Built once, so that nobody's typing is lost; only the list of labels follows the server.
  const what = at(model.name, version.version);
  if (panel.dataset.for !== what) {
    panel.dataset.for = what;
    panel.className = "panel manage";
    const button = (act, text, more) => h("button", { type: "button", "data-act": act, "data-model": model.name, "data-version": version.version, ...more }, text);
    const field = (id, text, input) => h("span", null, h("label", { for: id }, `${text} `), h("input", { id, autocomplete: "off", ...input }));
    panel.replaceChildren(h("h2", null, "Manage"),
      h("fieldset", null, h("legend", null, `Version ${version.version}`), h("div", { class: "row" }, button("load", "Load"), button("unload", "Unload"))),
      h("fieldset", null, h("legend", null, "Labels"), h("div", { id: "labels", class: "row" }),
        h("div", { class: "row" }, field("label", "Name", { value: "stable", maxlength: 64, size: 12 }), button("label", `Give to version ${version.version}`))),
      h("fieldset", null, h("legend", null, `Traffic to version ${version.version}`),
        h("div", { class: "row" }, field("share", "Share in %", { type: "number", min: 0, max: 100, value: 10, class: "short" }),
          button("canary", "Start as canary"), button("shadow", "Start as shadow"))),
      h("fieldset", null, h("legend", null, "The whole model"), h("div", { class: "row" }, button("end-traffic", "End canary and shadow"), button("rollback", "Roll back"))));
  }
  const names = Object.entries(model.labels);
  show($("labels"), names.length ? names.map(([label, number]) => h("span", { class: "tag" }, `${label} → ${number} `,
    h("button", { type: "button", class: "plain", "data-act": "unlabel", "data-model": model.name, "data-label": label, "aria-label": `Remove the label ${label}` }, "remove"))) : h("span", { class: "quiet" }, "No version has a label."));
}

async function change(text, method, path, json) {
  try {
    const told = await ask(method, path, json);
    notice(told?.state === "running" ? `${text}: job ${told.id} has begun.` : `${text}: done.`);
  } catch (error) {
    notice(`${text}: ${error.message}`);
  }
  idle = 0;
  poll();
}

const percent = () => Number($("share").value) / 100;

const acts = {
  "ask-key": () => {
    $("key-fault").textContent = "";
    $("forget").hidden = !key;
    $("key-dialog").showModal();
    $("key-field").focus();
  },
  "use-key": async () => {
    const before = key;
    key = $("key-field").value.trim();
    try {
      // A key with any scope is known to all routes; 401 is for a key that the server does not know.
      const answer = await send("GET", "jobs");
      if (answer.status === 401 || !key) throw new Refusal(401, key ? await answer.json() : { detail: "type a key first" });
      admin = answer.ok;
    } catch (error) {
      key = before;
      $("key-fault").textContent = error.message;
      return;
    }
    useKey();
  },
  "forget-key": () => { key = ""; admin = false; useKey(); },
  "close-key": () => $("key-dialog").close(),
  load: ({ model, version }) => change(`Load ${model} ${version}`, "POST", `models/${at(model)}/load`, { version: Number(version) }),
  unload: async ({ model, version }) => {
    if (await confirmed("Unload", `Unload version ${version} of ${model}? The requests that it has accepted are answered first; later ones are refused.`)) {
      change(`Unload ${model} ${version}`, "POST", `models/${at(model)}/unload`, { version: Number(version) });
    }
  },
  label: ({ model, version }) => change(`Label ${$("label").value}`, "PUT", `models/${at(model)}/labels/${at($("label").value.trim())}`, { version: Number(version) }),
  unlabel: async ({ model, label }) => {
    if (await confirmed("Remove the label", `Remove the label ${label} of ${model}? Requests that name it are refused from then on.`)) {
      change(`Remove the label ${label}`, "DELETE", `models/${at(model)}/labels/${at(label)}`);
    }
  },
  canary: ({ model, version }) => change(`Canary ${version}`, "PUT", `models/${at(model)}/traffic`, { canary: { version: Number(version), share: percent() } }),
  shadow: ({ model, version }) => change(`Shadow ${version}`, "PUT", `models/${at(model)}/traffic`, { shadow: { version: Number(version), share: percent() } }),
  "end-traffic": async ({ model }) => {
    if (await confirmed("End both", `End the canary and the shadow of ${model}?`)) change("End the traffic", "DELETE", `models/${at(model)}/traffic`);
  },
  rollback: async ({ model }) => {
    if (await confirmed("Roll back", `Let the version of ${model} answer that answered before the present one?`)) change(`Roll back ${model}`, "POST", `models/${at(model)}/rollback`);
  },
  cancel: async ({ job, name }) => {
    if (await confirmed("Cancel the job", `Cancel the job “${name}”?`)) change(`Cancel ${name}`, "DELETE", `jobs/${at(job)}`);
  },
  dismiss: () => show($("notice")),
};

function useKey() {
  $("key-field").value = "";
  $("key-dialog").close();
  show($("key"), key ? (admin ? "Admin key" : "Key in use") : "Enter a key");
  [tag, jobs, failures, idle] = ["", null, 0, 0];
  built = "";
  notice(key ? `The key is used${admin ? ", and allows changes" : "; it does not allow changes"}.` : "The key is forgotten.");
  poll();
}

function confirmed(verb, text) {
  show($("confirm-title"), verb);
  show($("confirm-text"), text);
  show($("confirm-yes"), verb);
  $("confirm").showModal();
  $("confirm-no").focus();
  return new Promise((resolve) => {
    $("confirm").onclose = () => resolve($("confirm").returnValue === "yes");
    $("confirm-yes").onclick = () => $("confirm").close("yes");
    $("confirm-no").onclick = () => $("confirm").close("no");
    $("confirm").oncancel = () => { $("confirm").returnValue = "no"; };
  });
}

let noticeTimer = 0;
function notice(text) {
  clearTimeout(noticeTimer);
  show($("notice"), h("p", null, h("span", null, text), h("button", { type: "button", "data-act": "dismiss" }, "Dismiss")));
  noticeTimer = setTimeout(acts.dismiss, 12000);
}

// --- Events ---

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) acts[button.dataset.act]({ ...button.dataset });
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
// A file that is dropped beside its place would replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
addEventListener("hashchange", () => {
  if (location.hash === "#main") return;
  route();
  render();
  const title = $("main").querySelector("h1");
  if (title) title.focus();
  scrollTo(0, 0);
});
$("key-field").onkeydown = (event) => { if (event.key === "Enter") acts["use-key"](); };
$("key-dialog").onclose = () => { $("key-field").value = ""; };
$("pause").onclick = () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  show($("pause"), paused ? "Resume" : "Pause");
  poll();
};
for (const each of document.querySelectorAll("a[href='docs']")) each.href = new URL("docs", home);

route();
poll();

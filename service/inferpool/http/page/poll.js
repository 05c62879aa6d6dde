// The poll of `/status`, and what it has seen within the last minutes.

const POLL_MS = 3000; // between two looks while something changes
const JOB_MS = 1000; // while a job runs
const CHANGE_MS = 3000; // after a change: what was told before is up to a second old
const IDLE_MS = 10000; // while nothing does
const MOST_MS = 60000; // while the server does not answer
const HISTORY_MS = 300000;
const WINDOW_MS = 60000; // that rates and percentiles are of

let status = null;
let jobs = null;
let tag = "";
let wanted = null; // the sentence of a server that wants a key, or another one
let paused = false;
let failures = 0;
let idle = 0;
let changed = -CHANGE_MS;
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
    const found = admin ? (await ask("GET", "jobs")).jobs : null;
    if (mine !== round) return;
    jobs = found;
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
  if (jobs?.some((job) => job.state === "running") || performance.now() - changed < CHANGE_MS) return JOB_MS;
  return idle >= 5 ? IDLE_MS : POLL_MS;
}

function tell() {
  const text = wanted
    ? ""
    : paused
      ? "Paused"
      : failures
        ? `The server does not answer; next try in ${count(pause() / 1000)} s`
        : status
          ? "Live"
          : "";
  show($("live"), text);
  $("live").className = failures ? "trouble" : "quiet";
}

function announce(before, after) {
  if (!before) return;
  const states = (from) =>
    new Map(
      from.models.flatMap((model) =>
        model.versions.map((version) => [`${model.name} ${version.version}`, version.state]),
      ),
    );
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
      history.set(
        name,
        points.filter((point) => time - point.time < HISTORY_MS),
      );
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
    rates: points
      .slice(1)
      .map((point, index) => (1000 * (point.total - points[index].total)) / (point.time - points[index].time)),
  };
}

const less = (after, before) =>
  Object.fromEntries(Object.entries(after).map(([code, value]) => [code, value - (before[code] ?? 0)]));

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

// Requests to the server, with the key that was entered. The key lives in the variable `key`, and nowhere else.

const TIMEOUT_MS = 15000;

const home = new URL(location.pathname.endsWith("/") ? "." : `${location.pathname}/`, location.href);

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
  return fetch(new URL(path, home), {
    method,
    body,
    headers: sent,
    signal,
    credentials: "omit",
    redirect: "error",
    cache: "no-store",
  });
}

async function ask(method, path, json) {
  const options = json === undefined ? {} : { body: JSON.stringify(json), type: "application/json" };
  const answer = await send(method, path, options);
  const content = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refusal(answer.status, content);
  return content;
}

const at = (...names) => names.map(encodeURIComponent).join("/");

// What the address asks for is shown: all models, or one version (see version.js).

const COLOURS = {
  ready: "good",
  ok: "good",
  done: "good",
  promoted: "good",
  loading: "warn",
  draining: "warn",
  degraded: "warn",
  hung: "bad",
  failed: "bad",
  lost: "bad",
  unavailable: "bad",
  not_answering: "bad",
  rolled_back: "bad",
};
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
  } catch {
    /* no address of this page */
  }
  place = location.hash.startsWith("#/") && names.length ? { model: names[0], version: names[1] } : null;
  // The skip link has an address of its own, which is no other view.
}

function found() {
  const model = place && status.models.find((each) => each.name === place.model);
  if (!model) return {};
  return {
    model,
    version: place.version ? model.versions.find((each) => String(each.version) === place.version) : chief(model),
  };
}

function render() {
  $("pause").hidden = !status;
  show($("health"), status ? state(status.health.status) : null);
  show(
    $("nav"),
    status && [
      h("li", { class: "all" }, h("a", { href: "#/", "aria-current": place ? null : "page" }, "All models")),
      status.models.map((model) =>
        h(
          "li",
          null,
          h(
            "a",
            { href: link(model.name), "aria-current": place?.model === model.name ? "page" : null },
            dot(chief(model)?.state ?? ""),
            h("span", null, model.name),
            h("span", { class: "hidden" }, ` ${chief(model)?.state ?? "no version"}`),
          ),
        ),
      ),
    ],
  );
  const main = $("main");
  if (wanted || !status) {
    built = "";
    show(
      main,
      wanted
        ? [
            h(
              "div",
              { class: "panel" },
              h("h1", { tabindex: "-1" }, "This server asks for a key"),
              h("p", { class: "text" }, `${wanted.message}.`),
              h("button", { type: "button", class: "main", "data-act": "ask-key" }, "Enter a key"),
            ),
          ]
        : h("p", { class: "quiet" }, failures ? "The server does not answer yet." : "Loading …"),
    );
    return;
  }
  const { model, version } = found();
  document.title = model ? `${model.name} – Inferpool` : "Inferpool";
  if (place && !version) {
    built = "";
    show(
      main,
      h("h1", { tabindex: "-1" }, "Not found"),
      h(
        "p",
        { class: "text" },
        `There is no ${model ? `version ${place.version} of ${model.name}` : `model called ${place.model}`}.`,
      ),
      h("a", { href: "#/" }, "All models"),
    );
  } else if (!place) {
    if (built !== "all") main.replaceChildren(h("div", { id: "all" }));
    built = "all";
    show($("all"), overview());
  } else {
    const what = at(model.name, version.version);
    // What a version takes is known once it is loaded.
    const known = !version.media_types.length || types === String(version.media_types);
    if (built !== what || !known) buildModel(model, version);
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
    h(
      "div",
      { class: "top" },
      h("h1", { tabindex: "-1" }, "Models"),
      h(
        "p",
        { class: "quiet" },
        [
          `${ready} of ${models.length} ready`,
          `${count(server.in_flight_requests)} requests in flight`,
          server.memory_held != null &&
            `${share(server.memory_held)} of ${bytes(server.memory_limit_bytes)} of memory held`,
          `Inferpool ${server.version}`,
        ]
          .filter(Boolean)
          .join(" · "),
        " · ",
        h("a", { href: new URL("docs", home).href }, "all routes"),
      ),
      problems.length > 0 &&
        h(
          "div",
          { class: "alert warn" },
          problems.map(([name, text]) => h("div", null, h("strong", null, name), `: ${text}`)),
        ),
    ),
    h(
      "section",
      { class: "panel", "aria-label": "Models" },
      models.length
        ? table(
            "Models",
            ["Model", "State", number("Requests/s"), number("p50"), number("p99"), number("Queue"), "Last 5 minutes"],
            models.map(modelRow),
            "models",
          )
        : h("p", { class: "quiet" }, "The repository has no model."),
    ),
    h("div", { class: "panels" }, refusals(versions), engines(versions), jobsPanel()),
  ];
}

function modelRow(model) {
  const version = chief(model);
  if (!version)
    return h("tr", null, head(h("a", { href: link(model.name) }, model.name)), h("td", { colspan: 6 }, "no version"));
  const now = recent(model, version);
  const others = model.versions.length - 1;
  return h(
    "tr",
    null,
    head(
      h("a", { href: link(model.name) }, model.name),
      " ",
      h(
        "span",
        { class: "quiet small" },
        `version ${version.version}`,
        others > 0 && ` and ${plural(others, "other")}`,
      ),
    ),
    h("td", null, state(version.state), version.phase && h("span", { class: "quiet small" }, ` ${version.phase}`)),
    h("td", { class: "number", "data-unit": "requests/s" }, now.rate == null ? "–" : figure(now.rate)),
    h("td", { class: "number", "data-unit": "p50" }, ms(now.p50)),
    h("td", { class: "number", "data-unit": "p99" }, ms(now.p99)),
    h("td", { class: "number", "data-unit": "rows wait" }, count(version.queue_rows)),
    h("td", { class: "optional" }, spark(now.rates)),
  );
}

const MEANINGS = {
  400: "malformed",
  401: "no key",
  403: "not allowed",
  404: "not found",
  408: "sent too slowly",
  413: "too large",
  415: "media type",
  422: "invalid input",
  429: "queue full, or rate used up",
  499: "client left",
  500: "failed",
  503: "not ready or overloaded",
  504: "deadline missed",
};

function refusals(versions) {
  const rows = versions.flatMap(({ model, version }) => {
    const lately = recent(model, version).refused;
    return Object.entries(version.figures.requests)
      .filter(([code]) => code >= "400")
      .map(([code, total]) => ({ name: `${model.name}/${version.version}`, code, total, lately: lately[code] ?? 0 }));
  });
  const dropped = versions.flatMap(({ model, version }) =>
    Object.entries(version.figures.dropped).map(([reason, total]) => ({
      name: `${model.name}/${version.version}`,
      reason,
      total,
    })),
  );
  const { refused_keys: keys, refused_connections: connections } = status.server;
  const others = [
    ...Object.entries(keys).map(([reason, total]) => ["Keys", reason, total]),
    ...Object.entries(connections).map(([reason, total]) => ["Connections", reason, total]),
  ];
  rows.sort((one, other) => other.lately - one.lately || other.total - one.total);
  return h(
    "section",
    { class: "panel" },
    h("h2", null, "Refused and failed requests"),
    rows.length + others.length + dropped.length
      ? table(
          "Refused and failed requests",
          ["Model", "Why", number("Last 5 min"), number("Since start")],
          [
            rows.map((row) =>
              h(
                "tr",
                null,
                head(row.name),
                h("td", null, row.code, " ", h("span", { class: "quiet" }, MEANINGS[row.code] ?? "")),
                cell(count(row.lately)),
                cell(count(row.total)),
              ),
            ),
            dropped.map((row) =>
              h("tr", null, head(row.name), h("td", null, "dropped: ", row.reason), cell(""), cell(count(row.total))),
            ),
            others.map(([what, reason, total]) =>
              h("tr", null, head(what), h("td", null, reason), cell(""), cell(count(total))),
            ),
          ],
        )
      : h("p", { class: "quiet" }, "None since the server started."),
  );
}

function engines(versions) {
  const by = new Map();
  for (const { model, version } of versions) {
    if (!version.instances.length) continue;
    const several = version.engines.length > 1;
    for (const process of several ? version.engines : [version.engine]) {
      const name = process?.name ?? "";
      const engine = by.get(name) ?? { ...process, devices: new Set(), versions: [] };
      // Of engines that share a version, each is called by its device.
      const devices = several ? [name.split("-")[0]] : version.instances.map((each) => each.device);
      devices.forEach((device) => engine.devices.add(device));
      engine.versions.push(`${model.name}/${version.version}`);
      by.set(name, engine);
    }
  }
  const cards = status.server.cards;
  return h(
    "section",
    { class: "panel" },
    h("h2", null, "Engines and cards"),
    by.size
      ? table(
          "Processes that run models",
          ["Engine", "Devices", number("Restarts"), "Runs"],
          [...by].map(([name, engine]) =>
            h(
              "tr",
              null,
              head(
                name || "in the server’s process",
                engine.pid ? h("span", { class: "quiet small" }, ` process ${engine.pid}`) : null,
              ),
              h("td", null, [...engine.devices].join(", ")),
              cell(count(engine.restarts ?? 0)),
              h("td", { class: "text" }, engine.versions.join(", ")),
            ),
          ),
        )
      : h("p", { class: "quiet" }, "No model is loaded."),
    cards.length
      ? [
          h("h3", null, "Graphics cards"),
          table(
            "Graphics cards",
            ["Card", "Busy", "Memory", number("Power")],
            cards.map((card) =>
              h(
                "tr",
                null,
                head(
                  card.device,
                  card.temperature_celsius != null &&
                    h("span", { class: "quiet small" }, ` ${figure(card.temperature_celsius)} °C`),
                ),
                h("td", null, card.utilization == null ? "–" : [share(card.utilization), bar(card.utilization)]),
                h(
                  "td",
                  null,
                  `${bytes(card.memory_used_bytes ?? 0)} of ${bytes(card.memory_total_bytes ?? 0)}`,
                  bar(card.memory_used_bytes / card.memory_total_bytes),
                ),
                cell(card.power_watts == null ? "–" : `${figure(card.power_watts)} W`),
              ),
            ),
          ),
        ]
      : h("p", { class: "quiet small" }, "There is no graphics card."),
  );
}

function jobsPanel() {
  const panel = (...children) => h("section", { class: "panel wide" }, h("h2", null, "Loads and unloads"), children);
  if (!admin) {
    return panel(
      h("p", { class: "quiet" }, "The jobs are shown to a key with the scope ", h("code", null, "admin"), ". "),
      h("button", { type: "button", "data-act": "ask-key" }, "Enter a key"),
    );
  }
  if (!jobs?.length) return panel(h("p", { class: "quiet" }, "There was none since the server started."));
  return panel(
    table(
      "The latest first",
      ["Job", "State", "Progress", "", ""],
      [...jobs]
        .reverse()
        .slice(0, 20)
        .map((job) =>
          h(
            "tr",
            null,
            head(
              `${job.kind} ${job.model}`,
              h("span", { class: "quiet small" }, job.versions.length ? ` ${job.versions.join(", ")}` : ""),
            ),
            h("td", null, state(job.state)),
            h(
              "td",
              null,
              job.state === "running"
                ? h("progress", { max: 1, value: job.share, "aria-label": `Progress of ${job.kind} ${job.model}` })
                : "",
            ),
            h(
              "td",
              { class: "text" },
              job.state === "running"
                ? [job.phase ?? "", job.seconds_left != null && ` ${figure(job.seconds_left)} s left`]
                : job.reason || new Date(job.ended).toLocaleTimeString(),
            ),
            h(
              "td",
              { class: "number" },
              job.state === "running" &&
                h(
                  "button",
                  { type: "button", "data-act": "cancel", "data-job": job.id, "data-name": `${job.kind} ${job.model}` },
                  "Cancel",
                ),
            ),
          ),
        ),
    ),
  );
}

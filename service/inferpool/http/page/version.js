// One version: its figures, its batching, and what is known of it.

let detail = null; // what is told of the version once: classes
let types = ""; // the media types that the page was built for

function buildModel(model, version) {
  detail = null;
  types = String(version.media_types);
  const part = (id, tag = "section", kind = "panel") => h(tag, { id, class: kind });
  $("main").replaceChildren(
    part("top", "div", "top"),
    part("stats", "div", ""),
    h(
      "div",
      { class: "panels" },
      h("div", { class: "stack" }, tryPanel(model, version), part("latency"), part("traffic")),
      h("div", { class: "stack" }, part("batching"), part("about"), part("manage")),
    ),
  );
  const mine = at(model.name, version.version);
  ask("GET", `models/${mine}`)
    .then((told) => {
      if (built !== mine) return;
      detail = told;
      render();
    })
    .catch(() => {});
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
  const labels = (each) =>
    Object.entries(model.labels)
      .filter(([, number]) => number === each.version)
      .map(([label]) => h("span", { class: "tag" }, label));
  return [
    h("div", { class: "crumb" }, h("a", { href: "#/" }, "All models")),
    h(
      "div",
      { class: "row" },
      h("h1", { tabindex: "-1", class: "text" }, model.name),
      state(version.state),
      version.phase && h("span", { class: "quiet" }, version.phase),
    ),
    model.description && h("p", { class: "quiet text" }, model.description),
    version.reason && h("div", { class: `alert ${version.state === "failed" ? "bad" : "warn"}` }, version.reason),
    h(
      "ul",
      { class: "versions", "aria-label": "Versions" },
      model.versions.map((each) =>
        h(
          "li",
          null,
          h(
            "a",
            { href: link(model.name, each.version), "aria-current": each.version === version.version ? "page" : null },
            dot(each.state),
            `Version ${each.version}`,
            h("span", { class: "hidden" }, ` ${each.state}`),
            labels(each),
            each.version === model.default && h("span", { class: "quiet small" }, "default"),
          ),
        ),
      ),
    ),
  ];
}

function stats(model, version) {
  const now = recent(model, version);
  const { requests, batches, cache, queue_wait_ms: wait, duration } = version.figures;
  const { hit = 0, shared = 0 } = cache;
  const runs = batches.reduce((total, line) => total + line.runs, 0);
  const rows = batches.reduce((total, line) => total + line.rows * line.runs, 0);
  const failed = Object.entries(requests)
    .filter(([code]) => code >= "500")
    .reduce((total, [, value]) => total + value, 0);
  const refused = Object.entries(requests)
    .filter(([code]) => code >= "400" && code < "500")
    .reduce((total, [, value]) => total + value, 0);
  const since = (rank) => `since start ${ms(quantile(duration.bounds, duration.counts, rank))}`;
  const item = (name, value, more) =>
    h("div", null, h("dt", null, name), h("dd", null, value), h("dd", { class: "small" }, more));
  return h(
    "dl",
    { class: "stats" },
    item("Requests/s", now.rate == null ? "–" : figure(now.rate), `${count(sum(requests))} since start`),
    item("p50, last minute", ms(now.p50), since(0.5)),
    item("p99, last minute", ms(now.p99), since(0.99)),
    item("Queue", plural(version.queue_rows, "row"), wait ? `${ms(wait)} of work` : "nothing waits"),
    item("Rows per batch", runs ? figure(rows / runs) : "–", plural(runs, "batch").replace("batchs", "batches")),
    item("Failed", count(failed), `${count(refused)} refused`),
    sum(cache) > 0 &&
      item("Without a run", share((hit + shared) / sum(cache)), `${count(hit)} cached, ${count(shared)} shared`),
  );
}

const EVIDENCE = { graph: "shown by reading the graph", runs: "shown by running rows alone and together" };

const DISPATCH = {
  drained: "nothing else waited",
  full: "it had all the rows or bytes that it may",
  deadline: "with more rows it would have missed a deadline",
  piece: "a part of a request with more rows than a batch",
  retry: "its rows ran again after an error",
};

function batching(version) {
  const { batching: verdict, figures } = version;
  const most = Math.max(...figures.batches.map((line) => line.runs), 1);
  const reasons = Object.entries(figures.reasons).sort(([, one], [, other]) => other - one);
  const all = sum(figures.reasons) || 1;
  if (!verdict.enabled && !verdict.reason)
    return [h("h2", null, "Batching"), h("p", { class: "quiet" }, "The verdict is known once the version is loaded.")];
  return [
    h("h2", null, "Batching"),
    h(
      "p",
      null,
      h(
        "span",
        { class: `state ${verdict.enabled ? "good" : "warn"}` },
        verdict.enabled ? `up to ${plural(verdict.max_rows, "row")} together` : "each request alone",
      ),
      verdict.evidence && h("span", { class: "quiet small" }, ` ${EVIDENCE[verdict.evidence]}`),
    ),
    verdict.reason && h("p", { class: "text" }, verdict.reason),
    verdict.max_delay_ms > 0 && h("p", { class: "quiet" }, `A batch waits ${ms(verdict.max_delay_ms)} for more rows.`),
    figures.batches.length > 0 && [
      h("h3", null, "Batch sizes"),
      table(
        "Batches that ran, by their rows",
        ["Rows", number("Batches"), ""],
        [...figures.batches]
          .sort((one, other) => one.rows - other.rows)
          .map((line) => h("tr", null, head(count(line.rows)), cell(count(line.runs)), graph(line.runs / most))),
      ),
    ],
    reasons.length > 0 && [
      h("h3", null, "Why batches were no larger"),
      table(
        "Batches by the reason of their dispatch",
        ["Reason", number("Batches"), ""],
        reasons.map(([reason, runs]) =>
          h(
            "tr",
            null,
            head(reason, DISPATCH[reason] && h("span", { class: "quiet small" }, ` ${DISPATCH[reason]}`)),
            cell(count(runs)),
            graph(runs / all),
          ),
        ),
      ),
    ],
  ];
}

function latency(version) {
  const lines = [...version.latency].sort((one, other) => one.rows - other.rows);
  const most = Math.max(...lines.map((line) => line.compute_ms), 1e-9);
  return [
    h("h2", null, "Latency by rows"),
    lines.length > 0 &&
      h(
        "p",
        { class: "quiet small" },
        "The time of a batch in the model, as measured when it was loaded and since. ",
        "Batches of like sizes are one line.",
      ),
    lines.length
      ? table(
          "Time of a batch in the model",
          [number("Rows"), number("Time"), number("A row"), ""],
          lines.map((line) =>
            h(
              "tr",
              null,
              h("th", { scope: "row", class: "number" }, figure(line.rows)),
              cell(ms(line.compute_ms)),
              cell(ms(line.compute_ms / line.rows)),
              graph(line.compute_ms / most),
            ),
          ),
        )
      : h("p", { class: "quiet" }, "Nothing was measured."),
  ];
}

const shape = (sizes) => (sizes ? `[${sizes.map((size) => (size === -1 ? "any" : size)).join(", ")}]` : "of any rank");

function about(version) {
  const tensors = (list) =>
    list.map((tensor) =>
      h(
        "div",
        null,
        h("code", null, tensor.name),
        " ",
        h(
          "span",
          { class: "quiet" },
          `${tensor.datatype} ${shape(tensor.shape)}${tensor.optional ? ", optional" : ""}`,
        ),
      ),
    );
  const places = {};
  for (const { device, state: how } of version.instances) {
    const where = `${device}, ${how.replaceAll("_", " ")}`;
    places[where] = (places[where] ?? 0) + 1;
  }
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
      [
        "Instances",
        version.instances.length
          ? Object.entries(places).map(([where, many]) => h("div", null, `${many} on ${where}`))
          : null,
      ],
      ["Engine", engine && `${engine.name}, process ${engine.pid}, ${plural(engine.restarts, "restart")}`],
      ["Threads", version.threads || null],
      ["Load", version.load_ms ? ms(version.load_ms) : null],
      ["Precision", gpu?.precision],
      ["Padding", gpu?.padding],
      ["CUDA graphs", gpu && (gpu.graphs === true ? "yes" : gpu.graphs || "no")],
      ["TensorRT", gpu?.tensorrt],
      [
        "On the CPU",
        gpu &&
          Object.entries(gpu.cpu_nodes)
            .map(([kind, many]) => `${kind} × ${many}`)
            .join(", "),
      ],
    ]),
    classes &&
      h(
        "details",
        null,
        h("summary", null, `${count(classes)} class names`),
        h(
          "p",
          { class: "names" },
          detail.class_names.map((name) => h("span", { class: "tag" }, name)),
          classes > detail.class_names.length &&
            h("span", { class: "quiet" }, `and ${count(classes - detail.class_names.length)} more`),
        ),
      ),
  ];
}

function traffic({ traffic: { canary, shadow } }) {
  const trial = (name, side) =>
    h(
      "tr",
      null,
      head(`${side.version}, ${name}`),
      cell(count(side.requests)),
      cell(count(side.failures)),
      cell(ms(side.p50_ms)),
      cell(ms(side.p99_ms)),
    );
  return [
    h("h2", null, "Traffic"),
    canary && [
      h(
        "p",
        null,
        h("strong", null, `Canary: version ${canary.version}`),
        ` answers ${share(canary.share)}, by ${canary.by} `,
        state(canary.state),
      ),
      canary.reason && h("p", { class: "text" }, canary.reason),
      table(
        "What both versions have done",
        ["Version", number("Requests"), number("Failed"), number("p50"), number("p99")],
        [trial("canary", canary.canary), trial("stable", canary.stable)],
      ),
    ],
    shadow && [
      h(
        "p",
        null,
        h("strong", null, `Shadow: version ${shadow.version}`),
        ` gets copies of ${share(shadow.share)} of the requests.`,
      ),
      facts([
        [
          "Compared",
          `${count(shadow.compared)}, ${count(shadow.failed)} failed, ${count(shadow.dropped)} dropped, ${count(shadow.unlike)} of another shape`,
        ],
        ["Labels changed", shadow.changed_labels == null ? null : share(shadow.changed_labels)],
        [
          "Mean time",
          shadow.sent_ms == null
            ? null
            : `${ms(shadow.copy_ms)}, and ${ms(shadow.sent_ms)} of the answers that were sent`,
        ],
        ["Slower", shadow.slower == null ? null : `${share(shadow.slower)} of the copies`],
      ]),
      shadow.outputs.length > 0 &&
        table(
          "Differences of the outputs",
          ["Output", number("Largest"), number("Mean")],
          shadow.outputs.map((output) =>
            h("tr", null, head(output.name), cell(figure(output.largest)), cell(figure(output.mean))),
          ),
        ),
    ],
  ];
}

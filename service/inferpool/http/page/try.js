// The panel that tries a version with a sample, JSON, a sentence or a picture.

const MOST_SHOWN = 20000; // characters of an answer

// Numbers of one row stay on one line.
function pretty(value, indent = "") {
  const flat = (each) => each === null || typeof each !== "object";
  const deeper = `${indent}  `;
  if (flat(value) || (Array.isArray(value) && value.every(flat))) return JSON.stringify(value);
  if (Array.isArray(value)) return `[\n${value.map((each) => deeper + pretty(each, deeper)).join(",\n")}\n${indent}]`;
  return `{\n${Object.entries(value)
    .map(([name, each]) => `${deeper}${JSON.stringify(name)}: ${pretty(each, deeper)}`)
    .join(",\n")}\n${indent}}`;
}

function zeros(version) {
  const own = version.inputs.filter((tensor) => !tensor.optional);
  const fill = ([size, ...rest], datatype) =>
    Array.from({ length: Math.max(size, 1) }, () =>
      rest.length ? fill(rest, datatype) : datatype === "BYTES" ? "text" : datatype === "BOOL" ? false : 0,
    );
  const elements = own.reduce(
    (total, { shape: sizes }) => total + (sizes ?? []).reduce((product, size) => product * Math.max(size, 1), 1),
    0,
  );
  if (elements > 1024) return "";
  return pretty({
    inputs: Object.fromEntries(
      own.map((tensor) => [tensor.name, fill(tensor.shape?.length ? tensor.shape : [1], tensor.datatype)]),
    ),
  });
}

const sentenceIn = (value) =>
  typeof value === "string"
    ? value
    : value && typeof value === "object"
      ? Object.values(value)
          .map(sentenceIn)
          .find((text) => text !== undefined)
      : undefined;

function tryPanel(model, version) {
  const types = version.media_types;
  const pictures = types.filter((type) => type.startsWith("image/"));
  const modes = [
    pictures.length && ["picture", "Picture"],
    types.includes("text/plain") && ["sentence", "Sentence"],
    ["json", "JSON"],
  ].filter(Boolean);
  const path = `predict/${at(model.name, version.version)}`;
  let mode = modes[0][0];
  let picture = null;

  const textarea = h("textarea", {
    id: "json",
    spellcheck: "false",
    autocomplete: "off",
    "aria-describedby": "try-fault",
  });
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
    json: h(
      "div",
      null,
      h(
        "div",
        { class: "between" },
        h("label", { for: "json" }, "Body"),
        h("span", null, h("label", { for: "sample", class: "quiet" }, "Start with "), samples),
      ),
      textarea,
    ),
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
    let body = textarea.value,
      type = "application/json";
    if (mode === "picture") {
      if (!picture) {
        fault.textContent = "Choose a picture first.";
        return;
      }
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
      fault.textContent =
        error instanceof Refusal ? `${error.status}: ${error.message}` : `The server did not answer: ${error.message}`;
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
  drop.ondragover = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  };
  for (const area of [textarea, sentence]) {
    area.onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) predict();
    };
  }
  let known = [];
  textarea.value = zeros(version);
  ask("GET", `models/${at(model.name, version.version)}/samples`)
    .then((told) => {
      known = told.samples;
      known.forEach((sample, index) => samples.append(h("option", { value: String(index) }, sample.name)));
      if (!known.length) return;
      samples.value = "0";
      fill();
      sentence.value ||= known.map((sample) => sentenceIn(sample.inputs)).find(Boolean) ?? "";
    })
    .catch(() => {});
  choose(mode);
  return h(
    "section",
    { class: "panel", "aria-labelledby": "try-title" },
    h(
      "div",
      { class: "between" },
      h("h2", { id: "try-title" }, "Try it"),
      modes.length > 1 &&
        h(
          "div",
          { class: "choices", role: "radiogroup", "aria-label": "What to send" },
          modes.map(([name, text]) => {
            const radio = h("input", { type: "radio", name: "mode", value: name, checked: name === mode });
            radio.onchange = () => choose(name);
            return h("label", null, radio, ` ${text}`);
          }),
        ),
    ),
    Object.values(parts),
    h("div", { class: "row" }, run, h("span", { class: "quiet small" }, "POST ", h("code", null, `/${path}`))),
    fault,
    h("div", { "aria-live": "polite" }, answer),
  );
}

function result(content, timing, total) {
  const times = Object.fromEntries(
    [...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, value]) => [name, Number(value)]),
  );
  const rows = content.predictions ?? [];
  const text = pretty(content);
  return [
    h(
      "p",
      { class: "quiet small" },
      `Version ${content.version} answered in ${ms(total)}`,
      times.compute != null && `: ${ms(times.queue)} in the queue, ${ms(times.compute)} in the model`,
    ),
    rows.length > 0 &&
      table(
        "Predictions",
        [rows.length > 1 && "Row", "Label", number("Score"), ""].filter((name) => name !== false),
        rows
          .slice(0, 10)
          .map((labels, index) =>
            labels
              .slice(0, 5)
              .map((best, rank) =>
                h(
                  "tr",
                  { class: rank ? null : "best" },
                  rows.length > 1 && h("td", { class: "quiet" }, rank ? "" : count(index + 1)),
                  head(best.label),
                  cell(best.score == null ? "–" : figure(best.score)),
                  graph(best.score),
                ),
              ),
          ),
      ),
    rows.length > 10 && h("p", { class: "quiet" }, `and ${count(rows.length - 10)} more rows`),
    h(
      "details",
      { open: !rows.length },
      h("summary", null, "The whole answer"),
      h(
        "pre",
        { tabindex: "0", role: "region", "aria-label": "The whole answer" },
        text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN)} …` : text,
      ),
    ),
  ];
}

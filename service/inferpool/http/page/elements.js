// Elements, tables and numbers as text. Every value that comes from the server becomes a text node or the value of an
// attribute, never HTML: `h` is the only way to make an element.

const $ = (id) => document.getElementById(id);

const SVG = ["svg", "rect", "polyline"];

function h(name, attributes, ...children) {
  const made = SVG.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
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
  const children = wanted
    .flat(Infinity)
    .filter((child) => child != null && child !== false)
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
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { class: kind },
      h("caption", { class: "hidden" }, caption),
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          heads.map((head) =>
            head === "" ? h("td") : h("th", { scope: "col", class: head.number && "number" }, head.text ?? head),
          ),
        ),
      ),
      h("tbody", null, rows),
    ),
  );
}
const number = (text) => ({ text, number: true });
const cell = (...children) => h("td", { class: "number" }, children);
const head = (...children) => h("th", { scope: "row" }, children);
const graph = (share) => h("td", { class: "graph" }, bar(share));
const facts = (pairs) =>
  h(
    "dl",
    { class: "facts" },
    pairs
      .filter(([, value]) => value != null && value !== "")
      .map(([name, value]) => [h("dt", null, name), h("dd", null, value)]),
  );

function bar(share) {
  const width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;
  return h("svg", { class: "length", "aria-hidden": "true" }, h("rect", { width, height: "100%", rx: 2 }));
}

function spark(values) {
  if (values.length < 2) return h("svg", { class: "spark", "aria-hidden": "true" });
  const most = Math.max(...values, 1e-9);
  const points = values.map(
    (value, index) => `${((84 * index) / (values.length - 1)).toFixed(1)},${(17 - (16 * value) / most).toFixed(1)}`,
  );
  return h(
    "svg",
    { class: "spark", viewBox: "0 0 84 18", "aria-hidden": "true" },
    h("polyline", { points: points.join(" ") }),
  );
}

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

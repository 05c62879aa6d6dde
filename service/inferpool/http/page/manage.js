// The panel that changes what is served, and the dialogs.

function updateManage(model, version) {
  const panel = $("manage");
  if (!admin) {
    panel.removeAttribute("data-for");
    show(
      panel,
      h("h2", null, "Manage"),
      h("p", { class: "quiet" }, "Loads, labels and traffic need a key with the scope ", h("code", null, "admin"), "."),
      h("button", { type: "button", "data-act": "ask-key" }, "Enter a key"),
    );
    return;
  }
  // Built once, so that nobody's typing is lost; only the list of labels follows the server.
  const what = at(model.name, version.version);
  if (panel.dataset.for !== what) {
    panel.dataset.for = what;
    panel.className = "panel manage";
    const button = (act, text, more) =>
      h(
        "button",
        { type: "button", "data-act": act, "data-model": model.name, "data-version": version.version, ...more },
        text,
      );
    const field = (id, text, input) =>
      h("span", null, h("label", { for: id }, `${text} `), h("input", { id, autocomplete: "off", ...input }));
    panel.replaceChildren(
      h("h2", null, "Manage"),
      h(
        "fieldset",
        null,
        h("legend", null, `Version ${version.version}`),
        h("div", { class: "row" }, button("load", "Load"), button("unload", "Unload")),
      ),
      h(
        "fieldset",
        null,
        h("legend", null, "Labels"),
        h("div", { id: "labels", class: "row" }),
        h(
          "div",
          { class: "row" },
          field("label", "Name", { value: "stable", maxlength: 64, size: 12 }),
          button("label", `Give to version ${version.version}`),
        ),
      ),
      h(
        "fieldset",
        null,
        h("legend", null, `Traffic to version ${version.version}`),
        h(
          "div",
          { class: "row" },
          field("share", "Share in %", { type: "number", min: 0, max: 100, value: 10, class: "short" }),
          button("canary", "Start as canary"),
          button("shadow", "Start as shadow"),
        ),
      ),
      h(
        "fieldset",
        null,
        h("legend", null, "The whole model"),
        h("div", { class: "row" }, button("end-traffic", "End canary and shadow"), button("rollback", "Roll back")),
      ),
    );
  }
  const names = Object.entries(model.labels);
  show(
    $("labels"),
    names.length
      ? names.map(([label, number]) =>
          h(
            "span",
            { class: "tag" },
            `${label} → ${number} `,
            h(
              "button",
              {
                type: "button",
                class: "plain",
                "data-act": "unlabel",
                "data-model": model.name,
                "data-label": label,
                "aria-label": `Remove the label ${label}`,
              },
              "remove",
            ),
          ),
        )
      : h("span", { class: "quiet" }, "No version has a label."),
  );
}

async function change(text, method, path, json) {
  try {
    const told = await ask(method, path, json);
    notice(told?.state === "running" ? `${text}: job ${told.id} has begun.` : `${text}: done.`);
  } catch (error) {
    notice(`${text}: ${error.message}`);
  }
  idle = 0;
  changed = performance.now();
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
    let why = "";
    key = $("key-field").value.trim();
    try {
      // A key with any scope is known to all routes; 401 is for a key that the server does not know.
      const answer = await send("GET", "jobs");
      if (answer.status === 401 || !key)
        throw new Refusal(401, key ? await answer.json() : { detail: "type a key first" });
      admin = answer.ok;
      why = admin ? "" : (await answer.json()).detail;
    } catch (error) {
      key = before;
      $("key-fault").textContent = error.message;
      return;
    }
    useKey(admin ? "The key is used, and allows changes." : `The key is used. It does not allow changes: ${why}.`);
  },
  "forget-key": () => {
    key = "";
    admin = false;
    useKey("The key is forgotten.");
  },
  "close-key": () => $("key-dialog").close(),
  load: ({ model, version }) =>
    change(`Load ${model} ${version}`, "POST", `models/${at(model)}/load`, { version: Number(version) }),
  unload: async ({ model, version }) => {
    if (
      await confirmed(
        "Unload",
        `Unload version ${version} of ${model}? The requests that it has accepted are answered first; later ones are refused.`,
      )
    ) {
      change(`Unload ${model} ${version}`, "POST", `models/${at(model)}/unload`, { version: Number(version) });
    }
  },
  label: ({ model, version }) =>
    change(`Label ${$("label").value}`, "PUT", `models/${at(model)}/labels/${at($("label").value.trim())}`, {
      version: Number(version),
    }),
  unlabel: async ({ model, label }) => {
    if (
      await confirmed(
        "Remove the label",
        `Remove the label ${label} of ${model}? Requests that name it are refused from then on.`,
      )
    ) {
      change(`Remove the label ${label}`, "DELETE", `models/${at(model)}/labels/${at(label)}`);
    }
  },
  canary: ({ model, version }) =>
    change(`Canary ${version}`, "PUT", `models/${at(model)}/traffic`, {
      canary: { version: Number(version), share: percent() },
    }),
  shadow: ({ model, version }) =>
    change(`Shadow ${version}`, "PUT", `models/${at(model)}/traffic`, {
      shadow: { version: Number(version), share: percent() },
    }),
  "end-traffic": async ({ model }) => {
    if (await confirmed("End both", `End the canary and the shadow of ${model}?`))
      change("End the traffic", "DELETE", `models/${at(model)}/traffic`);
  },
  rollback: async ({ model }) => {
    if (await confirmed("Roll back", `Let the version of ${model} answer that answered before the present one?`))
      change(`Roll back ${model}`, "POST", `models/${at(model)}/rollback`);
  },
  cancel: async ({ job, name }) => {
    if (await confirmed("Cancel the job", `Cancel the job “${name}”?`))
      change(`Cancel ${name}`, "DELETE", `jobs/${at(job)}`);
  },
  dismiss: () => show($("notice")),
};

function useKey(text) {
  $("key-field").value = "";
  $("key-dialog").close();
  show($("key"), key ? (admin ? "Admin key" : "Key in use") : "Enter a key");
  [tag, jobs, failures, idle] = ["", null, 0, 0];
  built = "";
  notice(text);
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
    $("confirm").oncancel = () => {
      $("confirm").returnValue = "no";
    };
  });
}

let noticeTimer = 0;
function notice(text) {
  clearTimeout(noticeTimer);
  show(
    $("notice"),
    h("p", null, h("span", null, text), h("button", { type: "button", "data-act": "dismiss" }, "Dismiss")),
  );
  noticeTimer = setTimeout(acts.dismiss, 12000);
}

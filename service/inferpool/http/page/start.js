// Events of the page, and its start.

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button) acts[button.dataset.act]({ ...button.dataset });
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
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
$("key-field").onkeydown = (event) => {
  if (event.key === "Enter") acts["use-key"]();
};
$("key-dialog").onclose = () => {
  $("key-field").value = "";
};
$("pause").onclick = () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  show($("pause"), paused ? "Resume" : "Pause");
  poll();
};
for (const each of document.querySelectorAll("a[href='docs']")) each.href = new URL("docs", home);

route();
poll();

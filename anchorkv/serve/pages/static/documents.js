// Documents: upload, list, what every anchor holds, delete.

import { get, problem, request } from "./api.js";
import { $, el, facts, table } from "./dom.js";
import { segmentView } from "./segments.js";
import { bytes, count, date, seconds, t, times } from "./words.js";

const form = $("upload"), state = $("state");
let looking = null;

function tell(key, values) {
  $("problem").replaceChildren();
  state.replaceChildren(key ? el("p", { class: "note" }, t(key, values)) : "");
}

function fail(error) {
  state.replaceChildren();
  $("problem").replaceChildren(problem(error));
}

async function list() {
  const found = (await get("/v1/documents")).data;
  $("list").setAttribute("aria-busy", "false");
  if (!found.length) {
    $("list").replaceChildren(el("p", { class: "hint" }, t("doc.none")));
    return;
  }
  $("list").replaceChildren(table(t("doc.list"), [
    t("doc.title"), t("doc.added"), t("doc.tokens"), t("doc.kept"), t("audit.reduction"), t("doc.where"), t("doc.actions"),
  ], found.reverse().map((it) => [
    el("b", { class: "title", dir: "auto" }, it.title), date(it.created), count(it.tokens), count(it.kept_cells), times(it.reduction),
    it.damage ? el("span", { class: "badge missed", title: it.damage }, t("doc.damaged")) : t(it.resident ? "doc.in_memory" : "doc.on_disk"),
    el("div", { class: "row-actions" },
      el("button", { type: "button", onclick: () => view(it), "aria-label": t("doc.view_of", { title: it.title }) }, t("doc.view")),
      el("a", { class: "button", href: `/ui/?document=${encodeURIComponent(it.id)}`, "aria-label": t("doc.ask_of", { title: it.title }) }, t("doc.ask")),
      el("button", { type: "button", class: "danger", onclick: () => remove(it), "aria-label": t("doc.delete_of", { title: it.title }) }, t("doc.delete"))),
  ]), [2, 3, 4]));
}

async function view(it) {
  const place = $("view");
  looking = it.id;
  const head = [
    el("h2", { id: "view-title", dir: "auto" }, t("doc.holds", { title: it.title })),
    facts([
      [t("doc.id"), el("code", { class: "hash" }, it.id)], [t("word.policy"), it.policy], [t("doc.tokens"), count(it.tokens)],
      [t("doc.kept"), count(it.kept_cells)], [t("audit.reduction"), times(it.reduction)], [t("word.kv_bytes"), bytes(it.kv_bytes)],
      [t("doc.file_bytes"), it.file_bytes ? bytes(it.file_bytes) : null], [t("doc.reading"), seconds(it.reading_seconds)],
    ]),
  ];
  place.hidden = false;
  place.replaceChildren(...head, el("p", { class: "hint", role: "status" }, t("doc.opening")));
  place.focus({ preventScroll: true });
  place.scrollIntoView({ block: "start" });
  let rest;
  try {
    rest = segmentView((await get(`/v1/documents/${encodeURIComponent(it.id)}/segments`)).data);
  } catch (error) {
    rest = problem(error);
  }
  if (looking === it.id) place.replaceChildren(...head, rest);
}

function remove(it) {
  const dialog = $("sure");
  $("sure-what").textContent = t("doc.sure_what", { title: it.title });
  dialog.returnValue = "";
  dialog.onclose = async () => {
    if (dialog.returnValue !== "yes") return;
    try {
      await request(`/v1/documents/${encodeURIComponent(it.id)}`, { method: "DELETE" });
      if (looking === it.id) $("view").hidden = true;
      tell("doc.deleted", { title: it.title });
      await list();
    } catch (error) {
      fail(error);
    }
  };
  dialog.showModal();
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = $("file").files[0], button = form.querySelector("button[type=submit]"), body = new FormData();
  if (!file || button.disabled) return;
  body.set("file", file, file.name);
  if ($("title").value.trim()) body.set("title", $("title").value.trim());
  if ($("policy").value) body.set("anchorkv", JSON.stringify({ policy: $("policy").value }));
  button.disabled = true;
  tell("doc.uploading", { name: file.name });
  try {
    const found = await (await request("/v1/documents", { method: "POST", form: body })).json();
    form.reset();
    tell("doc.uploaded", {
      title: found.title, tokens: count(found.tokens), kept: count(found.kept_cells), times: times(found.reduction),
    });
    await list();
  } catch (error) {
    fail(error);
  } finally {
    button.disabled = false;
  }
});
form.addEventListener("dragover", (event) => {
  event.preventDefault();
  form.classList.add("over");
});
for (const name of ["dragleave", "drop"]) form.addEventListener(name, () => form.classList.remove("over"));
form.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) $("file").files = event.dataTransfer.files;
});

get("/v1/models").then((found) => {
  $("policy").append(...found.data[0].anchorkv.policies.map((name) => el("option", { value: name }, name)));
  return list();
}).catch(fail);

// The audit browser: records by filters, and one of them by the address (#id).

import { get, problem } from "./api.js";
import { $, el, table } from "./dom.js";
import { recordView } from "./record.js";
import { count, date, known, t, times } from "./words.js";

const PAGE = 25;
let rows = [];
let next = null;
let turn = 0;

const kind = (it) => (known(`kind.${it.kind}`) ? t(`kind.${it.kind}`) : it.kind);

function query() {
  const found = new URLSearchParams({ limit: PAGE, brief: true });
  for (const name of ["kind", "policy", "fallback"]) if ($(name).value.trim()) found.set(name, $(name).value.trim());
  // The day as its reader's clock has it, the last one included.
  if ($("since").value) found.set("since", new Date(`${$("since").value}T00:00:00`).toISOString());
  if ($("until").value) {
    const day = new Date(`${$("until").value}T00:00:00`);
    day.setDate(day.getDate() + 1);
    found.set("until", day.toISOString());
  }
  return found;
}

async function list(older) {
  const mine = ++turn, wanted = query();
  if (older && next !== null) wanted.set("before", next);
  $("records").setAttribute("aria-busy", "true");
  try {
    const found = await get(`/v1/audit?${wanted}`);
    if (mine !== turn) return;
    rows = older ? [...rows, ...found.data] : found.data;
    next = found.next;
    $("problem").replaceChildren();
    draw();
  } catch (error) {
    $("problem").replaceChildren(problem(error));
  } finally {
    $("records").setAttribute("aria-busy", "false");
  }
}

function draw() {
  $("older").hidden = next === null;
  if (!rows.length) {
    $("records").replaceChildren(el("p", { class: "hint" }, t("audit.none")));
    return;
  }
  $("records").replaceChildren(table(t("page.audit"), [
    t("audit.number"), t("audit.time"), t("audit.kind"), t("audit.id"), t("word.tenant"), t("word.policy"), t("audit.reduction"), t("audit.recalled"), t("word.fallback"),
  ], rows.map((it) => [
    count(it.sequence), date(it.time), kind(it), el("a", { href: `#${encodeURIComponent(it.id)}`, class: "id" }, short(it.id)),
    it.tenant, it.policy, it.figures?.reduction ? times(it.figures.reduction) : "–",
    it.kind === "answer" && !it.retired ? count(it.recalled_segments) : "–",
    it.fallback_steps ? el("span", { class: "badge open" }, count(it.fallback_steps)) : count(0),
  ]), [0, 6, 7, 8]));
}

const short = (id) => (id.length > 20 ? `${id.slice(0, 17)}…` : id);

async function open() {
  let id = "";
  try {
    id = decodeURIComponent(location.hash.slice(1));
  } catch {
    // not an address of ours
  }
  const one = $("record");
  $("list-view").hidden = Boolean(id) && id !== "main";
  one.hidden = !$("list-view").hidden;
  if (one.hidden) {
    if (!rows.length) list(false);
    return;
  }
  const back = el("p", {}, el("a", { href: "#" }, t("audit.back")));
  one.replaceChildren(back, el("p", { class: "hint", role: "status" }, t("audit.loading")));
  try {
    const found = await get(`/v1/audit/${encodeURIComponent(id)}`);
    one.replaceChildren(back, ...recordView(found));
    one.querySelector("h2").focus();
  } catch (error) {
    one.replaceChildren(back, problem(error));
  }
}

$("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = $("number").value.trim();
  if (id) location.hash = encodeURIComponent(id);
  else list(false);
});
$("older").addEventListener("click", () => list(true));
$("verify").addEventListener("click", async () => {
  const place = $("verified");
  $("verify").disabled = true;
  place.replaceChildren(el("p", { class: "hint" }, t("audit.verifying")));
  try {
    const found = await get("/v1/audit/verify");
    place.replaceChildren(el("p", { class: "note" },
      el("span", { class: `badge ${found.sound ? "met" : "missed"}` }, t(found.sound ? "audit.sound" : "audit.unsound")), " ",
      t("audit.verified", { n: count(found.records), waiting: count(found.waiting) })),
    ...(found.faults ?? []).map((fault) => el("p", { class: "problem" }, t("audit.fault", { n: count(fault.sequence) }), " ", el("span", { lang: "en" }, fault.what))));
  } catch (error) {
    place.replaceChildren(problem(error));
  } finally {
    $("verify").disabled = false;
  }
});
window.addEventListener("hashchange", open);
open();

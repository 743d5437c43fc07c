// The chat: an answer as it is written, the engine room beside it, and why it is what it is below it.

import { events, get, problem, request } from "./api.js";
import { $, el } from "./dom.js";
import { again, Gauges, gauge } from "./gauges.js";
import { whyView, writing } from "./why.js";
import { count, rate, seconds, t, times } from "./words.js";

const log = $("log"), text = $("text"), form = $("ask");
let messages = [];
let running = null;
let live = null;

const page = document.scrollingElement;
const atEnd = () => page.scrollHeight - page.scrollTop - window.innerHeight < 120;
const toEnd = () => page.scrollTo({ top: page.scrollHeight, behavior: "instant" });

const gauges = new Gauges("gauges", () => [
  gauge(t("now.this"), live ? rate(live.rate()) : "–",
    el("p", { class: "hint" }, live ? t("now.this_of", { n: count(live.pieces), first: seconds(live.first) }) : t("now.this_none"))),
]);
const hurry = again(() => gauges.ask(), () => (running ? 1000 : 4000));

/** The clock of an answer that is being written. */
class Live {
  constructor() {
    this.asked = performance.now();
    this.pieces = 0;
    this.first = null;
  }

  piece() {
    this.last = performance.now();
    this.first ??= (this.last - this.asked) / 1000;
    this.pieces += 1;
  }

  rate() {
    return this.exact ?? writing(this.pieces, (this.last - this.asked) / 1000 - this.first);
  }
}

function turn(role, content) {
  const body = el("div", { class: "said", dir: "auto" }, content);
  const node = el("article", { class: `turn ${role}` }, el("h2", {}, t(`chat.${role}`)), body);
  $("welcome")?.remove();
  log.append(node);
  return { node, body };
}

function asking(signal) {
  const wishes = { explain: true };
  for (const name of ["document", "policy", "recall"]) if ($(name).value) wishes[name] = $(name).value;
  if ($("quality").checked) wishes.quality = "high";
  if ($("attention")?.checked) wishes.attention = true;
  return request("/v1/chat/completions", {
    method: "POST", signal, json: {
      messages, stream: true, stream_options: { include_usage: true }, max_tokens: Number($("most").value) || null,
      temperature: Number($("temperature").value), anchorkv: wishes,
    },
  });
}

async function answer(question) {
  messages.push({ role: "user", content: question });
  turn("user", question);
  const { node, body } = turn("assistant", "");
  const tells = $("attention"), unseen = !tells ? "none" : tells.checked ? "failed" : "unasked";
  const waiting = el("p", { class: "hint" }, t("chat.waiting"));
  const words = document.createTextNode("");
  body.append(words);
  node.append(waiting);
  running = new AbortController();
  live = new Live();
  busy(true);
  toEnd();
  let figures = null, usage = null;
  try {
    for await (const event of events(await asking(running.signal))) {
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        waiting.remove();
        live.piece();
        const follow = atEnd();
        words.appendData(piece);
        if (follow) toEnd();
        if (live.pieces % 8 === 1) gauges.draw();
      }
      figures = event.anchorkv ?? figures;
      usage = event.usage ?? usage;
    }
  } catch (error) {
    node.append(error.name === "AbortError" ? el("p", { class: "hint" }, t("chat.stopped")) : problem(error));
  } finally {
    waiting.remove();
    running = null;
    busy(false);
  }
  if (words.data) messages.push({ role: "assistant", content: words.data });
  else messages.pop();
  if (figures) {
    const follow = atEnd();
    live.exact = writing(usage.completion_tokens, figures.seconds.decode);
    node.append(foot(figures, usage), whyView(figures, usage.completion_tokens, unseen));
    if (follow) toEnd();
  }
  hurry();
}

function foot(figures, usage) {
  const { kept, full } = figures.cells;
  const parts = [
    t("chat.kept", { kept: count(kept), full: count(full), times: times(figures.reduction) }),
    rate(writing(usage.completion_tokens, figures.seconds.decode)), figures.policy,
  ];
  if (figures.recalled.length) parts.push(t("chat.recalled", { n: count(figures.recalled.length) }));
  const steps = figures.fallback.filter((step) => !step.dry_run).length;
  if (steps) parts.push(t("chat.steps", { n: count(steps) }));
  return el("p", { class: "foot" }, parts.map((part) => el("span", {}, part)));
}

function busy(on) {
  log.setAttribute("aria-busy", String(on));
  $("stop").hidden = !on;
  $("send").disabled = $("new").disabled = on;
  hurry();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || running) return;
  text.value = "";
  answer(question);
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
// A field at fault has to be seen for the browser to say what is wrong with it.
form.addEventListener("invalid", (event) => {
  const folded = event.target.closest("details");
  if (folded) folded.open = true;
}, true);
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  messages = [];
  live = null;
  log.replaceChildren(el("p", { class: "hint" }, t("chat.cleared")));
  text.focus();
  gauges.draw();
});

/** What may be chosen: policies and documents. */
async function choices() {
  const wanted = new URLSearchParams(location.search).get("document");
  const model = (await get("/v1/models")).data[0].anchorkv;
  $("most").max = model.most_tokens;
  $("most").value = Math.min(512, model.most_tokens);
  $("policy").append(...model.policies.map((name) => el("option", { value: name }, name)));
  const documents = (await get("/v1/documents")).data;
  $("document").append(...documents.map((it) => el("option", { value: it.id, selected: it.id === wanted }, it.title)));
}

choices().catch((error) => log.append(problem(error)));

// "Why this answer": what was held of everything that was read, what was brought back, and which way was taken.

import { attentionView } from "./attention.js";
import { el, facts } from "./dom.js";
import { bar } from "./gauges.js";
import { segmentView } from "./segments.js";
import { bytes, cells, count, decimal, rate, seconds, t, times } from "./words.js";

export const writing = (written, decode) => (written > 1 && decode > 0 ? (written - 1) / decode : null);

/** figures: an answer's `anchorkv`. tokens: how many it has. unseen: why there may be no attention in them. */
export function whyView(figures, tokens, unseen) {
  const { cells: held, seconds: took } = figures;
  const body = el("div", { class: "why-body" });
  const whole = el("details", { class: "why" }, el("summary", {}, t("why.title")), body);
  whole.addEventListener("toggle", () => {  // hundreds of segments are drawn for those who look
    if (!whole.open || body.childElementCount) return;
    body.append(
      el("h3", {}, t("why.memory")), el("p", {}, t("why.kept", {
        kept: count(held.kept), full: count(held.full), times: times(figures.reduction), peak: count(held.peak),
      })), bar(held.kept, held.full),
      facts([
        [t("word.policy"), figures.policy], [t("word.kv_bytes"), bytes(figures.kv_bytes)],
        [t("word.speed"), rate(writing(tokens, took.decode))], [t("word.first_token"), seconds(took.first_token)],
        [t("why.cached"), cells(figures.cached_tokens)], [t("why.logprob"), decimal(figures.answer_logprob)],
        [t("word.document"), figures.document],
      ]),
      el("p", {}, el("a", { href: `/ui/audit#${encodeURIComponent(figures.id)}` }, t("why.record"))),
      el("h3", {}, t("why.fallback")), stepList(figures.fallback),
      el("h3", {}, t("why.recalled")), recalledList(figures.recalled),
      el("h3", {}, t("why.attention")), figures.attention
        ? attentionView(figures.attention, figures.segments ?? []) : el("p", { class: "hint" }, t(`unseen.${unseen}`)),
      el("h3", {}, t("why.segments")), segmentView(figures.segments ?? [], figures.attention?.segments),
    );
  }, false);
  return whole;
}

/** Fallback steps, each with its reason. */
export function stepList(steps) {
  if (!steps.length) return el("p", { class: "hint" }, t("why.no_step"));
  return el("ol", { class: "steps" }, steps.map((step) => el("li", {},
    el("b", {}, `${step.before} → ${step.after}`), " ", step.dry_run ? el("span", { class: "badge open" }, t("why.dry_run")) : null,
    el("span", { class: "sub", lang: "en" }, ` ${step.reason}`))));
}

export function recalledList(recalled) {
  if (!recalled.length) return el("p", { class: "hint" }, t("why.no_recall"));
  return el("ol", { class: "segments" }, recalled.map((part) => el("li", { class: "segment recalled" },
    el("p", { class: "line" }, el("b", {}, `#${part.number}`), el("span", { class: "sub" }, cells(part.cells))),
    part.text ? el("p", { class: "said", dir: "auto" }, part.text) : null)));
}

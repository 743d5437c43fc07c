// One KPI: a figure with its bounds, the limit it is held against, and what comes of it.

import { el, svg } from "./dom.js";
import { share, t } from "./words.js";

/** met, missed, or open: the limit lies within the bounds, or there are too few values. above: whether more is better. */
export function verdict({ value, low = value, high = value, limit, above, few = false }) {
  if (few || value === null || value === undefined || limit === null || limit === undefined) return "open";
  if (above ? low >= limit : high <= limit) return "met";
  return (above ? high < limit : low > limit) ? "missed" : "open";
}

/** said: the figure in words; how: a function that writes such a figure; notes: sentences. */
export function card({ name, said, figure = null, how, notes = [], badge = true }) {
  const outcome = figure && badge ? verdict(figure) : null;
  return el("li", { class: "card" },
    el("h2", {}, name), el("p", { class: "number" }, said),
    outcome ? el("p", {}, el("span", { class: `badge ${outcome}` }, t(`verdict.${outcome}`)), " ",
      el("span", { class: "sub" }, t(figure.above ? "dash.at_least" : "dash.at_most", { limit: how(figure.limit) }))) : null,
    figure && figure.low !== undefined ? range(figure, how) : null,
    notes.filter(Boolean).map((note) => el("p", { class: "sub" }, note)));
}

/** The bounds as a bar, the figure as a dot, the limit as a line. */
export function range({ value, low, high, limit, confidence, least = 0, most }, how) {
  const top = most ?? Math.max(high, limit ?? 0) * 1.15, bottom = Math.min(least, low);
  const at = (x) => (4 + 92 * (x - bottom) / Math.max(1e-9, top - bottom)).toFixed(2);
  return el("div", { class: "range" },
    svg("svg", { viewBox: "0 0 100 14", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "axis", x: 0, y: 6, width: 100, height: 2 }),
      svg("rect", { class: "bounds", x: at(low), y: 4, width: Math.max(0.6, at(high) - at(low)), height: 6 }),
      svg("rect", { class: "value", x: at(value) - 0.5, y: 2, width: 1, height: 10 }),
      limit === null || limit === undefined ? null : svg("rect", { class: "limit", x: at(limit) - 0.3, y: 0, width: 0.6, height: 14 })),
    el("p", { class: "sub" }, t("dash.bounds", { share: share(confidence), low: how(low), high: how(high) })));
}

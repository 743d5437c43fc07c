// Where the attention of an answer went: by kind of cell, and by segment.

import { el, svg } from "./dom.js";
import { bar } from "./gauges.js";
import { stateOf } from "./segments.js";
import { share, t } from "./words.js";

/** Each with the state whose colour it has. */
const KINDS = { sinks: "", pinned: "", anchors: "anchors", recalled: "recalled", recent: "whole", answer: "" };
const MOST = 6;

/** attention: shares, as the API gives them. segments: in the order of its `segments`, with or without their texts. */
export function attentionView(attention, segments) {
  const kinds = Object.entries(KINDS).filter(([kind]) => attention[kind] > 0);
  const ranked = segments.map((segment, i) => ({ segment, got: attention.segments[i] ?? 0 })).filter(({ got }) => got > 0)
    .sort((one, other) => other.got - one.got).slice(0, MOST);
  return el("div", { class: "attention" },
    el("p", { class: "hint" }, t("att.about")),
    el("ul", { class: "shares" }, kinds.map(([kind, state]) => row(t(`att.${kind}`), attention[kind], 1, state))),
    ranked.length ? [
      el("h4", {}, t("att.by_segment")), strip(attention.segments, segments, ranked[0]), el("p", { class: "hint" }, t("att.strip_about")),
      el("ol", { class: "shares" }, ranked.map(({ segment, got }) => row([
        el("b", {}, `#${segment.number}`), segment.text ? el("span", { dir: "auto" }, ` ${segment.text.trim()}`) : null,
      ], got, ranked[0].got, stateOf(segment)))),
    ] : null);
}

const row = (name, got, whole, state) => el("li", {},
  el("span", { class: "name" }, name), bar(got, whole, state), el("span", { class: "n" }, share(got)));

/** One column a segment, as wide as its text and as high as its share. */
function strip(shares, segments, most) {
  const first = segments[0].start, whole = Math.max(1, segments.at(-1).stop - first);
  const columns = segments.map((segment, i) => {
    const height = 40 * (shares[i] ?? 0) / most.got;
    return svg("rect", { class: stateOf(segment), x: segment.start - first, width: segment.tokens, y: 40 - height, height });
  });
  return svg("svg", {
    class: "map", viewBox: `0 0 ${whole} 40`, preserveAspectRatio: "none", role: "img",
    "aria-label": t("att.strip", { number: most.segment.number, share: share(most.got) }),
  }, columns);
}

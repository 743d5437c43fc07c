// Segments: a map of the whole text, and a list that says what is held of each and why.

import { el, svg } from "./dom.js";
import { count, t } from "./words.js";

const PAGE = 40;
const SHOWN = 400;

export const stateOf = (s) => (s.recalled ? "recalled" : !s.dropped ? "whole" : s.kept ? "anchors" : "gone");

/** segments: as the API lists them, with or without their texts. */
export function segmentView(segments) {
  if (!segments.length) return el("p", { class: "hint" }, t("seg.none"));
  const counts = { anchors: 0, whole: 0, recalled: 0, gone: 0 };
  for (const segment of segments) counts[stateOf(segment)] += 1;
  let only = null;
  const list = el("ol", { class: "segments" }), more = el("button", { type: "button" });
  const chosen = () => segments.filter((segment) => only === null || stateOf(segment) === only);
  let end = PAGE;
  const draw = () => {
    const found = chosen();
    list.replaceChildren(...found.slice(0, end).map(item));
    more.hidden = found.length <= end;
    more.textContent = t("seg.more", { n: count(Math.min(SHOWN, found.length - end)) });
  };
  more.addEventListener("click", () => { end += SHOWN; draw(); });
  const filters = Object.entries(counts).filter(([, n]) => n).map(([state, n]) => el("button", {
    type: "button", "aria-pressed": "false", class: "filter", onclick: (event) => {
      only = only === state ? null : state;
      end = PAGE;
      for (const other of filters) other.setAttribute("aria-pressed", String(only !== null && other === event.currentTarget));
      draw();
    },
  }, el("span", { class: `mark ${state}` }, t(`seg.${state}`)), el("span", { class: "sub" }, ` ${count(n)}`)));
  draw();
  return el("div", { class: "segment-view" },
    map(segments, counts), el("p", { class: "hint" }, t("seg.map_about")),
    el("div", { class: "filters-row", role: "group", "aria-label": t("seg.filter") }, filters), list, more);
}

function map(segments, counts) {
  const first = segments[0].start, whole = Math.max(1, segments.at(-1).stop - first);
  const bars = segments.map((segment) => {
    const height = 40 * segment.kept / segment.tokens;
    return svg("rect", {
      class: stateOf(segment), x: segment.start - first, width: segment.tokens, y: 40 - height, height,
    });
  });
  const said = Object.entries(counts).filter(([, n]) => n).map(([state, n]) => `${t(`seg.${state}`)} ${count(n)}`);
  return svg("svg", {
    class: "map", viewBox: `0 0 ${whole} 40`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${t("seg.map")}: ${said.join(", ")}`,
  }, bars);
}

function item(segment) {
  const state = stateOf(segment), anchors = segment.anchors ?? [];
  return el("li", { class: `segment ${state}` },
    el("p", { class: "line" }, el("b", {}, `#${segment.number}`), el("span", { class: `mark ${state}` }, t(`seg.${state}`)),
      el("span", { class: "sub" }, t("seg.cells", { kept: count(segment.kept), tokens: count(segment.tokens) })
        + (segment.pinned ? ` · ${t("seg.pinned", { n: count(segment.pinned) })}` : ""))),
    segment.text ? el("p", { class: "said", dir: "auto" }, segment.text) : null,
    anchors.length ? el("p", { class: "chips" }, el("span", { class: "sub" }, t("seg.held")), " ",
      anchors.map((anchor) => el("code", {}, anchor.trim() ? anchor : JSON.stringify(anchor)))) : null,
    segment.why.length ? el("details", {}, el("summary", {}, t("seg.why")),
      el("ul", { lang: "en" }, segment.why.map((reason) => el("li", {}, reason)))) : null);
}

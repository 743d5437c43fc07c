// Segments: a map of the whole text, and a list that says what is held of each and why.

import { el, svg } from "./dom.js";
import { count, share, t } from "./words.js";

const PAGE = 40;
const SHOWN = 400;

export const stateOf = (s) => (s.recalled ? "recalled" : !s.dropped ? "whole" : s.kept ? "anchors" : "gone");

/** segments: as the API lists them, with or without their texts. shares: of the attention, one each, where known. */
export function segmentView(segments, shares = []) {
  if (!segments.length) return el("p", { class: "hint" }, t("seg.none"));
  const counts = { anchors: 0, whole: 0, recalled: 0, gone: 0 };
  for (const segment of segments) counts[stateOf(segment)] += 1;
  let only = null;
  const list = el("ol", { class: "segments" }), more = el("button", { type: "button" });
  const got = new Map(segments.map((segment, i) => [segment, shares[i]]));
  const chosen = () => segments.filter((segment) => only === null || stateOf(segment) === only);
  let end = PAGE;
  const draw = () => {
    const found = chosen();
    list.replaceChildren(...found.slice(0, end).map((segment) => item(segment, got.get(segment))));
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

function item(segment, got) {
  const state = stateOf(segment);
  return el("li", { class: `segment ${state}` },
    el("p", { class: "line" }, el("b", {}, `#${segment.number}`), el("span", { class: `mark ${state}` }, t(`seg.${state}`)),
      el("span", { class: "sub" }, t("seg.cells", { kept: count(segment.kept), tokens: count(segment.tokens) })
        + (segment.pinned ? ` · ${t("seg.pinned", { n: count(segment.pinned) })}` : "")
        + (!got ? "" : ` · ${t("seg.attention", { share: share(got) })}`))),
    segment.text ? el("p", { class: "said", dir: "auto" }, marked(segment.text, segment.anchor_spans ?? [])) : null,
    chips(segment),
    segment.why.length ? el("details", {}, el("summary", {}, t("seg.why")),
      el("ul", { lang: "en" }, segment.why.map((reason) => el("li", {}, reason)))) : null);
}

/** The text with its anchors marked; spans: of characters, ascending, and overlapping where tokens share one. */
function marked(text, spans) {
  const characters = Array.from(text), parts = [];
  const said = (from, to) => characters.slice(from, to).join("");
  let done = 0;
  for (const [first, last] of spans) {
    let from = Math.max(first, done);
    while (from < last - 1 && !characters[from].trim()) from += 1;  // a token's own space looks like a stain
    if (from >= last) continue;
    parts.push(said(done, from), el("mark", {}, said(from, last)));
    done = last;
  }
  return [...parts, said(done)];
}

/** Anchors and their positions; without its text, a record has their positions alone. */
function chips({ text = "", anchors = [], anchor_positions: positions = [], anchor_spans: spans = [] }) {
  const several = Math.max(anchors.length, positions.length), characters = Array.from(text);
  if (!several) return null;
  // A token that is a part of a character is shown as that character.
  const said = (i) => (anchors[i].includes("\ufffd") && spans[i] ? characters.slice(...spans[i]).join("") : anchors[i]);
  return el("p", { class: "chips" }, el("span", { class: "sub" }, t("seg.held")), " ",
    Array.from({ length: several }, (_, i) => [el("span", { class: "chip" },
      anchors[i] === undefined ? null : el("code", {}, said(i).trim() || JSON.stringify(anchors[i])),
      positions[i] === undefined ? null : el("span", { class: "at" }, ` ${count(positions[i])}`)), " "]).flat());
}

// How full and how fast the engine room is, asked again and again while the page is looked at.

import { get } from "./api.js";
import { $, el, svg } from "./dom.js";
import { bytes, cells, count, rate, share, t } from "./words.js";

const LONGEST = 120;
const SHORTEST = 20;

/** Calls `work` every `pause()` milliseconds while the page is visible; a failure waits longer. */
export function again(work, pause) {
  let timer = null;
  const turn = async () => {
    timer = -1;
    let wait = pause();
    try {
      await work();
    } catch {
      wait = Math.max(10_000, wait);
    }
    timer = document.hidden ? null : setTimeout(turn, wait);
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden && timer === null) turn(); });
  turn();
  return () => { if (timer !== -1) { clearTimeout(timer); turn(); } };
}

/** A line of the newest values; most: the value at its top, or the largest of them. */
export function trend(values, most) {
  const top = most ?? Math.max(...values, 1e-9), step = 100 / (Math.max(SHORTEST, values.length) - 1), left = 100 - (values.length - 1) * step;
  const points = values.map((value, i) => `${(left + i * step).toFixed(2)},${(31 - 30 * value / top).toFixed(2)}`);
  return svg("svg", { class: "trend", viewBox: "0 0 100 32", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "area", d: `M${left},32L${points.join("L")}L100,32Z` }),
    svg("polyline", { points: points.join(" ") }));
}

/** A bar that is filled to `part` of `whole`. */
export function bar(part, whole, kind = "") {
  const width = whole ? Math.min(100, 100 * part / whole) : 0;
  return svg("svg", { class: `fill ${kind}`, viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "rest", width: "100", height: "8" }), svg("rect", { class: "part", width, height: "8" }));
}

export const gauge = (name, value, ...more) =>
  el("div", { class: "gauge" }, el("h3", {}, name), el("p", { class: "number" }, value), ...more);

export class Gauges {
  used = [];
  rates = [];
  before = null;

  /** extra: gauges of the page's own, shown first. */
  constructor(place = "gauges", extra = () => []) {
    this.place = $(place);
    this.extra = extra;
  }

  async ask() {
    this.show(await get("/v1/load"));
  }

  show(load) {
    const now = performance.now(), { before } = this;
    if (before) {
      const written = load.completion_tokens_total - before.tokens;
      push(this.rates, 1000 * Math.max(0, written) / Math.max(1, now - before.at));
    }
    this.before = { tokens: load.completion_tokens_total, at: now };
    push(this.used, load.used_cells);
    this.load = load;
    this.draw();
  }

  draw() {
    const { load } = this;
    if (!load) return;
    const speed = this.rates.at(-1);
    this.place.replaceChildren(
      ...this.extra(),
      gauge(t("now.memory"), bytes(load.kv_bytes), bar(load.used_cells, load.cells), el("p", { class: "hint" },
        t("now.memory_of", { used: count(load.used_cells), all: count(load.cells), share: share(load.used_cells / load.cells) })),
        trend(this.used, load.cells)),
      gauge(t("now.sessions"), t("now.of", { n: count(load.sessions), all: count(load.max_sessions) }),
        bar(load.sessions, load.max_sessions), el("p", { class: "hint" },
          t("now.sessions_of", { reading: count(load.reading), writing: count(load.writing), waiting: count(load.waiting) }))),
      gauge(t("now.speed"), speed === undefined ? "–" : rate(speed), el("p", { class: "hint" }, t("now.speed_about")),
        this.rates.length > 1 ? trend(this.rates) : null),
      gauge(t("now.held"), cells(load.document_cells + load.prefix_cells), el("p", { class: "hint" },
        t("now.held_of", { documents: count(load.documents), prefixes: count(load.prefixes) }))),
    );
  }
}

function push(list, value) {
  list.push(value);
  if (list.length > LONGEST) list.shift();
}

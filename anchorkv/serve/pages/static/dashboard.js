// The KPIs of the proof of concept, as this server sees them now.

import { get, problem } from "./api.js";
import { $, el, table } from "./dom.js";
import { again, Gauges } from "./gauges.js";
import { card } from "./kpi.js";
import { bytes, count, date, decimal, rate, seconds, share, t, times } from "./words.js";

const PAUSE = 3000;
const gauges = new Gauges();

async function show() {
  try {
    const found = await get("/v1/dashboard");
    draw(found);
    gauges.show(found.load);
    $("problem").replaceChildren();
    $("updated").textContent = t("dash.updated", { time: date(Date.now() / 1000) });
  } catch (error) {
    $("problem").replaceChildren(problem(error));
    throw error;
  }
}

function draw({ load, answers, watch, thresholds, expected_reduction: expected, least_checks: least }) {
  const known = answers?.count ? answers : null, overall = strictest(watch);
  $("basis").textContent = answers === null ? t("dash.no_audit") : known
    ? t("dash.basis", { n: count(known.count), since: date(known.since) }) : t("dash.no_answers");
  $("kpis").replaceChildren(
    memory(known, thresholds, expected), speed(known, thresholds), agreement(overall, watch, least), gap(overall, watch, least),
    fallbacks(known), sessions(known, load),
  );
  $("quality").replaceChildren(estimates(watch));
  $("steps").replaceChildren(steps(known));
  $("breakers").replaceChildren(breakers(watch));
  $("alarms").replaceChildren(alarms(watch));
}

const nothing = (key) => el("p", { class: "hint" }, t(key));

// --- the KPIs --------------------------------------------------------------------------------------------------------

function memory(known, thresholds, expected) {
  const value = known?.reduction;
  return card({
    name: t("kpi.memory"), said: known ? share(1 - 1 / value) : "–", how: times,
    figure: known && { value, limit: thresholds.memory_reduction, above: true },
    notes: known ? [
      t("kpi.memory_of", { times: times(value), kept: count(known.kept_cells), full: count(known.full_cells) }),
      expected && t("kpi.expected", { value: times(expected) }),
    ] : [],
  });
}

function speed(known, thresholds) {
  return card({
    name: t("kpi.speed"), said: rate(known?.speed), how: times,
    figure: known?.speed_ratio && { value: known.speed_ratio, limit: thresholds.speed_ratio, above: true },
    notes: known ? [
      known.speed_ratio ? t("kpi.speed_ratio", { times: times(known.speed_ratio), full: rate(known.full_speed), n: count(known.full_speed_count) })
        : t("kpi.speed_alone"),
      t("kpi.first_token", { median: seconds(known.first_token), p95: seconds(known.first_token_p95) }),
    ] : [],
  });
}

/** Of the policies in use, the estimates over all kinds of documents; of several, the one with the most checks. */
function strictest(watch) {
  const found = (watch?.estimates ?? []).filter((one) => one.kind === "*");
  return found.sort((a, b) => (b.tenant === "*") - (a.tenant === "*") || b.checks - a.checks)[0] ?? null;
}

function quality(overall, watch, name, bounds, limit, above, how, least, most) {
  return card({
    name: t(name), said: bounds ? how(bounds.value) : "–", how,
    figure: bounds && { ...bounds, limit, above, most, few: bounds.n < least, confidence: overall.confidence },
    notes: [
      watch === null ? t("dash.no_watch") : bounds ? t("kpi.quality_of", { n: count(overall.checks), policy: policy(overall) })
        : t("kpi.no_checks", { share: share(watch.share) }),
    ],
  });
}

const agreement = (overall, watch, least) =>
  quality(overall, watch, "kpi.agreement", overall?.agreement, overall?.agreement_floor, true, share, least, 1);
const gap = (overall, watch, least) =>
  quality(overall, watch, "kpi.gap", overall?.loss_gap, overall?.loss_gap_limit, false, decimal, least);

function fallbacks(known) {
  return card({
    name: t("kpi.fallbacks"), said: known ? share(known.fallback.value) : "–", how: share, badge: false,
    figure: known && { ...known.fallback, most: Math.max(0.1, known.fallback.high * 1.1) },
    notes: known ? [t("kpi.fallbacks_of", { n: count(known.fallback_count), all: count(known.count) })] : [],
  });
}

function sessions(known, load) {
  const fit = (cells) => Math.max(0, Math.floor(load.cells / Math.max(1, cells)));
  return card({
    name: t("kpi.sessions"), said: known ? t("kpi.sessions_fit", { n: count(fit(known.peak_cells)) }) : count(load.sessions),
    notes: [
      known && t("kpi.sessions_full", { n: count(fit(known.full_cells)) }),
      t("kpi.sessions_now", { n: count(load.sessions), waiting: count(load.waiting), bytes: bytes(load.cells * load.cell_bytes) }),
    ],
  });
}

// --- the tables ------------------------------------------------------------------------------------------------------

const policy = (it) => it.policy.split("#")[0];
const everybody = (name) => (name === "*" ? t("dash.all") : name || t("dash.no_kind"));
const bounded = (bounds, how) => (bounds ? `${how(bounds.value)} (${how(bounds.low)} – ${how(bounds.high)})` : "–");

function estimates(watch) {
  if (watch === null) return nothing("dash.no_watch");
  if (!watch.estimates.length) return nothing("dash.no_estimates");
  return table(t("dash.quality"), [
    t("word.tenant"), t("word.policy"), t("dash.kind"), t("dash.checks"), t("kpi.agreement"), t("dash.floor"), t("kpi.gap"), t("dash.limit"),
  ], watch.estimates.map((it) => [
    everybody(it.tenant), policy(it), everybody(it.kind), count(it.checks),
    el("span", {}, bounded(it.agreement, share)), share(it.agreement_floor),
    el("span", { class: it.crossing ? "missed" : null }, bounded(it.loss_gap, decimal)), decimal(it.loss_gap_limit),
  ]), [3, 4, 5, 6, 7]);
}

function steps(known) {
  if (!known?.steps.length) return nothing("dash.no_steps");
  return table(t("dash.steps"), [t("dash.step"), t("dash.reason"), t("dash.times")], known.steps.map((it) => [
    `${it.before} → ${it.after}${it.dry_run ? ` (${t("why.dry_run")})` : ""}`, el("span", { lang: "en" }, it.reason), count(it.count),
  ]), [2]);
}

function breakers(watch) {
  const found = watch?.breakers ?? [];
  if (!found.length) return nothing("dash.no_breakers");
  return table(t("dash.breakers"), [
    t("word.policy"), t("word.tenant"), t("dash.kind"), t("dash.state"), t("dash.reason"), t("dash.probes"),
  ], found.map((it) => [
    policy(it), everybody(it.tenant), everybody(it.kind),
    el("span", { class: `badge ${{ closed: "met", open: "missed", half_open: "open" }[it.state]}` }, t(`breaker.${it.state}`)),
    el("span", { lang: "en" }, it.sentence), t("dash.probes_of", { good: count(it.good_probes), bad: count(it.bad_probes) }),
  ]));
}

function alarms(watch) {
  const found = [...watch?.alarms ?? []].reverse();
  if (!found.length) return nothing("dash.no_alarms");
  return el("ul", { class: "alarms" }, found.map((it) => el("li", {},
    el("b", {}, date(it.at)), " ", el("span", { class: "sub" }, `${everybody(it.tenant)} · ${policy(it)} · ${everybody(it.kind)}`),
    el("p", { lang: "en" }, it.sentence))));
}

again(show, () => PAUSE);

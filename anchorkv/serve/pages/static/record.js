// One audit record, as an auditor reads it.

import { attentionView } from "./attention.js";
import { el, facts } from "./dom.js";
import { bar } from "./gauges.js";
import { segmentView } from "./segments.js";
import { recalledList, stepList, writing } from "./why.js";
import { bytes, count, date, known, rate, seconds, t, times } from "./words.js";

const code = (text) => (text ? el("code", { class: "hash" }, text) : null);
const json = (value) => el("pre", { tabindex: "0" }, JSON.stringify(value, null, 2));
const folded = (name, ...content) => el("details", {}, el("summary", {}, name), ...content);

/** Elements, the first heading first. */
export function recordView(it) {
  const title = el("h2", { tabindex: "-1", class: "id" }, it.id);
  const head = facts([
    [t("audit.number"), count(it.sequence)], [t("audit.time"), date(it.time)],
    [t("audit.kind"), known(`kind.${it.kind}`) ? t(`kind.${it.kind}`) : it.kind], [t("word.tenant"), it.tenant],
    [t("audit.key"), code(it.key)], [t("word.policy"), it.policy], [t("word.document"), code(it.details?.document)],
    [t("audit.action"), it.details?.action], [t("audit.finish"), it.details?.finish], [t("audit.quality"), it.details?.quality],
  ]);
  const parts = it.retired ? [el("p", { class: "note" }, t("audit.retired"))] : it.kind === "answer" ? answer(it) : [];
  return [title, head, ...parts, el("h3", {}, t("audit.proof")), proof(it), folded(t("audit.whole"), json(it))];
}

function answer(it) {
  const { figures } = it;
  return [
    ...texts(it),
    el("h3", {}, t("why.memory")), el("p", {}, t("why.kept", {
      kept: count(figures.kept_cells), full: count(figures.full_cells), times: times(figures.reduction), peak: count(figures.peak_cells),
    })), bar(figures.kept_cells, figures.full_cells),
    facts([
      [t("word.kv_bytes"), bytes(figures.kv_bytes)], [t("audit.prompt"), count(figures.prompt_tokens)],
      [t("why.cached"), count(figures.cached_tokens)], [t("audit.written"), count(figures.completion_tokens)],
      [t("word.speed"), rate(writing(figures.completion_tokens, figures.decode_seconds))],
      [t("word.first_token"), seconds(figures.first_token_seconds)], [t("audit.queue"), seconds(figures.queue_seconds)],
    ]),
    el("h3", {}, t("why.fallback")), stepList(it.fallback ?? []),
    el("h3", {}, t("why.recalled")), recalledList(it.recalled ?? []),
    ...(figures.attention
      ? [el("h3", {}, t("why.attention")), attentionView(figures.attention, it.segments ?? [])] : []),
    el("h3", {}, t("why.segments")), segmentView(it.segments ?? [], figures.attention?.segments),
  ];
}

function texts(it) {
  if (it.answer === null || it.answer === undefined) return [el("p", { class: "note" }, t("audit.no_text"))];
  const { messages = [], text } = it.request ?? {};
  return [
    el("h3", {}, t("audit.asked")),
    ...messages.map((message) => turn(message.role, message.content)), text ? turn("user", text) : null,
    el("h3", {}, t("audit.answer")), turn("assistant", it.answer),
  ].filter(Boolean);
}

const turn = (role, text) => el("article", { class: `turn ${role === "assistant" ? "assistant" : "user"}` },
  el("p", { class: "sub" }, known(`chat.${role}`) ? t(`chat.${role}`) : role), el("div", { class: "said", dir: "auto" }, text));

function proof(it) {
  return el("div", {}, facts([
    [t("audit.model"), [it.model, " ", code(it.model_fingerprint)]],
    [t("audit.adapter"), it.adapter ? [it.adapter, " ", code(it.adapter_fingerprint)] : null],
    [t("audit.request_hash"), code(it.request_hash)], [t("audit.answer_hash"), code(it.answer_hash)],
    [t("audit.content_hash"), code(it.content_hash)], [t("audit.previous"), code(it.previous)], [t("audit.hash"), code(it.hash)],
  ]), folded(t("audit.policy_options"), json(it.policy_config ?? {})));
}

// The server's API: the key is asked for when the server wants one, and kept for this tab's session alone.

import { $, el } from "./dom.js";
import { known, t } from "./words.js";

const NAME = "anchorkv.key";
const wanted = document.documentElement.dataset.keys === "yes";
const stored = () => sessionStorage.getItem(NAME);
let asked = null;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The response, when it is a good one. Throws Refused, or an AbortError when `signal` says so. */
export async function request(path, { method = "GET", json, form, signal } = {}) {
  for (;;) {
    const key = wanted ? stored() ?? await ask("") : null;
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    if (json !== undefined) headers["content-type"] = "application/json";
    const body = json === undefined ? form : JSON.stringify(json);
    let reply;
    try {
      reply = await fetch(path, { method, headers, body, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, t("error.0"));
    }
    if (reply.ok) return reply;
    const message = await said(reply);
    if (reply.status !== 401 || !wanted) throw new Refused(reply.status, message);
    if (stored() === key) forget();
    if (!stored()) await ask(message);
  }
}

export const get = async (path) => (await request(path)).json();

async function said(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return reply.statusText || String(reply.status);
  }
}

/** The events of a stream as they come. Throws Refused. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, t("error.cut"));
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(500, event.error.message);
      yield event;
    }
  }
}

/** What went wrong, as an element: the server's own sentence, after its kind in this page's language. */
export function problem(error) {
  const own = `error.${error.status}`;
  if (!(error instanceof Refused)) console.error(error);
  const parts = [];
  if (error.status === 0) parts.push(error.message);
  else if (!(error instanceof Refused)) parts.push(t("error.page"));
  else {
    parts.push(el("b", {}, t(known(own) ? own : "error.other")), " ", el("span", { lang: "en" }, error.message));
  }
  return el("p", { class: "problem" }, parts);
}

// --- the key ---------------------------------------------------------------------------------------------------------

/** One dialog, however many requests wait for it. Throws Refused when its reader closes it. */
function ask(why) {
  asked ??= answered(why).finally(() => { asked = null; });
  return asked;
}

function answered(why) {
  const dialog = $("ask-key"), text = $("key-text"), wrong = dialog.querySelector(".problem");
  wrong.hidden = !why;
  wrong.textContent = why ? t("key.wrong") : "";
  text.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.querySelector("button[value=cancel]").onclick = () => dialog.close();
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close(text.value.trim());
    };
    dialog.onclose = () => {
      const key = dialog.returnValue;
      text.value = "";
      if (/^[\x21-\x7e]+$/.test(key)) {
        sessionStorage.setItem(NAME, key);
        show();
        resolve(key);
      } else reject(new Refused(401, t("key.needed")));
    };
  });
}

function forget() {
  sessionStorage.removeItem(NAME);
  show();
}

function show() {
  const button = $("key");
  button.hidden = !wanted;
  button.textContent = stored() ? t("key.forget") : t("key.enter");
}

$("key").addEventListener("click", () => {
  if (stored()) forget();
  location.reload();
});
show();

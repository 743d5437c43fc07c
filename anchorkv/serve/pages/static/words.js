// This page's words, and how its language writes numbers.

export const lang = document.documentElement.lang;
const texts = await (await fetch(`/ui/words/${lang}.json`)).json();

export function t(key, values = {}) {
  if (!(key in texts)) throw new Error(`no words for ${key}`);
  return texts[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export const known = (key) => key in texts;

const formats = new Map();
function written(value, options) {
  const key = JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(lang, options));
  return formats.get(key).format(value);
}

const decimals = (digits) => ({ minimumFractionDigits: digits, maximumFractionDigits: digits });
const three = (value) => written(value, decimals(Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0));
const none = (value) => value === null || value === undefined || Number.isNaN(value);
const shown = (say) => (value) => (none(value) ? "–" : say(value));

export const count = shown((value) => written(Math.round(value), {}));
export const decimal = shown((value) => written(value, decimals(3)));
export const times = shown((value) => t("unit.times", { n: three(value) }));
export const share = shown((value) => written(value, { style: "percent", maximumFractionDigits: 1 }));
export const rate = shown((value) => t("unit.rate", { n: three(value) }));
export const seconds = shown((value) => (value < 1
  ? t("unit.milliseconds", { n: written(value * 1000, decimals(0)) }) : t("unit.seconds", { n: three(value) })));
export const bytes = shown((value) => {
  const power = value >= 2 ** 30 ? 3 : value >= 2 ** 20 ? 2 : 1;
  return `${three(value / 1024 ** power)}\u00a0${["KiB", "MiB", "GiB"][power - 1]}`;
});
export const cells = (value) => t("unit.cells", { n: count(value) });

const clock = new Intl.DateTimeFormat(lang, { dateStyle: "medium", timeStyle: "medium" });
/** time: seconds since 1970, or an ISO text. */
export const date = shown((time) => clock.format(new Date(typeof time === "number" ? time * 1000 : time)));

"use strict";
// The formulas of anchorkv/poc/capacity.py under the same names, and the form that feeds them. A test runs both sides.
(() => {
  const BLOCKS = {
    f32: [4, 1], f16: [2, 1], q8_0: [34, 32], q6_k: [210, 256], q5_k: [176, 256], q4_k: [144, 256], q4_0: [18, 32],
  };

  const REDUCTION = 12;

  // Whole numbers beyond 2^53 occur on the way: products are BigInt, as Python's are exact.
  function upwards(factors, divisor) {
    const product = factors.reduce((all, factor) => all * BigInt(factor), 1n), by = BigInt(divisor);
    return Number((product + by - 1n) / by);
  }

  const cellNumbers = (shape) => shape.numbers || 2 * shape.layers * shape.kv_heads * shape.head_dim;

  function heldCells(inputs, reduction) {
    const whole = inputs.sinks + (inputs.recent_window + 1) * inputs.segment;
    const held = Math.min(inputs.context, whole + Math.ceil(inputs.context / reduction));
    return inputs.cell_budget === null ? held : Math.min(held, inputs.cell_budget);
  }

  function peakCells(inputs, reduction) {
    return Math.min(inputs.context, heldCells(inputs, reduction) + Math.max(inputs.recall_cells, inputs.reading_cells));
  }

  function kvBytes(shape, cells, kvType) {
    const [size, numbers] = BLOCKS[kvType];
    return upwards([cellNumbers(shape), cells, size], numbers);
  }

  function fullBytes(shape, context, kvType) {
    const [size, numbers] = BLOCKS[kvType], sliding = shape.sliding_layers;
    const inLayers = (shape.layers - sliding) * context + sliding * Math.min(context, shape.sliding_window);
    return upwards([cellNumbers(shape), inLayers, size], numbers * shape.layers);
  }

  function weightBytes(shape, weights) {
    const [size, numbers] = BLOCKS[weights];
    return shape.weight_bytes || upwards([shape.parameters, size], numbers);
  }

  const cacheBytes = (memory, reserve, weights) => Math.max(0, Math.floor(memory * (1 - reserve)) - weights);
  const sessions = (cache, session) => Math.floor(cache / session);
  const machines = (users, each) => (each ? Math.ceil(users / each) : 0);

  function row(inputs, shape) {
    const cache = cacheBytes(inputs.memory, inputs.reserve, weightBytes(shape, inputs.weights));
    const full = fullBytes(shape, inputs.context, inputs.kv_type);
    const anchored = kvBytes(shape, peakCells(inputs, inputs.reduction), inputs.kv_type);
    const found = {
      model: shape.name, kv_bytes_token: kvBytes(shape, 1, inputs.kv_type), full_bytes_session: full,
      anchored_bytes_session: anchored, sessions_full: sessions(cache, full), sessions_anchored: sessions(cache, anchored),
    };
    for (const side of ["full", "anchored"]) {
      found[`machines_${side}`] = machines(inputs.users, found[`sessions_${side}`]);
      found[`cost_${side}`] = found[`machines_${side}`] * inputs.price;
    }
    return found;
  }

  function notes(shape, context) {
    const found = [];
    if (shape.sliding_layers > 0) found.push("sliding");
    if (shape.hybrid) found.push("hybrid");
    if (shape.window > 0 && shape.window < context) found.push("window");
    return found;
  }

  if (typeof module === "object" && module.exports) {
    module.exports = { row, notes, heldCells, peakCells, kvBytes, fullBytes, weightBytes, cacheBytes, sessions, machines };
    return;
  }

  // --- the page -----------------------------------------------------------------------------------------------------

  const root = document.getElementById("calculator"), source = document.getElementById("capacity-data");
  if (!root || !source) return;
  const data = JSON.parse(source.textContent), words = JSON.parse(root.dataset.words), lang = root.dataset.lang;
  if (!data.models.length) return;
  const form = root.querySelector("form"), fields = [...form.elements].filter((field) => field.name);
  const first = data.rows.length ? data.rows[0].model : data.models[0].name;
  const UNIT = { gib: 2 ** 30, percent: 0.01 };
  let inputs, shapes, chosen;

  const number = (value, digits = 0) =>
    value.toLocaleString(lang, { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const say = (key, values = {}) => words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

  function bytes(value) {
    let unit = 0;
    for (; value >= 1024 && unit < 4; unit += 1) value /= 1024;
    return `${number(value, unit && value < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
  }

  function money(value) {
    const digits = Number.isInteger(inputs.price) ? 0 : 2;
    const style = { currency: inputs.currency, minimumFractionDigits: digits, maximumFractionDigits: digits };
    return value.toLocaleString(lang, { style: "currency", ...style });
  }

  const times = (value) => say("times", { n: number(value, value < 100 ? 1 : 0) });
  const shape = () => shapes.get(chosen);

  // What a field shows and sets: a model's own figure, or an assumption that all models share.
  const owner = (field) => (field.dataset.of === "model" ? shape() : inputs);

  function show(field) {
    if (field.name === "model") field.value = chosen;
    else if (field.name === "weight_bytes") field.value = rounded(weightBytes(shape(), inputs.weights) / UNIT.gib);
    else {
      const value = owner(field)[field.name];
      field.value = value === null ? "" : field.dataset.unit ? rounded(value / UNIT[field.dataset.unit]) : value;
    }
  }

  const rounded = (value) => Number(value.toPrecision(6));

  function set(field) {
    if (field.name === "model") chosen = field.value;
    else if (field.tagName === "SELECT") owner(field)[field.name] = field.value;
    else if (field.type === "text") owner(field)[field.name] = field.value.toUpperCase();
    else if (field.value === "") owner(field)[field.name] = null;
    else {
      const value = Number(field.value) * (UNIT[field.dataset.unit] || 1);
      owner(field)[field.name] = field.dataset.unit === "gib" ? Math.round(value) : value;
      if (["layers", "kv_heads", "head_dim"].includes(field.name)) owner(field).numbers = 0;
    }
  }

  function restart() {
    inputs = { ...data.inputs, reduction: data.inputs.reduction ?? REDUCTION };
    shapes = new Map(data.models.map((model) => [model.name, { ...model }]));
    chosen = first;
    fields.forEach(show);
    update();
  }

  const put = (place, text) => { root.querySelector(`[data-out="${place}"]`).textContent = text; };

  function line(found) {
    const ratio = (large, small) => (large && small ? times(large / small) : "–");
    const known = (value, side, format) => (found[`machines_${side}`] ? format(value) : "–");
    const cost = (value, side) => (inputs.price ? known(value, side, money) : "–");
    return {
      memory: [bytes(found.full_bytes_session), bytes(found.anchored_bytes_session),
        ratio(found.full_bytes_session, found.anchored_bytes_session)],
      sessions: [number(found.sessions_full), number(found.sessions_anchored),
        ratio(found.sessions_anchored, found.sessions_full)],
      machines: [known(found.machines_full, "full", number), known(found.machines_anchored, "anchored", number),
        ratio(found.machines_full, found.machines_anchored)],
      cost: [cost(found.cost_full, "full"), cost(found.cost_anchored, "anchored"), ratio(found.cost_full, found.cost_anchored)],
    };
  }

  function verdict(found) {
    const values = {
      model: found.model, users: number(inputs.users), full: number(found.machines_full),
      anchored: number(found.machines_anchored),
    };
    const weights = weightBytes(shape(), inputs.weights);
    values.weights = bytes(weights);
    values.left = bytes(cacheBytes(inputs.memory, inputs.reserve, weights));
    if (!cacheBytes(inputs.memory, inputs.reserve, weights)) return say("weights_too_large", values);
    if (!found.sessions_anchored) return say("session_too_large", values);
    if (!found.sessions_full) return say("full_too_large", values);
    const saved = found.cost_full - found.cost_anchored;
    const machinesSaid = say("machines_said", values);
    return saved > 0 ? machinesSaid + say("saved", { saved: money(saved) }) : machinesSaid;
  }

  function update() {
    const wrong = fields.filter((field) => !valid(field));
    for (const field of fields) field.setAttribute("aria-invalid", String(wrong.includes(field)));
    const error = root.querySelector(".calc-error");
    error.hidden = !wrong.length;
    const label = (field) => form.querySelector(`label[for="${field.id}"]`).firstChild.textContent.trim();
    const said = wrong.length ? say("wrong", { fields: wrong.map(label).join(words.comma) }) : "";
    if (error.textContent !== said) error.textContent = said;
    root.classList.toggle("calc-stale", wrong.length > 0);
    if (wrong.length) return;
    const found = row(inputs, shape()), figures = line(found);
    for (const [name, values] of Object.entries(figures)) {
      ["full", "anchored", "gain"].forEach((column, index) => put(`${name}-${column}`, values[index]));
    }
    put("token", say("token", {
      bytes: bytes(found.kv_bytes_token), held: number(heldCells(inputs, inputs.reduction)),
      peak: number(peakCells(inputs, inputs.reduction)), context: number(inputs.context),
      left: bytes(cacheBytes(inputs.memory, inputs.reserve, weightBytes(shape(), inputs.weights))),
    }));
    put("notes", notes(shape(), inputs.context).map((note) => words[`note_${note}`]).join(" "));
    announce(verdict(found));
    compare();
  }

  function valid(field) {
    if (!field.checkValidity()) return false;
    if (field.name === "sliding_layers" || field.name === "sliding_window") {
      const { layers, sliding_layers: some, sliding_window: window } = shape();
      return some <= layers && (some > 0) === (window > 0);
    }
    if (field.name === "kv_heads" || field.name === "head_dim") return shape().numbers > 0 || Number(field.value) > 0;
    return true;
  }

  // The sentence is read aloud: not at every key, but once the typing rests.
  let waiting;
  function announce(text) {
    const place = root.querySelector("[data-out=verdict]");
    clearTimeout(waiting);
    if (!place.textContent) place.textContent = text;
    else if (place.textContent !== text) waiting = setTimeout(() => { place.textContent = text; }, 350);
  }

  function compare() {
    const listed = [...new Set([...data.rows.map((found) => found.model), chosen])];
    root.querySelector(".calc-models tbody").replaceChildren(...listed.map((name) => {
      const line_ = line(row(inputs, shapes.get(name))), tr = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      tr.append(head);
      for (const figure of ["sessions", "machines", "cost"]) {
        for (const index of [0, 1]) {
          const cell = document.createElement("td");
          cell.className = "n";
          cell.textContent = line_[figure][index];
          tr.append(cell);
        }
      }
      if (name === chosen) tr.className = "chosen";
      return tr;
    }));
  }

  form.elements.model.replaceChildren(...data.models.map((model) => new Option(model.name, model.name)));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => { event.preventDefault(); restart(); });
  form.addEventListener("input", (event) => {
    const field = event.target;
    if (field.checkValidity()) set(field);
    if (field.name === "weights" && shape().parameters) shape().weight_bytes = 0;
    if (field.name === "weights") show(form.elements.weight_bytes);
    if (field.name === "model") fields.filter((other) => other !== field).forEach(show);
    update();
  });
  root.hidden = false;
  restart();
})();

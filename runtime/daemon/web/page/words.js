"use strict";
// What is shown, in words. Nothing here touches the page.

const STATES = {
  "warm-up": ["Getting used to the place", "It follows the light and the colours, and does not judge yet.", "busy"],
  observing: ["Watching", "It looks whether there is something to learn; nothing is learned now.", "good"],
  adapting: ["Learning", "The world has moved, and the model follows it.", "busy"],
  probation: ["Being tested", "What was learned is compared with the model as it was delivered.", "busy"],
  committed: ["Proven", "What was learned passed its test and is kept.", "good"],
  "rolled back": ["Put back", "What was learned did harm and was put back; it rests for a while.", "warn"],
  paused: ["Paused", "It predicts with what it has learned, and learns nothing more until you resume.", "warn"],
};

// [headline, sentence, tone] of a status
function stateOf(status) {
  if (status.mode === "stopping") return ["Stopping", "The daemon ends.", "warn"];
  if (status.mode === "starting") return ["Starting", status.reason || "The model is made ready.", "busy"];
  if (status.mode === "safe") return ["Safe mode", "Something went wrong, so less is done than was asked for.", "bad"];
  if (!status.bundle) return ["No model", "No bundle is installed yet.", "warn"];
  if (!status.source.live && status.source.type !== "none" && status.source.type !== "http")
    return ["No frames", "The source gives nothing at the moment; it is tried again.", "warn"];
  const adaptation = status.adaptation;
  if (!adaptation.enabled) return ["Predicting only", "Learning is switched off in the configuration.", "good"];
  if (adaptation.paused) return STATES.paused;
  if (status.memory.level > 0) return ["Learning waits for memory", status.memory.reason || "Memory is short.", "warn"];
  if (!status.guard) return ["Learning", "Without a guard: every window is learned from.", "busy"];
  return STATES[status.guard.state] || [status.guard.state, "", "plain"];
}

// Lines of the plan that a stranger would not understand by their names
const LINES = {
  region: "tensors", "region's table": "where these lie", "graph structures": "the graphs themselves", code: "code of onnxruntime",
  "prepacked weights": "weights, laid out for speed", adapter: "Python's side of it", state: "what is learned", restoring: "putting a state back",
  allowance: "allowance for the uncounted", slack: "kept free for all else",
};
const lineOf = (name) => LINES[name] || name;

const SOURCES = {
  http: "Frames that are posted over HTTP", serial: "Serial line", camera: "Camera", folder: "Folder", replay: "Recording", stdin: "Standard input",
};
const COUNTS = {
  dropped: "Dropped before they were read", lost: "Lost on the way", crc: "Damaged on the way", cobs: "Broken off on the way", header: "Not understood",
  oversize: "Too long", duplicates: "Came twice", reordered: "Came out of order", restarts: "Restarts of the sender", breaks: "Times it broke off",
  stalls: "Times it stood still", late: "Late",
};

// [what it says, the numbers it says it by] of a decision of the guard, or any other event
function parted(text) {
  const found = /^(?:(window \d+): )?(.*?)(?: \(([a-z ]+ -?[\d.]+(?:, [a-z ]+ -?[\d.]+)*)\))?$/s.exec(text);
  return found ? [found[2], [found[1], found[3]].filter(Boolean).join(" · ")] : [text, ""];
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
const number = (value, digits = 0) =>
  known(value) ? value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : "–";
const percent = (value) => (known(value) ? `${Math.round(100 * value)} %` : "–");

function bytes(size) {
  if (!known(size)) return "–";
  for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (size >= scale) return `${number(size / scale, size / scale < 10 ? 1 : 0)} ${unit}`;
  return `${size} B`;
}

function lasting(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 1) return "less than a second";
  const steps = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
  const at = steps.findIndex(([scale]) => seconds >= scale);
  const [scale, unit] = steps[at];
  const count = Math.floor(seconds / scale);
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

const clock = (time) => new Date(1000 * time).toLocaleTimeString("en-GB");

const classOf = (facts) => (facts.name !== null && facts.name !== undefined ? facts.name : facts.label === undefined ? "–" : `class ${facts.label}`);

// A guess in words: [head, share]; of segmentation the class with most of the picture
function guessOf(facts) {
  if (facts.shares) {
    const [name, share] = Object.entries(facts.shares)[0] || ["–", 0];
    return [name, share, `${percent(share)} of the picture`];
  }
  return [classOf(facts), facts.confidence, `${percent(facts.confidence)} sure`];
}

function shiftTold(shift) {
  if (!known(shift)) return "not known";
  if (shift < 0.02) return "as in training"; // what the guard takes for it
  if (shift < 0.15) return "a little different from training";
  return shift < 0.5 ? "clearly different from training" : "very different from training";
}

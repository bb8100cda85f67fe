"use strict";
// Keeps the page as the daemon is: by server-sent events, and where those fail, by asking now and then, more and more rarely while nobody answers.

const at = (id) => document.getElementById(id);
const say = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };
const ASK_MS = 2000, SLOWEST_MS = 30000, SILENT_MS = 12000, GIVE_UP_MS = 10000, REFUSED_MS = 60000, FRAME_MS = 500, COMPARED_MS = 30000;
const KEY = "edgeadapt-token";

const shiftLine = new TimeLine(at("shift-line"), [0.1, 0.25, 0.5, 1], at("shift-top"), at("shift-span"));
const spreadLine = new TimeLine(at("spread-line"), [1.25], at("spread-top"), at("spread-span"));
let stream = null, heard = 0, listenAt = 0, refused = ASK_MS, wait = 1000, timer = 0, polls = true;
let access = { writes: false, allowed: false }, busy = false, paused = false, live = false, uptime = -1;
let frameId, held = false, foretold = false, frameBusy = false, frameAt = -FRAME_MS, frameTimer = 0, pictures = false, answered = 0, comparedAt = -COMPARED_MS - 1, names = "";

// ---------------------------------------------------------------- what is shown

function showStatus(status) {
  const [word, told, tone] = stateOf(status);
  if (uptime > status.uptime_s) askAccess(); // it was started again
  uptime = status.uptime_s;
  document.title = `${status.name}: ${word.toLowerCase()}`;
  say("name", status.name);
  const bundle = status.bundle;
  say("about", bundle ? `${bundle.name}${bundle.on_trial ? ", on trial" : ""} · method ${bundle.method} · up for ${lasting(status.uptime_s)}` : "no bundle");
  say("state-word", word);
  say("state-told", told);
  at("state").dataset.tone = tone;
  const guard = status.guard;
  say("state-last", guard && status.mode === "serving" ? [`for ${lasting(guard.since_s)}`, parted(guard.last)[0].replace(/^[a-z -]+: /, "")].filter(Boolean).join(" · ") : "");
  at("safe").hidden = status.mode !== "safe";
  say("safe-why", status.reason ? `Why: ${status.reason}` : "");
  answered = status.predictions.count;
  showFigures(status);
  showScores(guard);
  showMemory(status.memory);
  showSource(status);
  showDisk(status);
  showEvents(status.events);
  showNames(status.classes || []);
  say("board", [status.board.model, known(status.board.load) ? `load ${number(status.board.load, 2)}` : "", `edgeadapt ${status.edgeadapt}`].filter(Boolean).join(" · "));
  paused = status.adaptation.paused;
  at("main").setAttribute("aria-busy", "false");
  showButtons();
}

function showFigures({ predictions, memory, board }) {
  const { p50, p95, p99 } = predictions.latency_ms;
  say("rate", number(predictions.per_second, 1));
  say("latency", known(p50) ? `${number(p50, p50 < 10 ? 1 : 0)} ms` : "–");
  say("latency-more", known(p95) ? `95 % within ${number(p95)} ms\n99 % within ${number(p99)} ms` : "");
  say("memory-now", bytes(memory.resident));
  say("memory-of", memory.budget ? `of ${bytes(memory.budget)} allowed` : "no budget set");
  say("heat", known(board.temperature_c) ? `${number(board.temperature_c)} °C` : "–");
  say("heat-more", board.throttled === null ? (known(board.temperature_c) ? "" : "not measured here") : board.throttled ? "slowed down by heat or power" : "runs at full speed");
  at("heat-more").classList.toggle("warn", board.throttled === true);
}

function showScores(guard) {
  const shift = guard ? guard.shift : null, collapse = guard ? guard.collapse : {};
  shiftLine.add(shift);
  spreadLine.add(collapse.spread);
  say("shift", number(shift, 2));
  say("spread", number(collapse.spread, 2));
  say("shift-told", guard ? shiftTold(shift) : "there is no guard, so it is not measured");
  at("shift-line").setAttribute("aria-label", `shift over time, now ${number(shift, 2)}`);
  at("spread-line").setAttribute("aria-label", `variety of predictions over time, now ${number(collapse.spread, 2)}`);
  pairs("collapse", [
    ["Agreement with the model as delivered", percent(collapse.agreement)],
    ["Variety kept, compared with it", percent(collapse.kept)],
    ["Parameters moved by", known(collapse.moved) ? `${number(100 * collapse.moved, 1)} %` : "–"],
  ]);
}

function showMemory(memory) {
  const levels = ["", "Learning is paused, as memory is short.", "Caches were released, as memory is short.", "Memory is very short: predicting only."];
  const room = memory.budget && known(memory.resident) ? `${bytes(Math.max(0, memory.budget - memory.resident))} free of the budget of ${bytes(memory.budget)}` : "No budget is set";
  const why = memory.level ? ` ${levels[memory.level] || ""} ${memory.reason}` : "";
  say("memory-told", `${room}; at most ${bytes(memory.peak)} so far.${why}`);
  const planned = drawStack(at("stack"), at("legend"), memory);
  say("plan-told", planned ? `Planned for the model: ${bytes(planned)}. The rest of what is in use is the program itself: Python and libraries.` : "");
}

function showSource({ source, queue, predictions }) {
  const kind = SOURCES[source.type] || source.type;
  say("source", source.type === "none" ? "No source is configured." : source.name && source.name !== source.type ? `${kind}: ${source.name}` : kind);
  at("complaint").hidden = !source.complaint;
  say("complaint", source.complaint);
  const counts = Object.entries(source.counts).filter(([, count]) => count).map(([kind, count]) => [COUNTS[kind] || kind, number(count)]);
  pairs("source-facts", [
    ["Last frame", known(source.last_frame_s) ? (source.last_frame_s < 1 ? "just now" : `${lasting(source.last_frame_s)} ago`) : null],
    ["Frames answered", number(predictions.count)],
    ["Frames that could not be used", number(predictions.bad)],
    ["Waiting", `${number(queue.length)} of ${number(queue.limit)}`],
    ["Dropped for newer ones", number(queue.dropped)],
    ...counts,
  ]);
}

function showDisk({ state, adaptation, compare }) {
  const trial = state.on_probation ? "being tested before it counts as good" : "counted as good";
  say("learned", state.active === null ? "Nothing is kept yet: it predicts as it was delivered." : `Generation ${state.active}, ${trial}.`);
  at("degraded").hidden = !state.degraded;
  say("degraded", state.degraded ? `Nothing is written at the moment: ${state.degraded}` : "");
  pairs("disk-facts", [
    ["Last good generation", state.last_good === null ? "none yet" : number(state.last_good)],
    ["Steps taken", number(adaptation.steps)],
    ["Steps dropped as not finite", number(adaptation.rejected)],
    ["Answers later than they may be", number(adaptation.late)],
  ]);
  const share = state.bytes_per_day ? state.written_today / state.bytes_per_day : 0;
  at("written-bar").style.width = `${Math.min(100, 100 * share)}%`;
  at("written-bar").classList.toggle("high", share > 0.9);
  say("written", `${bytes(state.written_today)} written today${state.bytes_per_day ? `, at most ${bytes(state.bytes_per_day)}` : ""}`);
  say("agreement", known(compare.agreement) ? `Predicts the same as without adaptation on ${percent(compare.agreement)} of ${number(compare.frames)} frames.` : "");
}

function showEvents(events) {
  const list = at("events"), newest = events.slice(-20).reverse();
  const marks = newest.map((event) => `${event.time} ${event.kind} ${event.text}`).join("\n");
  at("no-events").hidden = newest.length > 0;
  list.hidden = !newest.length;
  if (list.dataset.marks === marks) return;
  list.dataset.marks = marks;
  list.replaceChildren(...newest.map((event) => {
    const item = document.createElement("li"), time = document.createElement("time"), text = document.createElement("span");
    const [told, by] = parted(event.text || event.kind);
    time.dateTime = new Date(1000 * event.time).toISOString();
    time.title = new Date(1000 * event.time).toLocaleString("en-GB");
    time.textContent = clock(event.time);
    text.textContent = told;
    if (by) text.appendChild(document.createElement("small")).textContent = by;
    item.append(time, text);
    return item;
  }));
}

// What may be typed as a label.
function showNames(classes) {
  const joined = classes.join("\n");
  if (joined === names) return;
  names = joined;
  at("names").replaceChildren(...classes.slice(0, 1000).map((name) => Object.assign(document.createElement("option"), { value: name })));
}

// What a frame was predicted as.
function showPrediction(facts) {
  if (facts.error && facts.label === undefined && !facts.shares) {
    say("guess", "cannot be used");
    say("guess-sure", String(facts.error));
    at("guess-bar").style.width = "0";
    return;
  }
  const [name, share, sure] = guessOf(facts);
  say("guess", name);
  say("guess-sure", sure);
  at("guess-bar").style.width = `${100 * (share || 0)}%`;
}

// Only some frames are also answered without adaptation: the latest of those is shown until there is another.
function showWithout({ without, ...facts }) {
  const now = performance.now();
  if (without) {
    at("without").dataset.same = without.label === facts.label && !without.shares;
    for (const [id, found] of [["with-guess", facts], ["without-guess", without]]) say(id, guessOf(found).filter((part) => typeof part === "string").join(", "));
    comparedAt = now;
  }
  at("without").hidden = now - comparedAt > COMPARED_MS;
}

function pairs(id, rows) {
  const items = rows.filter(([, value]) => value !== null).flatMap(([name, value]) => {
    const term = document.createElement("dt"), told = document.createElement("dd");
    term.textContent = name;
    told.textContent = value;
    return [term, told];
  });
  at(id).replaceChildren(...items);
}

// ---------------------------------------------------------------- the frame

// Predictions come more often than frames are drawn: where a frame brings its own, that one is shown, so that both belong together.
function predicted(facts) {
  answered += 1;
  if (!held && !(foretold && !facts.error)) showPrediction(facts);
  showWithout(facts);
  frameSoon();
}

// The picture stands still while somebody says what it shows.
function hold(now) {
  held = now && frameId !== undefined;
  at("held").hidden = !held;
  if (!held) frameSoon();
}

async function frameSoon() {
  const now = performance.now();
  clearTimeout(frameTimer);
  if (document.hidden || held || !answered) return;
  if (frameBusy || now - frameAt < FRAME_MS) {
    frameTimer = setTimeout(frameSoon, FRAME_MS);
    return;
  }
  frameBusy = true;
  frameAt = now;
  try {
    if (!pictures) {
      const reply = await ask("/frame.json"); // which also says whether it is a picture; of those only the first is asked for so
      const frame = reply.ok ? await reply.json() : {};
      pictures = frame.pixels !== undefined;
      if (frame.values && !held) {
        frameId = frame.id;
        drawSignal(at("frame"), frame.values);
        framed("signal", frame.prediction);
      }
    }
    if (pictures) {
      const reply = await ask("/frame.png");
      pictures = reply.ok; // another bundle may be served now
      if (reply.ok && !held) {
        frameId = JSON.parse(reply.headers.get("X-Frame-Id"));
        await drawPicture(at("frame"), await reply.blob());
        framed("picture", JSON.parse(reply.headers.get("X-Frame-Prediction") || "null"));
      }
    }
  } catch {
    // the daemon has gone, or the picture is none: the link says so
  } finally {
    frameBusy = false;
  }
}

function framed(kind, prediction) {
  at("no-frame").hidden = true;
  if (prediction) showPrediction(prediction);
  foretold = Boolean(prediction);
  at("frame").setAttribute("aria-label", `the latest ${kind}, ${frameId}`);
  showButtons();
}

// ---------------------------------------------------------------- the link to the daemon

function linked(tone, text) {
  at("link").dataset.tone = tone;
  say("link-text", text);
}

// A request that hangs, as after a change of networks, is given up.
const ask = (path, more = {}) => fetch(path, { ...more, signal: AbortSignal.timeout(GIVE_UP_MS) });

function arrived() {
  wait = 1000;
  if (live) return;
  live = true;
  at("gone").hidden = true;
  document.body.classList.remove("stale");
  linked("good", "live");
  askAccess();
}

function lost() {
  if (stream) stream.close();
  stream = null;
  live = false;
  document.body.classList.add("stale");
  linked("bad", "not connected");
  at("gone").hidden = false;
  say("gone", `The daemon does not answer. What you see is how it was; it is tried again in ${lasting(wait / 1000)}.`);
  showButtons();
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
  wait = Math.min(SLOWEST_MS, 2 * wait);
}

function listen() {
  if (stream || !window.EventSource || performance.now() < listenAt) return;
  polls = true; // until it has told something
  heard = performance.now();
  const mine = (stream = new EventSource("/events?status=1&latest=1"));
  mine.addEventListener("status", (message) => {
    polls = false;
    heard = performance.now();
    refused = ASK_MS;
    arrived();
    showStatus(JSON.parse(message.data));
  });
  mine.addEventListener("prediction", (message) => predicted(JSON.parse(message.data).facts));
  mine.onerror = () => {
    mine.close();
    if (stream !== mine) return;
    clearTimeout(timer);
    timer = setTimeout(poll, polls ? ASK_MS : 500);
    unheard();
  };
}

// A stream that never told anything, as where too many are open, is tried again more and more rarely.
function unheard() {
  stream.close();
  stream = null;
  if (polls) {
    listenAt = performance.now() + refused;
    refused = Math.min(REFUSED_MS, 2 * refused);
  }
  polls = true;
}

async function poll() {
  clearTimeout(timer);
  if (stream && performance.now() - heard > SILENT_MS) unheard();
  try {
    const reply = await fetch("/status.json", { signal: AbortSignal.timeout(5000) });
    if (!reply.ok) throw new Error(reply.status);
    showStatus(await reply.json());
    arrived();
    listen();
    frameSoon();
    timer = setTimeout(polls ? poll : watch, ASK_MS);
  } catch {
    lost();
  }
}

// While the stream tells, nothing is asked; where it falls silent, it is.
function watch() {
  clearTimeout(timer);
  if (polls || performance.now() - heard > SILENT_MS) poll();
  else timer = setTimeout(watch, ASK_MS);
}

// ---------------------------------------------------------------- changes

const headers = () => ({ "Content-Type": "application/json", ...(sessionStorage.getItem(KEY) ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {}) });

async function askAccess() {
  try {
    access = await (await ask("/access.json", { headers: headers() })).json();
  } catch {
    if (live) setTimeout(askAccess, ASK_MS);
    return;
  }
  showButtons();
}

function showButtons() {
  const may = access.allowed && live;
  let why = "";
  if (!live) why = "Nothing can be changed while the daemon does not answer.";
  else if (!access.writes) why = "Looking only: this daemon has no token, so nothing can be changed over HTTP. Use the command on the device, such as edgeadapt pause.";
  else if (!access.allowed) why = sessionStorage.getItem(KEY) ? "This is not the daemon's token." : "Looking only. To change something, type the token in the file that http.token_file names.";
  say("why-not", why);
  at("token-form").hidden = !(live && access.writes && !access.allowed);
  at("forget").hidden = !access.allowed;
  for (const button of document.querySelectorAll("[data-verb]")) button.disabled = !may;
  at("label").disabled = at("label-send").disabled = !(may && frameId !== undefined);
  for (const button of document.querySelectorAll("[data-verb], #label-send")) button.setAttribute("aria-disabled", busy); // and keeps the focus
  at("pause").dataset.verb = paused ? "resume" : "pause";
  say("pause", paused ? "Resume learning" : "Pause learning");
}

async function change(verb, params) {
  if (busy) return;
  busy = true;
  showButtons();
  at("done").dataset.tone = "plain";
  say("done", "…");
  try {
    const reply = await fetch(`/api/${verb}`, { method: "POST", headers: headers(), body: JSON.stringify(params), signal: AbortSignal.timeout(30000) });
    const told = await reply.json();
    at("done").dataset.tone = reply.ok ? "good" : "bad";
    say("done", reply.ok ? told.text : `${told.error.message}. ${told.error.hint}`);
    if (reply.status === 401) askAccess();
  } catch {
    at("done").dataset.tone = "bad";
    say("done", "The daemon did not answer; what came of it is not known.");
  }
  busy = false;
  showButtons();
}

for (const button of document.querySelectorAll("[data-verb]"))
  button.addEventListener("click", () => {
    if (busy) return;
    if (button.id === "rollback") at("sure").showModal();
    else change(button.dataset.verb, { reason: "from the page" });
  });

at("sure").addEventListener("close", () => {
  if (at("sure").returnValue === "yes") change("rollback", { reason: "from the page" });
  at("sure").returnValue = "";
});

at("label").addEventListener("focus", () => hold(true));
at("label").addEventListener("input", () => hold(true));
at("label").addEventListener("blur", () => { if (!at("label").value) hold(false); });
at("label").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  at("label").value = "";
  at("label").blur();
});

at("label-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy) return;
  const given = at("label").value.trim();
  await change("label", { frame: frameId, label: /^\d+$/.test(given) ? Number(given) : given });
  if (at("done").dataset.tone !== "good") return; // the name can be mended, of the same frame
  at("label").value = "";
  hold(false);
});

at("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  await askAccess();
  if (access.allowed) at("pause").focus();
});

at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  askAccess();
});

document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();

"use strict";
// Keeps the page as the daemon is: by server-sent events, and where those fail, by asking now and then, more and more rarely while nobody answers.

const at = (id) => document.getElementById(id);
const say = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };
const ASK_MS = 2000, SLOWEST_MS = 30000, SILENT_MS = 12000, FRAME_MS = 700, COMPARED_MS = 30000;
const KEY = "edgeadapt-token";

const shiftLine = new TimeLine(at("shift-line")), spreadLine = new TimeLine(at("spread-line"));
let stream = null, heard = 0, wait = 1000, timer = 0, polls = false;
let access = { writes: false, allowed: false }, busy = false, paused = false, live = false, uptime = -1;
let frameId, frameBusy = false, frameAt = -FRAME_MS, frameTimer = 0, signal = false, comparedAt = -COMPARED_MS - 1, names = "";

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
  say("state-last", guard && status.mode === "serving" ? [`for ${lasting(guard.since_s)}`, guard.last].filter(Boolean).join(" · ") : "");
  at("safe").hidden = status.mode !== "safe";
  say("safe-why", status.reason ? `Why: ${status.reason}` : "");
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
  say("latency-more", known(p95) ? `95 of 100 within ${number(p95)} ms, 99 within ${number(p99)}` : "");
  say("memory-now", bytes(memory.resident));
  say("memory-of", memory.budget ? `of ${bytes(memory.budget)} allowed` : "no budget set");
  say("heat", known(board.temperature_c) ? `${number(board.temperature_c)} °C` : "–");
  say("heat-more", board.throttled === null ? "" : board.throttled ? "slowed down by heat or power" : "runs at full speed");
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
    ["Agreement with the model as delivered", known(collapse.agreement) ? percent(collapse.agreement) : null],
    ["Variety kept, compared with it", known(collapse.kept) ? percent(collapse.kept) : null],
    ["Parameters moved by", known(collapse.moved) ? `${number(100 * collapse.moved, 1)} %` : null],
  ]);
}

function showMemory(memory) {
  const levels = ["", "Learning is paused, as memory is short.", "Caches were released, as memory is short.", "Memory is very short: predicting only."];
  const room = memory.budget && known(memory.resident) ? `${bytes(Math.max(0, memory.budget - memory.resident))} free of the budget of ${bytes(memory.budget)}` : "No budget is set";
  const why = memory.level ? ` ${levels[memory.level] || ""} ${memory.reason}` : "";
  say("memory-told", `${room}; at most ${bytes(memory.peak)} so far.${why}`);
  drawStack(at("stack"), at("legend"), memory);
}

function showSource({ source, queue, predictions }) {
  say("source", source.type === "none" ? "No source is configured." : `${source.type}: ${source.name}`);
  at("complaint").hidden = !source.complaint;
  say("complaint", source.complaint);
  const counts = Object.entries(source.counts).map(([kind, count]) => [kind, number(count)]);
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
    time.dateTime = new Date(1000 * event.time).toISOString();
    time.title = new Date(1000 * event.time).toLocaleString("en-GB");
    time.textContent = clock(event.time);
    text.textContent = event.text || event.kind;
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
  say("guess-head", facts.adapted === false ? "Prediction" : "Prediction, with adaptation");
  at("guess-bar").style.width = `${100 * (share || 0)}%`;
  showWithout(facts);
  frameSoon();
}

// Only some frames are also answered without adaptation: the latest of those is shown until there is another.
function showWithout({ without, ...facts }) {
  const now = performance.now();
  if (without) {
    const same = without.label === facts.label && !without.shares;
    at("without").dataset.same = same;
    say("without", same ? "Without adaptation: the same" : `Without adaptation: ${guessOf(without)[0]}, ${guessOf(without)[2]}; with it: ${guessOf(facts)[0]}`);
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

async function frameSoon() {
  const now = performance.now();
  clearTimeout(frameTimer);
  if (document.hidden) return;
  if (frameBusy || now - frameAt < FRAME_MS) {
    frameTimer = setTimeout(frameSoon, FRAME_MS);
    return;
  }
  frameBusy = true;
  frameAt = now;
  try {
    if (!signal) {
      const reply = await fetch("/frame.png");
      signal = reply.status === 409;
      if (reply.ok) {
        frameId = JSON.parse(reply.headers.get("X-Frame-Id"));
        await drawPicture(at("frame"), await reply.blob());
        framed("picture");
      }
    }
    if (signal) {
      const reply = await fetch("/frame.json");
      if (reply.ok) {
        const frame = await reply.json();
        frameId = frame.id;
        signal = Array.isArray(frame.values);
        if (signal) drawSignal(at("frame"), frame.values);
        framed("signal");
      }
    }
  } catch {
    // the daemon has gone, or the picture is none: the link says so
  } finally {
    frameBusy = false;
  }
}

function framed(kind) {
  at("no-frame").hidden = true;
  at("frame").setAttribute("aria-label", `the latest ${kind}, ${frameId}`);
  showButtons();
}

// ---------------------------------------------------------------- the link to the daemon

function linked(tone, text) {
  at("link").dataset.tone = tone;
  say("link-text", text);
}

function arrived() {
  heard = performance.now();
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
  if (stream || !window.EventSource) return;
  polls = true; // until the stream has told something
  const mine = (stream = new EventSource("/events?status=1&latest=1"));
  mine.addEventListener("status", (message) => {
    polls = false;
    arrived();
    showStatus(JSON.parse(message.data));
  });
  mine.addEventListener("prediction", (message) => showPrediction(JSON.parse(message.data).facts));
  mine.onerror = () => {
    mine.close();
    if (stream !== mine) return;
    stream = null;
    polls = true;
    clearTimeout(timer);
    timer = setTimeout(poll, 500);
  };
}

async function poll() {
  clearTimeout(timer);
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
    access = await (await fetch("/access.json", { headers: headers() })).json();
  } catch {
    return;
  }
  showButtons();
}

function showButtons() {
  const may = access.allowed && live && !busy;
  let why = "";
  if (!live) why = "Nothing can be changed while the daemon does not answer.";
  else if (!access.writes) why = "Looking only: this daemon has no token, so nothing can be changed over HTTP. Use the command on the device, such as edgeadapt pause.";
  else if (!access.allowed) why = sessionStorage.getItem(KEY) ? "This is not the daemon's token." : "Looking only. To change something, type the token in the file that http.token_file names.";
  say("why-not", why);
  at("token-form").hidden = !(live && access.writes && !access.allowed);
  at("forget").hidden = !access.allowed;
  for (const button of document.querySelectorAll("[data-verb]")) button.disabled = !may;
  at("label").disabled = at("label-send").disabled = !(may && frameId !== undefined);
  at("pause").dataset.verb = paused ? "resume" : "pause";
  say("pause", paused ? "Resume learning" : "Pause learning");
}

async function change(verb, params) {
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
    if (button.id === "rollback") at("sure").showModal();
    else change(button.dataset.verb, { reason: "from the page" });
  });

at("sure").addEventListener("close", () => {
  if (at("sure").returnValue === "yes") change("rollback", { reason: "from the page" });
  at("sure").returnValue = "";
});

at("label-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = at("label").value.trim();
  change("label", { frame: frameId, label: /^\d+$/.test(given) ? Number(given) : given });
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

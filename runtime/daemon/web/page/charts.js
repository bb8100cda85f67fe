"use strict";
// Drawings: lines of time, a bar of memory, and frames on a canvas.

const SVG = "http://www.w3.org/2000/svg";
const KEPT = 180, LEAST = 60;

// A line of the latest values, from 0 at the bottom to the least of `tops` that holds all; null is a gap. It is drawn closer as there are more of them.
class TimeLine {
  constructor(svg, tops, top, span) {
    this.tops = tops;
    this.top = top;
    this.span = span;
    this.values = [];
    this.times = [];
    this.under = svg.appendChild(document.createElementNS(SVG, "path"));
    this.under.setAttribute("class", "under");
    this.path = svg.appendChild(document.createElementNS(SVG, "path"));
  }

  add(value) {
    this.values.push(known(value) ? Math.max(0, value) : null);
    this.times.push(performance.now());
    if (this.values.length > KEPT) {
      this.values.shift();
      this.times.shift();
    }
    const most = Math.max(...this.values), top = this.tops.find((each) => most <= each) || this.tops[this.tops.length - 1];
    this.top.textContent = number(top, top % 1 ? 2 : 0);
    const seconds = Math.max(1, Math.round((performance.now() - this.times[0]) / 1000));
    this.span.textContent = `last ${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`}`;
    const span = Math.max(LEAST, this.values.length), step = 300 / (span - 1), begin = span - this.values.length;
    let line = "", area = "", open = false, last = 0;
    this.values.forEach((each, index) => {
      const x = ((begin + index) * step).toFixed(1);
      if (each === null) {
        if (open) area += `L${last} 56Z`;
        open = false;
        return;
      }
      const y = (54 - 50 * Math.min(1, each / top)).toFixed(1);
      line += `${open ? "L" : "M"}${x} ${y}`;
      area += open ? `L${x} ${y}` : `M${x} 56L${x} ${y}`;
      open = true;
      last = x;
    });
    if (open) area += `L${last} 56Z`;
    this.path.setAttribute("d", line);
    this.under.setAttribute("d", area);
  }
}

// What is in use, with a mark at the most that was; below it, bars side by side, one a line of the plan. The page's policy allows no style in markup, but this.
function drawStack(box, legend, memory) {
  const lines = Object.entries(memory.lines).filter(([, size]) => size > 0).sort((a, b) => b[1] - a[1]);
  const planned = lines.reduce((sum, [, size]) => sum + size, 0);
  const whole = memory.budget || Math.max(planned, memory.peak || 0, memory.resident || 0, 1), share = (size) => `${Math.min(100, (100 * size) / whole)}%`;
  box.replaceChildren();
  legend.replaceChildren();
  const shown = lines.length > 8 ? lines.slice(0, 7) : lines;
  if (lines.length > 8) shown.push(["all else", lines.slice(7).reduce((sum, [, size]) => sum + size, 0)]);
  shown.forEach(([name, size], index) => {
    const bar = box.appendChild(document.createElement("i")), told = lineOf(name);
    bar.className = `fill${index}`;
    bar.style.width = share(size);
    entry(legend, `fill${index}`, told, bytes(size));
  });
  at("used-bar").style.width = share(memory.resident || 0);
  at("used-peak").style.left = `calc(${share(memory.peak || 0)} - 2px)`;
  at("used").setAttribute("aria-label", `in use ${bytes(memory.resident)}, at most ${bytes(memory.peak)} so far, of ${memory.budget ? bytes(memory.budget) : "no budget"}`);
  box.hidden = legend.hidden = !lines.length;
  box.setAttribute("aria-label", `planned: ${shown.map(([name, size]) => `${lineOf(name)} ${bytes(size)}`).join(", ")}`);
  return planned;
}

function entry(legend, kind, name, size) {
  const item = legend.appendChild(document.createElement("li"));
  item.appendChild(document.createElement("i")).className = kind;
  item.appendChild(document.createElement("span")).textContent = name;
  item.appendChild(document.createElement("strong")).textContent = size;
}

async function drawPicture(canvas, blob) {
  const image = await createImageBitmap(blob);
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.classList.toggle("pixels", image.width < 200);
  canvas.getContext("2d").drawImage(image, 0, 0);
  image.close();
}

// Numbers [C][L] as lines, one a channel, each in its own range of the whole.
function drawSignal(canvas, values) {
  let channels = values;
  while (Array.isArray(channels[0]) && Array.isArray(channels[0][0])) channels = channels.flat();
  if (!Array.isArray(channels[0])) channels = [channels];
  const scale = Math.min(2, window.devicePixelRatio || 1), width = 640 * scale, height = 300 * scale;
  canvas.width = width;
  canvas.height = height;
  canvas.classList.remove("pixels");
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  channels.slice(0, 8).forEach((channel, index, all) => {
    const low = Math.min(...channel), span = Math.max(...channel) - low || 1, band = height / all.length;
    pen.strokeStyle = style.getPropertyValue(`--c${[1, 0, 2, 3, 5, 6, 7, 4][index]}`);
    pen.lineWidth = 1.5 * scale;
    pen.lineJoin = "round";
    pen.beginPath();
    channel.forEach((value, at) => {
      const x = (width * at) / Math.max(1, channel.length - 1), y = band * (index + 0.9 - (0.8 * (value - low)) / span);
      if (at) pen.lineTo(x, y);
      else pen.moveTo(x, y);
    });
    pen.stroke();
  });
}

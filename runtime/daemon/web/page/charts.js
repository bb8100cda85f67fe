"use strict";
// Drawings: lines of time, a bar of memory, and frames on a canvas.

const SVG = "http://www.w3.org/2000/svg";
const KEPT = 180, LEAST = 60;

// A line of the latest values, from 0 to 1 from bottom to top; null is a gap. It is drawn closer as there are more of them.
class TimeLine {
  constructor(svg) {
    this.svg = svg;
    this.values = [];
    this.under = svg.appendChild(document.createElementNS(SVG, "path"));
    this.under.setAttribute("class", "under");
    this.path = svg.appendChild(document.createElementNS(SVG, "path"));
  }

  add(value) {
    this.values.push(known(value) ? Math.min(1, Math.max(0, value)) : null);
    if (this.values.length > KEPT) this.values.shift();
    const span = Math.max(LEAST, this.values.length), step = 300 / (span - 1), begin = span - this.values.length;
    let line = "", area = "", open = false, last = 0;
    this.values.forEach((each, index) => {
      const x = ((begin + index) * step).toFixed(1);
      if (each === null) {
        if (open) area += `L${last} 56Z`;
        open = false;
        return;
      }
      const y = (52 - 48 * each).toFixed(1);
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

// Bars side by side, one a line of the plan, and a mark where memory is now. The page's policy allows no style in markup, but this.
function drawStack(box, legend, memory) {
  const lines = Object.entries(memory.lines).filter(([, size]) => size > 0).sort((a, b) => b[1] - a[1]);
  const planned = lines.reduce((sum, [, size]) => sum + size, 0);
  const whole = Math.max(memory.budget || 0, planned, memory.resident || 0, 1);
  box.replaceChildren();
  legend.replaceChildren();
  const shown = lines.slice(0, 7), rest = lines.slice(7).reduce((sum, [, size]) => sum + size, 0);
  if (rest) shown.push(["all else", rest]);
  shown.forEach(([name, size], index) => {
    const bar = box.appendChild(document.createElement("i"));
    bar.className = `fill${index}`;
    bar.style.width = `${(100 * size) / whole}%`;
    entry(legend, `fill${index}`, name, bytes(size));
  });
  if (known(memory.resident)) {
    const mark = box.appendChild(document.createElement("b"));
    mark.style.left = `calc(${(100 * memory.resident) / whole}% - 1px)`;
    entry(legend, "mark", "in use now", bytes(memory.resident));
  }
  const told = shown.map(([name, size]) => `${name} ${bytes(size)}`).join(", ");
  box.setAttribute("aria-label", `planned: ${told}; in use ${bytes(memory.resident)}; budget ${bytes(memory.budget)}`);
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

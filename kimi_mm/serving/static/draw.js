// What canvases show. Colours are those of the style sheet, so that both schemes hold.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (name) => [1, 3, 5].map((at) => parseInt(colour(name).slice(at, at + 2), 16));

/** Fits a canvas to its place in device pixels; returns its context in CSS pixels, with width and height. */
function fit(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height };
}

/** Bars of peaks; those before `share` (0 to 1) of the whole have been played. */
export function drawWave(canvas, samples, share) {
  const { context, width, height } = fit(canvas);
  const count = Math.max(1, Math.floor(width / 4));
  const peaks = Array.from({ length: count }, (_, i) => {
    let peak = 0;
    const end = Math.floor(((i + 1) * samples.length) / count);
    for (let at = Math.floor((i * samples.length) / count); at < end; at++) peak = Math.max(peak, Math.abs(samples[at]));
    return peak;
  });
  const most = Math.max(0.01, ...peaks);
  const [played, rest] = [colour("--accent"), colour("--idle")];
  peaks.forEach((peak, i) => {
    const tall = Math.max(2, (peak / most) * (height - 4));
    context.fillStyle = (i + 0.5) / count < share ? played : rest;
    context.beginPath();
    context.roundRect(i * (width / count) + 0.5, (height - tall) / 2, 2.5, tall, 1.25);
    context.fill();
  });
}

/** Energies [columns * bands] from the card's colour over the accent to the ink. */
export function drawMel(canvas, values, columns, bands) {
  const [low, middle, high] = [rgb("--paper"), rgb("--accent"), rgb("--ink")];
  const image = new ImageData(columns, bands);
  for (let column = 0; column < columns; column++)
    for (let band = 0; band < bands; band++) {
      const value = values[column * bands + band] ** 1.6;
      const [from, to, share] = value < 0.6 ? [low, middle, value / 0.6] : [middle, high, (value - 0.6) / 0.4];
      const at = 4 * ((bands - 1 - band) * columns + column);
      for (let c = 0; c < 3; c++) image.data[at + c] = from[c] + (to[c] - from[c]) * share;
      image.data[at + 3] = 255;
    }
  const small = new OffscreenCanvas(columns, bands);
  small.getContext("2d").putImageData(image, 0, 0);
  const { context, width, height } = fit(canvas);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
}

/** A cell for every audio code; equal codes have equal colours. `heard` is the answer of /v1/audio/codes. */
export function drawCodes(canvas, heard) {
  const { context, width, height } = fit(canvas);
  const scale = width / heard.duration;
  context.fillStyle = colour("--line");
  context.fillRect(0, 0, width, height);
  for (const { start, end, codes } of heard.pieces)
    codes.forEach((code, i) => {
      const from = start + i * heard.seconds_per_code;
      const to = Math.min(end, from + heard.seconds_per_code);
      // Turning by the golden ratio keeps neighbouring numbers far apart.
      context.fillStyle = `oklch(${0.62 + (code % 5) * 0.05} 0.11 ${(code * 222.492) % 360})`;
      context.fillRect(from * scale, 0, Math.max(1, (to - from) * scale - 0.5), height);
    });
}

/** Levels (0 to 1, newest last) as rays around the record button. */
export function drawRing(canvas, levels) {
  const { context, width, height } = fit(canvas);
  const inner = width * 0.335;
  context.translate(width / 2, height / 2);
  context.lineCap = "round";
  context.lineWidth = 2.5;
  const [loud, rest] = [colour("--accent"), colour("--idle")];
  levels.forEach((level, i) => {
    const angle = (2 * Math.PI * i) / levels.length - Math.PI / 2;
    const outer = inner + 3 + Math.sqrt(level) * (width / 2 - inner - 6);
    context.strokeStyle = level > 0.02 ? loud : rest;
    context.beginPath();
    context.moveTo(inner * Math.cos(angle), inner * Math.sin(angle));
    context.lineTo(outer * Math.cos(angle), outer * Math.sin(angle));
    context.stroke();
  });
}

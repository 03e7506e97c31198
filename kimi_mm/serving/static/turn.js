// One recording and what was heard in it: its text as it comes, pictures, playback, files to save.

import { drawCodes, drawMel, drawWave } from "./draw.js";
import { codes, transcribe } from "./server.js";
import { RATE, mel, wav } from "./sound.js";

const BANDS = 64;
const seconds = (value, digits = 1) => `${value.toFixed(digits)} s`;

/** Seconds as m:ss.t. */
function clock(value) {
  const tenths = Math.round(value * 10);
  return `${Math.floor(tenths / 600)}:${((tenths % 600) / 10).toFixed(1).padStart(4, "0")}`;
}

function srtTime(value) {
  const ms = Math.round(value * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const whole = Math.floor(ms / 1000);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60].map(two);
  return `${parts.join(":")},${String(ms % 1000).padStart(3, "0")}`;
}

export class Turn {
  /**
   * @param name what the recording is called
   * @param samples Float32Array at 16 kHz, or null when this browser cannot decode the file
   * @param file the Blob to send
   * @param began when its sound had ended, on the clock of performance.now()
   * @param say tells screen readers a sentence
   * @param left is called when the turn has been removed
   */
  constructor({ name, samples, file, began, say, left }) {
    Object.assign(this, { name, samples, file, began, say, left });
    this.segments = [];
    this.coming = null;
    this.share = 0;
    this.stopping = new AbortController();
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    this.at = (selector) => this.element.querySelector(selector);
    this.at(".name").textContent = name;
    this.about("waiting");
    this.at(".stop").onclick = () => this.stop();
    this.at(".copy").onclick = () => this.copy();
    this.at(".txt").onclick = () => this.save("txt", `${this.text}\n`);
    this.at(".srt").onclick = () => this.save("srt", this.srt);
    this.at(".remove").onclick = () => this.remove();
  }

  get text() {
    return this.segments.map((segment) => segment.text).join(" ");
  }

  get srt() {
    return this.segments
      .map(({ start, end, text }, i) => `${i + 1}\n${srtTime(start)} --> ${srtTime(end)}\n${text}\n`)
      .join("\n");
  }

  about(state) {
    const length = this.samples ? `${seconds(this.samples.length / RATE)} · ` : "";
    this.at(".about").textContent = length + state;
  }

  /** Called once the element is in the page: canvases have a size from then on. */
  show() {
    if (!this.samples?.length) return;
    this.at(".tracks").hidden = false;
    this.at(".end").textContent = clock(this.samples.length / RATE);
    this.columns = Math.min(1200, Math.max(200, Math.ceil(this.samples.length / 160)));
    this.mel = mel(this.samples, this.columns, BANDS);
    this.url = URL.createObjectURL(wav(this.samples));
    this.audio = new Audio(this.url);
    this.audio.onplay = this.audio.onpause = this.audio.onended = () => this.played();
    this.audio.onseeked = () => this.position();
    this.at(".play").onclick = () => (this.audio.paused ? this.audio.play() : this.audio.pause());
    const lanes = this.at(".lanes");
    lanes.setAttribute("aria-valuemax", (this.samples.length / RATE).toFixed(1));
    lanes.onclick = (event) => {
      const { left, width } = lanes.getBoundingClientRect();
      this.play(((event.clientX - left) / width) * (this.samples.length / RATE));
    };
    lanes.onkeydown = (event) => this.key(event);
    this.position();
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(lanes);
  }

  draw() {
    if (!this.samples?.length) return;
    drawWave(this.at(".wave"), this.samples, this.share);
    drawMel(this.at(".mel"), this.mel, this.columns, BANDS);
    if (this.heard) drawCodes(this.at(".codes"), this.heard);
  }

  /** Sends the recording and shows what comes. Never throws: what goes wrong is shown in the turn. */
  async run(modelName) {
    if (this.stopping.signal.aborted) return;
    this.about("listening");
    this.caret();
    try {
      let first = null;
      for await (const event of transcribe(this.file, this.name, modelName, this.stopping.signal)) {
        if (event.type === "transcript.text.delta") {
          first ??= performance.now() - this.began;
          this.coming.lastChild.append(event.delta);
        } else if (event.type === "transcript.text.segment") this.segment(event);
        else if (event.type === "transcript.text.done") this.done(event, first);
      }
    } catch (error) {
      this.coming.classList.remove("coming"); // what was heard until then stays
      if (!this.coming.textContent) this.coming.remove();
      this.about(error.name === "AbortError" ? "stopped" : "not heard");
      if (error.name !== "AbortError") this.fault(error.message);
    }
    this.settle();
  }

  /** Shows the audio codes, when the recording is shown. */
  async color() {
    if (!this.samples?.length || !this.segments.length || this.stopping.signal.aborted) return;
    try {
      this.heard = await codes(this.file, this.name, this.stopping.signal);
    } catch {
      return; // a picture that is missing is no reason to disturb
    }
    const count = this.heard.pieces.reduce((sum, piece) => sum + piece.codes.length, 0);
    this.at(".codes").hidden = false;
    this.at(".axis span").textContent = `waveform, mel, ${count} codes`;
    this.draw();
  }

  stop() {
    this.stopping.abort();
    this.about("stopped");
    this.settle();
  }

  caret() {
    this.coming = this.line("", "");
    this.coming.classList.add("coming");
  }

  line(time, text) {
    const line = document.createElement("p");
    line.className = "segment";
    const button = Object.assign(document.createElement("button"), { type: "button", className: "time" });
    button.textContent = time;
    button.disabled = true;
    const words = document.createElement("span");
    words.textContent = text;
    line.append(button, words);
    this.at(".text").append(line);
    return line;
  }

  segment({ start, end, text }) {
    this.segments.push({ start, end, text });
    const [button, words] = this.coming.children;
    this.coming.classList.remove("coming");
    words.textContent = text;
    button.textContent = clock(start);
    button.title = `${clock(start)} to ${clock(end)}`;
    if (this.audio) {
      button.disabled = false;
      button.setAttribute("aria-label", `Play from ${clock(start)}`);
      button.onclick = () => this.play(start);
    }
    this.say(text);
    this.caret();
  }

  done({ usage }, first) {
    const total = performance.now() - this.began;
    this.coming.remove();
    this.at(".about").textContent = seconds(usage.seconds);
    if (!this.segments.length) {
      const none = Object.assign(document.createElement("p"), { className: "silent" });
      none.textContent = "No words were heard.";
      this.at(".text").append(none);
      this.say(none.textContent);
    }
    this.at(".first").textContent = first === null ? "none" : seconds(first / 1000, 2);
    this.at(".total").textContent = seconds(total / 1000, 2);
    this.at(".factor").textContent = usage.seconds ? (total / 1000 / usage.seconds).toFixed(2) : "none";
    this.at(".times").hidden = false;
  }

  fault(message) {
    const place = this.at("article > .fault");
    place.textContent = message;
    place.hidden = false;
    this.say(message);
  }

  settle() {
    const atStop = document.activeElement === this.at(".stop");
    this.at(".stop").hidden = true;
    this.at(".remove").hidden = false;
    for (const act of ["copy", "txt", "srt"]) this.at(`.${act}`).hidden = !this.segments.length;
    if (atStop) this.at(".remove").focus();
  }

  play(from) {
    this.audio.currentTime = Math.max(0, Math.min(from, this.audio.duration || Infinity));
    this.audio.play();
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5 };
    if (event.key in steps) this.seek(this.audio.currentTime + steps[event.key]);
    else if (event.key === "Home") this.seek(0);
    else if (event.key === "End") this.seek(this.audio.duration);
    else if (event.key === " " || event.key === "Enter") this.at(".play").click();
    else return;
    event.preventDefault();
  }

  seek(to) {
    this.audio.currentTime = Math.max(0, Math.min(to, this.audio.duration));
  }

  played() {
    const playing = !this.audio.paused && !this.audio.ended;
    this.element.classList.toggle("playing", playing);
    this.at(".play").setAttribute("aria-label", playing ? "Pause" : "Play");
    this.position();
    if (playing) requestAnimationFrame(() => this.played());
  }

  position() {
    const now = this.audio.currentTime;
    this.share = now / (this.samples.length / RATE);
    this.element.classList.toggle("started", now > 0);
    this.at(".playhead").style.left = `${Math.min(100, 100 * this.share)}%`;
    this.at(".lanes").setAttribute("aria-valuenow", now.toFixed(1));
    this.at(".lanes").setAttribute("aria-valuetext", `${seconds(now)} of ${seconds(this.samples.length / RATE)}`);
    drawWave(this.at(".wave"), this.samples, this.share);
  }

  async copy() {
    const button = this.at(".copy");
    try {
      await navigator.clipboard.writeText(this.text);
      button.textContent = "Copied";
      this.say("Copied");
    } catch {
      button.textContent = "Not allowed";
      this.say("The browser does not let this page copy.");
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  save(ending, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
    const link = Object.assign(document.createElement("a"), { href: url });
    link.download = `${this.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "-")}.${ending}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  remove() {
    this.stopping.abort();
    this.watch?.disconnect();
    this.audio?.pause();
    if (this.url) URL.revokeObjectURL(this.url);
    this.element.remove();
    this.left(this);
  }
}

// The page: what the buttons do, and turns one after the other.
//
// microphone, chosen or dropped files, the sample ─► Turn ─► queue ─► transcript ─► codes

import { drawRing } from "./draw.js";
import { at, connect, fault } from "./entry.js";
import { ServerError } from "./server.js";
import { LONGEST, decode, record, wav } from "./sound.js";
import { Turn } from "./turn.js";

// What the server's decoder reads; other files are sent as the WAV that this browser makes of them.
const READABLE = /\.(wav|flac|ogg|oga|opus|mp3|aiff?|au|caf|w64)$/i;
const MOUSE = matchMedia("(hover: hover)").matches;
const REST = MOUSE ? "Press to record; drop sound files anywhere." : "Press to record, or choose sound files.";
const CALM = matchMedia("(prefers-reduced-motion: reduce)");

const turns = [];
let modelName = null;
let queue = Promise.resolve();
let working = 0;
let recorder = null;
let opening = false;
let recordings = 0;
let levels = new Array(72).fill(0);

function say(sentence) {
  at("status").textContent = sentence;
}

function tidy() {
  at("nothing").hidden = turns.length > 0;
  at("clear").hidden = turns.length < 2;
}

/** Puts a turn on top of the list and into the queue. */
function add(name, samples, file, began = performance.now()) {
  fault("");
  const left = (turn) => {
    turns.splice(turns.indexOf(turn), 1);
    tidy();
    at("turns").focus();
  };
  const turn = new Turn({ name, samples, file, began, say, left });
  turns.push(turn);
  at("turns").prepend(turn.element);
  tidy();
  turn.show();
  turn.element.scrollIntoView({ block: "nearest", behavior: CALM.matches ? "auto" : "smooth" });
  const waits = working > 0;
  working += 1;
  queue = queue.then(async () => {
    if (waits) turn.began = performance.now(); // the wait for earlier recordings is not the model's
    await turn.run(modelName);
    await turn.color();
    working -= 1;
  });
}

async function addFile(file) {
  const samples = await decode(await file.arrayBuffer());
  const asIs = READABLE.test(file.name) || !samples;
  add(file.name, samples, asIs ? file : wav(samples));
}

async function addFiles(files) {
  for (const file of files) await addFile(file);
}

function level(peak) {
  levels = [...levels.slice(1), peak];
  drawRing(at("ring"), levels);
  at("level").firstElementChild.style.transform = `scaleX(${Math.sqrt(peak)})`;
  at("level").setAttribute("aria-valuenow", String(Math.round(100 * peak)));
  const lasted = (performance.now() - recorder.began) / 1000;
  at("clock").textContent = `${Math.floor(lasted / 60)}:${String(Math.floor(lasted % 60)).padStart(2, "0")}`;
  if (lasted > LONGEST) finish();
}

function rest() {
  recorder = null;
  levels.fill(0);
  drawRing(at("ring"), levels);
  document.body.classList.remove("recording");
  at("record-name").textContent = "Record";
  at("hint").textContent = REST;
  at("clock").textContent = "0:00";
  at("level").firstElementChild.style.transform = "scaleX(0)";
  at("level").setAttribute("aria-valuenow", "0");
}

async function begin() {
  if (opening) return;
  opening = true;
  fault("");
  try {
    const opened = await record((peak) => recorder && level(peak));
    recorder = { ...opened, began: performance.now() };
    document.body.classList.add("recording");
    at("record-name").textContent = "Stop";
    at("hint").textContent = MOUSE ? "Press again to stop; Escape discards." : "Press again to stop.";
    say("Recording");
  } catch (error) {
    fault(error.message);
  } finally {
    opening = false;
  }
}

async function finish() {
  const stopped = recorder;
  const pressed = performance.now();
  rest();
  const samples = await stopped.stop();
  if (!samples.length) return fault("The microphone gave no sound.");
  recordings += 1;
  say("Transcribing");
  add(`Recording ${recordings}`, samples, wav(samples), pressed);
}

at("record").onclick = () => (recorder ? finish() : begin());
at("choose").onclick = () => at("files").click();
at("files").onchange = ({ target }) => {
  addFiles([...target.files]);
  target.value = "";
};
at("sample").onclick = async () => {
  try {
    const answer = await fetch("/static/sample.flac");
    if (!answer.ok) throw new ServerError(`The sample cannot be loaded (${answer.status}).`, answer.status);
    await addFile(new File([await answer.blob()], "sample.flac"));
  } catch (error) {
    fault(error instanceof ServerError ? error.message : "The server does not answer; is it still running?");
  }
};
at("clear").onclick = () => [...turns].forEach((turn) => turn.remove());

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !recorder) return;
  recorder.cancel();
  rest();
  say("Discarded");
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  if (modelName && event.dataTransfer.types.includes("Files")) document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (modelName) addFiles([...event.dataTransfer.files]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawRing(at("ring"), levels);
  turns.forEach((turn) => turn.draw());
});
new ResizeObserver(() => drawRing(at("ring"), levels)).observe(at("ring"));

at("hint").textContent = REST;
connect((entry) => {
  modelName = entry.id;
  for (const id of ["record", "choose", "sample"]) at(id).disabled = !entry.hears;
});

// The page of conversations by voice.
//
// microphone ─► 24 kHz ─► input_audio_buffer.append ─► /v1/realtime ─► what you said, word by word
//                                                          └─► the answer: words, and sound that can be interrupted

import { drawRing } from "./draw.js";
import { at, connect, fault } from "./entry.js";
import { conversation } from "./server.js";
import { microphone, peakOf } from "./sound.js";
import { Downsampler, Player, decode, encode } from "./voice.js";

const MOUSE = matchMedia("(hover: hover)").matches;
const REST = at("hint").textContent;
let entry = null; // the model's
let talk = null; // the one that goes on
let opening = false;
let levels = new Array(72).fill(0);

function state(sentence) {
  if (at("state").textContent !== sentence) at("state").textContent = sentence;
}

function level(peak) {
  levels = [...levels.slice(1), peak];
  drawRing(at("ring"), levels);
  at("level").firstElementChild.style.transform = `scaleX(${Math.sqrt(peak)})`;
  at("level").setAttribute("aria-valuenow", String(Math.round(100 * peak)));
}

/** One line of the talk: who said it, the words as they come, and what there is to know about it. */
class Line {
  constructor(who) {
    this.element = at("line").content.firstElementChild.cloneNode(true);
    this.element.classList.add(who);
    this.part = (name) => this.element.querySelector(`.${name}`);
    this.part("who").textContent = who === "you" ? "You" : entry.id;
    this.part("words").classList.add("waiting");
    at("said").append(this.element);
    at("nothing").hidden = true;
    at("clear").hidden = false;
    this.element.scrollIntoView({ block: "nearest" });
  }

  add(words) {
    this.part("words").append(words);
  }

  set(words) {
    this.part("words").textContent = words;
  }

  about(sentence) {
    this.part("about").textContent = sentence;
  }

  /** Nothing more comes. */
  end(none) {
    this.part("words").classList.remove("waiting");
    if (this.part("words").textContent) return;
    this.part("words").classList.add("silent");
    this.set(none);
  }
}

class Talk {
  constructor(socket) {
    this.socket = socket;
    this.lines = new Map(); // of what the user said, by item
    this.answer = null; // { id, item, line, done } of the answer that is made or heard
    this.player = entry.speaks ? new Player(() => this.settle()) : null;
    this.stopped = 0; // when the user fell silent
    this.first = null; // seconds from there to the first of the answer
    socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    socket.onclose = ({ code, reason }) => this.close(code === 1000 ? reason : reason || `The talk broke off (${code}).`);
  }

  send(type, values = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...values }));
  }

  async listen() {
    let down = null;
    this.mic = await microphone(
      (piece) => {
        if (talk !== this) return;
        this.send("input_audio_buffer.append", { audio: encode(down.push(piece)) });
        level(this.player?.playing ? this.player.peak : peakOf(piece));
      },
      { echoCancellation: true, noiseSuppression: true },
    );
    down = new Downsampler(this.mic.rate);
  }

  take(event) {
    const deltas = ["response.output_text.delta", "response.output_audio_transcript.delta"];
    const heard = "conversation.item.input_audio_transcription";
    if (event.type === "session.created")
      this.send("session.update", { session: { audio: { input: { transcription: { model: entry.id } } } } });
    else if (event.type === "input_audio_buffer.speech_started") {
      this.interrupt(false);
      this.lines.set(event.item_id, new Line("you"));
      state("Listening to you");
    } else if (event.type === "input_audio_buffer.speech_stopped") {
      this.stopped = performance.now();
      state("Thinking");
    } else if (event.type === `${heard}.delta`) this.lines.get(event.item_id)?.add(event.delta);
    else if (event.type === `${heard}.completed`) {
      this.lines.get(event.item_id)?.set(event.transcript);
      this.lines.get(event.item_id)?.end("No words were heard.");
    } else if (event.type === `${heard}.failed`) {
      this.lines.get(event.item_id)?.end("Not written down.");
      this.lines.get(event.item_id)?.about(event.error.message);
    } else if (event.type === "response.created") {
      this.player?.reset();
      this.first = null;
      this.answer = { id: event.response.id, item: null, line: new Line("model"), done: false, cut: false };
      at("interrupt").disabled = false;
    } else if (event.response_id && event.response_id !== this.answer?.id) return;
    else if (event.type === "response.output_item.added") this.answer.item = event.item.id;
    else if (deltas.includes(event.type)) {
      this.answer.line.add(event.delta);
      if (!this.player) this.begun();
    } else if (event.type === "response.output_audio.delta" && !this.answer.cut) {
      this.begun();
      this.player.push(decode(event.delta));
      document.body.classList.add("speaking");
      state("Speaking");
    } else if (event.type === "response.done" && event.response.id === this.answer?.id) this.done(event.response);
    else if (event.type === "error") fault(event.error.message);
  }

  begun() {
    this.first ??= this.stopped ? (performance.now() - this.stopped) / 1000 : 0;
  }

  done({ status, status_details: details }) {
    this.answer.done = true;
    this.answer.line.end(status === "completed" ? "No words." : "Interrupted before the first word.");
    if (status === "failed") this.answer.line.about(details.error.message);
    else this.tell(status === "cancelled" || this.answer.cut ? "interrupted" : "");
    if (!this.player?.playing) this.settle();
  }

  /** Says below the answer how soon it came and how it ended. */
  tell(end) {
    const facts = [];
    if (this.first !== null) facts.push(`first ${this.player ? "sound" : "word"} after ${this.first.toFixed(2)} s`);
    if (this.player) facts.push(`${this.player.given.toFixed(1)} s of speech`);
    if (end) facts.push(end);
    this.answer.line.about(facts.join(" · "));
  }

  /** Ends an answer: what is made of it stops, what is heard of it falls silent, and the server learns how much was. */
  interrupt(asked) {
    if (!this.answer) return;
    const { item, done } = this.answer;
    const playing = this.player?.playing;
    if (done && !playing) return;
    this.answer.cut = true;
    if (!done && asked) this.send("response.cancel", { response_id: this.answer.id });
    if (playing) {
      const milliseconds = Math.floor(1000 * Math.min(this.player.heard, this.player.given));
      this.player.stop();
      if (item) this.send("conversation.item.truncate", { item_id: item, content_index: 0, audio_end_ms: milliseconds });
    }
    this.tell("interrupted");
    this.settle();
  }

  settle() {
    document.body.classList.remove("speaking");
    at("interrupt").disabled = !this.answer || (this.answer.done && !this.player?.playing);
    if (talk === this) state("Your turn");
  }

  close(reason) {
    if (this.over) return;
    this.over = true;
    this.socket.close();
    this.mic?.release();
    this.player?.close();
    for (const line of this.lines.values()) line.end("Not written down.");
    if (this.answer && !this.answer.done) this.answer.line.end("Interrupted.");
    if (talk === this) {
      talk = null;
      rest();
      if (reason) fault(`${reason[0].toUpperCase()}${reason.slice(1)}`);
    }
  }
}

function rest() {
  levels.fill(0);
  level(0);
  document.body.classList.remove("recording", "speaking");
  at("record-name").textContent = "Start talking";
  at("hint").textContent = REST;
  at("interrupt").disabled = true;
  state("Not started");
}

async function begin() {
  if (opening) return;
  opening = true;
  fault("");
  state("Opening");
  const begun = new Talk(conversation(entry.id));
  talk = begun;
  try {
    await begun.listen();
    document.body.classList.add("recording");
    at("record-name").textContent = "End the talk";
    at("hint").textContent = `Speak over the answer${MOUSE ? ", or press Escape," : ""} to interrupt it.`;
    state("Your turn");
  } catch (error) {
    begun.close(error.message);
  } finally {
    opening = false;
  }
}

at("record").onclick = () => (talk ? talk.close("") : begin());
at("interrupt").onclick = () => talk?.interrupt(true);
at("clear").onclick = () => {
  at("said").replaceChildren();
  at("nothing").hidden = false;
  at("clear").hidden = true;
  at("said").focus();
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape") talk?.interrupt(true);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawRing(at("ring"), levels));
new ResizeObserver(() => drawRing(at("ring"), levels)).observe(at("ring"));

connect((found) => {
  entry = found;
  at("lead").textContent = `Speak; when you pause, it ${entry.speaks ? "answers aloud" : "answers in writing"}.`;
  at("record").disabled = !entry.hears;
});

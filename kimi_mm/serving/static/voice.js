// Sound of a conversation: microphone samples to PCM16 at 24 kHz in base64, and the same back to the loudspeaker.

export const RATE = 24000;

/** Makes 24 kHz of samples that come in pieces at another rate: the mean of what lies under each new sample. */
export class Downsampler {
  constructor(rate) {
    this.step = rate / RATE;
    this.sum = 0;
    this.weight = 0;
  }

  push(samples) {
    if (this.step === 1) return samples;
    const out = [];
    for (const value of samples) {
      let left = 1;
      while (this.weight + left >= this.step) {
        const share = this.step - this.weight;
        out.push((this.sum + share * value) / this.step);
        left -= share;
        this.sum = this.weight = 0;
      }
      this.sum += left * value;
      this.weight += left;
    }
    return Float32Array.from(out);
  }
}

/** Samples to little-endian PCM16 in base64. */
export function encode(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((value, i) => view.setInt16(2 * i, Math.max(-1, Math.min(1, value)) * 32767, true));
  let letters = "";
  for (const byte of new Uint8Array(view.buffer)) letters += String.fromCharCode(byte);
  return btoa(letters);
}

/** The way back. */
export function decode(data) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

/** Plays pieces one after the other, as soon as they come. */
export class Player {
  /** @param onEnd is called when all that was given has been heard */
  constructor(onEnd) {
    this.context = new AudioContext({ sampleRate: RATE });
    this.analyser = new AnalyserNode(this.context, { fftSize: 1024 });
    this.analyser.connect(this.context.destination);
    this.onEnd = onEnd;
    this.sources = new Set();
    this.reset();
  }

  reset() {
    this.next = 0;
    this.given = 0; // seconds
  }

  push(samples) {
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: RATE });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.analyser);
    this.next = Math.max(this.next, this.context.currentTime + 0.04);
    source.start(this.next);
    this.next += buffer.duration;
    this.given += buffer.duration;
    this.sources.add(source);
    source.onended = () => {
      this.sources.delete(source);
      if (!this.sources.size) this.onEnd();
    };
  }

  /** Seconds of what was given that have been heard. */
  get heard() {
    return Math.max(0, this.given - Math.max(0, this.next - this.context.currentTime));
  }

  get playing() {
    return this.sources.size > 0;
  }

  /** The loudest that is heard now, 0 to 1. */
  get peak() {
    const samples = new Float32Array(this.analyser.fftSize);
    this.analyser.getFloatTimeDomainData(samples);
    return Math.min(1, samples.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
  }

  /** Falls silent at once. */
  stop() {
    for (const source of this.sources) {
      source.onended = null;
      source.stop();
    }
    this.sources.clear();
  }

  close() {
    this.stop();
    return this.context.close();
  }
}

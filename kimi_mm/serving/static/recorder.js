// Runs on the audio thread: sends on what the microphone gives, in pieces of about 40 ms.

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(2048);
    this.filled = 0;
    this.port.onmessage = () => {
      this.flush();
      this.port.postMessage(null);
    };
  }

  flush() {
    if (this.filled) this.port.postMessage(this.piece.slice(0, this.filled));
    this.filled = 0;
  }

  process([channels]) {
    const count = channels.length && channels[0].length;
    if (!count) return true;
    if (this.filled + count > this.piece.length) this.flush();
    for (let i = 0; i < count; i++) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.piece[this.filled++] = sum / channels.length;
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);

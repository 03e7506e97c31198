// Sound in the browser: microphone or file to mono 16 kHz samples, WAV, and log-mel columns.
//
// microphone ─► worklet ─► samples at the device's rate ─┐ resample
// file ─► decode ────────────────────────────────────────┴─► Float32Array at 16 kHz ─► WAV, mel

export const RATE = 16000;
export const LONGEST = 600; // seconds that a recording may last

/** Resamples mono samples to 16 kHz by the browser's own resampler. */
async function resample(samples, rate) {
  if (rate === RATE || !samples.length) return samples;
  const offline = new OfflineAudioContext(1, Math.max(1, Math.round((samples.length * RATE) / rate)), RATE);
  const buffer = new AudioBuffer({ length: samples.length, sampleRate: rate });
  buffer.copyToChannel(samples, 0);
  const source = new AudioBufferSourceNode(offline, { buffer });
  source.connect(offline.destination);
  source.start();
  return (await offline.startRendering()).getChannelData(0);
}

/** Decodes a sound file to mono 16 kHz; null when this browser cannot. */
export async function decode(bytes) {
  try {
    const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);
    const mixed = new Float32Array(sound.length);
    for (let c = 0; c < sound.numberOfChannels; c++) {
      const channel = sound.getChannelData(c);
      for (let i = 0; i < mixed.length; i++) mixed[i] += channel[i] / sound.numberOfChannels;
    }
    return mixed;
  } catch {
    return null;
  }
}

/**
 * Opens the microphone.
 * @param onPiece gets Float32Array after Float32Array, at `rate`
 * @param audio constraints beyond one channel
 * @returns `rate`, `end()` after whose promise no piece comes, and `release()`, which drops what was not given yet
 */
export async function microphone(onPiece, audio = {}) {
  if (!navigator.mediaDevices?.getUserMedia)
    throw new Error("Browsers give a microphone only to pages of this machine or over https; open the page that way.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, autoGainControl: true, ...audio } });
  } catch (error) {
    const reasons = {
      NotAllowedError: "The microphone was not allowed; allow it beside the page's address.",
      NotFoundError: "There is no microphone; plug one in, or choose a file.",
      NotReadableError: "The microphone is in use by another program.",
    };
    throw new Error(reasons[error.name] ?? `The microphone cannot be opened: ${error.message}`);
  }
  const context = new AudioContext();
  let node;
  const release = () => {
    stream.getTracks().forEach((track) => track.stop());
    return context.close();
  };
  try {
    await context.audioWorklet.addModule("/static/recorder.js");
    await context.resume();
    node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  } catch (error) {
    await release();
    throw new Error(`The recorder cannot be started: ${error.message}`);
  }
  const flushed = new Promise((resolve) => {
    node.port.onmessage = ({ data }) => (data === null ? resolve() : onPiece(data));
  });
  context.createMediaStreamSource(stream).connect(node);
  return {
    rate: context.sampleRate,
    async end() {
      node.port.postMessage(null);
      await flushed;
      await release();
    },
    release,
  };
}

/** Returns the largest of the samples, 0 to 1. */
export function peakOf(samples) {
  let peak = 0;
  for (const value of samples) peak = Math.max(peak, Math.abs(value));
  return Math.min(1, peak);
}

/** Records until `stop()`, which gives samples at 16 kHz. `onLevel` gets the peak, 0 to 1, of every piece. */
export async function record(onLevel) {
  const pieces = [];
  const opened = await microphone(
    (piece) => {
      pieces.push(piece);
      onLevel(peakOf(piece));
    },
    { echoCancellation: false, noiseSuppression: false },
  );
  return {
    async stop() {
      await opened.end();
      const samples = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
      let at = 0;
      for (const piece of pieces) {
        samples.set(piece, at);
        at += piece.length;
      }
      return resample(samples, opened.rate);
    },
    cancel: opened.release,
  };
}

/** Returns 16 kHz samples as a 16-bit WAV file. */
export function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, value)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

const N_FFT = 512;
const WINDOW = Float32Array.from({ length: 400 }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / 400));

/** Returns log-mel energies, 0 to 1 over the top 70 dB, as [columns * bands], columns spread over the recording. */
export function mel(samples, columns, bands = 64) {
  const filters = melFilters(bands);
  const values = new Float32Array(columns * bands);
  const re = new Float32Array(N_FFT);
  const im = new Float32Array(N_FFT);
  let most = -Infinity;
  for (let column = 0; column < columns; column++) {
    const start = Math.round(((column + 0.5) / columns) * samples.length) - 200;
    re.fill(0);
    im.fill(0);
    for (let i = 0; i < 400; i++) re[i] = (samples[start + i] ?? 0) * WINDOW[i];
    fft(re, im);
    filters.forEach(({ first, weights }, band) => {
      let sum = 1e-10;
      weights.forEach((weight, i) => (sum += weight * (re[first + i] ** 2 + im[first + i] ** 2)));
      const level = 10 * Math.log10(sum);
      most = Math.max(most, level);
      values[column * bands + band] = level;
    });
  }
  return values.map((level) => Math.max(0, 1 + (level - most) / 70));
}

function melFilters(bands) {
  const hz = (mels) => 700 * (10 ** (mels / 2595) - 1);
  const top = 2595 * Math.log10(1 + RATE / 2 / 700);
  const edge = (i) => (hz((top * i) / (bands + 1)) * N_FFT) / RATE;
  return Array.from({ length: bands }, (_, band) => {
    const [low, middle, high] = [edge(band), edge(band + 1), edge(band + 2)];
    const first = Math.floor(low);
    const weights = [];
    for (let bin = first; bin <= Math.ceil(high); bin++)
      weights.push(Math.max(0, 1 - Math.abs(bin - middle) / Math.max(1, bin < middle ? middle - low : high - middle)));
    return { first, weights };
  });
}

/** In place, radix 2. */
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let size = 2; size <= n; size <<= 1) {
    const half = size >> 1;
    for (let k = 0; k < half; k++) {
      const cos = Math.cos((-2 * Math.PI * k) / size);
      const sin = Math.sin((-2 * Math.PI * k) / size);
      for (let a = k; a < n; a += size) {
        const b = a + half;
        const x = re[b] * cos - im[b] * sin;
        const y = re[b] * sin + im[b] * cos;
        [re[b], im[b]] = [re[a] - x, im[a] - y];
        re[a] += x;
        im[a] += y;
      }
    }
  }
}

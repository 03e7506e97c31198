// The server's API as this page uses it. Errors carry the server's own sentence.

const KEY = "kimi_mm.key";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer; is it still running?", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const sentence = told?.error?.message ?? `The server answered ${answer.status} ${answer.statusText}.`;
  throw new ServerError(sentence[0].toUpperCase() + sentence.slice(1), answer.status);
}

/** Opens a conversation by voice. Browsers cannot set headers of a WebSocket: the key is offered as a subprotocol. */
export function conversation(modelName) {
  const key = sessionStorage.getItem(KEY);
  const address = new URL(`/v1/realtime?model=${encodeURIComponent(modelName)}`, location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  return new WebSocket(address, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
}

/** Returns the loaded model's entry of /v1/models. */
export async function model() {
  return (await (await ask("/v1/models")).json()).data[0];
}

/** Returns the audio codes of a recording. */
export async function codes(file, name, signal) {
  const body = new FormData();
  body.append("file", file, name);
  return (await ask("/v1/audio/codes", { method: "POST", body, signal })).json();
}

/** Yields the events of a streamed transcription. */
export async function* transcribe(file, name, modelName, signal) {
  const body = new FormData();
  body.append("model", modelName);
  body.append("stream", "true");
  body.append("timestamp_granularities[]", "segment");
  body.append("file", file, name);
  const answer = await ask("/v1/audio/transcriptions", { method: "POST", body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The server broke off before the transcript was whole.", 0);
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new ServerError(told.error.message, 0);
      yield told;
    }
  }
}

// The head of both pages: which model there is, the key if the server asks for one, and what went wrong.

import { model, setKey } from "./server.js";

export const at = (id) => document.getElementById(id);

/** Shows a sentence in the page's place for faults; an empty one clears it. */
export function fault(message) {
  at("fault").textContent = message;
  at("fault").hidden = !message;
}

/** Asks for the model, now and whenever a key is given, and hands its entry of /v1/models to `use`. */
export function connect(use) {
  at("key-form").onsubmit = (event) => {
    event.preventDefault();
    setKey(at("key").value.trim());
    meet(use);
  };
  meet(use);
}

async function meet(use) {
  const chip = at("model");
  try {
    const entry = await model();
    chip.textContent = `${entry.id}, ready`;
    chip.className = "chip ready";
    at("key-form").hidden = true;
    fault(entry.hears ? "" : `The model '${entry.id}' does not hear; start the server with one that does.`);
    use(entry);
  } catch (error) {
    chip.textContent = error.status === 401 ? "locked" : "not reached";
    chip.className = "chip broken";
    if (error.status === 401) {
      const asked = !at("key-form").hidden;
      at("key-form").hidden = false;
      at("key-fault").textContent = asked ? error.message : "";
      at("key").focus();
    } else fault(error.message);
  }
}

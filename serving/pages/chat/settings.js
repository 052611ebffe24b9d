// The settings of a conversation, as its form shows them.

import { byId } from "/page/elements.js";

export const DEFAULTS = { temperature: 0.8, maxTokens: null, seed: null, system: "" };
const FIELDS = { temperature: "chat-temperature", maxTokens: "chat-max-tokens", seed: "chat-seed" };

export function showSettings(settings) {
  for (const [name, id] of Object.entries(FIELDS)) byId(id).value = settings[name] ?? "";
  byId("chat-system").value = settings.system;
}

export function readSettings() {
  const numbers = Object.entries(FIELDS).map(([name, id]) => [name, byId(id).value === "" ? null : byId(id).valueAsNumber]);
  const settings = { ...Object.fromEntries(numbers), system: byId("chat-system").value };
  return { ...settings, temperature: settings.temperature ?? DEFAULTS.temperature };
}

// A text that is continued has no system message, and needs a limit.
export function showKind(kind) {
  byId("chat-system-field").hidden = kind === "text";
  byId("chat-max-tokens").placeholder = kind === "text" ? "64" : "as many as fit";
}

// Tells a screen reader of answers as they come: whole sentences, never single tokens.

const PAUSE_MS = 3000; // at least so long after the sentences before
const END = /[.!?…:\n]/;
const SENTENCES = /^[^]*[.!?…:\n](?=\s|$)/; // up to the last end of a sentence

export class Announcer {
  constructor(region) {
    this.region = region;
    this.waiting = new Map(); // text by name of the one who speaks
    this.lastMs = 0;
  }

  say(text) {
    this.region.textContent = text;
    this.lastMs = performance.now();
  }

  add(name, piece) {
    const text = (this.waiting.get(name) ?? "") + piece;
    this.waiting.set(name, text);
    if (performance.now() - this.lastMs < PAUSE_MS || !END.test(piece)) return;
    const sentences = text.match(SENTENCES)?.[0] ?? "";
    if (!sentences.trim()) return;
    this.waiting.set(name, text.slice(sentences.length));
    this.say(`${name}: ${sentences.trim()}`);
  }

  // Says what is left of an answer, and how it ended.
  end(name, ending) {
    const rest = (this.waiting.get(name) ?? "").trim();
    this.waiting.delete(name);
    this.say([rest && `${name}: ${rest}`, ending].filter(Boolean).join(" "));
  }
}

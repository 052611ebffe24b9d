// Shows where the model learned a text: the spans that stand word for word in its training data, and their documents.

import { askJson } from "/page/api.js";
import { byId, element, fillTable, number, step } from "/page/elements.js";

// Returns where a document is, in words.
function place(document) {
  if (document.file === null) return `an unknown document, at token ${document.shard_token} of ${document.shard}`;
  return `${document.file}:${document.place}`;
}

function when({ num_steps: count, first_step: first, last_step: last }) {
  if (count === null) return "at unknown steps";
  if (count === 0) return "at no step up to this checkpoint";
  return count === 1 ? `at step ${first}` : `at ${count} steps, the first ${first}, the last ${last}`;
}

function quotation(document, text) {
  const quoted = element("blockquote", { className: "tokens" });
  quoted.append(document.before, element("mark", {}, text), document.behind);
  return quoted;
}

function described(document, text) {
  const size = document.tokens === null ? "" : ` The document has ${document.tokens} tokens.`;
  const heading = element("h3", {}, place(document));
  const about = element("p", { className: "quiet" }, `Learned ${when(document)}.${size}`);
  const shown = element("article", {}, heading, about, quotation(document, text));
  if (!document.steps.length) return shown;
  const columns = [["step"], ["loss then", "number"], ["tokens of it", "number"], ["epoch", "number"]];
  const rows = document.steps.map((s) => [`${s.step}`, number(s.loss), `${s.tokens}`, `${s.epoch}`]);
  shown.append(element("details", {}, element("summary", {}, "Steps"), fillTable(element("table"), "", columns, rows)));
  return shown;
}

// The switch below a completion. While it is on, each completion is traced.
export class TraceView {
  constructor(onError) {
    this.onError = onError;
    this.asked = null;
    this.switch = byId("trace-switch");
    this.switch.addEventListener("click", () => {
      this.switch.setAttribute("aria-checked", String(!this.isOn));
      this.update();
    });
    byId("trace-text").addEventListener("keydown", (event) => this.move(event));
  }

  get isOn() {
    return this.switch.getAttribute("aria-checked") === "true";
  }

  clear() {
    byId("trace").hidden = true;
    this.asked = null;
    this.empty();
  }

  // Takes the tokens of a completion with its prompt; `traces` says whether this endpoint has answers.
  show(model, tokens, { traces }) {
    byId("trace").hidden = !traces;
    this.asked = { model, tokens: tokens.map((token) => token.id) };
    if (traces) this.update();
  }

  empty() {
    byId("trace-status").textContent = "";
    byId("trace-text").replaceChildren();
    byId("trace-detail").replaceChildren();
  }

  async update() {
    this.empty();
    const { asked } = this;
    if (!this.isOn || asked === null) return;
    byId("trace-status").textContent = "Looking through the training data …";
    try {
      const answer = await askJson("/v1/trace", { body: asked });
      if (asked === this.asked && this.isOn) this.mark(answer);
    } catch (error) {
      if (asked !== this.asked) return;
      byId("trace-status").textContent = "";
      this.onError(error);
    }
  }

  // Makes each span a button. Where two overlap, the later one has what the earlier one has not.
  mark(answer) {
    const characters = [...answer.text];
    const parts = [];
    let end = 0;
    for (const span of answer.spans) {
      const start = Math.max(end, span.characters[0]);
      parts.push(characters.slice(end, start).join(""));
      end = span.characters[1];
      const button = element("button", { type: "button", className: "learned" }, characters.slice(start, end).join(""));
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-controls", "trace-detail");
      button.addEventListener("click", () => this.open(button, span));
      parts.push(button);
    }
    byId("trace-text").replaceChildren(...parts, characters.slice(end).join(""));
    const stands = `${answer.traced_tokens} of ${answer.num_tokens} tokens stand word for word in the training data`;
    byId("trace-status").textContent = [stands, ...answer.missing].join("; ");
  }

  open(button, span) {
    for (const other of this.buttons) other.setAttribute("aria-expanded", String(other === button));
    const atLeast = span.occurrences_at_most > span.occurrences ? "at least " : "";
    const counted = `${atLeast}${span.occurrences} times in the training data`;
    const title = `${span.tokens[1] - span.tokens[0]} tokens, ${span.occurrences === 1 ? "once in the training data" : counted}`;
    const more = span.occurrences - span.documents.length;
    byId("trace-detail").replaceChildren(
      element("p", {}, title),
      ...span.documents.map((document) => described(document, span.text)),
      ...(more > 0 ? [element("p", { className: "quiet" }, `and ${more} more`)] : []),
    );
  }

  get buttons() {
    return [...byId("trace-text").querySelectorAll("button")];
  }

  move(event) {
    const { buttons } = this;
    const next = step(event.key, buttons.indexOf(document.activeElement), buttons.length);
    if (next === null || !buttons.length) return;
    event.preventDefault();
    buttons[next].focus();
  }
}

// Shows the row of tokens, shaded by probability, and details of the chosen one.

import { element, fillTable, number, percent, shareBar, step, visible } from "/page/elements.js";

// Returns a token of the text, shaded. Control characters become visible; only `\n` keeps its effect.
export function shaded(token) {
  const text = token.text.replace(/\p{Cc}/gu, (c) => visible(c) + (c === "\n" ? c : ""));
  const node = element("span", { className: token.generated ? "token" : "token prompt" }, text || "∅");
  node.style.setProperty("--p", token.probability ?? 0);
  return node;
}

// Returns the tokens of one event of a stream.
export function streamedTokens(logprobs) {
  return logprobs.tokens.map((text, index) => {
    const top = Object.entries(logprobs.top_logprobs[index] ?? {}).map(([name, logprob]) => ({ text: name, probability: Math.exp(logprob) }));
    top.sort((a, b) => b.probability - a.probability);
    return { text, generated: true, probability: Math.exp(logprobs.token_logprobs[index]), top };
  });
}

// Returns the tokens of an x-ray, each with what the model expected there.
export function xrayTokens(answer) {
  return answer.tokens.map((token, index) => ({ ...token, ...(index ? answer.predictions[index - 1] : { top: [] }) }));
}

export class TokenRow {
  constructor(list, detail, onChoose) {
    this.list = list;
    this.detail = detail;
    this.onChoose = onChoose;
    this.tokens = [];
    const chosen = (event) => [...list.children].indexOf(event.target.closest("[role=option]"));
    list.addEventListener("click", (event) => chosen(event) >= 0 && this.choose(chosen(event), { focus: true }));
    list.addEventListener("pointerover", (event) => event.pointerType === "mouse" && chosen(event) >= 0 && this.choose(chosen(event)));
    list.addEventListener("keydown", (event) => {
      const next = step(event.key, this.chosen, this.tokens.length);
      if (next === null) return;
      event.preventDefault();
      this.choose(next, { focus: true });
    });
  }

  clear() {
    this.tokens = [];
    this.chosen = -1;
    this.list.replaceChildren();
    this.detail.replaceChildren();
  }

  append(tokens) {
    for (const token of tokens) {
      const node = shaded(token);
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      node.setAttribute("aria-label", `${visible(token.text)}, ${token.generated ? "" : "prompt, "}${percent(token.probability)}`);
      node.tabIndex = this.tokens.length ? -1 : 0;
      this.tokens.push(token);
      this.list.append(node);
    }
  }

  choose(index, { focus = false } = {}) {
    const nodes = this.list.children;
    for (const [i, node] of [...nodes].entries()) {
      node.setAttribute("aria-selected", String(i === index));
      node.tabIndex = i === index ? 0 : -1;
    }
    if (focus) nodes[index].focus();
    if (index === this.chosen) return;
    this.chosen = index;
    this.detail.replaceChildren(...describe(this.tokens[index], index));
    this.onChoose(index);
  }
}

function describe(token, index) {
  const facts = [
    ["token", `${visible(token.text)} (number ${index + 1})`],
    ["probability", percent(token.probability)],
  ];
  if (token.id !== undefined) {
    facts.push(
      ["rank, logit", `${token.rank ?? "–"}, ${number(token.logit)}`],
      ["drawn with", token.generated ? percent(token.drawn_probability) : "given"],
      ["entropy here", token.entropy_nats === undefined ? "–" : `${number(token.entropy_nats)} nats`],
      ["id, bytes", `${token.id}, ${token.bytes[0]} to ${token.bytes[1]}`],
      ["embedding norm", `${number(token.embedding_norm)} (position ${number(token.position_norm)})`],
      ["nearest tokens", token.nearest.map((n) => `${visible(n.text)} ${number(n.cosine, 2)}`).join(", ")],
    );
  }
  const about = fillTable(element("table"), "Token", [["what"], ["value", "name"]], facts);
  about.tHead.hidden = true;
  if (!token.top.length) return [about, element("p", { className: "quiet" }, "Nothing predicts the first token.")];
  const columns = [["token", "name"], ["probability", "number"], ["", "share"], ["logit", "number"]];
  const rows = token.top.map((t) => [visible(t.text), percent(t.probability), shareBar(t.probability), number(t.logit)]);
  return [about, fillTable(element("table"), "What the model expected here", columns, rows)];
}

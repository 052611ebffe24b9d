// Draws a conversation. Whatever a model or a person wrote is text, and never HTML.

import { element } from "/page/elements.js";
import { wordsOfEnding } from "/chat/answer.js";

const FOLLOWED_SHARE = 0.3; // of the window: so near its end, the page follows an answer that grows

export class Transcript {
  // `onAgain(index, column)` asks for an answer once more, and `onCopied` is told what to say of a copy; `about` has the
  // `steps` of versions and `mayLookInside`.
  constructor(log, { onAgain, onCopied, about }) {
    this.log = log;
    this.onAgain = onAgain;
    this.onCopied = onCopied;
    this.about = about;
  }

  show(conversation) {
    this.conversation = conversation;
    this.log.replaceChildren(...conversation.turns.map((_, index) => this.turn(index)));
    this.log.hidden = conversation.turns.length === 0;
  }

  // Draws one turn anew, or adds it.
  redraw(index) {
    const node = this.turn(index);
    const before = this.log.children[index];
    if (before) before.replaceWith(node);
    else this.log.append(node);
    this.log.hidden = false;
    if (!before) this.toEnd();
  }

  // Draws one answer anew; another one beside it may still grow.
  redrawAnswer(index, column) {
    const node = this.answer(this.conversation.turns[index].answers[column], index, column);
    this.nodeOf(index, column).replaceWith(node);
    this.follow();
  }

  nodeOf(index, column) {
    const place = this.conversation.turns[index].answers.slice(0, column).filter(Boolean).length;
    return this.log.children[index].querySelectorAll(".answer")[place];
  }

  turn(index) {
    const { text, answers } = this.conversation.turns[index];
    const isText = this.conversation.kind === "text";
    const said = element("div", { className: "said" }, text);
    const asked = element("section", { className: "asked" }, element("h3", {}, isText ? "Text" : "You"), said);
    asked.setAttribute("aria-label", isText ? "Text" : "You");
    const columns = answers.map((answer, column) => answer && this.answer(answer, index, column)).filter(Boolean);
    const side = element("div", { className: columns.length > 1 ? "answers beside" : "answers" }, ...columns);
    return element("article", { className: "turn" }, asked, side);
  }

  answer(answer, index, column) {
    const said = element("div", { className: "said" }, answer.text);
    const node = element("section", { className: "answer" }, element("h3", {}, answer.model), said);
    node.setAttribute("aria-label", `Answer of ${answer.model}`);
    node.setAttribute("aria-busy", String(answer.ending === null));
    if (answer.problem) node.append(element("p", { className: "wrong" }, answer.problem));
    node.append(element("p", { className: "quiet about" }, ...this.facts(answer, index, column)));
    return node;
  }

  facts(answer, index, column) {
    const { steps, mayLookInside } = this.about();
    const step = steps.get(answer.version);
    const facts = [
      answer.version && `version ${answer.version}${step === undefined ? "" : `, step ${step}`}`,
      answer.tokenIds.length > 0 && `${answer.tokenIds.length} tokens`,
      answer.version && `seed ${answer.seed}`,
      wordsOfEnding(answer.ending),
    ];
    const nodes = [facts.filter(Boolean).join(" · ")];
    if (answer.ending === null) return nodes;
    if (answer.text) nodes.push(" ", this.copyButton(answer, index, column));
    if (mayLookInside && answer.tokenIds.length && answer.promptIds.length) {
      const link = element("a", { href: `#inside/${this.conversation.id}/${index}/${column}` }, "Look inside");
      link.setAttribute("aria-label", `Look inside the answer of ${answer.model} to turn ${index + 1}`);
      nodes.push(" ", link);
    }
    if (["failed", "stopped", "interrupted"].includes(answer.ending)) {
      const again = element("button", { type: "button", className: "small" }, "Try again");
      again.addEventListener("click", () => this.onAgain(index, column));
      nodes.push(" ", again);
    }
    return nodes;
  }

  copyButton(answer, index, column) {
    const button = element("button", { type: "button", className: "small" }, "Copy");
    button.setAttribute("aria-label", `Copy the answer of ${answer.model} to turn ${index + 1}`);
    button.addEventListener("click", async () => {
      const isCopied = await copied(answer.text, this.nodeOf(index, column).querySelector(".said"));
      button.textContent = isCopied ? "Copied" : "Selected";
      this.onCopied(isCopied ? "The answer is copied." : "The browser does not let this page copy. The answer is selected: copy it by hand.");
    });
    return button;
  }

  // Returns a function that adds a piece to an answer which grows. Pieces are drawn together, once a frame: the layout of a
  // long answer takes longer than a token.
  grower(index, column) {
    const said = this.nodeOf(index, column).querySelector(".said");
    const node = document.createTextNode(said.textContent);
    said.replaceChildren(node);
    let waiting = "";
    const draw = () => {
      node.appendData(waiting);
      waiting = "";
      if (node.isConnected) this.follow();
    };
    return (piece) => {
      if (!waiting) requestAnimationFrame(draw);
      waiting += piece;
    };
  }

  follow() {
    const { scrollHeight } = document.documentElement;
    if (scrollHeight - innerHeight - scrollY < FOLLOWED_SHARE * innerHeight) this.toEnd();
  }

  toEnd() {
    scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  }
}

// Returns whether the text is in the clipboard. Only with TLS, or on this machine, does a page have one; elsewhere the text's
// node is selected, and the browser copies that or leaves it to the reader.
async function copied(text, node) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(node);
    return document.execCommand("copy");
  }
}

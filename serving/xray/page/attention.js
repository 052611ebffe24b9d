// Shows the attention map of one layer and head: a canvas, the chosen row in words, and everything as a table.

import { byId, element, fillTable, number, visible, Tabs } from "/page/elements.js";

const LABEL_PX = 72;
const MIN_LABELLED_PX = 9; // height of a row; smaller letters cannot be read

export class AttentionView {
  // `load(layer)` returns the maps of a layer, by head.
  constructor(load, onError) {
    this.load = load;
    this.onError = onError;
    this.canvas = byId("map");
    this.layers = new Tabs(byId("layers"), (index) => this.showLayer(index));
    this.heads = new Tabs(byId("heads"), (index) => this.showHead(index));
    byId("row").addEventListener("input", () => this.showRow(Number(byId("row").value)));
    byId("map-details").addEventListener("toggle", () => this.fillTable());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // Shows a new query, given the tokens that were read.
  show(tokens, numLayers, numHeads) {
    this.tokens = tokens.map((token) => visible(token.text));
    this.row = tokens.length - 1;
    this.maps = new Map();
    this.layer = this.head = 0;
    for (const [name, count] of [["layers", numLayers], ["heads", numHeads]]) {
      byId(name).replaceChildren(
        ...Array.from({ length: count }, (_, index) => {
          const tab = element("button", { type: "button" }, String(index));
          tab.setAttribute("role", "tab");
          tab.setAttribute("aria-controls", "map-panel");
          return tab;
        }),
      );
    }
    byId("row").max = tokens.length - 1;
    this.heads.choose(0);
    return this.layers.choose(0);
  }

  async showLayer(layer) {
    this.layer = layer;
    try {
      const { maps } = this;
      if (!maps.has(layer)) maps.set(layer, await this.load(layer));
      if (maps === this.maps && layer === this.layer) this.showHead(this.head);
    } catch (error) {
      this.onError(error);
    }
  }

  showHead(head) {
    this.head = head;
    this.rows = this.maps.get(this.layer)?.[head];
    if (!this.rows) return;
    this.canvas.setAttribute("aria-label", `Attention of layer ${this.layer}, head ${head}: ${this.rows.length} tokens, each attending to itself and those before it`);
    this.canvas.dataset.shows = `${this.layer}/${head}`;
    this.showRow(this.row);
    this.fillTable();
  }

  showRow(row, column = null) {
    this.row = Math.min(row, this.tokens.length - 1);
    byId("row").value = this.row;
    byId("row").setAttribute("aria-valuetext", `${this.tokens[this.row]}, ${this.row + 1} of ${this.tokens.length}`);
    if (!this.rows) return;
    const weights = this.rows[this.row];
    const order = weights.map((weight, index) => [weight, index]).sort((a, b) => b[0] - a[0]);
    const shown = column === null || column > this.row ? order.slice(0, 6) : [[weights[column], column]];
    byId("looks").replaceChildren(
      fillTable(
        element("table"),
        `${this.tokens[this.row]} (${this.row + 1}) attends to`,
        [["token", "name"], ["weight", "number"]],
        shown.map(([weight, index]) => [`${this.tokens[index]} (${index + 1})`, number(weight)]),
      ),
    );
    this.draw();
  }

  point(event) {
    const { left, top, size } = this.frame;
    const column = Math.floor((event.offsetX - left) / size);
    const row = Math.floor((event.offsetY - top) / size);
    if (row >= 0 && column >= 0 && row < this.tokens.length && column <= row) this.showRow(row, column);
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!this.rows || !width) return;
    const count = this.tokens.length;
    const label = (width - LABEL_PX) / count >= MIN_LABELLED_PX ? LABEL_PX : 0;
    const size = (width - label - 2) / count;
    this.frame = { left: label, top: 1, size };
    const height = Math.ceil(size * count + 2);
    this.canvas.style.height = `${height}px`;
    this.canvas.width = width * devicePixelRatio;
    this.canvas.height = height * devicePixelRatio;
    const style = getComputedStyle(document.documentElement);
    const context = this.canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    context.fillStyle = style.getPropertyValue("--card");
    context.beginPath();
    context.moveTo(label, 1);
    context.lineTo(label + size * count, 1 + size * count);
    context.lineTo(label, 1 + size * count);
    context.fill();
    context.fillStyle = style.getPropertyValue("--bar");
    this.rows.forEach((weights, row) =>
      weights.forEach((weight, column) => {
        context.globalAlpha = Math.sqrt(weight); // or small weights would be invisible beside large ones
        context.fillRect(label + column * size, 1 + row * size, size - (size > 6 ? 1 : 0), size - (size > 6 ? 1 : 0));
      }),
    );
    context.globalAlpha = 1;
    context.strokeStyle = style.getPropertyValue("--accent");
    context.lineWidth = 2;
    context.strokeRect(label, 1 + this.row * size, (this.row + 1) * size, size);
    if (!label) return;
    context.fillStyle = style.getPropertyValue("--text");
    context.font = `${Math.min(13, Math.max(8, size * 0.8))}px ui-monospace, monospace`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    this.tokens.forEach((token, row) => context.fillText(token.slice(0, 9), label - 6, 1 + (row + 0.5) * size, label - 6));
  }

  fillTable() {
    if (!byId("map-details").open || !this.rows) return;
    const columns = [["token", "name"], ...this.tokens.map((token) => [token, "number"])];
    const cells = this.rows.map((weights, row) => [
      this.tokens[row],
      ...this.tokens.map((_, column) => (column <= row ? number(weights[column]) : "")),
    ]);
    fillTable(byId("map-table"), `Layer ${this.layer}, head ${this.head}: each row attends to its columns`, columns, cells);
  }
}

// Shows where a query's time went, and its stages.

import { byId, element, fillTable, number } from "/page/elements.js";

const SVG = "http://www.w3.org/2000/svg";
const TOLD = {
  queue: "until the x-ray's process was free",
  tokenize: "text to tokens",
  prefill: "reads the prompt",
  decode: "reads each new token",
  sample: "draws each new token",
  detokenize: "tokens to text",
  inspect: "nearest tokens, alternatives, attention as JSON; an x-ray only",
  network: "to the endpoint and back, as this page saw it; drawn at the end",
};

// Returns the phases with all their spans; the rest of the page's wait is the network.
export function phases(answer) {
  const { spans, total_ms: total } = answer.timeline;
  const names = [...new Set(["queue", "tokenize", "prefill", "sample", "decode", "detokenize", "inspect", ...spans.map((s) => s.name)])];
  const found = names.map((name) => ({ name, spans: spans.filter((span) => span.name === name) }));
  const network = Math.max(0, answer.wall_ms - total);
  found.push({ name: "network", spans: [{ start_ms: total, ms: network }] });
  return found.filter((p) => p.spans.length).map((p) => ({ ...p, ms: p.spans.reduce((sum, s) => sum + s.ms, 0) }));
}

export function showTime(answer, streamed) {
  const all = phases(answer);
  const wall = answer.wall_ms;
  const rows = all.map((p) => [p.name, track(p.spans, wall), number(p.ms, 1), TOLD[p.name] ?? ""]);
  fillTable(byId("gantt"), "This x-ray", [["phase"], ["when", "track"], ["ms", "number"], ["what", "note"]], rows);
  const sum = all.reduce((total, p) => total + p.ms, 0);
  byId("gantt-sum").textContent = `The phases add up to ${number(sum, 1)} ms, ${number((100 * sum) / wall, 1)} % of the whole ${number(wall, 1)} ms.`;
  byId("gantt-sum").dataset.ratio = sum / wall;
  byId("streamed").textContent = streamedTime(streamed);
}

function streamedTime({ start, times }) {
  if (!times.length) return "";
  const mean = times.length > 1 ? `, then ${number((times.at(-1) - times[0]) / (times.length - 1), 1)} ms a token` : "";
  return `The completion above was streamed: first token after ${number(times[0] - start, 1)} ms${mean}.`;
}

function track(spans, wall) {
  const svg = document.createElementNS(SVG, "svg");
  const rect = (className, x, width) => {
    const node = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries({ class: className, x, width, y: 1, height: 18 })) node.setAttribute(name, value);
    svg.append(node);
  };
  svg.setAttribute("viewBox", "0 0 1000 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  rect("lane", 0, 1000);
  for (const span of spans) rect("bar", (1000 * span.start_ms) / wall, Math.max(2, (1000 * span.ms) / wall));
  return svg;
}

export function showStages(stages) {
  const rows = stages.map((s) => [
    s.layer === null ? s.name : `layer ${s.layer}: ${s.name}`,
    s.shape ? `[${s.shape.join(", ")}]` : "text",
    number(s.ms, 2),
    element("span", {}, s.note),
  ]);
  fillTable(byId("stage-table"), "", [["stage"], ["shape", "name"], ["ms", "number"], ["what", "note"]], rows);
}

// Builds parts of the document: elements, tables, tabs.

export function byId(id) {
  return document.getElementById(id);
}

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Gives the focus to a field of a form, unless it is within the form already: who has begun to fill it in keeps their place.
export function offerFocus(form, field) {
  if (!form.contains(document.activeElement)) field.focus();
}

// Makes blanks, line ends and control characters visible.
export function visible(text) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥" };
  return text.replace(/[\s\p{Cc}]/gu, (c) => signs[c] ?? `\\x${c.codePointAt(0).toString(16).padStart(2, "0")}`) || "∅";
}

export function number(value, digits = 3) {
  return value == null ? "–" : value.toFixed(digits);
}

export function percent(value) {
  return value == null ? "–" : `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`;
}

// Fills a table. `columns` are [title, class], each row an array of strings and nodes; its first cell is the row's header.
export function fillTable(table, caption, columns, rows) {
  const cell = (tag, content, index) => {
    const node = element(tag, { className: columns[index][1] ?? "" }, content);
    if (tag === "th") node.scope = "row";
    return node;
  };
  const titles = columns.map(([title, className]) => element("th", { scope: "col", className: className ?? "" }, title));
  table.replaceChildren(
    ...(caption ? [element("caption", {}, caption)] : []),
    element("thead", {}, element("tr", {}, ...titles)),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((c, i) => cell(i ? "td" : "th", c, i))))),
  );
  return table;
}

export function shareBar(share) {
  const bar = element("span");
  bar.style.width = `${100 * share}%`;
  return bar;
}

// Tabs in the ARIA pattern: one of them is in the tab order; the arrow keys, Home and End move and select.
export class Tabs {
  constructor(list, onChoose) {
    this.list = list;
    this.onChoose = onChoose;
    list.addEventListener("click", (event) => {
      const tab = event.target.closest("[role=tab]");
      if (tab) this.choose(this.tabs.indexOf(tab));
    });
    list.addEventListener("keydown", (event) => {
      const next = step(event.key, this.tabs.indexOf(document.activeElement), this.tabs.length);
      if (next === null) return;
      event.preventDefault();
      this.choose(next);
      this.tabs[next].focus();
    });
  }

  get tabs() {
    return [...this.list.querySelectorAll("[role=tab]:not([hidden])")];
  }

  choose(index) {
    this.tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === index));
      tab.tabIndex = i === index ? 0 : -1;
    });
    this.onChoose(index, this.tabs[index]);
  }
}

// Returns where a key leads among `count` things in a row, or null for other keys.
export function step(key, index, count) {
  const target = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: count - 1 }[key];
  return target === undefined ? null : (target + count) % count;
}
